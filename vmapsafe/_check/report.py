"""What ``check`` returns: findings for programs, a table for people."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, overload

from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import ModeName, check_mode

Kind = Literal[
    "mixes samples", "writes buffers", "random", "unsupported", "slow fallback"
]


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
    """

    path: str
    module: str
    kind: Kind
    detail: str
    becomes: Mapping[ModeName, str]
    safe: Mapping[ModeName, bool]
    advice: str


class Report(Sequence[Finding]):
    """The findings of one model, in the order of its modules; prints as a table.

    Args:
        model: the name of the model's class.
        modes: the modes that were looked at.
        findings: the items of the report; the other arguments are attributes, too.
        tried: whether the model was run on an example.
        notes: sentences about what was not looked at.
    """

    def __init__(
        self,
        model: str,
        modes: Iterable[ModeName],
        findings: Iterable[Finding],
        *,
        tried: bool,
        notes: Iterable[str] = (),
    ) -> None:
        self.model = model
        self.modes = tuple(modes)
        self.tried = tried
        self.notes = tuple(notes)
        self._findings = tuple(findings)

    def safe(self, mode: ModeName) -> bool:
        """Whether nothing unsafe was found in a mode.

        Args:
            mode: one of the modes that were looked at.

        Returns:
            True if each finding is safe in that mode.

        Raises:
            VmapSafeValueError: an unknown mode, or one that was not looked at.
        """
        check_mode("report.safe(...)", mode)
        if mode not in self.modes:
            raise VmapSafeValueError(
                f"report.safe({mode!r})",
                f"the report is about {_listed(self.modes)} only",
                f"Write check(model, x, mode={mode!r})",
            )
        return all(finding.safe[mode] for finding in self._findings)

    @overload
    def __getitem__(self, index: int) -> Finding: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...

    def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
        return self._findings[index]

    def __len__(self) -> int:
        return len(self._findings)

    def __repr__(self) -> str:
        return f"<Report of {self.model}: {_counted(len(self), 'finding')}>"

    def __str__(self) -> str:
        blocks = ["\n".join(textwrap.wrap(self._verdict(), _WIDTH))]
        if self._findings:
            blocks.append(_table(self._findings))
        blocks += ["\n".join(textwrap.wrap(f"Note: {n}", _WIDTH)) for n in self.notes]
        return "\n\n".join(blocks)

    def _verdict(self) -> str:
        if not self._findings and not self.tried:
            return f"check({self.model}): nothing to report about its layers."
        if not self._findings:
            return (
                f"check({self.model}): nothing to report; no layer mixes samples, "
                "writes buffers or draws random numbers, and the example ran under "
                "vmap and vmap(grad)."
            )
        safe = [mode for mode in self.modes if self.safe(mode)]
        unsafe = [mode for mode in self.modes if mode not in safe]
        verdicts = [f"safe in {_listed(safe)}"] if safe else []
        verdicts += [f"UNSAFE in {_listed(unsafe)}"] if unsafe else []
        return (
            f"check({self.model}): {_counted(len(self), 'finding')}; "
            f"{', '.join(verdicts)}."
        )


def one_line(error: Exception) -> str:
    """The class and the text of an error, cut to one line.

    >>> one_line(ValueError("two\\nlines"))
    'ValueError: two lines'
    """
    said = " ".join(str(error).split())
    return textwrap.shorten(f"{type(error).__name__}: {said}", 160, placeholder=" ...")


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Stop printing without an error when the reader of a pipe leaves (``| head``)."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # At exit, Python still writes what is in its buffer.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


# -- The table -------------------------------------------------------------------------

_WIDTH = 100
_HEADS = ("path", "class", "under vmap", "in vmap_safe", "what to do")
_PATHS = 8  # in a row; the others are counted


def _table(findings: Sequence[Finding]) -> str:
    """The table; layers with identical findings share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for finding in findings:
        rows.setdefault(_said(finding), []).append(finding.path or "(the model)")
    cells: list[tuple[str, ...]] = []
    above: tuple[str, list[str]] | None = None
    for said, paths in rows.items():
        if above == (said[0], paths):
            cells.append(("(as above)", "", *said[1:]))
            continue
        above = (said[0], paths)
        more = len(paths) - _PATHS
        shown = paths if more <= 1 else [*paths[:_PATHS], f"and {more} more"]
        cells.append(("\n".join(shown), *said))

    widths = _widths(cells)
    lines = _row(_HEADS, widths)
    lines.append("  ".join("-" * width for width in widths))
    for i, row in enumerate(cells):
        lines += [""] if i else []
        lines += _row(row, widths)
    return "\n".join(lines)


def _said(finding: Finding) -> tuple[str, ...]:
    """The cells of a finding after its path."""
    modes: dict[str, list[str]] = {}
    for mode, becomes in finding.becomes.items():
        text = becomes if finding.safe[mode] else f"UNSAFE, {becomes}"
        modes.setdefault(text, []).append(mode)
    if len(modes) == 1 and len(finding.becomes) > 1:
        (text,) = modes
        in_modes = f"every mode: {text}"
    else:
        in_modes = "\n".join(f"{', '.join(m)}: {text}" for text, m in modes.items())
    under_vmap = f"{finding.kind}: {finding.detail}"
    return finding.module, under_vmap, in_modes, finding.advice


def _widths(cells: Sequence[tuple[str, ...]]) -> list[int]:
    """Paths and classes get the width they need, up to a limit; the others share."""
    widths = []
    for column, limit in ((0, 22), (1, 15)):
        longest = max(len(line) for row in cells for line in row[column].split("\n"))
        widths.append(min(max(longest, len(_HEADS[column])), limit))
    rest = _WIDTH - sum(widths) - 2 * (len(_HEADS) - 1)
    widths += [rest * 32 // 100, rest * 36 // 100]
    return [*widths, rest - sum(widths[2:])]


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    columns = [
        [
            line
            for part in cell.split("\n")
            for line in textwrap.wrap(part, width, subsequent_indent=indent)
        ]
        for cell, width, indent in zip(cells, widths, ("  ", "", "", "  ", ""))
    ]
    height = max(len(column) for column in columns)
    return [
        "  ".join(
            (column[i] if i < len(column) else "").ljust(width)
            for column, width in zip(columns, widths)
        ).rstrip()
        for i in range(height)
    ]


def _listed(modes: Sequence[str]) -> str:
    return ", ".join(f'"{mode}"' for mode in modes)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
