"""The data and the network of the examples: 1797 handwritten digits, 3800 weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe import MissingExtraError

CLASSES = 10


def load() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8), float64 in 0..1, and classes (1797,), in random order.

    float64, so that a comparison with a slow form shows errors and not rounding.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError(
            "vmapsafe.examples",
            "the digits come with scikit-learn, which cannot be imported here",
            "Run pip install scikit-learn",
        ) from None

    digits = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits.images), generator=generator)
    images = torch.tensor(digits.images, dtype=torch.float64).unsqueeze(1) / 16
    return images[order], torch.tensor(digits.target)[order]


def network(classes: int = CLASSES) -> nn.Sequential:
    """A convolution net with BatchNorm, (N, 1, 8, 8) -> (N, classes), float64."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(256, classes),
    ).double()


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int = 0) -> None:
    """Train in the ordinary way; the model stays in training mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for some in torch.split(torch.randperm(len(x), generator=generator), 50):
            loss = F.cross_entropy(model(x[some]), y[some])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def accuracy(logits: Tensor, y: Tensor) -> float:
    """The share of right logits, (..., N, classes), for y, (N,) or (..., N)."""
    return float((logits.argmax(-1) == y).double().mean())
