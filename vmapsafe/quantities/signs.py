"""Matrices of random signs or normal numbers, from a hash computed on the device.

Each number is a function of a key, its line and its column. Integer operations of torch
compute it. So any lines can be drawn alone, the signs are the same bits on every device
and in every version of torch, and nothing is copied from the host.

Words of 64 bits are hashed from a counter, as by SplitMix64 (Steele, Lea and Flood,
https://doi.org/10.1145/2660193.2660195). The shifts are by 32 bits here: then one
operation on halves of words does the work of three. A table gives the numbers of a few
bits of a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vmapsafe._torch import constant_while_compiling

Numbers = Literal["signs", "normal"]


def key_of(seed: int, name: str, part: int = 0) -> int:
    """The key of a parameter's matrix; other values of ``part`` give others."""
    # int makes a constant of a seed that torch.compile takes for a variable.
    return _key(f"{int(seed)} {name}", part)


@constant_while_compiling
def _key(text: str, part: int) -> int:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[8 * part : 8 * part + 8], "little")


class Lines(NamedTuple):
    """The lines from ``start`` to ``stop`` of the matrix of a key."""

    key: int
    start: int
    stop: int


class Drawer:
    """Draws lines of matrices with ``k`` columns, of mean 0 and variance 1.

    >>> import torch
    >>> from vmapsafe.quantities.signs import Drawer, Lines, key_of
    >>> drawer, key = Drawer("signs", 3), key_of(0, "weight")
    >>> cpu = torch.device("cpu")
    >>> drawer.draw([Lines(key, 0, 2)], torch.float32, cpu)
    tensor([[ 1., -1.,  1.],
            [ 1.,  1., -1.]])
    >>> drawer.draw([Lines(key, 1, 2)], torch.float32, cpu)
    tensor([[ 1.,  1., -1.]])

    Args:
        numbers: "signs", or "normal" for 65,536 equally likely numbers.
        k: how many columns.
    """

    def __init__(self, numbers: Numbers, k: int) -> None:
        self._numbers, self._k = numbers, k
        self._memory: dict[str, Tensor] = {}
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def draw(
        self,
        wanted: Sequence[Lines],
        dtype: torch.dtype,
        device: torch.device,
        reuse: bool = False,
    ) -> Tensor:
        """(all lines, k): the lines, one after another.

        Args:
            wanted: which lines.
            dtype: a floating one.
            device: where to draw.
            reuse: whether the next draw may write over what this one returns.

        Returns:
            The lines.
        """
        bits, at_once = _UNITS[self._numbers]
        count = sum([part.stop - part.start for part in wanted])
        needed = -(-self._k // at_once)
        each = -(-needed * bits.itemsize // 8)
        words = self._words(wanted, each, device, reuse)
        places = words.view(bits).view(count, each * 8 // bits.itemsize)[:, :needed]
        table = self._table(dtype, device)
        if reuse:
            index = self._of("index", places.numel(), torch.int32, device)
            index.view(places.shape).copy_(places)
            found = self._of("found", at_once * len(index), dtype, device)
            found = found.view(len(index), *table.shape[1:])
            torch.index_select(table, 0, index, out=found)
        else:
            found = table.index_select(0, places.int().flatten())
        return found.view(count, at_once * needed)[:, : self._k]

    def _table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The numbers by the bits that stand for them, (256, 8) or (65,536)."""
        if (dtype, device) in self._tables:
            return self._tables[dtype, device]
        if self._numbers == "signs":
            byte = torch.arange(256, device=device).unsqueeze(1)
            table = 1 - 2 * (byte >> torch.arange(8, device=device) & 1)
        else:
            odd = torch.arange(1 - 2**16, 2**16, 2, device=device)
            table = torch.erfinv(odd.double() / 2**16)
            table = table / table.square().mean().sqrt()
        self._tables[dtype, device] = table.to(dtype)
        return self._tables[dtype, device]

    def _words(
        self, wanted: Sequence[Lines], each: int, device: torch.device, reuse: bool
    ) -> Tensor:
        """(words): the hash of the lines' counters, ``each`` words for a line."""
        counts = [each * (part.stop - part.start) for part in wanted]
        most = max(counts)
        steps = (
            torch.arange(most, out=self._of("words", most, torch.int64, device))
            if reuse
            else torch.arange(most, dtype=torch.int64, device=device)
        )
        steps.mul_(_signed(_GAMMA))
        first = [_signed(part.key + _GAMMA * each * part.start) for part in wanted]
        if len(first) == 1:
            words = steps.add_(first[0])
        else:
            words = torch.cat([steps[:n] + key for n, key in zip(counts, first)])
        _fold(words)
        for factor in _FACTORS:
            _fold(words.mul_(_signed(factor)))
        return words

    def _of(
        self, name: str, count: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """(count): memory to write."""
        known = self._memory.get(name)
        fits = known is not None and (known.dtype, known.device) == (dtype, device)
        if known is None or not fits or len(known) < count:
            known = torch.empty(count, dtype=dtype, device=device)
            self._memory[name] = known
        return known[:count]


def _fold(words: Tensor) -> None:
    """``words ^= words >> 32``, in place; the low half of a word comes first."""
    halves = words.view(torch.int32).view(-1, 2)
    halves[:, 0].bitwise_xor_(halves[:, 1])


def _signed(word: int) -> int:
    """Its lowest 64 bits, as torch holds them."""
    return (word + 2**63) % 2**64 - 2**63


# By the kind of numbers: the bits that stand in the table, and how many numbers they
# give.
_UNITS = {"signs": (torch.uint8, 8), "normal": (torch.uint16, 1)}
# SplitMix64's.
_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
