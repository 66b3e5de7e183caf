"""Formulas that torch.compile does not look into, as operators of torch.

The formulas of convolutions, and of linear layers at several positions, go over a few
samples at a time, and read numbers to see whether they are precise. torch.compile
traces neither well: it would make all rows of a layer at once, or unroll the loops. So
each of their methods is an operator, which runs as it does without torch.compile. It
also compiles in half of the time.

An operator takes tensors, and the rest of its formula as text. Compiled code that was
saved to a disk can then run in another process.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmapsafe._torch import unseen_by_modes
from vmapsafe.rules.formulas import Formula, Products
from vmapsafe.rules.precision import wide

_KINDS: dict[str, Callable[[Sequence[Any], Tensor], Formula]] = {}
_NAMES: dict[type[Formula], str] = {}


def keep_opaque(
    kind: type[Formula], name: str, make: Callable[[Sequence[Any], Tensor], Formula]
) -> None:
    """Register formulas that are not looked into.

    Args:
        kind: their class.
        name: of the class, in texts.
        make: makes one of its options and a tensor of the dtype and device of rows.
    """
    _KINDS[name], _NAMES[kind] = make, name


def opaque(formula: Formula, grad: Tensor) -> Formula:
    """The formula as operators, where that is better; else the formula itself."""
    name = _NAMES.get(type(formula))
    if name is None:
        return formula
    if isinstance(formula, Products) and formula.is_one_product():
        if grad.numel() == len(grad) * formula.shape[0]:  # one position
            return formula
    shape, *options = formula.options()
    return Opaque(formula.shape, formula, repr((name, [*formula.shape], options)))


@dataclass(frozen=True)
class Opaque(Formula):
    """A formula by operators.

    Attributes:
        formula: the formula itself.
        text: the same in words.
    """

    formula: Formula
    text: str

    def options(self) -> tuple[object, ...]:
        return (self.text,)

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        found: Tensor = _ops.rows(x, grad, self.text)
        return found

    def new_rows(self, x: Tensor, grad: Tensor) -> Tensor:
        return self.rows(x, grad)

    def norms(self, x: Tensor, grad: Tensor) -> Tensor:
        return self.together(x, grad, ["norms"])["norms"]

    def unrounded_norms(self, x: Tensor, grad: Tensor) -> Tensor:
        return self.norms(x, grad)

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor | None) -> Tensor:
        return self.formula.weighted(x, grad, factors)  # one product

    def squares(self, x: Tensor, grad: Tensor) -> Tensor:
        return self.together(x, grad, ["squares"])["squares"]

    def gram(self, x: Tensor, grad: Tensor, y: Tensor, other: Tensor) -> Tensor:
        found: Tensor
        if x is y and grad is other:
            found = _ops.own_gram(x, grad, self.text)
        else:
            found = _ops.gram(x, grad, y, other, self.text)
        return found

    def dots(self, x: Tensor, grad: Tensor, vectors: Tensor) -> Tensor:
        found: Tensor = _ops.dots(x, grad, vectors, self.text)
        return found

    def projected(self, x: Tensor, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
        found: Tensor = _ops.projected(x, grad, left, right, self.text)
        return found

    def together(
        self, x: Tensor, grad: Tensor, asked: Collection[str]
    ) -> dict[str, Tensor]:
        found = {}
        if "sum" in asked:
            found["sum"] = self.sum(x, grad)
        rest = [name for name in ("norms", "squares") if name in asked]
        if rest:
            found.update(zip(rest, _ops.together(x, grad, rest, self.text)))
        return found


@functools.lru_cache(maxsize=None)
def _read(text: str) -> tuple[str, torch.Size, list[Any]]:
    name, shape, options = ast.literal_eval(text)
    return name, torch.Size(shape), options


def _formula(text: str, like: Tensor) -> Formula:
    """The formula of a text."""
    name, shape, options = _read(text)
    return _KINDS[name]([shape, *options], like)


def _shape(text: str) -> torch.Size:
    return _read(text)[1]


# -- The operators ---------------------------------------------------------------------

_make_library: Any = torch.library.Library
_LIBRARY = _make_library("vmapsafe", "DEF")
_ops: Any = torch.ops.vmapsafe


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Any], Any]:
    """A decorator: the kernel of an operator; ``fake`` gives results of its shapes."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        name = _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])

        @functools.wraps(kernel)
        def run(*args: Any) -> Any:
            with torch.no_grad(), unseen_by_modes():
                return kernel(*args)

        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vmapsafe::{name}", fake, lib=_LIBRARY)
        return kernel

    return register


def _fake_rows(x: Tensor, grad: Tensor, text: str) -> Tensor:
    return grad.new_empty([len(grad), *_shape(text)])


@_operator("rows(Tensor x, Tensor grad, str formula) -> Tensor", _fake_rows)
def _rows(x: Tensor, grad: Tensor, text: str) -> Tensor:
    return _formula(text, grad).new_rows(x, grad)


def _fake_together(
    x: Tensor, grad: Tensor, asked: Sequence[str], text: str
) -> list[Tensor]:
    shapes = {"norms": [len(grad)], "squares": [*_shape(text)]}
    return [wide(grad).new_empty(shapes[name]) for name in asked]


@_operator(
    "together(Tensor x, Tensor grad, str[] asked, str formula) -> Tensor[]",
    _fake_together,
)
def _together(x: Tensor, grad: Tensor, asked: Sequence[str], text: str) -> list[Tensor]:
    found = _formula(text, grad).together(x, grad, asked)
    return [found[name] for name in asked]


def _fake_own_gram(x: Tensor, grad: Tensor, text: str) -> Tensor:
    return wide(grad).new_empty([len(grad), len(grad)])


@_operator("own_gram(Tensor x, Tensor grad, str formula) -> Tensor", _fake_own_gram)
def _own_gram(x: Tensor, grad: Tensor, text: str) -> Tensor:
    return _formula(text, grad).gram(x, grad, x, grad)


def _fake_gram(x: Tensor, grad: Tensor, y: Tensor, other: Tensor, text: str) -> Tensor:
    return wide(grad).new_empty([len(grad), len(other)])


@_operator(
    "gram(Tensor x, Tensor grad, Tensor y, Tensor other, str formula) -> Tensor",
    _fake_gram,
)
def _gram(x: Tensor, grad: Tensor, y: Tensor, other: Tensor, text: str) -> Tensor:
    return _formula(text, grad).gram(x, grad, y, other)


def _fake_dots(x: Tensor, grad: Tensor, vectors: Tensor, text: str) -> Tensor:
    return wide(grad).new_empty([len(grad), len(vectors)])


@_operator(
    "dots(Tensor x, Tensor grad, Tensor vectors, str formula) -> Tensor", _fake_dots
)
def _dots(x: Tensor, grad: Tensor, vectors: Tensor, text: str) -> Tensor:
    return _formula(text, grad).dots(x, grad, vectors)


def _fake_projected(
    x: Tensor, grad: Tensor, left: Tensor, right: Tensor, text: str
) -> Tensor:
    return wide(grad).new_empty([len(grad), left.size(1) * right.size(1)])


@_operator(
    "projected(Tensor x, Tensor grad, Tensor left, Tensor right, str formula) "
    "-> Tensor",
    _fake_projected,
)
def _projected(
    x: Tensor, grad: Tensor, left: Tensor, right: Tensor, text: str
) -> Tensor:
    return _formula(text, grad).projected(x, grad, left, right)
