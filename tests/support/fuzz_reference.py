"""What the networks of ``fuzz_nets.py`` compute in each mode, written out.

Plain torch: no transform, no normalisation of torch's (its CPU kernels are wrong for
some layouts and in some second derivatives), nothing of vmapsafe. Slices go through the
network side by side, each with parameters and buffers of its own, so that a layer may
join them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, overload

import torch
import torch.nn.functional as F
from fuzz_nets import (
    ACTIVATIONS,
    Again,
    Attention,
    Borrow,
    Branches,
    Drop,
    Functional,
    HandMade,
    Lora,
    Matmul,
    Mean,
    Multihead,
    Net,
    NormAct,
    Residual,
    Scale,
    Standardised,
    Swap,
    ThereAndBack,
    Tokens,
    WithItself,
)
from plain import ModeName
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

Slices = list[Tensor]
# What stands in the place of a parameter or buffer, by id.
Own = dict[int, Tensor]


class Refused(Exception):
    """That there is no right number here: one value has no spread."""


CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
TRANSPOSED = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
# Done to each slice for itself by torch's own function, which has no parameters.
AS_THEY_ARE = (
    *ACTIVATIONS,
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Flatten, Swap, Tokens, Mean, nn.Softmax, nn.Upsample),
)


def normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    count = 1
    for d in dims:
        count *= x.shape[d]
    if count == 1:
        raise Refused("one value")
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


class Reference:
    """``net`` in a block of ``mode``.

    Attributes:
        own: for each slice, what stands in the place of a parameter or buffer, by id.
        masks: for each dropout, in the order of use, and each slice: its factor.
        detached: whether the statistics of the merged batch are constants.
        merged: whether a layer has joined slices.
    """

    def __init__(
        self,
        net: Net,
        mode: ModeName,
        groups_of: Callable[[int], int],
        masks: Iterable[Slices] = (),
        detached: bool = False,
    ) -> None:
        self.net, self.mode, self.groups_of = net, mode, groups_of
        self.masks, self.detached = list(masks), detached
        self.own: list[Own] = []
        self.merged = False
        self.left: list[Slices] = []

    def __call__(
        self, xs: Slices, own: list[Own], scales: Slices | None = None
    ) -> Slices:
        self.own, self.left = own, list(self.masks)
        outs = self.visit(self.net.body, [x.contiguous() for x in xs])
        if scales is not None:
            outs = [y * s.unsqueeze(-1) for y, s in zip(outs, scales)]
        return outs

    @overload
    def of(self, tensor: Tensor) -> Sequence[Tensor]: ...

    @overload
    def of(self, tensor: Tensor | None) -> Sequence[Tensor | None]: ...

    def of(self, tensor: Tensor | None) -> Sequence[Tensor | None]:
        """Each slice's own."""
        return [
            tensor if tensor is None else o.get(id(tensor), tensor) for o in self.own
        ]

    def visit(self, m: nn.Module, xs: Slices) -> Slices:
        for kind in type(m).__mro__:
            if kind in self.HOW:
                return self.HOW[kind](self, m, xs)
        raise NotImplementedError(type(m).__name__)

    def sequential(self, m: nn.Sequential, xs: Slices) -> Slices:
        for child in m:
            xs = self.visit(child, xs)
        return xs

    def residual(self, m: Residual, xs: Slices) -> Slices:
        return [x + y for x, y in zip(xs, self.visit(m.body, xs))]

    def again(self, m: Again, xs: Slices) -> Slices:
        return self.visit(m.layer[0], xs)

    def branches(self, m: Branches, xs: Slices) -> Slices:
        pairs = zip(self.visit(m.a, xs), self.visit(m.b, xs))
        return [torch.cat(pair, m.dim) for pair in pairs]

    def as_it_is(self, m: nn.Module, xs: Slices) -> Slices:
        return [m.forward(x) for x in xs]

    def silu(self, m: nn.Module, xs: Slices) -> Slices:
        return [x * torch.sigmoid(x) for x in xs]

    def dropout(self, m: Drop, xs: Slices) -> Slices:
        if not m.layer.training:
            return xs
        return [x * mask for x, mask in zip(xs, self.left.pop(0))]

    # -- Layers with parameters --------------------------------------------------------

    def affine(
        self,
        xs: Slices,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: list[int] | None = None,
    ) -> Slices:
        """x * weight + bias, each seen in ``shape``."""
        found = []
        for x, w, b in zip(xs, self.of(weight), self.of(bias)):
            if w is not None:
                x = x * (w if shape is None else w.reshape(shape))
            if b is not None:
                x = x + (b if shape is None else b.reshape(shape))
            found.append(x)
        return found

    def scale(self, m: Scale, xs: Slices) -> Slices:
        return self.affine(xs, m.weight, m.bias)

    def linear(self, m: nn.Linear, xs: Slices) -> Slices:
        if not is_parametrized(m):
            return self.times(xs, m.weight, m.bias)
        made: Any = m.get_submodule("parametrizations.weight")
        pairs = zip(self.of(made.original0), self.of(made.original1))
        weights = [g * v / v.square().sum(1, keepdim=True).sqrt() for g, v in pairs]
        return self.by_each(xs, weights, self.of(m.bias))

    def lora(self, m: Lora, xs: Slices) -> Slices:
        parts = zip(self.of(m.weight), self.of(m.up), self.of(m.down))
        return self.by_each(xs, [w + u @ d for w, u, d in parts], self.of(m.bias))

    def there_and_back(self, m: ThereAndBack, xs: Slices) -> Slices:
        return [x @ w.transpose(0, 1) @ w for x, w in zip(xs, self.of(m.weight))]

    def with_itself(self, m: WithItself, xs: Slices) -> Slices:
        form = m.form
        parts = zip(xs, self.of(form.weight), self.of(form.bias))
        return [torch.einsum("...i,oij,...j->...o", x, w, x) + b for x, w, b in parts]

    def prelu(self, m: nn.PReLU, xs: Slices) -> Slices:
        shape = [1, -1] + [1] * (xs[0].dim() - 2)
        parts = zip(xs, self.of(m.weight))
        return [torch.where(x > 0, x, x * w.reshape(shape)) for x, w in parts]

    def times(self, xs: Slices, weight: Tensor, bias: Tensor | None) -> Slices:
        return self.by_each(xs, self.of(weight), self.of(bias))

    def by_each(
        self, xs: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> Slices:
        found = []
        for x, w, b in zip(xs, weights, biases):
            y = x @ w.transpose(0, 1)
            found.append(y if b is None else y + b)
        return found

    def functional(self, m: Functional, xs: Slices) -> Slices:
        return self.times(xs, m.kernel, m.shift)

    def borrow(self, m: Borrow, xs: Slices) -> Slices:
        return self.times(xs, m.owner[0].weight, None)

    def matmul(self, m: Matmul, xs: Slices) -> Slices:
        return [x @ w for x, w in zip(xs, self.of(m.matrix))]

    def embedding(self, m: nn.Embedding, xs: Slices) -> Slices:
        found = []
        for x, w in zip(xs, self.of(m.weight)):
            if m.max_norm is not None:
                norms = w.detach().square().sum(1, keepdim=True).sqrt()
                shorter = m.max_norm / (norms + 1e-7)
                factor = torch.where(
                    norms > m.max_norm, shorter, torch.ones_like(norms)
                )
                w = w + (w * factor - w).detach()  # as if it had been written
            y = w[x]
            if m.padding_idx is not None:  # no gradient from there
                y = torch.where((x == m.padding_idx).unsqueeze(-1), y.detach(), y)
            found.append(y)
        return found

    def bag(self, m: nn.EmbeddingBag, xs: Slices) -> Slices:
        found = []
        for x, w in zip(xs, self.of(m.weight)):
            kept = torch.ones_like(x).unsqueeze(-1)
            if m.padding_idx is not None:
                kept = (x != m.padding_idx).unsqueeze(-1)
            y = (w[x] * kept).sum(1)
            if m.mode == "mean":
                y = y / kept.sum(1).clamp(min=1)
            found.append(y)
        return found

    def standardised(self, m: Standardised, xs: Slices) -> Slices:
        found = []
        for x, w, b in zip(xs, self.of(m.weight), self.of(m.bias)):
            w = normalised(w.flatten(1), [1], 1e-6).reshape(w.shape)
            found.append(F.conv2d(x, w, b, m.stride, m.padding, m.dilation, m.groups))
        return found

    def convolution(self, m: _ConvNd, xs: Slices) -> Slices:
        found = []
        for x, w, b in zip(xs, self.of(m.weight), self.of(m.bias)):
            padding: str | int | tuple[int, ...] = m.padding
            if m.padding_mode != "zeros":
                reach = m._reversed_padding_repeated_twice
                x, padding = F.pad(x, reach, m.padding_mode), 0
            run = CONVOLUTIONS[type(m)]
            found.append(run(x, w, b, m.stride, padding, m.dilation, m.groups))
        return found

    def transposed(self, m: _ConvTransposeNd, xs: Slices) -> Slices:
        run = TRANSPOSED[type(m)]
        padding = m.padding
        assert not isinstance(padding, str)
        return [
            run(x, w, b, m.stride, padding, m.output_padding, m.groups, m.dilation)
            for x, w, b in zip(xs, self.of(m.weight), self.of(m.bias))
        ]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
        scores = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        return scores / scores.sum(-1, keepdim=True) @ v

    def heads(self, qkv: Tensor, heads: int) -> Tensor:
        """(N, L, 3 D) split, attended and joined again."""
        n, length, triple = qkv.shape
        parts = []
        for h in range(heads):
            size = triple // 3 // heads
            q, k, v = (
                qkv[..., i * triple // 3 + h * size : i * triple // 3 + (h + 1) * size]
                for i in range(3)
            )
            parts.append(self.attend(q, k, v))
        return torch.cat(parts, -1)

    def attention(self, m: Attention, xs: Slices) -> Slices:
        qkv = self.times(xs, m.qkv.weight, m.qkv.bias)
        joined = [self.heads(one, m.heads) for one in qkv]
        return self.times(joined, m.out.weight, m.out.bias)

    def multihead(self, m: Multihead, xs: Slices) -> Slices:
        its = m.attention
        qkv = self.times(xs, its.in_proj_weight, its.in_proj_bias)
        joined = [self.heads(one, its.num_heads) for one in qkv]
        return self.times(joined, its.out_proj.weight, its.out_proj.bias)

    # -- Normalisation -----------------------------------------------------------------

    def by_running_statistics(self, m: _NormBase, xs: Slices) -> Slices:
        assert m.running_mean is not None and m.running_var is not None
        shape = [1, -1] + [1] * (xs[0].dim() - 2)
        pairs = zip(xs, self.of(m.running_mean), self.of(m.running_var))
        return [
            (x - mean.reshape(shape)) / (var.reshape(shape) + m.eps).sqrt()
            for x, mean, var in pairs
        ]

    def batch_norm(self, m: _BatchNorm, xs: Slices) -> Slices:
        shape = [1, -1] + [1] * (xs[0].dim() - 2)
        over = [d for d in range(xs[0].dim()) if d != 1]
        frozen = self.net.training and not m.training
        if m.running_mean is not None and (frozen or self.mode == "eval"):
            ys = self.by_running_statistics(m, xs)
        elif self.mode == "group_norm" and not frozen:
            ys = [self.grouped(x, self.groups_of(x.shape[1]), m.eps) for x in xs]
        elif self.mode == "sync":
            ys = self.joined(xs, over, shape, m.eps)
        else:
            ys = [normalised(x, over, m.eps) for x in xs]
        return self.affine(ys, m.weight, m.bias, shape)

    def joined(
        self, xs: Slices, over: list[int], shape: list[int], eps: float
    ) -> Slices:
        self.merged = True
        x = torch.cat(xs)
        if x.numel() == x.shape[1]:
            raise Refused("one value")
        mean = x.mean(over).reshape(shape)
        var = (x - mean).square().mean(over).reshape(shape)
        if self.detached:
            mean, var = mean.detach(), var.detach()
        return [(one - mean) / (var + eps).sqrt() for one in xs]

    def grouped(self, x: Tensor, groups: int, eps: float) -> Tensor:
        y = x.reshape(x.shape[0], groups, -1)
        return normalised(y, [2], eps).reshape(x.shape)

    def norm_act(self, m: NormAct, xs: Slices) -> Slices:
        return self.silu(m, self.batch_norm(m, xs))

    def hand_made(self, m: HandMade, xs: Slices) -> Slices:
        """Switched like instance norm if its buffers have the usual names."""
        shape = [1, -1] + [1] * (xs[0].dim() - 2)
        over = [d for d in range(xs[0].dim()) if d != 1]
        by_buffers = not m.training
        frozen = self.net.training and not m.training
        if m.names[0] == "running_mean" and self.mode != "group_norm" and not frozen:
            by_buffers = self.mode == "eval"
        ys = []
        means, vars_ = (self.of(getattr(m, name)) for name in m.names)
        for x, mean, var, gain in zip(xs, means, vars_, self.of(m.gain)):
            mean, var = mean.reshape(shape), var.reshape(shape)
            if not by_buffers:
                mean = x.mean(over, keepdim=True)
                var = (x - mean).square().mean(over, keepdim=True)
            ys.append((x - mean) / (var + 1e-3).sqrt() * gain.reshape(shape))
        return ys

    def instance_norm(self, m: _InstanceNorm, xs: Slices) -> Slices:
        frozen = self.net.training and not m.training
        by_instance = m.running_mean is None or not (frozen or self.mode == "eval")
        if self.mode == "group_norm" and not m.training and m.running_mean is not None:
            by_instance = False  # left alone
        if by_instance:
            over = list(range(2, xs[0].dim()))
            ys = [normalised(x, over, m.eps) for x in xs]
        else:
            ys = self.by_running_statistics(m, xs)
        return self.affine(ys, m.weight, m.bias, [1, -1] + [1] * (xs[0].dim() - 2))

    def group_norm(self, m: nn.GroupNorm, xs: Slices) -> Slices:
        ys = []
        for x in xs:
            if x.numel() == m.num_groups:
                raise Refused("one value")
            y = x.reshape(x.shape[0], m.num_groups, -1)
            y = y - y.mean(2, keepdim=True)
            y = y / (y.square().mean(2, keepdim=True) + m.eps).sqrt()
            ys.append(y.reshape(x.shape))
        return self.affine(ys, m.weight, m.bias, [1, -1] + [1] * (xs[0].dim() - 2))

    def layer_norm(self, m: nn.LayerNorm, xs: Slices) -> Slices:
        over = list(range(-len(m.normalized_shape), 0))
        ys = []
        for x in xs:
            x = x - x.mean(over, keepdim=True)
            ys.append(x / (x.square().mean(over, keepdim=True) + m.eps).sqrt())
        return self.affine(ys, m.weight, m.bias)

    def rms_norm(self, m: nn.RMSNorm, xs: Slices) -> Slices:
        over = list(range(-len(m.normalized_shape), 0))
        ys = []
        for x in xs:
            eps = torch.finfo(x.dtype).eps if m.eps is None else m.eps
            ys.append(x / (x.square().mean(over, keepdim=True) + eps).sqrt())
        return self.affine(ys, m.weight, None)

    HOW: ClassVar[
        dict[type[nn.Module], Callable[["Reference", Any, Slices], Slices]]
    ] = {
        nn.Sequential: sequential,
        Residual: residual,
        Branches: branches,
        Again: again,
        Drop: dropout,
        Scale: scale,
        nn.Linear: linear,
        Functional: functional,
        Borrow: borrow,
        Matmul: matmul,
        Lora: lora,
        ThereAndBack: there_and_back,
        WithItself: with_itself,
        nn.PReLU: prelu,
        Standardised: standardised,
        nn.Embedding: embedding,
        nn.EmbeddingBag: bag,
        Attention: attention,
        Multihead: multihead,
        NormAct: norm_act,
        _BatchNorm: batch_norm,
        HandMade: hand_made,
        _InstanceNorm: instance_norm,
        nn.GroupNorm: group_norm,
        nn.LayerNorm: layer_norm,
        nn.RMSNorm: rms_norm,
        **dict.fromkeys(CONVOLUTIONS, convolution),
        **dict.fromkeys(TRANSPOSED, transposed),
        **dict.fromkeys(AS_THEY_ARE, as_it_is),
        nn.SiLU: silu,
    }


def total_of(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    return sum(rest, first)


# -- Derivatives, a loop at a time -----------------------------------------------------


def derivative(out: Tensor, inputs: Slices) -> Slices:
    """Of a number, zeros where it does not depend; can be differentiated again."""
    found = torch.autograd.grad(out, inputs, create_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]


def jacobian(out: Tensor, inputs: Slices) -> Slices:
    """One tensor (*out.shape, *input.shape) an input."""
    rows = [_or_zero(o, inputs) for o in out.reshape(-1)]
    return [
        torch.stack(parts).reshape((*out.shape, *x.shape))
        for x, parts in zip(inputs, zip(*rows))
    ]


def _or_zero(out: Tensor, inputs: Slices) -> Slices:
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return derivative(out, inputs)


def directional(out: Tensor, inputs: Slices, tangents: Slices) -> Tensor:
    """Forward mode by two reverse ones."""
    u = torch.zeros_like(out).requires_grad_()
    if not out.requires_grad:
        return u
    total = sum(
        (g * t).sum() for g, t in zip(derivative_along(out, inputs, u), tangents)
    )
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        return torch.zeros_like(out)
    return derivative(total, [u])[0]


def derivative_along(out: Tensor, inputs: Slices, u: Tensor) -> Slices:
    found = torch.autograd.grad(out, inputs, u, create_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]
