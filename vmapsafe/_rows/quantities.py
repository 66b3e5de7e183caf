"""What can be wanted of every sample's gradient, and how it comes from one pass.

Backward meets the parameters one by one. For each it hands over either a formula, with
the layer's input and output gradient, from which rows could be made, or the rows
themselves. Few quantities need the rows of more than one parameter at a time, and many
need none: a norm follows from two Gram matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vmapsafe._errors import (
    VmapSafeTypeError,
    VmapSafeValueError,
    a_kind,
    shown,
    warn_user,
    worded,
)
from vmapsafe._modes import Mode, check_flag
from vmapsafe._rows.processes import gathered, summed
from vmapsafe._rows.record import Collector
from vmapsafe._torch import tree_map, without_autocast
from vmapsafe.rules.formulas import Formula, norms_of, weighted_sum

T = TypeVar("T")


@dataclass(frozen=True)
class CallShape:
    """The samples of one call, as much as a quantity needs to know.

    Attributes:
        parameters: the tensors at which gradients are taken, by name.
        count: how many samples run.
        in_chunks: whether they run a few at a time.
        mode: of the block.
        made_up: whether the caller's batch is empty, and these samples only show which
            shapes and dtypes the result has.
    """

    parameters: Mapping[str, Tensor]
    count: int
    in_chunks: bool
    mode: Mode
    made_up: bool


class Part(Collector):
    """Collects a quantity of some of the samples."""

    @abstractmethod
    def finished(self) -> Any:
        """What these samples give; all parameters have been met."""


class Run(ABC, Generic[T]):
    """A quantity of the samples of one call."""

    @abstractmethod
    def part(self, shape: CallShape, start: int, stop: int) -> Part:
        """A collector for the samples from ``start`` to ``stop``."""

    @abstractmethod
    def joined(self, shape: CallShape, parts: Sequence[Any]) -> T:
        """The result, from what the parts gave, in the order of the samples."""


class Quantity(ABC, Generic[T]):
    """Something that follows from every sample's gradient."""

    @abstractmethod
    def begin(self, shape: CallShape) -> Run[T]:
        """Begin a call."""

    @abstractmethod
    def of_all_processes(self, found: T) -> T:
        """The result of all processes of torch.distributed's default group."""


class KeepsNothing(Quantity[T], Run[T]):
    """A quantity that keeps nothing between the parts of a call."""

    def begin(self, shape: CallShape) -> Run[T]:
        return self


class PerSample(KeepsNothing[T]):
    """A quantity with a number, or several, for each sample: a tree of (B, ...)."""

    def joined(self, shape: CallShape, parts: Sequence[Any]) -> T:
        found: T = joined(shape, parts)
        return found

    def of_all_processes(self, found: T) -> T:
        together: T = tree_map(gathered, found)
        return together


def joined(shape: CallShape, parts: Sequence[Any]) -> Any:
    """Trees of tensors (samples, ...) as one tree, of the caller's samples."""
    if shape.made_up:
        return tree_map(lambda t: t[:0], parts[0])
    if len(parts) == 1:
        return parts[0]
    return tree_map(lambda *chunks: torch.cat(chunks), *parts)


# -- Norms -----------------------------------------------------------------------------


class Norms(PerSample[Any]):
    """The Euclidean norm of every row.

    Args:
        called: the public function, for errors.
        per_parameter: whether to give a norm for each parameter, and not one of all.
    """

    def __init__(self, called: str, per_parameter: bool = False) -> None:
        check_flag(called, "per_parameter", per_parameter)
        self._per_parameter = per_parameter

    def part(self, shape: CallShape, start: int, stop: int) -> Part:
        return _NormsPart(shape, self._per_parameter)


class _NormsPart(Part):
    def __init__(self, shape: CallShape, per_parameter: bool) -> None:
        self._names, self._per_parameter = list(shape.parameters), per_parameter
        self.norms: dict[str, Tensor] = {}

    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        self.norms[name] = formula.norms(x, grad)

    def whole(self, name: str, rows: Tensor) -> None:
        self.norms[name] = norms_of(rows)

    def finished(self) -> Any:
        if self._per_parameter:
            return {name: self.norms[name] for name in self._names}
        return self.total()

    def total(self) -> Tensor:
        """(B,): the norm over all parameters."""
        return norms_of(torch.stack(list(self.norms.values()), 1))


# -- Clipped sums ----------------------------------------------------------------------


class ClippedSum(KeepsNothing[dict[str, Tensor]]):
    """The sum of the rows, each clipped to a norm.

    Args:
        called: the public function, for errors.
        max_grad_norm: the largest norm that a row keeps, above 0.

    Raises:
        VmapSafeTypeError: ``max_grad_norm`` is not a number.
        VmapSafeValueError: it is not above 0.
    """

    def __init__(self, called: str, max_grad_norm: float) -> None:
        number = isinstance(max_grad_norm, (int, float, Tensor))
        if not number or isinstance(max_grad_norm, bool) or _has_dims(max_grad_norm):
            raise VmapSafeTypeError(
                called,
                f"max_grad_norm is {shown(max_grad_norm)}, {a_kind(max_grad_norm)}",
                "Pass one number, the largest norm a row may keep",
            )
        if not max_grad_norm > 0:
            raise VmapSafeValueError(
                called,
                f"max_grad_norm is {max_grad_norm!r}",
                "Pass the largest norm a row may keep, above 0",
            )
        self._called, self._most = called, max_grad_norm

    def begin(self, shape: CallShape) -> Run[dict[str, Tensor]]:
        if shape.mode.merges:
            warn_user(
                worded(
                    f'{self._called} in mode "{shape.mode.name}"',
                    "samples share their statistics there, so that a row depends on "
                    "all samples and clipping it bounds no sample's influence",
                    "Use another mode if that is what clipping is for",
                ),
                UserWarning,
            )
        return self

    def part(self, shape: CallShape, start: int, stop: int) -> Part:
        return _ClippedPart(shape, self._most)

    def joined(self, shape: CallShape, parts: Sequence[Any]) -> dict[str, Tensor]:
        first, *rest = parts
        return {name: sum([p[name] for p in rest], first[name]) for name in first}

    def of_all_processes(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return summed(found)


def _has_dims(number: object) -> bool:
    return isinstance(number, Tensor) and number.dim() > 0


class _ClippedPart(_NormsPart):
    """Keeps what the rows come from until the norm of all parameters is known."""

    def __init__(self, shape: CallShape, most: float) -> None:
        super().__init__(shape, per_parameter=False)
        self._made_up, self._most = shape.made_up, most
        self._uses: dict[str, tuple[Formula, Tensor, Tensor]] = {}
        self._rows: dict[str, Tensor] = {}

    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        if formula.shape.numel() * len(grad) <= x.numel() + grad.numel():
            self.whole(name, formula.rows(x, grad))  # made once, and no larger
        else:
            super().streamed(name, formula, x, grad)
            self._uses[name] = formula, x, grad

    def whole(self, name: str, rows: Tensor) -> None:
        super().whole(name, rows)
        self._rows[name] = rows

    def finished(self) -> dict[str, Tensor]:
        norms = self.total()
        with without_autocast(norms.device):
            factors = (self._most / norms).clamp(max=1)
            factors = torch.where(norms.isfinite(), factors, torch.nan)
            if self._made_up:
                factors = torch.zeros_like(factors)
            return {name: self._weighted(name, factors) for name in self._names}

    def _weighted(self, name: str, factors: Tensor) -> Tensor:
        if name in self._rows:
            return weighted_sum(self._rows.pop(name), factors)
        formula, x, grad = self._uses.pop(name)
        return formula.weighted(x, grad, factors)


# -- Rows ------------------------------------------------------------------------------


class Rows(Quantity[dict[str, Tensor]]):
    """The rows themselves, B x P numbers.

    Args:
        out: a tensor (B, *shape) for each parameter, to be filled; without it each
            parameter's rows get their memory in backward, where the memory of
            activations has become free.
    """

    def __init__(self, out: Mapping[str, Tensor] | None = None) -> None:
        self._out = out

    def begin(self, shape: CallShape) -> Run[dict[str, Tensor]]:
        return _RowsOfCall(self._out, shape)

    def of_all_processes(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: gathered(rows) for name, rows in found.items()}


class _RowsOfCall(Run[dict[str, Tensor]]):
    """The rows of one call: all chunks write into the same memory."""

    def __init__(self, out: Mapping[str, Tensor] | None, shape: CallShape) -> None:
        self.shape = shape
        given = None if shape.made_up else out  # whose tensors have no rows
        self.memory: dict[str, Tensor] = dict(given or {})
        if shape.in_chunks:  # at once: "auto" measures what a chunk takes besides
            missing = [n for n in shape.parameters if n not in self.memory]
            self.memory.update({name: self._fresh(name) for name in missing})

    def part(self, shape: CallShape, start: int, stop: int) -> Part:
        return _RowsPart(self, slice(start, stop))

    def joined(self, shape: CallShape, parts: Sequence[Any]) -> dict[str, Tensor]:
        rows = {name: self.rows(name) for name in shape.parameters}
        return {n: r[:0] for n, r in rows.items()} if shape.made_up else rows

    def rows(self, name: str) -> Tensor:
        """(B, *shape): the memory of a parameter's rows, made when it is needed."""
        if name not in self.memory:
            self.memory[name] = self._fresh(name)
        return self.memory[name]

    def _fresh(self, name: str) -> Tensor:
        value = self.shape.parameters[name]
        return value.new_empty(self.shape.count, *value.shape)


class _RowsPart(Part):
    def __init__(self, call: _RowsOfCall, part: slice) -> None:
        self._call, self._part = call, part

    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        if name in self._call.memory:
            formula.write_rows(x, grad, self._call.memory[name][self._part])
        else:
            self._call.memory[name] = formula.new_rows(x, grad)

    def whole(self, name: str, rows: Tensor) -> None:
        self._call.rows(name)[self._part] = rows

    def finished(self) -> None:
        """They are in the memory of the call."""
