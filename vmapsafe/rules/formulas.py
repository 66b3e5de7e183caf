"""Per-sample gradients of a weight, from what its layer saw and the output gradient.

A layer that uses a weight W once has, with x_i its input and g_i the gradient of the
loss by its output on sample i, a row dW_i that is bilinear in the two. What is asked of
the rows often needs none of them:

* ``rows``: the rows themselves, into given memory;
* ``norms``: the norm of each row;
* ``weighted``: the sum of the rows, each times a factor, which is the ordinary weight
  gradient of the scaled output gradients.

For a layer that is a matrix product at T positions of a sample, dW_i = g_i x_i^T with
g_i (O, T) and x_i (C, T), the squared norm is the sum of the products of two Gram
matrices,

.. math:: \\|g_i x_i^T\\|^2 = \\sum_{st} (g_i^T g_i)_{st} (x_i^T x_i)_{st}

(Li et al., https://arxiv.org/abs/2110.05679, section 4; Goodfellow,
https://arxiv.org/abs/1510.01799, for T = 1), which costs T T (C + O) products and not
T C O. Where that is more, rows are made for a few samples at a time and thrown away.

Squares may leave the range of a dtype where rows do not, and the sum of products may be
the small difference of large numbers. Both show in the numbers themselves, and norms of
such samples are computed again from rows, each divided by its largest entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vmapsafe._torch import is_plain
from vmapsafe.rules.precision import wide


@dataclass(frozen=True)
class Formula:
    """How one use of a parameter of ``shape`` makes rows (B, *shape).

    ``x`` is the layer's input and ``grad`` the gradient by its output, whole batches
    (B, ...), in the dtype of the parameter.
    """

    shape: torch.Size

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        """(B, *shape), to be read: they may lie in the memory of ``x`` or ``grad``."""
        raise NotImplementedError

    def write_rows(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        """Write the rows into contiguous memory (B, *shape)."""
        out.copy_(self.rows(x, grad))

    def new_rows(self, x: Tensor, grad: Tensor) -> Tensor:
        """(B, *shape), contiguous, in memory of their own."""
        out = grad.new_empty(len(grad), *self.shape)
        self.write_rows(x, grad, out)
        return out

    def norms(self, x: Tensor, grad: Tensor) -> Tensor:
        """(B,), the norms of the rows."""
        parts = [norms_of(self.rows(*part)) for part in self.few(x, grad)]
        return torch.cat(parts)

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor) -> Tensor:
        """(*shape): the sum of the rows, each times its factor, a number (B,)."""
        return weighted_sum(self.rows(x, grad), factors)

    def few(
        self, x: Tensor, grad: Tensor, numbers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Few samples at a time, so that ``numbers`` a sample stay in the cache."""
        step = max(1, _CACHED // max(1, numbers or self.shape.numel()))
        for i in range(0, len(grad), step):
            yield x[i : i + step], grad[i : i + step]


def norms_of(rows: Tensor) -> Tensor:
    """(B,) of (B, ...); half precision in float32."""
    rows = wide(rows).unsqueeze(-1).flatten(1)
    if not can_look(rows):
        return _norms_of_scaled(rows)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    low, high = _range(norms.dtype)
    again = [i for i, n in enumerate(norms.tolist()) if not low < n * n < high]
    if again:
        norms[again] = _norms_of_scaled(rows[again])
    return norms


def _norms_of_scaled(rows: Tensor) -> Tensor:
    rows, scale = _scaled_to_one(rows)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms * scale


def _scaled_to_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, ...), the largest entry of each sample 1, and what it was (B,)."""
    flat = x.detach().unsqueeze(-1).flatten(1)
    if flat.size(1) == 0:
        return x, flat.new_ones(len(flat))
    scale = flat.abs().amax(1)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1)
    return x / at_samples(scale, x), scale


def _range(dtype: torch.dtype) -> tuple[float, float]:
    """Between these, sums of squares have lost nothing to the ends of the dtype."""
    numbers = torch.finfo(dtype)
    return numbers.tiny * 2.0**40, numbers.max * 2.0**-10


def can_look(x: Tensor) -> bool:
    """Whether the numbers may be read: on the CPU, where that is cheap, and where no
    transform, autograd or compiler watches."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and is_plain(x)


def weighted_sum(rows: Tensor, factors: Tensor) -> Tensor:
    """(...) of (B, ...) and (B,)."""
    numbers = wide(rows)  # a factor may be below the range of half precision
    total: Tensor = torch.tensordot(factors.to(numbers.dtype), numbers, 1)
    return total.to(rows.dtype)


class _Small(Formula):
    """Whose rows take less memory than the output gradient."""

    def norms(self, x: Tensor, grad: Tensor) -> Tensor:
        return norms_of(self.rows(x, grad))


@dataclass(frozen=True)
class Bias(_Small):
    """A number for each channel, added at every position; ``dim`` counts channels."""

    dim: int

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        dims = [d for d in range(1, grad.dim()) if d != self.dim % grad.dim()]
        return grad.sum(dims) if dims else grad


@dataclass(frozen=True)
class Made(_Small):
    """Rows that came with something else, in the place of the input."""

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return x

    def new_rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return x.contiguous()


class Products(Formula):
    """A matrix product at each of T positions."""

    def columns(self, x: Tensor) -> Tensor:
        """(B, C, T): what is multiplied at each position."""
        raise NotImplementedError

    def outputs(self, grad: Tensor) -> Tensor:
        """(B, O, T)"""
        raise NotImplementedError

    def norms(self, x: Tensor, grad: Tensor) -> Tensor:
        positions = self.outputs(grad[:1]).size(2)
        numbers = self.shape.numel()
        if not positions or not numbers:
            return wide(grad).new_zeros(len(grad))
        if positions == 1:
            return norms_of(self.columns(x)) * norms_of(self.outputs(grad))
        of_weight = self.shape[0] + numbers // self.shape[0]
        if positions * of_weight >= numbers:
            return super().norms(x, grad)
        parts = []
        for some_x, some_grad in self.few(x, grad, positions * of_weight):
            a, b = wide(self.columns(some_x)), wide(self.outputs(some_grad))
            parts.append(_norms_of_products(a, b))
        return torch.cat(parts)


def _norms_of_products(a: Tensor, b: Tensor) -> Tensor:
    """(B,), of b_i a_i^T, from (B, C, T) and (B, O, T)."""
    if not can_look(a):
        (a, of_a), (b, of_b) = _scaled_to_one(a), _scaled_to_one(b)
        squares = (torch.bmm(a.mT, a) * torch.bmm(b.mT, b)).flatten(1).sum(1)
        found = squares.clamp_min(0).sqrt().double() * of_a * of_b
        return found.to(a.dtype)
    products, others = torch.bmm(a.mT, a), torch.bmm(b.mT, b)
    most = [p.diagonal(dim1=1, dim2=2).sum(1) for p in (products, others)]
    squares = products.mul_(others).flatten(1).sum(1)

    def again(i: int) -> Tensor:
        (one, of_a), (other, of_b) = (_scaled_to_one(t[i : i + 1]) for t in (a, b))
        norm = norms_of(torch.bmm(other, one.mT))
        return norm.double() * of_a * of_b

    return roots_of(squares, most, again)


def roots_of(
    squares: Tensor, most: Sequence[Tensor], again: Callable[[int], Tensor]
) -> Tensor:
    """(B,): of each of ``squares``, which is at most the product of ``most``.

    Where one of these is out of range, or rounding errors of that product would count,
    it is ``again(i)``.
    """
    low, high = _range(squares.dtype)
    smallest = 2.0**10 * torch.finfo(squares.dtype).eps
    norms = squares.clamp_min(0).sqrt_()
    for i, (square, *bounds) in enumerate(
        zip(squares.tolist(), *[bound.tolist() for bound in most])
    ):
        bound = math.prod(bounds)
        if (
            not all([low < number < high for number in (bound, *bounds)])
            or not square > smallest * bound
        ):
            norms[i : i + 1] = again(i)
    return norms


# Numbers that are worked on at a time, at most; measured on a CPU.
_CACHED = 2**19


def times(x: Tensor, grad: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """One of the two times the factors, the smaller one; half precision in float32,
    as a factor may be below its range."""
    x, grad = wide(x), wide(grad)
    if x.numel() < grad.numel():
        return x * at_samples(factors, x), grad
    return x, grad * at_samples(factors, grad)


def at_samples(factors: Tensor, x: Tensor) -> Tensor:
    return factors.to(x.dtype).view(-1, *[1 for _ in x.shape[1:]])
