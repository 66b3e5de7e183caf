"""Time products of float32 matrices by oneDNN, as multiples of MKL's time.

``ONEDNN`` in vmapsafe/rules/products.py comes from this table: oneDNN may be used from
a number of multiplications on if the ratios there are below 1. Run it in the folder
bench, on a machine that does nothing else: on an AMD core whose other thread was busy
oneDNN was half as fast, and MKL hardly slower::

    OMP_NUM_THREADS=1 python -m thresholds.products
"""

from __future__ import annotations

import argparse
import statistics

import torch
from measuring import cpu_name, now

from vmapsafe.rules import products

# Rows of both, and how long they are: forwards of linear layers, Gram matrices of rows
# and of positions, weight gradients.
SHAPES = (
    *((32, 64, 64), (32, 128, 128), (32, 512, 512), (32, 512, 3072), (128, 512, 512)),
    *((16, 16, 4608), (16, 16, 36864), (32, 32, 147456), (64, 64, 2**20)),
    *((512, 512, 64), (1024, 1024, 128), (2048, 2048, 64)),
    *((10, 32, 147456), (5120, 32, 3072), (16384, 64, 576)),
)


def ratio(rows, others, length, rounds):
    """oneDNN's time as a multiple of MKL's: medians of rounds in turn, of 2 ms each."""
    a, b = torch.randn(rows, length), torch.randn(others, length)
    calls = {"oneDNN": lambda: products._onednn(a, b, None), "MKL": lambda: a @ b.mT}
    times = {name: [] for name in calls}
    largest = float(calls["MKL"]().abs().max())
    torch.testing.assert_close(
        calls["oneDNN"](), calls["MKL"](), rtol=1e-3, atol=1e-4 * largest
    )
    repeat = 1
    for i in range(-1, rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            started = now("cpu")
            for _ in range(repeat):
                calls[name]()
            taken = (now("cpu") - started) / repeat
            if i >= 0:
                times[name].append(taken)
        if i == -1:
            repeat = max(1, int(2e-3 / taken))
    return statistics.median(times["oneDNN"]) / statistics.median(times["MKL"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, torch {torch.__version__}, {products._regime()}")
    print("rows x rows x length     multiplications   oneDNN / MKL")
    for shape in sorted(SHAPES, key=lambda s: s[0] * s[1] * s[2]):
        many = shape[0] * shape[1] * shape[2]
        text = " x ".join(map(str, shape))
        print(
            f"{text:24} 2^{many.bit_length() - 1:<15} {ratio(*shape, asked.rounds):.2f}"
        )


if __name__ == "__main__":
    main()
