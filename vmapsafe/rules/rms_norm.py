"""RMS norm: right in every derivative.

On the CPU torch (2.13) computes it in plain operations, which are right. On CUDA it has
a fused kernel, whose backward is given the saved root mean square. Here it is written
out where more than the first derivative may be taken. KeptCalls its calls for rows was
tried and gained nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, register, slice_by_slice
from vmapsafe._torch import autograd_records
from vmapsafe.rules.normalisation import has_own_weights, torchs_own_fails
from vmapsafe.rules.precision import wide


def _torchs_own_fails(call: Call) -> bool:
    x, shape = call["input"], tuple(call["normalized_shape"])
    if tuple(x.shape[x.dim() - len(shape) :]) != shape:
        return False  # for torch to refuse
    if torchs_own_fails(x, call["weight"]):
        return True
    # Of rows, for which slices have weights of their own, there is one derivative.
    return autograd_records(x, call["weight"]) and not has_own_weights(call)


def _written_out(call: Call) -> Tensor:
    x, weight, eps = wide(call["input"]), call["weight"], call["eps"]
    dims = list(range(-len(call["normalized_shape"]), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * wide(weight)
    return y.to(call["input"].dtype)


def _plain(call: Call) -> Tensor:
    """Zhang and Sennrich, https://arxiv.org/abs/1910.07467, equation 4."""
    x: Tensor = call["input"]
    dims = list(range(-len(call["normalized_shape"]), 0))
    y = x / torch.sqrt((x**2).mean(dims, keepdim=True) + call["eps"])
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
