"""Group norm: right under every transform, faster under vmap, and its rows.

torch (2.13) takes the backward of group norm apart into plain operations as soon as its
own derivative could be wanted, as always in torch.func.grad, before any batching rule
sees it. Layer norm over each group, and an affine map of each channel as batch norm by
the statistics 0 and 1, are the same function and stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from vmapsafe.rules import references
from vmapsafe.rules.kept_calls import ByKernel, KeptCalls, keep_calls
from vmapsafe.rules.normalisation import (
    fused_layer_norm,
    has_own_weights,
    normalised,
    scaled_and_shifted,
    specimen,
    torchs_own_fails,
)

# Values per sample and channel from which on layer norm and batch norm win, by type of
# device. Measured on an x86 server core, float32, torch 2.13.
REGIMES = {"cpu": 256}

_NAMES = ("input", "num_groups", "weight", "bias", "eps")


def by_groups(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm, right in every derivative."""
    fails = torchs_own_fails(x, weight, bias)
    if not fails and not batched_levels((x,)):
        # torch's backward can end the process where channels lie last (2.13).
        return F.group_norm(x.contiguous(), groups, weight, bias, eps)
    grouped = x.reshape(x.size(0), groups, x.shape[1:].numel() // groups)
    if fails:
        y = normalised(grouped, [2], eps).reshape(x.shape)
        given = F.group_norm(specimen(x), 1).dtype
        return scaled_and_shifted(y, weight, bias).to(given)
    # torch's group norm asks for a layout that vmap cannot tell; layer norm does not.
    y = fused_layer_norm(grouped, grouped.shape[2:], None, None, eps)
    return scaled_and_shifted(y.reshape(x.shape), weight, bias)


# -- For speed -------------------------------------------------------------------------


def _is_worth(call: Call) -> bool:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    return (
        weight is not None
        and bias is not None
        and x.dtype == weight.dtype == bias.dtype
        and x.dim() > 2
        and x.numel() > 0
        and x.device.type in REGIMES
        and x.shape[2:].numel() >= REGIMES[x.device.type]
        and not autocasts(x.device)
        and not has_own_weights(call)  # left to _record below
        and not beyond_reverse_mode(x, weight, bias)
    )


def _by_other_norms(call: Call) -> Tensor:
    x, groups, weight, bias, eps = [call[name] for name in _NAMES]
    if innermost(x).numel() == 0:  # of an empty batch vmap forgets shapes (torch 2.13)
        return torch.clone(x)
    if current_level() == 0 or not is_differentiated(x):  # torch's forward is whole
        return by_groups(x, groups, weight, bias, eps)
    grouped = x.reshape(x.size(0), groups, x.shape[1:].numel() // groups)
    y = F.layer_norm(grouped, grouped.shape[2:], None, None, eps)
    # One layout, see normalisation.py.
    y = y.reshape(*x.shape[:2], x.shape[2:].numel())
    mean, var = y.new_zeros(x.size(1)), y.new_ones(x.size(1))
    y = F.batch_norm(y, mean, var, weight, bias, False, 0.0, 0.0)
    return y.reshape(x.shape)


# -- Where torch's own fails -----------------------------------------------------------


def _torchs_own_fails(call: Call) -> bool:
    x, groups, weight, bias, _ = [call[name] for name in _NAMES]
    if x.dim() < 2 or x.size(1) % groups or x.numel() <= groups:
        return False  # for torch to refuse
    return bool(batched_levels((x,)) or torchs_own_fails(x, weight, bias))


def _fails_for_all(call: Call) -> bool:
    return not has_own_weights(call) and _torchs_own_fails(call)


def _by_groups(call: Call) -> Tensor:
    return by_groups(*[call[name] for name in _NAMES])


def _plain(call: Call) -> Tensor:
    return references.group_norm(call, call["num_groups"])


register(
    FunctionRule(
        name="group_norm, by layer norm and batch norm",
        functions=(F.group_norm,),
        modes=MODES,
        accepts=_is_worth,
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
        accepts=_fails_for_all,
        batched=_by_groups,
        reference=slice_by_slice(_plain),
    )
)


# -- Rows ------------------------------------------------------------------------------


def _keep(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> ByKernel | None:
    """A norm of one sample with B * N * C channels, each with a weight of its own: the
    kernel's gradients by the weights are the rows."""
    if input.dim() < 3 or not input.numel() or input.size(2) % num_groups:
        return None
    if input[0].numel() <= num_groups:  # for torch to refuse
        return None
    given = [p for p in (weight, bias) if p is not None]
    channels = input.shape[2:3]
    if not all([p.dtype == input.dtype and p.shape == channels for p in given]):
        return None
    if autocasts(input.device):
        return None
    shape = input.shape[:3]  # B, N, C
    samples = shape[0] * shape[1]
    sizes = 1, shape.numel(), input.shape[3:].numel(), samples * num_groups

    def merged(t: Tensor) -> Tensor:
        return t.reshape(sizes[:3]).contiguous()

    def repeated(p: Tensor | None) -> Tensor | None:
        return None if p is None else p.repeat(samples)

    def forward(x: Tensor) -> Sequence[Tensor]:
        given = merged(x), repeated(weight), repeated(bias)
        y, mean, rstd = torch.native_group_norm(*given, *sizes, eps)
        return y.view(x.shape), mean, rstd

    def backward(
        grad: Tensor, x: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        given = merged(grad), merged(x), *saved, repeated(weight)
        of_input, *rows = torch.ops.aten.native_group_norm_backward(
            *given, *sizes, wanted
        )
        return (
            of_input.view(x.shape) if wanted[0] else None,
            *[r.view(shape).sum(1) if w else None for r, w in zip(rows, wanted[1:])],
        )

    return ByKernel(forward, backward)


def _otherwise(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    given = input, num_groups, weight, bias, eps
    fails = _torchs_own_fails(Call(F.group_norm, dict(zip(_NAMES, given))))
    return (by_groups if fails else F.group_norm)(*given)


keep_calls(F.group_norm, KeptCalls(_keep, otherwise=_otherwise))
