"""Batch norm and instance norm: what normalises a slice, and that nothing is written.

``F.batch_norm`` is a layer's own call when a covered layer is running; a call on
weights, as in a weight-standardised convolution, is not, and keeps its meaning.

torch's own kernels (2.13) are silently wrong in two places, and no call goes to them
there, in no mode:

* in the second derivative with forward mode and in the third by reverse mode, as they
  hold the saved statistics constant (pytorch/pytorch#196699, #186256);
* on the CPU in the backward where a dimension has the length 1 and input and gradient
  lie in memory in two orders. They take both orders for the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vmapsafe._call import Call
from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import MODES, groups_for
from vmapsafe._rule import FunctionRule, register, slice_by_slice
from vmapsafe._torch import (
    autocasts,
    batched_levels,
    beyond_reverse_mode,
    innermost,
    merging,
    recorded,
)

Dims = Sequence[int | None]
_HALVES = (torch.float16, torch.bfloat16)


def of_a_layer(call: Call) -> bool:
    """Whether a layer that the block covers, and that is not frozen, calls."""
    return call.site is not None and call.site.layer is not None


def _uses_own_statistics(call: Call) -> bool:
    """Whether the input's statistics are asked for, as by a layer that has no running
    ones in every mode, and torch would update none but the model's."""
    return bool(call["training"]) and (
        of_a_layer(call) or call["running_mean"] is None or writes_statistics(call)
    )


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
        raise VmapSafeValueError(
            *_one_value(
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
    FunctionRule(
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
        raise VmapSafeValueError(
            *_one_value(
                call,
                f"each of {groups} groups of {channels} channels",
                "Pass a num_groups that divides the channels into fewer groups (where "
                'it does not divide them, each channel is a group), or use mode="eval"',
            )
        )
    y = by_groups(x, groups, call["weight"], call["bias"], call["eps"])
    # Of an empty batch vmap forgets the length of the slices (torch 2.13).
    return y if y.shape == x.shape else x.to(y.dtype, copy=True)


def _plain_group_norm(call: Call) -> Tensor:
    assert call.site is not None
    x = call["input"]
    groups = groups_for(x.size(1), call.site.num_groups)
    grouped = x.reshape(x.size(0), groups, x.size(1) // groups, *x.shape[2:])
    return _normalised(call, grouped, list(range(2, grouped.dim())), x.shape)


register(
    FunctionRule(
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
    return not torch.compiler.is_compiling() and innermost(call["input"]).numel() == 0


def _staying_in_eval(call: Call) -> Tensor:
    if _is_empty(call):
        return torch.clone(call["input"])
    flag = "training" if call.function is F.batch_norm else "use_input_stats"
    stays = Call(call.function, {**call.arguments, flag: False}, call.site)
    if _reads_statistics(stays):
        return _by_running_statistics(stays)
    y: Tensor = call.function(**stays.arguments)
    return y


register(
    FunctionRule(
        name="batch_norm, layers that stay in eval mode",
        functions=(F.batch_norm,),
        modes=MODES,
        accepts=_asks_for_its_own,
        batched=_staying_in_eval,
        reference=slice_by_slice(lambda call: _plain_by_running_statistics(call)),
    )
)

register(
    FunctionRule(
        name="instance_norm, layers that stay in eval mode",
        functions=(F.instance_norm,),
        modes=MODES,
        accepts=_asks_for_its_own,
        batched=_staying_in_eval,
        reference=slice_by_slice(lambda call: _plain_by_running_statistics(call)),
    )
)


# -- Every mode: a forward does not write to the running statistics ------------------


register(
    FunctionRule(
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
        raise VmapSafeValueError(
            *_one_value(call, "each channel", 'Use larger samples, or mode="eval"')
        )
    if torchs_own_fails(x, weight, bias):
        y = normalised(x, list(range(2, x.dim())), call["eps"])
        return scaled_and_shifted(y, weight, bias).to(x.dtype)
    flat = x.flatten(2)
    if recorded(x, weight, bias):
        as_channels = flat.reshape(1, -1, flat.size(2))
        weight, bias = (p if p is None else p.repeat(len(x)) for p in (weight, bias))
        y = _fused_batch_norm(as_channels, weight, bias, call["eps"])
    else:
        y = F.instance_norm(flat, None, None, weight, bias, True, 0.0, call["eps"])
    return y.view(x.shape)


def plain_instance_norm(call: Call) -> Tensor:
    """Slow form of :func:`instance_norm_unwritten`."""
    x = call["input"]
    return _normalised(call, x, list(range(2, x.dim())))


def _uses_own_statistics_of_samples(call: Call) -> bool:
    x: Tensor = call["input"]
    if call["running_mean"] is not None or not call["use_input_stats"]:
        return writes_statistics(call)
    return x.dim() > 2 and x.numel() > x.size(0) * x.size(1)


register(
    FunctionRule(
        name="instance_norm, statistics of the slice",
        functions=(F.instance_norm,),
        modes=("no_running_stats",),
        accepts=of_a_layer,
        batched=instance_norm_unwritten,
        reference=slice_by_slice(plain_instance_norm),
    )
)

register(
    FunctionRule(
        name="instance_norm, statistics not written",
        functions=(F.instance_norm,),
        modes=MODES,
        accepts=_uses_own_statistics_of_samples,
        batched=instance_norm_unwritten,
        reference=slice_by_slice(plain_instance_norm),
    )
)


# -- Every mode: running statistics, for layers in eval mode -------------------------


def _reads_statistics(call: Call) -> bool:
    """Whether torch's own would be wrong, fail or crawl: it raises in vmap(grad) for
    dtypes that differ, as under autocast, and becomes a loop over the slices where
    torch.compile traces it (read in torch 2.13)."""
    x: Tensor = call["input"]
    mean = call["running_mean"]
    use_input = call.arguments.get("training", call.arguments.get("use_input_stats"))
    if use_input or mean is None or call["running_var"] is None:
        return False
    as_one = call.function is F.instance_norm  # it makes one sample of all
    if has_own_weights(call) and not as_one:
        return False  # left to _record
    ambiguous = x.dim() > 3 and as_one or has_several_layouts(x)
    return ambiguous or _torchs_own_crawls(call)


def _torchs_own_crawls(call: Call) -> bool:
    x: Tensor = call["input"]
    differs = x.dtype != call["running_mean"].dtype
    return torch.compiler.is_compiling() or differs or autocasts(x.device)


def _by_running_statistics(call: Call) -> Tensor:
    if _torchs_own_crawls(call):
        return by_running_statistics(call)
    x = call["input"]
    named = ("running_mean", "running_var", "weight", "bias", "eps")
    y = F.batch_norm(x.flatten(2), **{name: call[name] for name in named})
    return y.view(x.shape)


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
    FunctionRule(
        name="batch_norm, running statistics",
        functions=(F.batch_norm, F.instance_norm),
        modes=MODES,
        accepts=_reads_statistics,
        batched=_by_running_statistics,
        reference=slice_by_slice(_plain_by_running_statistics),
    )
)


# -- Every mode: a batch of one in another layout --------------------------------------
#
# torch's kernel on the CPU (2.13) is silently wrong in the backward of a batch of one
# whose input is channels-last and whose output gradient is not, or the other way round;
# so of images of one row or one column. Instance norm is batch norm of a batch of one.
# With three dimensions there is one layout.


def has_several_layouts(x: Tensor) -> bool:
    """Whether the input of a batch norm is such a batch."""
    return x.dim() > 3 and 1 in x.shape and x.device.type == "cpu"


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
    FunctionRule(
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
    FunctionRule(
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
    if torchs_own_fails(x, weight, bias):
        y = normalised(x, [d for d in range(x.dim()) if d != 1], eps)
        return scaled_and_shifted(y, weight, bias).to(x.dtype)
    flat = x.flatten(2) if has_several_layouts(x) else x
    if recorded(x, weight, bias):
        y = _fused_batch_norm(flat, weight, bias, eps)
    else:
        y = F.batch_norm(flat, None, None, weight, bias, True, 0.0, eps)
    return y.view(x.shape)


def by_groups(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm."""
    fails = torchs_own_fails(x, weight, bias)
    if not fails and not batched_levels((x,)):
        # torch's backward can end the process where channels lie last (2.13).
        return F.group_norm(x.contiguous(), groups, weight, bias, eps)
    grouped = x.reshape(x.size(0), groups, x.shape[1:].numel() // groups)
    if fails:
        y = normalised(grouped, [2], eps).reshape(x.shape)
        given = F.group_norm(specimen(x), 1).dtype
        return scaled_and_shifted(y, weight, bias).to(given)
    # torch's group norm asks for a layout that vmap cannot tell; layer norm does not.
    y = fused_layer_norm(grouped, grouped.shape[2:], None, None, eps)
    return scaled_and_shifted(y.reshape(x.shape), weight, bias)


def fused_layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Layer norm where :func:`torchs_own_fails` says no."""
    if not recorded(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)

    def plain(*tensors: Tensor | None) -> Tensor:
        y: Tensor = LayerNorm.apply(*tensors, tuple(shape), eps)
        return y

    def merged(size: int, dims: Dims, tensors: Sequence[Tensor | None]) -> Tensor:
        x, weight, bias = tensors
        assert x is not None
        if dims[1] is None and dims[2] is None:
            assert dims[0] is not None
            return merging(merged, plain, (x.movedim(dims[0], 0), weight, bias))
        x, weight, bias = _expanded(size, dims, tensors)
        y = merging(merged, plain, (x, None, None))
        ones = [1 for _ in range(x.dim() - 1 - len(shape))]
        if weight is not None:
            y = y * weight.reshape(size, *ones, *shape)
        if bias is not None:
            y = y + bias.reshape(size, *ones, *shape)
        return y

    return merging(merged, plain, (x, weight, bias))


def _fused_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm by the statistics of ``x``, where :func:`recorded` says yes."""

    def plain(*tensors: Tensor | None) -> Tensor:
        y: Tensor = BatchNorm.apply(*tensors, eps)
        return y

    def merged(size: int, dims: Dims, tensors: Sequence[Tensor | None]) -> Tensor:
        x, *affine = _expanded(size, dims, tensors)
        n, channels = x.shape[1:3]
        affine = [p if p is None else p.flatten() for p in affine]
        as_channels = x.movedim(1, 0).reshape(n, size * channels, *x.shape[3:])
        y = merging(merged, plain, (as_channels, *affine))
        return y.view(n, size, channels, *x.shape[3:]).movedim(1, 0)

    return merging(merged, plain, (x, weight, bias))


class BatchNorm(Function):
    """torch's kernel by the statistics of ``x``, where only plain autograd takes
    derivatives: the first by torch's kernel, all others written out."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        found = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, bias, *found[1:])
        ctx.eps = eps
        return found[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        asked = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            y = normalised(x, [d for d in range(x.dim()) if d != 1], ctx.eps)
            y = scaled_and_shifted(y, weight, bias).to(x.dtype)
            return *_gradients(y, (x, weight, bias), asked, grads[0]), None
        rest = None, None, mean, rstd, True, ctx.eps, asked
        backward = torch.ops.aten.native_batch_norm_backward
        return *backward(grads[0], x, weight, *rest), None


class LayerNorm(Function):
    """As :class:`BatchNorm`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        found = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, *found[1:])
        ctx.shape, ctx.eps = shape, eps
        return found[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        asked = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            y = layer_norm_written_out(x, ctx.shape, weight, bias, ctx.eps).to(x.dtype)
            return *_gradients(y, (x, weight, bias), asked, grads[0]), None, None
        # The kernel on the CPU reads the incoming gradient as if it were contiguous.
        given = grads[0].contiguous(), x, ctx.shape, mean, rstd, weight, bias, asked
        return *torch.ops.aten.native_layer_norm_backward(*given), None, None


def _expanded(size: int, dims: Dims, tensors: Sequence[Tensor | None]) -> list[Any]:
    """Each with a batch dimension in front."""
    batches = []
    for t, dim in zip(tensors, dims):
        if t is not None:
            t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        batches.append(t)
    return batches


def _gradients(
    y: Tensor, inputs: Sequence[Tensor | None], asked: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Those that can be differentiated again."""
    wanted = [t for t, ask in zip(inputs, asked) if ask and t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if ask else None for ask in asked]


def layer_norm_written_out(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """In plain operations; wide."""
    y = normalised(x, list(range(-len(shape), 0)), eps)
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y


def torchs_own_fails(x: Tensor, *affine: Tensor | None) -> bool:
    """Whether torch's own normalisation by statistics of ``x`` is not right in every
    derivative that may be taken, or raises under vmap, as it does where weights are
    wider than the input, under autocast say."""
    return (
        beyond_reverse_mode(x, *affine)
        or autocasts(x.device)
        or x.dtype in _HALVES
        and any([t is not None and t.dtype == torch.float32 for t in affine])
    )


def normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """In plain operations, which can be differentiated any number of times; wide."""
    x = wide(x)
    centred = x - x.mean(dims, keepdim=True)
    var = centred.square().mean(dims, keepdim=True)
    return centred * torch.rsqrt(var + eps)


def specimen(x: Tensor) -> Tensor:
    """Two numbers like those of ``x``, to see which dtype autocast makes of them."""
    return torch.ones((1, 1, 2), dtype=x.dtype, device=x.device)


def scaled_and_shifted(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * weight + bias, by channel."""
    if weight is not None:
        y = y * per_channel(weight, y)
    if bias is not None:
        y = y + per_channel(bias, y)
    return y


def wide(x: Tensor) -> Tensor:
    """In the dtype in which torch's kernels normalise."""
    return x.float() if x.dtype in _HALVES else x


def per_channel(values: Tensor, y: Tensor) -> Tensor:
    """(C,) in the shape that broadcasts against ``y`` (N, C, ...)."""
    return values.reshape([len(values) if d == 1 else 1 for d in range(y.dim())])


def _one_value(call: Call, per: str, do: str) -> tuple[str, str, str]:
    """The parts of an error: one value has no spread, so normalised it is 0, and the
    output is the bias."""
    assert call.site is not None
    return (
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
