"""One run that fills a folder: by one process, or by several that deal the batches.

Several processes wait for one another when they begin and when they end: until process
0 has looked at the folder, until all have, until all batches are computed, until all
rows have been read again, and until the folder is complete. Between that each takes the
next batch that nobody has taken. If one fails, all stop after their batch. If one fails
or dies, what all have noted stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmapsafe._data.batches import Places
from vmapsafe._data.folder import Folder
from vmapsafe._data.npy import Array
from vmapsafe._data.rest import Batch, Rest
from vmapsafe._errors import VmapSafeRuntimeError, VmapSafeValueError
from vmapsafe._processes import Process, Shares, agreed, name_of_run
from vmapsafe._torch import added_up


class Job(NamedTuple):
    """What is to be done, whoever does it.

    Attributes:
        called: the public function, for errors.
        path: of the folder.
        asked: what the results answer.
        loader: of the batches.
        keys: how a batch that is a dict is taken apart.
        compute: the rows of a batch, by name.
        progress: of (batches finished), a block around the loop, which gives what to
            call with the number of batches finished.
    """

    called: str
    path: Path
    asked: Mapping[str, str | int | None]
    loader: Any
    keys: Places | None
    compute: Callable[[Batch], Mapping[str, Tensor]]
    progress: Callable[[int], AbstractContextManager[Callable[[int], object]]]


def save_alone(job: Job) -> dict[str, Array]:
    """Compute what the folder lacks.

    Args:
        job: what is to be done.

    Returns:
        The rows of all batches by name.
    """
    with Folder(job.called, job.path, job.asked) as folder:
        batches = _begun(job, folder)
        with job.progress(folder.batches) as show:
            for _ in _computed(job, folder, batches):
                show(folder.batches)
        batches.check()
        folder.count(batches.total)
        folder.finish()
    return folder.arrays()


def save_together(job: Job, process: Process, device: torch.device) -> dict[str, Array]:
    """Compute what the folder lacks, with the other processes.

    Args:
        job: what is to be done, the same in all processes.
        process: this one.
        device: one that the process group can send from.

    Returns:
        The rows of all batches by name.

    Raises:
        BaseException: this process failed.
        VmapSafeRuntimeError: another one failed; what the others finished stays.
    """
    run = name_of_run(device)
    shares = Shares(f"vmapsafe {run} batches")
    leads = process.rank == 0

    def takes(index: int) -> bool:
        # All load the first batch, to be compared.
        return shares.takes_next() if index else leads

    def begin() -> tuple[Folder, Rest]:
        folder = stack.enter_context(Folder(job.called, job.path, job.asked, process))
        batches = _begun(job, folder, takes)
        if not folder.complete:
            folder.join(run)
        return folder, batches

    def compute() -> None:
        begun, counted = folder.batches, f"vmapsafe {run} finished"
        try:
            for _ in _computed(job, folder, batches):
                finished = added_up(counted, 1)
                if finished > _FAILED:
                    raise VmapSafeRuntimeError(
                        job.called, "another process failed", "See its error"
                    )
                show(begun + finished)
        except BaseException:
            with suppress(RuntimeError):  # of a process that has ended
                added_up(counted, _FAILED)  # the others need not go on
            raise
        folder.close()

    def look() -> None:
        if not folder.complete:
            folder.collect(run)
        batches.check()
        folder.count(batches.total)

    with ExitStack() as stack:
        first = agreed(job.called, device, lambda: begin() if leads else None)
        folder, batches = agreed(job.called, device, lambda: first or begin())
        show = stack.enter_context(job.progress(folder.batches))
        agreed(job.called, device, compute)
        show(batches.total)
        agreed(job.called, device, look)
        agreed(job.called, device, lambda: folder.finish() if leads else None)
    return folder.arrays()


# More than there are batches: what a process adds to their number when it fails.
_FAILED = 2**48


def _begun(
    job: Job, folder: Folder, takes: Callable[[int], bool] | None = None
) -> Rest:
    batches = Rest(job.loader, job.keys, folder, takes)
    first = batches.first()
    if first is not None:
        folder.check_data(first)
    elif not folder.batches:
        raise VmapSafeValueError(
            job.called,
            "the loader gave no batch, so that the results have no shape",
            "Give a loader with at least one",
        )
    return batches


def _computed(job: Job, folder: Folder, batches: Rest) -> Iterator[None]:
    """Compute batch after batch; stop when the rows of each are written."""
    for batch in batches:
        # The rows before stay until these are there. If their memory were free by now,
        # it would go back to the system, and fresh pages are slow.
        rows = job.compute(batch)
        folder.append(batch.number, batch.start, batch.order, rows, batch.data)
        yield
