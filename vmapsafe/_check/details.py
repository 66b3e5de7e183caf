"""Every finding: each layer, and what becomes of it in each mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmapsafe._check.finding import Finding
from vmapsafe._check.summary import verdict
from vmapsafe._check.table import WIDTH, head, paragraph, row
from vmapsafe._modes import ModeName

# -- The table -------------------------------------------------------------------------

_HEADS = ("path", "class", "under vmap", "in vmap_safe", "what to do")
_INDENTS = ("  ", "", "", "  ", "")


def details(
    model: str,
    modes: Sequence[ModeName],
    findings: Sequence[Finding],
    tried: bool,
    notes: Iterable[str],
) -> str:
    """What the page has, with all findings; the arguments are those of ``summary``."""
    blocks = verdict(model, modes, findings, tried)
    blocks += [_table(findings)] if findings else []
    return "\n\n".join([*blocks, *[paragraph(f"Note: {note}") for note in notes]])


def _table(findings: Sequence[Finding]) -> str:
    """A table of all findings; layers with identical findings share a row."""
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
        cells.append(("\n".join(paths), *said))

    widths = _widths(cells)
    lines = head(_HEADS, widths)
    for i, cell in enumerate(cells):
        lines += [""] if i else []
        lines += row(cell, widths, _INDENTS)
    return "\n".join(lines)


def _said(finding: Finding) -> tuple[str, ...]:
    """The cells of a finding after its path."""
    modes: dict[str, list[str]] = {}
    for mode, becomes in finding.becomes.items():
        text = becomes if finding.safe[mode] else f"not safe, {becomes}"
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
    rest = WIDTH - sum(widths) - 2 * (len(_HEADS) - 1)
    widths += [rest * 32 // 100, rest * 36 // 100]
    return [*widths, rest - sum(widths[2:])]
