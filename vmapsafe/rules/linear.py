"""Linear layers: a faster batching rule, and the rows of weight and bias.

For the forward, torch multiplies and then adds the bias. The rule here makes one fused
call. For the rows of the weight, torch's own rule multiplies two batches of matrices.
It stays, because trials did not find a faster form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call, batch_first
from vmapsafe._rule import OperatorRule, register, slice_by_slice
from vmapsafe._torch import autocast_dtype, innermost
from vmapsafe.rules.formulas import Bias, Formula, Products, times
from vmapsafe.rules.kept_calls import ByFormulas, KeptCalls, keep_calls
from vmapsafe.rules.opaque import keep_opaque
from vmapsafe.rules.outer_products import batched_product
from vmapsafe.rules.products import linear, linear_by_onednn, product
from vmapsafe.rules.regimes import Regimes

# From this many numbers in the output of the whole batch, the fused call is faster, by
# type of device. Measured by bench/thresholds/layers.py on an x86 server core, float32,
# torch 2.13.
REGIMES = Regimes(cpu=2**17, cuda=0)

_addmm = torch.ops.aten.addmm.default


def _may_be_large(bias: Tensor, x: Tensor, weight: Tensor) -> bool:
    whole = innermost(x)
    outputs = whole.numel() * weight.size(-1)
    return outputs >= REGIMES[whole.device.type] * weight.size(-2)


def _pays(x: Tensor, weight: Any = None, bias: Any = None) -> bool:
    """Whether a call of ``F.linear`` has so many outputs, as far as can be seen."""
    if not isinstance(weight, Tensor) or not x.dim():
        return True
    products = innermost(x).numel() * weight.numel()
    return bias is not None and products >= REGIMES[x.device.type] * x.size(-1) ** 2


def _adds_a_bias(call: Call) -> bool:
    bias, x, weight = call["self"], call["mat1"], call["mat2"]
    numbers = x.numel() // max(1, len(weight)) * weight.size(-1)
    return (
        numbers >= max(1, REGIMES[x.device.type])
        and call.in_dims["mat1"] is not None
        and call.in_dims["mat2"] is None
        and call.in_dims["self"] is None
        and bias.dim() == 1
        and bias.dtype == x.dtype == weight.dtype
    )


def _fused(call: Call) -> tuple[Tensor]:
    x = batch_first(call, "mat1")
    merged, y = x.flatten(0, 1), None
    if call["beta"] == call["alpha"] == 1:
        y = linear_by_onednn(merged, call["mat2"].mT, call["self"])
    if y is None:
        y = _addmm(**{**call.arguments, "mat1": merged})
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
        functions=(F.linear,),
        pays=_pays,
        may_accept=_may_be_large,
        batched=_fused,
        reference=slice_by_slice(_plain_sum),
        devices=None,
    )
)


# -- Rows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight(Products):
    """Rows of ``F.linear``: x (B, ..., C), grad (B, ..., O), weight (O, C).

    Attributes:
        autocast: the dtype in which autocast multiplied in forward; None without it.
    """

    autocast: torch.dtype | None

    def columns(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), math.prod(x.shape[1:-1]), x.size(-1)).mT

    def outputs(self, grad: Tensor) -> Tensor:
        return self.columns(grad)

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return self._products(x, grad, None)

    def write_rows(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        self._products(x, grad, out)

    def new_rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return self._products(x, grad, None)

    def _products(self, x: Tensor, grad: Tensor, out: Tensor | None) -> Tensor:
        a, b = self.outputs(grad), self.columns(x).mT
        if self.autocast is None or a.size(2) == 1:  # without sums nothing is won
            return batched_product(a, b, out)
        found = batched_product(a.to(self.autocast), b.to(self.autocast))
        return found.to(grad.dtype) if out is None else out.copy_(found)

    def tangent(self, x: Tensor, vector: Tensor) -> Tensor:
        return x @ vector.mT

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor | None) -> Tensor:
        dtype = grad.dtype
        x, grad = times(x, grad, factors)
        return product(grad.flatten(0, -2).T, x.flatten(0, -2).T).to(dtype)


keep_opaque(Weight, "linear", lambda options, like: Weight(*options))


def _keep(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> ByFormulas | None:
    if input.dim() < 2 or weight.dim() != 2:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:  # the bias broadcasts
        return None
    formulas: dict[str, Formula]
    formulas = {"weight": Weight(weight.shape, autocast_dtype(weight))}
    if bias is not None:
        formulas["bias"] = Bias(bias.shape, -1)
    return ByFormulas(
        forward=lambda x: linear(x, weight, bias),
        input_gradient=lambda x, grad: linear(grad, weight.to(grad.dtype).mT, None),
        formulas=formulas,
    )


keep_calls(F.linear, KeptCalls(_keep))
