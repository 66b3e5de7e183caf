"""RMS norm: right in every derivative, and the rows of the weight.

On the CPU torch (2.13) computes RMS norm by ordinary operations, whose derivatives are
right. On CUDA torch has a fused kernel, whose backward gets the saved root mean square.
The rule here writes RMS norm out if more than the first derivative may be taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, register, slice_by_slice
from vmapsafe._torch import autograd_records
from vmapsafe.rules.kept_calls import Affine, ByKernel, KeptCalls, keep_calls
from vmapsafe.rules.normalisation import has_own_weights, torchs_own_fails
from vmapsafe.rules.precision import wide


def _torchs_own_fails(call: Call) -> bool:
    x, shape = call["input"], tuple(call["normalized_shape"])
    if tuple(x.shape[x.dim() - len(shape) :]) != shape:
        return False  # torch refuses such a call
    if torchs_own_fails(x, call["weight"]):
        return True
    # The fused kernel is for one derivative, as of rows, whose slices have weights of
    # their own.
    fused = x.device.type != "cpu"
    again = fused and autograd_records(x, call["weight"])
    return again and not has_own_weights(call)


def _written_out(call: Call) -> Tensor:
    x, weight = call["input"], call["weight"]
    y = wide(x) * _reciprocal(x, len(call["normalized_shape"]), call["eps"])
    if weight is not None:
        y = y * wide(weight)
    return y.to(call["input"].dtype)


def _reciprocal(x: Tensor, last: int, eps: float | None) -> Tensor:
    """1 / (root mean square) over the last dimensions; for halves in float32."""
    x = wide(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return torch.rsqrt(x.square().mean(list(range(-last, 0)), keepdim=True) + eps)


def _plain(call: Call) -> Tensor:
    """RMS norm by Zhang and Sennrich, https://arxiv.org/abs/1910.07467, equation 4."""
    x: Tensor = call["input"]
    dims = list(range(-len(call["normalized_shape"]), 0))
    eps = torch.finfo(x.dtype).eps if call["eps"] is None else call["eps"]
    y = x / torch.sqrt((x**2).mean(dims, keepdim=True) + eps)
    return y if call["weight"] is None else y * call["weight"]


register(
    FunctionRule(
        name="rms_norm, where torch's own fails",
        functions=(F.rms_norm,),
        modes=MODES,
        accepts=_torchs_own_fails,
        batched=_written_out,
        reference=slice_by_slice(_plain),
    )
)


# -- Rows ------------------------------------------------------------------------------


def _keep(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> ByKernel | None:
    shape = tuple(normalized_shape)
    if weight is None or weight.dtype != input.dtype or tuple(weight.shape) != shape:
        return None
    last = len(shape)
    if not input.numel() or input.dim() <= last or tuple(input.shape[-last:]) != shape:
        return None
    positions, numbers = list(range(1, input.dim() - last)), list(range(-last, 0))

    def forward(x: Tensor) -> Sequence[Tensor]:
        reciprocal = _reciprocal(x, last, eps)
        return (wide(x) * reciprocal * wide(weight)).to(x.dtype), reciprocal

    def backward(
        grad: Tensor, x: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        (reciprocal,) = saved
        grad, y = wide(grad), wide(x) * reciprocal
        of_input = of_weight = None
        if wanted[1]:
            of_weight = grad * y
            of_weight = of_weight.sum(positions) if positions else of_weight
            of_weight = of_weight.to(x.dtype)
        if wanted[0]:
            grad = grad * wide(weight)
            along = (grad * y).mean(numbers, keepdim=True)
            of_input = ((grad - y * along) * reciprocal).to(x.dtype)
        return of_input, of_weight

    affine = Affine(lambda x: F.rms_norm(x, shape, None, eps), first=-last)
    return ByKernel(forward, backward, affine)


keep_calls(F.rms_norm, KeptCalls(_keep, parameters=("weight",)))
