"""Large zeros that cost nothing where nobody writes.

The system hands out memory page by page, each zero and only when it is first touched.
torch asks for memory and then writes all its zeros.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2**25  # bytes: what the C library gives back to the system when it is freed


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """A plain tensor with the dtype and the device of ``like``."""
    if not _is_large(shape, like):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    numbers = math.prod(shape)
    size = numbers * like.element_size()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # They are given back with the last tensor that holds them.
    return torch.frombuffer(pages, dtype=like.dtype, count=numbers).view(shape)


def pays(shape: Sequence[int], like: Tensor, writes: int) -> bool:
    """Whether there is something to gain where ``writes`` runs of numbers along the
    last dimension are written to: if they touch half of the pages at most."""
    if not _is_large(shape, like):
        return False
    size = like.element_size()
    pages = math.prod(shape) * size // mmap.PAGESIZE
    touched = 1 + shape[-1] * size // mmap.PAGESIZE
    return 2 * writes * touched <= pages


def _is_large(shape: Sequence[int], like: Tensor) -> bool:
    return (
        like.device.type == "cpu"  # whose system does so
        and math.prod(shape) * like.element_size() >= LARGE
        and hasattr(mmap, "MAP_ANONYMOUS")
    )
