"""Per-sample gradients: what they cost, as a multiple of two yardsticks.

All contenders run in turn in each round, so that they meet the same noise; the numbers
are ratios of medians. Before anything is timed they are compared in float64.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import NETWORKS
from torch import nn
from torch.func import functional_call, grad, vmap

import vmapsafe


def switched_by_hand(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def contenders(model, x, y):
    """{name: function without arguments}, the yardsticks F and T among them."""
    switched = switched_by_hand(model)
    leaves = list(switched.parameters())
    numbers = len(x) * sum(p.numel() for p in leaves)
    params = {name: p.detach() for name, p in switched.named_parameters()}

    def plain():
        loss = F.cross_entropy(switched(x), y, reduction="sum")
        return torch.autograd.grad(loss, leaves)

    def plain_and_fill():
        plain()
        return torch.empty(numbers, dtype=x.dtype, device=x.device).fill_(1.0)

    def sample_loss(params, x, y):
        out = functional_call(switched, params, (x.unsqueeze(0),))
        return F.cross_entropy(out, y.unsqueeze(0))

    def by_vmap():
        return vmap(grad(sample_loss), (None, 0, 0))(params, x, y)

    def ours(**options):
        rows = vmapsafe.per_sample_grads(model, F.cross_entropy, x, y, **options)
        return rows

    return {
        "plain": plain,
        "F": plain_and_fill,
        "T": by_vmap,
        "fast=False": lambda: ours(fast=False),
        "vmapsafe": lambda: ours(fast=True),
    }


def prepared(make, shape, device, dtype):
    torch.manual_seed(0)
    model = make()
    model(torch.randn(64, *shape[1:]))  # running statistics of its own
    x, y = torch.randn(shape), torch.randint(3, (shape[0],))
    return model.to(device, dtype), x.to(device, dtype), y.to(device)


def assert_equal(make, shape, device):
    """What is timed gives T's gradients, on two samples."""
    model, x, y = prepared(make, shape, device, torch.float64)
    runs = contenders(model, x[:2], y[:2])
    expected = runs["T"]()
    for name in ("fast=False", "vmapsafe"):
        actual = runs[name]()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9)


def medians(runs, rounds, device):
    """Milliseconds by name; the order is turned round after each round."""
    times = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            started = now(device)
            result = runs[name]()
            stopped = now(device)
            del result
            if i:
                times[name].append(1e3 * (stopped - started))
    return {name: statistics.median(values) for name, values in times.items()}


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()  # a neighbour on the core does not count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--nets", nargs="*", default=list(NETWORKS), choices=list(NETWORKS)
    )
    parser.add_argument("--save", type=Path, help="a folder for the numbers, as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for net in asked.nets:
        make, shape = NETWORKS[net]
        assert_equal(make, shape, asked.device)
        model, x, y = prepared(make, shape, asked.device, torch.float32)
        few = net == "tiny net"
        runs = contenders(model, x, y)
        found[net] = medians(runs, asked.rounds * (40 if few else 1), asked.device)
        if net == asked.nets[0]:
            names = list(found[net])
            titles = [f"{name}/{by}" for by in "FT" for name in names[2:]]
            print(f"{'ms':22}", *(f"{n:>11}" for n in names), *titles)
        row = found[net]
        ratios = [f"{row[n] / row[by]:.2f}" for by in "FT" for n in names[2:]]
        print(f"{net:22}", *(f"{row[n]:11.2f}" for n in names), *ratios, flush=True)
    if asked.save:
        today = datetime.date.today().isoformat()
        name = platform.processor() or platform.machine()
        if asked.device == "cuda":
            name = torch.cuda.get_device_name()
        record = {
            "date": today,
            "device": asked.device,
            "name": name,
            "threads": 1,
            "torch": torch.__version__,
            "vmapsafe": vmapsafe.__version__,
            "rounds": asked.rounds,
            "milliseconds": found,
        }
        asked.save.mkdir(parents=True, exist_ok=True)
        path = asked.save / f"per_sample_grads-{asked.device}-{today}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
