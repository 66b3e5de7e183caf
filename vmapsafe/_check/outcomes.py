"""Findings of the runs on an example."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from vmapsafe._block.models import has_running_stats, is_hand_made_write
from vmapsafe._block.refusals import advice_for
from vmapsafe._check.finding import ALSO, BLOCK, LOOP, Finding, one_line
from vmapsafe._check.layers import random_draw
from vmapsafe._check.outside import finding_of
from vmapsafe._check.question import NO_LOOP, USE_A_BLOCK, Question
from vmapsafe._check.trial import ALONE, Trial
from vmapsafe._check.watch import Failure, Outcome
from vmapsafe._errors import VmapSafeError
from vmapsafe._modes import MODES, ModeName


def findings_of_trial(
    question: Question, trial: Trial, known: Collection[Finding]
) -> Iterator[Finding]:
    """Yield what the runs have shown and the layers' findings, ``known``, lack."""
    layers = {finding.path for finding in known if finding.kind == "random"}
    drew = set().union(*[outcome.random for outcome in trial.outcomes])
    for path in sorted(drew - layers):
        yield random_draw(question, path, "draws random numbers")
    layers = {finding.path for finding in known if finding.kind == "writes buffers"}
    yield from _of_writes(question, trial, layers)
    yield from [finding_of(question, other) for other in trial.outside]
    yield from _of_failures(question, trial)
    yield from _of_fallbacks(question, trial.in_mode)


def _of_writes(
    question: Question, trial: Trial, layers: Collection[str]
) -> Iterator[Finding]:
    for path in _paths(outcome.written for outcome in trial.outcomes):
        past = [mode for mode, o in trial.in_mode.items() if path in o.written]
        if past or path not in layers:
            names = _united(o.written.get(path, ()) for o in trial.outcomes)
            built = set().union(*[outcome.built for outcome in trial.outcomes])
            updates = [name for name in names if (path, name) not in built]
            yield _of_write(question, path, names, updates, past)


def _of_write(
    question: Question,
    path: str,
    names: list[str],
    updates: list[str],
    past: Collection[ModeName],
) -> Finding:
    """A forward that writes tensors of its module; in modes ``past``, past a block.

    ``updates`` are those of the tensors whose shape stays.
    """
    module, listed = question.modules[path], ", ".join(names)
    named = question.named(module)
    proposed = (
        not (named or has_running_stats(module))
        and "eval" in question.modes
        and any([is_hand_made_write(module, name) for name in updates])
    )
    becomes: dict[ModeName, str] = dict.fromkeys(
        question.modes, "not written; what reads it sees the old value"
    )
    if proposed:
        becomes["eval"] = "stays in training mode; its write is left out"
    if named:
        becomes = dict.fromkeys(question.modes, "refused at entry")
    if named or has_running_stats(module):
        becomes["eval"] = "in eval mode; nothing is written"
    becomes |= dict.fromkeys(past, "written all the same")
    detail = f"writes {listed} in its forward, "
    if past:
        detail += (
            "in a way that a block does not catch: by .data =, a numpy view or an "
            "operator of C++"
        )
        advice = (
            "Write to a buffer, by an in-place method of it or as self.name = ..., and "
            "do not write to a parameter."
        )
    else:
        detail += "which torch refuses under vmap and grad"
        advice = USE_A_BLOCK
    kind = next(
        (k for k in question.options.also if isinstance(module, k)), type(module)
    ).__name__
    if proposed:
        advice += f" To put it in eval mode, pass also=({kind},)."
    needs = ALSO if proposed or named else BLOCK
    return question.finding(
        path,
        "writes buffers",
        detail,
        becomes,
        advice,
        past,
        needs="" if past else needs,
        named=kind if needs == ALSO and not past else "",
    )


def _of_failures(question: Question, trial: Trial) -> Iterator[Finding]:
    modes: dict[tuple[str, str, str, bool], list[ModeName]] = {}
    for mode, outcome in trial.in_mode.items():
        alone = {f.path for f in outcome.failures if f.transform == ALONE}
        met: set[str] = set()
        for failure in outcome.failures:
            if failure.transform != ALONE and failure.path not in met:
                met.add(failure.path)
                key = (failure.path, *_said(failure, failure.path in alone))
                modes.setdefault(key, []).append(mode)
    for (path, detail, advice, looped), raises in modes.items():
        becomes = dict.fromkeys(question.modes, "runs")
        for mode in question.modes:
            ran = trial.in_mode.get(mode)
            if mode in raises:
                becomes[mode] = "raises"
                if looped and not MODES[mode].merges:
                    becomes[mode] += f", and runs with {LOOP}"
            elif ran is None or (ran.failures and path not in ran.finished):
                becomes[mode] = "not known, as another error came first"
        yield question.finding(
            path,
            "unsupported",
            detail,
            becomes,
            advice,
            raises,
            needs=LOOP if looped else "",
        )


def _said(failure: Failure, alone: bool) -> tuple[str, str, bool]:
    """What an error says, what to do, and whether a loop over the slices runs it."""
    error = failure.error
    looped = not alone and failure.looped
    if isinstance(error, VmapSafeError):
        said, advice = f"in slices of one, {error.found}", f"{error.do}."
    elif alone:
        said = f"without vmap too, it raises {one_line(error)}"
        advice = "Make sure that model(*example) runs, on a batch of one too."
    else:
        said = f"under {failure.transform} it raises {one_line(error)}"
        advice = advice_for(error) or (
            "Take it out of the function that is mapped, or loop over the slices."
        )
    if looped and failure.of_checkpoint:
        advice = (
            "Call per_sample or its short forms, which run a checkpoint as it is; in "
            f"batched pass {LOOP}, which runs it sample by sample."
        )
    if looped and LOOP not in advice:
        advice += f" Or pass {LOOP}, which runs it sample by sample."
    elif not looped:
        advice += NO_LOOP
    return said, advice, looped


def _of_fallbacks(
    question: Question, in_mode: Mapping[ModeName, Outcome]
) -> Iterator[Finding]:
    for path in _paths(outcome.fallbacks for outcome in in_mode.values()):
        slow = {mode for mode, o in in_mode.items() if path in o.fallbacks}
        operators = _united(o.fallbacks.get(path, ()) for o in in_mode.values())
        yield question.finding(
            path,
            "slow fallback",
            f"no batching rule for {', '.join(operators)}",
            {
                m: "right, but runs slice by slice" if m in slow else "runs"
                for m in question.modes
            },
            "Do nothing if it is fast enough; otherwise use other operations.",
        )


def _paths(notes: Iterable[Mapping[str, object]]) -> list[str]:
    """All paths, once each, in the order in which they come."""
    return list(dict.fromkeys([path for by_path in notes for path in by_path]))


def _united(notes: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys([name for noted in notes for name in noted]))
