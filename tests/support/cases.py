"""Networks as data: small, smooth, in training mode, with statistics of their own.

Adding a layer to the library adds a row here; if rows of its parameters are recorded,
also a call in tests/rules/test_kept_calls.py. ``slices`` has the shape (B, N, ...): B
slices of N samples, N and the rest large enough for every mode.
"""

from dataclasses import dataclass
from typing import Callable, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(
        self, device: str = "cpu", dtype: torch.dtype = torch.float64
    ) -> nn.Module:
        torch.manual_seed(1)
        model = self.make().to(device, dtype)
        for _ in range(2):
            model(1.5 + 2 * torch.randn(7, *self.shape, device=device, dtype=dtype))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):  # instance norm may not move it
                    buffer.add_(0.1)
        return model.train()

    def slices(
        self,
        b: int = 3,
        n: int = 2,
        device: str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        torch.manual_seed(2)
        return torch.randn(b, n, *self.shape, device=device, dtype=dtype)

    def __str__(self) -> str:
        return self.name


def _net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def _without_bias() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4)
    layer.register_parameter(
        "bias", None
    )  # bias=False, which older versions of torch do not have
    return layer


def _without_momentum() -> nn.InstanceNorm2d:
    layer = nn.InstanceNorm2d(4, track_running_stats=True)
    layer.momentum = None  # torch's docstring allows it, the type of __init__ does not
    return layer


class Twice(nn.Module):
    """One batch norm layer, used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(torch.tanh(self.norm(self.conv(x)))))


class Tied(nn.Module):
    """Two batch norm layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.linear(self.a(x))))


class Recurrent(nn.Module):
    """A recurrent layer after a batch norm layer, which shares its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.layer = nn.LSTM(2, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(self.norm(x).mT)[0]
        return output


class PartlyFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _net(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
        self.head = _net(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.stem.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


CASES = [
    Case(
        "conv2d",
        lambda: _net(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 2)
        ),
        (2, 5, 5),
    ),
    Case(
        "conv1d",
        lambda: _net(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh()),
        (2, 7),
    ),
    Case(
        "conv3d",
        lambda: _net(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.Tanh()),
        (1, 3, 3, 3),
    ),
    Case("mlp", lambda: _net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()), (3,)),
    Case("no affine", lambda: nn.BatchNorm2d(4, affine=False), (4, 3, 3)),
    Case("no bias", _without_bias, (4, 3, 3)),
    Case(
        "no statistics",
        lambda: _net(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4, track_running_stats=False)),
        (2, 4, 4),
    ),
    Case("cumulative average", lambda: nn.BatchNorm2d(4, momentum=None), (4, 3, 3)),
    Case("sync batch norm", lambda: nn.SyncBatchNorm(4), (4, 3, 3)),
    Case(
        "instance norm with statistics",
        lambda: _net(
            nn.Conv2d(2, 4, 2),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        ),
        (2, 5, 5),
    ),
    Case(
        "instance norm 1d, no affine",
        lambda: _net(
            nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, track_running_stats=True)
        ),
        (2, 6),
    ),
    Case(
        "instance norm 3d",
        lambda: _net(
            nn.Conv3d(1, 4, 2),
            nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
        ),
        (1, 3, 3, 3),
    ),
    Case(
        "instance norm, momentum None",
        lambda: _net(
            nn.Conv2d(2, 4, 2),
            _without_momentum(),
        ),
        (2, 5, 5),
    ),
    Case(
        "rms norm",
        lambda: _net(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.RMSNorm(5), nn.Tanh()),
        (2, 7),
    ),
    Case("recurrent", Recurrent, (2, 3)),
    Case("used twice", Twice, (4, 3, 3)),
    Case("tied weights", Tied, (4,)),
    Case("partly frozen", PartlyFrozen, (2, 6, 6)),
]
