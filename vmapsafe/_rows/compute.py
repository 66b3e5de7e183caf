"""One call for one quantity: in chunks, for an empty batch, in several processes.

There are two ways to a quantity. Recording the forward gives it from one backward pass
and makes no more rows than it needs. ``vmap(grad)`` makes all rows; it follows every
loss, and derivatives of its rows pass through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vmapsafe._block.models import device_of
from vmapsafe._draws import Draws
from vmapsafe._errors import VmapSafeRuntimeError
from vmapsafe._modes import Also, ModeName, NumGroups, Options, RowsName
from vmapsafe._rows.chunks import ChunkSize, check_chunk_size, in_chunks
from vmapsafe._rows.parameters import Params
from vmapsafe._rows.processes import agreed, check_all_or_none
from vmapsafe._rows.quantities import CallShape, Part, Quantity, joined
from vmapsafe._rows.record import Unrecordable
from vmapsafe._rows.samples import Loss, Samples

T = TypeVar("T")
Way = Callable[[Samples, tuple[Any, ...], Part], Any]


class BlockOptions(NamedTuple):
    """The options of the block in which a call runs its model."""

    mode: ModeName
    rows: RowsName
    num_groups: NumGroups
    update_running_stats: bool
    sync_levels: int | None
    also: Also
    fast: bool


@dataclass
class Asked:
    """The arguments that all functions of per-sample gradients share.

    Attributes:
        called: the function, for errors.
        block: the options of its block.

    The other attributes are those of :func:`vmapsafe.per_sample_grads`.
    """

    called: str
    model: nn.Module
    loss_fn: Loss
    batch: tuple[Any, ...]
    params: Params
    chunk_size: ChunkSize
    randomness: str
    has_aux: bool
    block: BlockOptions

    def samples(self) -> Samples:
        """All of it checked and bound.

        Returns:
            The samples.

        Raises:
            VmapSafeTypeError: an argument of another kind.
            VmapSafeValueError: an argument that makes no sense.
        """
        options = Options(called=self.called, **self.block._asdict())
        check_chunk_size(self.called, self.chunk_size, options)
        return Samples.of(
            self.model,
            self.loss_fn,
            self.batch,
            self.params,
            options,
            self.randomness,
            self.has_aux,
        )

    def found_in_all(
        self, option: str, value: str | None, one: str, quantity: Callable[[], Any]
    ) -> Any:
        """Compute a quantity, of all processes where the caller asks for that.

        Args:
            option: the name of the argument that asks for it.
            value: what the caller gave for it, None or "all".
            one: what None gives.
            quantity: makes the quantity, and checks its own options.

        Returns:
            The result, or with ``has_aux`` a pair of it and the aux of this process.

        Raises:
            VmapSafeValueError: ``value`` is neither None nor "all".
            VmapSafeRuntimeError: there is no process group, or another process failed.
        """
        check_all_or_none(self.called, option, value, one)
        if value is None:
            return self.returned(self._computed(quantity))
        called = f'{self.called} with {option}="all"'
        model = self.model  # which is checked later
        is_module = isinstance(model, nn.Module)
        device = device_of(model) if is_module else torch.device("cpu")
        result, aux = agreed(called, device, lambda: self._computed(quantity))
        return self.returned((quantity().of_all_processes(result), aux))

    def returned(self, pair: tuple[T, Any]) -> Any:
        """What the caller gets of a result and aux."""
        return pair if self.has_aux else pair[0]

    def _computed(self, quantity: Callable[[], Quantity[T]]) -> tuple[T, Any]:
        wanted, samples = quantity(), self.samples()
        return computed(samples, wanted, self.chunk_size, recorded_if_possible)


def computed(
    samples: Samples, quantity: Quantity[T], chunk_size: ChunkSize, way: Way
) -> tuple[T, Any]:
    """A quantity of all samples, and aux.

    Args:
        samples: of one call.
        quantity: what is wanted of their gradients.
        chunk_size: how many samples at a time.
        way: how some of the samples give a part of it; returns their aux.

    Returns:
        The quantity, and aux.
    """
    shape = _shape(samples, chunk_size)
    wanted = quantity.begin(shape)
    parts: list[Any] = []
    auxs: list[Any] = []

    def run(start: int, stop: int) -> None:
        part = wanted.part(shape, start, stop)
        aux = way(samples, samples.part(start, stop), part)
        parts.append(part.finished())
        auxs.append(aux)

    in_chunks(samples.count, chunk_size, samples.device, samples.randomness, run)
    return wanted.joined(shape, parts), joined(shape, auxs)


def with_derivatives(
    samples: Samples, chunk_size: ChunkSize
) -> tuple[dict[str, Tensor], Any]:
    """The rows, and aux, through which outer derivatives pass."""
    found: list[Any] = []

    def run(start: int, stop: int) -> None:
        found.append(samples.rows(samples.part(start, stop)))

    in_chunks(samples.count, chunk_size, samples.device, samples.randomness, run)
    rows: tuple[dict[str, Tensor], Any] = joined(_shape(samples, chunk_size), found)
    return rows


def _shape(samples: Samples, chunk_size: ChunkSize) -> CallShape:
    return CallShape(
        samples.values,
        samples.count,
        in_chunks=chunk_size is not None,
        mode=samples.options.meaning,
        made_up=samples.size == 0,
    )


# -- The two ways ----------------------------------------------------------------------


def recorded_if_possible(samples: Samples, batch: tuple[Any, ...], into: Part) -> Any:
    """Record the forward; use ``vmap(grad)`` where that cannot be done."""
    if not samples.recordable():
        return by_vmap(samples, batch, into)
    draws = Draws(samples.randomness)
    try:
        recorded = samples.recorded(batch)
    except Unrecordable as error:
        if samples.options.update_running_stats:  # they have been
            raise VmapSafeRuntimeError(
                samples.called,
                f"the loss calls {error}, and a second forward would update the "
                "running statistics twice",
                "Use torch.func.grad there, or per_sample_grads without out=",
            ) from None
        draws.put_back()
        return by_vmap(samples, batch, into)
    recorded.backward(into)
    return recorded.aux


def recorded_if_unwatched(samples: Samples, batch: tuple[Any, ...], into: Part) -> Any:
    """Record the forward, for rows that carry no derivatives.

    Args:
        samples: of one call.
        batch: some of them.
        into: takes the rows.

    Returns:
        Their aux.

    Raises:
        Unrecordable: a derivative of the rows could be wanted, or the loss cannot be
            followed.
    """
    recorded = samples.recorded(batch)
    if recorded.is_watched():
        raise Unrecordable("a tensor that requires a gradient")
    recorded.backward(into)
    return recorded.aux


def by_vmap(samples: Samples, batch: tuple[Any, ...], into: Part) -> Any:
    """Hand on the rows that ``vmap(grad)`` makes."""
    rows, aux = samples.rows(batch)
    for name, row in rows.items():
        into.whole(name, row)
    return aux
