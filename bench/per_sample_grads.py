"""Time per-sample gradients, as multiples of two yardsticks, network by network.

It gives a quick look; ``pytest bench`` measures everything else. F is the floor: the
plain gradient, plus writing as many fresh numbers as the result has. T is torch's own
``vmap(grad)``.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from measuring import race
from networks import GROWN, NETWORKS

NAMES = {
    "plain": "plain",
    "F": "floor",
    "T": "vmap(grad)",
    "fast=False": "vmapsafe, fast=False",
    "vmapsafe": "vmapsafe",
}
OURS = ("fast=False", "vmapsafe")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="default: each network's own")
    parser.add_argument(
        *("--nets", "--net"),
        nargs="*",
        default=list(NETWORKS),
        choices=[*NETWORKS, *GROWN],
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    titles = [f"{name}/{by}" for by in "FT" for name in OURS]
    print(f"{'ms':22}", *(f"{name:>11}" for name in NAMES), *titles)
    for net in asked.nets:
        found = race(
            *("rows", net, NAMES.values()),
            rounds=asked.rounds,
            budget=3600.0,
            memory=False,
            batch=asked.batch,
            device=asked.device,
        )
        for name in NAMES.values():
            if found[name].refused or found[name].wrong:
                raise SystemExit(
                    f"{net}, {name}: {found[name].refused or found[name].wrong}"
                )
        row = {n: statistics.median(found[name].seconds) for n, name in NAMES.items()}
        ratios = [f"{row[n] / row[by]:<{len(n) + 2}.2f}" for by in "FT" for n in OURS]
        print(
            f"{net:22}",
            *(f"{1e3 * t:11.2f}" for t in row.values()),
            *ratios,
            flush=True,
        )


if __name__ == "__main__":
    main()
