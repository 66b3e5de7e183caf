"""The gradients of all samples, looked at once or more often.

A look hands the gradients to the parts of several quantities. One is enough for most.
Quantities that are made of others may need a second one. It takes gradients that were
kept if all samples ran at once. Otherwise the chunks run again, with the random numbers
that they drew before. Quantities of pairs of samples need both samples' gradients at a
time: of two chunks, one is kept while the other runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vmapsafe._draws import Draws
from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, a_kind, shown
from vmapsafe._rows.chunks import ChunkSize, in_chunks
from vmapsafe._rows.record import Collector
from vmapsafe._rows.samples import Samples
from vmapsafe._torch import current_level, without_autocast, without_autograd
from vmapsafe.quantities.protocol import (
    CallShape,
    Collected,
    Grads,
    Paired,
    Part,
    Quantity,
    joined,
)
from vmapsafe.quantities.rows import Rows
from vmapsafe.rules.formulas import Formula

# How some of the samples give their gradients to what takes them; returns their aux.
Way = Callable[[Samples, tuple[Any, ...], "Feed"], Any]
Stage = Collected[Any] | Paired
Kept = Mapping[str, Grads]


def computed(
    samples: Samples,
    wanted: Mapping[str, Quantity[Any]],
    chunk_size: ChunkSize,
    way: Way,
    one_by_one: bool = False,
) -> tuple[dict[str, Any], Any]:
    """Some quantities of all samples, and aux.

    Args:
        samples: of one call.
        wanted: the quantities.
        chunk_size: how many samples at a time.
        way: how some of the samples give their gradients.
        one_by_one: whether it takes one after another, so that chunks of one sample
            save memory, and take no longer.

    Returns:
        The quantities by their keys, and aux.
    """
    call = CallShape(
        samples.called,
        samples.values,
        samples.count,
        in_chunks=chunk_size is not None or one_by_one,
        mode=samples.options.meaning,
        rows=samples.options.rows,
        made_up=samples.size == 0,
    )
    begun = {key: quantity.begin(call) for key, quantity in wanted.items()}
    stages = [s for s in begun.values() if isinstance(s, (Collected, Paired))]
    looks_again = len(stages) < len(begun)
    paired = any([isinstance(stage, Paired) for stage in stages])
    if one_by_one and not (looks_again or paired):
        chunk_size = 1
    run = _Run(samples, call, chunk_size, way, looks_again, one_by_one)
    if not run.looks_again:
        return dict(zip(begun, run.look(stages))), run.aux
    looks = _Several(call, begun)
    while not looks.done:
        looks.give(run.look(looks.stages()))
    return looks.values(), run.aux


class _One:
    """One quantity, which looks as often as it wants.

    Args:
        call: the call.
        quantity: it, which has begun.

    Attributes:
        done: whether it has its value.
        value: that value.

    Raises:
        VmapSafeTypeError: its generator is not one, or yields something else.
        VmapSafeValueError: it yields rows in memory that the caller keeps.
    """

    def __init__(self, call: CallShape, quantity: Quantity[Any]) -> None:
        self.done, self.value = False, None
        self._call = call
        self._stage: Stage | None = None
        if isinstance(quantity, (Collected, Paired)):
            self._stage = quantity
            return
        self._name = f"{call.called} with {type(quantity).__name__}"
        self._looks = quantity.looks(call)
        if not isinstance(self._looks, Generator):
            raise VmapSafeTypeError(
                self._name,
                f"its method looks returned {shown(self._looks)}, not a generator",
                "Write yield in it, in front of what it wants",
            )
        self._go_on(None)

    def stages(self) -> list[Stage]:
        """What it wants of the next look."""
        if self.done:
            return []
        return self._others.stages() if self._stage is None else [self._stage]

    def give(self, values: list[Any]) -> None:
        """Go on with the values of those stages."""
        if self.done:
            return
        if self._stage is not None:
            (self.value,) = values
            self.done = True
            return
        self._others.give(values)
        self._go_on_when_known()

    def _go_on_when_known(self) -> None:
        if self._others.done:
            found = self._others.values()
            self._go_on(found if self._several else found[""])

    def _go_on(self, found: Any) -> None:
        """Hand its generator what it wanted, and see what it wants next."""
        try:
            wanted = self._looks.send(found)
        except StopIteration as end:
            self.done, self.value = True, end.value
            return
        self._several = isinstance(wanted, Mapping)
        several = wanted if isinstance(wanted, Mapping) else {"": wanted}
        if not all([isinstance(one, Quantity) for one in several.values()]):
            raise VmapSafeTypeError(
                self._name,
                f"its method looks yielded {shown(wanted)}",
                "Yield an object of vmapsafe.quantities, or a dict of some",
            )
        if any([isinstance(one, Rows) and one.out for one in several.values()]):
            raise VmapSafeValueError(
                self._name,
                "its method looks yielded Rows(out=...)",
                "Yield Rows(), without memory that the caller keeps",
            )
        begun = {key: one.begin(self._call) for key, one in several.items()}
        self._others = _Several(self._call, begun)
        self._go_on_when_known()  # they may not want a look


class _Several:
    """Some quantities that have begun, and look together.

    torch.compile does not trace generators inside each other. So these are objects.
    """

    def __init__(self, call: CallShape, begun: Mapping[str, Quantity[Any]]) -> None:
        self._ones = {key: _One(call, quantity) for key, quantity in begun.items()}

    @property
    def done(self) -> bool:
        """Whether all have their values."""
        return all([one.done for one in self._ones.values()])

    def values(self) -> dict[str, Any]:
        """Their values by their keys."""
        return {key: one.value for key, one in self._ones.items()}

    def stages(self) -> list[Stage]:
        """What they want of the next look."""
        return [stage for one in self._ones.values() for stage in one.stages()]

    def give(self, values: list[Any]) -> None:
        """Go on with the values of those stages."""
        start = 0
        for one in self._ones.values():
            stop = start + len(one.stages())
            one.give(values[start:stop])
            start = stop


# -- One look --------------------------------------------------------------------------


class Feed(Collector):
    """Hands the gradients of some samples, parameter by parameter, to several parts.

    Args:
        parts: of the quantities.
        asked: what they will ask of all gradients, and how often.
        keep: whether the gradients will be wanted again.

    Attributes:
        derivatives: whether those of the gradients may be wanted.
        kept: the gradients by the parameters' names, if they are kept.
    """

    def __init__(
        self, parts: Sequence[Part], asked: Mapping[str, int], keep: bool
    ) -> None:
        self._parts, self._asked, self._keep = parts, asked, keep
        self.derivatives = any([part.derivatives for part in parts])
        self.kept: dict[str, Grads] = {}

    def losses(self, losses: Tensor) -> None:
        """Hand on the losses (n,)."""
        for part in self._parts:
            if type(part).take_losses is not Part.take_losses:
                part.take_losses(without_autograd(losses).clone())

    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        self.take(Grads(name, formula, x, grad, self._asked))

    def whole(self, name: str, rows: Tensor, own: bool = False) -> None:
        given = Grads.of_rows(name, rows, self._asked, own)
        if rows.requires_grad and current_level() == 0:
            for part in self._parts:
                if part.derivatives:
                    part.take(given)
            self.take(Grads.of_rows(name, rows.detach(), self._asked), watched=False)
        else:
            self.take(given)

    def take(self, grads: Grads, watched: bool = True) -> None:
        """Hand on the gradients by one parameter."""
        if self._keep or len(self._parts) > 1:
            grads = grads.shared()
        if self._keep:
            grads = self.kept[grads.name] = grads.held()
        for part in self._parts:
            if watched or not part.derivatives:
                part.take(grads)


@dataclass
class _Chunk:
    """Some samples of a batch, and where the random generators stood before them."""

    samples: Samples
    start: int
    stop: int
    draws: Draws | None

    def draw_again(self) -> None:
        """Let the next draws be those that these samples made."""
        assert self.draws is not None
        self.draws.put_back()


@dataclass
class _Run:
    """The looks of one call.

    Attributes:
        samples: of the call.
        call: the same for quantities.
        chunk_size: how many samples at a time.
        way: how some of the samples give their gradients.
        looks_again: whether there may be more than one look.
        one_by_one: whether the way takes one sample after another.
        aux: of all samples, from the first look.
    """

    samples: Samples
    call: CallShape
    chunk_size: ChunkSize
    way: Way
    looks_again: bool
    one_by_one: bool = False
    aux: Any = None
    _chunks: list[_Chunk] = field(default_factory=list)
    _kept: Kept = field(default_factory=dict)

    def look(self, stages: Sequence[Stage]) -> list[Any]:
        """The values of quantities that need one look."""
        others = [self._other(stage) for stage in stages]  # before anything runs
        paired = [stage for stage in stages if isinstance(stage, Paired)]
        size = self.chunk_size
        at_once = size is None or size != "auto" and size >= self.samples.count
        keep = self.looks_again if at_once else bool(paired)
        keep = keep or any([other is not None for other in others])
        if not self._chunks:
            found = self._first(stages, keep)
        elif at_once:
            found = [[part] for part in self._fed(stages)]
        else:
            after = self._draws()
            found = [[] for _ in stages]
            for chunk in self._chunks:
                self._add(stages, found, self._again(chunk, stages, keep))
            after.put_back()
        values: list[Any] = []
        for stage, other, parts in zip(stages, others, found):
            if not isinstance(stage, Paired):
                with without_autocast(self.samples.device):
                    values.append(stage.joined(self.call, parts))
            elif other is None:  # chunks run again, as they ran before
                values.append(self._own_pairs(stage, parts))
            else:
                values.append(self._other_pairs(stage, other))
        return values

    def _other(self, stage: Stage) -> Samples | None:
        """The samples of the batch to pair with, if it is not the call's own."""
        if not isinstance(stage, Paired):
            return None
        if self.chunk_size == "auto":
            raise VmapSafeValueError(
                f'{self.call.called} with chunk_size="auto"',
                f"{type(stage).__name__} pairs samples of two chunks, and how many "
                "samples fit into memory is only found for one",
                "Pass an int, for samples of which twice as many fit",
            )
        return None if stage.other is None else self.samples.of_other(stage.other)

    def _draws(self) -> Draws:
        """Where the random generators stand now."""
        return Draws(self.samples.randomness, of_host=True)

    def _first(self, stages: Sequence[Stage], keep: bool) -> list[list[Any]]:
        found: list[list[Any]] = [[] for _ in stages]
        auxs: list[Any] = []
        several = self.looks_again or any([isinstance(s, Paired) for s in stages])

        def run(start: int, stop: int) -> None:
            draws = self._draws() if several else None
            chunk = _Chunk(self.samples, start, stop, draws)
            parts = self._parts(stages, start, stop)
            values, aux, kept = self._feed(chunk, parts, keep, _asked(stages))
            self._add(stages, found, values)
            auxs.append(aux)
            self._chunks.append(chunk)
            self._kept = kept

        samples = self.samples
        self._in_chunks(samples, run)
        self.aux = joined(self.call, auxs)
        for chunk in self._chunks:
            chunk.samples = samples.without_updates()
        return found

    def _in_chunks(self, samples: Samples, run: Callable[[int, int], None]) -> None:
        randomness = samples.randomness
        if self.one_by_one and randomness == "error":
            randomness = "same"  # of what vmap does not see: Python's and numpy's draws
        in_chunks(samples.count, self.chunk_size, samples.device, randomness, run)

    def _add(
        self, stages: Sequence[Stage], found: list[list[Any]], values: list[Any]
    ) -> None:
        """Put what a chunk gives to what those before it gave to each stage."""
        for stage, parts, value in zip(stages, found, values):
            parts.append(value)
            if isinstance(stage, Collected) and len(parts) > 1:
                with without_autocast(self.samples.device):
                    parts[:] = stage.folded(self.call, parts)

    def _again(self, chunk: _Chunk, stages: Sequence[Stage], keep: bool) -> list[Any]:
        chunk.draw_again()
        parts = self._parts(stages, chunk.start, chunk.stop)
        values, _, self._kept = self._feed(chunk, parts, keep, _asked(stages))
        return values

    def _feed(
        self,
        chunk: _Chunk,
        parts: Sequence[Part],
        keep: bool,
        asked: Mapping[str, int] | None = None,
    ) -> tuple[list[Any], Any, Kept]:
        """What the samples of a chunk give to each part, aux, and what is kept."""
        feed = Feed(parts, asked or {}, keep)
        batch = chunk.samples.part(chunk.start, chunk.stop)
        aux = self.way(chunk.samples, batch, feed)
        with without_autocast(self.samples.device):
            return [part.finished() for part in parts], aux, feed.kept

    def _fed(self, stages: Sequence[Stage]) -> list[Any]:
        """What kept gradients give."""
        parts = self._parts(stages, 0, self.samples.count)
        asked = _asked(stages)
        feed = Feed(parts, asked, keep=False)
        with without_autocast(self.samples.device):
            for grads in self._kept.values():
                feed.take(grads.again(asked))
            return [part.finished() for part in parts]

    def _parts(self, stages: Sequence[Stage], start: int, stop: int) -> list[Part]:
        parts = [
            (
                (_With(stage, self.call) if stage.other is None else _Nothing())
                if isinstance(stage, Paired)
                else stage.part(self.call, start, stop)
            )
            for stage in stages
        ]
        for stage, part in zip(stages, parts):
            if not isinstance(part, Part):
                raise VmapSafeTypeError(
                    f"{self.call.called} with {type(stage).__name__}",
                    f"its method part returned {shown(part)}, {a_kind(part)}",
                    "Return an object of a subclass of vmapsafe.quantities.Part",
                )
        return parts

    # -- Pairs -------------------------------------------------------------------------

    def _own_pairs(self, stage: Paired, diagonal: Sequence[Tensor]) -> Tensor:
        """(B, B, ...), from what the chunks give with themselves."""
        blocks = {(i, i): block for i, block in enumerate(diagonal)}
        after = self._draws()
        kept = self._kept  # of the last chunk
        for last in reversed(range(1, len(diagonal))):
            following: Kept = {}
            for i, chunk in enumerate(self._chunks[:last]):
                block, following = self._block(chunk, stage, kept, keep=i == last - 1)
                blocks[i, last], blocks[last, i] = block, block.transpose(0, 1)
            kept = following
        after.put_back()
        places = range(len(diagonal))
        lines = [torch.cat([blocks[i, j] for j in places], 1) for i in places]
        size = self.samples.size
        return torch.cat(lines)[:size, :size]

    def _other_pairs(self, stage: Paired, other: Samples) -> Tensor:
        """(B, B2, ...), with the samples of another batch, which runs now."""
        columns: list[Tensor] = []

        def run(start: int, stop: int) -> None:
            chunk = _Chunk(other, start, stop, self._draws())
            if len(self._chunks) == 1:  # its gradients were kept
                block, _ = self._block(chunk, stage, self._kept, kept_first=True)
                columns.append(block)
                return
            _, _, kept = self._feed(chunk, (), keep=True)
            after = self._draws()
            blocks = [self._block(one, stage, kept)[0] for one in self._chunks]
            columns.append(torch.cat(blocks))
            after.put_back()

        self._in_chunks(other, run)
        return torch.cat(columns, 1)[: self.samples.size, : other.size]

    def _block(
        self,
        chunk: _Chunk,
        stage: Paired,
        kept: Kept,
        keep: bool = False,
        kept_first: bool = False,
    ) -> tuple[Tensor, Kept]:
        """What the samples of a chunk give with those kept, and the chunk's own."""
        chunk.draw_again()
        part = _With(stage, self.call, kept, kept_first)
        (block,), _, kept = self._feed(chunk, [part], keep)
        return block, kept


def _asked(stages: Sequence[Stage]) -> Mapping[str, int]:
    """How many stages ask for what of each parameter's gradients."""
    asked: dict[str, int] = {}
    for stage in stages:
        for name in stage.asks if isinstance(stage, Collected) else ():
            asked[name] = asked.get(name, 0) + 1
    return asked


class _With(Part):
    """Pairs the samples of a chunk with each other, or with some that were kept."""

    def __init__(
        self,
        stage: Paired,
        call: CallShape,
        kept: Kept | None = None,
        kept_first: bool = False,
    ) -> None:
        self._block = stage.block(call)
        self._kept, self._kept_first = kept, kept_first

    def take(self, grads: Grads) -> None:
        others = grads if self._kept is None else self._kept[grads.name]
        pair = (others, grads) if self._kept_first else (grads, others)
        self._block.take(*pair)

    def finished(self) -> Tensor:
        return self._block.finished()


class _Nothing(Part):
    def take(self, grads: Grads) -> None:
        """Its pairs come later."""

    def finished(self) -> None:
        """Its pairs come later."""
