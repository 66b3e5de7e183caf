"""Copies of this process that run a function together, and can be killed."""

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60


class Forked:
    """Processes of one group, by gloo, that run ``function(rank)``.

    Args:
        world: how many; one has no group.
        folder: where they meet; it does not exist.
        function: what each runs. It may return what JSON can hold.
    """

    def __init__(
        self, world: int, folder: Path, function: Callable[[int], object]
    ) -> None:
        folder.mkdir()
        self._folder, self._left = folder, dict[int, int]()
        self.codes = dict.fromkeys(range(world), 0)
        for rank in range(world):
            child = os.fork()
            if child == 0:
                self._run(rank, world, function)
            self._left[child] = rank

    def kill(self, ranks: Iterable[int]) -> None:
        """Kill those of these ranks that still run, as ``kill -9`` does."""
        for child, rank in self._left.items():
            if rank in ranks:
                os.kill(child, signal.SIGKILL)

    def wait(self, seconds: float = SECONDS) -> bool:
        """Whether all have ended, after at most so many seconds.

        ``codes`` has the exit code of each that has, or minus the signal.
        """
        deadline = time.monotonic() + seconds
        while self._left:
            for child in [*self._left]:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    rank = self._left.pop(child)
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
            if self._left and time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def returned(self, rank: int) -> Any:
        """What the function returned, or the traceback of its error."""
        return json.loads((self._folder / f"{rank}.json").read_text())

    def _run(self, rank: int, world: int, function: Callable[[int], object]) -> None:
        code, found = 1, None
        try:
            torch.set_num_threads(1)
            if world > 1:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{self._folder}/meeting",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=SECONDS),
                )
            found = function(rank)
            code = 0
        except BaseException:
            found = traceback.format_exc()
        finally:
            with contextlib.suppress(BaseException):
                (self._folder / f"{rank}.json").write_text(json.dumps(found))
            os._exit(code)


def together(
    world: int, folder: Path, function: Callable[[int], object], fails: bool = False
) -> list[Any]:
    """Run ``function(rank)`` in processes of one group.

    Args:
        world: how many.
        folder: where they meet; it does not exist.
        function: what each runs. It may return what JSON can hold.
        fails: whether all are to raise, and none if not.

    Returns:
        What each returned, or the traceback of its error.
    """
    forked = Forked(world, folder, function)
    try:
        assert forked.wait(), f"still at it after {SECONDS} s"
    finally:
        forked.kill(range(world))
        forked.wait()
    found = [forked.returned(rank) for rank in range(world)]
    assert all([code == fails for code in forked.codes.values()]), found
    return found
