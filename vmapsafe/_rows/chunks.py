"""Samples a few at a time: as many as the caller asks for, or as fit into memory.

``"auto"`` starts with few samples and looks at the memory they took. Then it takes as
many as fit into half of the free memory. It runs a chunk that does not fit again, in
halves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from vmapsafe._draws import Draws
from vmapsafe._errors import VmapSafeValueError, shown
from vmapsafe._modes import Options

ChunkSize = int | Literal["auto"] | None


def check_chunk_size(called: str, chunk_size: ChunkSize, options: Options) -> None:
    """Raise unless ``chunk_size`` is one.

    Args:
        called: the public function, for errors.
        chunk_size: what the user wrote.
        options: of the block.

    Raises:
        VmapSafeValueError: it is another value, or "auto" in a mode that merges.
    """
    if chunk_size == "auto":
        if options.meaning.merges:
            raise VmapSafeValueError(
                f'{called} with chunk_size="auto"',
                'in mode "sync" a chunk is a batch with statistics of its own, so '
                "the free memory would decide on the result",
                "Pass an int, or None for the statistics of all samples",
            )
    elif chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise VmapSafeValueError(
            called,
            f"chunk_size is {shown(chunk_size)}",
            'Pass an int of at least 1, "auto", or None for all samples at once',
        )


def in_chunks(
    size: int,
    chunk_size: ChunkSize,
    device: torch.device,
    randomness: str,
    run: Callable[[int, int], None],
) -> None:
    """Call ``run(start, stop)`` until all ``size`` samples are done.

    A call that runs out of memory must leave nothing behind: it is made again for fewer
    samples, with the same random numbers. With ``randomness="same"`` each chunk begins
    with the same ones.

    Args:
        size: how many samples there are.
        chunk_size: how many to run at a time.
        device: where the memory is that they take.
        randomness: as in vmap.
        run: of the first sample of a chunk, and the first after it.
    """
    if chunk_size is None:
        run(0, size)
        return
    first = Draws(randomness, of_host=True) if randomness == "same" else None
    if chunk_size != "auto":
        for start in range(0, size, int(chunk_size)):
            if first is not None:
                first.put_back()
            run(start, min(start + int(chunk_size), size))
        return
    start, step, most = 0, _FIRST, size
    while start < size:
        stop = min(start + step, size)
        if first is not None:
            first.put_back()
        draws = first or Draws(randomness, of_host=True)
        free, (used, peak) = _free(device), _used(device)
        if not _fits(run, start, stop):  # its memory is given back when it returns
            draws.put_back()
            if stop - start == 1:
                run(start, stop)  # raises it again
            step = most = (stop - start) // 2 or 1
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        now = _used(device)[1]
        taken = max(now - used, 1) / (stop - start)
        fitting = int(free / 2 / taken)
        if now == peak:  # an earlier peak hides this one: at most that much
            fitting = max(fitting, 2 * step) if 2 * step * taken < free else step
        start = stop
        step = max(1, min(most, fitting))


_FIRST = 4
_ASSUMED = 2**30  # where the system does not say what is free
_OUT_OF_MEMORY = (
    "can't allocate memory",  # the CPU's allocator, on Linux
    "not enough memory",  # and on other systems
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)


def _fits(run: Callable[[int, int], None], start: int, stop: int) -> bool:
    try:
        run(start, stop)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory cannot be had."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any([words in str(error) for words in _OUT_OF_MEMORY])


def _free(device: torch.device) -> float:
    """Bytes. Memory that torch holds and does not use counts as free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = _lines("/proc/meminfo")
    if "MemAvailable" in lines:
        free = 1024 * lines["MemAvailable"]
    else:
        free = _ASSUMED
    limit = _lines("/sys/fs/cgroup/memory.max", "max").get("max")
    if limit is None:
        return free
    taken = _lines("/sys/fs/cgroup/memory.current", "now").get("now", 0)
    files = _lines("/sys/fs/cgroup/memory.stat").get("inactive_file", 0)
    return min(free, limit - taken + files)


def _used(device: torch.device) -> tuple[int, int]:
    """Bytes in use now, and at most so far."""
    if device.type == "cuda":
        return (
            torch.cuda.memory_allocated(device),
            torch.cuda.max_memory_allocated(device),
        )
    lines = _lines("/proc/self/status")
    return 1024 * lines.get("VmRSS", 0), 1024 * lines.get("VmHWM", 0)


def _lines(path: str, name: str = "") -> dict[str, int]:
    """The numbers in a file of the system, by name; none if it does not exist."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    words = [[name, *line.replace(":", "").split()] for line in text.splitlines()]
    pairs = [line[:2] if name else line[1:3] for line in words]
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and p[1].isdigit()}
