"""Small random networks, of plain torch and in smooth operations only.

``Net`` runs a tree of modules. What the tree may hold, ``fuzz_reference.py`` can write
out in plain operations: a new module goes into both.
"""

import random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Shape = tuple[int, ...]
Stage = tuple[Shape, bool]

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
BATCH_NORMS[3] = nn.BatchNorm3d
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ACTIVATIONS = (nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus, nn.Sigmoid)
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES: list[PaddingMode] = ["zeros"] * 5
PADDING_MODES += ["reflect", "replicate", "circular"]
UPSAMPLINGS = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Branches(nn.Module):
    """Two bodies side by side, their outputs joined along the channels."""

    def __init__(self, a: nn.Module, b: nn.Module, dim: int) -> None:
        super().__init__()
        self.a, self.b, self.dim = a, b, dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], self.dim)


class Scale(nn.Module):
    """Parameters used directly, by operations that broadcast."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * 0.5 + 1)
        self.bias = nn.Parameter(torch.randn(shape) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Functional(nn.Module):
    """``F.linear`` on parameters of its own; the bias may be one that broadcasts."""

    def __init__(self, ins: int, outs: int, bias_shape: Shape) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outs, ins) * 0.5)
        self.shift = nn.Parameter(torch.randn(bias_shape) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel, self.shift)


class Matmul(nn.Module):
    """A product with a parameter, outside every layer."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(ins, outs) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Borrow(nn.Module):
    """Uses the weight of a linear layer that belongs to another module."""

    def __init__(self, owner: nn.Linear) -> None:
        super().__init__()
        self.owner = [owner]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.owner[0].weight)


class Lora(nn.Linear):
    """A linear layer whose weight is the sum of its own and a product."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs)
        self.down = nn.Parameter(torch.randn(1, ins) * 0.5)
        self.up = nn.Parameter(torch.randn(outs, 1) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class ThereAndBack(nn.Module):
    """One weight, used as it is and turned around."""

    def __init__(self, ins: int, between: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(between, ins) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight.t())


class WithItself(nn.Module):
    """A bilinear layer of its input and its input."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.form = nn.Bilinear(ins, ins, outs)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


class Standardised(nn.Conv2d):
    """Batch norm of the weight, as in timm: no layer of the model's."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        rows = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        weight = rows.reshape_as(self.weight)
        return F.conv2d(
            x,
            weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class Again(nn.Module):
    """A layer that stands elsewhere, once more, and has no second name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer[0](x)


class NormAct(nn.BatchNorm2d):
    """A batch norm layer with a forward of its own, and an activation in it."""

    def forward(self, x: Tensor) -> Tensor:
        use_batch = self.training or self.running_mean is None
        mean = self.running_mean if not use_batch or self.track_running_stats else None
        var = self.running_var if not use_batch or self.track_running_stats else None
        momentum = self.momentum
        if self.training and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        momentum = 0.0 if momentum is None else momentum
        y = F.batch_norm(
            x, mean, var, self.weight, self.bias, use_batch, momentum, self.eps
        )
        return F.silu(y)


class HandMade(nn.Module):
    """Batch norm as people write it, with buffers of its own, written in three ways."""

    def __init__(self, channels: int, names: tuple[str, str], way: str) -> None:
        super().__init__()
        self.names, self.way = names, way
        self.register_buffer(names[0], torch.randn(channels) * 0.5)
        self.register_buffer(names[1], torch.rand(channels) + 0.5)
        self.gain = nn.Parameter(torch.randn(channels) * 0.3 + 1)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, var = (getattr(self, name) for name in self.names)
        if self.training:
            over = [d for d in range(x.dim()) if d != 1]
            own = x.mean(over)
            own_var = (x - own.reshape(shape)).square().mean(over)
            with torch.no_grad():
                for name, new in zip(self.names, (own, own_var)):
                    self.write(name, new.detach())
            mean, var = own, own_var
        y = (x - mean.reshape(shape)) / (var.reshape(shape) + 1e-3).sqrt()
        return y * self.gain.reshape(shape)

    def write(self, name: str, new: Tensor) -> None:
        old = getattr(self, name)
        if self.way == "in place":
            old.mul_(0.9).add_(new, alpha=0.1)
        elif self.way == "copied":
            old.copy_(0.9 * old + 0.1 * new)
        else:
            setattr(self, name, 0.9 * old + 0.1 * new)


class Attention(nn.Module):
    """Self-attention of (N, L, D), by torch's fused function or written out."""

    def __init__(self, size: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        n, length, size = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.heads, size // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            y = torch.softmax(scores, -1) @ v
        return self.out(y.transpose(1, 2).reshape(n, length, size))


class Multihead(nn.Module):
    """torch's own attention layer."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Swap(nn.Module):
    """(N, L, D) as (N, D, L) and back: views that are not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class Tokens(nn.Module):
    """(N, C, ...) as (N, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def __init__(self, dims: Shape) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


class Drop(nn.Module):
    """Dropout; what it dropped is in ``masks``, for the reference to do the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.masks: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.masks is not None:
            self.masks.append((y / x).detach())
        return y


class Depth(nn.Module):
    """Stochastic depth: some samples of a batch are dropped as a whole."""

    def __init__(self, p: float, way: str) -> None:
        super().__init__()
        self.p, self.way = p, way

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = x.shape[:1] + (1,) * (x.dim() - 1)
        if self.way == "rand":
            kept = torch.rand(shape, dtype=x.dtype) >= self.p
        elif self.way == "bernoulli":
            kept = torch.bernoulli(torch.full(shape, 1 - self.p, dtype=x.dtype))
        else:
            kept = x.new_empty(shape).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)


class Net(nn.Module):
    """A body, and a second input that scales its output; with the masks of dropouts."""

    def __init__(self, body: nn.Module, gives_masks: bool) -> None:
        super().__init__()
        self.body, self.gives_masks = body, gives_masks

    def forward(
        self, x: Tensor, scale: Tensor | None = None
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        drops = [m for m in self.modules() if isinstance(m, Drop)]
        masks: list[Tensor] = []
        try:
            for m in drops:
                m.masks = masks if self.gives_masks else None
            out = self.body(x)
        finally:
            for m in drops:
                m.masks = None
        if scale is not None:
            out = out * scale.unsqueeze(-1)
        return (out, tuple(masks)) if self.gives_masks else out


class Builder:
    """Draws a network. ``shape`` is that of one sample on its way; channels come first
    in it, or last where it is ``tokens``. ``usual``: of layers that most networks have.
    """

    def __init__(
        self,
        rng: random.Random,
        precise: bool,
        first_order: bool,
        named_twice: bool,
        may_bound: bool,
        hand_made: bool,
        usual: bool = False,
    ) -> None:
        self.rng, self.precise, self.usual = rng, precise, usual
        self.first_order, self.named_twice = first_order, named_twice
        self.hand_made = hand_made
        self.may_bound = may_bound  # embeddings by max_norm, which torch writes
        self.shape: Shape = ()
        self.tokens = False
        self.linears: list[nn.Linear] = []
        self.norms: list[_BatchNorm] = []
        # A layer, and what came and went: the shape, and whether it is of tokens.
        self.seen: list[tuple[nn.Module, Stage, Stage]] = []

    @property
    def spatial(self) -> int:
        return len(self.shape) - 1

    # -- One layer ---------------------------------------------------------------------

    def linear(self) -> nn.Module | None:
        if self.spatial and not self.tokens:
            return None
        ins, outs = self.shape[-1], self.rng.choice((2, 3, 4))
        kind = self.rng.random()
        made: nn.Module
        if kind < 0.6:
            made = layer = nn.Linear(ins, outs, bias=self.rng.random() < 0.8)
            twins = [a for a in self.linears if a.weight.shape == layer.weight.shape]
            if twins and self.rng.random() < 0.5:
                layer.weight = self.rng.choice(twins).weight
            self.linears.append(layer)
        elif kind < 0.7:
            shapes: list[Shape] = [(outs,), (1,), (), (1, outs)]
            bias_shape = self.rng.choice(shapes)
            if self.tokens and bias_shape == (1, outs):
                bias_shape = (outs,)
            made = Functional(ins, outs, bias_shape)
        elif kind < 0.76:
            made = Matmul(ins, outs)
        elif kind < 0.81:
            made = Lora(ins, outs)
        elif kind < 0.85:
            made, outs = ThereAndBack(ins, outs), ins
        elif kind < 0.88:
            made = WithItself(ins, outs)
        elif kind < 0.93 and self.first_order:  # torch's has no forward mode
            made = nn.utils.parametrizations.weight_norm(nn.Linear(ins, outs))
        else:
            owners = [a for a in self.linears if a.in_features == ins]
            if not owners:
                return None
            owner = self.rng.choice(owners)
            made, outs = Borrow(owner), owner.out_features
        self.shape = (*self.shape[:-1], outs)
        return made

    def conv(self) -> nn.Module | None:
        d = self.spatial
        if not d or self.tokens:
            return None
        rng, ins = self.rng, self.shape[0]
        made: nn.Module
        kernel = rng.choice((1, 2, 3))
        groups = rng.choice([g for g in (1, 1, 2, 3, 4) if ins % g == 0])
        outs = groups * rng.choice((1, 2)) if groups > 1 else rng.choice((2, 3, 4))
        dilation = rng.choice((1, 1, 1, 2))
        if not self.usual and rng.random() < 0.2:
            stride = rng.choice((1, 2))
            padding = rng.choice((0, 0, 1)) if kernel > 1 else 0
            made = TRANSPOSED[d](
                ins,
                outs,
                kernel,
                stride,
                padding,
                output_padding=stride - 1,
                groups=groups,
                bias=rng.random() < 0.7,
                dilation=dilation,
            )
            length = [
                (n - 1) * stride - 2 * padding + dilation * (kernel - 1) + stride
                for n in self.shape[1:]
            ]
        else:
            around = rng.choice((0, 0, 1, 1, None))  # None is "same"
            stride = 1 if around is None else rng.choice((1, 1, 2))
            mode = "zeros" if self.usual else rng.choice(PADDING_MODES)
            make = CONVS[d]
            plain = d == 2 and kernel > 1 and mode == "zeros"
            if plain and self.first_order and not self.usual and rng.random() < 0.1:
                make = Standardised
            made = make(
                ins,
                outs,
                kernel,
                stride,
                "same" if around is None else around,
                dilation,
                groups,
                bias=rng.random() < 0.7,
                padding_mode=mode,
            )
            reach = dilation * (kernel - 1)
            if mode != "zeros" and min(self.shape[1:]) <= max(around or 0, reach):
                return None  # such padding needs an input longer than it
            length = list(self.shape[1:])
            if around is not None:
                length = [(n + 2 * around - reach - 1) // stride + 1 for n in length]
        if min(length) < 1 or max(length) > 8:
            return None
        self.shape = (outs, *length)
        return made

    def batch_norm(self) -> nn.Module | None:
        if self.tokens:
            return None
        rng, d, channels = self.rng, self.spatial, self.shape[0]
        options: dict[str, Any] = {
            "eps": rng.choice((1e-5, 1e-5, 1e-2)),
            "momentum": rng.choice((0.1, 0.1, 0.7, 1.0, None)),
            "affine": rng.random() < 0.8,
            "track_running_stats": rng.random() < 0.85,
        }
        kind = rng.random()
        if kind > 0.95 and self.hand_made:
            names = ("running_mean", "running_var"), ("mu", "sigma")
            ways = "in place", "copied", "assigned"
            return HandMade(channels, rng.choice(names), rng.choice(ways))
        made: _BatchNorm
        if kind < 0.08:
            made = nn.SyncBatchNorm(channels, **options)
        elif kind < 0.2 and d == 2:
            made = NormAct(channels, **options)
        else:
            made = BATCH_NORMS[d](channels, **options)
        if made.affine and rng.random() < 0.1:
            made.register_parameter("bias", None)
        if made.track_running_stats and rng.random() < 0.05:
            made.track_running_stats = False  # the buffers stay
        twins = [
            a
            for a in self.norms
            if a.affine and made.affine and a.num_features == channels
        ]
        if twins and rng.random() < 0.2:
            made.weight = rng.choice(twins).weight
        self.norms.append(made)
        return made

    def other_norm(self) -> nn.Module:
        rng, d = self.rng, self.spatial
        kinds = ["layer", "rms"]
        if not self.tokens:
            kinds += ["group", "instance", "instance"] if d else ["group"]
        kind = rng.choice(kinds)
        affine = rng.random() < 0.7
        if kind in ("layer", "rms"):
            last = rng.randint(1, len(self.shape))
            shape = self.shape[-last:]
            if kind == "rms":
                eps = rng.choice((None, 1e-5)) if self.precise else 1e-5
                return nn.RMSNorm(shape, eps, affine)
            return nn.LayerNorm(shape, 1e-5, affine, bias=rng.random() < 0.8)
        channels = self.shape[0]
        if kind == "group":
            groups = rng.choice([g for g in (1, 2, 3, 4) if channels % g == 0])
            return nn.GroupNorm(groups, channels, affine=affine)
        options: dict[str, Any] = {
            "momentum": rng.choice((0.1, 0.1, None)),  # None, says torch's docstring
            "affine": affine,
            "track_running_stats": rng.random() < 0.6,
        }
        return INSTANCE_NORMS[d](channels, **options)

    def pool(self) -> nn.Module | None:
        d = self.spatial
        if not d or self.tokens:
            return None
        if d == 3 and not self.precise:
            return None  # torch has none of them in bfloat16
        kind = self.rng.choice(("average", "max", "adaptive"))
        if kind == "adaptive":
            size = self.rng.choice((1, 2))
            self.shape = (self.shape[0], *[size] * d)
            return ADAPTIVE[d](size)
        if min(self.shape[1:]) < 2 or (kind == "max" and not self.precise):
            return None
        stride = self.rng.choice((1, 2))
        self.shape = (self.shape[0], *[(n - 2) // stride + 1 for n in self.shape[1:]])
        return (AVG_POOLS if kind == "average" else MAX_POOLS)[d](2, stride)

    def direct(self) -> nn.Module:
        if self.tokens:
            return Scale((self.shape[-1],))
        shapes = [self.shape, (self.shape[0], *[1] * self.spatial)]
        return Scale(self.rng.choice([*shapes, (1,) * len(self.shape), ()]))

    def attention(self) -> nn.Module | None:
        if not self.tokens:
            return None
        size = self.shape[-1]
        heads = self.rng.choice([h for h in (1, 2) if size % h == 0])
        kinds = ("fused", "written", "layer") if self.first_order else ("written",)
        kind = self.rng.choice(kinds)  # torch's have one derivative
        if kind == "layer":
            return Multihead(size, heads)
        return Attention(size, heads, kind == "fused")

    def turn(self) -> nn.Module | None:
        """Channels first or last."""
        if self.tokens:
            self.shape, self.tokens = self.shape[::-1], False
            return Swap()
        if not self.spatial:
            return None
        length = 1
        for n in self.shape[1:]:
            length *= n
        self.shape, self.tokens = (length, self.shape[0]), True
        return Tokens()

    def activation(self) -> nn.Module:
        rare = self.rng.random() < 0.15 and not self.usual
        if rare and self.precise and self.first_order:
            # Of the second dimension, whatever it is; it is not smooth at 0, and
            # torch's has wrong derivatives under two vmaps.
            return nn.PReLU(self.shape[0] if self.rng.random() < 0.5 else 1)
        if self.rng.random() < 0.1:
            return nn.Softmax(-1)
        return self.rng.choice(ACTIVATIONS)()

    def larger(self) -> nn.Module | None:
        d = self.spatial
        if not d or self.tokens or max(self.shape[1:]) > 3:
            return None
        self.shape = (self.shape[0], *[2 * n for n in self.shape[1:]])
        mode = self.rng.choice(("nearest", UPSAMPLINGS[d]))
        return nn.Upsample(scale_factor=2, mode=mode)

    def again(self) -> nn.Module | None:
        """A layer that was used before, once more."""
        fitting = [
            (module, after)
            for module, before, after in self.seen
            if before == (self.shape, self.tokens)
            # In another place it could write over what is read again.
            and not getattr(module, "inplace", False)
        ]
        if not fitting:
            return None
        module, (self.shape, self.tokens) = self.rng.choice(fitting)
        return module if self.named_twice else Again(module)

    def residual(self) -> nn.Module:
        before = self.shape, self.tokens
        body = self.body(self.rng.randint(1, 2), nested=True)
        if (self.shape, self.tokens) == before:
            return Residual(body)
        return body

    def branches(self) -> nn.Module:
        before = self.shape, self.tokens
        a = self.body(1, nested=True)
        shape, tokens = self.shape, self.tokens
        known = [*self.linears], [*self.norms], [*self.seen]
        self.shape, self.tokens = before
        b = self.body(1, nested=True)
        one = shape[:-1] if tokens else shape[1:]
        other = self.shape[:-1] if self.tokens else self.shape[1:]
        if tokens != self.tokens or one != other:
            self.shape, self.tokens = shape, tokens
            self.linears, self.norms, self.seen = known
            return a
        if tokens:
            self.shape = (*one, shape[-1] + self.shape[-1])
            return Branches(a, b, -1)
        self.shape = (shape[0] + self.shape[0], *one)
        return Branches(a, b, 1)

    def dropout(self) -> Drop:
        p = self.rng.choice((0.3, 0.5))
        if self.spatial == 2 and not self.tokens and self.rng.random() < 0.5:
            return Drop(nn.Dropout2d(p))
        if self.rng.random() < 0.3:
            return Drop(Depth(p, self.rng.choice(("rand", "bernoulli", "bernoulli_"))))
        return Drop(nn.Dropout(p))

    # -- The network -------------------------------------------------------------------

    LAYERS = (
        ("linear", 4),
        ("conv", 5),
        ("batch_norm", 5),
        ("other_norm", 2),
        ("pool", 1),
        ("direct", 1),
        ("attention", 2),
        ("turn", 1),
        ("activation", 3),
        ("again", 2),
        ("larger", 1),
    )
    LARGER = (("residual", 2), ("branches", 1))
    USUAL = (
        "linear",
        "conv",
        "batch_norm",
        "other_norm",
        "pool",
        "activation",
        "residual",
    )

    def body(self, many: int, nested: bool = False) -> nn.Sequential:
        kinds: tuple[tuple[str, int], ...] = self.LAYERS
        if not nested:
            kinds += self.LARGER
        if self.usual:
            kinds = tuple([kind for kind in kinds if kind[0] in self.USUAL])
        names, weights = zip(*kinds)
        layers: list[nn.Module] = []
        while len(layers) < many:
            before = self.shape, self.tokens
            (name,) = self.rng.choices(names, weights)
            made = getattr(self, name)()
            if made is None:
                self.shape, self.tokens = before
                continue
            written = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, _BatchNorm
            if type(made) is nn.SiLU and layers and isinstance(layers[-1], written):
                made.inplace = self.rng.random() < 0.3
            layers.append(made)
            if not isinstance(made, (Residual, Branches, Again, nn.Sequential)):
                self.seen.append((made, before, (self.shape, self.tokens)))
        return nn.Sequential(*layers)

    def net(self, outs: int, dropout: bool) -> tuple[Net, Shape, int]:
        """A network, the shape of its samples, and how many words it knows: 0 where it
        takes numbers."""
        rng = self.rng
        kind = rng.choices(("vec", "seq", "img", "vol", "words"), (4, 3, 6, 1, 2))[0]
        words = size = 0
        layers: list[nn.Module] = []
        shape: Shape
        embedding: nn.Embedding | nn.EmbeddingBag | None = None
        if kind == "vec":
            shape = self.shape = (rng.choice((2, 3, 4)),)
        elif kind == "words":
            words, shape = 5, (rng.choice((2, 3, 4)),)
            size = rng.choice((2, 4))
            # A padding row has tangents and no gradients.
            padding = rng.choice((None, 0, 2)) if self.first_order else None
            if self.first_order and rng.random() < 0.15:  # torch's has one derivative
                mode = rng.choice(("mean", "sum"))
                embedding = nn.EmbeddingBag(words, size, mode=mode, padding_idx=padding)
                self.shape = (size,)
            else:
                most = rng.choice((None, None, 0.7)) if self.may_bound else None
                embedding = nn.Embedding(words, size, padding, max_norm=most)
                self.shape, self.tokens = (*shape, size), True
                if rng.random() < 0.3:
                    layers.append(Scale(self.shape))
            layers.insert(0, embedding)
        else:
            d = {"seq": 1, "img": 2, "vol": 3}[kind]
            most = {1: 6, 2: 5, 3: 3}[d]
            lengths = [rng.randint(2, most) for _ in range(d)]
            shape = self.shape = (rng.choice((1, 2, 3, 4)), *lengths)
        layers.append(self.body(rng.randint(2, 4)))
        if dropout:
            layers += [self.dropout(), self.body(1)]
        if rng.random() < 0.5:
            layers.append(self.activation())
        if self.spatial and self.tokens and rng.random() < 0.5:
            layers.append(Mean((1,)))
            ins = self.shape[-1]
        elif self.spatial and not self.tokens and rng.random() < 0.5:
            layers.append(Mean(tuple(range(2, 2 + self.spatial))))
            ins = self.shape[0]
        else:
            if self.spatial:
                layers.append(nn.Flatten())
            ins = torch.Size(self.shape).numel()
        head = nn.Linear(ins, outs, bias=rng.random() < 0.8)
        if (
            embedding is not None
            and embedding.max_norm is None
            and (outs, ins) == (words, size)
            and rng.random() < 0.7
        ):
            head.weight = embedding.weight
        layers.append(head)
        return Net(nn.Sequential(*layers), dropout), shape, words
