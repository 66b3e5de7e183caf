"""Which float32 products oneDNN makes faster than MKL, on a CPU.

Run it on a machine that does nothing else. On an AMD core whose other thread was busy,
oneDNN was half as fast, and MKL hardly slower.
"""

from __future__ import annotations

import math
import sys
from unittest import mock

import torch

from vmapsafe.rules import products

from .bench import Bench, between, code

# Rows of both, and how long they are: forwards of linear layers, Gram matrices of rows
# and of positions, weight gradients.
SHAPES = (
    *((32, 64, 64), (32, 128, 128), (32, 512, 512), (32, 512, 3072), (128, 512, 512)),
    *((16, 16, 4608), (16, 16, 36864), (32, 32, 147456), (64, 64, 2**20)),
    *((512, 512, 64), (1024, 1024, 128), (2048, 2048, 64), (1024, 576, 192)),
    *((10, 32, 147456), (5120, 32, 3072), (16384, 64, 576), (1024, 192, 768)),
)
# In an input gradient the second matrix lies transposed, in a weight gradient both do.
TURNED = {
    "none": SHAPES,
    "second": [shape for shape in SHAPES if shape[2] <= 4096],
    "both": (
        *[(512, 512, length) for length in (16, 64, 256, 1024)],
        *((1024, 784, 32), (3072, 768, 64), (576, 192, 256), (768, 192, 1024)),
    ),
}


def cases(device):
    if device == "cpu":
        for turned, shapes in TURNED.items():
            for rows, others, length in shapes:
                yield {
                    "rows": rows,
                    "others": others,
                    "length": length,
                    "turned": turned,
                }


def contenders(device, dtype, rows, others, length, turned):
    a, b = torch.randn(rows, length), torch.randn(others, length)
    if turned == "both":
        a = a.mT.contiguous().mT
    if turned != "none":
        b = b.mT.contiguous().mT
    always = products.Regime(least=0, longest=sys.maxsize, turned=sys.maxsize)

    def by(regime):
        return lambda: mock.patch.object(products, "_regime", lambda: regime)

    def run():
        return products.product(a, b)

    return {"MKL": (by(None), run), "oneDNN": (by(always), run)}


def propose(rows, device):
    """The bounds with the least time in all."""
    both = [row for row in rows if row[0]["turned"] == "both"]
    least, longest = best_bounds([row for row in rows if row not in both])
    _, turned = best_bounds(both, least)
    return {"least": code(least), "longest": code(longest), "turned": code(turned)}


def best_bounds(rows, at_least=None):
    """The least number of multiplications, if it is not given, and the longest sum."""
    ratios = [
        (
            case["rows"] * case["others"] * case["length"],
            case["length"],
            math.log(times["oneDNN"] / times["MKL"]),
        )
        for case, times in rows
    ]
    sizes = sorted({size for size, _, _ in ratios})
    wanted = [*map(between, sizes, sizes[1:]), *[size + 1 for size in sizes[-1:]]]
    totals = {}
    for least in wanted if at_least is None else [at_least]:
        for longest in [0, *sorted({length for _, length, _ in ratios})]:
            inside = [r for s, n, r in ratios if s >= least and n <= longest]
            totals[least, longest] = sum(inside)
    return min(totals, key=totals.get)


BENCHES = [
    Bench(
        name="products",
        cases=cases,
        contenders=contenders,
        table="products",
        propose=propose,
    )
]
