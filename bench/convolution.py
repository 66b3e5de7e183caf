"""Weight gradients of a convolution, one a sample: what wins for which shape.

Prints the time of vmapsafe's batched matrix products as a multiple of torch's own
batching rule. What ``REGIMES`` in vmapsafe/rules/convolution.py says was read off this
table: a row of it may hold where all ratios are below 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch.func import vmap

from vmapsafe import _operators
from vmapsafe._rule import speed_rules
from vmapsafe.rules import convolution

(RULE,) = speed_rules()[convolution._backward]
OURS = replace(RULE, accepts=lambda call: True)
TORCHS = replace(RULE, accepts=lambda call: False)


def calls(batch, channels, outputs, size, kernel, n, device):
    """The weight gradient alone, under vmap; ``n`` spatial dimensions."""
    torch.manual_seed(0)
    padding = [kernel // 2] * n
    x = torch.randn(batch, 1, channels, *[size] * n, device=device)
    weight = torch.randn(outputs, channels, *[kernel] * n, device=device)
    grad = torch.randn(batch, 1, outputs, *[size] * n, device=device)
    ones, zeros = [1] * n, [0] * n

    def one(grad, x):
        rest = (None, ones, padding, ones, False, zeros, 1, [False, True, False])
        return convolution._backward(grad, x, weight, *rest)[1]

    return lambda: vmap(one)(grad, x)


def ratio(call, rounds, device):
    """Ours by torch's, medians of rounds in turn."""
    times = {"ours": [], "torch": []}
    results = {}
    for i in range(rounds + 1):
        for name, rule in (("ours", OURS), ("torch", TORCHS)):
            with _operators.only(rule):
                started = now(device)
                results[name] = call()
                taken = now(device) - started
            if i:
                times[name].append(taken)
    ours, torchs = results["ours"], results["torch"]
    largest = float(torchs.abs().max())
    torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-4 * largest)
    return statistics.median(times["ours"]) / statistics.median(times["torch"])


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()  # a neighbour on the core does not count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dims", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--kernels", type=int, nargs="*", default=[1, 3, 5])
    parser.add_argument("--channels", type=int, nargs="*", default=[3, 16, 64, 256])
    parser.add_argument("--outputs", type=int, nargs="*", default=[32, 64, 128, 256])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for n in asked.dims:
        sizes = [16, 64, 256, 1024] if n == 1 else [4, 8, 16, 32]
        for kernel in asked.kernels:
            for channels in asked.channels:
                for outputs in asked.outputs:
                    row = []
                    for size in sizes:
                        shape = (asked.batch, channels, outputs, size, kernel, n)
                        if channels * outputs * size**n > 2**24:
                            continue
                        r = ratio(
                            calls(*shape, asked.device), asked.rounds, asked.device
                        )
                        row.append(f"L={size**n}: {r:.2f}")
                    title = f"conv{n}d k={kernel} C={channels} O={outputs}"
                    print(f"{title:28}", "  ".join(row), flush=True)


if __name__ == "__main__":
    main()
