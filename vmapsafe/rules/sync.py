r"""Mode "sync": batch norm by the statistics of all slices of the vmapped axis.

The result is that of an un-vmapped ``model(x)`` in training mode, or of SyncBatchNorm
with the vmapped axis as its process group. There are two ways to the same numbers:

* If no derivative is taken inside the vmap, the slices become one batch, and torch's
  own kernel runs on it. Outputs and running statistics are bit-identical to those of
  the un-vmapped layer.
* Otherwise the rule uses ordinary operations around one primitive, the sum over the
  merged axes

  .. math:: S(a)_i = \sum_j a_j

  This sum is its own adjoint and its own tangent map, so every derivative follows.
  Reverse mode inside the vmap gives contributions, :math:`\sum_j \partial \ell_j /
  \partial \theta^{(i)}`. Forward mode inside gives :math:`\sum_j \partial out_i /
  \partial x_j\, v_j`.

The rule merges only levels at which the layer's *input* is batched. It never merges
a level at which only a cotangent or a tangent is batched, such as that of a ``jacrev``
around the call. To see the difference, the primitive takes the input as an extra
argument, its anchor.

SyncBatchNorm in several processes adds its process group to the sum. Then each process
gets the gradient of the sum of all processes' losses by its own inputs and its own copy
of the parameters, as from SyncBatchNorm. All processes must make the same calls in the
same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vmapsafe._call import Call
from vmapsafe._errors import VmapSafeRuntimeError, VmapSafeValueError
from vmapsafe._rule import FunctionRule, register
from vmapsafe._torch import (
    current_level,
    derivatives_inside,
    vmap_size,
    whole_while_compiling,
)
from vmapsafe.rules import references
from vmapsafe.rules.normalisation import (
    has_own_weights,
    of_a_layer,
    own_statistics,
    per_channel,
    scaled_and_shifted,
)
from vmapsafe.rules.precision import wide
from vmapsafe.rules.running_statistics import (
    Levels,
    update_running_statistics,
    with_count,
)


@whole_while_compiling
class SumOverMerged(Function):
    """The sum over the merged levels and the process group, the same for each slice.

    ``anchor`` is the layer's input. The sum runs over a merged level if ``anchor`` is
    batched there.
    """

    @staticmethod
    def forward(a: Tensor, anchor: Tensor, merged: Levels, group: Any) -> Tensor:
        a = a.clone(memory_format=torch.contiguous_format)  # for all_reduce
        if group is not None:
            dist.all_reduce(a, group=group)
        return a

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, anchor, ctx.merged, ctx.group = inputs
        ctx.save_for_backward(anchor)
        ctx.save_for_forward(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (anchor,) = ctx.saved_tensors
        total = SumOverMerged.apply(grads[0], anchor, ctx.merged, ctx.group)
        return total, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (anchor,) = ctx.saved_tensors
        return SumOverMerged.apply(tangents[0], anchor, ctx.merged, ctx.group)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        a: Tensor,
        anchor: Tensor,
        merged: Levels,
        group: Any,
    ) -> tuple[Tensor, int | None]:
        a_dim, anchor_dim = in_dims[:2]
        merges = anchor_dim is not None and current_level() + 1 in merged
        if anchor_dim is not None:  # it still shows the levels below
            anchor = anchor.select(anchor_dim, 0)
        if a_dim is None:
            total = SumOverMerged.apply(a, anchor, merged, group)
            return (total * info.batch_size if merges else total), None
        if merges:
            return SumOverMerged.apply(a.sum(a_dim), anchor, merged, group), None
        return SumOverMerged.apply(a.movedim(a_dim, 0), anchor, merged, group), 0


@whole_while_compiling
class AsOneBatch(Function):
    """torch's own batch norm on the merged batch, if no derivative is taken inside."""

    @staticmethod
    def forward(*args: Any) -> Any:
        raise AssertionError("the vmap rule of a merged level always removes it")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        merged: Levels,
    ) -> tuple[Tensor, int]:
        level = current_level() + 1
        if level in merged:
            x = x.movedim(in_dims[0], 0)
            rest = tuple([m for m in merged if m != level])
            y = _as_one_batch(x.flatten(0, 1), weight, bias, eps, rest)
            return y.reshape(x.shape), 0
        members = [
            _as_one_batch(x_, weight_, bias_, eps, merged)
            for x_, weight_, bias_ in _members(
                info.batch_size, in_dims, x, weight, bias
            )
        ]
        return torch.stack(members), 0


def _members(
    size: int, in_dims: Any, *tensors: Tensor | None
) -> list[list[Tensor | None]]:
    """The tensors of each member of a level that is not merged, such as an ensemble."""
    return [
        [
            t if t is None or dim is None else t.select(dim, i)
            for t, dim in zip(tensors, in_dims)
        ]
        for i in range(size)
    ]


def _as_one_batch(x: Any, weight: Any, bias: Any, eps: float, merged: Levels) -> Tensor:
    if merged:
        y: Tensor = AsOneBatch.apply(x, weight, bias, eps, merged)
        return y
    return own_statistics(x, weight, bias, eps)


# -- The rule --------------------------------------------------------------------------


def _across_slices(call: Call) -> Tensor:
    site, x = call.site, call["input"]
    assert site is not None and site.layer is not None
    merged = site.merged_levels(x)
    group = site.process_group
    one_value = x.numel() == x.size(1) > 0 and group is None
    if one_value and all([vmap_size(level) == 1 for level in merged]):
        raise VmapSafeValueError(
            f"batch_norm of {site.path()}",
            f"input of shape {tuple(x.shape)}, over all slices, has one value for "
            "each channel, which would leave only the bias",
            'Use more slices, or mode="eval"',
        )
    if merged and derivatives_inside(merged[0]) > 1:
        raise VmapSafeRuntimeError(
            f"batch_norm of {site.path()}",
            "a derivative of a derivative inside the vmap, which has no agreed "
            'meaning where mode="sync" mixes the slices',
            "Take one of the two outside the vmap, as in hessian(lambda p: "
            "vmap(f)(p, x).sum()), or use another mode",
        )
    if site.rows == "jacobian" and group is not None:
        raise VmapSafeRuntimeError(
            f"batch_norm of {site.path()}",
            f"statistics of {dist.get_world_size(group)} processes, where a row of "
            'rows="jacobian" would mix losses of all of them',
            'Use rows="contribution", or one process',
        )
    if torch.compiler.is_compiling() and group is not None:
        raise VmapSafeRuntimeError(
            f"batch_norm of {site.path()}",
            f"statistics of {dist.get_world_size(group)} processes, which "
            "torch.compile cannot trace",
            'Run it without torch.compile, or without mode="sync"',
        )
    if site.update_running_stats:
        update_running_statistics(call, merged, group)
    inside = merged and derivatives_inside(merged[0]) > 0
    detached = site.rows == "detached"
    if group is None and not inside and not detached:
        if not has_own_weights(call):
            return _as_one_batch(x, call["weight"], call["bias"], call["eps"], merged)
        y = wide(_as_one_batch(x, None, None, call["eps"], merged))
        return scaled_and_shifted(y, call["weight"], call["bias"]).to(x.dtype)
    return _by_sums(call, merged, group, detached)


def _by_sums(call: Call, merged: Levels, group: Any, detached: bool) -> Tensor:
    x = wide(call["input"])
    dims = [d for d in range(x.dim()) if d != 1]
    source = x.detach() if detached else x

    def total(values: Tensor) -> Tensor:
        summed: Tensor = SumOverMerged.apply(values, source, merged, group)
        return summed

    sums = total(with_count(source.sum(dims), x))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    squares = (source - per_channel(mean, x)).square().sum(dims)
    var = total(squares) / count
    y = (x - per_channel(mean, x)) * per_channel(torch.rsqrt(var + call["eps"]), x)
    return scaled_and_shifted(y, call["weight"], call["bias"]).to(call["input"].dtype)


def _whole_batch(call: Call) -> Tensor:
    """Batch norm of the merged batch, split into slices again."""
    x: Tensor = call["input"]
    merged = {**call.arguments, "input": x.flatten(0, 1)}
    return references.batch_norm(Call(call.function, merged)).view(x.shape)


register(
    FunctionRule(
        name="batch_norm, statistics across the vmapped axis",
        functions=(F.batch_norm,),
        modes=("sync",),
        accepts=of_a_layer,
        batched=_across_slices,
        reference=_whole_batch,
    )
)
