"""Networks in which parameters are used in every way."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Inputs = Callable[[], Tensor]


class Twice(nn.Module):
    """One weight used twice, once through F.linear and once by an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.out(torch.tanh(self.a(x)) @ self.a.weight + x * self.a.bias)


class Tied(nn.Module):
    """An embedding whose weight is also the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=2)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(x)))).mean(1)


class Direct(nn.Module):
    """A module that uses its parameters without any layer, and one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.idle = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,ij->nj", x.sin() * self.scale, self.matrix)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + self.attend(x, x, x)[0])).mean(1)


class Places(nn.Module):
    """Embeddings of input and position, the latter the same for all samples."""

    def __init__(self, tokens: int = 5, words: int = 30) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 4, padding_idx=-1)
        self.places = nn.Embedding(tokens, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.size(1)))
        return self.out(torch.tanh(h)).mean(1)


class Folded(nn.Module):
    """Makes several rows of one sample before a convolution and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        h = torch.tanh(self.norm(self.conv(x.flatten(0, 1))))
        return self.out(h.mean((2, 3)).view(n, -1, 4).mean(1))


class Halves(nn.Module):
    """Two branches, of which the second part of a sample goes through one only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(self.a(x[:, :4]))
        return self.a(x[:, :4]) * self.b(x[:, 4:].detach())


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def image(*layers: nn.Module, channels: int, classes: int = 3) -> nn.Sequential:
    return net(*layers, nn.Tanh(), nn.Flatten(2), Mean(), nn.Linear(channels, classes))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


def small_mlp(inputs: int = 4, hidden: int = 6, outputs: int = 3) -> nn.Sequential:
    """In float64, with a batch norm that has seen one batch."""
    torch.manual_seed(0)
    layers = nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.Tanh()
    model = net(*layers, nn.Linear(hidden, outputs)).double()
    model(torch.randn(9, inputs, dtype=torch.float64))
    return model


def conv(
    dims: int,
    channels: int,
    outputs: int,
    kernel: int | tuple[int, ...],
    **options: Any,
) -> nn.Module:
    return getattr(nn, f"Conv{dims}d")(channels, outputs, kernel, **options)


def normed() -> nn.Sequential:
    layer = nn.Linear(4, 3)
    return net(parametrizations.weight_norm(layer), nn.Tanh(), nn.Linear(3, 3))


def frozen() -> nn.Sequential:
    model = net(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    return model


def batch(*shape: int) -> Inputs:
    return lambda: torch.randn(5, *shape, dtype=torch.float64)


def words(count: int, *shape: int) -> Inputs:
    return lambda: torch.randint(count, (5, *shape))


# name: (network, inputs)
NETS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "conv2d": (
        lambda: image(conv(2, 2, 3, 3), nn.BatchNorm2d(3), channels=3),
        batch(2, 6, 5),
    ),
    "conv2d, stride and padding": (
        lambda: image(
            conv(2, 2, 8, 3, stride=2, padding=1),
            *(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            conv(2, 8, 9, (2, 3), padding="valid"),
            channels=9,
        ),
        batch(2, 7, 6),
    ),
    "conv2d, same, dilation": (
        lambda: image(
            conv(2, 2, 4, 3, padding="same"),
            conv(2, 4, 4, 2, padding="same", dilation=2, bias=False),
            channels=4,
        ),
        batch(2, 5, 5),
    ),
    "conv2d, few positions": (
        lambda: image(conv(2, 8, 16, 3, stride=2), channels=16),
        batch(8, 5, 5),
    ),
    "conv2d, 1 x 1": (
        lambda: image(
            conv(2, 6, 8, 1, stride=2), conv(2, 8, 4, 1, padding=1), channels=4
        ),
        batch(6, 5, 5),
    ),
    "conv2d, groups": (
        lambda: image(
            conv(2, 4, 8, 3, groups=2), conv(2, 8, 8, 2, groups=8), channels=8
        ),
        batch(4, 5, 5),
    ),
    "conv2d, groups, few positions": (
        lambda: image(conv(2, 8, 32, 3, groups=2, stride=2), channels=32),
        batch(8, 5, 5),
    ),
    "conv2d, dilation, few positions": (
        lambda: image(conv(2, 8, 16, 3, dilation=2), channels=16),
        batch(8, 6, 6),
    ),
    "conv1d": (
        lambda: image(
            conv(1, 2, 4, 3, stride=2, padding=1), nn.BatchNorm1d(4), channels=4
        ),
        batch(2, 9),
    ),
    "conv3d": (
        lambda: image(conv(3, 1, 4, 2), nn.BatchNorm3d(4), channels=4),
        batch(1, 4, 3, 3),
    ),
    "transposed": (
        lambda: image(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4), channels=4),
        batch(2, 4, 4),
    ),
    "mlp": (
        lambda: net(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 3, bias=False)
        ),
        batch(4),
    ),
    "linear on tokens": (
        lambda: net(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3), nn.Flatten(1, 2)),
        batch(3, 4),
    ),
    "linear on many tokens": (
        lambda: net(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(1)),
        batch(9, 2),
    ),
    "norms": (
        lambda: image(
            *(conv(2, 2, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)),
            *(nn.LayerNorm([4, 4, 4]), nn.BatchNorm2d(4, affine=False)),
            nn.RMSNorm([4, 4]),
            nn.InstanceNorm2d(4, affine=True),
            channels=4,
        ),
        batch(2, 5, 5),
    ),
    "embedding": (lambda: Places(), words(30, 5)),
    "embedding, many words": (lambda: Places(9, 2), words(2, 9)),
    "used twice": (Twice, batch(4)),
    "tied": (Tied, words(7, 3)),
    "direct": (Direct, batch(4)),
    "weight norm": (normed, batch(4)),
    "attention": (Attends, batch(3, 4)),
    "frozen": (frozen, batch(4)),
    "several rows a sample": (Folded, batch(3, 2, 5, 4)),
    "branches": (Halves, batch(8)),
}
# Batch norm with more than one value a channel.
NORMED = [
    *("conv2d", "conv2d, stride and padding", "conv1d", "conv3d", "norms"),
    *("transposed", "several rows a sample"),
]
CASES = [
    *((name, "eval") for name in NETS),
    *((name, mode) for name in NORMED for mode in ("no_running_stats", "group_norm")),
]


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    make, inputs = NETS[name]
    model = make().double()
    for _ in range(2):
        model(inputs())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = inputs()
    return model, x, torch.randn_like(model(x)).detach()


def mse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="sum")


# For "sync": what slow.contributions can write out.
SYNC: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "images": (
        lambda: net(
            *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 2)),
            *(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(18, 3)),
        ),
        (5, 2, 5, 6),
    ),
    "rows": (
        lambda: net(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3, bias=True)
        ),
        (5, 4),
    ),
}


def images() -> tuple[nn.Module, Tensor, Tensor]:
    """Convolutions and norms of images, and a batch of five, in float32."""
    torch.manual_seed(3)
    model = image(
        *(conv(2, 2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.GroupNorm(2, 4)),
        conv(2, 4, 16, 3),
        channels=16,
    )
    x, y = torch.randn(5, 2, 6, 6), torch.randn(5, 3)
    model(x)
    return model, x, y


class Keeps(nn.Module):
    """A hand-made normalisation that keeps a mean."""

    mu: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mu.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x - self.mu.view(-1, 1, 1)
