"""Results in a folder of ``.npy`` files that grow, and that a later run continues.

The folder holds one file for each tensor, ``result.npy`` or ``0.weight.npy`` and so on,
and ``state.json``: what was asked, how many batches and samples are finished, and a
checksum of their rows. New rows are written after those that are counted. A checkpoint
first flushes them to the disk, then lets each file's header grow (numpy leaves room for
that), and then replaces ``state.json`` in one step. So every file can be loaded at
whatever moment a process dies, except for an empty one before the first batch. A later
run reads the rows that are counted, never writes them again, and writes the others.

Several processes of one run write to the same files, each the rows of its own batches
at their places. None touches ``state.json`` or lets a header grow: each notes in a
journal of its own which batches are finished. When all are, one process checks that no
batch is missing, counts them in ``state.json``, and removes the journals. So a complete
folder does not show how many processes it is from. Before that, a later run with any
number of processes reads ``state.json`` and all journals. Only one run may write to a
folder at a time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, NoReturn
from urllib.parse import quote

from torch import Tensor

from vmapsafe._data.checksums import Piece, joined
from vmapsafe._data.journal import Finished, Journal, read_journal
from vmapsafe._data.npy import (
    Array,
    Growing,
    Written,
    array_of,
    kind_of,
    size_of_row,
)
from vmapsafe._errors import VmapSafeValueError, worded
from vmapsafe._processes import Process


class Done(NamedTuple):
    """What is finished without a gap: one object, so that no interrupt comes between
    its parts.

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

    def followed_by(self, batch: Finished, sizes: Mapping[str, int]) -> Done:
        """The same and the next batch.

        Args:
            batch: the next one.
            sizes: the bytes of a row in each file, by name.

        Returns:
            What is finished then.
        """
        sums = {
            name: joined(self.sums.get(name, 0), Piece(crc, batch.samples * size))
            for (name, size), crc in zip(sizes.items(), batch.sums)
        }
        samples = self.samples + batch.samples
        return Done(self.batches + 1, samples, sums, joined(self.data, batch.data))


class Folder:
    """Rows of some tensors, batch by batch; writes nothing before the first one.

    Args:
        called: the public function, for errors.
        path: of the folder.
        asked: what the results answer, to be compared with what the folder answers.
        process: this one of several, which checks its share of what is there.

    Attributes:
        done: what is finished without a gap.
        ahead: what several processes have finished after that, by batch.
        complete: whether no batch is missing.

    Raises:
        VmapSafeValueError: the folder holds something else, or damaged files.
    """

    def __init__(
        self,
        called: str,
        path: Path,
        asked: Mapping[str, str | int | None],
        process: Process = Process(),
    ) -> None:
        self._called, self._path, self._process = called, path, process
        self._files: dict[str, Growing] = {}
        self._journal: Journal | None = None
        self._next, self._unsaved = 0.0, False
        self._state: dict[str, Any] = {"asked": dict(asked), "first": None, "files": {}}
        self.done, self.complete = Done(0, 0, {}, 0), False
        self.ahead: dict[int, Finished] = {}
        if path.is_dir() and any([p.name != _NEW for p in path.iterdir()]):
            self._continue()
        elif path.exists() and not path.is_dir():
            self.refuse(
                "is not a folder",
                "Pass the path of a folder; it is created if missing",
            )

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Count what was written, and close the files."""
        try:
            if self._unsaved:
                self._checkpoint()
        finally:
            files, self._files = self._files, {}
            for file in files.values():
                file.close()
            journal, self._journal = self._journal, None
            if journal is not None:
                journal.close()

    def has(self, batch: int) -> bool:
        """Whether the rows of a batch are there."""
        return batch < self.done.batches or batch in self.ahead

    @property
    def batches(self) -> int:
        """The number of finished batches."""
        return self.done.batches + len(self.ahead)

    def check_data(self, digest: str | None) -> None:
        """Raise unless the first batch, if there is one, is what it was."""
        if self._state["first"] is None:
            self._state["first"] = digest
        elif self._state["first"] != digest:
            at = self._process
            self.refuse(
                "was begun with another first batch: other data, or another order",
                (
                    "Give the same loader, or another path"
                    if at.world == 1
                    else f"Give each of the {at.world} processes the loader of the "
                    "whole data set, not shuffled: save deals the batches"
                ),
            )

    def append(
        self,
        batch: int,
        start: int,
        order: int,
        rows: Mapping[str, Tensor],
        data: Piece,
    ) -> None:
        """Write the rows of a batch.

        Args:
            batch: its number.
            start: the number of rows before it.
            order: a checksum of what the loader gave up to this batch.
            rows: (B, ...) each, by name.
            data: the checksum of the batch.
        """
        arrays = {name: array_of(row) for name, row in rows.items()}
        files = {n: kind_of(a.dtype, a.shape[1:]) for n, a in arrays.items()}
        with self._disk():
            if not self._state["files"]:
                self._state["files"] = files
                if self._journal is None:
                    self._path.mkdir(parents=True, exist_ok=True)
                    self._write_state()  # so that the folder is known to be ours
            if self._state["files"] != files:
                self.refuse(
                    f"holds {self._state['files']}, and now came {files}",
                    "Ask for the same, or give another path",
                )
            if not self._files:
                for name, a in arrays.items():
                    self._files[name] = Growing(
                        self._file(name), a.dtype, a.shape[1:], self.done.samples
                    )
            sums = array("I")
            for name in self._state["files"]:  # another batch may have another order
                written = arrays[name].tobytes()
                self._files[name].write(written, start)
                sums.append(zlib.crc32(written))
            samples = len(next(iter(arrays.values())))
            self._unsaved = True
            finished = Finished(batch, start, samples, order, data, sums)
            if self._journal is not None:
                self._journal.add(self._state["files"], finished)
            else:
                self.ahead[batch] = finished
                self._count(batch)
            if time.monotonic() >= self._next:
                self._checkpoint()

    def count(self, total: int) -> None:
        """Raise unless the rows of all batches are there.

        Args:
            total: the number of batches.
        """
        self._count(total)
        if self.ahead or self.done.batches != total:
            self.refuse(
                f"has {self.batches} of {total} batches, and batch "
                f"{self.done.batches} is missing",
                "Give all processes the same loader, and call save again",
            )

    def finish(self) -> None:
        """Let the folder be complete."""
        before, self.complete = self.complete, True
        with self._disk():
            if not before:
                self._open_all()
                for file in self._files.values():
                    file.cut(self.done.samples)
                self._checkpoint()
            for path in self._journals():
                path.unlink()

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

    # -- Several processes -------------------------------------------------------------

    def join(self, run: str) -> None:
        """Begin to write together with others, of which process 0 comes first.

        Args:
            run: a name that no other run has.
        """
        with self._disk():
            if self._process.rank == 0:
                self._path.mkdir(parents=True, exist_ok=True)
                if not (self._path / _STATE).exists():
                    self._write_state()
            elif not (self._path / _journal_name(run, 0)).exists():
                self.refuse(
                    f"is not the folder that process 0 sees; this is process "
                    f"{self._process.rank} of {self._process.world}",
                    "Give all processes the same path, on a disk that they share",
                )
            self._journal = Journal(self._path / _journal_name(run, self._process.rank))

    def collect(self, run: str) -> None:
        """Read what all processes of a run have finished, and check a share of it."""
        known = {*self.ahead}
        for rank in range(self._process.world):
            self._read_journal(self._path / _journal_name(run, rank))
        self._check_rows([b for b in sorted(self.ahead) if b not in known], [])

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
        if not self.complete:
            for path in self._journals():
                self._read_journal(path)
        # Files need not be there before the first batch.
        names = [*state["files"]] if self.done.batches else []
        self._check_rows(sorted(self.ahead), names)

    def _read_journal(self, path: Path) -> None:
        try:
            kinds, finished = read_journal(path)
            if any([len(one.sums) != len(kinds) for one in finished]):
                raise ValueError("not a checksum for each file")
        except (ValueError, FileNotFoundError):
            self.refuse(f"holds a {path.name} that cannot be read", "Give another path")
        if not finished:
            return
        files = self._state["files"] = self._state["files"] or kinds
        if kinds != files:
            self.refuse(
                f"holds {files}, and {path.name} counts {kinds}", "Give another path"
            )
        places = [[*kinds].index(name) for name in files]
        for one in finished:
            if one.batch >= self.done.batches:
                sums = array("I", [one.sums[place] for place in places])
                self.ahead[one.batch] = one._replace(sums=sums)

    def _check_rows(self, batches: Sequence[int], names: Sequence[str]) -> None:
        """Raise unless the rows are there that are counted: a share of them.

        Args:
            batches: of those ahead.
            names: of files, whose rows without a gap are checked.
        """
        rank, world = self._process
        mine = batches[rank::world]
        for i, name in enumerate(self._state["files"]):
            whole = name in names and i % world == rank
            if (whole or mine) and not self._holds_rows(name, i, mine, whole):
                by = _STATE if whole else "a journal"
                self.refuse(
                    f"lacks rows of {_file_name(name)} that {by} counts, or they have "
                    "changed",
                    "Give another path",
                )

    def _holds_rows(
        self, name: str, place: int, batches: Sequence[int], whole: bool
    ) -> bool:
        """Whether the file of a tensor holds the rows that are counted."""
        samples = self.done.samples
        try:
            with open(self._file(name), "rb") as opened:
                file = Written(opened)
                if file.kind != self._state["files"][name] or file.rows < samples:
                    return False
                if self.complete and file.rows != samples:
                    return False
                if whole and file.crc(0, samples) != self.done.sums[name]:
                    return False
                for one in [self.ahead[batch] for batch in batches]:
                    if file.crc(one.start, one.samples) != one.sums[place]:
                        return False
                return True
        except (FileNotFoundError, ValueError):  # numpy's, for headers
            return False

    def _journals(self) -> list[Path]:
        return sorted(self._path.glob(_journal_name("*", "*")))

    def _file(self, name: str) -> Path:
        return self._path / _file_name(name)

    # -- Writing -----------------------------------------------------------------------

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        return {n: size_of_row(kind) for n, kind in self._state["files"].items()}

    def _count(self, last: int) -> None:
        """Count batches ahead that come next, up to that one.

        Those after it have not been compared with what the loader gives.
        """
        while (batch := self.ahead.get(self.done.batches)) is not None:
            if batch.batch > last:
                break
            if batch.start != self.done.samples:
                self.refuse(
                    f"has batch {batch.batch} after {batch.start} samples, and there "
                    f"are {self.done.samples} before it",
                    "Give another path",
                )
            self.done = self.done.followed_by(batch, self._sizes)
            del self.ahead[batch.batch]

    def _open_all(self) -> None:
        for name in self._state["files"]:
            if name not in self._files:
                with open(self._file(name), "rb") as opened:
                    file = Written(opened)
                self._files[name] = Growing(
                    self._file(name), file.dtype, file.shape, self.done.samples
                )

    def _checkpoint(self) -> None:
        started = time.monotonic()
        with self._disk():
            for file in self._files.values():
                file.flush()
            if self._journal is not None:
                self._journal.flush()
            else:
                for file in self._files.values():
                    file.say(self.done.samples)
                self._write_state()
        self._unsaved = False
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

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Say, where a disk fails, what that means for the run."""
        try:
            yield
        except OSError as error:
            note = worded(
                self._called,
                f"{str(self._path)!r} cannot be written, and what is finished stays "
                "there",
                "Call save again when there is room: it continues",
            )
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise


_STATE, _NEW = "state.json", "state.json.new"
# The time between checkpoints, in seconds and as a multiple of the time that the last
# one took, whichever is more.
_SECONDS, _TIMES = 1.0, 10


def _file_name(name: str) -> str:
    """A name for the file of a tensor, whose own name may hold slashes."""
    return f"{quote(name, safe='')}.npy"


def _journal_name(run: str, rank: object) -> str:
    return f"finished-{run}-{rank}.jsonl"
