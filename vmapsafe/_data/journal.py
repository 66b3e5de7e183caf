"""What one of several processes has finished: a file with a line for each batch.

The lines of a batch are written after its rows. A process that dies while it writes
leaves half a line, without an end, which is not counted.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vmapsafe._data.checksums import Piece


class Finished(NamedTuple):
    """A batch whose rows are written.

    Attributes:
        batch: its number.
        start: the number of rows before it.
        samples: how many it has.
        order: a checksum of what the loader gave up to this batch.
        data: a checksum of the batch.
        sums: a checksum of its rows in each file, in the order of the files.
    """

    batch: int
    start: int
    samples: int
    order: int
    data: Piece
    sums: array[int]  # there are many of these


class Journal:
    """A new file of finished batches, which nobody else writes.

    Args:
        path: of the file, which must not exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)
        self._place, self._waiting = 0, b""

    def add(self, kinds: Mapping[str, str], finished: Finished) -> None:
        """Note a batch, for the next flush.

        Args:
            kinds: of the rows in each file, by name; the first line has them.
            finished: the batch.
        """
        if not self._place and not self._waiting:
            self._waiting = _line(dict(kinds))
        self._waiting += _line({**finished._asdict(), "sums": [*finished.sums]})

    def flush(self) -> None:
        """Write what waits, and flush it to the disk."""
        if self._waiting:
            # A write that failed half-way is written over by the next one.
            self._file.seek(self._place)
            left = memoryview(self._waiting)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
            self._place, self._waiting = self._file.tell(), b""

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> tuple[dict[str, str], list[Finished]]:
    """What a process has noted.

    Args:
        path: of its file.

    Returns:
        The kinds of rows by name, and the batches.

    Raises:
        ValueError: a line cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # without half a line
        first, *others = [json.loads(line) for line in lines] or [{}]
        return dict(first), [_finished(**other) for other in others]
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _finished(data: list[int], sums: list[int], **numbers: int) -> Finished:
    # An array takes what a checksum can be, and nothing else.
    _ = array("Q", [*numbers.values(), *data])
    return Finished(data=Piece(*data), sums=array("I", sums), **numbers)
