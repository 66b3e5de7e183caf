"""Per-sample gradients of a weight, from its layer's input and output gradient.

Suppose that a layer uses a weight W once, with input x_i and output gradient g_i for
sample i. Then the sample's gradient of W, the row dW_i, is bilinear in x_i and g_i.
Many quantities of the rows can be computed without the rows themselves:

* ``rows``: the rows themselves;
* ``norms``: the norm of each row;
* ``weighted``: the sum of the rows, each times a factor, which is the ordinary weight
  gradient of the scaled output gradients.

For a layer that is a matrix product at T positions of a sample, dW_i = g_i x_i^T with
g_i (O, T) and x_i (C, T). The squared norm of a row is the sum over the entrywise
product of two Gram matrices,

.. math:: \\|g_i x_i^T\\|^2 = \\sum_{st} (g_i^T g_i)_{st} (x_i^T x_i)_{st}

(Li et al., https://arxiv.org/abs/2110.05679, section 4; Goodfellow,
https://arxiv.org/abs/1510.01799, for T = 1). This costs T T (C + O) multiplications
instead of T C O. If that is more, the rows are made for a few samples at a time, and
dropped after use.

Squares may be out of the range of a dtype although the rows are not. The sum of
products may also be the small difference of large numbers. Both show in the numbers
themselves. The norms of such samples are computed again from rows, each divided by its
largest entry.
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

    ``x`` is the layer's input, and ``grad`` is the gradient of the loss by its output.
    Both are whole batches (B, ...) in the dtype of the parameter.
    """

    shape: torch.Size

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        """(B, *shape), read-only: they may share memory with ``x`` or ``grad``."""
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
        """(B,): the norms of the rows."""
        parts = [norms_of(self.rows(*part)) for part in self.few(x, grad)]
        return torch.cat(parts)

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor) -> Tensor:
        """(*shape): the sum of the rows, each times its number in ``factors`` (B,)."""
        return weighted_sum(self.rows(x, grad), factors)

    def few(
        self, x: Tensor, grad: Tensor, numbers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A few samples at a time, so that ``numbers`` for each fit in the cache."""
        step = max(1, _CACHED // max(1, numbers or self.shape.numel()))
        for i in range(0, len(grad), step):
            yield x[i : i + step], grad[i : i + step]


def norms_of(rows: Tensor) -> Tensor:
    """(B,): the norms of rows (B, ...), in float32 for half precision."""
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
    """(B, ...) and (B,): samples divided by their largest entries, and those."""
    flat = x.detach().unsqueeze(-1).flatten(1)
    if flat.size(1) == 0:
        return x, flat.new_ones(len(flat))
    scale = flat.abs().amax(1)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1)
    return x / at_samples(scale, x), scale


def _range(dtype: torch.dtype) -> tuple[float, float]:
    """The range in which sums of squares do not suffer from underflow or overflow."""
    numbers = torch.finfo(dtype)
    return numbers.tiny * 2.0**40, numbers.max * 2.0**-10


def can_look(x: Tensor) -> bool:
    """Whether Python code may read the numbers of ``x``.

    They must be on the CPU, where reading is cheap, and outside transforms, autograd
    and compilers.
    """
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and is_plain(x)


def weighted_sum(rows: Tensor, factors: Tensor) -> Tensor:
    """(...): the sum of rows (B, ...), each times its factor (B,)."""
    numbers = wide(rows)  # a factor may be below the range of half precision
    total: Tensor = torch.tensordot(factors.to(numbers.dtype), numbers, 1)
    return total.to(rows.dtype)


class _Small(Formula):
    """A formula whose rows take less memory than the output gradient."""

    def norms(self, x: Tensor, grad: Tensor) -> Tensor:
        return norms_of(self.rows(x, grad))


@dataclass(frozen=True)
class Bias(_Small):
    """Rows of a bias: one number for each channel, added at every position.

    ``dim`` is the dimension of the channels.
    """

    dim: int

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        dims = [d for d in range(1, grad.dim()) if d != self.dim % grad.dim()]
        return grad.sum(dims) if dims else grad


@dataclass(frozen=True)
class Made(_Small):
    """Rows that are already made. They are passed as ``x``, instead of the input."""

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return x

    def new_rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return x.contiguous()


class Products(Formula):
    """Rows of a layer that is a matrix product at each of T positions."""

    def columns(self, x: Tensor) -> Tensor:
        """(B, C, T): the inputs that the weight multiplies at each position."""
        raise NotImplementedError

    def outputs(self, grad: Tensor) -> Tensor:
        """(B, O, T): the output gradients at each position."""
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
    """(B,): the norms of b_i a_i^T, from a (B, C, T) and b (B, O, T)."""
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
    """(B,): the roots of ``squares``, whose upper bounds are the products of ``most``.

    Root i is ``again(i)`` if the bound or a factor of it is out of range, or if the
    square is so much smaller than the bound that rounding errors would count.
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


# The largest number of entries to work on at a time. Measured on a CPU.
_CACHED = 2**19


def times(x: Tensor, grad: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``grad``, the smaller of the two multiplied by the factors.

    Half precision becomes float32, as a factor may be too small for half precision.
    """
    x, grad = wide(x), wide(grad)
    if x.numel() < grad.numel():
        return x * at_samples(factors, x), grad
    return x, grad * at_samples(factors, grad)


def at_samples(factors: Tensor, x: Tensor) -> Tensor:
    return factors.to(x.dtype).view(-1, *[1 for _ in x.shape[1:]])
