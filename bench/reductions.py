"""Norms, clipped sums and rows into reused storage, by the plain gradient.

One thread. All contenders run in turn in each round; numbers are ratios of medians to
the plain gradient of the summed loss. Before anything is timed they are compared with
``vmap(grad)`` in float64. Memory is the peak above what was resident, in MB, each in a
process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import NETWORKS
from per_sample_grads import contenders as of_rows
from per_sample_grads import medians, prepared

import vmapsafe

NETS = ("ResNet-18", "small CNN", "GroupNorm ResNet-18", "GroupNorm CNN", "BN MLP")


def contenders(model, x, y):
    """{name: function without arguments}, the plain gradient first."""
    others = of_rows(model, x, y)

    @functools.cache
    def storage():
        params = dict(model.named_parameters())
        return {n: x.new_empty(len(x), *p.shape) for n, p in params.items()}

    def plain_and_fill():
        others["plain"]()
        return [row.fill_(1.0) for row in storage().values()]

    def clipped(**options):
        return vmapsafe.clipped_grad_sum(
            model, F.cross_entropy, x, y, max_grad_norm=1.0, **options
        )

    return {
        "plain": others["plain"],
        "reused": plain_and_fill,
        "norms": lambda: vmapsafe.per_sample_grad_norms(model, F.cross_entropy, x, y),
        "clipped": clipped,
        "out=": lambda: vmapsafe.per_sample_grads(
            model, F.cross_entropy, x, y, out=storage()
        ),
        "rows": lambda: vmapsafe.per_sample_grads(model, F.cross_entropy, x, y),
        "fast=False": others["fast=False"],
    }


def assert_equal(make, shape, device):
    """What is timed gives what torch's vmap(grad) gives, on four samples."""
    model, x, y = prepared(make, shape, device, torch.float64)
    runs = contenders(model, x[:4], y[:4])
    rows = of_rows(model, x[:4], y[:4])["T"]()
    norms = sum(r.flatten(1).square().sum(1) for r in rows.values()).sqrt()
    factors = (1 / norms).clamp(max=1)
    same = torch.testing.assert_close
    same(runs["norms"](), norms, rtol=1e-7, atol=1e-9)
    for name, total in runs["clipped"]().items():
        same(total, torch.tensordot(factors, rows[name], 1), rtol=1e-7, atol=1e-9)
    for run in ("out=", "rows"):
        for name, row in runs[run]().items():
            same(row, rows[name], rtol=1e-7, atol=1e-9)


def peak(net, run):
    """MB above what was resident, of one run in a process of its own."""
    command = [sys.executable, __file__, "--peak", run, "--nets", net]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(printed.stdout)


def print_peak(net, run, device):
    make, shape = NETWORKS[net]
    model, x, y = prepared(make, shape, device, torch.float32)
    small = prepared(*NETWORKS["tiny net"], device, torch.float32)
    contenders(*small)[run]()  # what torch loads at first use
    function = contenders(model, x, y)[run]
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system (glibc)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now (Linux)
    before = resident("VmRSS")
    function()
    print((resident("VmHWM") - before) / 1024)


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--nets", nargs="*", default=NETS, choices=list(NETWORKS))
    parser.add_argument("--peak", help="print the memory of one contender, and end")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.peak:
        print_peak(asked.nets[0], asked.peak, asked.device)
        return
    for net in asked.nets:
        make, shape = NETWORKS[net]
        assert_equal(make, shape, asked.device)
        runs = contenders(*prepared(make, shape, asked.device, torch.float32))
        found = medians(runs, asked.rounds, asked.device)
        if net == asked.nets[0]:
            print(f"{'x plain':20}", *(f"{name:>11}" for name in found))
        ratios = [f"{ms / found['plain']:11.2f}" for ms in found.values()]
        print(f"{net:20}", *ratios, flush=True)
        if asked.device == "cpu":
            peaks = [f"{peak(net, run):11.0f}" for run in found]
            print(f"{'  peak MB':20}", *peaks, flush=True)


if __name__ == "__main__":
    main()
