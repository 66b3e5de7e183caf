"""Products of two matrices, by the faster of torch's two libraries on a CPU.

torch multiplies float32 matrices with MKL. On AMD processors oneDNN, which torch uses
for convolutions, is faster for large products. torch has an operator for it, which its
compiler calls for linear layers. Rounding differs in the last digits.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._torch import autocasts, is_plain, multiplies_exactly

# From this many multiplications oneDNN is faster, by the vendor of the processor.
# Measured by bench/thresholds/products.py, float32, one thread, torch 2.13.
ONEDNN = {"AuthenticAMD": 2**23}


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, N): ``a`` (M, K) times the transpose of ``b`` (N, K)."""
    if _onednn_wins(a, b):
        return _onednn(a, b, None)
    return a @ b.mT


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
    return (
        x.numel() * len(weight) >= _least()
        and x.dtype == weight.dtype == torch.float32
        and x.is_contiguous()
        and weight.is_contiguous()
        and is_plain(x)
        and is_plain(weight)
        and multiplies_exactly(x.device)
    )


@functools.cache
def _least() -> float:
    """From how many multiplications on; infinity where MKL is never slower."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return float("inf")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system
        return float("inf")
    vendors = [line.partition(":")[2].strip() for line in lines if "vendor_id" in line]
    return ONEDNN.get(vendors[0], float("inf")) if vendors else float("inf")
