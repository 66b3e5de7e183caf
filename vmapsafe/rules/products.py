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
        turned: the same if both matrices lie transposed, as for a weight gradient.
    """

    least: int
    longest: int
    turned: int


# By the vendor of the processor, and its family if that differs. Measured by
# bench/thresholds/products.py, float32, one thread, torch 2.13. A core of family 25
# multiplies 256 bits at a time. MKL comes close to what it can do with square matrices,
# and oneDNN took 0.5 to 1.0 of MKL's time.
ONEDNN = {
    "AuthenticAMD": Regime(least=2**23, longest=2**18, turned=512),
    "AuthenticAMD 25": Regime(least=2**23, longest=2**18, turned=64),
}


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, N): ``a`` (M, K) times the transpose of ``b`` (N, K)."""
    if not _onednn_wins(a, b):
        return a @ b.mT
    # The first matrix should not lie transposed, and the second is copied.
    if (b.is_contiguous(), len(b)) > (a.is_contiguous(), len(a)):
        return _onednn(b, a, None).mT
    return _onednn(a, b, None)


def is_exact(x: Tensor) -> bool:
    """Whether products of matrices like ``x`` have full precision.

    torch has options for a lower one of float32, of which half precision is made.
    """
    return x.dtype == torch.float64 or multiplies_exactly(x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., O): what ``F.linear`` gives of x (..., C) and weight (O, C)."""
    found = linear_by_onednn(x, weight, bias)
    return F.linear(x, weight, bias) if found is None else found


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The same, or None where oneDNN is not faster."""
    wins = x.is_contiguous() and _onednn_wins(x, weight)
    if not wins or (bias is not None and not is_plain(bias)) or autocasts(x.device):
        return None
    return _onednn(x, weight, bias)


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
        and x.size(-1) <= _longest(regime, x, weight)
        and x.dtype == weight.dtype == torch.float32
        and is_plain(x)
        and is_plain(weight)
        and multiplies_exactly(x.device)
    )


def _longest(regime: Regime, x: Tensor, weight: Tensor) -> int:
    """How long its sums may be for matrices that lie as these do in memory."""
    lie = [_lies(x), _lies(weight)]
    if None in lie:
        return 0
    return regime.longest if "straight" in lie else regime.turned


def _lies(x: Tensor) -> str | None:
    if x.is_contiguous():
        return "straight"
    return "turned" if x.dim() == 2 and x.mT.is_contiguous() else None


@functools.cache
def _regime() -> Regime | None:
    """That of this processor; None where MKL is never slower, or it is not known."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    vendor, family = processor()
    return ONEDNN.get(f"{vendor} {family}", ONEDNN.get(vendor))


def processor() -> tuple[str, str]:
    """The vendor of this processor and its family, "" where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system
        return "", ""
    pairs = [line.partition(":") for line in lines]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    return found.get("vendor_id", ""), found.get("cpu family", "")
