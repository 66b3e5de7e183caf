"""How a failure is worded: what was called, what was found, what to do."""

import contextlib
import os
import sys
import warnings

import torch


class BlockError(RuntimeError):
    """A block was opened or closed where it cannot be, e.g. in the wrong order."""

    __module__ = "vmapsafe"


class NeverUpdatedWarning(UserWarning):
    """Running statistics that no batch has updated are used in mode "eval"."""

    __module__ = "vmapsafe"


class LeftOutWarning(UserWarning):
    """A forward writes a buffer of its own, which does not happen inside a block."""

    __module__ = "vmapsafe"


def warn_user(text: str, category: type[Warning]) -> None:
    """Warn at the line that called the package, past torch's lines in between."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(
        _PASSED_OVER
    ):
        frame = frame.f_back
        level += 1
    warnings.warn(text, category, stacklevel=level)


# Not the user's lines.
_PASSED_OVER = tuple(
    [
        os.path.dirname(__file__) + os.sep,
        os.path.dirname(torch.__file__) + os.sep,
        contextlib.__file__,
    ]
)


def worded(called: str, found: str, do: str) -> str:
    """One text for every failure of the package.

    >>> worded("vmap_safe(...)", "got no model", "Write vmap_safe(model)")
    'vmap_safe(...): got no model. Write vmap_safe(model).'
    """
    return f"{called}: {found}. {do}."
