"""Blocks of each mode, as tests open them."""

from typing import Any, TypeVar

from plain import ModeName
from torch import nn

from vmapsafe import vmap_safe
from vmapsafe._block.vmap_safe import Block

M = TypeVar("M", bound=nn.Module)
MODES: list[ModeName] = ["eval", "no_running_stats", "group_norm", "sync"]
# Those in which a slice is computed as if it were alone.
EACH_ALONE = MODES[:3]


def block(model: M, mode: ModeName, **options: Any) -> Block[M]:
    return vmap_safe(model, mode=mode, num_groups=2, **options)
