"""Slow forms of normalisation, as their papers write them, for references.

They do not share code with the forms that run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmapsafe._call import Call


def statistics(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and variance over ``dims``, which keep length 1."""
    mean = x.mean(dims, keepdim=True)
    return mean, ((x - mean) ** 2).mean(dims, keepdim=True)


def normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps)"""
    mean, variance = statistics(x, dims)
    return (x - mean) / torch.sqrt(variance + eps)


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """(C,) in the shape that broadcasts against ``x`` (N, C, ...)."""
    return values.reshape([-1 if d == 1 else 1 for d in range(x.dim())])


def affine(call: Call, y: Tensor) -> Tensor:
    """y * weight + bias, by channel."""
    if call["weight"] is not None:
        y = y * along_channels(call["weight"], y)
    if call["bias"] is not None:
        y = y + along_channels(call["bias"], y)
    return y


def but_channels(x: Tensor) -> list[int]:
    """All dimensions of (N, C, ...) except that of the channels."""
    return [d for d in range(x.dim()) if d != 1]


def batch_norm(call: Call) -> Tensor:
    """Batch norm by the statistics of the input (Ioffe and Szegedy,
    https://arxiv.org/abs/1502.03167, algorithm 1)."""
    x = call["input"]
    return affine(call, normalised(x, but_channels(x), call["eps"]))


def by_running_statistics(call: Call) -> Tensor:
    """Batch norm by the running statistics."""
    x = call["input"]
    mean = along_channels(call["running_mean"], x)
    var = along_channels(call["running_var"], x)
    return affine(call, (x - mean) / torch.sqrt(var + call["eps"]))


def instance_norm(call: Call) -> Tensor:
    """Instance norm, by the statistics of each sample and channel (Ulyanov et al.,
    https://arxiv.org/abs/1607.08022, equation 4)."""
    x = call["input"]
    return affine(call, normalised(x, list(range(2, x.dim())), call["eps"]))


def group_norm(call: Call, groups: int) -> Tensor:
    """Group norm, by the statistics of groups of channels of each sample (Wu and He,
    https://arxiv.org/abs/1803.08494, equation 7)."""
    x: Tensor = call["input"]
    grouped = x.reshape(x.size(0), groups, x[0].numel() // groups)
    return affine(call, normalised(grouped, [2], call["eps"]).reshape(x.shape))
