"""How many numbers to work on at a time, for norms and other quantities.

On a CPU a piece should stay in the cache. On a GPU a piece should be long enough to
keep it busy.
"""

from __future__ import annotations

from unittest import mock

import torch.nn.functional as F
from contenders import Workload
from networks import usual_batch

from vmapsafe import per_sample, quantities
from vmapsafe.rules import formulas

from .bench import Bench, best_number, numbers

WANTED = {
    "norms": quantities.Norms,
    "sum of squares": quantities.SumOfSquares,
    "Gram matrix": quantities.Gram,
}


def cases(device):
    for net in ("small CNN", "ResNet-18", "ViT-like", "MobileNetV2"):
        for want in WANTED:
            yield {"net": net, "want": want, "batch": usual_batch(net, device)}


def contenders(device, dtype, net, want, batch):
    w, wanted = Workload(net, batch, dtype, device), WANTED[want]()
    powers = (15, 17, 19, 21, 23) if device == "cpu" else (19, 21, 23, 25, 27)

    def pieces_of(most):
        return lambda: mock.patch.object(formulas, "_CACHED", most)

    def run():
        return per_sample(w.model, F.cross_entropy, w.x, w.y, want=wanted)

    return {name: (pieces_of(most), run) for name, most in numbers(*powers).items()}


BENCHES = [
    Bench(
        name="pieces",
        cases=cases,
        contenders=contenders,
        table="formulas",
        propose=best_number(),
        share=2.0,
    )
]
