"""Notes for errors that torch's vmap raises: which layer, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from types import FrameType

from torch import nn

from vmapsafe._block import refusals
from vmapsafe._block.covered import Model
from vmapsafe._block.refusals import TWO_DEVICES, avoided_by_a_loop, frames_of
from vmapsafe._torch import CODE_OF_CALLS, HOME_OF_VMAP, current_level

# What others ask of an error.
advice_for, asks_for_randomness = refusals.advice_for, refusals.asks_for_randomness

# What torch says about an input that lacks a dimension.
_DIMENSIONS = re.compile(
    r"""xpected\ (at\ least\ )?\d+D?\ ?(\(unbatched\)\ |dimensions\ for\ input)?
        (\ ?or\ (higher\ dimensionality|\d+D))*
        .*(input|tensor|got)
    |   xpected\ input\ to\ be\ [\d]+D
    |   Dimension\ out\ of\ range
    |   shapes\ cannot\ be\ multiplied
    |   Only\ 3D,\ 4D\ and\ 5D\ input
    |   unbatched\ \d+D\ or\ batched
    |   logical_rank\ ==\ n
    |   at\ least\ \d+\ dimensions,\ but\ got\ input
    |   xpected\ number\ of\ channels\ in\ input
    |   Padding\ length\ should
    """,
    re.VERBOSE,
)
_SLICE = (
    "A slice under vmap has no batch dimension. If the model wants one, write @batched "
    "in place of vmap, or model(x[None])."
)
_OF_ONE = (
    "The model is called with a batch of one, x[i:i+1] with its dimension of size 1. "
    "Make sure that x has the shape (B, ...) of a batch of the model's inputs. If x[i] "
    "is a batch of its own, pass keep_batch_dim=False."
)
_AS_IT_IS = (
    "With keep_batch_dim=False the model is called with x[i] as it is. Make sure that "
    "x[i] is a batch of the model's inputs, or leave keep_batch_dim out."
)


_FALLBACK = (
    'Or pass fallback="loop" to batched, or to per_sample and its short forms: they '
    "then loop over the slices."
)


def advise(error: BaseException, models: Iterable[Model], may_loop: bool) -> None:
    """Add a note to an error of torch's vmap; leave other errors as they are.

    Args:
        error: that ends a block.
        models: of the block.
        may_loop: whether the slices may run one after another there.
    """
    if not isinstance(error, (RuntimeError, ValueError, IndexError, AssertionError)):
        return
    frames = list(frames_of(error))
    advice = advice_for(error)
    if advice is None and _DIMENSIONS.search(str(error)):
        advice = _of_dimensions(frames)
    if advice is not None:
        if advice is TWO_DEVICES:
            advice = _of_several_devices(models) or advice
        if may_loop and avoided_by_a_loop(error):
            advice = f"{advice} {_FALLBACK}"
        error.add_note(f"vmapsafe: raised in {_where(frames, models)}. {advice}")


def _of_several_devices(models: Iterable[Model]) -> str | None:
    """Advice for models with tensors on more than one device."""
    names: dict[str, str] = {}
    for model in models:
        for named in (model.root.named_parameters(), model.root.named_buffers()):
            for name, tensor in named:
                names.setdefault(str(tensor.device), name)
    if len(names) < 2:
        return None
    listed = " and ".join([f"{n!r} is on {device}" for device, n in names.items()])
    return f"In the model {listed}. Move all of it to one device, model.to(device)."


# The files whose frames hand slices to a model, and the option that says how.
_OF_SLICES = ("vmapsafe._rows.samples", "vmapsafe._block.batched")
_KEPT = "keep_batch_dim"


def _of_dimensions(frames: Sequence[FrameType]) -> str | None:
    """Advice by what gave the model its input: vmap, this package, or neither."""
    names = [frame.f_globals.get("__name__") for frame in frames]
    known = [frame.f_locals for frame, n in zip(frames, names) if n in _OF_SLICES]
    if known:
        kept = [v.get(_KEPT, getattr(v.get("self"), _KEPT, True)) for v in known]
        return _AS_IT_IS if False in kept else _OF_ONE
    if current_level() > 0 or HOME_OF_VMAP in names:
        return _SLICE
    return None


def module_of(error: BaseException, models: Iterable[Model]) -> str | None:
    """The innermost module of the models whose forward raised an error."""
    return _module(frames_of(error), models)


def _where(frames: Iterable[FrameType], models: Iterable[Model]) -> str:
    found = _module(frames, models)
    return found or "the code inside the block, outside its models"


def _module(frames: Iterable[FrameType], models: Iterable[Model]) -> str | None:
    found = None
    for frame in frames:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and _is_call(frame):
            for model in models:
                if module in model.modules:
                    found = model.label(module)
    return found


def _is_call(frame: FrameType) -> bool:
    """Whether a module is called there, and not another method of it."""
    return frame.f_code.co_name == "forward" or frame.f_code is CODE_OF_CALLS
