"""RMS norm: right in every derivative.

On the CPU torch (2.13) computes RMS norm by ordinary operations, whose derivatives are
right. On CUDA torch has a fused kernel, whose backward gets the saved root mean square.
The rule here writes RMS norm out if more than the first derivative may be taken.
Per-sample gradients do not keep its calls (see ``kept_calls``): a trial did not make
them faster.
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
        return False  # torch refuses such a call
    if torchs_own_fails(x, call["weight"]):
        return True
    # If slices have weights of their own, for rows, only one derivative is taken.
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
    """RMS norm by Zhang and Sennrich, https://arxiv.org/abs/1910.07467, equation 4."""
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
