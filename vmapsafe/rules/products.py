"""Products of two matrices, by the faster of torch's two libraries on a CPU.

torch multiplies float32 matrices with MKL. On AMD processors oneDNN, which torch uses
for convolutions, is faster for large products. torch has an operator for it, which its
compiler calls for linear layers. Rounding differs in the last digits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._torch import autocasts, is_plain, multiplies_exactly


@dataclass(frozen=True)
class Regime:
    """Which products oneDNN makes faster than MKL.

    Attributes:
        least: from this many multiplications on.
        longest: sums of up to this many products; it copies one of the matrices.
    """

    least: int
    longest: int


# By the vendor of the processor. Measured by bench/thresholds/products.py, float32, one
# thread, torch 2.13.
ONEDNN = {"AuthenticAMD": Regime(least=2**23, longest=2**18)}


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, N): ``a`` (M, K) times the transpose of ``b`` (N, K)."""
    if not _onednn_wins(a, b):
        return a @ b.mT
    if len(a) < len(b):  # the other one is copied
        return _onednn(b, a, None).mT
    return _onednn(a, b, None)


def is_exact(x: Tensor) -> bool:
    """Whether products of matrices like ``x`` have full precision.

    torch has options for a lower one of float32, of which half precision is made.
    """
    return x.dtype == torch.float64 or multiplies_exactly(x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., O): what ``F.linear`` gives of x (..., C) and weight (O, C)."""
    if _onednn_wins(x, weight) and not autocasts(x.device):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _onednn_wins(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    regime = _regime()
    return (
        regime is not None
        and x.numel() * len(weight) >= regime.least
        and x.size(-1) <= regime.longest
        and x.dtype == weight.dtype == torch.float32
        and _takes(x)
        and _takes(weight)
        and is_plain(x)
        and is_plain(weight)
        and multiplies_exactly(x.device)
    )


def _takes(x: Tensor) -> bool:
    """Whether the layout is one for which oneDNN is fast."""
    if x.is_contiguous():
        return True
    return x.dim() == 2 and x.mT.is_contiguous() and x.size(1) <= _TURNED


_TURNED = 512  # a matrix that lies transposed may have rows of this length


@functools.cache
def _regime() -> Regime | None:
    """That of this processor; None where MKL is never slower, or it is not known."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system
        return None
    vendors = [line.partition(":")[2].strip() for line in lines if "vendor_id" in line]
    return ONEDNN.get(vendors[0]) if vendors else None
