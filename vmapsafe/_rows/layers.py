"""A model of torch's own layers in a row, whose calls of torch are known in advance.

``merged`` has a block and a mode, which watch the code of the model and of the loss. If
that is all torch's own, there is nothing to watch, and small networks take half of the
time. So the layers are called here one after another, on all samples at once, as their
forwards would call functions in a block in "eval" mode.

What is known of a model is looked at in each call: its modules, their classes, hooks
and flags may have changed. A layer that an open block has switched, in any thread, has
another class, and so is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe._block.vmap_safe import was_updated
from vmapsafe._rows.record import Recorded, Uses, no_hooks
from vmapsafe._torch import has_hooks
from vmapsafe.rules.alike import ALIKE, NotAlike
from vmapsafe.rules.kept_calls import KEPT_CALLS


def layers_in(net: nn.Module) -> list[nn.Module] | None:
    """The layers that the forward calls, in order; None for another model."""
    kind = type(net)
    if kind not in _KNOWN or kind.forward is not _KNOWN[kind] or has_hooks(net):
        return None
    if kind is not nn.Sequential:
        return [net] if _fits(net) else None
    found: list[nn.Module] = []
    for child in net._modules.values():
        below = None if child is None else layers_in(child)
        if below is None:
            return None
        found += below
    return found


def loss_in(loss_fn: Any) -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """The function of torch that is the loss, and its options; None for another."""
    if loss_fn in _LOSSES.values():
        return loss_fn, {}
    function = _LOSSES.get(type(loss_fn))
    if function is None or has_hooks(loss_fn):
        return None
    options = {"reduction": loss_fn.reduction}
    if function is F.cross_entropy:
        options["weight"] = loss_fn.weight
        options["ignore_index"] = loss_fn.ignore_index
        options["label_smoothing"] = loss_fn.label_smoothing
    return function, options


def in_a_row(
    layers: list[nn.Module],
    loss: tuple[Callable[..., Tensor], dict[str, Any]],
    originals: Mapping[str, Tensor],
    x: Tensor,
    targets: Tensor,
) -> Recorded:
    """Run the layers and the loss on all samples, and record it.

    Args:
        layers: of :func:`layers_in`.
        loss: of :func:`loss_in`.
        originals: the parameters to differentiate by, by name.
        x: (B, ...), without a gradient.
        targets: (B, ...).

    Returns:
        The losses, and the way to the gradients.

    Raises:
        NotAlike: a layer or the loss takes its input otherwise than as a batch.
    """
    uses = Uses(originals, len(x))
    names = {id(p): name for name, p in originals.items()}
    function, options = loss
    try:
        with torch.enable_grad(), no_hooks():
            for layer in layers:
                step = _WITH_PARAMETERS.get(type(layer))
                if step is not None:
                    func, bound = step(layer, x)
                    y = uses.recorded(func, KEPT_CALLS[func][0], bound, names)
                    if y is None:
                        raise NotAlike
                    x = y
                elif x.dim() < 2 or x.dim() != _POOLS.get(type(layer), x.dim()):
                    raise NotAlike
                else:
                    x = layer.forward(x)
            handler = ALIKE[function]
            losses, _ = handler(_ALL, function, (x, targets), options)
    except Exception as error:
        raise NotAlike from error
    if losses.dim() != 1:
        raise NotAlike
    found = Recorded(uses, losses, ())
    if found.is_watched():
        raise NotAlike
    return found


class _AllOfTheBatch:
    """All tensors have the samples in front."""

    size = 0
    copied = False

    def place(self, value: Any) -> int | None:
        return 0

    def is_own(self, value: Any) -> bool:
        return False

    def copies(self, value: Tensor) -> Tensor:
        raise NotAlike


_ALL = _AllOfTheBatch()


# -- Layers ----------------------------------------------------------------------------


def _linear(layer: Any, x: Tensor) -> tuple[Any, dict[str, Any]]:
    return F.linear, {"input": x, "weight": layer.weight, "bias": layer.bias}


def _convolution(layer: Any, x: Tensor) -> tuple[Any, dict[str, Any]]:
    return _CONVOLUTIONS[type(layer)], {
        "input": x,
        "weight": layer.weight,
        "bias": layer.bias,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
    }


def _batch_norm(layer: Any, x: Tensor) -> tuple[Any, dict[str, Any]]:
    layer._check_input_dim(x)
    return F.batch_norm, {
        "input": x,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "weight": layer.weight,
        "bias": layer.bias,
        "training": False,
        "momentum": 0.0,
        "eps": layer.eps,
    }


_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]]
_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_BATCH_NORMS: tuple[type[nn.Module], ...]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_WITH_PARAMETERS: dict[
    type[nn.Module], Callable[[Any, Tensor], tuple[Any, dict[str, Any]]]
] = {
    nn.Linear: _linear,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
}
# How many dimensions a batch for each has.
_POOLS: dict[type[nn.Module], int] = {
    getattr(nn, f"{name}{dims}d"): dims + 2
    for name in ("MaxPool", "AvgPool", "AdaptiveAvgPool")
    for dims in (1, 2, 3)
}
_ACTIVATIONS: tuple[type[nn.Module], ...]
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish),
    *(nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Tanh, nn.Sigmoid, nn.Softplus),
)
_OTHERS: tuple[type[nn.Module], ...]
_OTHERS = (nn.Sequential, nn.Flatten, nn.Identity, nn.Dropout)
# Their forwards, as torch has them.
_KINDS: tuple[Any, ...] = (*_WITH_PARAMETERS, *_POOLS, *_ACTIVATIONS, *_OTHERS)
_KNOWN: dict[type[nn.Module], Any] = {kind: kind.forward for kind in _KINDS}
_LOSSES: dict[type[nn.Module], Callable[..., Tensor]]
_LOSSES = {nn.CrossEntropyLoss: F.cross_entropy, nn.MSELoss: F.mse_loss}


def _fits(layer: Any) -> bool:
    """Whether a layer with its options is called as above."""
    kind = type(layer)
    if kind in _CONVOLUTIONS:
        return bool(layer.padding_mode == "zeros")
    if kind in _BATCH_NORMS:
        # A block has found them updated, or warned.
        return layer.running_mean is not None and was_updated(layer)
    if kind is nn.Flatten:
        return bool(layer.start_dim == 1 and layer.end_dim == -1)
    if kind is nn.Dropout:
        return not layer.training
    # What is written may be the caller's batch.
    return not (layer.__dict__.get("return_indices") or layer.__dict__.get("inplace"))
