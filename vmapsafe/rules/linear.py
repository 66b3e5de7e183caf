"""Linear layers, of one sample each: two faster batching rules.

The rows of the weight are products of a batch of matrices in torch's rule as in ours,
which writes them into memory that is cheaper to write (``_memory``). The forward is one
fused call where torch multiplies and then adds the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmapsafe import _memory
from vmapsafe._call import Call, batch_first, is_plain
from vmapsafe._rule import MODES, Rule, register, slice_by_slice
from vmapsafe.rules.regimes import REGIMES, regimes

_mm = torch.ops.aten.mm.default
_addmm = torch.ops.aten.addmm.default


def _makes_large_rows(call: Call) -> bool:
    a, b = call["self"], call["mat2"]
    if call.in_dims["self"] is None or call.in_dims["mat2"] is None:
        return False
    return (
        is_plain(a)
        and is_plain(b)
        and a.dtype == b.dtype
        and a.numel() > 0
        and _memory.is_large(_product_shape(call), a)
    )


def _product_shape(call: Call) -> tuple[int, int, int]:
    a, b = (batch_first(call, name) for name in ("self", "mat2"))
    return a.size(0), a.size(1), b.size(2)


def _into_memory(call: Call) -> tuple[Tensor]:
    a, b = (batch_first(call, name) for name in ("self", "mat2"))
    return (torch.bmm(a, b, out=_memory.empty(_product_shape(call), a)),)


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


def _plain_product(call: Call) -> Tensor:
    return torch.einsum("ij,jk->ik", call["self"], call["mat2"])


def _plain_sum(call: Call) -> Tensor:
    product = torch.einsum("ij,jk->ik", call["mat1"], call["mat2"])
    total: Tensor = call["beta"] * call["self"] + call["alpha"] * product
    return total


register(
    Rule(
        name="mm, into large pages",
        functions=(_mm,),
        modes=MODES,
        accepts=_makes_large_rows,
        batched=_into_memory,
        reference=slice_by_slice(_plain_product),
        devices=REGIMES,
    )
)
register(
    Rule(
        name="addmm, batches merged",
        functions=(_addmm,),
        modes=MODES,
        accepts=_adds_a_bias,
        batched=_fused,
        reference=slice_by_slice(_plain_sum),
        devices=REGIMES,
    )
)
