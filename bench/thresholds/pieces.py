"""How to make rows that are dropped after use, as for norms and other quantities.

One bench is about how many of their numbers to make at a time. On a CPU a piece should
fit the cache, and on a GPU it should be long enough to keep it busy. The other is about
whether a device should launch few operations and never be waited for.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from contenders import Workload
from networks import usual_batch

from vmapsafe import per_sample, quantities
from vmapsafe.rules.formulas import REGIMES

from .bench import Bench, best_number, entry, numbers

WANTED = {
    "norms": quantities.Norms,
    "sum of squares": quantities.SumOfSquares,
    "Gram matrix": quantities.Gram,
}


def cases(device):
    for net in ("small CNN", "ResNet-18", "ViT-like", "MobileNetV2"):
        for want in WANTED:
            yield {"net": net, "want": want, "batch": usual_batch(net, device)}


def lengths(device):
    powers = (15, 17, 19, 21, 23) if device == "cpu" else (19, 21, 23, 25, 27)
    return numbers(*powers)


def contenders(field, values, device, dtype, net, want, batch):
    w, wanted = Workload(net, batch, dtype, device), WANTED[want]()

    def with_value(value):
        changed = entry(REGIMES, device, replace(REGIMES[device], **{field: value}))
        return lambda: changed

    def run():
        return per_sample(w.model, F.cross_entropy, w.x, w.y, want=wanted)

    found = values(device)
    return {name: (with_value(value), run) for name, value in found.items()}


BENCHES = [
    Bench(
        name="pieces",
        cases=cases,
        contenders=partial(contenders, "piece", lengths),
        table="formulas",
        propose=best_number("piece"),
    ),
    Bench(
        name="launches",
        cases=cases,
        contenders=partial(
            contenders, "launches", lambda device: {"False": False, "True": True}
        ),
        table="formulas",
        propose=best_number("launches"),
    ),
]
