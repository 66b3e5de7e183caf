"""Which float32 products oneDNN makes faster than MKL, on a CPU.

Run it on a machine that does nothing else. On an AMD core whose other thread was busy,
oneDNN was half as fast, and MKL hardly slower.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch

from vmapsafe.rules import products

from .bench import Bench, between, code

# Rows of both, and how long they are: forwards of linear layers, Gram matrices of rows
# and of positions, weight gradients.
SHAPES = (
    *((32, 64, 64), (32, 128, 128), (32, 512, 512), (32, 512, 3072), (128, 512, 512)),
    *((16, 16, 4608), (16, 16, 36864), (32, 32, 147456), (64, 64, 2**20)),
    *((512, 512, 64), (1024, 1024, 128), (2048, 2048, 64)),
    *((10, 32, 147456), (5120, 32, 3072), (16384, 64, 576)),
)


def cases(device):
    if device == "cpu":
        for rows, others, length in SHAPES:
            yield {"rows": rows, "others": others, "length": length}


def contenders(device, dtype, rows, others, length):
    a, b = torch.randn(rows, length), torch.randn(others, length)
    return {
        "MKL": (nullcontext, lambda: a @ b.mT),
        "oneDNN": (nullcontext, lambda: products._onednn(a, b, None)),
    }


def propose(rows, device):
    """The two bounds with the least time in all."""
    ratios = [
        (
            case["rows"] * case["others"] * case["length"],
            case["length"],
            math.log(times["oneDNN"] / times["MKL"]),
        )
        for case, times in rows
    ]
    sizes = sorted({size for size, _, _ in ratios})
    totals = {}
    for least in [*map(between, sizes, sizes[1:]), sizes[-1] + 1]:
        for longest in sorted({length for _, length, _ in ratios}):
            inside = [r for s, n, r in ratios if s >= least and n <= longest]
            totals[least, longest] = sum(inside)
    least, longest = min(totals, key=totals.get)
    return {"least": code(least), "longest": code(longest)}


BENCHES = [
    Bench(
        name="products",
        cases=cases,
        contenders=contenders,
        table="products",
        propose=propose,
    )
]
