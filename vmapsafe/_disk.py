"""Results in a folder of ``.npy`` files that grow, and go on after an interruption.

The folder holds one file for each tensor, ``result.npy`` or ``0.weight.npy`` and so on,
and ``state.json``: what was asked, and how many batches and samples are finished. Rows
are appended; at a checkpoint they are flushed to the disk first, then each file's
header grows (numpy leaves room for that), then ``state.json`` is replaced in one step.
So whatever moment a process dies at, every file can be loaded (but for an empty one
before the first batch), and going on means cutting each to what ``state.json`` says.
One process may write to a folder at a time.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import quote

import torch
from torch import Tensor

from vmapsafe._errors import worded


class Folder:
    """Rows of some tensors, a batch after the other.

    Attributes:
        batches: that are finished.
        samples: that are finished.
        complete: whether nothing is to come; set by who knows.
    """

    def __init__(self, called: str, path: Path, asked: Mapping[str, Any]) -> None:
        """Nothing is written before the first batch.

        Raises:
            ValueError: the folder holds something else.
        """
        self._called, self._path = called, path
        self._files: dict[str, _Growing] = {}
        self._next = 0.0
        self._state: dict[str, Any] = {"asked": dict(asked), "data": None, "files": {}}
        self.batches, self.samples, self.complete = 0, 0, False
        if path.is_dir() and any([p.name != _NEW for p in path.iterdir()]):
            self._go_on()
        elif path.exists() and not path.is_dir():
            self._refuse("is no folder", "Give the path of a folder to make")
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
        if self._state["data"] is None:
            self._state["data"] = digest
        elif self._state["data"] != digest:
            self._refuse(
                "was begun with another first batch: other data, or another order",
                "Give the same loader, or another path",
            )

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """The rows of the next batch, (B, ...) each."""
        arrays = {name: _array(row) for name, row in rows.items()}
        files = {n: f"{a.dtype} {a.shape[1:]}" for n, a in arrays.items()}
        if not self._state["files"]:
            self._state["files"] = files
            self._path.mkdir(parents=True, exist_ok=True)
            self._write_state()  # so that what follows is known to be ours
        if self._state["files"] != files:
            self._refuse(
                f"holds {self._state['files']}, and now came {files}",
                "Ask for the same, or give another path",
            )
        if not self._files:
            self._open(arrays)
        for name, array in arrays.items():
            self._files[name].append(array)
        self.batches += 1
        self.samples += len(next(iter(arrays.values())))
        if time.monotonic() >= self._next:
            self._checkpoint()

    def arrays(self) -> dict[str, Any]:
        """What is finished, memory-mapped."""
        import numpy

        found = {}
        for name in self._state["files"]:
            file = self._path / _file_name(name)
            found[name] = numpy.load(file, mmap_mode="r" if self.samples else None)
        return found

    # -- Reading what is there ---------------------------------------------------------

    def _go_on(self) -> None:
        try:
            state = json.loads((self._path / _STATE).read_text())
            self.batches, self.samples = state["batches"], state["samples"]
            self.complete = state["complete"]
            asked = state["asked"]
        except FileNotFoundError:
            self._refuse(f"is not empty and holds no {_STATE}", "Give another path")
        except (ValueError, KeyError, TypeError):
            self._refuse(f"holds a {_STATE} that cannot be read", "Give another path")
        now = json.loads(json.dumps(self._state["asked"]))
        differing = [
            f"{key} was {asked.get(key)!r} and is {now.get(key)!r}"
            for key in sorted({*asked, *now})
            if asked.get(key) != now.get(key)
        ]
        if differing:
            self._refuse(
                f"was begun with something else: {'; '.join(differing)}",
                "Ask for the same, or give another path",
            )
        self._state = state

    def _open(self, arrays: Mapping[str, Any]) -> None:
        for name, array in arrays.items():
            file = _Growing(self._path / _file_name(name), array)
            self._files[name] = file
            if not file.cut(self.samples):
                self._refuse(
                    f"lacks rows of {_file_name(name)} that {_STATE} counts",
                    "Give another path",
                )

    def _refuse(self, found: str, do: str) -> None:
        raise ValueError(worded(self._called, f"{str(self._path)!r} {found}", do))

    # -- Writing -----------------------------------------------------------------------

    def _checkpoint(self) -> None:
        started = time.monotonic()
        for file in self._files.values():
            file.finish(self.samples)
        self._write_state()
        now = time.monotonic()
        self._next = now + max(_SECONDS, _TIMES * (now - started))

    def _write_state(self) -> None:
        state = {
            "batches": self.batches,
            "samples": self.samples,
            "complete": self.complete,
            **{key: self._state[key] for key in ("data", "files", "asked")},
        }
        beside = self._path / _NEW
        with open(beside, "w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path / _STATE)


_STATE, _NEW = "state.json", "state.json.new"
# Between checkpoints, in seconds and in times of what one took, whichever is more.
_SECONDS, _TIMES = 1.0, 10


class _Growing:
    """One file of rows, whose header says how many are finished."""

    def __init__(self, path: Path, like: Any) -> None:
        """Open or make it, for rows as those of ``like``."""
        self._dtype, self._shape = like.dtype, like.shape[1:]
        self._file: BinaryIO = open(path, "r+b" if path.exists() else "w+b")

    def cut(self, rows: int) -> bool:
        """Leave that many rows, if there are."""
        header = self._header(rows)
        size = len(header) + rows * self._dtype.itemsize * math.prod(self._shape)
        if rows and self._file.seek(0, os.SEEK_END) < size:
            return False
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        self._file.truncate(size)
        self._file.seek(size)
        return True

    def append(self, rows: Any) -> None:
        self._file.write(rows.tobytes())

    def finish(self, rows: int) -> None:
        """Onto the disk, and then say that they are there."""
        self._flush()
        self._file.seek(0)
        self._file.write(self._header(rows))
        self._flush()
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()

    def _header(self, rows: int) -> bytes:
        """Of the same length for any number of rows."""
        from numpy.lib import format

        written = io.BytesIO()
        header = {
            "descr": format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (rows, *self._shape),
        }
        format.write_array_header_1_0(written, header)
        return written.getvalue()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _array(rows: Tensor) -> Any:
    """For numpy, which has no bfloat16."""
    rows = rows.detach()
    if rows.dtype == torch.bfloat16:
        rows = rows.float()
    return rows.cpu().contiguous().numpy()


def _file_name(name: str) -> str:
    """Names of modules may hold slashes."""
    return f"{quote(name, safe='')}.npy"
