"""Batch norm and instance norm: what normalises a slice, and that nothing is written.

``F.batch_norm`` is a layer's own call when a covered layer is running; a call on
weights, as in a weight-standardised convolution, is not, and is left alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import (
    Call,
    autocasts,
    batched_levels,
    beyond_reverse_mode,
    innermost,
)
from vmapsafe._errors import worded
from vmapsafe._groups import groups_for
from vmapsafe._rule import MODES, Rule, register, slice_by_slice


def of_a_layer(call: Call) -> bool:
    """Whether a layer that the block covers, and that is not frozen, calls."""
    return call.site is not None and call.site.layer is not None


def _uses_own_statistics(call: Call) -> bool:
    """Whether a layer asks for the statistics of its input, as one that has no running
    ones does in every mode, or torch would update those."""
    site = call.site
    if call["training"] and site is not None:
        if site.layer is not None or site.stays_in_eval:
            return True
    return writes_statistics(call)


def writes_statistics(call: Call) -> bool:
    """Whether torch would update running statistics that are the model's buffers."""
    mean = call["running_mean"]
    use_input = call.arguments.get("training", call.arguments.get("use_input_stats"))
    return (
        bool(use_input)
        and mean is not None
        and call.site is not None
        and call.site.holds(mean)
    )


def has_own_weights(call: Call) -> bool:
    """Whether each slice has a copy of the layer's weights, to get rows from."""
    if call.site is None or call.site.copies_at is None:
        return False
    given = [p for p in (call["weight"], call["bias"]) if p is not None]
    return call.site.copies_at in batched_levels(given)


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
    return own_statistics(x, call["weight"], call["bias"], call["eps"])


def _plain_batch_norm(call: Call) -> Tensor:
    x = call["input"]
    return _normalised(call, x, [d for d in range(x.dim()) if d != 1])


register(
    Rule(
        name="batch_norm, statistics of the slice",
        functions=(F.batch_norm,),
        modes=("no_running_stats",),
        accepts=of_a_layer,
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
    y = F.group_norm(x, groups, call["weight"], call["bias"], call["eps"])
    # Of an empty batch vmap forgets the length of the slices (torch 2.13).
    return y if y.shape == x.shape else x.to(y.dtype, copy=True)


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
        accepts=of_a_layer,
        batched=_group_norm,
        reference=slice_by_slice(_plain_group_norm),
    )
)


# -- Layers that are to stay in eval mode ----------------------------------------------
#
# In "eval", or frozen by their owner. They ask for something else where torch.compile
# traces them, which does not see the flags they show, or where their buffers are passed
# by somebody else.


def _asks_for_its_own(call: Call) -> bool:
    asks = call.arguments.get("training", call.arguments.get("use_input_stats"))
    return (
        bool(asks)
        and call.site is not None
        and call.site.stays_in_eval
        and call["running_mean"] is not None
        and call["running_var"] is not None
    )


def _is_empty(call: Call) -> bool:
    """Then torch's backward ends the process (2.13)."""
    return innermost(call["input"]).numel() == 0


def _staying_in_eval(call: Call) -> Tensor:
    if _is_empty(call):
        return torch.clone(call["input"])
    stays = Call(F.batch_norm, {**call.arguments, "training": False}, call.site)
    if _reads_statistics(stays):
        return by_running_statistics(stays)
    return F.batch_norm(**stays.arguments)


def _instance_staying_in_eval(call: Call) -> Tensor:
    if _is_empty(call):
        return torch.clone(call["input"])
    return F.instance_norm(**{**call.arguments, "use_input_stats": False})


register(
    Rule(
        name="batch_norm, layers that stay in eval mode",
        functions=(F.batch_norm,),
        modes=MODES,
        accepts=_asks_for_its_own,
        batched=_staying_in_eval,
        reference=slice_by_slice(lambda call: _plain_by_running_statistics(call)),
    )
)

register(
    Rule(
        name="instance_norm, layers that stay in eval mode",
        functions=(F.instance_norm,),
        modes=MODES,
        accepts=_asks_for_its_own,
        batched=_instance_staying_in_eval,
        reference=slice_by_slice(lambda call: _plain_by_running_statistics(call)),
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


def instance_norm_unwritten(call: Call) -> Tensor:
    """By the statistics of each sample and channel."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    if x.numel() == x.size(0) * x.size(1):
        raise ValueError(
            _one_value(call, "each channel", 'Use larger samples, or mode="eval"')
        )
    if beyond_reverse_mode(x, weight, bias):
        dims = list(range(2, x.dim()))
        return _normalised_over(dims, x, weight, bias, call["eps"])
    flat = x.flatten(2)
    y = F.instance_norm(flat, None, None, weight, bias, True, 0.0, call["eps"])
    return y.view(x.shape)


def plain_instance_norm(call: Call) -> Tensor:
    """Slow form of :func:`instance_norm_unwritten`."""
    x = call["input"]
    return _normalised(call, x, list(range(2, x.dim())))


register(
    Rule(
        name="instance_norm, statistics of the slice",
        functions=(F.instance_norm,),
        modes=("no_running_stats",),
        accepts=of_a_layer,
        batched=instance_norm_unwritten,
        reference=slice_by_slice(plain_instance_norm),
    )
)

register(
    Rule(
        name="instance_norm, statistics not written",
        functions=(F.instance_norm,),
        modes=MODES,
        accepts=writes_statistics,
        batched=instance_norm_unwritten,
        reference=slice_by_slice(plain_instance_norm),
    )
)


# -- Every mode: running statistics, for layers in eval mode -------------------------


def _reads_statistics(call: Call) -> bool:
    """Whether torch's own would fail or crawl: it raises in vmap(grad) for dtypes that
    differ, as under autocast, and becomes a loop over the slices where torch.compile
    traces it (read in torch 2.13)."""
    mean = call["running_mean"]
    if call["training"] or mean is None or call["running_var"] is None:
        return False
    if has_own_weights(call):
        return False  # left to _record
    return (
        torch.compiler.is_compiling()
        or call["input"].dtype != mean.dtype
        or autocasts(call["input"].device)
    )


def by_running_statistics(call: Call) -> Tensor:
    """An affine map."""
    x = wide(call["input"])
    scale = torch.rsqrt(wide(call["running_var"]) + call["eps"])
    if call["weight"] is not None:
        scale = scale * wide(call["weight"])
    shift = -wide(call["running_mean"]) * scale
    if call["bias"] is not None:
        shift = shift + wide(call["bias"])
    y = torch.addcmul(per_channel(shift, x), x, per_channel(scale, x))
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
        batched=by_running_statistics,
        reference=slice_by_slice(_plain_by_running_statistics),
    )
)


# -- Every mode: a batch of one in another layout --------------------------------------
#
# torch's kernel on the CPU (2.13) is silently wrong in the backward of a batch of one
# whose input is channels-last and whose output gradient is not, or the other way round.
# Instance norm is batch norm of a batch of one. With three dimensions there is one
# layout.


def has_several_layouts(x: Tensor) -> bool:
    """Whether the input of a batch norm is such a batch."""
    return x.dim() > 3 and x.size(0) == 1 and x.device.type == "cpu"


def _is_batch_of_one(call: Call) -> bool:
    # Rows from copies are left to _record.
    return has_several_layouts(call["input"]) and not has_own_weights(call)


def _with_one_layout(call: Call) -> Tensor:
    x: Tensor = call["input"]
    flat = {**call.arguments, "input": x.flatten(2)}
    y: Tensor = call.function(**flat)
    return y.view(x.shape)


def _plain_batch_of_one(call: Call) -> Tensor:
    if call["training"] or call["running_mean"] is None:
        return _plain_batch_norm(call)
    return _plain_by_running_statistics(call)


register(
    Rule(
        name="batch_norm, a batch of one",
        functions=(F.batch_norm,),
        modes=MODES,
        accepts=_is_batch_of_one,
        batched=_with_one_layout,
        reference=slice_by_slice(_plain_batch_of_one),
    )
)


def _has_several_layouts(call: Call) -> bool:
    x: Tensor = call["input"]
    return x.dim() > 3 and x.device.type == "cpu"


def _plain_instance_norm_of_both_kinds(call: Call) -> Tensor:
    if call["use_input_stats"] or call["running_mean"] is None:
        return plain_instance_norm(call)
    return _plain_by_running_statistics(call)


register(
    Rule(
        name="instance_norm, all positions in one dimension",
        functions=(F.instance_norm,),
        modes=MODES,
        accepts=_has_several_layouts,
        batched=_with_one_layout,
        reference=slice_by_slice(_plain_instance_norm_of_both_kinds),
    )
)


# -- What they share -------------------------------------------------------------------


def own_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm by the statistics of ``x`` itself."""
    if beyond_reverse_mode(x, weight, bias):
        dims = [d for d in range(x.dim()) if d != 1]
        return _normalised_over(dims, x, weight, bias, eps)
    flat = x.flatten(2) if has_several_layouts(x) else x
    return F.batch_norm(flat, None, None, weight, bias, True, 0.0, eps).view(x.shape)


def _normalised_over(
    dims: list[int],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """In plain operations, which can be differentiated any number of times.

    torch's own batch norm is silently wrong in the second derivative with forward mode
    and in the third by reverse mode, as it holds the saved statistics constant
    (pytorch/pytorch#196699, #186256; measured again in 2.13).
    """
    centred = wide(x) - wide(x).mean(dims, keepdim=True)
    var = centred.square().mean(dims, keepdim=True)
    y = scaled_and_shifted(centred * torch.rsqrt(var + eps), weight, bias)
    return y.to(x.dtype)


def scaled_and_shifted(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * weight + bias, by channel."""
    if weight is not None:
        y = y * per_channel(weight, y)
    if bias is not None:
        y = y + per_channel(bias, y)
    return y


def wide(x: Tensor) -> Tensor:
    """In the dtype in which torch's kernels normalise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def per_channel(values: Tensor, y: Tensor) -> Tensor:
    """(C,) in the shape that broadcasts against ``y`` (N, C, ...)."""
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
