"""A page for people: what to do first, what each mode is for, and what was found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmapsafe._check.finding import (
    ALSO,
    BLOCK,
    HAND_OVER,
    LOOP,
    RANDOMNESS,
    Finding,
)
from vmapsafe._check.table import head, paragraph, row
from vmapsafe._modes import MODES, ModeName

_LINES = 30  # of a page, notes aside


def summary(
    model: str,
    modes: Sequence[ModeName],
    findings: Sequence[Finding],
    tried: bool,
    notes: Iterable[str],
) -> str:
    """The page.

    Args:
        model: the name of its class.
        modes: those that were looked at.
        findings: all of them.
        tried: whether the model was run.
        notes: sentences about what was not looked at.

    Returns:
        Paragraphs and tables. Without the notes they have at most 30 lines, however
        large the model.
    """
    blocks = verdict(model, modes, findings, tried)
    if findings:
        if any([f.needs in _COVERED for f in findings]):
            blocks.append(_of_modes(modes))
        mode = _best(modes, findings)
        used = len("\n\n".join(blocks).split("\n")) + len(("", "", _MORE))
        blocks += [_of_findings(findings, mode, _LINES - used), _MORE]
    return "\n\n".join([*blocks, *[paragraph(f"Note: {note}") for note in notes]])


_MORE = "All layers, and what each mode makes of them: report.details(), or --all."


# -- What to do first ------------------------------------------------------------------


def verdict(
    model: str, modes: Sequence[ModeName], findings: Sequence[Finding], tried: bool
) -> list[str]:
    """Paragraphs: what to do first, and in which modes the model then runs."""
    first = paragraph(f"check({model}): {what_to_do(modes, findings, tried)}")
    runs = _where_it_runs(modes, findings, tried) if findings else ""
    return [f"{first}\n{paragraph(runs)}" if runs else first]


def what_to_do(
    modes: Sequence[ModeName], findings: Sequence[Finding], tried: bool
) -> str:
    """One sentence: what to do so that the model runs under vmap and vmap(grad)."""
    if not findings and not tried:
        return "nothing to report about its layers."
    if not findings:
        return (
            "nothing to report; no layer mixes samples, writes buffers or draws random "
            "numbers, and the example ran under vmap and vmap(grad)."
        )
    mode = _best(modes, findings)
    steps = []
    covered = [f for f in findings if f.needs in (BLOCK, ALSO)]
    outside = [f.named for f in findings if f.needs == HAND_OVER]
    if covered or outside:
        also = dict.fromkeys([f.named for f in covered if f.needs == ALSO])
        things = [_counted(covered)] if covered else []
        block = _block(mode, outside, [*also] if mode == "eval" else [])
        steps.append(f"use {block} for {_joined([*things, *outside])}")
    random = [f for f in findings if f.needs == RANDOMNESS]
    if random:
        given = f"{RANDOMNESS}{random[0].named}"
        steps.append(f"pass {given} to vmap for {_classes(random)}")
    unsafe = [f for f in findings if not f.safe[mode]]
    looped = [f for f in unsafe if _needs(f, mode) == LOOP]
    if looped:
        steps.append(f"pass {LOOP} for {_classes(looped)}")
    hopeless = [f for f in unsafe if not _needs(f, mode)]
    if hopeless:
        steps.insert(0, f"change {_classes(hopeless)}, see below")
    return f"{'; '.join(steps)}." if steps else f'nothing to do in mode "{mode}".'


def _where_it_runs(
    modes: Sequence[ModeName], findings: Sequence[Finding], tried: bool
) -> str:
    best = _best(modes, findings)
    needed = {
        mode: {_needs(f, mode) for f in findings if not f.safe[mode]} for mode in modes
    }
    none = [f'"{mode}"' for mode in modes if "" in needed[mode]]
    some = []
    for mode in modes:
        if "" not in needed[mode]:
            with_loop = LOOP in needed[mode] - needed[best]
            some.append(f'"{mode}"' + (f" with {LOOP}" if with_loop else ""))
    if not tried:
        return f"It cannot run in {_joined(none, 4)}." if none else ""
    if not some:
        return f"As it is, it does not run in {_joined(none, 4)}."
    then = "It then runs" if any([f.needs for f in findings]) else "It runs"
    if not none and len(modes) > 1 and not any(["with" in mode for mode in some]):
        some = ["every mode"]
    but = f", but not in {_joined(none, 4)}" if none else ""
    without = [mode for mode in modes if mode != "eval" and "" not in needed[mode]]
    if best == "eval" and without and any([f.needs == ALSO for f in findings]):
        but += f', where {ALSO} is for "eval" alone'
    under = "" if LOOP in needed[best] else " under vmap and vmap(grad)"
    return f"{then}{under} in {_joined(some, 4)}{but}."


def _needs(finding: Finding, mode: ModeName) -> str:
    """What the finding needs in a mode; there is no loop where slices are merged."""
    return "" if finding.needs == LOOP and MODES[mode].merges else finding.needs


def _best(modes: Sequence[ModeName], findings: Sequence[Finding]) -> ModeName:
    """The first of the modes in which the model runs, or else may be made to run."""

    def trouble(mode: ModeName) -> int:
        needed = [_needs(f, mode) for f in findings if not f.safe[mode]]
        return 2 * ("" in needed) + (LOOP in needed)

    return min(modes, key=trouble)


def _block(mode: ModeName, outside: Sequence[str], also: Sequence[str]) -> str:
    arguments = ["model", *outside]
    arguments += [f'mode="{mode}"'] if mode != "eval" else []
    if also:
        arguments.append(f"also=({', '.join(also)}{',' if len(also) == 1 else ''})")
    return f"vmap_safe({', '.join(arguments)})"


def _counted(findings: Iterable[Finding]) -> str:
    """How many layers of which classes, ``46 BatchNorm2d and 2 MyNorm layers``."""
    layers = {f.path: f.module for f in findings}
    noun = "layer" if len(layers) == 1 else "layers"
    kinds = [*layers.values()]
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    return f"{_joined(counts)} {noun}"


def _classes(findings: Iterable[Finding]) -> str:
    return _joined([*dict.fromkeys([f.module for f in findings])])


def _joined(names: Sequence[str], most: int = 3) -> str:
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


# -- The modes -------------------------------------------------------------------------

_COVERED = (BLOCK, ALSO, HAND_OVER)
_MODES = ("mode", "batch norm normalises", "use it for")
_MODE_WIDTHS = (16, 38, 42)


def _of_modes(modes: Iterable[ModeName]) -> str:
    """What each mode is for."""
    lines = head(_MODES, _MODE_WIDTHS)
    for mode in modes:
        lines += row((mode, MODES[mode].becomes, MODES[mode].fits), _MODE_WIDTHS)
    return "\n".join(lines)


# -- The findings ----------------------------------------------------------------------

_HEADS = ("layers", "what was found", "what to do")
_WIDTHS = (31, 32, 33)
_INDENTS = ("  ", "", "")
# Kinds whose details differ little from layer to layer, and are left to the full table.
_ALIKE = ("mixes samples", "writes buffers", "random")


def _of_findings(findings: Iterable[Finding], mode: ModeName, lines_left: int) -> str:
    """A table of one row for all layers of which the same is to be said."""
    # A batch norm mixes samples and writes buffers: one row for what a block mends.
    together: dict[tuple[str, str], list[Finding]] = {}
    for f in findings:
        one = f.needs if f.kind in _ALIKE and f.needs else f"{f.kind}: {f.detail}"
        together.setdefault((f.path, one), []).append(f)
    rows: dict[tuple[str, str, str], list[str]] = {}
    rank: dict[tuple[str, str, str], int] = {}
    for found in together.values():
        key = (found[0].module, _found(found), found[-1].advice)
        rows.setdefault(key, []).append(found[0].path)
        rank[key] = min([_rank(f, mode) for f in found])

    lines, left_out = head(_HEADS, _WIDTHS), 0
    for module, said, advice in sorted(rows, key=rank.__getitem__):
        layers = _layers(module, rows[module, said, advice])
        more = row((layers, said, advice), _WIDTHS, _INDENTS)
        if left_out or len(lines) + len(more) >= lines_left:
            left_out += 1
        else:
            lines += more
    if left_out:
        lines.append(f"and {left_out} more row{'' if left_out == 1 else 's'}")
    return "\n".join(lines)


def _rank(finding: Finding, mode: ModeName) -> int:
    """What to read first: what stops the model in a mode, and then what it needs."""
    if not finding.safe[mode]:
        return 1 if _needs(finding, mode) else 0
    return 2 if finding.needs else 3


def _found(findings: Iterable[Finding]) -> str:
    return ", ".join(
        [
            f.kind if f.kind in _ALIKE and f.needs else f"{f.kind}: {f.detail}"
            for f in findings
        ]
    )


def _layers(module: str, paths: Sequence[str]) -> str:
    """``46 BatchNorm2d: features.0.1 and 45 more``"""
    first = paths[0] or "(the model)"
    if len(paths) == 1:
        return f"{module}: {first}"
    cut = first if len(first) <= _PATH else f"...{first[3 - _PATH :]}"
    return f"{len(paths)} {module}: {cut} and {len(paths) - 1} more"


_PATH = _WIDTHS[0] - len(_INDENTS[0])
