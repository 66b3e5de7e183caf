"""Outer products of vectors, one for each sample, which torch's ``bmm`` makes wrong.

On CUDA ``bmm`` of matrices (B, M, 1) and (B, 1, N) is a kernel that counts in 32 bits
(torch 2.13 and 2.14): if (B - 1) M N is 2**31 or more, it writes outside of its result,
https://github.com/pytorch/pytorch/pull/196431. A ``vmap(grad)`` of a linear layer gets
there, with B samples and a weight (M, N). Elementwise products have no such limit, and
are as fast: both write the result once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmapsafe._call import Call, expanded
from vmapsafe._rule import OperatorRule, register, slice_by_slice
from vmapsafe._torch import autocast_dtype


def batched_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """(B, M, N): matrices (B, M, K) times matrices (B, K, N)."""
    if a.size(2) == 1:
        return torch.mul(a, b, out=out)
    return torch.bmm(a, b, out=out)


DEVICES = ("cuda",)


def may_overflow(rows: Tensor) -> bool:
    """Whether rows (B, M, N), which autograd is to make, could be so many numbers."""
    return rows.device.type in DEVICES and rows.numel() >= 2**31


# -- Within the user's own vmap --------------------------------------------------------


def _is_outer(call: Call) -> bool:
    a, b = _cast(call)
    return a.dtype == b.dtype and call["self"].numel() > 0 and _inner(call) == 1


def _inner(call: Call) -> int:
    """K, the length of the sums."""
    a, dim = call["self"], call.in_dims["self"]
    lengths = [
        size for d, size in enumerate(a.shape) if dim is None or d != dim % a.dim()
    ]
    return int(lengths[-1])


def _cast(call: Call) -> tuple[Tensor, Tensor]:
    """The two factors, in the dtype in which autocast multiplies matrices."""
    a, b = [t.to(autocast_dtype(t) or t.dtype) for t in (call["self"], call["mat2"])]
    return a, b


def _outer(call: Call) -> tuple[Tensor]:
    values = dict(zip(("self", "mat2"), _cast(call)))
    cast = Call(call.function, values, in_dims=call.in_dims)
    return (expanded(cast, "self") * expanded(cast, "mat2"),)


def _sum_of_products(call: Call) -> Tensor:
    found: Tensor = torch.einsum("...ik,...kj->...ij", call["self"], call["mat2"])
    return found


for _name, _operator in (
    ("mm", torch.ops.aten.mm.default),
    ("bmm", torch.ops.aten.bmm.default),
):
    register(
        OperatorRule(
            name=f"{_name}, outer products",
            operator=_operator,
            accepts=_is_outer,
            batched=_outer,
            reference=slice_by_slice(_sum_of_products),
            devices=DEVICES,
            speed=False,
            casts=True,
        )
    )
