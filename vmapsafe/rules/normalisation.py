"""Normalisation by statistics of the input itself, right in every derivative.

torch's own kernels (2.13) are silently wrong in two cases, in which the rules of every
mode avoid them:

* The second derivative with forward mode and the third derivative by reverse mode are
  wrong, because the kernels hold the saved statistics constant (pytorch/pytorch#196699,
  #186256).
* On the CPU the backward of batch and instance norm is wrong if a dimension has length
  1 and the input and the gradient have different memory layouts. The kernels read both
  as if they had the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vmapsafe._call import Call
from vmapsafe._torch import (
    autocasts,
    autograd_records,
    batched_levels,
    beyond_reverse_mode,
    merging,
)
from vmapsafe.rules.precision import HALVES, wide

Dims = Sequence[int | None]


def of_a_layer(call: Call) -> bool:
    """Whether the call is made by a layer that the block covers and nobody froze."""
    return call.site is not None and call.site.layer is not None


def has_own_weights(call: Call) -> bool:
    """Whether each slice has a copy of the layer's weights, to get its row from."""
    if call.site is None or call.site.copies_at is None:
        return False
    given = [call.arguments.get(name) for name in ("weight", "bias")]
    return call.site.copies_at in batched_levels([p for p in given if p is not None])


# -- In ordinary operations ------------------------------------------------------------


def torchs_own_fails(x: Tensor, *affine: Tensor | None) -> bool:
    """Whether torch's own normalisation by statistics of ``x`` may be wrong or raise.

    Some of its derivatives are wrong, see above. Under vmap it raises if weights have
    a wider dtype than the input, for example under autocast.
    """
    return (
        beyond_reverse_mode(x, *affine)
        or autocasts(x.device)
        or x.dtype in HALVES
        and any([t is not None and t.dtype == torch.float32 for t in affine])
    )


def normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """``x`` normalised by operations that can be differentiated any number of times.

    The result has the dtype of :func:`wide`.
    """
    x = wide(x)
    centred = x - x.mean(dims, keepdim=True)
    var = centred.square().mean(dims, keepdim=True)
    return centred * torch.rsqrt(var + eps)


def layer_norm_written_out(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Layer norm written out with :func:`normalised`, in the dtype of its result."""
    y = normalised(x, list(range(-len(shape), 0)), eps)
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y


def specimen(x: Tensor) -> Tensor:
    """Two numbers like those of ``x``, to find the dtype that autocast gives them."""
    return torch.ones((1, 1, 2), dtype=x.dtype, device=x.device)


def scaled_and_shifted(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * weight + bias, by channel."""
    if weight is not None:
        y = y * per_channel(weight, y)
    if bias is not None:
        y = y + per_channel(bias, y)
    return y


def per_channel(values: Tensor, y: Tensor) -> Tensor:
    """(C,) in the shape that broadcasts against ``y`` (N, C, ...)."""
    return values.reshape([len(values) if d == 1 else 1 for d in range(y.dim())])


# -- By torch's kernels ----------------------------------------------------------------


def own_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm by the statistics of ``x`` itself."""
    if torchs_own_fails(x, weight, bias):
        y = normalised(x, [d for d in range(x.dim()) if d != 1], eps)
        return scaled_and_shifted(y, weight, bias).to(x.dtype)
    flat = x.flatten(2) if has_several_layouts(x) else x
    if autograd_records(x, weight, bias):
        y = fused_batch_norm(flat, weight, bias, eps)
    else:
        y = F.batch_norm(flat, None, None, weight, bias, True, 0.0, eps)
    return y.view(x.shape)


def has_several_layouts(x: Tensor) -> bool:
    """Whether torch's batch norm may confuse two memory layouts of ``x``, see above, or
    ask vmap for one.

    It does so on CUDA, for images or their gradients with their channels last, and vmap
    refuses (2.13).
    """
    if x.dim() <= 3:
        return False
    if x.device.type == "cpu":
        return 1 in x.shape
    return x.stride(1) <= x.stride(-1)


def fused_layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Layer norm, for calls for which :func:`torchs_own_fails` is False."""
    if not autograd_records(x, weight, bias):
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


def fused_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm by the statistics of ``x``, if :func:`autograd_records` the call."""

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
    """torch's batch norm by the statistics of ``x``, when only autograd differentiates.

    torch's kernel computes the first derivative. Higher ones differentiate batch norm
    written out.
    """

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
    """torch's layer norm, with derivatives as in :class:`BatchNorm`."""

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
    """Each tensor with a batch dimension in front."""
    batches = []
    for t, dim in zip(tensors, dims):
        if t is not None:
            t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        batches.append(t)
    return batches


def _gradients(
    y: Tensor, inputs: Sequence[Tensor | None], asked: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of ``y``, which can be differentiated again."""
    wanted = [t for t, ask in zip(inputs, asked) if ask and t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if ask else None for ask in asked]
