"""Checksums of rows and batches, and that of two pieces from the checksum of each."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """The checksum of some bytes, and their number.

    Attributes:
        crc: of zlib, begun with 0.
        size: the number of bytes.
    """

    crc: int
    size: int


def sampled(leaves: Iterable[object]) -> Piece:
    """A checksum of a batch, which reads part of a large one."""
    crc = size = 0
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat = leaf.detach().reshape(-1)
            if flat.numel() >= _MANY:
                flat = flat[:: 1 + flat.numel() // _MANY]
            data = flat.cpu().contiguous().view(torch.uint8).numpy().data
            crc, size = zlib.crc32(data, crc), size + data.nbytes
    return Piece(crc, size)


def joined(before: int, piece: Piece) -> int:
    """The checksum of some bytes with a piece after them.

    >>> import zlib
    >>> from vmapsafe._data.checksums import Piece, joined
    >>> joined(zlib.crc32(b"some bytes"), Piece(zlib.crc32(b" and more"), 9))
    1279967567
    >>> zlib.crc32(b"some bytes and more")
    1279967567

    A CRC is a polynomial over two elements, modulo a fixed one. Each byte that comes
    after multiplies it by x ** 8. zlib has this as ``crc32_combine``, Python has not.
    """
    found = piece.crc
    for bit, shifted in _shifted(piece.size):
        if before & bit:
            found ^= shifted
    return found


_MANY = 2**16
# The fixed polynomial, and the polynomials 1 and x ** 8. The highest bit is that of
# x ** 0.
_MODULUS, _ONE, _BYTE = 0xEDB88320, 1 << 31, 1 << 23


@functools.lru_cache(maxsize=4096)  # batches have one size, but for the last
def _shifted(size: int) -> list[tuple[int, int]]:
    """Each bit, and what becomes of it when so many bytes come after it."""
    power, square = _ONE, _BYTE
    while size:
        if size & 1:
            power = _product(square, power)
        square = _product(square, square)
        size >>= 1
    return [(1 << i, _product(1 << i, power)) for i in range(32)]


def _product(a: int, b: int) -> int:
    found, bit = 0, _ONE
    while a:
        if a & bit:
            found ^= b
            a ^= bit
        b = (b >> 1) ^ (_MODULUS if b & 1 else 0)
        bit >>= 1
    return found
