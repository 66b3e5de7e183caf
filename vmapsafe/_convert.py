"""Permanent conversions: a copy of a net whose norm layers do not need an open block.

They are for nets that will be trained, saved or shipped without BatchNorm's batch
statistics. Each conversion changes the layers of a deep copy in place, class included.
That keeps what a replaced layer would lose: hooks, tied parameters, a layer used twice,
a model that is itself the layer, other references to it.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, Self, SupportsIndex

import torch
from torch import nn
from torch.nn.utils import parametrize

from vmapsafe._block.models import has_running_stats, is_frozen, is_lazy
from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, a_kind, shown
from vmapsafe._modes import (
    MODES,
    ModeName,
    NumGroups,
    check_mode,
    check_num_groups,
    groups_for,
)
from vmapsafe._torch import LazyModuleMixin

# What a mode does to one layer of the copy, in place: (layer, path, num_groups).
_Conversion = Callable[[nn.Module, str, NumGroups], None]


def convert(
    model: nn.Module, mode: ModeName, *, num_groups: NumGroups = 32
) -> nn.Module:
    """Return a copy of a model whose norm layers are safe under ``vmap`` permanently.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from vmapsafe import convert
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
        >>> convert(net, mode="group_norm")[1]  # doctest: +ELLIPSIS
        GroupNorm(32, 64, eps=1e-05, affine=True...)
        >>> vmap = torch.func.vmap
        >>> vmap(convert(net, mode="eval"))(torch.rand(8, 2, 3, 6, 6)).shape
        torch.Size([8, 2, 64, 4, 4])

    Args:
        model: any module, also a norm layer itself. It is not changed. Its copy keeps
            hooks, tied parameters, layers used twice, dtypes, devices,
            ``requires_grad`` and the ``training`` flags, except those of layers that
            the mode keeps in eval mode.
        mode: what the norm layers of the copy do:

            ``"eval"``: a layer that owns ``running_mean`` and ``running_var`` always
            normalises with them, after ``train()`` too. The keys of ``state_dict``
            stay the same. A layer without them is left as it is.

            ``"no_running_stats"``: BatchNorm and InstanceNorm lose their running
            statistics and normalise each slice with its own, after ``eval()`` too. A
            subclass keeps its class and forward.

            ``"group_norm"``: each BatchNorm becomes an ``nn.GroupNorm`` with its
            weight, bias and eps: for channel c of group g, with the biased variance,
            ``(x_c - mean_g) / sqrt(var_g + eps) * weight_c + bias_c``. The parameters
            keep their names; the running statistics are removed. InstanceNorm is left
            as it is.

            A layer that is in eval mode while the model is in training mode is frozen
            by its owner. It is converted as in ``"eval"``, whatever the mode.
        num_groups: the number of groups in ``"group_norm"``, an int, or a callable from
            the number of channels C to one. If it does not divide C, C is taken.

    Returns:
        The converted copy.

    Raises:
        VmapSafeTypeError: ``model`` is not a module; a norm layer is TorchScript; in
            ``"group_norm"``, a BatchNorm does more than torch's own, so that a
            GroupNorm would compute something else.
        VmapSafeValueError: an unknown mode; ``"sync"``, which needs the vmapped axis
            and so an open block; ``num_groups`` below 1; a lazy norm layer before its
            first batch.

    It does not make the new net agree with the old one: after ``"group_norm"`` and
    ``"no_running_stats"`` the net needs training or fine-tuning. It does not rewrite
    hand-made layers that write to their buffers (only ``"eval"`` reaches those, by the
    names above), nor, in ``"group_norm"``, an InstanceNorm with running statistics:
    under ``vmap`` in training mode these still need ``vmap_safe``. It does not look for
    slices with one value per channel or group, which cannot be normalised.
    Sources: https://docs.pytorch.org/docs/stable/func.batch_norm.html and, for
    GroupNorm, https://arxiv.org/abs/1803.08494.
    """
    if not isinstance(model, nn.Module):
        raise VmapSafeTypeError(
            "convert(model, ...)",
            f"model is {shown(model)}, {a_kind(model)}, not an nn.Module",
            "Pass the model itself",
        )
    conversion = _conversion("convert(model, ...)", mode)
    check_num_groups("convert(model, ...)", num_groups)
    for path, layer in model.named_modules():
        _check_convertible(path, layer)
    converted = copy.deepcopy(model)
    frozen = {layer for layer in converted.modules() if is_frozen(layer, converted)}
    for path, layer in converted.named_modules():
        (_freeze if layer in frozen else conversion)(layer, path, num_groups)
    return converted


def norm_layer(
    mode: ModeName, *, num_groups: NumGroups = 32
) -> Callable[..., nn.Module]:
    """Return a callable that builds norm layers, for the ``norm_layer=`` of a net.

    Example:
        >>> import torch
        >>> from vmapsafe import norm_layer
        >>> build = norm_layer("group_norm", num_groups=32)
        >>> build(64, eps=1e-3)  # doctest: +ELLIPSIS
        GroupNorm(32, 64, eps=0.001, affine=True...)
        >>> norm_layer("eval")(64).train()(torch.rand(2, 64, 4, 4)).shape
        torch.Size([2, 64, 4, 4])

    Args:
        mode: what the layers do, ``"eval"``, ``"no_running_stats"`` or
            ``"group_norm"``, see :func:`convert`.
        num_groups: the number of groups in ``"group_norm"``, an int, or a callable from
            the number of channels C to one. If it does not divide C, C is taken.

    Returns:
        A picklable callable that takes what ``nn.BatchNorm2d`` takes (the number of
        channels C, then ``eps=``, ``momentum=``, ``affine=``, ``device=``, ...) and
        returns what :func:`convert` makes of that layer. Input of the layer: (N, C, H,
        W). Arguments that the result does not use are dropped, as ``momentum`` is by
        GroupNorm.

    Raises:
        VmapSafeTypeError: ``num_groups`` is neither an int nor a callable.
        VmapSafeValueError: an unknown mode, ``"sync"``, or ``num_groups`` below 1.

    It does not load statistics: an ``"eval"`` layer normalises with mean 0 and variance
    1 until a checkpoint is loaded. It does not build BatchNorm1d or 3d: build the net
    with these, and :func:`convert` it.
    """
    check_num_groups("norm_layer(...)", num_groups)
    _conversion("norm_layer(...)", mode)
    return functools.partial(_new_layer, mode, num_groups)


def _conversion(called: str, mode: str) -> _Conversion:
    if mode not in tuple(MODES):
        check_mode(called, mode, among=_CONVERSIONS)
    elif mode not in _CONVERSIONS:
        found = "the mode holds only while a block is open"
        if MODES[mode].merges:
            found += ", as it needs statistics across the vmapped axis"
        do = f'Use vmap_safe(model, mode="{mode}")'
        raise VmapSafeValueError(f'{called}, mode="{mode}"', found, do)
    return _CONVERSIONS[mode]


def _check_convertible(path: str, layer: nn.Module) -> None:
    lazy = isinstance(layer, LazyModuleMixin) and (
        # Also one whose weights were loaded: its class changes at its first forward.
        layer.cls_to_become is not None
        or is_lazy(layer)
    )
    if lazy and _has_flag(layer):
        raise VmapSafeValueError(
            "convert(model, ...)",
            f"{_place(path)} is {a_kind(layer)} that has not seen a batch",
            "Run the model on one batch first, then convert it",
        )
    normalises = _has_flag(layer) or has_running_stats(layer)
    if normalises and isinstance(layer, torch.jit.ScriptModule):
        raise VmapSafeTypeError(
            "convert(model, ...)",
            f"{_place(path)} is TorchScript, which cannot be changed",
            "Convert the model first, then script it",
        )


def _new_layer(
    mode: str, num_groups: NumGroups, /, *args: Any, **kwargs: Any
) -> nn.Module:
    layer = nn.BatchNorm2d(*args, **kwargs)
    _CONVERSIONS[mode](layer, "", num_groups)
    return layer


def _freeze(layer: Any, path: str, num_groups: NumGroups) -> None:
    if has_running_stats(layer) and not isinstance(layer, _AlwaysEval):
        layer.__class__ = _always_eval(type(layer))
        layer.training = False


def _drop_statistics(layer: Any, path: str, num_groups: NumGroups) -> None:
    # As torch.func.replace_all_batch_norm_modules_ leaves a layer.
    if has_running_stats(layer) and _has_flag(layer):
        for name in _STATISTICS & dict(layer.named_buffers(recurse=False)).keys():
            setattr(layer, name, None)
        layer.track_running_stats = False


def _become_group_norm(layer: Any, path: str, num_groups: NumGroups) -> None:
    if not _has_flag(layer) or isinstance(layer, _INSTANCE_NORMS):
        return
    if (
        type(layer).forward not in _BATCH_NORM_FORWARDS
        or "forward" in vars(layer)
        or parametrize.is_parametrized(layer)
    ):
        raise VmapSafeTypeError(
            'convert(model, mode="group_norm")',
            f"{_place(path)} is {a_kind(layer)}, which does more than "
            "nn.BatchNorm (a forward of its own, or a parametrization), and an "
            "nn.GroupNorm would lose that",
            'Use vmap_safe(model, mode="group_norm"), or replace this layer by hand',
        )
    layer.__class__ = nn.GroupNorm
    layer.num_channels = layer.num_features
    layer.num_groups = groups_for(layer.num_features, num_groups)
    for name in ("num_features", "momentum", "track_running_stats", *_STATISTICS):
        delattr(layer, name)


class _AlwaysEval(nn.Module):
    """The first base of a frozen layer's class; the other is the class it had."""

    thawed_class: type[nn.Module]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        # Of the layer alone: a dropout inside it follows the model.
        self.training = False
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle cannot find it by its name.
        state: object = self.__getstate__()  # type: ignore[no-untyped-call]
        return _blank_always_eval, (self.thawed_class,), state


def _always_eval(layer_class: type[nn.Module]) -> type[_AlwaysEval]:
    # One class for each. Looked up, not cached, so that neither is kept alive.
    for known in _AlwaysEval.__subclasses__():
        if known.thawed_class is layer_class:
            return known
    return type(
        f"Eval{layer_class.__name__}",
        (_AlwaysEval, layer_class),
        {"__module__": __name__, "thawed_class": layer_class},
    )


def _blank_always_eval(layer_class: type[nn.Module]) -> _AlwaysEval:
    frozen_class = _always_eval(layer_class)
    return frozen_class.__new__(frozen_class)


def _has_flag(layer: nn.Module) -> bool:
    """Whether it is a norm layer of torch, or calls F.batch_norm as these do."""
    # Not hasattr, which wrappers such as torch.compile's answer for the layer inside.
    return "track_running_stats" in vars(layer)


def _place(path: str) -> str:
    return f"layer {path!r}" if path else "the model itself"


_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BATCH_NORM_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)

_CONVERSIONS: dict[str, _Conversion] = {
    "eval": _freeze,
    "no_running_stats": _drop_statistics,
    "group_norm": _become_group_norm,
}
