"""Batch norm's operators: faster batching rules.

Under vmap torch (2.13) splits batch norm: it normalises without weight and bias, then
multiplies and adds, forward and backward. Each step makes an intermediate of the size
of the input. The rules here run the fused kernel once for all samples. For running
statistics it gets all samples as one batch. For statistics of each slice it gets one
channel for each slice and channel. torch's own rules run if weights or statistics are
themselves batched, as in an ensemble.

On CUDA ``F.batch_norm`` mostly is ``cudnn_batch_norm``: in float32 and float64, with
weights, and for inputs of three dimensions or more (read in torch 2.13). Its rules make
the same call of torch's own kernel, because the merged batch may have more samples than
cuDNN takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call, batch_first
from vmapsafe._rule import OperatorRule, register, slice_by_slice
from vmapsafe._torch import innermost, is_plain
from vmapsafe.rules import references
from vmapsafe.rules.precision import wide
from vmapsafe.rules.regimes import Regimes


@dataclass(frozen=True)
class Regime:
    """The sizes from which the rules here are faster.

    Attributes:
        batch: from this many numbers in the whole batch they win over torch's rules.
        channel: from this many values of a sample and channel, the fused backward by
            running statistics wins over separate operations.
    """

    batch: int
    channel: int


# That of the CPU was measured by bench/thresholds/batch_norm.py on an x86 server core,
# float32, torch 2.13.
REGIMES = Regimes(cpu=Regime(batch=2**13, channel=128), cuda=Regime(batch=0, channel=0))

_forward = torch.ops.aten.native_batch_norm.default
_backward = torch.ops.aten.native_batch_norm_backward.default

_cudnn_forward = torch.ops.aten.cudnn_batch_norm.default
_cudnn_backward = torch.ops.aten.cudnn_batch_norm_backward.default

_CHANNELWISE = ("weight", "bias", "running_mean", "running_var")


def _pays(x: Tensor, *others: Any) -> bool:
    """Whether a call with this input, or output gradient, is large enough."""
    return innermost(x).numel() >= REGIMES[x.device.type].batch


def _takes(call: Call, *batched: str) -> bool:
    x = call["input"]
    given = [call.arguments.get(name) for name in _CHANNELWISE]
    return (
        x.numel() > 0
        and all([call.in_dims[name] is not None for name in batched])
        and all([call.in_dims.get(name) is None for name in _CHANNELWISE])
        and all([t.dtype == x.dtype for t in given if t is not None])
    )


def _as_channels(batched: Tensor) -> Tensor:
    """(B, N, C, *L) as (N, B * C) or (N, B * C, L).

    With more than three dimensions, torch's kernel is wrong for a batch of one in some
    layouts, see normalisation.py.
    """
    merged = batched.movedim(1, 0).flatten(1, 2)
    return merged.flatten(2) if merged.dim() > 3 else merged


def _as_batch(merged: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_as_channels`: ``merged`` in the shape of ``like``."""
    n, shape = len(merged), like.movedim(1, 0).shape
    return merged.view(n, *shape[1:]).movedim(1, 0)


def _repeated(values: dict[str, Tensor | None], batch: int) -> dict[str, Tensor | None]:
    """The values of the channels, for each of the batch after another."""
    given = {name: v for name, v in values.items() if v is not None}
    found: dict[str, Tensor | None] = {**values}
    # Several together, in two operations.
    if len(given) > 1 and all([is_plain(v) for v in given.values()]):
        copies = torch.stack([*given.values()]).repeat(1, batch)
        found.update(zip(given, copies.unbind()))
    else:  # statistics must not get the derivatives of a weight
        found.update({name: v.repeat(batch) for name, v in given.items()})
    return found


# -- For rows --------------------------------------------------------------------------


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of a whole batch (B, N, C, ...), and what its backward needs.

    It uses the running statistics if they are given, else those of each slice.
    """
    own = mean is None
    arguments = {
        "input": x,
        "weight": weight,
        "bias": bias,
        "running_mean": mean,
        "running_var": var,
        "training": own,
        "momentum": 0.0,
        "eps": eps,
    }
    call = Call(_forward, arguments, in_dims={"input": 0})
    return _by_own(call) if own else _by_running(call)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    saved: Sequence[Tensor],
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the input and, for each slice, of the weight and the bias."""
    own = mean is None
    arguments = {
        "grad_out": grad,
        "input": x,
        "weight": weight,
        "running_mean": mean,
        "running_var": var,
        "save_mean": saved[0],
        "save_invstd": saved[1],
        "train": own,
        "eps": eps,
        "output_mask": list(wanted),
    }
    batched = ("grad_out", "input", "save_mean", "save_invstd")
    call = Call(_backward, arguments, in_dims=dict.fromkeys(batched, 0))
    return _by_own_backward(call) if own else _by_running_backward(call)


def rows(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The gradients of the weight and the bias alone, by the running statistics."""
    nothing = x.new_empty(len(x), 0)  # a forward saves no statistics
    given = weight, mean, var, (nothing, nothing), eps
    return backward(grad, x, *given, [False, *wanted])[1:]


# -- By running statistics -----------------------------------------------------------


def _forward_by_running(call: Call) -> bool:
    return (
        not call["training"]
        and call["running_mean"] is not None
        and _takes(call, "input")
    )


def _by_running(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and 1 / sqrt(var + eps) of each slice."""
    x = batch_first(call, "input")
    y, mean, rstd = _forward(*{**call.arguments, "input": x.flatten(0, 1)}.values())
    return y.view(x.shape), mean.expand(len(x), -1), rstd.expand(len(x), -1)


def _backward_by_running(call: Call) -> bool:
    return (
        not call["train"]
        and call["running_mean"] is not None
        and _takes(call, "grad_out", "input")
        and call["grad_out"].dtype == call["input"].dtype
    )


def _by_running_backward(
    call: Call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the input and, for each slice, of the weight and the bias."""
    x, grad = batch_first(call, "input"), batch_first(call, "grad_out")
    batch, n, channels = x.shape[:3]
    least = REGIMES[x.device.type].channel
    if 0 < x.numel() >= least * batch * n * channels:
        merged = {
            "grad_out": grad.reshape(1, batch * n * channels, -1).contiguous(),
            "input": x.reshape(1, batch * n * channels, -1),
            "save_mean": x.new_empty(0),  # as saved by a forward in eval mode
            "save_invstd": x.new_empty(0),
        }
        names = ("weight", "running_mean", "running_var")
        repeated = _repeated({name: call[name] for name in names}, batch * n)
        found = _backward(*{**call.arguments, **merged, **repeated}.values())
        of_input, of_weight, of_bias = found
        wanted = call["output_mask"]
        return (
            of_input.view(x.shape) if wanted[0] else None,
            _summed(of_weight.view(batch, n, channels)) if wanted[1] else None,
            _summed(of_bias.view(batch, n, channels)) if wanted[2] else None,
        )
    return _by_plain_operations(call, grad, x)


def _summed(rows: Tensor) -> Tensor:
    """(B, C): the sums over the batch (B, N, C) of each slice."""
    return rows.squeeze(1) if rows.size(1) == 1 else rows.sum(1)


def _by_plain_operations(
    call: Call, grad: Tensor, x: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wants_input, wants_weight, wants_bias = call["output_mask"]
    dtype, over = x.dtype, [d for d in range(x.dim()) if d not in (0, 2)]
    at_channel = (-1, *[1 for _ in x.shape[3:]])
    grad, x = wide(grad), wide(x)
    mean, rstd = wide(call["running_mean"]), wide(call["running_var"]) + call["eps"]
    rstd = torch.rsqrt(rstd)
    of_input = of_weight = of_bias = None
    if wants_input:
        scale = rstd if call["weight"] is None else rstd * wide(call["weight"])
        of_input = (grad * scale.view(at_channel)).to(dtype)
    if wants_weight:
        along = x - mean.view(at_channel)
        plain = is_plain(along) and is_plain(grad)
        along = along.mul_(grad) if plain else along * grad  # new memory is slow
        of_weight = (along.sum(over) * rstd).to(dtype)
    if wants_bias:
        of_bias = grad.sum(over).to(dtype)
    return of_input, of_weight, of_bias


# -- By the statistics of the slice --------------------------------------------------


def _forward_by_own(call: Call) -> bool:
    return (
        call["training"]
        and call["running_mean"] is None
        and call["running_var"] is None
        and _takes(call, "input")
    )


def _by_own(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The same outputs as those of :func:`_by_running`."""
    x = batch_first(call, "input")
    batch, n, channels = x.shape[:3]
    as_channels = {
        "input": _as_channels(x),
        **_repeated({name: call[name] for name in ("weight", "bias")}, batch),
    }
    y, mean, rstd = _forward(*{**call.arguments, **as_channels}.values())
    return (
        _as_batch(y, x),
        mean.view(batch, channels),
        rstd.view(batch, channels),
    )


def _backward_by_own(call: Call) -> bool:
    return (
        call["train"]
        and call["running_mean"] is None
        and call["running_var"] is None
        and _takes(call, "grad_out", "input", "save_mean", "save_invstd")
        and call["grad_out"].dtype == call["input"].dtype
    )


def _by_own_backward(
    call: Call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same gradients as those of :func:`_by_running_backward`."""
    x, grad = batch_first(call, "input"), batch_first(call, "grad_out")
    batch, n, channels = x.shape[:3]
    as_channels = {
        "grad_out": _as_channels(grad).contiguous(),
        "input": _as_channels(x),
        **_repeated({"weight": call["weight"]}, batch),
        "save_mean": batch_first(call, "save_mean").flatten(),
        "save_invstd": batch_first(call, "save_invstd").flatten(),
    }
    of_input, of_weight, of_bias = _backward(
        *{**call.arguments, **as_channels}.values()
    )
    wants_input, wants_weight, wants_bias = call["output_mask"]
    return (
        _as_batch(of_input, x) if wants_input else None,
        of_weight.view(batch, channels) if wants_weight else None,
        of_bias.view(batch, channels) if wants_bias else None,
    )


# -- By cuDNN ------------------------------------------------------------------------


def _native(call: Call) -> Call:
    """A call of ``cudnn_batch_norm`` as one of ``native_batch_norm``."""
    names = (*("input", *_CHANNELWISE), "training", "momentum", "eps")
    arguments = dict(zip(names, call.arguments.values(), strict=True))
    return Call(_forward, arguments, in_dims=call.in_dims)


def _native_backward(call: Call) -> Call:
    """The same for the backward, which only runs by the statistics of the input."""
    renamed = {"grad_output": "grad_out", "save_var": "save_invstd"}
    in_dims = {renamed.get(name, name): dim for name, dim in call.in_dims.items()}
    arguments = {
        "grad_out": call["grad_output"],
        "input": call["input"],
        "weight": call["weight"],
        "running_mean": call["running_mean"],
        "running_var": call["running_var"],
        "save_mean": call["save_mean"],
        "save_invstd": call["save_var"],
        "train": True,
        "eps": call["epsilon"],
        "output_mask": [True, True, True],
    }
    return Call(_backward, arguments, in_dims=in_dims)


def _with_reserve(
    batched: Callable[[Call], tuple[Tensor, Tensor, Tensor]],
) -> Callable[[Call], tuple[Tensor, ...]]:
    """With the memory that cuDNN may reserve for its backward, of which it needs none
    here."""

    def forward(call: Call) -> tuple[Tensor, ...]:
        found = batched(_native(call))
        return *found, found[0].new_empty(len(found[0]), 0, dtype=torch.uint8)

    return forward


# -- The slow forms ------------------------------------------------------------------


def _statistics(call: Call, training: bool) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps), in shapes that broadcast against the input."""
    x = call["input"]
    if training:
        mean, variance = references.statistics(x, references.but_channels(x))
    else:
        mean = references.along_channels(call["running_mean"], x)
        variance = references.along_channels(call["running_var"], x)
    return mean, (variance + call["eps"]).rsqrt()


def _plain(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    x, training = call["input"], call["training"]
    mean, rstd = _statistics(call, training)
    y = references.affine(call, (x - mean) * rstd)
    if not training:
        return y, x.new_empty(0), x.new_empty(0)
    # torch does not differentiate the statistics that it saves.
    return y, mean.detach().flatten(), rstd.detach().flatten()


def _plain_backward(call: Call) -> tuple[Tensor | None, ...]:
    """The gradients of the input, the weight and the bias, written out."""
    x, grad = call["input"], call["grad_out"]
    wants_input, wants_weight, wants_bias = call["output_mask"]
    over = references.but_channels(x)
    mean, rstd = _statistics(call, call["train"])
    normalised = (x - mean) * rstd
    weighted = grad
    if call["weight"] is not None:
        weighted = grad * references.along_channels(call["weight"], x)
    if call["train"]:
        mean_of = weighted.mean(over, keepdim=True)
        along = (weighted * normalised).mean(over, keepdim=True)
        weighted = weighted - mean_of - normalised * along
    return (
        weighted * rstd if wants_input else None,
        (grad * normalised).sum(over) if wants_weight else None,
        grad.sum(over) if wants_bias else None,
    )


def _plain_with_reserve(call: Call) -> tuple[Tensor, ...]:
    found = _plain(_native(call))
    return *found, call["input"].new_empty(0, dtype=torch.uint8)


for _name, _operator, _accepts, _batched, _reference in (
    (
        "native_batch_norm, running statistics",
        _forward,
        _forward_by_running,
        _by_running,
        _plain,
    ),
    (
        "native_batch_norm_backward, running statistics",
        _backward,
        _backward_by_running,
        _by_running_backward,
        _plain_backward,
    ),
    (
        "native_batch_norm, statistics of the slice",
        _forward,
        _forward_by_own,
        _by_own,
        _plain,
    ),
    (
        "native_batch_norm_backward, statistics of the slice",
        _backward,
        _backward_by_own,
        _by_own_backward,
        _plain_backward,
    ),
    (
        "cudnn_batch_norm, running statistics",
        _cudnn_forward,
        lambda call: _forward_by_running(_native(call)),
        _with_reserve(_by_running),
        _plain_with_reserve,
    ),
    (
        "cudnn_batch_norm, statistics of the slice",
        _cudnn_forward,
        lambda call: _forward_by_own(_native(call)),
        _with_reserve(_by_own),
        _plain_with_reserve,
    ),
    (
        "cudnn_batch_norm_backward, statistics of the slice",
        _cudnn_backward,
        lambda call: _backward_by_own(_native_backward(call)),
        lambda call: _by_own_backward(_native_backward(call)),
        lambda call: _plain_backward(_native_backward(call)),
    ),
):
    register(
        OperatorRule(
            name=_name,
            operator=_operator,
            accepts=_accepts,
            batched=_batched,
            reference=slice_by_slice(_reference),
            devices=None,
            functions=(F.batch_norm, torch.batch_norm, F.instance_norm),
            pays=_pays,
            may_accept=_pays,
        )
    )
