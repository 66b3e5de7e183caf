"""Products of two matrices, where all of both is at hand."""

from __future__ import annotations

from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, N): ``a`` (M, K) times the transpose of ``b`` (N, K)."""
    return a @ b.mT
