"""From which size on the fused backward of an eval batch norm wins, under vmap."""

from __future__ import annotations

import torch
from torch.func import vmap

from vmapsafe._block import operators
from vmapsafe._rule import operator_rules
from vmapsafe.rules import batch_norm_operators

from .bench import Bench, entry, from_size, setting

(RULE,) = [
    rule
    for rule in operator_rules()[batch_norm_operators._backward]
    if rule.accepts is batch_norm_operators._backward_by_running
]
SIDES = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)


def cases(device):
    batches, most = ((16,), 2**16) if device == "cpu" else ((16, 128, 512), 2**18)
    for batch in batches:
        for channels in (64, 256):
            for side in SIDES:
                if channels * side**2 <= most:
                    yield {"batch": batch, "channels": channels, "side": side}


def contenders(device, dtype, batch, channels, side):
    given = {"device": device, "dtype": dtype}
    shape = (batch, 1, channels, side, side)
    grad, x = torch.randn(shape, **given), torch.randn(shape, **given)
    weight, mean = torch.randn(2, channels, **given)
    var = torch.rand(channels, **given) + 0.5
    nothing = torch.empty(0, **given)  # what a forward in eval mode saves

    def one(grad, x):
        rest = (mean, var, nothing, nothing, False, 1e-5, [True, True, True])
        return batch_norm_operators._backward(grad, x, weight, *rest)

    def from_values(least):
        changed = entry(batch_norm_operators.REGIMES, device, least)
        return lambda: setting(operators.only(RULE), changed)

    def run():
        return vmap(one)(grad, x)

    return {"plain": (from_values(2**62), run), "fused": (from_values(0), run)}


BENCHES = [
    Bench(
        name="batch norm",
        cases=cases,
        contenders=contenders,
        table="batch_norm_operators",
        propose=from_size(lambda side, **_: side**2, "plain", "fused"),
    )
]
