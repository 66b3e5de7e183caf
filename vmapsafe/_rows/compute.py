"""One call for some quantities: in chunks, for an empty batch, in several processes.

There are three ways to a quantity. Recording the forward gives it from one backward
pass and makes no more rows than it needs. ``vmap(grad)`` makes all rows; it follows
every loss, and derivatives of its rows pass through. A loop of plain autograd runs what
vmap refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from vmapsafe._block.loop import (
    Before,
    Fallback,
    by_vmap_or_loop,
    check_fallback,
    modules_in,
)
from vmapsafe._block.models import device_of, running_statistics
from vmapsafe._block.refusals import is_of_checkpoint
from vmapsafe._draws import Draws
from vmapsafe._errors import VmapSafeRuntimeError
from vmapsafe._modes import MODES, Also, ModeName, NumGroups, Options, RowsName
from vmapsafe._processes import agreed, check_all_or_none, check_same, differing
from vmapsafe._rows.advice import advise
from vmapsafe._rows.chunks import ChunkSize, check_chunk_size
from vmapsafe._rows.looks import Feed, computed
from vmapsafe._rows.out import check_out
from vmapsafe._rows.parameters import Params
from vmapsafe._rows.record import Unrecordable
from vmapsafe._rows.samples import Loss, Samples
from vmapsafe._torch import without_autocast
from vmapsafe.quantities.protocol import Quantity
from vmapsafe.quantities.rows import Rows, RowsWithDerivatives

Wanted = Mapping[str, Quantity[Any]]


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

    The other attributes are those of :func:`vmapsafe.per_sample`.
    """

    called: str
    model: nn.Module
    loss_fn: Loss
    batch: tuple[Any, ...]
    params: Params
    chunk_size: ChunkSize
    randomness: str
    has_aux: bool
    keep_batch_dim: bool
    fallback: Fallback
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
        check_fallback(self.called, self.fallback, options.meaning.merges)
        return Samples.of(
            self.model,
            self.loss_fn,
            self.batch,
            self.params,
            options,
            self.randomness,
            self.has_aux,
            self.keep_batch_dim,
        )

    def one(
        self, make: Callable[[], Quantity[Any]], option: str = "", value: Any = None
    ) -> Any:
        """The value of a quantity, or with ``has_aux`` a pair of it and aux.

        Args:
            make: makes the quantity, and checks its options. In several processes that
                fails in all of them, or in none.
            option: the option that asks for all processes.
            value: what the caller gave for it.

        Returns:
            The value, or the pair.
        """
        found, aux = self._agreed(lambda: {"": make()}, [(option, value)])
        return (found[""], aux) if self.has_aux else found[""]

    def all(self, wanted: Wanted) -> Any:
        """The values of several quantities by their keys, or a pair of them and aux."""
        options = [quantity.across() for quantity in wanted.values()]
        asked = [(k, type(q).__name__, *q.across()) for k, q in wanted.items()]
        found, aux = self._agreed(lambda: wanted, options, repr(asked))
        return (found, aux) if self.has_aux else found

    def _agreed(
        self,
        make: Callable[[], Wanted],
        options: Sequence[tuple[str, str | None]],
        asked: str = "",
    ) -> tuple[dict[str, Any], Any]:
        """Compute quantities, of all processes where the caller asks for that.

        Args:
            make: makes the quantities.
            options: those that ask for all processes, and their values.
            asked: what must be the same in all processes.

        Returns:
            The values, and the aux of this process.

        Raises:
            VmapSafeValueError: an option is neither None nor "all".
            VmapSafeRuntimeError: there is no process group, another process failed, or
                the running statistics differ.
        """
        for option, value in options:
            check_all_or_none(self.called, option, value, _OF_ONE.get(option, ""))
        asking = [option for option, value in options if value is not None]
        if not asking:
            return self._computed(make())
        made: Wanted = {}

        def compute() -> tuple[dict[str, Any], Any]:
            nonlocal made
            made = make()
            return self._computed(made)

        called = f'{self.called} with {asking[0]}="all"'
        model = self.model  # which is checked later
        is_module = isinstance(model, nn.Module)
        device = device_of(model) if is_module else torch.device("cpu")
        if asked:
            check_same(called, device, asked)
        found, aux = agreed(called, device, compute)
        self._check_same_statistics(called, device)
        for key, quantity in made.items():
            if quantity.across()[1] is not None:
                found[key] = quantity.of_all_processes(found[key])
        return found, aux

    def _check_same_statistics(self, called: str, device: torch.device) -> None:
        """Raise unless all processes normalise by the same running statistics.

        Each process of DistributedDataParallel updates its own while it trains. The
        wrapper's forward makes them equal, which does not run here.
        """
        given = self.params if isinstance(self.params, Mapping) else {}
        statistics = {
            name: given.get(name, buffer)
            for name, buffer in running_statistics(self.model).items()
        }
        # In every mode, so that no process waits for one that asks in another mode.
        name = differing(statistics, device)
        if name is not None and MODES[self.block.mode].reads_running_stats:
            raise VmapSafeRuntimeError(
                called,
                f"{name!r} differs from process to process, so that the gradients are "
                "of different networks",
                "Copy those of one process, for b in model.buffers(): "
                "torch.distributed.broadcast(b, 0), or train with SyncBatchNorm",
            )

    def _computed(self, wanted: Wanted) -> tuple[dict[str, Any], Any]:
        samples = self.samples()
        if torch.compiler.is_compiling():
            return self._found(samples, wanted)
        try:
            return self._by_vmap_or_loop(samples, wanted)
        except RuntimeError as error:
            advise(error, samples, self.chunk_size, wanted)
            raise

    def _by_vmap_or_loop(
        self, samples: Samples, wanted: Wanted
    ) -> tuple[dict[str, Any], Any]:
        """In a loop if vmap refuses the model: of a checkpoint, or if asked for."""
        if samples.options.meaning.merges:
            return self._found(samples, wanted)
        loops = self.fallback == "loop"
        held = modules_in([self.loss_fn]) if loops else []
        return by_vmap_or_loop(
            self.called,
            lambda: self._found(samples, wanted),
            lambda: self._looped(samples, wanted),
            Before(
                samples.randomness,
                samples.tensors,
                [module for module in held if module is not self.model],
                of_host=loops,  # which takes 40 us
            ),
            [samples.net],
            warns_of=type(samples.net) if loops else None,
            quietly=is_of_checkpoint,
        )

    def _looped(self, samples: Samples, wanted: Wanted) -> tuple[dict[str, Any], Any]:
        watched = {
            key: RowsWithDerivatives()
            for key, q in wanted.items()
            if isinstance(q, Rows) and q.out is None and torch.is_grad_enabled()
        }
        found = {**wanted, **watched}
        return computed(samples, found, self.chunk_size, by_loop, one_by_one=True)

    def _found(self, samples: Samples, wanted: Wanted) -> tuple[dict[str, Any], Any]:
        size = self.chunk_size
        rows = {key: q for key, q in wanted.items() if isinstance(q, Rows)}
        given = [q.out for q in rows.values() if q.out is not None]
        for out in given:
            check_out(self.called, out, samples)
        if len(given) == len(rows):
            return computed(samples, wanted, size, recorded_if_possible)
        # Derivatives of rows may be wanted. Sometimes only the computed loss tells.
        if (
            samples.options.fast
            and not samples.options.update_running_stats
            and (samples.recordable() or samples.traceable())
            and not samples.could_be_watched()
        ):
            draws = Draws(samples.randomness)
            try:
                return computed(samples, wanted, size, recorded_if_unwatched)
            except Unrecordable:
                if not torch.compiler.is_compiling():
                    draws.put_back()
        watched = {
            key: RowsWithDerivatives() for key, q in rows.items() if q.out is None
        }
        return computed(samples, {**wanted, **watched}, size, by_vmap)


# What an option of a quantity gives without "all".
_OF_ONE = {"gather": "the values", "reduce": "the sum"}


# -- The ways --------------------------------------------------------------------------


def recorded_if_possible(samples: Samples, batch: tuple[Any, ...], into: Feed) -> Any:
    """Record the forward; use ``vmap(grad)`` where that cannot be done."""
    if samples.traceable():
        return traced_if_possible(samples, batch, into)
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


def recorded_if_unwatched(samples: Samples, batch: tuple[Any, ...], into: Feed) -> Any:
    """Record the forward, for rows that carry no derivatives.

    Args:
        samples: of one call.
        batch: some of them.
        into: takes the gradients.

    Returns:
        Their aux.

    Raises:
        Unrecordable: a derivative of the rows could be wanted, or the loss cannot be
            followed.
    """
    compiling = torch.compiler.is_compiling()
    recorded = samples.traced(batch) if compiling else samples.recorded(batch)
    if recorded.is_watched():
        raise Unrecordable("a tensor that requires a gradient")
    recorded.backward(into)
    return recorded.aux


def traced_if_possible(samples: Samples, batch: tuple[Any, ...], into: Feed) -> Any:
    """While torch.compile traces: in one pass, if that follows the loss."""
    try:
        found = samples.traced(batch)
    except Unrecordable:
        return by_vmap(samples, batch, into)
    found.backward(into)
    return found.aux


def by_loop(samples: Samples, batch: tuple[Any, ...], into: Feed) -> Any:
    """Hand on the rows that plain autograd makes, sample by sample."""
    rows, losses, aux = samples.one_by_one(batch, into.derivatives)
    into.losses(losses)
    with without_autocast(samples.device):
        for name, row in rows.items():
            into.whole(name, row, own=not row.requires_grad)
    return aux


def by_vmap(samples: Samples, batch: tuple[Any, ...], into: Feed) -> Any:
    """Hand on the rows that ``vmap(grad)`` makes."""
    rows, losses, aux = samples.rows(batch)
    into.losses(losses)
    with without_autocast(samples.device):
        for name, row in rows.items():
            into.whole(name, row)
    return aux
