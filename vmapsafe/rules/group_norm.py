"""Group norm: right under every transform, and its rows.

torch (2.13) splits the backward of group norm into many operations if a derivative of
it may follow, which is always so in torch.func.grad. It does this before any batching
rule sees the backward. Layer norm over each group, with batch norm for the affine map
of each channel, is the same function, and torch does not split its backward. It was
tried, and was slower in whole networks (x86 server core, torch 2.13).
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
)
from vmapsafe.rules import references
from vmapsafe.rules.kept_calls import Affine, ByKernel, KeptCalls, keep_calls
from vmapsafe.rules.normalisation import (
    fused_layer_norm,
    has_own_weights,
    normalised,
    scaled_and_shifted,
    specimen,
    torchs_own_fails,
)

_NAMES = ("input", "num_groups", "weight", "bias", "eps")


def by_groups(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm, right in every derivative."""
    fails = torchs_own_fails(x, weight, bias)
    if not fails and not batched_levels((x,)):
        # torch's backward can crash the process if the input is channels last (2.13).
        return F.group_norm(x.contiguous(), groups, weight, bias, eps)
    grouped = x.reshape(x.size(0), groups, x.shape[1:].numel() // groups)
    if fails:
        y = normalised(grouped, [2], eps).reshape(x.shape)
        given = F.group_norm(specimen(x), 1).dtype
        return scaled_and_shifted(y, weight, bias).to(given)
    # torch's group norm queries the memory layout, which vmap refuses to answer.
    y = fused_layer_norm(grouped, grouped.shape[2:], None, None, eps)
    return scaled_and_shifted(y.reshape(x.shape), weight, bias)


# -- Where torch's own fails -----------------------------------------------------------


def _torchs_own_fails(call: Call) -> bool:
    x, groups, weight, bias, _ = [call[name] for name in _NAMES]
    if x.dim() < 2 or x.size(1) % groups or x.numel() <= groups:
        return False  # torch refuses such a call
    return bool(batched_levels((x,)) or torchs_own_fails(x, weight, bias))


def _fails_for_all(call: Call) -> bool:
    return not has_own_weights(call) and _torchs_own_fails(call)


def _by_groups(call: Call) -> Tensor:
    return by_groups(*[call[name] for name in _NAMES])


def _plain(call: Call) -> Tensor:
    return references.group_norm(call, call["num_groups"])


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
    """The call as group norm of one sample with B * N * C channels.

    Each of these has a weight of its own, so the kernel's weight gradients are the rows
    of all samples.
    """
    if input.dim() < 3 or not input.numel() or input.size(2) % num_groups:
        return None
    if input[0].numel() <= num_groups:  # torch refuses such a call
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

    affine = Affine(lambda x: F.group_norm(x, num_groups, None, None, eps), first=2)
    return ByKernel(forward, backward, affine)


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
