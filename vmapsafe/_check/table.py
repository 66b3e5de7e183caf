"""Columns of text: how a table for people is laid out."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100


def paragraph(text: str) -> str:
    """A text of one paragraph, in lines that fit."""
    return "\n".join(textwrap.wrap(text, WIDTH))


def head(names: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines above the rows of a table."""
    return [*row(names, widths), "  ".join("-" * width for width in widths)]


def row(
    cells: Sequence[str], widths: Sequence[int], indents: Sequence[str] = ()
) -> list[str]:
    """The lines of one row.

    Args:
        cells: the texts, each of one or several lines; long ones are wrapped.
        widths: of the columns.
        indents: what a line that goes on begins with, by column; by default nothing.

    Returns:
        The lines, without blanks at their end.
    """
    columns = [
        [
            line
            for part in cell.split("\n")
            for line in textwrap.wrap(part, width, subsequent_indent=indent)
        ]
        for cell, width, indent in zip(cells, widths, indents or [""] * len(cells))
    ]
    height = max(len(column) for column in columns)
    return [
        "  ".join(
            (column[i] if i < len(column) else "").ljust(width)
            for column, width in zip(columns, widths)
        ).rstrip()
        for i in range(height)
    ]
