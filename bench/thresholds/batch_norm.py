"""From which sizes on the rules of batch norm win, under vmap."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.func import vmap

from vmapsafe._block import operators
from vmapsafe._rule import operator_rules
from vmapsafe.rules import batch_norm_operators

from .bench import Bench, entry, from_size, setting

FORWARD = operator_rules()[batch_norm_operators._forward][0]
BACKWARD = operator_rules()[batch_norm_operators._backward][0]
SIDES = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)


def cases(device):
    batches, most = ((16,), 2**16) if device == "cpu" else ((16, 128, 512), 2**18)
    for batch in batches:
        for channels in (64, 256):
            for side in SIDES:
                if channels * side**2 <= most:
                    yield {"batch": batch, "channels": channels, "side": side}


def small_cases(device):
    for batch in (4, 16, 64):
        for channels in (8, 64, 512):
            for side in (1, 4, 8):
                if batch * channels * side**2 <= 2**19:
                    yield {"batch": batch, "channels": channels, "side": side}


def tensors(device, dtype, batch, channels, side):
    given = {"device": device, "dtype": dtype}
    shape = (batch, 1, channels, side, side)
    grad, x = torch.randn(shape, **given), torch.randn(shape, **given)
    weight, bias, mean = torch.randn(3, channels, **given)
    return grad, x, weight, bias, mean, torch.rand(channels, **given) + 0.5


def ours_and_torchs(device, dtype, batch, channels, side):
    """Forward and backward, with a kernel of ours in force or without one."""
    grad, x, weight, bias, mean, var = tensors(device, dtype, batch, channels, side)

    def one(grad, x):
        rest = (mean, var, False, 0.1, 1e-5)
        y, saved, rstd = batch_norm_operators._forward(x, weight, bias, *rest)
        rest = (mean, var, saved, rstd, False, 1e-5, [True, True, True])
        return y, *batch_norm_operators._backward(grad, x, weight, *rest)

    def run():
        return vmap(one)(grad, x)

    def ours():
        # The rules of other operators hold too, and so that of the backward.
        return operators.only(FORWARD)

    return {"torch": (nullcontext, run), "ours": (ours, run)}


def fused_and_separate(device, dtype, batch, channels, side):
    grad, x, weight, bias, mean, var = tensors(device, dtype, batch, channels, side)
    nothing = x.new_empty(0)  # what a forward in eval mode saves

    def one(grad, x):
        rest = (mean, var, nothing, nothing, False, 1e-5, [True, True, True])
        return batch_norm_operators._backward(grad, x, weight, *rest)

    def from_values(least):
        regime = batch_norm_operators.Regime(batch=0, channel=least)
        changed = entry(batch_norm_operators.REGIMES, device, regime)
        return lambda: setting(operators.only(BACKWARD), changed)

    def run():
        return vmap(one)(grad, x)

    return {"separate": (from_values(2**62), run), "fused": (from_values(0), run)}


BENCHES = [
    Bench(
        name="batch norm, batch",
        cases=small_cases,
        contenders=ours_and_torchs,
        table="batch_norm_operators",
        propose=from_size(
            lambda batch, channels, side: batch * channels * side**2,
            *("torch", "ours", "batch"),
        ),
    ),
    Bench(
        name="batch norm, channel",
        cases=cases,
        contenders=fused_and_separate,
        table="batch_norm_operators",
        propose=from_size(lambda side, **_: side**2, "separate", "fused", "channel"),
    ),
]
