"""One ``.npy`` file of rows, whose header says how many of them are finished.

Several processes may write to one file at once, each its own rows: no process writes
what lies between, and none cuts the file.
"""

from __future__ import annotations

import ast
import io
import math
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"


class Growing:
    """One file of rows.

    Args:
        path: of the file, which is created if missing.
        dtype: of the rows.
        shape: of one row.
        rows: how many are finished.
    """

    def __init__(
        self, path: Path, dtype: numpy.dtype[Any], shape: tuple[int, ...], rows: int
    ) -> None:
        self._dtype, self._shape = dtype, shape
        # Without a buffer: each write goes where it belongs at once. Created by the
        # same call, which never empties a file that another process has just created.
        self._file = open(path, "r+b", buffering=0, opener=_created)
        header = self._header(rows)
        self._begin = len(header)  # the same for any number of rows
        self._size: int = dtype.itemsize * math.prod(shape)
        self._write(0, header)

    def write(self, rows: bytes, after: int) -> None:
        """Write rows after that many others."""
        self._write(self._begin + after * self._size, rows)

    def flush(self) -> None:
        """Flush what was written to the disk."""
        os.fsync(self._file.fileno())

    def say(self, rows: int) -> None:
        """Say in the header that so many rows are there."""
        self._write(0, self._header(rows))
        os.fsync(self._file.fileno())

    def cut(self, rows: int) -> None:
        """Cut off what comes after so many rows."""
        self._file.truncate(self._begin + rows * self._size)

    def close(self) -> None:
        self._file.close()

    def _write(self, place: int, data: bytes) -> None:
        self._file.seek(place)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def _header(self, rows: int) -> bytes:
        from numpy.lib import format

        written = io.BytesIO()
        header = {
            "descr": format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (rows, *self._shape),
        }
        format.write_array_header_1_0(written, header)
        return written.getvalue()


class Written:
    """A file of rows, open to be read.

    Args:
        file: that was opened to read bytes.

    Attributes:
        dtype: of the rows.
        shape: of one row.
        rows: how many there are, as the header says.

    Raises:
        ValueError: the header is not one of ours.
    """

    def __init__(self, file: BinaryIO) -> None:
        from numpy.lib import format

        if format.read_magic(file) != (1, 0):
            raise ValueError("another version of the format")
        shape, fortran_order, self.dtype = format.read_array_header_1_0(file)
        if fortran_order or not shape:
            raise ValueError("not an array of rows")
        self.rows, self.shape = shape[0], shape[1:]
        self._file, self._begin = file, file.tell()

    @property
    def kind(self) -> str:
        """The dtype and the shape of a row in words."""
        return kind_of(self.dtype, self.shape)

    def crc(self, start: int, rows: int) -> int | None:
        """The checksum of some rows.

        Args:
            start: the number of rows before.
            rows: their number.

        Returns:
            It, or None if the file ends before.
        """
        one = self.dtype.itemsize * math.prod(self.shape)
        self._file.seek(self._begin + start * one)
        found, left = 0, rows * one
        while left:
            piece = self._file.read(min(left, 2**24))
            if not piece:
                return None
            found = zlib.crc32(piece, found)
            left -= len(piece)
        return found


def kind_of(dtype: numpy.dtype[Any], row: tuple[int, ...]) -> str:
    """A dtype and the shape of a row in words."""
    return f"{dtype} {tuple(row)}"


def size_of_row(kind: str) -> int:
    """The bytes of a row of a kind.

    >>> from vmapsafe._data.npy import size_of_row
    >>> size_of_row("float32 (3, 4)")
    48
    """
    import numpy

    dtype, _, shape = kind.partition(" ")
    size: int = numpy.dtype(dtype).itemsize * math.prod(ast.literal_eval(shape))
    return size


def array_of(rows: Tensor) -> Array:
    """The rows in numpy, which has no bfloat16."""
    rows = rows.detach()
    if rows.dtype == torch.bfloat16:
        rows = rows.float()
    return rows.cpu().contiguous().numpy()


def _created(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)
