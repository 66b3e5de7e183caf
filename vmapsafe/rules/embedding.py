"""Embeddings: a faster batching rule of the backward, and the rows of the weight.

Almost all numbers of the rows are zero. torch writes all of these zeros, and then adds
the numbers that are not zero. The rule here writes only those. It applies if the rows
are so large that the operating system provides their memory, which is zero already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call, Function, Signature, batch_first, batch_size
from vmapsafe._rule import OperatorRule, register, slice_by_slice
from vmapsafe._torch import is_plain
from vmapsafe.rules import memory
from vmapsafe.rules.formulas import (
    Formula,
    at_samples,
    has_wider_range,
    joined,
    norms_of,
    roots_of,
)
from vmapsafe.rules.kept_calls import ByFormulas, KeptCalls, keep_calls
from vmapsafe.rules.opaque import keep_opaque
from vmapsafe.rules.precision import wide
from vmapsafe.rules.products import product

DEVICES = ("cpu",)  # the system provides memory of zeros only there

_backward = torch.ops.aten.embedding_dense_backward.default


def _makes_large_rows(call: Call) -> bool:
    grad, indices = call["grad_output"], call["indices"]
    return (
        call.in_dims["grad_output"] is not None
        and call.in_dims["indices"] is not None
        and grad.numel() > 0
        and not call["scale_grad_by_freq"]
        and is_plain(grad)
        and is_plain(indices)
        and memory.pays(_shape(call), grad, grad.numel() // grad.size(-1))
    )


def _shape(call: Call) -> tuple[int, int, int]:
    width = batch_first(call, "grad_output").size(-1)
    return batch_size(call), call["num_weights"], width


def _sparse_sum(call: Call) -> tuple[Tensor]:
    """(B, V, D): the weight gradients from grads (B, ..., D) and indices (B, ...)."""
    grad, indices = (batch_first(call, name) for name in ("grad_output", "indices"))
    size, words, width = _shape(call)
    starts = words * torch.arange(size, device=indices.device).unsqueeze(1)
    places = (indices.reshape(size, -1) + starts).flatten()
    rows = memory.zeros((size, words, width), grad)
    rows.view(-1, width).index_put_((places,), grad.reshape(-1, width), accumulate=True)
    if call["padding_idx"] >= 0:
        rows[:, call["padding_idx"]] = 0
    return (rows,)


# -- The slow form -------------------------------------------------------------------


def _plain(call: Call) -> Tensor:
    """The weight gradient: row v is the sum of the gradients at places of word v."""
    grad: Tensor = call["grad_output"]
    indices = call["indices"].reshape(-1, 1)
    words = torch.arange(call["num_weights"], device=indices.device)
    places = (indices == words) & (words != call["padding_idx"])
    rows: Tensor = places.mT.to(grad.dtype) @ grad.reshape(-1, grad.size(-1))
    return rows


register(
    OperatorRule(
        name="embedding_dense_backward, into memory of zeros",
        operator=_backward,
        accepts=_makes_large_rows,
        batched=_sparse_sum,
        reference=slice_by_slice(_plain),
        devices=DEVICES,
        functions=(F.embedding, torch.embedding),
    )
)


# -- Rows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight(Formula):
    """Rows of ``F.embedding``: indices x (B, ...), grad (B, ..., D), weight (V, D)."""

    padding_idx: int | None

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return self.new_rows(x, grad)

    def write_rows(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        size = len(grad)
        first = torch.arange(size, device=x.device).unsqueeze(1) * self.shape[0]
        index = (x.reshape(size, math.prod(x.shape[1:])) + first).flatten()
        flat = out.view(-1, self.shape[1]).zero_()
        flat.index_add_(0, index, self._seen(x, grad).flatten(0, -2))

    def _norms_by_looks(self, x: Tensor, grad: Tensor) -> Tensor:
        positions = x[:1].numel()
        if positions**2 >= self.shape.numel():
            return super()._norms_by_looks(x, grad)
        if not positions:
            return wide(grad).new_zeros(len(grad))
        parts = []
        for some_x, some_grad in self.few(x, grad, positions**2):
            products, squares = self._products(some_x, self._seen(some_x, some_grad))
            most = products.diagonal(dim1=1, dim2=2).sum(1)

            def again(i: int, x: Tensor = some_x, grad: Tensor = some_grad) -> Tensor:
                return norms_of(self.rows(x[i : i + 1], grad[i : i + 1]))

            # The square of a sum of n rows is at most n times the sum of their squares.
            bound = [most * positions]
            parts.append(roots_of(squares, bound, again, positions))
        return joined(parts)

    def unrounded_norms(self, x: Tensor, grad: Tensor) -> Tensor:
        positions = x[:1].numel()
        few = 0 < positions**2 < self.shape.numel()
        if not few or not has_wider_range(grad):
            return super().unrounded_norms(x, grad)
        seen = self._seen(x, grad).double()
        parts = [self._products(*p)[1] for p in self.few(x, seen, positions**2)]
        return joined(parts).clamp_min(0).sqrt()

    def _products(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, T), the products of the gradients at two places, and (B,), the squared
        norms: the sums of those at two places of one word."""
        index = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        seen = wide(seen).reshape(*index.shape, -1)
        products = torch.bmm(seen, seen.mT)
        same = index.unsqueeze(1) == index.unsqueeze(2)
        return products, torch.where(same, products, 0).flatten(1).sum(1)

    def gram(self, x: Tensor, grad: Tensor, y: Tensor, other: Tensor) -> Tensor:
        size, of_other = len(grad), len(other)
        many, others = (t.numel() // max(1, len(t)) for t in (x, y))
        if many * others * of_other >= self.shape.numel():
            return super().gram(x, grad, y, other)
        if not many or not others or not size or not of_other:
            return wide(grad).new_zeros(size, of_other)
        words, seen = y.flatten(), wide(self._seen(y, other)).flatten(0, -2)
        parts = []
        for some_x, some_grad in self.few(x, grad, many * len(words)):
            mine = wide(self._seen(some_x, some_grad)).flatten(0, -2)
            same = some_x.reshape(-1, 1) == words
            found = torch.where(same, product(mine, seen), 0)
            parts.append(found.reshape(-1, many, of_other, others).sum((1, 3)))
        return joined(parts)

    def dots(self, x: Tensor, grad: Tensor, vectors: Tensor) -> Tensor:
        seen = wide(self._seen(x, grad))
        found = [
            (F.embedding(x, wide(vector)) * seen).unsqueeze(1).flatten(1).sum(1)
            for vector in vectors
        ]
        return torch.stack(found, 1)

    def projected(self, x: Tensor, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
        seen = wide(self._seen(x, grad)) @ right
        size, positions = len(grad), math.prod(x.shape[1:])
        words = F.embedding(x, left).view(size, positions, left.size(1))
        found = words.mT @ seen.view(size, positions, right.size(1))
        return found.flatten(1)

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor | None) -> Tensor:
        seen = wide(self._seen(x, grad))
        if factors is not None:
            seen = seen * at_samples(factors, seen)
        total = seen.new_zeros(self.shape)
        total.index_add_(0, x.flatten(), seen.flatten(0, -2))
        return total.to(grad.dtype)

    def _seen(self, x: Tensor, grad: Tensor) -> Tensor:
        if self.padding_idx is None:
            return grad
        padding = self.padding_idx % self.shape[0]
        return grad.masked_fill((x == padding).unsqueeze(-1), 0)


keep_opaque(Weight, "embedding", lambda options, like: Weight(*options))


def _keep(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> ByFormulas | None:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    return ByFormulas(
        forward=lambda x: F.embedding(x, weight, padding_idx),
        input_gradient=None,
        formulas={"weight": Weight(weight.shape, padding_idx)},
    )


keep_calls(F.embedding, KeptCalls(_keep, parameters=("weight",)))


# -- max_norm --------------------------------------------------------------------------
#
# torch writes the renormalised rows into the weight. The code here uses a copy of them.

_RENORMALISING = {f: Signature.of(f) for f in (F.embedding, F.embedding_bag)}


def renormalises(
    function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a call would renormalise rows of its weight."""
    parameters = _RENORMALISING.get(function)
    if parameters is None:
        return False
    return parameters.bind(args, kwargs).get("max_norm") is not None


def on_renormalised(
    run: Function, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """Make a call that renormalises, without writing its weight.

    Args:
        run: makes a call, given the function and its positional and named arguments.
        function: the function that was called.
        args: its positional arguments.
        kwargs: its arguments by name.

    Returns:
        The output of the call.
    """
    given = {**_RENORMALISING[function].bind(args, kwargs)}
    options = given["max_norm"], given["norm_type"]
    given["max_norm"] = None
    if function is F.embedding:
        return _renormalised(run(function, (), given), *options)
    given["weight"] = _renormalised(given["weight"], *options)
    output: Tensor = run(function, (), given)
    return output


def _renormalised(rows: Tensor, most: float, norm_type: float) -> Tensor:
    """The rows as torch.embedding_renorm_ scales them; gradients are not scaled."""
    values = rows.detach()
    norms = torch.linalg.vector_norm(values, norm_type, dim=-1, keepdim=True)
    scaled = values * torch.where(norms > most, most / (norms + 1e-7), 1)
    return scaled + (rows - values)
