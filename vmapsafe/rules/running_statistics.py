"""Updates of running statistics, as a training step of the layer makes them.

Inside a block a layer does not update its own. If the block was asked for updates, the
rules of batch and instance norm call :func:`update_running_statistics`.

Slices that are merged are one batch, and update once. Slices that are not merged, such
as the members of an ensemble or tasks with statistics of their own, update buffers that
are batched as they are: each its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vmapsafe._call import Call
from vmapsafe._errors import VmapSafeRuntimeError, VmapSafeValueError
from vmapsafe._torch import (
    BatchNormBase,
    current_level,
    prepare_compiling,
    unseen_by_modes,
    whole_while_compiling,
)
from vmapsafe.rules.normalisation import per_channel
from vmapsafe.rules.precision import wide

Levels = tuple[int, ...]


def update_running_statistics(
    call: Call, merged: Levels = (), group: dist.ProcessGroup | None = None
) -> None:
    """Update the running statistics of the layer that makes a call.

    Args:
        call: of ``F.batch_norm`` or ``F.instance_norm``.
        merged: the vmap levels whose slices are one batch.
        group: the processes whose inputs are one batch.

    Raises:
        VmapSafeRuntimeError: torch.compile cannot trace the update.
    """
    site = call.site
    assert site is not None and site.layer is not None
    layer: Any = site.layer
    if isinstance(layer, BatchNormBase):
        # In the mode of the block, the layer may not pass them.
        if not site.tracks:
            return
        mean, var = layer.running_mean, layer.running_var
        count, momentum = layer.num_batches_tracked, layer.momentum
        if momentum is not None and call["training"] and call["running_mean"] is mean:
            momentum = call["momentum"]  # which a forward of its own may choose
    elif call["training" if call.function is F.batch_norm else "use_input_stats"]:
        # torch's instance norm does not count.
        mean, var, count = call["running_mean"], call["running_var"], None
        momentum = call["momentum"]
    else:
        return
    if mean is None or var is None:
        return
    if torch.compiler.is_compiling():
        prepare_compiling()
        if momentum is None:
            raise VmapSafeRuntimeError(
                f"batch_norm of {site.path()}",
                "momentum=None, whose average needs the value of a counter, which "
                "torch.compile cannot trace",
                "Run it without torch.compile, or without update_running_stats",
            )
    kernel = "batch_norm" if call.function is F.batch_norm else "instance_norm"
    given = call["input"], mean, var, count, momentum
    UpdateRunningStats.apply(*given, kernel, merged, group, site.path())


@whole_while_compiling
class UpdateRunningStats(Function):
    """One training step's update of a layer's buffers, in place, below all transforms.

    ``kernel`` names the function that writes them, "batch_norm" or "instance_norm". The
    call has an effect but not a result, so it returns a zero.

    Below levels that are not merged, ``mean`` and ``var`` are (*slices, C), ``count``
    is (*slices) and ``x`` is (*slices, N, C, ...). The kernel sees each channel of each
    slice as a channel.
    """

    @staticmethod
    def forward(
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor | None,
        momentum: float | None,
        kernel: str,
        merged: Levels,
        group: Any,
        label: str,
    ) -> Tensor:
        _refuse_shared_memory(label, mean, var, count)
        # Blocks around this one would leave these writes out, so hide them.
        with torch.no_grad(), unseen_by_modes():
            one = x.movedim(mean.dim() - 1, 0).flatten(1, mean.dim())
            factor: float | Tensor = 0.0 if momentum is None else momentum
            if count is not None:
                count.add_(1)
                if momentum is None and count.device.type == "cpu" and not count.dim():
                    factor = 1.0 / float(count)
                elif momentum is None:
                    factor = count.to(mean.dtype).reciprocal()
                    factor = factor.unsqueeze(-1).expand_as(mean).flatten()
            flat = mean.flatten(), var.flatten()
            if group is not None:
                _update_across_processes(wide(one), *flat, factor, group)
            elif not isinstance(factor, Tensor):
                getattr(F, kernel)(one, *flat, None, None, True, factor)
            else:  # the kernel takes numbers; to read one would wait for the device
                own = [torch.zeros_like(t) for t in flat]
                getattr(F, kernel)(one, *own, None, None, True, 1.0)
                for t, new in zip(flat, own):
                    t.lerp_(new, factor)
            if mean.dim() > 1:  # where flatten may have made a copy
                mean.copy_(flat[0].view_as(mean))
                var.copy_(flat[1].view_as(var))
        return x.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * 9

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, None]:
        merged, label = rest[2], rest[4]
        x_dim = in_dims[0]
        if x_dim is not None and current_level() + 1 in merged:
            batch = mean.dim() - 1  # N comes after the slices that were not merged
            x = x.movedim(x_dim, batch).flatten(batch, batch + 1)
            return UpdateRunningStats.apply(x, mean, var, count, *rest), None
        buffers = [mean, var] if count is None else [mean, var, count]
        dims = in_dims[1 : 1 + len(buffers)]
        if None in dims:
            raise VmapSafeValueError(
                f"update_running_stats=True for {label}",
                f"{info.batch_size} slices that are not merged share its buffers",
                "Pass stacked buffers to functional_call, one for each slice, as "
                "stack_module_state makes them, or leave update_running_stats (in "
                '"sync" also sync_levels) out',
            )
        x = (
            x.expand(info.batch_size, *x.shape)
            if x_dim is None
            else x.movedim(x_dim, 0)
        )
        mean, var, *counts = [b.movedim(d, 0) for b, d in zip(buffers, dims)]
        count = counts[0] if counts else None
        return UpdateRunningStats.apply(x, mean, var, count, *rest), None


def _refuse_shared_memory(label: str, *buffers: Tensor | None) -> None:
    """Raise if slices write to the same memory, as they would if it was expanded."""
    for buffer in buffers:
        if buffer is not None and 0 in buffer.stride():
            if any([s == 0 and n > 1 for s, n in zip(buffer.stride(), buffer.shape)]):
                raise VmapSafeValueError(
                    f"update_running_stats=True for {label}",
                    f"the slices' buffers, of shape {tuple(buffer.shape)}, are one in "
                    "memory",
                    "Pass copies, as in buffer.expand(...).clone()",
                )


def _update_across_processes(
    x: Tensor, mean: Tensor, var: Tensor, factor: float | Tensor, group: Any
) -> None:
    dims = [d for d in range(x.dim()) if d != 1]
    total = with_count(x.sum(dims), x)
    dist.all_reduce(total, group=group)
    batch_mean, size = total[:-1] / total[-1], total[-1]
    squares = (x - per_channel(batch_mean, x)).square().sum(dims)
    dist.all_reduce(squares, group=group)
    mean.lerp_(batch_mean.to(mean.dtype), factor)
    var.lerp_((squares / (size - 1)).to(var.dtype), factor)


def with_count(sums: Tensor, x: Tensor) -> Tensor:
    """(C + 1,): the sums, and the number of values of a channel.

    That number differs by process. So one message carries both.
    """
    count = math.prod([x.size(d) for d in range(x.dim()) if d != 1])
    return torch.cat([sums, x.new_full((1,), float(count))])
