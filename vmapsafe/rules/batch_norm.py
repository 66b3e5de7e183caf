"""Batch norm and instance norm: what normalises a slice, and that nothing is written.

``F.batch_norm`` is a layer's own call when a covered layer is running; a call on
weights, as in a weight-standardised convolution, is not, and is left alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call
from vmapsafe._errors import worded
from vmapsafe._groups import groups_for
from vmapsafe._rule import MODES, Rule, register, slice_by_slice


def _of_a_layer(call: Call) -> bool:
    return call.site is not None and call.site.layer is not None


def _writes_statistics(call: Call) -> bool:
    """Whether torch would update running statistics that are the model's buffers."""
    mean = call["running_mean"]
    use_input = call.arguments.get("training", call.arguments.get("use_input_stats"))
    return (
        bool(use_input)
        and mean is not None
        and call.site is not None
        and call.site.holds(mean)
    )


# -- "no_running_stats": the statistics of the slice ---------------------------------


def _batch_norm_of_slice(call: Call) -> Tensor:
    x = call["input"]
    if x.numel() == x.size(1):
        raise ValueError(
            _one_value(call, "each channel", 'Use mode="eval", or larger slices')
        )
    return F.batch_norm(
        x, None, None, call["weight"], call["bias"], True, 0.0, call["eps"]
    )


def _plain_batch_norm(call: Call) -> Tensor:
    x = call["input"]
    return _normalised(call, x, [d for d in range(x.dim()) if d != 1])


register(
    Rule(
        name="batch_norm, statistics of the slice",
        functions=(F.batch_norm,),
        modes=("no_running_stats",),
        accepts=_of_a_layer,
        batched=_batch_norm_of_slice,
        reference=slice_by_slice(_plain_batch_norm),
    )
)


# -- "group_norm": groups of channels of each sample ---------------------------------


def _group_norm(call: Call) -> Tensor:
    assert call.site is not None
    x = call["input"]
    channels = x.size(1)
    groups = groups_for(channels, call.site.num_groups)
    if x.numel() == x.size(0) * groups:
        raise ValueError(
            _one_value(
                call,
                f"each of {groups} groups of {channels} channels",
                "Pass a num_groups that divides the channels into fewer groups (where "
                'it does not divide them, each channel is a group), or use mode="eval"',
            )
        )
    return F.group_norm(x, groups, call["weight"], call["bias"], call["eps"])


def _plain_group_norm(call: Call) -> Tensor:
    assert call.site is not None
    x = call["input"]
    groups = groups_for(x.size(1), call.site.num_groups)
    grouped = x.reshape(x.size(0), groups, x.size(1) // groups, *x.shape[2:])
    return _normalised(call, grouped, list(range(2, grouped.dim())), x.shape)


register(
    Rule(
        name="batch_norm, groups of channels",
        functions=(F.batch_norm,),
        modes=("group_norm",),
        accepts=_of_a_layer,
        batched=_group_norm,
        reference=slice_by_slice(_plain_group_norm),
    )
)


# -- Every mode: a forward does not write to the running statistics ------------------


def _batch_norm_unwritten(call: Call) -> Tensor:
    return F.batch_norm(
        call["input"], None, None, call["weight"], call["bias"], True, 0.0, call["eps"]
    )


register(
    Rule(
        name="batch_norm, statistics not written",
        functions=(F.batch_norm,),
        modes=MODES,
        accepts=_writes_statistics,
        batched=_batch_norm_unwritten,
        reference=slice_by_slice(_plain_batch_norm),
    )
)


def _instance_norm_unwritten(call: Call) -> Tensor:
    x = call["input"]
    if x.numel() == x.size(0) * x.size(1):
        raise ValueError(
            _one_value(call, "each channel", 'Use mode="eval", or larger samples')
        )
    return F.instance_norm(
        x, None, None, call["weight"], call["bias"], True, 0.0, call["eps"]
    )


def _plain_instance_norm(call: Call) -> Tensor:
    x = call["input"]
    return _normalised(call, x, list(range(2, x.dim())))


register(
    Rule(
        name="instance_norm, statistics not written",
        functions=(F.instance_norm,),
        modes=MODES,
        accepts=_writes_statistics,
        batched=_instance_norm_unwritten,
        reference=slice_by_slice(_plain_instance_norm),
    )
)


# -- What they share -------------------------------------------------------------------


def _one_value(call: Call, per: str, do: str) -> str:
    """One value has no spread: normalised it is 0, and the output is the bias."""
    assert call.site is not None
    return worded(
        f"{call.function.__name__} of {call.site.path()}",
        f"input of shape {tuple(call['input'].shape)} has one value for {per}, which "
        "would leave only the bias",
        do,
    )


def _normalised(
    call: Call, x: Tensor, dims: list[int], shape: torch.Size | None = None
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, as written (Ioffe and Szegedy,
    https://arxiv.org/abs/1502.03167, algorithm 1)."""
    mean = x.mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    y = ((x - mean) / torch.sqrt(var + call["eps"])).reshape(shape or x.shape)
    per_channel = [-1 if d == 1 else 1 for d in range(y.dim())]
    if call["weight"] is not None:
        y = y * call["weight"].reshape(per_channel)
    if call["bias"] is not None:
        y = y + call["bias"].reshape(per_channel)
    return y
