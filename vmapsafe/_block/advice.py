"""Notes for errors that torch's vmap raises: which layer, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType

from torch import nn

from vmapsafe._block.models import Model
from vmapsafe._torch import CODE_OF_CALLS, HOME_OF_VMAP, current_level

_VALUE = "The code asks for the value of a tensor, which differs from slice to slice. "

_NO_RANDOMNESS = "random operation while in randomness error mode"

_TWO_DEVICES = (
    "Two devices meet there. Move the batch, or what you passed as params=, to the "
    "device of the model, x.to(device)."
)

# (what torch 2.11 to 2.14 say, what to do); the first that fits.
_ADVICE = (
    (
        _NO_RANDOMNESS,
        'Pass randomness="different" (a draw of its own for each slice) or "same" to '
        "vmap, batched or per_sample_grads; or put the layer in eval mode before the "
        "block.",
    ),
    (
        r"support saved tensor hooks|vmap over _NoopSaveInputs",
        "Such hooks are what torch.utils.checkpoint and save_on_cpu set. Leave them "
        "out under vmap, and take a smaller chunk_size to save memory.",
    ),
    (
        r"does not have vmap support",
        "It is an autograd.Function without a rule for vmap. Give the Function "
        "a vmap staticmethod (or generate_vmap_rule=True), or use plain torch "
        "operations in its place.",
    ),
    (
        r"must override the setup_context staticmethod",
        "It is an autograd.Function of the old form, forward(ctx, ...), as in "
        "torch.utils.checkpoint with use_reentrant=True. Give it forward(...), "
        "setup_context and a vmap staticmethod, or use plain torch operations in its "
        "place. Leave a checkpoint out, and take a smaller chunk_size to save memory.",
    ),
    (
        r"inplace arithmetic",
        "Write the operation out of place. Buffers of the model are left alone inside "
        "vmap_safe, so this is another tensor, created outside vmap.",
    ),
    (
        r"data-dependent control flow",
        f"{_VALUE}Use torch.where, or take the condition out of the forward.",
    ),
    (r"\.item\(\)", f"{_VALUE}Keep it a tensor."),
    (
        r"[Cc]annot access data pointer of Tensor that doesn't have storage",
        f"{_VALUE}.numpy() and .tolist() do that. Write it in torch operations, or do "
        "it before or after the vmap.",
    ),
    (
        r"different inplace randomness on an unbatched tensor",
        "The draw fills a tensor that vmap does not batch. Draw out of place "
        "(torch.bernoulli), or into torch.empty_like of the layer's input.",
    ),
    (
        r"operators that can (output|support) dynamic shape",
        "A shape depends on the values of the slice, as with a boolean mask, x[mask] "
        "or x[mask] = 0. Use torch.where(mask, a, b), or masked_fill.",
    ),
    (
        r"Batching rule not implemented",
        "torch's vmap does not know this operation. Inside a block it knows those of "
        "nn.LSTM, nn.GRU and nn.RNN. Write another one with those that it knows, or "
        "loop over the slices.",
    ),
    (
        r"running_mean or running_var, which will be updated in place",
        "The block does not cover this layer. Hand its model to vmap_safe as well.",
    ),
    (
        r"would mutate a captured Tensor",
        "Write the operation out of place. If it is a layer's update of its buffers, "
        "hand its model to vmap_safe as well; if it is DistributedDataParallel's "
        "broadcast of them, call the module inside it, or pass broadcast_buffers=False "
        "to it.",
    ),
    (
        r"tensors to be on the same device|not on the expected device",
        _TWO_DEVICES,
    ),
    (
        r"have the same dtype|expected scalar type \w+ but found|"
        r"Input type .* and (weight|bias) type .* should be the same",
        "Two dtypes or devices meet there. Cast one tensor, x.to(other): a batch "
        "mostly has the dtype and the device of the model's parameters. torch.autocast "
        "casts within a model.",
    ),
)

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


def advise(error: BaseException, models: Iterable[Model]) -> None:
    """Add a note to an error of torch's vmap; leave other errors as they are."""
    if not isinstance(error, (RuntimeError, ValueError, IndexError, AssertionError)):
        return
    frames = list(_frames(error))
    advice = advice_for(error)
    if advice is None and _DIMENSIONS.search(str(error)):
        advice = _of_dimensions(frames)
    if advice is not None:
        if advice is _TWO_DEVICES:
            advice = _of_several_devices(models) or advice
        where = _where(frames, models)
        error.add_note(f"vmapsafe: raised in {where}. {advice}")


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


def advice_for(error: BaseException) -> str | None:
    """What to do about an error of torch's vmap, if it is a known one."""
    for said, advice in _ADVICE:
        if re.search(said, str(error)):
            return advice
    return None


def asks_for_randomness(error: BaseException) -> bool:
    """Whether torch's vmap raised it for a draw without ``randomness=``."""
    return _NO_RANDOMNESS in str(error)


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


def _where(frames: Iterable[FrameType], models: Iterable[Model]) -> str:
    """The innermost module of the models whose forward was running."""
    found = "the code inside the block, outside its models"
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


def _frames(error: BaseException) -> Iterator[FrameType]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next
