"""Which blocks are open: in this thread, and anywhere.

Two tuples, each replaced as a whole: an interrupt, a signal handler or a finalizer that
opens a block of its own sees the old tuple or the new one, never a mixture. A block
that was interrupted before it could close is dead, see :attr:`Open.alive`; the next
block that opens or closes removes it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from vmapsafe._block.covered import Layer, Model
from vmapsafe._modes import Mode, Options
from vmapsafe._torch import next_sequence_number, running_node, sequence_number


class Open(Protocol):
    """A block in force, as code below :class:`vmapsafe._block.scope.Scope` sees it.

    Attributes:
        options: what the user asked for.
        mode: what ``options.mode`` means.
        models: the models covered.
        covers: the model of each module in them.
        layers: their normalisation layers.
        fast: whether faster rules of operators hold.
        thread: the thread that opened it.
        since: the number of the first node of autograd made in it.
        closing: whether its thread is closing it.
        copied: whether a module was copied inside it.
        copies: the copies of layers made inside it that are known, and their originals.
    """

    options: Options
    mode: Mode
    models: tuple[Model, ...]
    covers: dict[nn.Module, Model]
    layers: dict[nn.Module, Layer]
    fast: bool
    thread: threading.Thread
    since: int
    closing: bool
    copied: bool
    copies: weakref.WeakKeyDictionary[nn.Module, nn.Module]

    @property
    def alive(self) -> bool:
        """Whether it is open, and its owner, who will close it, still exists."""

    def see_to_the_rules(self) -> None:
        """Put its rules in force again if an interrupt in torch has removed them."""

    def owner_of_buffer(self, tensor: Tensor) -> tuple[nn.Module, str] | None:
        """The module and the name of the buffer that shares memory with ``tensor``."""

    def buffered_below(self, module: nn.Module) -> list[nn.Module]:
        """The modules with buffers in ``module``, itself included."""

    def leaves_out(self, module: nn.Module, name: str) -> None:
        """Warn that a write to a buffer does not happen, once for each class."""

    def refused(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """The layer or buffer for which a call, made after the block, differs."""

    def close(self) -> str:
        """Take it back."""


class _Here(threading.local):
    blocks: tuple[Open, ...] = ()
    settled = False  # whether they hold for all that runs, in backward too


here = _Here()  # what every call of torch reads
_everywhere: tuple[Open, ...] = ()

# For what two threads must not do at once. The same thread may take it again, in a
# signal handler or a finalizer.
lock = threading.RLock()


def blocks() -> tuple[Open, ...]:
    """The blocks of this thread, the innermost last; some may be dead."""
    return here.blocks


def in_force() -> tuple[Open, ...]:
    """The blocks of this thread that hold for the code that runs.

    Backward of a graph that was made before a block runs outside that block.
    """
    found = here.blocks
    if not found or here.settled:
        return found
    node = running_node()  # None outside backward
    if node is None:
        return found
    number = sequence_number(node)
    return tuple([block for block in found if block.since <= number])


def next_node() -> int:
    """The lower of two numbers: of the node that runs, and of the next one made."""
    following: int = next_sequence_number()
    node = running_node()
    return following if node is None else min(following, sequence_number(node))


def set_blocks(found: tuple[Open, ...]) -> None:
    """Replace the blocks of this thread."""
    here.blocks = found


def everywhere() -> tuple[Open, ...]:
    """The blocks of all threads; some may be dead."""
    return _everywhere


def set_everywhere(found: tuple[Open, ...]) -> None:
    """Replace the blocks of all threads; the caller holds :data:`lock`."""
    global _everywhere
    _everywhere = found


@contextmanager
def instead(found: tuple[Open, ...]) -> Iterator[None]:
    """A context in which other blocks hold in this thread, in backward too."""
    before = here.blocks, here.settled
    try:
        here.blocks, here.settled = found, True
        yield
    finally:
        here.blocks, here.settled = before


def _forked() -> None:
    """Make a new lock: a thread of the parent may hold the old one."""
    global lock
    lock = threading.RLock()
    for block in _everywhere:
        block.closing = False


os.register_at_fork(after_in_child=_forked)
