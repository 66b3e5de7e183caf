"""Which blocks are open: in this thread, and anywhere.

Two tuples, each replaced as a whole: an interrupt, a signal handler or a finalizer that
opens a block of its own meets the old one or the new one and nothing between. A block
that was interrupted before it could close is found dead by :attr:`Open.alive`; whoever
opens or closes a block next sweeps it up.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from vmapsafe._torch import next_sequence_number, running_node, sequence_number


class Open(Protocol):
    """A block in force, as much as is asked of it here."""

    fast: bool
    since: int  # the number of the first node of autograd made in it

    @property
    def alive(self) -> bool:
        """Whether it is open, and somebody is there who will close it."""


class _Here(threading.local):
    blocks: tuple[Any, ...] = ()
    settled = False  # whether backward runs what was made in them


_here = _Here()
_everywhere: tuple[Any, ...] = ()

# For what must not happen in two threads at once; the same thread may meet it again, in
# a signal handler or a finalizer.
lock = threading.RLock()


def blocks() -> tuple[Any, ...]:
    """The blocks of this thread, the innermost last; some may be dead."""
    return _here.blocks


def in_force() -> tuple[Any, ...]:
    """Those that hold for what is running: what backward runs of a graph that was made
    before a block runs outside it."""
    found = _here.blocks
    if not found or _here.settled:
        return found
    node = running_node()  # None but in backward
    if node is None:
        return found
    number = sequence_number(node)
    return tuple([block for block in found if block.since <= number])


def next_node() -> int:
    """The number of the first node made from now on, or of the one that runs."""
    following: int = next_sequence_number()
    node = running_node()
    return following if node is None else min(following, sequence_number(node))


def set_blocks(found: tuple[Any, ...]) -> None:
    """Replace them."""
    _here.blocks = found


def everywhere() -> tuple[Any, ...]:
    """The blocks of all threads; some may be dead."""
    return _everywhere


def set_everywhere(found: tuple[Any, ...]) -> None:
    """Replace them, with :data:`lock` held."""
    global _everywhere
    _everywhere = found


@contextmanager
def instead(found: tuple[Any, ...]) -> Iterator[None]:
    """The blocks of this thread are others, in backward too."""
    before = _here.blocks, _here.settled
    try:
        _here.blocks, _here.settled = found, True
        yield
    finally:
        _here.blocks, _here.settled = before


def _forked() -> None:
    """A child has none of its parent's other threads, of which one may hold it."""
    global lock
    lock = threading.RLock()


os.register_at_fork(after_in_child=_forked)
