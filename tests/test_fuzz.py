"""The first cases of the fuzzer; ``python tests/fuzz.py`` runs as many as wanted."""

import pytest
from fuzz_cases import Case
from fuzz_nets import Functional
from torch.nn.modules.batchnorm import _BatchNorm

import fuzz

EACH = 100

SECOND_ORDER = (
    *("hessian", "hessian of vmap", "vmap of hessian", "jvp of jvp", "grad of jvp"),
    *(
        "jacrev of rows",
        "jacfwd of rows",
        "grad of rows",
        "backward of rows",
        "grad of adapted",
    ),
)


def _layers(case, kind):
    return [m for m in case.net.modules() if isinstance(m, kind)]


def _frozen_without_statistics(case):
    norms = _layers(case, _BatchNorm)
    frozen = [m for m in norms if case.net.training and not m.training]
    return any(m.running_mean is None for m in frozen)


def _bias_broadcasts(case):
    layers = _layers(case, Functional)
    return any(m.shift.shape != m.kernel.shape[:1] for m in layers)


# Faults that are known and not mended yet: what they are, and what cases they spoil.
# A line goes when its fault does.
OPEN = {
    "a loss of shape (1,)": lambda case: case.loss == "none",
    "a loss that reads parameters": lambda case: case.regularised or case.twice,
    "a bias that broadcasts": _bias_broadcasts,
    "a state dict as params": lambda case: case.given == "state",
    "one draw for all chunks": lambda case: case.randomness == "same",
    "frozen, without statistics": _frozen_without_statistics,
    "max_norm": lambda case: "max_norm" in str(case.net),
    "second order": lambda case: case.what in SECOND_ORDER,
    "convert in a block": lambda case: case.what == "converted",
    "parameters without dimensions": lambda case: any(
        p.dim() == 0 for p in case.net.parameters()
    ),
    "norms of tiny and huge rows": lambda case: case.factor != 1,
    "autocast": lambda case: case.autocast,
    "layouts of group norm": lambda case: "GroupNorm" in str(case.net)
    or case.mode == "group_norm",
    "batches of one": lambda case: case.x_format != "contiguous" and case.size < 6,
}


@pytest.mark.parametrize("first", range(0, 2500, EACH))
def test_cases(first):
    mismatches = []
    for seed in range(first, first + EACH):
        try:
            fuzz.run(seed)
        except fuzz.Mismatch as error:
            case = Case(seed)
            if not any(spoils(case) for spoils in OPEN.values()):
                mismatches.append(f"python tests/fuzz.py --seed {seed}: {error}")
    assert not mismatches, "\n".join(mismatches)
