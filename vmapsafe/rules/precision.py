"""Half precision, which torch's kernels compute in float32."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype in which torch's kernels compute."""
    return x.float() if x.dtype in HALVES else x
