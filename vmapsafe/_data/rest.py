"""The batches of a loader that a folder lacks, and whether the others are those it has.

Batches that are finished are loaded again, and compared, if leaving them out saves
nothing: if their data are in memory, or the loader gives no indices of samples.
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from vmapsafe._data.batches import Places, parts_of, size_of
from vmapsafe._data.checksums import Piece, joined, sampled
from vmapsafe._data.fingerprint import digest
from vmapsafe._data.folder import Folder
from vmapsafe._data.journal import Finished
from vmapsafe._torch import tree_flatten


def in_order(loader: object) -> bool:
    """Whether a loader is known to give the same batches in the same order again."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.sampler, SequentialSampler)
        and (loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler)
    )


class Batch(NamedTuple):
    """A batch that was loaded.

    Attributes:
        number: of the batch, from 0 on.
        start: the number of samples before it.
        order: a checksum of what the loader gave up to this batch: of the indices of
            samples if it has them, else of the data.
        wanted: whether its rows are to be computed.
        parts: the inputs and the rest.
        data: a checksum of it.
    """

    number: int
    start: int
    order: int
    wanted: bool
    parts: tuple[object, ...]
    data: Piece


class Rest:
    """The batches whose rows are to be computed.

    Args:
        loader: a DataLoader, or another iterable of batches.
        keys: how a batch that is a dict is taken apart.
        folder: of the results, as far as there are any.
        takes: whether to take the batch of that index, which is asked in order, and
            not of finished ones; None to take all.
    """

    def __init__(
        self,
        loader: Any,
        keys: Places | None,
        folder: Folder,
        takes: Callable[[int], bool] | None = None,
    ) -> None:
        self._loader, self._keys, self._folder = loader, keys, folder
        self._takes = takes or (lambda index: True)
        self._done, self._ahead = folder.done, {**folder.ahead}
        self._by_index = _by_index(loader)
        self._compares = not self._by_index or _in_memory(loader.dataset)
        self._orders = array("I")
        self._samples = self._samples_of_done = self._order = self._data = 0
        self._waiting: deque[tuple[int, int, int, bool]] = deque()
        self._batches = self._indexed() if self._by_index else self._all()
        self._first: list[Batch] | None = None

    @property
    def total(self) -> int:
        """The number of batches so far."""
        return len(self._orders)

    def first(self) -> str | None:
        """A digest of the first batch; None if there is none."""
        self._first = list(itertools.islice(self._batches, 1))
        return digest(tree_flatten(self._first[0].parts)[0]) if self._first else None

    def __iter__(self) -> Iterator[Batch]:
        for batch in itertools.chain(self._first or [], self._batches):
            if batch.number < self._done.batches:
                self._data = joined(self._data, batch.data)
            elif (finished := self._ahead.get(batch.number)) is not None:
                if finished.data != batch.data:
                    self._refuse("other data in these")
            else:
                self._check_beginning()
                if batch.wanted:
                    yield batch

    def check(self) -> None:
        """Raise, at the end, unless what the folder has is what the loader gave."""
        self._check_beginning()
        for finished in self._folder.ahead.values():
            self._check_finished(finished)

    # -- Loading -----------------------------------------------------------------------

    def _indexed(self) -> Iterator[Batch]:
        """By the indices of samples, without finished batches that can be left out."""
        for given in _with(self._loader, _Indices(self._wanted_indices)):
            parts = parts_of(given, self._keys)
            data = sampled(tree_flatten(parts)[0])
            yield Batch(*self._waiting.popleft(), parts, data)

    def _wanted_indices(self) -> Iterator[list[int]]:
        """The indices of the samples of each batch that is to be loaded."""
        for i, indices in enumerate(self._loader.batch_sampler):
            order = zlib.crc32(repr(indices).encode(), self._order)
            start, wanted = self._next(i, len(indices), order)
            if i == 0 or wanted or (self._compares and self._finished(i)):
                self._waiting.append((i, start, order, wanted))
                yield indices

    def _all(self) -> Iterator[Batch]:
        for i, given in enumerate(self._loader):
            parts = parts_of(given, self._keys)
            data = sampled(tree_flatten(parts)[0])
            order = joined(self._order, data)
            start, wanted = self._next(i, size_of(parts), order)
            yield Batch(i, start, order, wanted, parts, data)

    def _next(self, index: int, size: int, order: int) -> tuple[int, bool]:
        """(the samples before the batch, whether its rows are to be computed)"""
        start = self._samples
        self._orders.append(order)
        self._samples, self._order = start + size, order
        if index < self._done.batches:
            self._samples_of_done = self._samples
        if index in self._ahead:
            self._check_finished(self._ahead[index])
        if self._finished(index) or self._folder.complete:
            return start, False
        return start, self._takes(index)

    def _finished(self, index: int) -> bool:
        return index < self._done.batches or index in self._ahead

    # -- Comparing ---------------------------------------------------------------------

    def _check_finished(self, finished: Finished) -> None:
        """Raise unless the loader gives, up to this batch, what it gave then."""
        if finished.batch >= self.total:
            self._refuse(f"{self.total} batches")
        if finished.order != self._orders[finished.batch]:
            self._refuse("another order of these")

    def _check_beginning(self) -> None:
        """Raise unless what is finished without a gap is what the loader gave."""
        done = self._done
        if self.total < done.batches:
            self._refuse(f"{self.total} batches")
        if self.total > done.batches and self._folder.complete:
            self._refuse("more")
        if self._samples_of_done != done.samples:
            self._refuse(f"{self._samples_of_done} samples in these")
        if self._compares and self._data != done.data:
            self._refuse("other data in these")

    def _refuse(self, found: str) -> NoReturn:
        samples = self._done.samples + sum(b.samples for b in self._ahead.values())
        batches = self._done.batches + len(self._ahead)
        self._folder.refuse(
            f"holds {samples} samples in {batches} batches, and the loader gives "
            f"{found}",
            "Give the same loader, or another path",
        )


def _by_index(loader: object) -> bool:
    """Whether a loader is known to take its samples by indices, a list a batch."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _in_memory(data: object) -> bool:
    if isinstance(data, Subset):
        return _in_memory(data.dataset)
    return isinstance(data, (TensorDataset, list, tuple))


class _Indices:
    """Begins anew at each iteration, as a sampler does."""

    def __init__(self, begin: Callable[[], Iterator[list[int]]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[list[int]]:
        return self._begin()


def _with(loader: DataLoader[Any], batches: Iterable[list[int]]) -> Iterable[object]:
    """A loader like another one, of other batches."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
