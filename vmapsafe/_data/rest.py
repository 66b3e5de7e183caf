"""The batches of a loader that a folder lacks, and whether the others are those it has.

Batches that are finished are loaded again, and compared, if leaving them out saves
nothing: if their data are in memory, or the loader is not a DataLoader.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from vmapsafe._data.folder import Folder


def in_order(loader: object) -> bool:
    """Whether a loader is known to give the same batches in the same order again."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.sampler, SequentialSampler)
        and (loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler)
    )


class Rest:
    """(index, batch) of a loader, without finished batches that can be left out.

    The first batch always comes, to be compared.

    Args:
        loader: a DataLoader, or another iterable of batches.
        finished: the number of batches that the folder has.
        complete: whether the folder has all, so that the others can be left out too.

    Attributes:
        total: the number of batches so far.
    """

    def __init__(self, loader: Any, finished: int, complete: bool) -> None:
        self._loader, self._finished, self._complete = loader, finished, complete
        self._skips = finished > 0 and _can_skip(loader)
        self._samples, self._data, self.total = 0, 0, 0

    def __iter__(self) -> Iterator[tuple[int, object]]:
        if self._skips:
            for i, batch in enumerate(_with(self._loader, _Indices(self._wanted))):
                yield (0 if i == 0 else self._finished + i - 1), batch
        else:
            for i, batch in enumerate(self._loader):
                self.total = i + 1
                yield i, batch

    def _wanted(self) -> Iterator[list[int]]:
        """The indices of the samples of each batch that is to be loaded."""
        for i, indices in enumerate(self._loader.batch_sampler):
            self.total = i + 1
            if i == 0 or (i >= self._finished and not self._complete):
                yield indices
            elif i < self._finished:
                self._samples += len(indices)

    def passed(self, leaves: Sequence[Any]) -> None:
        """Count a batch that was loaded although it is finished."""
        self._samples += len(leaves[0])
        self._data = summed(leaves, self._data)

    def check(self, folder: Folder) -> None:
        """Raise unless the finished batches are those of the folder."""
        done = folder.done
        if self.total < done.batches:
            found = f"{self.total} batches"
        elif self.total > done.batches and folder.complete:
            found = "more"
        elif self._samples != done.samples:
            found = f"{self._samples} samples in these"
        elif self._data != done.data and not self._skips:
            found = "other data in these"
        else:
            return
        folder.refuse(
            f"holds {done.samples} samples in {done.batches} batches, and the loader "
            f"gives {found}",
            "Give the same loader, or another path",
        )


def summed(leaves: Iterable[object], before: int) -> int:
    """A checksum of a batch and those before; it reads part of a large batch."""
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat = leaf.detach().reshape(-1)
            some = flat[:: 1 + len(flat) // _MANY].cpu().contiguous()
            before = zlib.crc32(some.view(torch.uint8).numpy().data, before)
    return before


_MANY = 2**16


def _can_skip(loader: object) -> bool:
    """Whether batches can be left out, and loading them costs something."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and not _in_memory(loader.dataset)
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
