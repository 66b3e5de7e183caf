"""Memory for large results that is cheap to write for the first time.

Rows of gradients are large, and new at each call. On Linux most of what it costs to
write 32 MiB and more is the system handing out pages of 4 KiB, one after the other:
the C library gives blocks of that size back when they are freed, and never keeps them.
Pages of 2 MiB are there for programs that ask (transparent huge pages, madvise): a
third of the time (bench/layers.py). THP_MEM_ALLOC_ENABLE=1 in the environment makes
torch itself ask, for all it allocates.

In a virtual machine whose host takes free memory back (free page reporting), pages of
either size cost up to ten times as much after a second without use. Nothing here helps
there; memory that is kept does, as with ``per_sample_grads(out=)``.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2**25  # bytes: DEFAULT_MMAP_THRESHOLD_MAX of glibc


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised plain tensor with the dtype and the device of ``like``."""
    if is_large(shape, like):
        return _in_large_pages(shape, like)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """The same of zeros; large ones cost nothing where nobody writes."""
    if is_large(shape, like):
        return _in_large_pages(shape, like)
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def is_large(shape: Sequence[int], like: Tensor) -> bool:
    """Whether such a tensor gets large pages: on the CPU, where the system has them."""
    return (
        like.device.type == "cpu"
        and math.prod(shape) * like.element_size() >= LARGE
        and hasattr(mmap, "MADV_HUGEPAGE")
    )


def _in_large_pages(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros, as all that the system hands out; given back with their last tensor."""
    numbers = math.prod(shape)
    # Only mappings of whole large pages are laid out for them (Linux 6.13).
    size = -(-numbers * like.element_size() // _PAGE) * _PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them: small ones
        pass
    return torch.frombuffer(pages, dtype=like.dtype, count=numbers).view(shape)


_PAGE = 2**21
