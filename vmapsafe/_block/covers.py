"""``covers``: whether a block that is open makes a module safe, for other libraries."""

from __future__ import annotations

import torch
from torch import nn

from vmapsafe._block.models import has_running_stats, is_normalisation, unwrapped
from vmapsafe._block.switched import covering
from vmapsafe._errors import VmapSafeRuntimeError, VmapSafeTypeError, a_kind
from vmapsafe._modes import ModeName, check_mode
from vmapsafe._torch import BatchNormBase, run_while_compiling


@run_while_compiling
def covers(module: nn.Module, *modes: ModeName) -> bool:
    """Tell whether an open block of this thread makes a module safe.

    It is for libraries that refuse batch norm by its class. Inside a block they need
    not.

    >>> from torch import nn
    >>> from vmapsafe import covers, vmap_safe
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> with vmap_safe(model, mode="no_running_stats"):
    ...     covers(model[1]), covers(model), covers(nn.BatchNorm1d(4))
    (True, True, False)
    >>> covers(model)
    False

    Args:
        module: a layer, a model or a part of one, or a container of several.
        *modes: the modes that count, such as ``"eval", "group_norm"``, in which samples
            are independent of each other. Without them each mode counts. A layer counts
            by what it computes: if it is frozen, as in "eval"; if it has no running
            statistics, in "eval" as in "no_running_stats".

    Returns:
        Whether each normalisation layer in it belongs to a model of an open block.
        Without such a layer: whether the module itself does.

    Raises:
        VmapSafeTypeError: ``module`` is not a module.
        VmapSafeValueError: a mode is unknown.
        VmapSafeRuntimeError: torch.compile traces the call.

    Outside all blocks it is False. It is also False in a thread without a block, for a
    copy made inside, for a layer that was added inside, and in backward of a graph that
    was made before the block. Normalisation layers are those of torch's batch norm,
    and modules that own buffers ``running_mean`` and ``running_var``. It does not look
    for hand-made layers whose buffers have other names.
    """
    if not isinstance(module, nn.Module):
        raise VmapSafeTypeError(
            "covers(...)", f"got {a_kind(module)}, not an nn.Module", "Pass a module"
        )
    for mode in modes:
        check_mode("covers(...)", mode)
    if torch.compiler.is_compiling():
        raise VmapSafeRuntimeError(
            "covers(...)",
            "torch.compile traces it, and cannot see which blocks are open",
            "Ask before the compiled function is called",
        )
    layers = [m for m in module.modules() if is_normalisation(m)]
    found = [_mode_of(m) for m in layers or [unwrapped(module)]]
    return all([mode is not None and (mode in modes or not modes) for mode in found])


def _mode_of(module: nn.Module) -> ModeName | None:
    """The mode that says what a module computes here; None if no block covers it."""
    block = covering(module)
    if block is None:
        return None
    layer = block.layers.get(module)
    mode: ModeName = block.options.mode
    if layer is not None and layer.frozen:
        mode = "eval"
    if isinstance(module, BatchNormBase) and not has_running_stats(module):
        return "no_running_stats" if mode == "eval" else mode
    return mode
