"""Batch norm and instance norm: what normalises a slice, and that nothing is written.

``F.batch_norm`` is a layer's own call when a covered layer is running; a call on
weights, as in a weight-standardised convolution, is not, and is left alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call, beyond_reverse_mode
from vmapsafe._errors import worded
from vmapsafe._groups import groups_for
from vmapsafe._rule import MODES, Rule, register, slice_by_slice


def _of_a_layer(call: Call) -> bool:
    return call.site is not None and call.site.layer is not None


def _uses_own_statistics(call: Call) -> bool:
    """Whether a layer asks for the statistics of its input, as one that has no running
    ones does in every mode, or torch would update those."""
    return bool(call["training"]) and _of_a_layer(call) or _writes_statistics(call)


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


def _by_own_statistics(call: Call) -> Tensor:
    x = call["input"]
    if x.numel() == x.size(1):
        raise ValueError(
            _one_value(
                call,
                "each channel",
                'Use larger slices, or mode="eval" where there are running statistics',
            )
        )
    if beyond_reverse_mode():
        return _in_plain_operations(call, [d for d in range(x.dim()) if d != 1])
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
        batched=_by_own_statistics,
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
    x = x.contiguous()  # group_norm asks vmap for a layout it cannot tell
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


register(
    Rule(
        name="batch_norm, statistics not written",
        functions=(F.batch_norm,),
        modes=MODES,
        accepts=_uses_own_statistics,
        batched=_by_own_statistics,
        reference=slice_by_slice(_plain_batch_norm),
    )
)


def _instance_norm_unwritten(call: Call) -> Tensor:
    x = call["input"]
    if x.numel() == x.size(0) * x.size(1):
        raise ValueError(
            _one_value(call, "each channel", 'Use larger samples, or mode="eval"')
        )
    if beyond_reverse_mode():
        return _in_plain_operations(call, list(range(2, x.dim())))
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


# -- Every mode: running statistics, for layers in eval mode -------------------------


def _reads_statistics(call: Call) -> bool:
    return (
        not call["training"]
        and call["running_mean"] is not None
        and call["running_var"] is not None
    )


def _by_running_statistics(call: Call) -> Tensor:
    """An affine map. torch's own raises in vmap(grad) under autocast, and becomes a
    loop over the slices where torch.compile traces it (read in torch 2.13)."""
    x = _wide(call["input"])
    scale = torch.rsqrt(_wide(call["running_var"]) + call["eps"])
    if call["weight"] is not None:
        scale = scale * _wide(call["weight"])
    shift = -_wide(call["running_mean"]) * scale
    if call["bias"] is not None:
        shift = shift + _wide(call["bias"])
    y = torch.addcmul(_per_channel(shift, x), x, _per_channel(scale, x))
    return y.to(call["input"].dtype)


def _plain_by_running_statistics(call: Call) -> Tensor:
    x = call["input"]
    at_channel = [-1 if d == 1 else 1 for d in range(x.dim())]
    mean = call["running_mean"].reshape(at_channel)
    var = call["running_var"].reshape(at_channel)
    return _scaled(call, (x - mean) / torch.sqrt(var + call["eps"]))


register(
    Rule(
        name="batch_norm, running statistics",
        functions=(F.batch_norm,),
        modes=MODES,
        accepts=_reads_statistics,
        batched=_by_running_statistics,
        reference=slice_by_slice(_plain_by_running_statistics),
    )
)


# -- What they share -------------------------------------------------------------------


def _in_plain_operations(call: Call, dims: list[int]) -> Tensor:
    """Normalisation over ``dims`` that can be differentiated any number of times.

    torch's own batch norm is silently wrong in the second derivative with forward mode
    and in the third by reverse mode, as it holds the saved statistics constant
    (pytorch/pytorch#196699, #186256; measured again in 2.13).
    """
    x = _wide(call["input"])
    centred = x - x.mean(dims, keepdim=True)
    var = centred.square().mean(dims, keepdim=True)
    return _affine(call, centred * torch.rsqrt(var + call["eps"]))


def _wide(x: Tensor) -> Tensor:
    """In the dtype in which torch's kernels normalise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _affine(call: Call, y: Tensor) -> Tensor:
    if call["weight"] is not None:
        y = y * _per_channel(call["weight"], y)
    if call["bias"] is not None:
        y = y + _per_channel(call["bias"], y)
    return y.to(call["input"].dtype)


def _per_channel(values: Tensor, y: Tensor) -> Tensor:
    return values.reshape([-1 if d == 1 else 1 for d in range(y.dim())])


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
    y = (x - mean) / torch.sqrt(var + call["eps"])
    return _scaled(call, y.reshape(shape or x.shape))


def _scaled(call: Call, y: Tensor) -> Tensor:
    at_channel = [-1 if d == 1 else 1 for d in range(y.dim())]
    if call["weight"] is not None:
        y = y * call["weight"].reshape(at_channel)
    if call["bias"] is not None:
        y = y + call["bias"].reshape(at_channel)
    return y
