"""From which sizes on a rule is faster: a table for each type of device.

The tables are in the files of the layers. On a CPU their numbers were measured, and
most follow from the size of its cache. On a GPU a call is fast if it launches few
kernels and makes few passes over memory; the numbers for "cuda" say just that where
nothing was measured yet.
"""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class Regimes(dict[str, T]):
    """A regime for each type of device. Types without one have that of "cuda".

    >>> Regimes(cpu=2**17, cuda=0)["xpu"]
    0
    """

    def __missing__(self, device: str) -> T:
        return self["cuda"]
