"""Activation checkpointing, which runs a forward again during backward.

Inside the block that is fine. After it, the layers would compute something else, and
write their statistics. So a block whose models ran under ``torch.utils.checkpoint``
leaves a watch behind for as long as the graph of their output lives: a layer that runs
again in a backward pass, outside every block, raises.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint
from torch import Tensor, nn

from vmapsafe._call import tree_flatten
from vmapsafe._errors import worded

_FILE = torch.utils.checkpoint.__file__
_watched: dict[nn.Module, list[str]] = {}


def in_checkpoint() -> bool:
    """Whether a function of torch.utils.checkpoint is calling."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _Token:
    """Lives in the graph of an output; its end is the end of the watch."""


def watch(layers: dict[nn.Module, str], output: Any, ended: Callable[[], None]) -> bool:
    """Watch ``layers`` (and their names) while the graph of ``output`` lives, then call
    ``ended``.

    Returns False, and watches nothing, where there is no graph.
    """
    leaves, _ = tree_flatten(output)
    nodes = [x.grad_fn for x in leaves if isinstance(x, Tensor) and x.grad_fn]
    if not nodes:
        return False
    token = _Token()
    for node in nodes:
        metadata: Any = node.metadata
        metadata["vmapsafe"] = token
    for layer, label in layers.items():
        _watched.setdefault(layer, []).append(label)
    end = weakref.finalize(token, _unwatch, tuple(layers), ended)
    end.atexit = False
    return True


def refuse_recomputation(module: nn.Module) -> None:
    """Raise if ``module``, which backward runs again, is watched."""
    if module in _watched:
        raise RuntimeError(
            worded(
                "backward through torch.utils.checkpoint",
                f"{_watched[module][0]} ran inside a vmap_safe block and is to run "
                "again after it, where it would compute something else",
                "Call backward inside the block",
            )
        )


def _unwatch(layers: tuple[nn.Module, ...], ended: Callable[[], None]) -> None:
    for layer in layers:
        _watched[layer].pop()
        if not _watched[layer]:
            del _watched[layer]
    ended()
