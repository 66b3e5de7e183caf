"""Instance norm: which statistics normalise a slice in each mode, without writing any.

torch computes it as batch norm of a batch of one, with one channel for each sample and
channel. So it uses the operators of batch norm.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, register, slice_by_slice
from vmapsafe._torch import autograd_records
from vmapsafe.rules import references
from vmapsafe.rules.batch_norm import one_value, with_one_layout, writes_statistics
from vmapsafe.rules.normalisation import (
    fused_batch_norm,
    normalised,
    of_a_layer,
    scaled_and_shifted,
    torchs_own_fails,
)
from vmapsafe.rules.running_statistics import update_running_statistics


def _unwritten(call: Call) -> Tensor:
    """Instance norm by statistics of each sample and channel, without writing any."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    if x.numel() == x.size(0) * x.size(1):
        raise one_value(call, "each channel", 'Use larger samples, or mode="eval"')
    if torchs_own_fails(x, weight, bias):
        y = normalised(x, list(range(2, x.dim())), call["eps"])
        return scaled_and_shifted(y, weight, bias).to(x.dtype)
    flat = x.flatten(2)
    if autograd_records(x, weight, bias):
        as_channels = flat.reshape(1, -1, flat.size(2))
        weight, bias = (p if p is None else p.repeat(len(x)) for p in (weight, bias))
        y = fused_batch_norm(as_channels, weight, bias, call["eps"])
    else:
        y = F.instance_norm(flat, None, None, weight, bias, True, 0.0, call["eps"])
    return y.view(x.shape)


def _of_the_slice(call: Call) -> Tensor:
    y = _unwritten(call)
    if call.site is not None and call.site.update_running_stats:
        update_running_statistics(call)
    return y


def _uses_own_statistics(call: Call) -> bool:
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
        batched=_of_the_slice,
        reference=slice_by_slice(references.instance_norm),
    )
)

register(
    FunctionRule(
        name="instance_norm, statistics not written",
        functions=(F.instance_norm,),
        modes=MODES,
        accepts=_uses_own_statistics,
        batched=_unwritten,
        reference=slice_by_slice(references.instance_norm),
    )
)


def _has_several_layouts(call: Call) -> bool:
    x: Tensor = call["input"]
    return x.dim() > 3 and x.device.type == "cpu"


def _plain_of_both_kinds(call: Call) -> Tensor:
    if call["use_input_stats"] or call["running_mean"] is None:
        return references.instance_norm(call)
    return references.by_running_statistics(call)


register(
    FunctionRule(
        name="instance_norm, all positions in one dimension",
        functions=(F.instance_norm,),
        modes=MODES,
        accepts=_has_several_layouts,
        batched=with_one_layout,
        reference=slice_by_slice(_plain_of_both_kinds),
    )
)


# -- Mode "sync" -----------------------------------------------------------------------


def _across_slices(call: Call) -> Tensor:
    """Instance norm of each slice, with running statistics of all slices.

    Each sample is normalised alone, so only the running statistics are merged.
    """
    site = call.site
    assert site is not None
    y = _unwritten(call)
    if site.update_running_stats:
        update_running_statistics(call, site.merged_levels(call["input"]))
    return y


register(
    FunctionRule(
        name="instance_norm, running statistics across the vmapped axis",
        functions=(F.instance_norm,),
        modes=("sync",),
        accepts=of_a_layer,
        batched=_across_slices,
        reference=slice_by_slice(references.instance_norm),
    )
)
