"""``pytest bench`` measures everything, ``pytest bench -k quick`` a small part.

Every test is one contender. The tests of one task on one network are one race, see
``conftest.py``. If a contender is not installed or refuses the network, its test is
skipped, and the reason is shown.
"""

from __future__ import annotations

import pytest
from contenders import BLOCK, CLIPPED, FORWARD, NORMS, QUANTITIES, ROWS
from networks import DEPTHS, NETWORKS, WIDTHS, usual_batch

QUICK = ("BN MLP", "small CNN", "GroupNorm CNN", "conv1d net", "tiny net")
REDUCED = (
    *("BN MLP", "small CNN", "conv1d net", "ResNet-18"),
    *("GroupNorm CNN", "GroupNorm ResNet-18"),
)
# For growth: the ways that a user chooses from, and the yardsticks.
SOME = (
    *("plain", "floor", "loop", "vmapsafe", "vmapsafe, fast=False", "vmapsafe, out="),
    *("vmap(grad)", "BackPACK", "JAX plain", "JAX"),
)
# By device. On a CPU up to 3 GB of rows, which fit into the memory of a small machine;
# on a GPU up to 11, since those of JAX go through a file.
BATCHES = {
    "cpu": {
        "small CNN": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        "BN MLP": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        "ResNet-18": (1, 2, 4, 8, 16, 32, 64),
    },
    "cuda": {
        "small CNN": (1, 4, 16, 64, 256, 512),
        "BN MLP": (1, 4, 16, 64, 256, 512),
        "ResNet-18": (1, 4, 16, 64, 256),
    },
}
# Cases in which torch's own way could be faster.
SWEPT = ("plain", "floor", "vmapsafe", "vmap(grad) in a block", "vmap(grad)")
SWEPT_NETS = (
    *("conv1d net", "MobileNetV2", "ViT-like", "GroupNorm CNN"),
    *("GroupNorm conv1d net", "GroupNorm ResNet-18"),
)
SWEEP = {
    "cpu": dict.fromkeys(SWEPT_NETS, (8, 16, 32, 64)),
    "cuda": dict.fromkeys(SWEPT_NETS, (16, 64, 512)),
}


def races(sizes, contenders, quick=(), waits=("compiled", "CUDA graph")):
    """Parameters of a test: (network, batch) by contender.

    Args:
        sizes: a function of the device that gives networks and batches.
        contenders: the names.
        quick: tests of these networks are marked as quick,
        waits: except those of contenders with this in their names, which take long to
            start.
    """
    return pytest.mark.races(sizes, contenders, quick, waits)


def usual(nets):
    return lambda device: [(net, usual_batch(net, device)) for net in nets]


@races(usual(NETWORKS), ROWS, QUICK)
def test_rows(contend, net, batch, precision, contender):
    """The B x P tensor, every per-sample gradient."""
    contend("rows", net, batch, precision, contender)


def reduced(device):
    """Networks and batches for reductions, which users ask for large batches too."""
    larger = [("ResNet-18", 512), ("GroupNorm ResNet-18", 512)]
    return usual(REDUCED)(device) + larger * (device == "cuda")


@races(reduced, NORMS, ("small CNN",), ("compiled", "CUDA graph", "JAX"))
def test_norms(contend, net, batch, precision, contender):
    """The norm of each per-sample gradient, (B,)."""
    contend("norms", net, batch, precision, contender)


@races(reduced, CLIPPED, ("small CNN",), ("compiled", "CUDA graph", "JAX"))
def test_clipped_sum(contend, net, batch, precision, contender):
    """The sum of per-sample gradients, half of them scaled down to one norm."""
    contend("clipped sum", net, batch, precision, contender)


MEASURED = usual(("BN MLP", "small CNN", "ResNet-18"))


@races(MEASURED, QUANTITIES["norms, sum and losses"], ("small CNN",))
def test_norms_sum_and_losses(contend, net, batch, precision, contender):
    contend("norms, sum and losses", net, batch, precision, contender)


@races(MEASURED, QUANTITIES["sum of squares"], ("small CNN",))
def test_sum_of_squares(contend, net, batch, precision, contender):
    contend("sum of squares", net, batch, precision, contender)


@races(MEASURED, QUANTITIES["Gram matrix"], ("small CNN",))
def test_gram(contend, net, batch, precision, contender):
    contend("Gram matrix", net, batch, precision, contender)


@races(MEASURED, QUANTITIES["dots with 1 vector"], ("small CNN",))
def test_dots_with_one(contend, net, batch, precision, contender):
    contend("dots with 1 vector", net, batch, precision, contender)


@races(MEASURED, QUANTITIES["dots with 10 vectors"], ("small CNN",))
def test_dots_with_ten(contend, net, batch, precision, contender):
    contend("dots with 10 vectors", net, batch, precision, contender)


@races(MEASURED, QUANTITIES["sketch"], ("small CNN",))
def test_sketch(contend, net, batch, precision, contender):
    """Random projections to 512 numbers."""
    contend("sketch", net, batch, precision, contender)


@races(usual(NETWORKS), FORWARD, QUICK)
def test_forward(contend, net, batch, precision, contender):
    """The network under vmap without a gradient; ``plain`` is one merged call."""
    contend("forward", net, batch, precision, contender)


@races(usual(("tiny net", "ResNet-18", "ResNet-50")), BLOCK, ("tiny net",))
def test_block(contend, net, batch, precision, contender):
    """Entering and leaving a block; ``plain`` is ``model.eval(); model.train()``."""
    contend("block", net, batch, precision, contender)


def others(batches):
    """Networks and batch sizes that test_rows does not measure."""
    return lambda device: [
        (net, batch)
        for net, sizes in batches[device].items()
        for batch in sizes
        if batch != usual_batch(net, device)
    ]


@races(others(BATCHES), SOME)
def test_growth_with_batch(contend, net, batch, precision, contender):
    contend("rows", net, batch, precision, contender)


@races(others(SWEEP), SWEPT)
def test_sweep(contend, net, batch, precision, contender):
    contend("rows", net, batch, precision, contender)


@races(usual(WIDTHS), SOME)
def test_growth_with_width(contend, net, batch, precision, contender):
    contend("rows", net, batch, precision, contender)


@races(usual(DEPTHS), SOME)
def test_growth_with_depth(contend, net, batch, precision, contender):
    contend("rows", net, batch, precision, contender)
