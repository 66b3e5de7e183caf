"""Blocks of each mode, as tests open them."""

from typing import Any

from torch import nn

from vmapsafe import vmap_safe

MODES = ["eval", "no_running_stats", "group_norm", "sync"]
# Those in which a slice is computed as if it were alone.
EACH_ALONE = MODES[:3]


def block(model: nn.Module, mode: str, **options: Any) -> Any:
    return vmap_safe(model, mode=mode, num_groups=2, **options)
