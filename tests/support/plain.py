"""The slow meanings, in plain torch: no vmap, nothing of vmapsafe."""

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

ModeName = Literal["eval", "no_running_stats", "group_norm", "sync"]


class ByFormula(nn.Module):
    """Normalises by the statistics of the call itself, written out."""

    def __init__(self, layer: _NormBase, groups: int | None = None) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.eps, self.groups = layer.eps, groups

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.groups is None:
            dims = [d for d in range(x.dim()) if d != 1]
        else:
            x = x.reshape(x.size(0), self.groups, -1)
            dims = [2]
        mean = x.mean(dims, keepdim=True)
        var = (x - mean).square().mean(dims, keepdim=True)
        y = ((x - mean) / (var + self.eps).sqrt()).reshape(shape)
        return affine(y, self.weight, self.bias)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Each channel times its weight, plus its bias."""
    per_channel = [1, -1] + [1] * (y.dim() - 2)
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y


class BySample(nn.Module):
    """Instance norm by the statistics of each sample, written out."""

    def __init__(self, layer: _NormBase) -> None:
        super().__init__()
        self.norm = ByFormula(layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(x[i : i + 1]) for i in range(len(x))])


def switched(model: nn.Module, mode: ModeName, num_groups: int = 2) -> nn.Module:
    """A copy of ``model`` that does by hand what a block of ``mode`` promises."""
    model = copy.deepcopy(model)
    was_training = model.training
    if isinstance(model, _NormBase):  # so that there is a place to put another layer
        model = nn.Sequential(model).train(was_training)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        batch_norm = isinstance(layer, _BatchNorm)
        if not batch_norm and getattr(layer, "running_mean", None) is None:
            continue
        if was_training and not layer.training:
            continue  # frozen by its owner
        if mode == "eval" and layer.running_mean is None:
            # Its own statistics, and torch's kernel is wrong in a hessian there.
            _replace(model, name, ByFormula(layer))
        elif mode == "eval":
            layer.eval()
        elif batch_norm and mode == "no_running_stats":
            _replace(model, name, ByFormula(layer))
        elif batch_norm and mode == "group_norm":
            channels = layer.num_features
            groups = num_groups if channels % num_groups == 0 else channels
            _replace(model, name, ByFormula(layer, groups))
        elif mode == "no_running_stats" or layer.training:
            _replace(model, name, BySample(layer))
        elif mode not in ("group_norm", "no_running_stats"):
            raise ValueError(f"there is no plain form of mode {mode!r}")
    return model


# -- "sync", with a copy of the model for each slice -----------------------------------


class Meeting:
    """Where a layer's copies, each in its own thread, put their inputs together."""

    def __init__(self, count: int, detached: bool) -> None:
        self.barrier, self.detached = threading.Barrier(count, timeout=60), detached
        self.inputs: dict[int, Tensor] = {}

    def statistics(self, place: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of all inputs, in the order of their places."""
        self.inputs[place] = x
        self.barrier.wait()
        whole = torch.cat([self.inputs[i] for i in sorted(self.inputs)])
        self.barrier.wait()  # before the layer is used again
        dims = [d for d in range(x.dim()) if d != 1]
        mean = whole.mean(dims, keepdim=True)
        var = (whole - mean).square().mean(dims, keepdim=True)
        return (mean.detach(), var.detach()) if self.detached else (mean, var)


class Joined(nn.Module):
    """Normalises a slice by the statistics of all slices, written out."""

    def __init__(self, layer: _NormBase, meeting: Meeting, place: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.meeting, self.place = meeting, place

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.meeting.statistics(self.place, x)
        y = (x - mean) / (var + self.eps).sqrt()
        return affine(y, self.weight, self.bias)


def joined(
    model: nn.Module, count: int, detached: bool = False
) -> tuple[list[nn.Module], Callable[[Sequence[Tensor]], list[Tensor]]]:
    """Copies of ``model``, one for each slice, whose batch norm joins all slices.

    Args:
        model: in training mode.
        count: of slices.
        detached: whether the statistics are constants.

    Returns:
        The copies, and a function from all slices to their outputs.
    """
    copies = [copy.deepcopy(model) for _ in range(count)]
    meetings: dict[str, Meeting] = {}
    for place, net in enumerate(copies):
        for name, layer in list(net.named_modules()):
            if isinstance(layer, _BatchNorm):
                meeting = meetings.setdefault(name, Meeting(count, detached))
                _replace(net, name, Joined(layer, meeting, place))

    def one(net: nn.Module, x: Tensor) -> Tensor:
        try:
            y: Tensor = net(x)
            return y
        except BaseException:
            for meeting in meetings.values():
                meeting.barrier.abort()
            raise

    def run(slices: Sequence[Tensor]) -> list[Tensor]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, copies, slices))

    return copies, run


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
