"""Findings of the layers and their flags, without a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from vmapsafe._block.models import (
    Refusal,
    has_running_stats,
    is_frozen,
    is_lazy,
    never_updated,
    refusal,
    refusal_of_named,
)
from vmapsafe._block.switched import owners_flags
from vmapsafe._check.finding import BLOCK, RANDOMNESS, Finding
from vmapsafe._check.question import NO_LOOP, USE_A_BLOCK, Question
from vmapsafe._modes import MODES, Flags, Mode, groups_for
from vmapsafe._torch import (
    BatchNormBase,
    DropoutBase,
    InstanceNormBase,
    LazyModuleMixin,
)


def findings_of_layers(question: Question) -> Iterator[Finding]:
    """Yield what the class and the flags of each layer tell."""
    refused: list[str] = []
    for path, module in question.modules.items():
        if any(path.startswith(f"{outer}.") or not outer for outer in refused):
            continue  # the layers inside a refused module add nothing
        if question.named(module):
            found = _of_refusal(question, path, refusal_of_named)
            yield from [found] if found else []
        found = _of_refusal(question, path, lambda mode: refusal(module, mode))
        if found:
            refused += [path] if not isinstance(module, LazyModuleMixin) else []
            yield found
        else:
            yield from _of_layer(question, path, module)


def random_draw(question: Question, path: str, detail: str) -> Finding:
    """A module that draws random numbers."""
    becomes, advice = {
        "error": (
            "raises unless vmap is given randomness=",
            'Pass randomness= to vmap, "different" or "same".',
        ),
        "different": ("draws for each slice", 'Pass randomness="different", as here.'),
        "same": ("draws once for all slices", 'Pass randomness="same", as here.'),
    }[question.randomness]
    asked = question.randomness == "error"
    return question.finding(
        path,
        "random",
        detail,
        becomes,
        advice,
        question.modes if asked else (),
        needs=RANDOMNESS,
        named="" if asked else f'"{question.randomness}"',
    )


def note_on_statistics(question: Question) -> str:
    """A sentence about layers whose running statistics mean nothing yet; "" if none."""
    found = [
        module
        for module in question.modules.values()
        if isinstance(module, BatchNormBase)
        and not is_lazy(module)
        and never_updated(module)
    ]
    if not found or "eval" not in question.modes:
        return ""
    layers = "layer has" if len(found) == 1 else "layers have"
    return (
        f'For mode "eval", train the model or load its weights first: {len(found)} '
        f"{layers} running statistics that no batch has updated (mean 0, variance 1)."
    )


def _of_refusal(
    question: Question, path: str, why: Callable[[Mode], Refusal | None]
) -> Finding | None:
    """A module that vmap_safe refuses at entry in some of the modes."""
    refusals = {mode: why(MODES[mode]) for mode in question.modes}
    first = next(filter(None, refusals.values()), None)
    if first is None:
        return None
    becomes = {m: "refused at entry" if r else "runs" for m, r in refusals.items()}
    unsafe = [mode for mode, refused in refusals.items() if refused]
    return question.finding(
        path, "unsupported", first.found, becomes, f"{first.do}.{NO_LOOP}", unsafe
    )


def _of_layer(question: Question, path: str, module: nn.Module) -> Iterator[Finding]:
    flags = owners_flags(module)
    if isinstance(module, BatchNormBase):
        yield from _of_batch_norm(question, path, module, flags)
    elif isinstance(module, InstanceNormBase):
        yield from _of_instance_norm(question, path, module, flags)
    elif flags.training and _chance(module):
        detail = f"drops with probability {_chance(module):g}"
        yield random_draw(question, path, detail)


def _of_batch_norm(
    question: Question, path: str, layer: BatchNormBase, flags: Flags
) -> Iterator[Finding]:
    running = has_running_stats(layer)
    if running and not flags.training:
        return
    if is_frozen(layer, question.net):
        yield question.finding(
            path,
            "mixes samples",
            "without running statistics it normalises with those of the slice",
            "the same, as its owner has put it in eval mode",
            "Do nothing if you mean the statistics of a slice; otherwise use a layer "
            "with running statistics.",
        )
        return
    becomes = {mode.name: mode.becomes for mode in MODES.values()}
    becomes["group_norm"] = _over_groups(question, layer.num_features)
    if not running:
        becomes["eval"] = "with the statistics of the slice, as it has no running ones"
        detail = "without running statistics it normalises with those of the slice"
    else:
        if never_updated(layer):
            becomes["eval"] += ", which were never updated (mean 0, variance 1)"
        detail = "in training it normalises with the statistics of the slice"
    yield question.finding(
        path, "mixes samples", detail, becomes, USE_A_BLOCK, needs=BLOCK
    )
    if running and flags.track_running_stats:
        counter = layer.num_batches_tracked is not None
        written = "the running statistics" + (" and the counter" if counter else "")
        yield question.finding(
            path,
            "writes buffers",
            f"updates {written} in place, which torch refuses under vmap and grad",
            "nothing is written",
            USE_A_BLOCK,
            needs=BLOCK,
        )


def _over_groups(question: Question, channels: int) -> str:
    """What "group_norm" normalises a layer over."""
    wanted = question.options.num_groups
    if groups_for(channels, wanted) < channels:
        return MODES["group_norm"].becomes
    each = f"over each of the {channels} channels of each sample"
    if wanted == channels:
        return each
    return f"{each}, as {channels} is not a multiple of num_groups"


def _of_instance_norm(
    question: Question, path: str, layer: InstanceNormBase, flags: Flags
) -> Iterator[Finding]:
    # Without track_running_stats it still updates the buffers it has (torch 2.13).
    if has_running_stats(layer) and (flags.training or not flags.track_running_stats):
        own = "normalises with each sample's own statistics, nothing is written"
        becomes = dict.fromkeys(question.modes, own)
        if flags.track_running_stats:
            becomes["eval"] = "normalises with the running statistics, as they are"
        yield question.finding(
            path,
            "writes buffers",
            "updates the running statistics in place, which torch refuses under vmap "
            "and grad",
            becomes,
            USE_A_BLOCK,
            needs=BLOCK,
        )


def _chance(module: nn.Module) -> float:
    """The probability with which a layer in training drops something, if it has one."""
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
