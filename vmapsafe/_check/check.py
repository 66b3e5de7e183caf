"""``check``: what of a model is unsafe under vmap, before it goes wrong.

Two looks. The first is at the layers and their flags. The second, if there is an
example, is at runs of a copy of the model on it, in every mode: errors, hand-made
layers that write to their buffers, and random functions show in a run only.
"""

from __future__ import annotations

import copy
import random
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vmapsafe._block.advice import advice_for
from vmapsafe._block.models import (
    has_running_stats,
    is_frozen,
    is_hand_made_write,
    is_lazy,
    label_of,
    never_updated,
    refuse,
    refuse_named,
    unwrapped,
)
from vmapsafe._block.switched import owners_flags
from vmapsafe._check.report import Finding, Report
from vmapsafe._check.trial import (
    ALONE,
    Example,
    Failure,
    Outcome,
    in_block,
    left_alone,
    plain,
)
from vmapsafe._draws import check_randomness
from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, a_kind, shown
from vmapsafe._modes import MODES, Flags, NumGroups, Options, groups_for
from vmapsafe._torch import (
    BatchNormBase,
    DropoutBase,
    InstanceNormBase,
    LazyModuleMixin,
    tree_flatten,
    tree_map,
)


def check(
    model: nn.Module,
    *example: Any,
    mode: str | None = None,
    randomness: str = "error",
    num_groups: NumGroups = 32,
    also: tuple[type[nn.Module], ...] = (),
) -> Report:
    """Report what is unsafe in a model under vmap, and what each mode makes of it.

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import check
    >>> class Centred(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_buffer("mu", torch.zeros(3))
    ...     def forward(self, x):
    ...         self.mu.lerp_(x.detach().mean((0, 2, 3)), 0.1)
    ...         return x - self.mu.view(-1, 1, 1)
    >>> model = nn.Sequential(Centred(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> report = check(model, torch.randn(2, 3, 8, 8))
    >>> for finding in report:
    ...     print(finding.path, finding.module, "|", finding.kind)
    0 Centred | writes buffers
    2 BatchNorm2d | mixes samples
    2 BatchNorm2d | writes buffers
    >>> report.safe("eval"), len(report)
    (True, 3)

    ``print(report)`` shows a table. The kinds of findings:

    ================  ===============================================================
    "mixes samples"   batch norm with batch statistics: under vmap, of the slice
    "writes buffers"  running statistics, counters, a hand-made layer's own updates
    "random"          dropout and the like: vmap wants to know its ``randomness``
    "unsupported"     what vmap or vmap_safe raises, with the layer's path
    "slow fallback"   what torch's vmap runs slice by slice: right, but slow
    ================  ===============================================================

    Args:
        model: torch.compile, DataParallel and DistributedDataParallel are unwrapped.
        *example: a small batch of the model's inputs, e.g. ``x[:2]``; tensors
            (B, ...). One tuple is all positional inputs, one dict keyword inputs, as
            in :func:`per_sample_grads`. Without an example nothing is run.
        mode: the one mode to look at; default all.
        randomness: that you will pass to vmap; with "different" or "same" random
            layers are safe.
        num_groups: of :func:`vmap_safe`.
        also: of :func:`vmap_safe`; where it would help, a finding names the class.

    Returns:
        A report: a sequence of findings with ``path``, ``module``, ``kind``,
        ``detail``, ``becomes`` and ``safe`` by mode, and ``advice``. Its
        ``safe(mode)`` says whether nothing unsafe was found in a mode.

    Raises:
        ValueError: an unknown mode or randomness, an example without tensors or of
            batches that disagree.
        TypeError: ``model`` is not a module, ``num_groups`` not an int or a function,
            ``also`` not a tuple of classes.

    The model is run on a copy, under vmap and vmap(grad), two slices of one at most;
    it, its ``.grad`` and torch's and Python's random generators stay as they are. An
    error stops a run, so what comes after the layer that raised it shows once that is
    mended. What the model's code does elsewhere, to lists, files or NumPy's generator,
    it does here too. Numbers are not compared with those of a loop.
    """
    if not isinstance(model, nn.Module):
        raise VmapSafeTypeError(
            "check(...)",
            f"{shown(model)} is {a_kind(model)}, not an nn.Module",
            "Write check(model, x[:2])",
        )
    options = Options(
        called="check(...)",
        mode="eval" if mode is None else mode,
        num_groups=num_groups,
        also=also,
    )
    check_randomness("check(...)", randomness)
    net = unwrapped(model)
    asked = _Asked(
        net=net,
        modules=dict(net.named_modules()),
        modes=tuple(MODES) if mode is None else (mode,),
        randomness=randomness,
        options=options,
    )
    inputs = _example(example)
    findings = list(_of_layers(asked))
    trial = _Trial() if inputs is None else _tried(asked, inputs, findings)
    findings += _of_trial(asked, trial, findings)
    order = {path: i for i, path in enumerate(asked.modules)}
    findings.sort(key=lambda finding: order[finding.path])
    return Report(
        type(net).__name__,
        asked.modes,
        findings,
        tried=bool(trial.in_mode),
        notes=trial.notes,
    )


@dataclass(frozen=True)
class _Asked:
    """The question: which model, and how it will be called."""

    net: nn.Module
    modules: Mapping[str, nn.Module]
    modes: tuple[str, ...]
    randomness: str
    options: Options

    def finding(
        self,
        path: str,
        kind: str,
        detail: str,
        becomes: Mapping[str, str] | str,
        advice: str,
        unsafe: Mapping[str, object] | bool = False,
    ) -> Finding:
        """A finding; a text instead of a mapping holds in every mode."""
        if isinstance(becomes, str):
            becomes = {mode: becomes for mode in self.modes}
        if isinstance(unsafe, bool):
            unsafe = dict.fromkeys(self.modes) if unsafe else {}
        return Finding(
            path=path,
            module=type(self.modules[path]).__name__,
            kind=kind,
            detail=detail,
            becomes={mode: becomes[mode] for mode in self.modes},
            safe={mode: mode not in unsafe for mode in self.modes},
            advice=advice,
        )


def _example(example: tuple[Any, ...]) -> Example | None:
    """The example as a call on two samples at most; None without one."""
    if not example:
        return None
    args, kwargs = example, {}
    if len(example) == 1 and isinstance(example[0], tuple):
        args = example[0]
    elif len(example) == 1 and isinstance(example[0], dict):
        args, kwargs = (), example[0]
    leaves = tree_flatten((args, kwargs))[0]
    shapes = [tuple(t.shape) for t in leaves if isinstance(t, Tensor) and t.dim()]
    if len({shape[0] for shape in shapes}) != 1 or shapes[0][0] == 0:
        found = ", ".join(map(str, shapes)) or "none"
        raise VmapSafeValueError(
            "check(...)",
            f"the shapes of the example's tensors, {found}, have no batch " "in common",
            "Pass a small batch of the model's inputs, as check(model, x[:2])",
        )
    args, kwargs = tree_map(
        lambda t: t[:2] if isinstance(t, Tensor) and t.dim() else t, (args, kwargs)
    )
    return Example(args, kwargs)


# -- The layers and their flags -------------------------------------------------------

_USE = "Use vmap_safe(model, mode=...)."


def _of_layers(asked: _Asked) -> Iterator[Finding]:
    flags = {module: owners_flags(module) for module in asked.net.modules()}
    refused: list[str] = []
    for path, module in asked.modules.items():
        if any(path.startswith(f"{outer}.") or not outer for outer in refused):
            continue  # the inside of what is refused says nothing new
        frozen = is_frozen(module, asked.net)
        if isinstance(module, asked.options.also) and not frozen:
            finding = _refusal(asked, path, lambda m: _refuse_named(asked, path, m))
            yield from [finding] if finding is not None else []
        finding = _refusal(asked, path, lambda m: refuse(module, MODES[m], asked.net))
        if finding is not None:
            refused += [path] if not isinstance(module, LazyModuleMixin) else []
            yield finding
        elif isinstance(module, BatchNormBase):
            yield from _of_batch_norm(asked, path, module, flags[module], frozen)
        elif isinstance(module, InstanceNormBase):
            yield from _of_instance_norm(asked, path, module, flags[module])
        elif flags[module].training and _chance(module):
            yield _random(asked, path, f"drops with probability {_chance(module):g}")


def _refusal(asked: _Asked, path: str, refuse: Callable[[str], None]) -> Finding | None:
    """What vmap_safe itself says of a module at entry, in a mode."""
    said = {}
    for mode in asked.modes:
        try:
            refuse(mode)
        except (TypeError, ValueError) as error:
            said[mode] = str(error)
    if not said:
        return None
    label = label_of(asked.net, asked.modules[path])
    found, _, do = next(iter(said.values())).partition(f"{label} ")[2].rpartition(". ")
    becomes = {m: "refused at entry" if m in said else "runs" for m in asked.modes}
    return asked.finding(path, "unsupported", found, becomes, do, said)


def _refuse_named(asked: _Asked, path: str, mode: str) -> None:
    refuse_named(label_of(asked.net, asked.modules[path]), MODES[mode], asked.net)


def _of_batch_norm(
    asked: _Asked, path: str, layer: BatchNormBase, flags: Flags, frozen: bool
) -> Iterator[Finding]:
    running = has_running_stats(layer)
    if running and not flags.training:
        return
    if frozen:
        yield asked.finding(
            path,
            "mixes samples",
            "without running statistics it normalises with those of the slice",
            "the same, as its owner has put it in eval mode",
            "Nothing, if the statistics of a slice are meant; else a layer with "
            "running statistics.",
        )
        return
    channels = layer.num_features
    groups = groups_for(channels, asked.options.num_groups)
    becomes = {name: mode.becomes for name, mode in MODES.items()}
    if groups == channels:
        becomes["group_norm"] = f"over each of the {channels} channels of each sample"
        if asked.options.num_groups != channels:
            becomes["group_norm"] += f", as {channels} is no multiple of num_groups"
    if not running:
        becomes["eval"] = "with the statistics of the slice, for want of running ones"
        detail = "without running statistics it normalises with those of the slice"
    else:
        if never_updated(layer):
            becomes["eval"] += ", which were never updated (mean 0, variance 1)"
        detail = "in training it normalises with the statistics of the slice"
    yield asked.finding(path, "mixes samples", detail, becomes, _USE)
    if running and flags.track_running_stats:
        counter = layer.num_batches_tracked is not None
        written = "the running statistics" + (" and the counter" if counter else "")
        yield asked.finding(
            path,
            "writes buffers",
            f"updates {written} in place, which torch refuses under vmap and grad",
            "nothing is written",
            _USE,
        )


def _of_instance_norm(
    asked: _Asked, path: str, layer: InstanceNormBase, flags: Flags
) -> Iterator[Finding]:
    # Without track_running_stats it still updates the buffers it has (torch 2.13).
    if has_running_stats(layer) and (flags.training or not flags.track_running_stats):
        own = "normalises with each sample's own statistics, nothing is written"
        becomes = dict.fromkeys(MODES, own)
        if flags.track_running_stats:
            becomes["eval"] = "normalises with the running statistics, as they are"
        yield asked.finding(
            path,
            "writes buffers",
            "updates the running statistics in place, which torch refuses under vmap "
            "and grad",
            becomes,
            _USE,
        )


def _chance(module: nn.Module) -> float:
    """How probable it is that a layer in training drops something, where it says so."""
    name = type(module).__name__
    if isinstance(module, DropoutBase) or name == "StochasticDepth":
        return float(getattr(module, "p", 0))
    if name == "DropPath":
        return float(getattr(module, "drop_prob", None) or 0)
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout)
    if isinstance(module, nn.RNNBase) and module.num_layers > 1:
        return float(module.dropout)
    return 0.0


def _random(asked: _Asked, path: str, detail: str) -> Finding:
    becomes, advice = {
        "error": (
            "raises, unless randomness= is given",
            'Pass randomness= to vmap, "different" or "same".',
        ),
        "different": ("draws for each slice", 'Keep passing randomness="different".'),
        "same": ("draws once for all slices", 'Keep passing randomness="same".'),
    }[asked.randomness]
    unsafe = asked.randomness == "error"
    return asked.finding(path, "random", detail, becomes, advice, unsafe)


# -- The runs on the example ----------------------------------------------------------


@dataclass
class _Trial:
    """What the runs have shown: without a block, and in each mode."""

    plain: Outcome = field(default_factory=Outcome)
    in_mode: dict[str, Outcome] = field(default_factory=dict)
    notes: tuple[str, ...] = (
        "Without an example only the layers were looked at and nothing was run: errors "
        "of vmap, hand-made layers and random functions were not looked for. Pass a "
        "small batch, check(model, x[:2]).",
    )


def _tried(asked: _Asked, inputs: Example, known: list[Finding]) -> _Trial:
    net = asked.net
    if any([is_lazy(module) for module in net.modules()]):
        return _Trial(notes=(_LAZY,))
    with _generators_kept(), left_alone(net):
        try:
            model = copy.deepcopy(net)
            if not set(net.modules()).isdisjoint(model.modules()):
                raise ValueError("its copy shares modules with it")
        except Exception as error:
            return _Trial(notes=(_NO_COPY.format(_words(error)),))
        trial = _Trial(plain(copy.deepcopy(model), inputs), notes=())
        draws = bool(trial.plain.random) or any(f.kind == "random" for f in known)
        for mode in asked.modes:
            if all(f.safe[mode] for f in known if f.kind == "unsupported"):
                options = replace(asked.options, mode=mode)
                trial.in_mode[mode] = _in_mode(asked, model, inputs, options, draws)
    if trial.plain.failures and not all(o.failures for o in trial.in_mode.values()):
        (failure,) = trial.plain.failures
        trial.notes = (_NOT_WHOLE.format(_words(failure.error)),)
    return trial


_NO_COPY = (
    "The model could not be copied ({}), so nothing was run and only the layers were "
    "looked at."
)
_LAZY = "The model is lazy, so nothing was run and only the layers were looked at."
_NOT_WHOLE = (
    "A plain call on the example raised ({}), so writes to buffers were not looked for."
)
_NO_RANDOMNESS = "random operation while in randomness error mode"  # torch 2.13


def _in_mode(
    asked: _Asked, model: nn.Module, inputs: Example, options: Options, draws: bool
) -> Outcome:
    """The runs in one mode; a second time where only the randomness was wanting."""
    if asked.randomness != "error":
        return in_block(model, inputs, options, asked.randomness)
    if draws:
        return in_block(model, inputs, options, "different")
    outcome = in_block(model, inputs, options, "error")
    drew = [f for f in outcome.failures if _NO_RANDOMNESS in str(f.error)]
    if drew or outcome.random:
        outcome = in_block(model, inputs, options, "different")
        for failure in drew:
            outcome.random.add(failure.path)
    return outcome


def _of_trial(asked: _Asked, trial: _Trial, known: list[Finding]) -> Iterator[Finding]:
    outcomes = trial.in_mode
    everywhere = [trial.plain, *outcomes.values()]

    layers = {finding.path for finding in known if finding.kind == "random"}
    drew = set().union(*[outcome.random for outcome in everywhere])
    yield from [
        _random(asked, path, "draws random numbers") for path in sorted(drew - layers)
    ]

    layers = {finding.path for finding in known if finding.kind == "writes buffers"}
    for path in _paths(outcome.written for outcome in everywhere):
        past = {mode: path for mode, o in outcomes.items() if path in o.written}
        if past or path not in layers:
            written = [outcome.written.get(path, []) for outcome in everywhere]
            names = list(dict.fromkeys([name for some in written for name in some]))
            built = set().union(*[outcome.built for outcome in everywhere])
            updates = [name for name in names if (path, name) not in built]
            yield _of_writes(asked, path, names, updates, past)

    yield from _of_failures(asked, trial)

    for path in _paths(outcome.fallbacks for outcome in outcomes.values()):
        met = {mode for mode, o in outcomes.items() if path in o.fallbacks}
        operators = _united(o.fallbacks.get(path, []) for o in outcomes.values())
        yield asked.finding(
            path,
            "slow fallback",
            f"no batching rule for {operators}",
            {
                m: "right, but runs slice by slice" if m in met else "runs"
                for m in asked.modes
            },
            "Nothing, if it is fast enough; else other operations.",
        )


def _of_writes(
    asked: _Asked,
    path: str,
    names: list[str],
    updates: list[str],
    past: Mapping[str, object],
) -> Finding:
    module, listed = asked.modules[path], ", ".join(names)
    named = isinstance(module, asked.options.also) and not is_frozen(module, asked.net)
    proposed = (
        not (named or has_running_stats(module))
        and "eval" in asked.modes
        and any([is_hand_made_write(module, name) for name in updates])
    )
    becomes = dict.fromkeys(
        asked.modes, "not written; what reads it sees the old value"
    )
    if proposed:
        becomes["eval"] = "stays in training mode; its write is left out"
    if named:
        becomes = dict.fromkeys(asked.modes, "refused at entry")
    if named or has_running_stats(module):
        becomes["eval"] = "in eval mode; nothing is written"
    becomes |= dict.fromkeys(past, "written all the same")
    if past:
        detail = f"writes {listed} in its forward, in a way no block catches: {_PAST}"
        advice = "Write to a buffer, by an in-place method of it or as self.name = ...,"
        advice += " and to no parameter."
    else:
        detail = (
            f"writes {listed} in its forward, which torch refuses under vmap and grad"
        )
        advice = _USE
    if proposed:
        advice += f" To have it in eval mode: also=({type(module).__name__},)."
    return asked.finding(path, "writes buffers", detail, becomes, advice, past)


_PAST = "by .data =, a numpy view or an operator of C++"


# How the rules word an error of their own: who, what was found, what to do.
_OWN_WORDS = re.compile(r"\w+ of '[^']*' \(\w+\): (.*)\. (.*\.)")


def _of_failures(asked: _Asked, trial: _Trial) -> Iterator[Finding]:
    said: dict[tuple[str, str, str], dict[str, str]] = {}
    for mode, outcome in trial.in_mode.items():
        alone = {f.path for f in outcome.failures if f.transform == ALONE}
        met: set[str] = set()
        for failure in outcome.failures:
            if failure.transform != ALONE and failure.path not in met:
                met.add(failure.path)
                key = (failure.path, *_said(failure, failure.path in alone))
                said.setdefault(key, {})[mode] = "raises"
    for (path, detail, advice), raises in said.items():
        becomes = {mode: "runs" for mode in asked.modes} | raises
        yield asked.finding(path, "unsupported", detail, becomes, advice, raises)


def _said(failure: Failure, alone: bool) -> tuple[str, str]:
    """What an error says, and what to do."""
    text = str(failure.error)
    own = _OWN_WORDS.fullmatch(text)
    if own:
        return f"in slices of one, {own[1]}", own[2]
    if alone:
        advice = "See that the model runs on a batch of one."
        return f"without vmap too, it raises {_words(failure.error)}", advice
    otherwise = "Take it out of the function that is mapped, or loop over the slices."
    said = f"under {failure.transform} it raises {_words(failure.error)}"
    return said, advice_for(text) or otherwise


def _words(error: Exception) -> str:
    said = " ".join(str(error).split())
    return textwrap.shorten(f"{type(error).__name__}: {said}", 160, placeholder=" ...")


def _paths(notes: Any) -> list[str]:
    return list(dict.fromkeys(path for by_path in notes for path in by_path))


def _united(notes: Any) -> str:
    return ", ".join(dict.fromkeys(what for noted in notes for what in noted))


@contextmanager
def _generators_kept() -> Iterator[None]:
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if started else 0)
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(state)
