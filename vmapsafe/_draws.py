"""The state of random generators, so that a draw can be made again.

These are torch's, and those of Python and numpy, from which a model may draw which of
its layers to leave out. A torch.Generator of a model's own is not known here.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from vmapsafe._errors import VmapSafeRuntimeError, VmapSafeValueError, shown
from vmapsafe._torch import below_all

Randomness = Literal["error", "different", "same"]
RANDOMNESS: tuple[Randomness, ...] = ("error", "different", "same")


def check_randomness(called: str, randomness: object) -> None:
    """Raise unless ``randomness`` is a value that vmap knows.

    Args:
        called: the public function, for the error.
        randomness: what the user wrote.

    Raises:
        VmapSafeValueError: it is another value.
    """
    if randomness not in RANDOMNESS:
        raise VmapSafeValueError(
            called,
            f"unknown randomness {shown(randomness)}",
            'Choose one of "error", "different", "same"',
        )


class Draws:
    """The state of the random generators.

    Those of torch are left out with ``randomness="error"``, where vmap does not allow
    draws.

    Args:
        randomness: as in vmap.
        of_host: whether to keep those of Python and numpy too, which takes 40 us.
    """

    def __init__(self, randomness: str, of_host: bool = False) -> None:
        self._states: list[tuple[_Note, _PutBack, Any]] = []
        self._unknown = False
        self._of_host: list[tuple[_Note, _PutBack, Any]] = []
        if torch.compiler.is_compiling():
            self._unknown = randomness != "error"
            return
        if of_host:
            self._of_host = [(note, back, note()) for note, back in _of_host()]
        if randomness != "error":
            # While a CUDA graph is captured, torch refuses to give or set a state.
            self._unknown = _captures()
            with below_all():
                kinds = [*_OF_CPU] if self._unknown else [*_OF_CPU, *_of_devices()]
                self._states = [(note, back, note()) for note, back in kinds]

    @property
    def known(self) -> bool:
        """Whether :meth:`put_back` can set them back."""
        return not self._unknown

    def put_back(self) -> None:
        """Set the generators back: the next draws repeat those made since.

        Raises:
            VmapSafeRuntimeError: a CUDA graph is being captured, or a call compiled.
        """
        if self._unknown:
            raise VmapSafeRuntimeError(
                "per-sample gradients",
                "random numbers would have to be drawn again, and the state of the "
                "generators is not at hand while torch.compile traces or a CUDA graph "
                "is captured",
                'Use randomness="error", or all samples at once',
            )
        for _, put_back, state in self._of_host:
            put_back(state)
        if self._states:
            with below_all():
                for _, put_back, state in self._states:
                    put_back(state)

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        known = [*self._of_host, *self._states]
        with below_all():
            return any([not _equal(note(), state) for note, _, state in known])


def begin_draws(at: str) -> None:
    """Set all generators to a state that follows from a text."""
    number = int.from_bytes(hashlib.sha256(at.encode()).digest()[:8])
    with below_all():
        torch.manual_seed(number)
    random.seed(number)
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed(number % 2**32)


# The state of a generator, or of those of all devices of a kind.
_Note = Callable[[], Any]
_PutBack = Callable[[Any], object]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all([_equal(*pair) for pair in zip(a, b)])
    return bytes(a) == bytes(b) if hasattr(a, "tobytes") else bool(a == b)


def _of_host() -> Iterator[tuple[_Note, _PutBack]]:
    yield random.getstate, random.setstate
    numpy = sys.modules.get("numpy.random")  # nothing draws from it before
    if numpy is not None:
        yield numpy.get_state, numpy.set_state


_OF_CPU: tuple[tuple[_Note, _PutBack], ...]
_OF_CPU = ((torch.get_rng_state, torch.set_rng_state),)


def _captures() -> bool:
    """Whether a CUDA graph is being captured."""
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())


def _of_devices() -> Iterator[tuple[_Note, _PutBack]]:
    for kind in (torch.cuda, torch.xpu):
        if kind.is_initialized():
            yield kind.get_rng_state_all, kind.set_rng_state_all
    if torch.backends.mps.is_available():
        yield torch.mps.get_rng_state, torch.mps.set_rng_state
