"""Large tensors of zeros, whose pages cost nothing until something writes to them.

The operating system hands out memory page by page. A page is all zeros, and it takes
memory only when it is first touched. torch.zeros requests memory and then writes every
zero itself.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2**25  # bytes; the C library returns freed blocks of this size to the system


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of zeros with the dtype and the device of ``like``."""
    if not _is_large(shape, like):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    numbers = math.prod(shape)
    size = numbers * like.element_size()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The pages are freed together with the last tensor that uses them.
    return torch.frombuffer(pages, dtype=like.dtype, count=numbers).view(shape)


def pays(shape: Sequence[int], like: Tensor, writes: int) -> bool:
    """Whether :func:`zeros` is faster than torch.zeros for this number of writes.

    Each write is a run of numbers along the last dimension. It is faster if the writes
    touch at most half of the pages.
    """
    if not _is_large(shape, like):
        return False
    size = like.element_size()
    pages = math.prod(shape) * size // mmap.PAGESIZE
    touched = 1 + shape[-1] * size // mmap.PAGESIZE
    return 2 * writes * touched <= pages


def _is_large(shape: Sequence[int], like: Tensor) -> bool:
    return (
        like.device.type == "cpu"  # only there pages of zeros are free
        and math.prod(shape) * like.element_size() >= LARGE
        and hasattr(mmap, "MAP_ANONYMOUS")
    )
