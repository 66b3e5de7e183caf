"""Find the size from which the fused backward of an eval batch norm wins.

It runs under vmap(grad). For several numbers of values per sample and channel it prints
two ratios of times: plain operations to the fused kernel, and the better of these to
torch's own rule. ``REGIMES`` in vmapsafe/rules/batch_norm_operators.py is the size from
which the first ratio stays above 1. Run it in the folder bench::

    python -m thresholds.batch_norm
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from measuring import seconds_in_turn
from torch.func import grad, vmap

from vmapsafe import vmap_safe
from vmapsafe.rules.batch_norm_operators import REGIMES

SIDES = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)


def contenders(batch, channels, side, device):
    x = torch.randn(batch, 1, channels, side, side, device=device)
    weight, bias, mean = torch.randn(3, channels, device=device)
    var = torch.rand(channels, device=device) + 0.5
    cotangent = torch.randn(x.shape[1:], device=device)

    def loss(weight, bias, x):
        return (F.batch_norm(x, mean, var, weight, bias) * cotangent).sum()

    rows = vmap(grad(loss, (0, 1, 2)), (None, None, 0))
    somewhere = torch.nn.Linear(1, 1, device=device)

    def with_threshold(values):
        def run():
            REGIMES[device] = values
            with vmap_safe(somewhere):
                return rows(weight, bias, x)

        return run

    def torchs_own():
        with vmap_safe(somewhere, fast=False):
            return rows(weight, bias, x)

    return {
        "plain operations": with_threshold(10**9),
        "fused": with_threshold(0),
        "torch": torchs_own,
    }


def medians(runs, rounds, device):
    expected = runs["torch"]()
    for run in runs.values():
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
    times = seconds_in_turn(runs, rounds, 60.0, device)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=41)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{'batch x channels':>16} {'values':>7} {'plain/fused':>12} {'ours/torch':>12}"
    )
    for batch, channels in ((16, 64), (16, 256)):
        for side in SIDES:
            if channels * side**2 > 2**16:
                continue
            found = medians(
                contenders(batch, channels, side, asked.device),
                asked.rounds,
                asked.device,
            )
            best = min(found["plain operations"], found["fused"])
            print(
                f"{batch:>8} x {channels:<5} {side**2:7}"
                f" {found['plain operations'] / found['fused']:12.2f}"
                f" {best / found['torch']:12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
