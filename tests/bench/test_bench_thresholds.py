"""bench/thresholds measures, keeps and proposes the entries of every table."""

import importlib
import json
import pkgutil
import sys
from contextlib import nullcontext
from dataclasses import asdict, fields, is_dataclass, replace

import pytest
import torch
from thresholds import __main__ as command
from thresholds import bench, convolution, products

import vmapsafe.rules
from vmapsafe.rules.regimes import Regimes


def tables():
    """{file: table} of those that a file has itself."""
    found = {}
    for module in pkgutil.iter_modules(vmapsafe.rules.__path__):
        table = getattr(
            importlib.import_module(f"vmapsafe.rules.{module.name}"), "REGIMES", None
        )
        if isinstance(table, Regimes) and module.name != "convolution":
            found[module.name] = table
    return found


def test_every_number_of_every_table_has_a_bench():
    found = tables()
    assert found.keys() == {b.table for b in command.BENCHES.values()} - {
        *("", "products")
    }
    for name, table in found.items():
        if is_dataclass(table["cpu"]):
            assert command.FIELDS[name] == {f.name for f in fields(table["cpu"])}
    assert found.keys() >= command.FIELDS.keys()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_apart_and_can_be_written(device):
    for one in command.BENCHES.values():
        lines = [json.dumps(case) for case in one.cases(device)]
        assert len(lines) == len({*lines}) and (lines or device == "cuda")


# -- Proposals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "least"),
    [
        ([(1, 0.5), (4, 0.6)], 0),
        ([(1, 2.0), (4, 1.5)], sys.maxsize),
        ([(1, 2.0), (3, 0.9), (3, 1.2), (9, 0.5)], 4),
        ([(1, 2.0), (100, 1.5), (101, 0.5)], 101),
        # A rare loss does not count against much gain.
        ([(1, 2.0), (16, 0.5), (64, 1.01), (256, 0.5)], 4),
    ],
)
def test_threshold_with_the_least_time(ratios, least):
    assert bench.best_threshold(ratios) == least


def test_numbers_are_written_as_in_the_tables():
    written = [bench.code(n) for n in (0, 100, 256, 2**19, sys.maxsize)]
    assert written == ["0", "100", "256", "2**19", "sys.maxsize"]


def test_number_with_the_least_time():
    rows = [
        ({}, {"2**15": 1.0, "2**17": 0.5, "2**19": 0.6}),
        ({}, {"2**15": 1.0, "2**17": 0.9, "2**19": 0.6}),
    ]
    assert bench.best_number("piece")(rows, "cpu") == {"piece": "2**19"}


def test_winners_are_those_of_the_shapes():
    """Products win where the kernel has one position."""
    found = [
        (
            {"batch": 16, **asdict(shape)},
            {"torch": 1.0, "products": 0.5 if shape.kernel == 1 else 2.0},
        )
        for shape in convolution.shapes()
        if shape.dims == 2 and shape.groups == 1
    ]
    found = convolution.winners(found, "cuda")["winners"]
    begin, winner, end = found.splitlines()
    assert winner.startswith('    Winner("products", kernel=(0, 2)')
    assert begin + end == "()"


def test_bounds_of_onednn():
    """It wins from 2^20 multiplications on, but for long sums, shorter ones if both
    matrices lie transposed."""
    rows = []
    for case in products.cases("cpu"):
        most = 10**5 if case["turned"] != "both" else 100
        size = case["rows"] * case["others"] * case["length"]
        wins = size >= 2**20 and case["length"] < most
        rows.append((case, {"MKL": 1.0, "oneDNN": 0.5 if wins else 1.5}))
    proposed = {"least": "2**20", "longest": "36864", "turned": "64"}
    assert products.propose(rows, "cpu") == proposed
    only_one = [row for row in rows if row[0]["turned"] == "none"]
    assert products.propose(only_one, "cpu") == {**proposed, "turned": "0"}


def test_an_entry_names_what_was_not_measured():
    assert command.entry_code("linear", "cuda", {"": "2**15"}) == "    cuda=2**15,"
    assert command.entry_code("layer_norm", "cuda", {"batch": "0"}) == (
        "    cuda=Regime(\n        batch=0,\n    ),  # not measured: slice"
    )


# -- Runs ------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_ended(tmp_path, capsys):
    """Every bench runs; what is in the file is not measured again."""
    path = tmp_path / "rows.jsonl"
    asked = ["--rounds", "1", "--budget", "0", "--most", "1", "--out", str(path)]
    command.main(asked)
    printed = capsys.readouterr().out
    lines = path.read_text().splitlines()
    measured = [json.loads(line)["bench"] for line in lines]
    assert measured == [*command.BENCHES]
    _, _, proposed = printed.partition("\n\n")
    for name in tables():
        assert f"vmapsafe/rules/{name}.py\n" in proposed

    command.main([*asked, "--limit", "0"])
    assert capsys.readouterr().out.lstrip("\n") == proposed.lstrip("\n")
    assert path.read_text().splitlines() == lines


def made_up(monkeypatch, **answers):
    def contenders(device, dtype, size):
        return {
            name: (nullcontext, lambda value=value: torch.tensor([1.0, value]))
            for name, value in answers.items()
        }

    one = bench.Bench("made up", lambda device: [{"size": 1}], contenders)
    monkeypatch.setattr(command, "BENCHES", {"made up": one})
    return one


def test_a_wrong_contender_is_shown_and_not_kept(monkeypatch, tmp_path, capsys):
    made_up(monkeypatch, torch=2.0, ours=2.01)
    path = tmp_path / "rows.jsonl"
    command.main(["--out", str(path)])
    printed = capsys.readouterr().out
    assert "made up: size 1: AssertionError: ours is wrong" in printed
    assert "made up: 0 of 1 cases" in printed and not path.exists()


def test_rows_of_another_device_do_not_count(monkeypatch, tmp_path):
    made_up(monkeypatch, torch=2.0, ours=2.0)
    path = tmp_path / "rows.jsonl"
    row = {"bench": "made up", "case": {"size": 1}, "seconds": {"torch": 1.0}}
    lines = [{"device": "cuda", "precision": "usual", **row}]
    path.write_text(json.dumps(lines[0]) + "\n")
    command.main(["--out", str(path), "--rounds", "1"])
    _, line = path.read_text().splitlines()
    assert json.loads(line)["device"] == "cpu"


def test_answers_are_compared_without_tf32():
    """The time is that of what is asked for, and settings come back."""
    seen = []

    def run():
        seen.append(torch.backends.cudnn.allow_tf32)
        return torch.ones(2)

    cudnn, found = torch.backends.cudnn, {"torch": (nullcontext, run)}
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        times = bench.best_times(found, "cpu", torch.float32, True, rounds=1, budget=0)
        assert cudnn.allow_tf32 is False
    assert times.keys() == {"torch"}
    assert seen[0] is False and all(seen[1:]) and len(seen) > 2


def test_a_share_of_the_time_is_for_each_bench(monkeypatch):
    """A slow bench does not take the time of those after it."""
    now = [0.0]

    def best_times(*args):
        now[0] += 1.0
        return {"torch": 1.0}

    monkeypatch.setattr(command, "best_times", best_times)
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    slow = made_up(monkeypatch, torch=2.0)
    slow = replace(slow, cases=lambda device: [{"size": i} for i in range(99)])
    benches = {name: replace(slow, name=name) for name in ("one", "two", "three")}
    monkeypatch.setattr(command, "BENCHES", benches)
    rows = []
    monkeypatch.setattr(
        command.Rows, "add", lambda self, bench, *_: rows.append(bench.name)
    )
    command.main(["--limit", "12"])
    assert rows == ["one"] * 4 + ["two"] * 4 + ["three"] * 4
