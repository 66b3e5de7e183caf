"""Batch norm: which statistics normalise a slice in each mode, without writing any.

A call of ``F.batch_norm`` belongs to a layer if a covered layer is running. Other
calls keep their meaning, such as one on the weights of a weight-standardised
convolution. The operators of batch norm are in ``batch_norm_operators``, mode "sync" is
in ``sync``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call
from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import MODES, groups_for
from vmapsafe._rule import FunctionRule, register, slice_by_slice
from vmapsafe._torch import autocasts, batched_levels, innermost, is_wrapped
from vmapsafe.rules import batch_norm_operators as operators
from vmapsafe.rules import references
from vmapsafe.rules.group_norm import by_groups
from vmapsafe.rules.kept_calls import Affine, ByKernel, KeptCalls, keep_calls
from vmapsafe.rules.normalisation import (
    has_own_weights,
    has_several_layouts,
    of_a_layer,
    own_statistics,
    per_channel,
)
from vmapsafe.rules.precision import wide
from vmapsafe.rules.running_statistics import update_running_statistics

# -- "no_running_stats": the statistics of the slice ---------------------------------


def _by_own_statistics(call: Call) -> Tensor:
    x = call["input"]
    if x.numel() == x.size(1):
        raise one_value(
            call,
            "each channel",
            'Use larger slices, or mode="eval" where there are running statistics',
        )
    return own_statistics(x, call["weight"], call["bias"], call["eps"])


def _of_the_slice(call: Call) -> Tensor:
    y = _by_own_statistics(call)
    if call.site is not None and call.site.update_running_stats:
        update_running_statistics(call)
    return y


register(
    FunctionRule(
        name="batch_norm, statistics of the slice",
        functions=(F.batch_norm,),
        modes=("no_running_stats",),
        accepts=of_a_layer,
        batched=_of_the_slice,
        reference=slice_by_slice(references.batch_norm),
    )
)


# -- "group_norm": groups of channels of each sample ---------------------------------


def _group_norm(call: Call) -> Tensor:
    assert call.site is not None
    x = call["input"]
    channels = x.size(1)
    groups = groups_for(channels, call.site.num_groups)
    if x.numel() == x.size(0) * groups:
        raise one_value(
            call,
            f"each of {groups} groups of {channels} channels",
            "Pass a num_groups that divides the channels into fewer groups (where "
            'it does not divide them, each channel is a group), or use mode="eval"',
        )
    y = by_groups(x, groups, call["weight"], call["bias"], call["eps"])
    # For an empty batch vmap loses the shape of the slices (torch 2.13).
    return y if y.shape == x.shape else x.to(y.dtype, copy=True)


def _plain_groups(call: Call) -> Tensor:
    assert call.site is not None
    return references.group_norm(
        call, groups_for(call["input"].size(1), call.site.num_groups)
    )


register(
    FunctionRule(
        name="batch_norm, groups of channels",
        functions=(F.batch_norm,),
        modes=("group_norm",),
        accepts=of_a_layer,
        batched=_group_norm,
        reference=slice_by_slice(_plain_groups),
    )
)


# -- Layers that must stay in eval mode ------------------------------------------------
#
# These are layers in mode "eval" and layers that their owner has frozen. Two kinds of
# call still request the statistics of the input: torch.compile does not see the layers'
# switched flags, and other code may pass the layers' buffers to a call of its own.


def uses_input(call: Call) -> bool:
    """Whether a call of batch or instance norm requests the input's statistics."""
    flag = "training" if call.function is F.batch_norm else "use_input_stats"
    return bool(call[flag])


def _asks_for_its_own(call: Call) -> bool:
    return (
        uses_input(call)
        and call.site is not None
        and call.site.stays_in_eval
        and call["running_mean"] is not None
        and call["running_var"] is not None
    )


def _is_empty(call: Call) -> bool:
    """Whether the input is empty. Then torch's backward crashes the process (2.13)."""
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


def _may_need_a_rule(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *rest: Any,
    **others: Any,
) -> bool:
    """Whether a rule may accept a call of ``F.batch_norm`` with these arguments."""
    return (
        training
        or not (isinstance(input, Tensor) and isinstance(running_mean, Tensor))
        or input.dtype != running_mean.dtype
        or has_several_layouts(input)
        or autocasts(input.device)
    )


for _function in (F.batch_norm, F.instance_norm):
    register(
        FunctionRule(
            name=f"{_function.__name__}, layers that stay in eval mode",
            functions=(_function,),
            modes=MODES,
            accepts=_asks_for_its_own,
            may_accept=_may_need_a_rule,
            batched=_staying_in_eval,
            reference=slice_by_slice(references.by_running_statistics),
        )
    )


# -- Every mode: a forward does not write to the running statistics ------------------


def _uses_own_statistics(call: Call) -> bool:
    """Whether the call uses the input's statistics, and writes none but the model's.

    A layer without running statistics makes such calls in every mode.
    """
    return uses_input(call) and (
        of_a_layer(call) or call["running_mean"] is None or writes_statistics(call)
    )


def writes_statistics(call: Call) -> bool:
    """Whether torch would update running statistics that are the model's buffers."""
    mean = call["running_mean"]
    return (
        uses_input(call)
        and mean is not None
        and call.site is not None
        and call.site.holds(mean)
    )


register(
    FunctionRule(
        name="batch_norm, statistics not written",
        functions=(F.batch_norm,),
        modes=MODES,
        accepts=_uses_own_statistics,
        may_accept=_may_need_a_rule,
        batched=_by_own_statistics,
        reference=slice_by_slice(references.batch_norm),
    )
)


# -- Every mode: running statistics, for layers in eval mode -------------------------


def _reads_statistics(call: Call) -> bool:
    """Whether torch's own batch norm would be wrong, fail or be slow.

    It raises in vmap(grad) if dtypes differ, as under autocast, and torch.compile
    traces it as a loop over the slices (read in torch 2.13).
    """
    x: Tensor = call["input"]
    mean = call["running_mean"]
    if uses_input(call) or mean is None or call["running_var"] is None:
        return False
    as_one = call.function is F.instance_norm  # it merges all samples into one
    if has_own_weights(call) and not as_one:
        return False  # _keep and _otherwise below handle it
    ambiguous = x.dim() > 3 and as_one or has_several_layouts(x)
    return ambiguous or _torchs_own_crawls(call)


def _torchs_own_crawls(call: Call) -> bool:
    x: Tensor = call["input"]
    differs = x.dtype != call["running_mean"].dtype
    return torch.compiler.is_compiling() or differs or autocasts(x.device)


def _by_running_statistics(call: Call) -> Tensor:
    if _torchs_own_crawls(call):
        names = ("input", "running_mean", "running_var", "weight", "bias", "eps")
        return by_running_statistics(*[call[name] for name in names])
    x = call["input"]
    named = ("running_mean", "running_var", "weight", "bias", "eps")
    y = F.batch_norm(x.flatten(2), **{name: call[name] for name in named})
    return y.view(x.shape)


def by_running_statistics(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Batch norm by the statistics given, as an affine map."""
    x = wide(input)
    scale = torch.rsqrt(wide(var) + eps)
    if weight is not None:
        scale = scale * wide(weight)
    shift = -wide(mean) * scale
    if bias is not None:
        shift = shift + wide(bias)
    y = torch.addcmul(per_channel(shift, x), x, per_channel(scale, x))
    return y.to(input.dtype)


register(
    FunctionRule(
        name="batch_norm, running statistics",
        functions=(F.batch_norm, F.instance_norm),
        modes=MODES,
        accepts=_reads_statistics,
        may_accept=_may_need_a_rule,
        batched=_by_running_statistics,
        reference=slice_by_slice(references.by_running_statistics),
    )
)


# -- Every mode: a batch of one in another layout --------------------------------------
#
# torch's kernel on the CPU (2.13) computes a silently wrong backward for a batch of one
# if the input is channels-last and the output gradient is not, or the other way round.
# The same holds for images of one row or one column. Instance norm is batch norm of
# a batch of one. The cure is an input of three dimensions, which has only one layout.


def _is_batch_of_one(call: Call) -> bool:
    # _keep and _otherwise below handle calls in which slices have their own weights.
    return has_several_layouts(call["input"]) and not has_own_weights(call)


def with_one_layout(call: Call) -> Tensor:
    x: Tensor = call["input"]
    flat = {**call.arguments, "input": x.flatten(2)}
    y: Tensor = call.function(**flat)
    return y.view(x.shape)


def _plain_batch_of_one(call: Call) -> Tensor:
    if call["training"] or call["running_mean"] is None:
        return references.batch_norm(call)
    return references.by_running_statistics(call)


register(
    FunctionRule(
        name="batch_norm, a batch of one",
        functions=(F.batch_norm,),
        modes=MODES,
        accepts=_is_batch_of_one,
        may_accept=_may_need_a_rule,
        batched=with_one_layout,
        reference=slice_by_slice(_plain_batch_of_one),
    )
)


def one_value(call: Call, per: str, do: str) -> VmapSafeValueError:
    """The error for a channel or a group with one value.

    Normalised, one value is 0, so the output would be the bias.
    """
    assert call.site is not None
    return VmapSafeValueError(
        f"{call.function.__name__} of {call.site.path()}",
        f"input of shape {tuple(call['input'].shape)} has one value for {per}, which "
        "would leave only the bias",
        do,
    )


# -- Rows ------------------------------------------------------------------------------


def _keep(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ByKernel | None:
    statistics = (None, None) if training else (running_mean, running_var)
    given = [s for s in statistics if s is not None]
    if not training and (len(given) < 2 or batched_levels(given)):
        return None
    given += [t for t in (weight, bias) if t is not None]
    if not all([t.dtype == input.dtype and t.dim() == 1 for t in given]):
        return None
    if not input.numel():
        return None

    def forward(x: Tensor) -> Sequence[Tensor]:
        return operators.forward(x, weight, bias, *statistics, eps)

    def backward(
        grad: Tensor, x: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return operators.backward(grad, x, weight, *statistics, saved, eps, wanted)

    def before(x: Tensor) -> Tensor:
        mean, var = statistics
        if mean is None or var is None:
            return own_statistics(x, None, None, eps)
        return by_running_statistics(x, mean, var, None, None, eps)

    def rows(
        grad: Tensor, x: Tensor, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return operators.rows(grad, x, weight, *statistics, eps, wanted)

    made = Affine(before, first=2)
    return ByKernel(forward, backward, made, None if training else rows)


def _otherwise(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    own_weights = any([p is not None and is_wrapped(p) for p in (weight, bias)])
    if own_weights and not training and running_mean is not None:
        assert running_var is not None
        statistics = running_mean, running_var
        return by_running_statistics(input, *statistics, weight, bias, eps)
    rest = running_mean, running_var, weight, bias, training, momentum, eps
    if has_several_layouts(input):
        return F.batch_norm(input.flatten(2), *rest).view(input.shape)
    return F.batch_norm(input, *rest)


keep_calls(F.batch_norm, KeptCalls(_keep, otherwise=_otherwise))
