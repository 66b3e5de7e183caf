"""Layer norm: right in every derivative, and faster batching rules.

torch's own layer norm (2.13) holds the saved mean and standard deviation constant. So
second derivatives with forward mode and third derivatives are silently wrong, as in
batch norm. torch's batching rule of the backward makes the same mistake in the rows of
the weight, even in the first derivative taken outside the vmap, for example that of
a penalty on the norms of the rows. Layer norm is written out if such a derivative may
be taken.

The faster batching rules, forward and backward, keep the affine part in the fused
kernels. torch's own rules do not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call, batch_first, expanded
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, OperatorRule, register, slice_by_slice
from vmapsafe._torch import (
    autograd_records,
    innermost,
    is_differentiated,
    is_plain,
)
from vmapsafe.rules import references
from vmapsafe.rules.kept_calls import Affine, ByKernel, KeptCalls, keep_calls
from vmapsafe.rules.normalisation import (
    fused_layer_norm,
    has_own_weights,
    layer_norm_written_out,
    specimen,
    torchs_own_fails,
)
from vmapsafe.rules.precision import wide
from vmapsafe.rules.regimes import Regimes


@dataclass(frozen=True)
class Regime:
    """The sizes from which the rules here are faster.

    Attributes:
        batch: from this many numbers in the whole batch they win over torch's rules.
        slice: from this many numbers in a slice, a call of torch's kernel for each
            slice is the fastest backward, as it does not store what it sums up.
    """

    batch: int
    slice: int


# That of the CPU was measured by bench/thresholds/layers.py on an x86 server core,
# float32, torch 2.13.
REGIMES = Regimes(
    cpu=Regime(batch=2**17, slice=2**13), cuda=Regime(batch=0, slice=sys.maxsize)
)

_forward = torch.ops.aten.native_layer_norm.default
_backward = torch.ops.aten.native_layer_norm_backward.default


def _accepts(call: Call) -> bool:
    x = call["input"]
    return (
        _pays(x)
        and call.in_dims["input"] is not None
        and _has_affine(call, x.dtype)
        and _shares_affine(call)
    )


def _pays(x: Tensor, *others: Any) -> bool:
    """Whether a call with this input, or output gradient, is large enough."""
    return innermost(x).numel() >= max(1, REGIMES[x.device.type].batch)


def _has_affine(call: Call, dtype: torch.dtype) -> bool:
    """Whether there is a weight, and it and the bias have this dtype.

    torch's own rules apply the weight outside the fused kernel, so without a weight
    there is nothing to gain.
    """
    weight, bias = call["weight"], call["bias"]
    return (
        weight is not None
        and weight.dtype == dtype
        and (bias is None or bias.dtype == dtype)
    )


def _shares_affine(call: Call) -> bool:
    return call.in_dims["weight"] is None and call.in_dims.get("bias") is None


_SAVED = ("grad_out", "input", "mean", "rstd")


def _accepts_backward(call: Call) -> bool:
    return (
        _has_one_dtype(call)
        and _pays(call["input"])
        and _shares_affine(call)
        and all([call.in_dims[name] is not None for name in _SAVED])
    )


def _is_differentiated(call: Call) -> bool:
    return _has_one_dtype(call) and is_differentiated(call["input"])


def _has_one_dtype(call: Call) -> bool:
    x = call["input"]
    return (
        x.numel() > 0
        and _has_affine(call, x.dtype)
        and all([call[name].dtype == x.dtype for name in _SAVED])
    )


def _merged(call: Call) -> tuple[Tensor, ...]:
    x = batch_first(call, "input")
    found: tuple[Tensor, ...] = _forward(**{**call.arguments, "input": x})
    return found


def _merged_backward(call: Call) -> tuple[Tensor | None, ...]:
    batches = _batches(call)
    x, least = batches["input"], REGIMES[call["input"].device.type].slice
    by_kernel = is_plain(x) and x.shape[1:].numel() >= least
    rows = (_rows_by_kernel if by_kernel else _rows)(call, batches)
    return _gradient_of_input(call, batches), *rows


def _differentiated_backward(call: Call) -> tuple[Tensor | None, ...]:
    batches = _batches(call)
    return _gradient_of_input(call, batches), *_rows(call, batches)


def _batches(call: Call) -> dict[str, Tensor]:
    # The kernel on the CPU reads the incoming gradient as if it were contiguous.
    return {name: expanded(call, name).contiguous() for name in _SAVED}


def _gradient_of_input(call: Call, batches: dict[str, Tensor]) -> Tensor | None:
    if not call["output_mask"][0]:
        return None
    changed: dict[str, Any] = {**batches, "output_mask": [True, False, False]}
    if not _shares_affine(call):
        grad = batches["grad_out"]
        weight = expanded(call, "weight")
        between = [1] * (grad.dim() - weight.dim())
        weight = weight.reshape(len(weight), *between, *weight.shape[1:])
        changed.update(grad_out=grad * weight, weight=None, bias=None)
    found: Tensor = _backward(**{**call.arguments, **changed})[0]
    return found


def _rows_by_kernel(call: Call, batches: dict[str, Tensor]) -> list[Tensor | None]:
    rows, wanted = [], call["output_mask"][1:]
    for i in range(len(batches["input"])):
        one = {name: batch[i] for name, batch in batches.items()}
        mask = [False, *wanted]
        found = _backward(**{**call.arguments, **one, "output_mask": mask})
        rows.append(found[1:])
    return [torch.stack(row) if want else None for row, want in zip(zip(*rows), wanted)]


def _rows(call: Call, batches: dict[str, Tensor]) -> list[Tensor | None]:
    """The rows of weight and bias: sums of g x̂ and g over the leading dimensions."""
    grad, x, mean, rstd = batches.values()
    _, wants_weight, wants_bias = call["output_mask"]
    last = len(call["normalized_shape"])
    dims = list(range(1, x.dim() - last))
    of_weight = of_bias = None
    if wants_weight:
        if is_differentiated(x):
            mean, rstd = _as_functions(x, mean, rstd, last)
        product = (x - mean) * rstd * grad
        of_weight = product.sum(dims) if dims else product
    if wants_bias:
        of_bias = grad.sum(dims) if dims else grad.clone()
    return [of_weight, of_bias]


def _as_functions(
    x: Tensor, mean: Tensor, rstd: Tensor, last: int
) -> tuple[Tensor, Tensor]:
    """The mean and ``rstd`` as functions of ``x``, with the values given.

    torch passes them as constants, and does not pass the eps that ``rstd`` contains.
    """
    dims = list(range(-last, 0))
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    eps = (rstd.pow(-2) - var).detach()
    return mean, torch.rsqrt(var + eps)


# -- Where torch's own fails ---------------------------------------------------------


def _torchs_own_fails(call: Call) -> bool:
    x, shape = call["input"], tuple(call["normalized_shape"])
    if tuple(x.shape[x.dim() - len(shape) :]) != shape:
        return False  # torch refuses such a call
    tensors = x, call["weight"], call["bias"]
    if torchs_own_fails(*tensors):
        return True
    # If slices have weights of their own, for rows, only one derivative is taken.
    return autograd_records(*tensors) and not has_own_weights(call)


def _right(call: Call) -> Tensor:
    x, shape, weight, bias, eps = call.arguments.values()
    if torchs_own_fails(x, weight, bias):
        y = layer_norm_written_out(x, shape, weight, bias, eps)
        return y.to(F.layer_norm(specimen(x), (2,)).dtype)
    return fused_layer_norm(x, shape, weight, bias, eps)


# -- The slow form -------------------------------------------------------------------


def _plain(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm by Ba et al., https://arxiv.org/abs/1607.06450, section 3.1."""
    x = call["input"]
    dims = list(range(-len(call["normalized_shape"]), 0))
    mean, variance = references.statistics(x, dims)
    rstd = 1 / torch.sqrt(variance + call["eps"])
    y = (x - mean) * rstd
    y = y if call["weight"] is None else y * call["weight"]
    y = y if call["bias"] is None else y + call["bias"]
    return y, mean.detach(), rstd.detach()  # as in torch's kernel


def _plain_output(call: Call) -> Tensor:
    return _plain(call)[0]


def _plain_backward(call: Call) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`_plain` by autograd, with the eps that is in ``rstd``."""
    x = call["input"]
    dims = list(range(-len(call["normalized_shape"]), 0))
    var = x.var(dims, correction=0, keepdim=True)
    eps = (call["rstd"].detach() ** -2 - var).detach()
    bias = torch.zeros_like(call["weight"])
    leaves = [
        value if value.requires_grad else value.detach().requires_grad_()
        for value in (x, call["weight"], bias)
    ]
    y, _, _ = _plain(
        Call(
            _forward,
            {
                "input": leaves[0],
                "normalized_shape": call["normalized_shape"],
                "weight": leaves[1],
                "bias": leaves[2],
                "eps": eps,
            },
        )
    )
    found = torch.autograd.grad(y, leaves, call["grad_out"], create_graph=True)
    return tuple(
        grad if want else None for grad, want in zip(found, call["output_mask"])
    )


register(
    OperatorRule(
        name="native_layer_norm, batches merged",
        operator=_forward,
        accepts=_accepts,
        batched=_merged,
        reference=slice_by_slice(_plain),
        devices=None,
        functions=(F.layer_norm, torch.layer_norm),
        pays=_pays,
        may_accept=_pays,
    )
)
register(
    OperatorRule(
        name="native_layer_norm_backward, batches merged",
        operator=_backward,
        accepts=_accepts_backward,
        batched=_merged_backward,
        reference=slice_by_slice(_plain_backward),
        devices=None,
        functions=(F.layer_norm, torch.layer_norm),
        pays=_pays,
        may_accept=_pays,
    )
)
register(
    OperatorRule(
        name="native_layer_norm_backward, differentiated again",
        operator=_backward,
        accepts=_is_differentiated,
        batched=_differentiated_backward,
        reference=slice_by_slice(_plain_backward),
        devices=None,
        functions=(F.layer_norm, torch.layer_norm),
        pays=_pays,
        may_accept=_pays,
    )
)
register(
    FunctionRule(
        name="layer_norm, where torch's own fails",
        functions=(F.layer_norm,),
        modes=MODES,
        accepts=_torchs_own_fails,
        batched=_right,
        reference=slice_by_slice(_plain_output),
    )
)


# -- Rows ------------------------------------------------------------------------------


def _keep(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> ByKernel | None:
    shape = tuple(normalized_shape)
    given = [t for t in (weight, bias) if t is not None]
    if not all([t.dtype == input.dtype and tuple(t.shape) == shape for t in given]):
        return None
    if not input.numel() or tuple(input.shape[input.dim() - len(shape) :]) != shape:
        return None
    if input.dim() <= len(shape):
        return None
    positions = list(range(1, input.dim() - len(shape)))

    def forward(x: Tensor) -> Sequence[Tensor]:
        return torch.native_layer_norm(x, shape, weight, bias, eps)

    def backward(
        grad: Tensor, x: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        mean, rstd = saved
        # The kernel on the CPU reads these as if they were contiguous.
        x, grad = x.contiguous(), grad.contiguous()
        of_input = of_weight = of_bias = None
        if wanted[0]:
            mask = [True, False, False]
            rest = shape, mean, rstd, weight, bias, mask
            of_input = _backward(grad, x, *rest)[0]
        if wanted[1]:
            y = torch.native_layer_norm(wide(x), shape, None, None, eps)[0]
            y.mul_(grad)
            of_weight = (y.sum(positions) if positions else y).to(x.dtype)
        if wanted[2]:
            of_bias = wide(grad).sum(positions) if positions else grad.clone()
            of_bias = of_bias.to(x.dtype)
        return of_input, of_weight, of_bias

    affine = Affine(
        lambda x: F.layer_norm(x, shape, None, None, eps), first=-len(shape)
    )
    return ByKernel(forward, backward, affine)


keep_calls(F.layer_norm, KeptCalls(_keep))
