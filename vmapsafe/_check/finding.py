"""One thing that ``check`` has found, for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vmapsafe._modes import ModeName

Kind = Literal[
    "mixes samples",
    "writes buffers",
    "random",
    "not registered",
    "unsupported",
    "slow fallback",
]

# What a finding may need. A class to name or a module to hand over comes after it.
BLOCK = "vmap_safe(model)"
RANDOMNESS = "randomness="
LOOP = 'fallback="loop"'
ALSO = "also="
HAND_OVER = "vmap_safe(model, ...)"


@dataclass(frozen=True)
class Finding:
    """One thing in a model that matters under vmap or in a mode of ``vmap_safe``.

    Attributes:
        path: the module's name in the model, "" for the model itself.
        module: the name of the module's class.
        kind: what is found, see :func:`vmapsafe.check`.
        detail: what the module does under vmap.
        becomes: mode -> what becomes of it there.
        safe: mode -> whether vmap and vmap(grad) run there and mean what a loop over
            the slices means.
        advice: what to do.
        needs: what to write, in short, where that is enough: "vmap_safe(model)",
            "randomness=", 'fallback="loop"', "also=" or "vmap_safe(model, ...)"; ""
            elsewhere.
        named: what to write in the last two: a class, or a module.
    """

    path: str
    module: str
    kind: Kind
    detail: str
    becomes: Mapping[ModeName, str]
    safe: Mapping[ModeName, bool]
    advice: str
    needs: str = ""
    named: str = ""


def one_line(error: Exception) -> str:
    """The class and the text of an error, cut to one line.

    >>> one_line(ValueError("two\\nlines"))
    'ValueError: two lines'
    """
    said = " ".join(str(error).split())
    return textwrap.shorten(f"{type(error).__name__}: {said}", 160, placeholder=" ...")
