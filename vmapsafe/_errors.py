"""Errors and warnings: what was called, what was found, what to do."""

import contextlib
import os
import reprlib
import sys
import warnings
from typing import Any

import torch


class VmapSafeError(Exception):
    """An error that this package raises: what was called, what was found, what to do.

    Each is also the built-in error that a caller would expect: a ``ValueError``, a
    ``TypeError``, a ``RuntimeError`` or a ``ModuleNotFoundError``.
    """

    # Without an __init__ of its own: torch.compile could not trace one.
    # An error that somebody else makes of one text has found that.
    args: tuple[str, ...]

    def __str__(self) -> str:
        return worded(*self.args) if len(self.args) == 3 else super().__str__()

    @property
    def called(self) -> str:
        """What was called."""
        return self.args[0] if len(self.args) == 3 else ""

    @property
    def found(self) -> str:
        """What was found."""
        return self.args[1] if len(self.args) == 3 else str(self)

    @property
    def do(self) -> str:
        """What to do."""
        return self.args[2] if len(self.args) == 3 else ""


class VmapSafeValueError(VmapSafeError, ValueError):
    """An argument has a value that it may not have."""


class VmapSafeTypeError(VmapSafeError, TypeError):
    """An argument has a type that it may not have."""


class VmapSafeRuntimeError(VmapSafeError, RuntimeError):
    """A call cannot give the right result, which shows while it runs."""


class NotUnderVmap(VmapSafeRuntimeError):
    """A call that vmap cannot make, and a loop over the slices can."""


class BlockError(VmapSafeRuntimeError):
    """A block was opened or closed where it cannot be, e.g. in the wrong order."""


class MissingExtraError(VmapSafeError, ModuleNotFoundError):
    """A package is missing that one of the optional extras installs."""


class NeverUpdatedWarning(UserWarning):
    """Running statistics that no batch has updated are used in mode "eval"."""


class LeftOutWarning(UserWarning):
    """A forward writes a buffer of its module; inside a block it does not happen."""


class FallbackWarning(UserWarning):
    """vmap cannot run a function, so that its slices run one after another."""


def warn_user(text: str, category: type[Warning]) -> None:
    """Warn at the user's line that called the package, directly or through torch.

    There is no such line, and no warning, while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(
        _PASSED_OVER
    ):
        frame = frame.f_back
        level += 1
    warnings.warn(text, category, stacklevel=level)


# Files whose lines are not the user's.
_PASSED_OVER = tuple(
    [
        os.path.dirname(__file__) + os.sep,
        os.path.dirname(torch.__file__) + os.sep,
        contextlib.__file__,
    ]
)


def worded(called: str, found: str, do: str) -> str:
    """The text of every error and warning of the package.

    >>> worded("vmap_safe(...)", "got no model", "Write vmap_safe(model)")
    'vmap_safe(...): got no model. Write vmap_safe(model).'
    """
    return f"{_cut(called)}: {_cut(found)}. {do}."


def shown(value: object) -> str:
    """A value in a few words; for a tensor or an array, its class and shape.

    >>> import torch
    >>> shown([torch.zeros(3, 4), "a"])
    "[Tensor (3, 4), 'a']"
    """
    return _short.repr(value)


def a_kind(value: object) -> str:
    """The class of a value, with its article.

    >>> a_kind(3), a_kind([])
    ('an int', 'a list')
    """
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIO" else f"a {name}"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr1(self, x: Any, level: int) -> str:
        if hasattr(x, "__qualname__"):  # a function or a class
            return str(x.__qualname__)
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return f"{type(x).__name__} {tuple(x.shape)}"
        if isinstance(x, dict):  # a subclass too, such as a state_dict
            return self.repr_dict(x, level)
        if isinstance(x, tuple):
            return self.repr_tuple(x, level)
        return super().repr1(x, level)

    def repr_instance(self, x: Any, level: int) -> str:
        said = super().repr_instance(x, level)
        return type(x).__name__ if "\n" in said else said  # a network


_short = _Short()
_MOST = 1500  # characters


def _cut(text: str) -> str:
    """The text without its middle, if it has several lines, as a printed tensor."""
    first, *rest = text.split("\n")
    if rest:
        text = f"{first} ... {rest[-1]}"
    if len(text) > _MOST:
        text = f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"
    return text
