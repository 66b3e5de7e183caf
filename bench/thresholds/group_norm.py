"""From which size on group norm by layer norm and batch norm wins, under vmap(grad)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from vmapsafe import vmap_safe
from vmapsafe.rules import group_norm

from .bench import Bench, entry, from_size, setting

SIDES = (2, 4, 8, 12, 16, 24, 32, 48)


def cases(device):
    batches, most = ((16,), 2**16) if device == "cpu" else ((16, 128, 512), 2**18)
    for batch in batches:
        for channels in (32, 128, 512):
            for side in SIDES:
                if channels * side**2 <= most:
                    yield {"batch": batch, "channels": channels, "side": side}


def contenders(device, dtype, batch, channels, side):
    given = {"device": device, "dtype": dtype}
    shape = (batch, 1, channels, side, side)
    x, cotangent = torch.randn(shape, **given), torch.randn(shape[1:], **given)
    weight, bias = torch.randn(2, channels, **given)
    somewhere = torch.nn.Linear(1, 1, **given)

    def loss(weight, bias, x):
        return (F.group_norm(x, 32, weight, bias) * cotangent).sum()

    rows = vmap(grad(loss, (0, 1, 2)), (None, None, 0))

    def from_values(least):
        changed = entry(group_norm.REGIMES, device, least)
        return lambda: setting(vmap_safe(somewhere), changed)

    def run():
        return rows(weight, bias, x)

    return {"plain": (from_values(2**62), run), "by norms": (from_values(0), run)}


BENCHES = [
    Bench(
        name="group norm",
        cases=cases,
        contenders=contenders,
        table="group_norm",
        propose=from_size(lambda side, **_: side**2, "plain", "by norms"),
    )
]
