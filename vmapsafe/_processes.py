"""Results of all processes of torch.distributed's default group, put together.

A process that fails would leave the others waiting for what it does not send. So each
process first says whether it has failed, and if one has, all raise.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vmapsafe._errors import VmapSafeRuntimeError, VmapSafeValueError, worded
from vmapsafe._torch import added_up

T = TypeVar("T")


class Process(NamedTuple):
    """One of several processes that work together.

    Attributes:
        rank: its number.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1


def this_process() -> Process:
    """This one, of the default group; if there is none, it is alone."""
    if dist.is_available() and dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size())
    return Process()


def name_of_run(device: torch.device) -> str:
    """A name for what the processes do together.

    Args:
        device: one that the process group can send from.

    Returns:
        A new one, the same in all processes.
    """
    number = torch.tensor(secrets.randbits(60), device=device)
    dist.broadcast(number, 0)
    return f"{int(number):015x}"


class Shares:
    """The next numbers, 0, 1, 2, ..., dealt to whichever process asks for one.

    No process waits for another one. Each is asked about numbers in order.

    Args:
        name: that no other shares have; the same in all processes.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._asked, self._own = 0, -1

    def takes_next(self) -> bool:
        """Whether the next number is this process's."""
        number = self._asked
        self._asked += 1
        if self._own < number:
            self._own = added_up(self._name, 1) - 1
        return self._own == number


def check_all_or_none(called: str, option: str, value: str | None, one: str) -> None:
    """Raise unless ``value`` is None, or "all" and there are processes to ask.

    Args:
        called: the public function, for errors.
        option: the name of its argument.
        value: what was given.
        one: what None gives.

    Raises:
        VmapSafeValueError: another value.
        VmapSafeRuntimeError: "all" without a process group.
    """
    if value not in (None, "all"):
        raise VmapSafeValueError(
            called,
            f"unknown {option} {value!r}",
            f'Pass None for {one} in this process, or "all"',
        )
    if value == "all" and not (dist.is_available() and dist.is_initialized()):
        raise VmapSafeRuntimeError(
            f'{called} with {option}="all"',
            "torch.distributed has no process group",
            "Call torch.distributed.init_process_group first, or leave "
            f"{option} out",
        )


def agreed(called: str, device: torch.device, compute: Callable[[], T]) -> T:
    """Compute something in all processes or in none; a process does not wait for one
    that has failed.

    Args:
        called: the public function, for errors.
        device: one that the process group can send from.
        compute: what each process computes.

    Returns:
        What it gives in this process.

    Raises:
        BaseException: it failed in this process.
        VmapSafeRuntimeError: it failed in another process.
    """
    failed: BaseException | None = None
    try:
        found = compute()
    except BaseException as error:
        failed = error
    flag = torch.tensor(float(failed is not None), device=device)
    try:
        dist.all_reduce(flag)
    except RuntimeError as error:
        if failed is not None:
            raise failed from error
        ended = "another process has ended, or does not answer"
        error.add_note(worded(called, ended, "See its error"))
        raise
    if failed is not None:
        raise failed
    if flag:
        raise VmapSafeRuntimeError(
            called,
            f"{int(flag)} of {dist.get_world_size()} processes failed",
            "See their errors",
        )
    return found


def check_same(called: str, device: torch.device, asked: str) -> None:
    """Raise unless all processes ask for the same.

    Args:
        called: the public function, for errors.
        device: one that the process group can send from.
        asked: what this process asks for, in words.

    Raises:
        VmapSafeRuntimeError: another process asks for something else.
    """
    number = torch.tensor([zlib.crc32(asked.encode())], device=device)
    most, least = _extremes(number)
    if int(most) != int(least):
        raise VmapSafeRuntimeError(
            called,
            f"the processes ask for different things; this one for {asked}",
            "Ask for the same quantities in the same order in all of them",
        )


def differing(tensors: Mapping[str, Tensor], device: torch.device) -> str | None:
    """Compare tensors with those of the other processes.

    Args:
        tensors: floating-point ones, with the same names and shapes in all processes.
        device: one that the process group can send from.

    Returns:
        The name of the first that is not close to those of all others, the same in all
        processes; None if there is none.
    """
    if not tensors:
        return None
    mine = torch.cat(
        [t.detach().flatten().to(device).float() for t in tensors.values()]
    )
    most, least = _extremes(mine)
    apart = ~torch.isclose(most, least, rtol=1e-4, equal_nan=True)
    sizes = [t.numel() for t in tensors.values()]
    for name, piece in zip(tensors, torch.split(apart, sizes)):
        if piece.any():
            return name
    return None


def _extremes(mine: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the least of all processes' numbers, in one message."""
    both = torch.cat([mine, -mine])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return both[: len(mine)], -both[len(mine) :]


def summed(total: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all processes; one message for each dtype."""
    found = dict(total)
    for dtype in dict.fromkeys([t.dtype for t in total.values()]):
        names = [name for name, t in total.items() if t.dtype == dtype]
        message = torch.cat([total[name].flatten() for name in names])
        dist.all_reduce(message)
        pieces = torch.split(message, [total[name].numel() for name in names])
        for name, piece in zip(names, pieces):
            found[name] = piece.view_as(total[name])
    return found


def gathered(part: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, those of rank 0 first; the B may differ."""
    world = dist.get_world_size()
    size = torch.tensor([len(part)], device=part.device)
    sizes = [torch.empty_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    most = max([int(s) for s in sizes])
    padded = part.new_zeros(most, *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([p[: int(s)] for p, s in zip(parts, sizes)])
