"""What torch's vmap refuses: the errors, what to do, and which ones a loop avoids.

This is the one place where torch's errors are told apart, by their text.
"""

from __future__ import annotations

import dis
import os
import re
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

import torch

from vmapsafe._errors import NotUnderVmap


class Refusal(NamedTuple):
    """An error of torch, or of a rule in its place.

    Attributes:
        said: a pattern of what torch 2.11 to 2.14 say.
        do: what to do, in sentences.
        why: what the code does that vmap refuses and a loop over the slices can run;
            empty where a loop would not help.
    """

    said: str
    do: str
    why: str = ""


_VALUE = "The code asks for the value of a tensor, which differs from slice to slice. "
_ITS_VALUE = "it asks for the value of a tensor"

_NO_RANDOMNESS = "random operation while in randomness error mode"

TWO_DEVICES = (
    "Two devices meet there. Move the batch, or what you passed as params=, to the "
    "device of the model, x.to(device)."
)

# The first that fits.
_REFUSALS = (
    Refusal(
        _NO_RANDOMNESS,
        'Pass randomness="different" (a draw of its own for each slice) or "same" to '
        "vmap, batched or per_sample_grads; or put the layer in eval mode before the "
        "block.",
    ),
    Refusal(
        r"support saved tensor hooks|vmap over _NoopSaveInputs",
        "Such hooks are what torch.utils.checkpoint and save_on_cpu set. Leave them "
        "out under vmap, and take a smaller chunk_size to save memory.",
        "it sets hooks for saved tensors, as torch.utils.checkpoint does",
    ),
    Refusal(
        r"does not have vmap support",
        "It is an autograd.Function without a rule for vmap. Give the Function "
        "a vmap staticmethod (or generate_vmap_rule=True), or use plain torch "
        "operations in its place.",
        "it uses an autograd.Function without a rule for vmap",
    ),
    Refusal(
        r"must override the setup_context staticmethod",
        "It is an autograd.Function of the old form, forward(ctx, ...), as in "
        "torch.utils.checkpoint with use_reentrant=True. Give it forward(...), "
        "setup_context and a vmap staticmethod, or use plain torch operations in its "
        "place. Leave a checkpoint out, and take a smaller chunk_size to save memory.",
        "it uses an autograd.Function of the old form",
    ),
    Refusal(
        r"inplace arithmetic",
        "Write the operation out of place. Buffers of the model are left alone inside "
        "vmap_safe, so this is another tensor, created outside vmap.",
        "it writes slices into a tensor that all slices share",
    ),
    Refusal(
        r"data-dependent control flow",
        f"{_VALUE}Use torch.where, or take the condition out of the forward.",
        f"{_ITS_VALUE} to decide what to do",
    ),
    Refusal(r"\.item\(\)", f"{_VALUE}Keep it a tensor.", f"{_ITS_VALUE}, as .item()"),
    Refusal(
        r"[Cc]annot access data pointer of Tensor that doesn't have storage",
        f"{_VALUE}.numpy() and .tolist() do that. Write it in torch operations, or do "
        "it before or after the vmap.",
        f"{_ITS_VALUE}, as .numpy() and .tolist() do",
    ),
    Refusal(
        r"accessing `data` under vmap|Cannot access storage of BatchedTensorImpl",
        "x.data and the storage of a tensor are not to be had under vmap. Write "
        "x.detach().",
        "it asks for x.data or the storage of a tensor",
    ),
    Refusal(
        r"different inplace randomness on an unbatched tensor",
        "The draw fills a tensor that vmap does not batch. Draw out of place "
        "(torch.bernoulli), or into torch.empty_like of the layer's input.",
        "it draws random numbers into a tensor that all slices share",
    ),
    Refusal(
        r"operators that can (output|support) dynamic shape|"
        r"vmap over `mask` in torch\.masked_select|vmapping over the `repeats` tensor",
        "A shape depends on the values of the slice, as with a boolean mask, x[mask] "
        "or x[mask] = 0. Use torch.where(mask, a, b), or masked_fill.",
        "it makes a shape of values, as a boolean mask does",
    ),
    Refusal(
        r"Batching rule not implemented|vmap over torch\.allclose",
        "torch's vmap does not know this operation. Inside a block it knows those of "
        "nn.LSTM, nn.GRU and nn.RNN. Write another one with those that it knows.",
        "it uses an operation that vmap does not know",
    ),
    Refusal(
        r"running_mean or running_var, which will be updated in place",
        "The block does not cover this layer. Hand its model to vmap_safe as well.",
    ),
    Refusal(
        r"would mutate a captured Tensor",
        "Write the operation out of place. If it is a layer's update of its buffers, "
        "hand its model to vmap_safe as well; if it is DistributedDataParallel's "
        "broadcast of them, call the module inside it, or pass broadcast_buffers=False "
        "to it.",
    ),
    Refusal(
        r"tensors to be on the same device|not on the expected device",
        TWO_DEVICES,
    ),
    Refusal(
        r"have the same dtype|expected scalar type \w+ but found|"
        r"Input type .* and (weight|bias) type .* should be the same",
        "Two dtypes or devices meet there. Cast one tensor, x.to(other): a batch "
        "mostly has the dtype and the device of the model's parameters. torch.autocast "
        "casts within a model.",
    ),
)


def refusal_of(error: BaseException) -> Refusal | None:
    """What is known of an error of torch's vmap; None for another error.

    It is looked up by what the error says, whoever raised it.
    """
    if isinstance(error, NotUnderVmap):
        return Refusal("", f"{error.do}.", error.found)
    for refusal in _REFUSALS:
        if re.search(refusal.said, str(error)):
            return refusal
    return None


def advice_for(error: BaseException) -> str | None:
    """What to do about an error of torch's vmap, if it is a known one."""
    if isinstance(error, NotUnderVmap):  # which says so itself
        return None
    refusal = refusal_of(error)
    return None if refusal is None else refusal.do


def asks_for_randomness(error: BaseException) -> bool:
    """Whether torch's vmap raised it for a draw without ``randomness=``."""
    return _NO_RANDOMNESS in str(error)


def avoided_by_a_loop(error: BaseException) -> Refusal | None:
    """The refusal, if ``fallback="loop"`` runs what vmap has refused with an error.

    A loop does not start on an error that the user's own code raises, on a draw with
    ``randomness="error"``, or on an error about shapes, dtypes or devices.

    Args:
        error: that a call under vmap has raised.

    Returns:
        What is known of it; None where the error stands.
    """
    if not isinstance(error, RuntimeError) or _is_of_user(error):
        return None
    refusal = refusal_of(error)
    return refusal if refusal is not None and refusal.why else None


def is_of_checkpoint(error: BaseException) -> bool:
    """Whether vmap has refused a call of torch.utils.checkpoint itself, and not what
    the checkpointed function does."""
    names = [frame.f_globals.get("__name__") or "" for frame in frames_of(error)]
    while names and names[-1].startswith(_BELOW) and names[-1] != CHECKPOINT:
        names.pop()
    return bool(names) and names[-1] == CHECKPOINT


CHECKPOINT = "torch.utils.checkpoint"
# Modules whose frames may lie inside that call. Layers and losses do not.
_BELOW = ("torch.autograd.", "torch._", "torch.o", "contextlib", "vmapsafe.")


def is_of_reentrant_checkpoint(error: BaseException) -> bool:
    """Whether backward has met a checkpoint with ``use_reentrant=True``, which does not
    run where gradients by some tensors alone are asked for."""
    return "use_reentrant=True, torch.utils.checkpoint is incompatible" in str(error)


def frames_of(error: BaseException) -> Iterator[FrameType]:
    """Those that an error has left, the innermost last."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is_of_user(error: BaseException) -> bool:
    """Whether a ``raise`` outside torch and this package has raised it.

    An error of torch's C++ code seems to come from the line that calls torch. So the
    instruction tells, and not the file alone.
    """
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    instruction = code.co_code[traceback.tb_lasti]
    return instruction == _RAISE and not code.co_filename.startswith(_KNOWN)


_RAISE = dis.opmap["RAISE_VARARGS"]
_KNOWN = tuple(
    [
        os.path.dirname(path) + os.sep
        for path in (torch.__file__, os.path.dirname(__file__))
    ]
)
