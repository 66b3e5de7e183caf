"""Per-sample gradients of a weight, from its layer's input and output gradient.

Suppose that a layer uses a weight W once, with input x_i and output gradient g_i for
sample i. Then the sample's gradient of W, the row dW_i, is bilinear in x_i and g_i.
Many quantities of the rows can be computed without the rows themselves:

* ``rows``: the rows themselves;
* ``norms``: the norm of each row;
* ``weighted``: the sum of the rows, each times a factor, which is the ordinary weight
  gradient of the scaled output gradients;
* ``squares``: the sum of the rows' entrywise squares;
* ``gram``: the products of all pairs of rows;
* ``dots``: the products of the rows with given vectors;
* ``projected``: left^T dW_i right, for given matrices.

For a layer that is a matrix product at T positions of a sample, dW_i = g_i x_i^T with
g_i (O, T) and x_i (C, T). The squared norm of a row is the sum over the entrywise
product of two Gram matrices,

.. math:: \\|g_i x_i^T\\|^2 = \\sum_{st} (g_i^T g_i)_{st} (x_i^T x_i)_{st}

(Li et al., https://arxiv.org/abs/2110.05679, section 4; Goodfellow,
https://arxiv.org/abs/1510.01799, for T = 1). This costs T T (C + O) multiplications
instead of T C O. If that is more, the rows are made for a few samples at a time, and
dropped after use. The product of the rows of two samples is the same sum over the
products of x_i with x_j and of g_i with g_j. For T = 1 the sum of squares is a product
of squares, and the product with a vector V is g_i^T V x_i, see BackPACK
(https://arxiv.org/abs/1912.10985, appendix A). For any T, left^T dW_i right is the
product of left^T g_i with x_i^T right, see LoGra (https://arxiv.org/abs/2405.13954,
section 3.2).

Squares may be out of the range of a dtype although the rows are not. The sum of
products may also be the small difference of large numbers. Both show in the numbers
themselves. Where Python code may read these, as on a CPU, the norms of such samples are
computed again from rows, each divided by its largest entry. Elsewhere the norms are
computed in float64; those of float64 itself from rows, divided so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vmapsafe._torch import is_plain
from vmapsafe.rules.outer_products import batched_product
from vmapsafe.rules.precision import wide
from vmapsafe.rules.products import is_exact, product
from vmapsafe.rules.regimes import Regimes


@dataclass(frozen=True)
class Regime:
    """How rows are made that are dropped after use.

    Attributes:
        piece: how many of their numbers to make at a time.
        launches: whether each operation costs a launch, and reading a number waits for
            all operations before it. Then rows that are one piece are made in any case,
            and Python code does not read numbers.
    """

    piece: int
    launches: bool


# On a CPU a piece is to fit the cache (measured on an x86 server core); on a GPU it is
# to take little memory beside the activations.
REGIMES = Regimes(
    cpu=Regime(piece=2**19, launches=False), cuda=Regime(piece=2**25, launches=True)
)


@dataclass(frozen=True)
class Formula:
    """How one use of a parameter of ``shape`` makes rows (B, *shape).

    ``x`` is the layer's input, and ``grad`` is the gradient of the loss by its output.
    Both are whole batches (B, ...) in the dtype of the parameter.
    """

    shape: torch.Size

    def options(self) -> tuple[object, ...]:
        """What two of a class have in common if either makes the rows of both."""
        values = [getattr(self, field.name) for field in fields(self)]
        return tuple([v for v in values if not isinstance(v, Tensor)])

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
        """(B,): the norms of the rows, in float32 for half precision."""
        if can_look(grad):
            return self._norms_by_looks(x, grad)
        return self.unrounded_norms(x, grad).to(wide(grad).dtype)

    def _norms_by_looks(self, x: Tensor, grad: Tensor) -> Tensor:
        return joined([norms_of(self.rows(*part)) for part in self.few(x, grad)])

    def unrounded_norms(self, x: Tensor, grad: Tensor) -> Tensor:
        """The same without a look at the numbers; in a wider dtype, if there is one."""
        return joined([wide_norms(self.rows(*part)) for part in self.few(x, grad)])

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor | None) -> Tensor:
        """(*shape): the sum of the rows, each times its number in ``factors`` (B,)."""
        return weighted_sum(self.rows(x, grad), factors)

    def sum(self, x: Tensor, grad: Tensor) -> Tensor:
        """(*shape): the sum of the rows."""
        return self.weighted(x, grad, None)

    def squares(self, x: Tensor, grad: Tensor) -> Tensor:
        """(*shape): the sum of the rows' entrywise squares."""
        return self._by_rows(x, grad, {"squares"})["squares"]

    def gram(self, x: Tensor, grad: Tensor, y: Tensor, other: Tensor) -> Tensor:
        """(B, B2): products with the rows of input ``y`` and gradient ``other``."""
        own = not torch.compiler.is_compiling() and is_plain(x) and is_plain(grad)
        make = self.new_rows if own else self.rows
        rows = flat(make(x, grad))
        same = x is y and grad is other
        return product(rows, rows if same else flat(make(y, other)))

    def dots(self, x: Tensor, grad: Tensor, vectors: Tensor) -> Tensor:
        """(B, K): the products of the rows with ``vectors`` (K, *shape)."""
        wanted = flat(vectors)
        parts = [product(flat(self.rows(*p)), wanted) for p in self.few(x, grad)]
        return joined(parts)

    def projected(self, x: Tensor, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """(B, M * N): left^T R right for each row R, as a matrix (shape[0], rest), from
        left (shape[0], M) and right (rest, N)."""
        parts = []
        for part in self.few(x, grad):
            rows = wide(self.rows(*part)).flatten(2)
            parts.append((left.mT @ (rows @ right)).flatten(1))
        return joined(parts)

    def together(
        self, x: Tensor, grad: Tensor, asked: Collection[str]
    ) -> dict[str, Tensor]:
        """Several of ``norms``, ``sum`` and ``squares``, by name."""
        return {name: getattr(self, name)(x, grad) for name in asked}

    def _by_rows(
        self, x: Tensor, grad: Tensor, asked: Collection[str]
    ) -> dict[str, Tensor]:
        """The same from rows, made once, a few at a time."""
        norms: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for part in self.few(x, grad):
            rows = wide(self.rows(*part))
            if "norms" in asked:
                norms.append(norms_of(rows))
            if "sum" in asked:
                sums["sum"] = _added(sums.get("sum"), rows)
            if "squares" in asked:
                sums["squares"] = _added(sums.get("squares"), rows, squared=True)
        if "sum" in asked:
            sums["sum"] = sums["sum"].to(grad.dtype)
        return {**sums, "norms": joined(norms)} if norms else sums

    def few(
        self, x: Tensor, grad: Tensor, numbers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A few samples at a time, with ``numbers`` for each; by default those of its
        row."""
        step = max(1, _piece(grad) // max(1, numbers or self.shape.numel()))
        for i in range(0, len(grad), step):
            yield x[i : i + step], grad[i : i + step]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Some samples after others."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _piece(x: Tensor) -> int:
    return REGIMES[x.device.type].piece


def norms_of(rows: Tensor) -> Tensor:
    """(B,): the norms of rows (B, ...), in float32 for half precision."""
    if not can_look(rows):
        return wide_norms(rows).to(wide(rows).dtype)
    rows = flat(rows)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    low, high = _range(norms.dtype)
    again = [i for i, n in enumerate(norms.tolist()) if not low < n * n < high]
    if again:
        norms[again] = _norms_of_scaled(rows[again])
    return norms


def wide_norms(rows: Tensor) -> Tensor:
    """The same before it is rounded: in a wider dtype, perhaps."""
    if can_look(rows):
        return norms_of(rows)
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj())
    if not has_wider_range(rows):
        return _norms_of_scaled(flat(rows))
    norms: Tensor = torch.linalg.vector_norm(
        rows.unsqueeze(-1).flatten(1), dim=1, dtype=torch.float64
    )
    return norms


def has_wider_range(x: Tensor) -> bool:
    """Whether there is a dtype that holds squares and fourth powers of its numbers."""
    return x.dtype != torch.float64 and x.device.type != "mps"


def _norms_of_scaled(rows: Tensor) -> Tensor:
    rows, scale = _scaled_to_one(rows)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms * scale


def _scaled_to_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, ...) and (B,): samples divided by their largest entries, and those."""
    values = x.detach().unsqueeze(-1)
    if values[:1].numel() == 0:
        return x, values.new_ones(len(values))
    numbers, dims = torch.finfo(x.dtype), [*range(1, values.dim())]
    scale = torch.linalg.vector_norm(values, float("inf"), dims)
    scale = scale.clamp(numbers.tiny, numbers.max)
    return x / at_samples(scale, x), scale


def _range(dtype: torch.dtype) -> tuple[float, float]:
    """The range in which sums of squares do not suffer from underflow or overflow."""
    numbers = torch.finfo(dtype)
    return numbers.tiny * 2.0**40, numbers.max * 2.0**-10


def can_look(x: Tensor) -> bool:
    """Whether Python code may read the numbers of ``x``.

    They must be on a device where reading is cheap, and outside transforms, autograd
    and compilers.
    """
    launches = REGIMES[x.device.type].launches
    return not launches and not torch.compiler.is_compiling() and is_plain(x)


def weighted_sum(rows: Tensor, factors: Tensor | None) -> Tensor:
    """(...): the sum of rows (B, ...), each times its factor (B,)."""
    numbers = wide(rows)  # a factor may be below the range of half precision
    if factors is None:
        return numbers.sum(0).to(rows.dtype)
    factors = factors.to(numbers.dtype)
    if is_exact(numbers):
        total: Tensor = torch.tensordot(factors, numbers, 1)
    else:
        total = (numbers * at_samples(factors, numbers)).sum(0)
    return total.to(rows.dtype)


def _added(total: Tensor | None, rows: Tensor, squared: bool = False) -> Tensor:
    """(...): a total and the sum of rows (n, ...), or of their squares."""
    launches = REGIMES[rows.device.type].launches
    if total is None or launches or not is_plain(rows):
        found = (rows.square() if squared else rows).sum(0)
        return found if total is None else total + found
    for row in rows.unbind():  # a pass over the cache and without a temporary
        if squared:
            total.addcmul_(row, row)
        else:
            total.add_(row)
    return total


def flat(rows: Tensor) -> Tensor:
    """(B, numbers), in float32 for half precision."""
    return wide(rows).unsqueeze(-1).flatten(1)


class Small(Formula):
    """A formula whose rows take less memory than the output gradient."""

    def few(
        self, x: Tensor, grad: Tensor, numbers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        yield x, grad


@dataclass(frozen=True)
class Bias(Small):
    """Rows of a bias: one number for each channel, added at every position.

    ``dim`` is the dimension of the channels.
    """

    dim: int

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        dims = self._summed(grad)
        return grad.sum(dims) if dims else grad

    def new_rows(self, x: Tensor, grad: Tensor) -> Tensor:
        dims = self._summed(grad)
        if dims:
            return grad.sum(dims)
        return grad.clone(memory_format=torch.contiguous_format)

    def write_rows(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        dims = self._summed(grad)
        if dims:
            torch.sum(grad, dims, out=out)
        else:
            out.copy_(grad)

    def _summed(self, grad: Tensor) -> list[int]:
        return [d for d in range(1, grad.dim()) if d != self.dim % grad.dim()]


@dataclass(frozen=True)
class Scale(Small):
    """Rows of a weight by which ``x`` is multiplied, number by number.

    ``first`` is the dimension of ``x`` that is the first of the weight.
    """

    first: int

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        dims = _dims_besides(self.shape, self.first, grad)
        products = x * grad
        return products.sum(dims) if dims else products


@dataclass(frozen=True)
class Shift(Small):
    """Rows of a bias that is added; ``first`` is as in :class:`Scale`."""

    first: int

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        dims = _dims_besides(self.shape, self.first, grad)
        return grad.sum(dims) if dims else grad


def _dims_besides(shape: torch.Size, first: int, x: Tensor) -> list[int]:
    """The dimensions of ``x`` that a parameter does not have, the batch left out."""
    start = first % x.dim()
    own = range(start, start + len(shape))
    return [d for d in range(1, x.dim()) if d not in own]


def along(parameter: Tensor, x: Tensor, first: int) -> Tensor:
    """A parameter, to be multiplied with ``x`` from its dimension ``first`` on."""
    after = x.dim() - first % x.dim() - parameter.dim()
    return parameter.reshape([*parameter.shape, *[1 for _ in range(after)]])


@dataclass(frozen=True)
class Made(Small):
    """Rows that are already made. They are passed as ``x``, instead of the input.

    ``own`` says that they are contiguous and that nothing else uses their memory.
    """

    own: bool = False

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return x

    def new_rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return x if self.own else x.clone(memory_format=torch.contiguous_format)


class Products(Formula):
    """Rows of a layer that is a matrix product at each of T positions."""

    def columns(self, x: Tensor) -> Tensor:
        """(B, C, T): the inputs that the weight multiplies at each position."""
        raise NotImplementedError

    def outputs(self, grad: Tensor) -> Tensor:
        """(B, O, T): the output gradients at each position."""
        raise NotImplementedError

    def tangent(self, x: Tensor, vector: Tensor) -> Tensor:
        """(B, ...): what the layer makes of ``x`` with ``vector`` as its weight."""
        raise NotImplementedError

    def is_one_product(self) -> bool:
        """Whether a row is one product of matrices, as without groups."""
        return True

    def _norms_by_looks(self, x: Tensor, grad: Tensor) -> Tensor:
        positions = self._positions(grad)
        if not self.is_one_product():
            return super()._norms_by_looks(x, grad)
        if not positions or not self.shape.numel():
            return wide(grad).new_zeros(len(grad))
        if positions == 1:
            return norms_of(self.columns(x)) * norms_of(self.outputs(grad))
        if self._rows_are_cheaper(positions) or not is_exact(grad):
            return super()._norms_by_looks(x, grad)
        parts = []
        for some_x, some_grad in self.few(x, grad, positions * self._sides()):
            a, b = wide(self.columns(some_x)), wide(self.outputs(some_grad))
            parts.append(_norms_of_products(a, b))
        return joined(parts)

    def unrounded_norms(self, x: Tensor, grad: Tensor) -> Tensor:
        positions, numbers = self._positions(grad), self.shape.numel()
        if not self.is_one_product():
            return super().unrounded_norms(x, grad)
        if not positions or not numbers:
            return wide(grad).new_zeros(len(grad))
        if positions == 1:
            return wide_norms(self.columns(x)) * wide_norms(self.outputs(grad))
        regime = REGIMES[grad.device.type]
        are_a_piece = regime.launches and len(grad) * numbers <= regime.piece
        if (
            self._rows_are_cheaper(positions)
            or are_a_piece
            or not has_wider_range(grad)
        ):
            return super().unrounded_norms(x, grad)
        parts = []
        for some_x, some_grad in self.few(x, grad, positions * self._sides()):
            # In float64, as float32 would lose norms that are small differences.
            a, b = self.columns(some_x.double()), self.outputs(some_grad.double())
            products, others = torch.bmm(a.mT, a), torch.bmm(b.mT, b)
            rows = products.flatten(1).unsqueeze(1)
            parts.append(torch.bmm(rows, others.flatten(1).unsqueeze(2)).flatten())
        return joined(parts).clamp_min(0).sqrt()

    def squares(self, x: Tensor, grad: Tensor) -> Tensor:
        if self._positions(grad) != 1 or not self.is_one_product():
            return super().squares(x, grad)
        a, b = balanced(self.columns(x).flatten(1), self.outputs(grad).flatten(1))
        return product(b.square().mT, a.square().mT).reshape(self.shape)

    def gram(self, x: Tensor, grad: Tensor, y: Tensor, other: Tensor) -> Tensor:
        many, others = self._positions(grad), self._positions(other)
        numbers, size, of_other = self.shape.numel(), len(grad), len(other)
        same = x is y and grad is other
        if not many or not others or not numbers:
            return wide(grad).new_zeros(size, of_other)
        by_pairs = size * many * of_other * others * self._sides()
        by_rows = numbers * (size * many + size * of_other)
        by_rows += 0 if same else numbers * of_other * others
        fits = many * of_other * others < _piece(grad)
        if not self.is_one_product() or by_pairs >= by_rows or not fits:
            return super().gram(x, grad, y, other)
        if many * others > 1 and not (can_look(x) and can_look(y)):
            return super().gram(x, grad, y, other)  # as rows may be small differences
        a, b = self._balanced_sides(x, grad)
        c, d = (a, b) if same else self._balanced_sides(y, other)
        if many * others > 1 and (_cancel(a, b) or _cancel(c, d)):
            return super().gram(x, grad, y, other)
        if many * others == 1:
            return product(a[:, 0], c[:, 0]) * product(b[:, 0], d[:, 0])
        parts = []
        c, d = c.flatten(0, 1), d.flatten(0, 1)
        step = max(1, _piece(a) // (many * len(c)))
        for i in range(0, size, step):
            ones, twos = a[i : i + step].flatten(0, 1), b[i : i + step].flatten(0, 1)
            found = product(ones, c) * product(twos, d)
            parts.append(found.reshape(-1, many, of_other, others).sum((1, 3)))
        return joined(parts)

    def dots(self, x: Tensor, grad: Tensor, vectors: Tensor) -> Tensor:
        positions = self._positions(grad)
        if positions == 1 and self.is_one_product():
            a, b = balanced(self.columns(x).flatten(1), self.outputs(grad).flatten(1))
            wanted = wide(vectors).reshape(-1, a.size(1))
            images = product(a, wanted).reshape(len(a), len(vectors), b.size(1))
            return (images @ b.unsqueeze(2)).squeeze(2)
        if len(vectors) == 1 and x.dtype == grad.dtype:
            a, b = balanced(wide(x), wide(grad))
            image = self.tangent(a, wide(vectors[0]))
            return (image * b).flatten(1).sum(1, keepdim=True)
        return super().dots(x, grad, vectors)

    def projected(self, x: Tensor, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
        weight = right.mT.reshape(-1, *self.shape[1:])
        a = self.outputs(self.tangent(wide(x), weight))
        b = left.mT @ self.outputs(wide(grad))
        return batched_product(b, a.mT).flatten(1)

    def together(
        self, x: Tensor, grad: Tensor, asked: Collection[str]
    ) -> dict[str, Tensor]:
        """Apart, unless rows are made for more than one of them."""
        positions = self._positions(grad)
        if self.is_one_product():
            by_rows = {"squares"} if positions > 1 else set()
            if self._rows_are_cheaper(positions) and self.shape.numel():
                by_rows.add("norms")
            if not by_rows & {*asked}:
                return super().together(x, grad, asked)
        return self._by_rows(x, grad, asked)

    def _positions(self, grad: Tensor) -> int:
        return self.outputs(grad[:1]).size(2)

    def _sides(self) -> int:
        """C + O."""
        return self.shape[0] + self.shape.numel() // max(1, self.shape[0])

    def _rows_are_cheaper(self, positions: int) -> bool:
        return positions * self._sides() >= self.shape.numel()

    def _balanced_sides(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) and (B, T, O), contiguous."""
        a, b = self.columns(x).mT, self.outputs(grad).mT
        a, b = balanced(wide(a), wide(b))
        return a.contiguous(), b.contiguous()


def balanced(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``grad`` with the same rows, and squares of ``x`` within the range.

    Each sample of ``x`` is divided by its largest entry, and its gradient multiplied,
    unless the numbers show that this is not necessary.
    """
    x, grad = wide(x), wide(grad)
    if can_look(x) and can_look(grad):
        middle = 0.25 * math.log2(torch.finfo(x.dtype).max)  # squared twice
        low, high = 2.0**-middle, 2.0**middle
        most = [*_largest(x), *_largest(grad)]
        if all([low < number < high or number == 0 for number in most]):
            return x, grad
    x, scale = _scaled_to_one(x)
    return x, grad * at_samples(scale, grad)


def _largest(x: Tensor) -> list[float]:
    """The largest absolute value of each sample."""
    if not x.numel():
        return []
    numbers: list[float] = x.flatten(1).abs().amax(1).tolist()
    return numbers


def _cancel(a: Tensor, b: Tensor) -> bool:
    """Whether a row is so much smaller than its terms that rounding would count.

    The terms are a (B, T, C) and b (B, T, O) at each position.
    """
    squares = _norms_of_products(a.mT, b.mT).square()
    bounds = a.square().sum((1, 2)) * b.square().sum((1, 2))
    return bool((squares < bounds * (2.0**-8 / a.size(1))).any())


def _norms_of_products(a: Tensor, b: Tensor) -> Tensor:
    """(B,): the norms of b_i a_i^T, from a (B, C, T) and b (B, O, T)."""
    products, others = torch.bmm(a.mT, a), torch.bmm(b.mT, b)
    most = [p.diagonal(dim1=1, dim2=2).sum(1) for p in (products, others)]
    squares = products.mul_(others).flatten(1).sum(1)

    def again(i: int) -> Tensor:
        (one, of_a), (other, of_b) = (_scaled_to_one(t[i : i + 1]) for t in (a, b))
        norm = norms_of(torch.bmm(other, one.mT))
        return norm.double() * of_a * of_b

    return roots_of(squares, most, again, a.size(2))


def roots_of(
    squares: Tensor,
    most: Sequence[Tensor],
    again: Callable[[int], Tensor],
    positions: int,
) -> Tensor:
    """(B,): the roots of ``squares``, whose upper bounds are the products of ``most``.

    Root i is ``again(i)`` if the bound or a factor of it is out of range, or if the
    square is so much smaller than the bound that rounding errors would count. Where the
    terms at the positions have nothing to do with each other, the square is about the
    bound divided by their number.
    """
    low, high = _range(squares.dtype)
    eps = torch.finfo(squares.dtype).eps
    smallest = max(2.0**10 * eps, 2.0**-6 / max(1, positions))
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


def times(x: Tensor, grad: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x`` and ``grad``, the smaller of the two multiplied by the factors.

    Half precision becomes float32, as a factor may be too small for half precision.
    """
    x, grad = wide(x), wide(grad)
    if factors is None:
        return x, grad
    if can_look(factors) and not all([_is_usual(f) for f in factors.tolist()]):
        x, scale = _scaled_to_one(x)
        return x, grad * at_samples(scale, grad) * at_samples(factors, grad)
    if x.numel() < grad.numel():
        return x * at_samples(factors, x), grad
    return x, grad * at_samples(factors, grad)


def _is_usual(factor: float) -> bool:
    """Whether a tensor may be multiplied by it that is multiplied by another later."""
    return factor == 0 or 2.0**-20 < abs(factor) < 2.0**20


def at_samples(factors: Tensor, x: Tensor) -> Tensor:
    return factors.to(x.dtype).view(-1, *[1 for _ in x.shape[1:]])


def masked(x: Tensor, left_out: Tensor) -> Tensor:
    """``x`` with zeros for the samples that are left out (B,)."""
    return x.masked_fill(left_out.view(-1, *[1 for _ in x.shape[1:]]), 0)
