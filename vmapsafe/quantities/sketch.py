"""Random projections of per-sample gradients, without the matrix.

A sketch of a row g of P numbers is :math:`g R / \\sqrt k` with R (P, k) of independent
numbers of mean 0 and variance 1: then the product of two sketches has the mean of the
product of the two rows, and a variance that falls as 1 / k (Johnson and Lindenstrauss).
Data attribution keeps sketches in the place of rows: TRAK,
https://arxiv.org/abs/2303.14186, section 3.2.

R has a part for each parameter. The seed and the parameter's name determine it. It is
drawn a block at a time, where it is used.

The part of a matrix may also be a Kronecker product, as in LoGra (Choe et al.,
https://arxiv.org/abs/2405.13954, section 3.2). Then the sketch of a layer follows from
projections of its input and its output gradient, and its rows are never made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import check_flag
from vmapsafe._torch import is_plain
from vmapsafe.quantities.protocol import CallShape, Grads, Part, PerSample
from vmapsafe.quantities.signs import Drawer, Lines, key_of
from vmapsafe.rules.formulas import flat
from vmapsafe.rules.precision import HALVES

Kind = Literal["rademacher", "gaussian", "kronecker"]
KINDS: tuple[Kind, ...] = ("rademacher", "gaussian", "kronecker")


@dataclass(frozen=True, eq=False)
class Sketch(PerSample[Any]):
    r"""A random projection of every sample's gradient to k numbers, (B, k).

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> per_sample(net, nn.MSELoss(), x, y, want=q.Sketch(64, kind="kronecker")).shape
    torch.Size([5, 64])
    >>> parts = per_sample(net, nn.MSELoss(), x, y, want=q.Sketch(64, per_layer=True))
    >>> {name: tuple(part.shape) for name, part in parts.items()}
    {'weight': (5, 64), 'bias': (5, 64)}

    Attributes:
        k: how many numbers to give for each sample.
        kind: how to project: "rademacher", by a matrix of signs; "gaussian", by one of
            normal numbers; "kronecker", by two small matrices of signs for each weight.
        seed: an int that decides the matrices.
        per_layer: whether to give the sketch by each parameter, {name: (B, k)}, and not
            their sum.
        gather: "all" for those of all processes, as in :class:`Norms`.

    With :math:`g_i^p` (n,) sample i's gradient by parameter p, its sketch is
    :math:`\sum_p g_i^p R_p / \sqrt k`, with R_p (n, k) of signs or of normal numbers.

    In "kronecker" a parameter of two or more dimensions is a matrix :math:`M_i^p` of
    shape (shape[0], rest), and its part of the sketch has the numbers of

    .. math:: L_p^T M_i^p R_p / \sqrt k

    with signs L_p (shape[0], k_left) and R_p (rest, k_right). k_left is the largest
    divisor of k up to :math:`\sqrt k`, and k_left k_right = k. So R_p of the form above
    is a Kronecker product of two matrices, as in LoGra (Choe et al.,
    https://arxiv.org/abs/2405.13954, section 3.2; with random matrices). For a layer
    with the inputs x_i and the output gradients g_i, it is the product of
    :math:`L_p^T g_i` with :math:`x_i^T R_p`, and the gradients are never made. This
    also holds for embeddings. Convolutions with groups, and parameters that are tied or
    used by other functions, take the memory of their rows. Parameters of fewer
    dimensions are projected by a full matrix of signs.

    Products of sketches have the mean of products of gradients in every kind. In
    "kronecker" their variance is larger, most where a side of a matrix is short.

    :func:`vmapsafe.per_sample_sketch` says how to rebuild the matrices.
    """

    k: int
    kind: Kind = "rademacher"
    seed: int = 0
    per_layer: bool = False

    def __post_init__(self) -> None:
        check_sketch("Sketch(...)", self.k, self.kind, self.seed)
        check_flag("Sketch(...)", "per_layer", self.per_layer)

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return _SketchPart(self, call.parameters)


def check_sketch(called: str, k: object, kind: object, seed: object) -> None:
    """Raise unless these make a sketch.

    Args:
        called: for errors.
        k: how many numbers to give for each sample.
        kind: how to project.
        seed: decides the matrices.

    Raises:
        VmapSafeValueError: ``k`` below 1, another ``kind``, or a ``seed`` that is not
            an int.
    """
    if type(k) is not int or k < 1:
        raise VmapSafeValueError(
            called, f"k is {k!r}", "Pass how many numbers a sample, at least 1"
        )
    if kind not in KINDS:
        *most, last = [f'"{one}"' for one in KINDS]
        listed = f"{', '.join(most)} or {last}"
        raise VmapSafeValueError(called, f"unknown kind {kind!r}", f"Choose {listed}")
    if type(seed) is not int:
        raise VmapSafeValueError(called, f"seed is {seed!r}", "Pass an int")


class _SketchPart(Part):
    """Adds up the projections by the parameters, or keeps each."""

    def __init__(self, sketch: Sketch, names: Mapping[str, object]) -> None:
        self._sketch, self._names, self._k = sketch, names, sketch.k
        normal = sketch.kind == "gaussian"
        self._drawer = Drawer("normal" if normal else "signs", sketch.k)
        self._sides = [Drawer("signs", size) for size in sides(sketch.k)]
        self._total: Tensor | None = None
        self._found: dict[str, Tensor] = {}
        self._small: dict[Any, list[tuple[str, Tensor]]] = {}

    def take(self, grads: Grads) -> None:
        numbers = grads.shape.numel()
        if self._sketch.kind == "kronecker" and len(grads.shape) > 1 and numbers:
            self._add(grads.name, self._by_sides(grads))
        elif numbers * max(self._k, len(grads)) <= _sizes(grads.device).small:
            self._wait(grads)
        else:
            several = [slice(i, i + _MANY) for i in range(0, len(grads), _MANY)]
            parts = [self._by_blocks(grads.samples(some)) for some in several]
            self._add(grads.name, torch.cat(parts))

    def finished(self) -> Any:
        for small in self._small.values():
            self._join(small)
        if self._sketch.per_layer:
            return {n: self._found[n] / math.sqrt(self._k) for n in self._names}
        assert self._total is not None
        return self._total / math.sqrt(self._k)

    def _add(self, name: str, found: Tensor) -> None:
        if self._sketch.per_layer:
            self._found[name] = found
        else:
            self._total = found if self._total is None else self._total + found

    def _by_sides(self, grads: Grads) -> Tensor:
        """By two small matrices."""
        dtype = torch.float32 if grads.dtype in HALVES else grads.dtype
        first, *rest = grads.shape
        lines = first, math.prod(rest)
        drawn = [
            drawer.draw([Lines(self._key(grads.name, i), 0, n)], dtype, grads.device)
            for i, (drawer, n) in enumerate(zip(self._sides, lines), 1)
        ]
        return grads.projected(*drawn)

    def _by_blocks(self, grads: Grads) -> Tensor:
        """By a full matrix, some lines at a time."""
        rows = flat(grads.contiguous_rows())
        key, lines = self._key(grads.name), rows.size(1)
        sizes = _sizes(rows.device)
        numbers = min(max(sizes.least, 2 * rows.numel()), sizes.most)
        step = max(1, numbers // self._k)
        total: Tensor | None = None
        for start in range(0, lines, step):
            stop = min(start + step, lines)
            block = self._draw([Lines(key, start, stop)], rows)
            some = rows[:, start:stop]
            total = some @ block if total is None else total.addmm(some, block)
        assert total is not None
        return total

    def _wait(self, grads: Grads) -> None:
        """Keep the rows by a small parameter, to be projected with others."""
        rows = flat(grads.rows())
        small = self._small.setdefault((rows.dtype, rows.device), [])
        small.append((grads.name, rows))
        lines = sum([r.size(1) for _, r in small])
        if lines * max(self._k, len(rows)) > _sizes(rows.device).together:
            self._join(small)
            small.clear()

    def _join(self, small: list[tuple[str, Tensor]]) -> None:
        """Project rows by several parameters."""
        if not small:
            return
        names, rows = [name for name, _ in small], [r for _, r in small]
        sizes = [r.size(1) for r in rows]
        lines = [Lines(self._key(name), 0, n) for name, n in zip(names, sizes)]
        if self._sketch.per_layer:
            matrices = self._draw(lines, rows[0]).split_with_sizes(sizes)
            for name, r, matrix in zip(names, rows, matrices):
                self._add(name, r @ matrix)
        else:
            together = torch.cat(rows, 1)
            self._add("", together @ self._draw(lines, together))

    def _key(self, name: str, part: int = 0) -> int:
        return key_of(self._sketch.seed, name, part)

    def _draw(self, lines: list[Lines], rows: Tensor) -> Tensor:
        reuse = not torch.compiler.is_compiling() and is_plain(rows)
        return self._drawer.draw(lines, rows.dtype, rows.device, reuse)


def sides(k: int) -> tuple[int, int]:
    """Two factors of k, as close as they can be, the smaller one first."""
    small = max([n for n in range(1, math.isqrt(k) + 1) if k % n == 0])
    return small, k // small


# Samples at a time: with more, drawing the matrix costs less than using it.
_MANY = 64


@dataclass(frozen=True)
class Sizes:
    """How many numbers of the matrix, and of rows, there are at a time.

    Attributes:
        small: rows by parameters whose lines of the matrix have at most this many
            numbers wait, and are projected together.
        together: so many at a time.
        least: of other parameters, at least so many, if there are.
        most: and at most so many; between the two, twice as many as the rows have.
    """

    small: int
    together: int
    least: int
    most: int


# By type of device. On a CPU blocks that fit the cache are the fastest: those of 2**25
# took 1.5 times as long (x86 server core, float32, torch 2.13). Other devices are to
# have few operations, and about as much memory as the rows take.
_SIZES = {"cpu": Sizes(small=2**12, together=2**12, least=2**20, most=2**20)}
_OTHERS = Sizes(small=2**22, together=2**25, least=2**25, most=2**27)


def _sizes(device: torch.device) -> Sizes:
    return _SIZES.get(device.type, _OTHERS)
