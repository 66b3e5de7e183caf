"""Results in a folder of ``.npy`` files that grow, and that a later run continues.

The folder holds one file for each tensor, ``result.npy`` or ``0.weight.npy`` and so on,
and ``state.json``: what was asked, how many batches and samples are finished, and a
checksum of their rows. New rows are written after those that are counted. A checkpoint
first flushes them to the disk, then lets each file's header grow (numpy leaves room for
that), and then replaces ``state.json`` in one step. So every file can be loaded at
whatever moment a process dies, except for an empty one before the first batch. A later
run reads the rows that ``state.json`` counts, never writes them again, and writes on
after them. Only one process may write to a folder at a time.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Literal,
    NamedTuple,
    NoReturn,
    TypeAlias,
)
from urllib.parse import quote

import torch
from torch import Tensor

from vmapsafe._errors import VmapSafeValueError

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"


class Done(NamedTuple):
    """What is finished: one object, so that no interrupt comes between its parts.

    Attributes:
        batches: their number.
        samples: the number of samples in them.
        sums: a checksum of the rows of each file, by name.
        data: a checksum of the batches.
    """

    batches: int
    samples: int
    sums: Mapping[str, int]
    data: int


class Folder:
    """Rows of some tensors, batch after batch; writes nothing before the first one.

    Args:
        called: the public function, for errors.
        path: of the folder.
        asked: what the results answer, to be compared with what the folder answers.

    Attributes:
        done: what is finished.
        complete: whether no batch is missing; the caller sets it.

    Raises:
        VmapSafeValueError: the folder holds something else, or damaged files.
    """

    def __init__(
        self, called: str, path: Path, asked: Mapping[str, str | int | None]
    ) -> None:
        self._called, self._path = called, path
        self._files: dict[str, _Growing] = {}
        self._next = 0.0
        self._state: dict[str, Any] = {"asked": dict(asked), "first": None, "files": {}}
        self.done, self.complete = Done(0, 0, {}, 0), False
        if path.is_dir() and any([p.name != _NEW for p in path.iterdir()]):
            self._continue()
        elif path.exists() and not path.is_dir():
            self.refuse(
                "is not a folder",
                "Pass the path of a folder; it is created if missing",
            )
        self._was_complete = self.complete

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._files or (self.complete and not self._was_complete):
                self._checkpoint()
        finally:
            for file in self._files.values():
                file.close()

    def check_data(self, digest: str) -> None:
        """Raise unless the first batch is what it was."""
        if self._state["first"] is None:
            self._state["first"] = digest
        elif self._state["first"] != digest:
            self.refuse(
                "was begun with another first batch: other data, or another order",
                "Give the same loader, or another path",
            )

    def append(self, rows: Mapping[str, Tensor], data: int) -> None:
        """Write the rows of the next batch.

        Args:
            rows: (B, ...) each, by name.
            data: the checksum of all batches up to this one.
        """
        arrays = {name: _array(row) for name, row in rows.items()}
        files = {n: _kind(a.dtype, a.shape) for n, a in arrays.items()}
        if not self._state["files"]:
            self._state["files"] = files
            self._path.mkdir(parents=True, exist_ok=True)
            self._write_state()  # so that the folder is known to be ours
        if self._state["files"] != files:
            self.refuse(
                f"holds {self._state['files']}, and now came {files}",
                "Ask for the same, or give another path",
            )
        done = self.done
        if not self._files:
            for name, array in arrays.items():
                self._files[name] = _Growing(self._file(name), array, done.samples)
        sums = {}
        for name, array in arrays.items():
            written = array.tobytes()
            self._files[name].write(written, done.samples)
            sums[name] = zlib.crc32(written, done.sums.get(name, 0))
        samples = done.samples + len(next(iter(arrays.values())))
        self.done = Done(done.batches + 1, samples, sums, data)
        if time.monotonic() >= self._next:
            self._checkpoint()

    def arrays(self) -> dict[str, Array]:
        """The finished rows by name, memory-mapped if there are any."""
        import numpy

        found, samples = {}, self.done.samples
        for name in self._state["files"]:
            mode: Literal["r"] | None = "r" if samples else None
            found[name] = numpy.load(self._file(name), mmap_mode=mode)[:samples]
        return found

    def refuse(self, found: str, do: str) -> NoReturn:
        """Raise a VmapSafeValueError about the folder."""
        raise VmapSafeValueError(self._called, f"{str(self._path)!r} {found}", do)

    # -- Reading what is there ---------------------------------------------------------

    def _continue(self) -> None:
        try:
            state = json.loads((self._path / _STATE).read_text())
            self.done = Done(*[state[name] for name in Done._fields])
            self.complete = bool(state["complete"])
            asked = {**state["asked"]}
            if not self.done.batches <= self.done.samples >= 0 <= self.done.batches:
                raise ValueError
            if {*self.done.sums} != {*state["files"]} and self.done.batches:
                raise ValueError
        except FileNotFoundError:
            self.refuse(f"is not empty and holds no {_STATE}", "Give another path")
        except (ValueError, KeyError, TypeError, AttributeError):
            self.refuse(f"holds a {_STATE} that cannot be read", "Give another path")
        now = json.loads(json.dumps(self._state["asked"]))
        differing = [
            f"{key} was {asked.get(key)!r} and is {now.get(key)!r}"
            for key in sorted({*asked, *now})
            if asked.get(key) != now.get(key)
        ]
        if differing:
            self.refuse(
                f"was begun with something else: {'; '.join(differing)}",
                "Ask for the same, or give another path",
            )
        self._state = state
        if self.done.batches:  # else files need not be there
            for name in state["files"]:
                if not self._holds_rows(name):
                    self.refuse(
                        f"lacks rows of {_file_name(name)} that {_STATE} counts, or "
                        "they have changed",
                        "Give another path",
                    )

    def _holds_rows(self, name: str) -> bool:
        """Whether the file of a tensor holds the rows that are counted."""
        samples = self.done.samples
        try:
            with open(self._file(name), "rb") as file:
                kind, rows, size = _read_header(file)
                if kind != self._state["files"][name] or rows < samples:
                    return False
                if self.complete and rows != samples:
                    return False
                return _sum_of_rows(file, samples * size) == self.done.sums[name]
        except (FileNotFoundError, ValueError):  # numpy's, for headers
            return False

    def _file(self, name: str) -> Path:
        return self._path / _file_name(name)

    # -- Writing -----------------------------------------------------------------------

    def _checkpoint(self) -> None:
        started = time.monotonic()
        for file in self._files.values():
            file.finish(self.done.samples)
        self._write_state()
        now = time.monotonic()
        self._next = now + max(_SECONDS, _TIMES * (now - started))

    def _write_state(self) -> None:
        state = {
            **self.done._asdict(),
            "complete": self.complete,
            **{key: self._state[key] for key in ("first", "files", "asked")},
        }
        beside = self._path / _NEW
        with open(beside, "w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path / _STATE)


_STATE, _NEW = "state.json", "state.json.new"
# The time between checkpoints, in seconds and as a multiple of the time that the last
# one took, whichever is more.
_SECONDS, _TIMES = 1.0, 10


class _Growing:
    """One file of rows, whose header says how many are finished."""

    def __init__(self, path: Path, like: Array, rows: int) -> None:
        """Open or make a file that has ``rows`` rows, for more like those of ``like``.

        Rows after these, of a run that died, are cut off.
        """
        self._dtype, self._shape = like.dtype, like.shape[1:]
        # Without a buffer: each write goes where it belongs at once.
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)
        self._write(0, self._header(rows))
        self._file.truncate(self._place(rows))

    def write(self, rows: bytes, after: int) -> None:
        """Write rows after that many others."""
        self._write(self._place(after), rows)

    def finish(self, rows: int) -> None:
        """Flush so many rows to the disk, then say that they are there."""
        os.fsync(self._file.fileno())
        self._write(0, self._header(rows))
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, place: int, data: bytes) -> None:
        self._file.seek(place)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def _place(self, row: int) -> int:
        size: int = self._dtype.itemsize * math.prod(self._shape)
        return len(self._header(row)) + row * size

    def _header(self, rows: int) -> bytes:
        """A header of the same length for any number of rows."""
        from numpy.lib import format

        written = io.BytesIO()
        header = {
            "descr": format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (rows, *self._shape),
        }
        format.write_array_header_1_0(written, header)
        return written.getvalue()


def _read_header(file: BinaryIO) -> tuple[str, int, int]:
    """(kind of rows, how many, bytes of one); the file stands at the rows then.

    A header that is not ours raises a plain ValueError, as numpy's functions do.
    """
    from numpy.lib import format

    if format.read_magic(file) != (1, 0):
        raise ValueError
    shape, fortran_order, dtype = format.read_array_header_1_0(file)
    if fortran_order or not shape:
        raise ValueError
    return _kind(dtype, shape), shape[0], dtype.itemsize * math.prod(shape[1:])


def _kind(dtype: numpy.dtype[Any], shape: tuple[int, ...]) -> str:
    return f"{dtype} {tuple(shape[1:])}"


def _sum_of_rows(file: BinaryIO, size: int) -> int | None:
    """The checksum of the next ``size`` bytes; None if there are fewer."""
    found = 0
    while size:
        piece = file.read(min(size, 2**24))
        if not piece:
            return None
        found = zlib.crc32(piece, found)
        size -= len(piece)
    return found


def _array(rows: Tensor) -> Array:
    """The rows in numpy, which has no bfloat16."""
    rows = rows.detach()
    if rows.dtype == torch.bfloat16:
        rows = rows.float()
    return rows.cpu().contiguous().numpy()


def _file_name(name: str) -> str:
    """A name for the file of a tensor, whose own name may hold slashes."""
    return f"{quote(name, safe='')}.npy"
