"""The gradients themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from vmapsafe._torch import current_level
from vmapsafe.quantities.protocol import (
    CallShape,
    Collected,
    Grads,
    OneLook,
    Part,
    Quantity,
    joined,
)


@dataclass(frozen=True, eq=False)
class Rows(OneLook[dict[str, Tensor]]):
    """Every sample's gradient, {name: (B, *shape)}: what ``per_sample_grads`` gives.

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> rows = per_sample(net, nn.MSELoss(), x, y, want=q.Rows())
    >>> {name: tuple(row.shape) for name, row in rows.items()}
    {'weight': (5, 2, 4), 'bias': (5, 2)}

    Attributes:
        out: a dict such as an earlier call returned, to be filled and returned. The
            earlier rows are overwritten, also by a call that raises half-way.

    No other quantity makes all rows of all parameters. Without ``out`` outer
    derivatives pass through them.
    """

    out: Mapping[str, Tensor] | None = None

    def begin(self, call: CallShape) -> Quantity[dict[str, Tensor]]:
        if self.out is None and current_level():  # of which none may be written
            return RowsWithDerivatives()
        return _RowsOfCall(self.out, call)


class _RowsOfCall(Collected[dict[str, Tensor]]):
    """The rows of one call: all chunks write into the same memory.

    Without given memory each parameter's rows get theirs in backward, where the memory
    of activations has become free.
    """

    def __init__(self, out: Mapping[str, Tensor] | None, call: CallShape) -> None:
        self._out, self._call = out, call
        given = None if call.made_up else out  # whose tensors have no rows
        self.memory = {**(given or {})}
        if call.in_chunks:  # at once: "auto" measures what a chunk takes besides
            missing = [n for n in call.parameters if n not in self.memory]
            self.memory.update({name: self._fresh(name) for name in missing})

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return _RowsPart(self, slice(start, stop))

    def joined(self, call: CallShape, parts: Sequence[Any]) -> dict[str, Tensor]:
        if self._out is not None:
            return cast(dict[str, Tensor], self._out)  # the caller's own
        rows = {name: self.memory[name] for name in call.parameters}
        return {n: r[:0] for n, r in rows.items()} if call.made_up else rows

    def _fresh(self, name: str) -> Tensor:
        value = self._call.parameters[name]
        return value.new_empty(self._call.count, *value.shape)


class _RowsPart(Part):
    def __init__(self, call: _RowsOfCall, part: slice) -> None:
        self._call, self._part = call, part

    def take(self, grads: Grads) -> None:
        memory = self._call.memory
        if grads.name in memory:
            grads.write_rows(memory[grads.name][self._part])
        else:
            memory[grads.name] = grads.new_rows()

    def finished(self) -> None:
        """They are in the memory of the call."""


class RowsWithDerivatives(Collected[dict[str, Tensor]]):
    """The rows as they are given, through which outer derivatives pass."""

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return _WatchedPart(call)

    def joined(self, call: CallShape, parts: Sequence[Any]) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = joined(call, parts)
        return rows


class _WatchedPart(Part):
    derivatives = True

    def __init__(self, call: CallShape) -> None:
        self._names = list(call.parameters)
        self._rows: dict[str, Tensor] = {}

    def take(self, grads: Grads) -> None:
        self._rows[grads.name] = grads.rows()

    def finished(self) -> dict[str, Tensor]:
        return {name: self._rows[name] for name in self._names}
