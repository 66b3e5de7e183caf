"""Linear layers, of one sample each: a faster batching rule.

The forward is one fused call where torch multiplies and then adds the bias. The rows of
the weight are products of a batch of matrices in torch's rule, which nothing beats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmapsafe._call import Call, batch_first
from vmapsafe._rule import OperatorRule, register, slice_by_slice
from vmapsafe.rules.regimes import REGIMES, regimes

_addmm = torch.ops.aten.addmm.default


def _adds_a_bias(call: Call) -> bool:
    bias, x, weight = call["self"], call["mat1"], call["mat2"]
    numbers = x.numel() // max(1, len(weight)) * weight.size(-1)
    return (
        numbers >= regimes(x.device).linear
        and call.in_dims["mat1"] is not None
        and call.in_dims["mat2"] is None
        and call.in_dims["self"] is None
        and bias.dim() == 1
        and bias.dtype == x.dtype == weight.dtype
    )


def _fused(call: Call) -> tuple[Tensor]:
    x = batch_first(call, "mat1")
    y = _addmm(**{**call.arguments, "mat1": x.flatten(0, 1)})
    return (y.unflatten(0, x.shape[:2]),)


# -- The slow form -------------------------------------------------------------------


def _plain_sum(call: Call) -> Tensor:
    product = torch.einsum("ij,jk->ik", call["mat1"], call["mat2"])
    total: Tensor = call["beta"] * call["self"] + call["alpha"] * product
    return total


register(
    OperatorRule(
        name="addmm, batches merged",
        operator=_addmm,
        accepts=_adds_a_bias,
        batched=_fused,
        reference=slice_by_slice(_plain_sum),
        devices=REGIMES,
    )
)
