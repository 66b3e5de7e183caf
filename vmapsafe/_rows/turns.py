"""One call at a time on a model.

The functions of per-sample gradients put copies in the place of a model's parameters,
in modules that all threads share. So calls take turns if they are in several threads
and their models have modules in common. A call that is interrupted gives its turn back
when its frame ends.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from vmapsafe._block import open_blocks
from vmapsafe._errors import BlockError

P = ParamSpec("P")
R = TypeVar("R")


class _Turn:
    """A call that runs, or waits for another."""

    def __init__(self, model: object) -> None:
        self.model = model
        self.thread = threading.current_thread()
        self.waits_for: _Turn | None = None

    def excludes(self, other: _Turn) -> bool:
        if self.thread is other.thread or not self.thread.is_alive():
            return False
        mine, others = self.model, other.model
        if not isinstance(mine, nn.Module) or not isinstance(others, nn.Module):
            return False
        return not {*mine.modules()}.isdisjoint(others.modules())

    def waits_for_thread(self, thread: threading.Thread) -> bool:
        """Whether this call waits for ``thread``, directly or through other calls."""
        waiting = [t for t in _turns() if t.thread is self.thread and t.waits_for]
        for turn in waiting:
            held = turn.waits_for
            if held and (held.thread is thread or held.waits_for_thread(thread)):
                return True
        return False


_refs: tuple[weakref.ref[_Turn], ...] = ()


def _turns() -> list[_Turn]:
    return [turn for ref in _refs if (turn := ref()) is not None]


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator for functions whose first argument is a model."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        turn = _Turn(args[0] if args else kwargs.get("model"))
        _take(turn, function.__name__)
        try:
            return function(*args, **kwargs)
        finally:
            _give_back(turn)

    return wrapper


def _take(turn: _Turn, called: str) -> None:
    global _refs
    while True:
        with open_blocks.lock:
            turn.waits_for = None
            for other in _turns():
                if other is not turn and not other.waits_for and other.excludes(turn):
                    turn.waits_for = other
            _refs = (*[ref for ref in _refs if ref() not in (None, turn)],)
            _refs = (*_refs, weakref.ref(turn))
            held = turn.waits_for
            if held is None:
                return
            if held.waits_for_thread(turn.thread):
                raise BlockError(
                    f"{called}(...)",
                    "another thread holds the model and waits for one that this "
                    "thread holds, in calls inside calls",
                    "Use the models in the same order in both threads",
                )
        time.sleep(_PAUSE)


def _give_back(turn: _Turn) -> None:
    global _refs
    with open_blocks.lock:
        _refs = tuple([ref for ref in _refs if ref() not in (None, turn)])


_PAUSE = 2e-4  # seconds
