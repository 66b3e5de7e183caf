"""What was measured on the CPU, changed for a while."""

from dataclasses import replace
from typing import Any

import pytest

from vmapsafe.rules import (
    batch_norm_operators,
    convolution_regimes,
    formulas,
    layer_norm,
    linear,
)
from vmapsafe.rules.convolution_regimes import Winner

# Their tables hold numbers or dataclasses of their own, by the type of a device.
REGIMES: dict[str, dict[str, Any]] = {
    "batch_norm": batch_norm_operators.REGIMES,
    "convolution": convolution_regimes.REGIMES,
    "formulas": formulas.REGIMES,
    "layer_norm": layer_norm.REGIMES,
    "linear": linear.REGIMES,
}


def change_regimes(monkeypatch: pytest.MonkeyPatch, **regimes: Any) -> None:
    """Those of these families: a threshold, or a dict of fields."""
    for family, changed in regimes.items():
        table = REGIMES[family]
        if isinstance(changed, dict):
            changed = replace(table["cpu"], **changed)
        monkeypatch.setitem(table, "cpu", changed)


def take_every_size(
    monkeypatch: pytest.MonkeyPatch, algorithm: str, columns: int
) -> None:
    """No call is too small; all convolutions go to one algorithm."""
    change_regimes(
        monkeypatch,
        batch_norm={"batch": 0, "channel": 0},
        convolution={
            "batch": 0,
            "winners": (Winner(algorithm),),
            "columns": columns,
            "one_by_one": 0,
        },
        layer_norm={"batch": 0, "slice": 0},
        linear=0,
    )


def take_regimes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has those of "cuda"."""
    for table in REGIMES.values():
        monkeypatch.delitem(table, "cpu")
