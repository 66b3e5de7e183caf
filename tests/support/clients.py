"""What the tests of other libraries share: a network in training mode, and data."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def client(name: str) -> Any:
    """The module of this name of another library; tests are skipped without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def net(classes: int = 3) -> nn.Sequential:
    """In training mode and float64, with batch norms that have seen two batches."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Linear(6, classes),
    ).double()
    for _ in range(2):
        model(1 + 2 * images(16))
    return model


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 5, 5).double()


def labels(count: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (count,))
