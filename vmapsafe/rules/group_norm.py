"""Group norm of a module: faster under vmap, by operations that have fast rules there.

torch (2.13) takes the backward of group norm apart into plain operations as soon as its
own derivative could be wanted, as always in torch.func.grad, before any batching rule
sees it. Layer norm over each group, and an affine map of each channel as batch norm by
the statistics 0 and 1, are the same function and stay whole.

Instance norm needs nothing here: torch makes it batch norm, with a channel for each
sample and channel, see ``native_batch_norm``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, register, slice_by_slice
from vmapsafe._torch import (
    autocasts,
    batched_levels,
    beyond_reverse_mode,
    current_level,
    innermost,
    is_differentiated,
)
from vmapsafe.rules.batch_norm import by_groups, has_own_weights, torchs_own_fails
from vmapsafe.rules.regimes import regimes


def _accepts(call: Call) -> bool:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    return (
        weight is not None
        and bias is not None
        and x.dtype == weight.dtype == bias.dtype
        and x.dim() > 2
        and x.numel() > 0
        and x.shape[2:].numel() >= regimes(x.device).group_norm
        and not autocasts(x.device)
        and not has_own_weights(call)  # left to _record
        and not beyond_reverse_mode(x, weight, bias)
    )


def _by_other_norms(call: Call) -> Tensor:
    x, groups, eps = call["input"], call["num_groups"], call["eps"]
    weight, bias = call["weight"], call["bias"]
    if innermost(x).numel() == 0:  # of an empty batch vmap forgets shapes (torch 2.13)
        return torch.clone(x)
    if current_level() == 0 or not is_differentiated(x):  # torch's forward is whole
        return by_groups(x, groups, weight, bias, eps)
    grouped = x.reshape(x.size(0), groups, x.shape[1:].numel() // groups)
    y = F.layer_norm(grouped, grouped.shape[2:], None, None, eps)
    y = y.reshape(*x.shape[:2], x.shape[2:].numel())  # one layout, see batch_norm.py
    mean, var = y.new_zeros(x.size(1)), y.new_ones(x.size(1))
    y = F.batch_norm(y, mean, var, weight, bias, False, 0.0, 0.0)
    return y.reshape(x.shape)


def _plain(call: Call) -> Tensor:
    """As written (Wu and He, https://arxiv.org/abs/1803.08494, equation 7)."""
    x = call["input"]
    groups: int = call["num_groups"]
    grouped: Tensor = x.reshape(x.size(0), groups, x[0].numel() // groups)
    mean = grouped.mean(2, keepdim=True)
    var = (grouped - mean).square().mean(2, keepdim=True)
    y = ((grouped - mean) / torch.sqrt(var + call["eps"])).reshape(x.shape)
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    if call["weight"] is not None:
        y = y * call["weight"].reshape(shape)
    if call["bias"] is not None:
        y = y + call["bias"].reshape(shape)
    return y


def _torchs_own_fails(call: Call) -> bool:
    x, groups = call["input"], call["num_groups"]
    if x.dim() < 2 or x.size(1) % groups or x.numel() <= groups:
        return False  # for torch to refuse
    if has_own_weights(call):
        return False  # left to _record
    return bool(
        batched_levels((x,)) or torchs_own_fails(x, call["weight"], call["bias"])
    )


def _by_groups(call: Call) -> Tensor:
    arguments = [call[name] for name in ("num_groups", "weight", "bias", "eps")]
    return by_groups(call["input"], *arguments)


register(
    FunctionRule(
        name="group_norm, by layer norm and batch norm",
        functions=(F.group_norm,),
        modes=MODES,
        accepts=_accepts,
        batched=_by_other_norms,
        reference=slice_by_slice(_plain),
        speed=True,
    )
)
register(
    FunctionRule(
        name="group_norm, where torch's own fails",
        functions=(F.group_norm,),
        modes=MODES,
        accepts=_torchs_own_fails,
        batched=_by_groups,
        reference=slice_by_slice(_plain),
    )
)
