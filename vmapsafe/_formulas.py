"""Per-sample gradients of a weight, from what its layer saw and the output gradient.

A layer that uses a weight W once has, with x_i its input and g_i the gradient of the
loss by its output on sample i, a row dW_i that is bilinear in the two. What is asked of
the rows often needs none of them:

* ``rows``: the rows themselves, into given memory;
* ``squares``: the squared norm of each row;
* ``weighted``: the sum of the rows, each times a factor, which is the ordinary weight
  gradient of the scaled output gradients.

For a layer that is a matrix product at T positions of a sample, dW_i = g_i x_i^T with
g_i (O, T) and x_i (C, T), the squared norm is the sum of the products of two Gram
matrices,

.. math:: \\|g_i x_i^T\\|^2 = \\sum_{st} (g_i^T g_i)_{st} (x_i^T x_i)_{st}

(Li et al., https://arxiv.org/abs/2110.05679, section 4; Goodfellow,
https://arxiv.org/abs/1510.01799, for T = 1), which costs T T (C + O) products and not
T C O. Where that is more, rows are made for a few samples at a time and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmapsafe._call import Call
from vmapsafe.rules.batch_norm import wide
from vmapsafe.rules.convolution import (
    ALGORITHMS,
    algorithm,
    input_gradient,
    products_are_exact,
    seen_by_kernel,
)
from vmapsafe.rules.regimes import regimes

Memory = Callable[[], Tensor]


@dataclass(frozen=True)
class Formula:
    """How one use of a parameter of ``shape`` makes rows (B, *shape).

    ``x`` is the layer's input and ``grad`` the gradient by its output, whole batches
    (B, ...), in the dtype of the parameter.
    """

    shape: torch.Size

    def rows(self, x: Tensor, grad: Tensor, out: Memory | None = None) -> Tensor:
        """(B, *shape). ``out`` gives memory for them and is asked where that is of use;
        else they are contiguous and their memory nobody else's."""
        raise NotImplementedError

    def squares(self, x: Tensor, grad: Tensor) -> Tensor:
        """(B,), the squared norms of the rows."""
        parts = [squared_norms(self.rows(*part)) for part in self._few(x, grad)]
        return torch.cat(parts)

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor) -> Tensor:
        """(*shape): the sum of the rows, each times its factor, a number (B,)."""
        return weighted_sum(self.rows(x, grad), factors)

    def _few(
        self, x: Tensor, grad: Tensor, numbers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Few samples at a time, so that ``numbers`` a sample stay in the cache."""
        step = max(1, _CACHED // (numbers or self.shape.numel()))
        for i in range(0, len(grad), step):
            yield x[i : i + step], grad[i : i + step]


def squared_norms(rows: Tensor) -> Tensor:
    """(B,) of (B, ...); half precision in float32."""
    rows = wide(rows).flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def weighted_sum(rows: Tensor, factors: Tensor) -> Tensor:
    """(...) of (B, ...) and (B,)."""
    total: Tensor = torch.tensordot(factors.to(rows.dtype), rows, 1)
    return total


class _Small(Formula):
    """Whose rows take less memory than the output gradient."""

    def squares(self, x: Tensor, grad: Tensor) -> Tensor:
        return squared_norms(self.rows(x, grad))


@dataclass(frozen=True)
class Bias(_Small):
    """A number for each channel, added at every position; ``dim`` counts channels."""

    dim: int

    def rows(self, x: Tensor, grad: Tensor, out: Memory | None = None) -> Tensor:
        dims = [d for d in range(1, grad.dim()) if d != self.dim % grad.dim()]
        if not dims:
            return grad if out is None else out().copy_(grad)
        return torch.sum(grad, dims, out=out and out())


@dataclass(frozen=True)
class Made(_Small):
    """Rows that came with something else, in the place of the input."""

    def rows(self, x: Tensor, grad: Tensor, out: Memory | None = None) -> Tensor:
        return x


class _Products(Formula):
    """A matrix product at each of T positions."""

    def columns(self, x: Tensor) -> Tensor:
        """(B, C, T): what is multiplied at each position."""
        raise NotImplementedError

    def outputs(self, grad: Tensor) -> Tensor:
        """(B, O, T)"""
        raise NotImplementedError

    def squares(self, x: Tensor, grad: Tensor) -> Tensor:
        positions = self.outputs(grad[:1]).size(2)
        numbers = self.shape.numel()
        of_weight = self.shape[0] + numbers // self.shape[0]
        if positions * of_weight >= numbers:
            return super().squares(x, grad)
        parts = []
        for some_x, some_grad in self._few(x, grad, positions * of_weight):
            a, b = wide(self.columns(some_x)), wide(self.outputs(some_grad))
            products = torch.bmm(a.mT, a).mul_(torch.bmm(b.mT, b))
            parts.append(products.flatten(1).sum(1))
        # Rounding may leave the square of a tiny norm below zero.
        return torch.cat(parts).clamp_min_(0)


@dataclass(frozen=True)
class Linear(_Products):
    """``F.linear``: x (B, ..., C), grad (B, ..., O), weight (O, C)."""

    def columns(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, x.size(-1)).mT

    def outputs(self, grad: Tensor) -> Tensor:
        return self.columns(grad)

    def rows(self, x: Tensor, grad: Tensor, out: Memory | None = None) -> Tensor:
        a, b = self.outputs(grad), self.columns(x)
        if a.size(2) == 1:  # the outer product, written once
            return torch.mul(a, b.mT, out=out and out())
        return torch.bmm(a, b.mT, out=out and out())

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor) -> Tensor:
        x, grad = _scaled(x, grad, factors)
        return grad.flatten(0, -2).T @ x.flatten(0, -2)


@dataclass(frozen=True)
class Convolution(_Products):
    """``F.conv1d`` to ``3d``: x (B, N, C, *S), grad (B, N, O, *L)."""

    weight: Tensor
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def columns(self, x: Tensor) -> Tensor:
        return seen_by_kernel(self._call(x, x), x)

    def outputs(self, grad: Tensor) -> Tensor:
        return grad.movedim(2, 1).flatten(2)

    def rows(self, x: Tensor, grad: Tensor, out: Memory | None = None) -> Tensor:
        call = self._call(x, grad)
        winner = algorithm(call)
        if winner in ALGORITHMS:
            return ALGORITHMS[winner](call, grad, x, out and out())
        if len(grad) * self.shape.numel() < regimes(x.device).one_convolution:
            return self._groups(x, grad)
        rows = out() if out else grad.new_empty(len(grad), *self.shape)
        for row, one_x, one_grad in zip(rows, x, grad):
            row.copy_(self._ordinary(one_x, one_grad))
        return rows

    def squares(self, x: Tensor, grad: Tensor) -> Tensor:
        products = set(self.dilation) == {1} and products_are_exact(self.weight)
        if self.groups == 1 and products:
            return super().squares(x, grad)
        return Formula.squares(self, x, grad)

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor) -> Tensor:
        x, grad = _scaled(x, grad, factors)
        return self._ordinary(x.flatten(0, 1), grad.flatten(0, 1))

    def input_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """(B, N, C, *S), in the dtype of the two."""
        return input_gradient(self._call(x, grad), grad, x)

    def _ordinary(self, x: Tensor, grad: Tensor) -> Tensor:
        """The weight gradient of one batch: x (N, C, *S), grad (N, O, *L)."""
        return _weight_gradient(self._call(x, grad).arguments)

    def _groups(self, x: Tensor, grad: Tensor) -> Tensor:
        """One convolution of (N, B * C, *S) with the groups of all samples, as torch's
        own batching rule has it, without what vmap takes to begin."""
        size, (outputs, *rest) = len(x), self.shape
        merged = {
            "grad_output": grad.movedim(0, 1).flatten(1, 2),
            "input": x.movedim(0, 1).flatten(1, 2),
            # Of which only the shape counts.
            "weight": self.weight.new_empty(()).expand(size * outputs, *rest),
            "groups": size * self.groups,
        }
        arguments = {**self._call(x, grad).arguments, **merged}
        return _weight_gradient(arguments).view(size, *self.shape)

    def _call(self, x: Tensor, grad: Tensor) -> Call:
        arguments = {
            "grad_output": grad,
            "input": x,
            "weight": self.weight.to(grad.dtype),
            "bias_sizes": None,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "transposed": False,
            "output_padding": [0 for _ in self.stride],
            "groups": self.groups,
            "output_mask": [False, True, False],
        }
        in_dims = {"grad_output": 0, "input": 0, "weight": None}
        function = torch.ops.aten.convolution_backward.default
        return Call(function, arguments, None, in_dims)


def _weight_gradient(arguments: Mapping[str, Any]) -> Tensor:
    found: Tensor
    _, found, _ = torch.ops.aten.convolution_backward(*arguments.values())
    return found


@dataclass(frozen=True)
class Embedding(Formula):
    """``F.embedding``: indices x (B, ...), grad (B, ..., D), weight (V, D)."""

    padding_idx: int | None

    def rows(self, x: Tensor, grad: Tensor, out: Memory | None = None) -> Tensor:
        size = len(grad)
        rows = out() if out else grad.new_empty(size, *self.shape)
        first = torch.arange(size, device=x.device).unsqueeze(1) * self.shape[0]
        index = (x.reshape(size, -1) + first).flatten()
        flat = rows.view(-1, self.shape[1]).zero_()
        flat.index_add_(0, index, self._seen(x, grad).flatten(0, -2))
        return rows

    def squares(self, x: Tensor, grad: Tensor) -> Tensor:
        positions = x[:1].numel()
        if positions**2 >= self.shape.numel():
            return super().squares(x, grad)
        parts = []
        for some_x, some_grad in self._few(x, grad, positions**2):
            index = some_x.flatten(1) if some_x.dim() > 1 else some_x.unsqueeze(1)
            seen = wide(self._seen(some_x, some_grad)).reshape(*index.shape, -1)
            same = index.unsqueeze(1) == index.unsqueeze(2)
            products = torch.bmm(seen, seen.mT)
            parts.append(torch.where(same, products, 0).flatten(1).sum(1))
        return torch.cat(parts).clamp_min_(0)

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor) -> Tensor:
        grad = self._seen(x, grad) * _at(factors, grad)
        total = grad.new_zeros(self.shape)
        return total.index_add_(0, x.flatten(), grad.flatten(0, -2))

    def _seen(self, x: Tensor, grad: Tensor) -> Tensor:
        if self.padding_idx is None:
            return grad
        padding = self.padding_idx % self.shape[0]
        return grad.masked_fill((x == padding).unsqueeze(-1), 0)


# Numbers that are worked on at a time, at most; measured on a CPU.
_CACHED = 2**19


def _scaled(x: Tensor, grad: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """One of the two times the factors, the smaller one."""
    if x.numel() < grad.numel():
        return x * _at(factors, x), grad
    return x, grad * _at(factors, grad)


def _at(factors: Tensor, x: Tensor) -> Tensor:
    return factors.to(x.dtype).view(-1, *[1 for _ in x.shape[1:]])
