"""What bench does without a clock: it compares answers, and keeps and shows runs."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import compare
import contenders
import measuring
import pytest
import report
import results
import torch

from vmapsafe._block import operators

PEERS = ("BackPACK", "ExpandedWeights", "JAX", "JAX plain", "Opacus")


def row(contender, x_plain, net="a net", batch=2, **more):
    return {
        **{"task": "rows", "net": net, "batch": batch, "precision": "fp32"},
        **{"contender": contender, "rounds": 3, "x_plain": x_plain},
        **{"x_plain_q1": x_plain - 0.1, "x_plain_q3": x_plain + 0.1},
        **{"median": x_plain / 100, "q1": x_plain / 110, "q3": x_plain / 90},
        **{"peak_bytes": 1_000_000},
        **more,
    }


@pytest.fixture
def run():
    work = {"flop": 10**9, "bytes": 10**6}
    rates = ("copy_bytes", "fill_bytes", "fresh_fill_bytes", "matmul_flop")
    times = {"floor": 2.0, "vmapsafe": 2.5, "vmap(grad)": 5.0, "vmapsafe, out=": 1.5}
    machine = {"device": "cpu", "device_name": "a processor", "threads": 1}
    return {
        "machine": {
            **machine,
            **{"torch": "2.13", "python": "3.11"},
            **{f"{rate}_per_s": 10**10 for rate in rates},
        },
        "date": "2026-01-31",
        "commit": {"id": "0123456789abcdef", "dirty": False},
        "rows": [
            row("plain", 1.0, **work),
            *(row(name, x_plain) for name, x_plain in times.items()),
        ]
        + [
            row(name, x_plain * batch, f"CNN, {batch} deep" if deep else "a net", batch)
            for batch in (4, 8, 16, 32)
            for name, x_plain in (("plain", 1.0), *times.items())
            for deep in (True, False)
        ],
        "refused": [
            {
                **{"task": "rows", "net": "a net", "batch": 2, "precision": "fp32"},
                **{"contender": "BackPACK", "why": "ImportError: No module 'backpack'"},
            }
        ],
    }


# ------------------------------------------------------------------------- contenders


def compared(task, *names):
    return measuring.compared(
        task, "tiny net", {name: measuring.Measured() for name in names}
    )


@pytest.mark.parametrize("task", contenders.REFERENCES)
def test_contenders_agree_on_the_tiny_net(task):
    """Every contender that needs torch alone gives the loop's answer, to 1e-9."""
    names = [n for n in contenders.TASKS[task] if not n.startswith(PEERS)]
    for name, measured in compared(task, *names).items():
        assert not measured.wrong, (name, measured.wrong)
        if measured.refused:
            assert "not there yet" in measured.refused, (name, measured.refused)


def test_a_wrong_contender_is_found_out(monkeypatch):
    """One number that is off by a millionth is wrong."""

    def slightly_off(w):
        rows = contenders.by_vmap(w)

        def run():
            answer = rows()
            answer["0.bias"][1] *= 1 + 1e-6
            return answer

        return run

    monkeypatch.setitem(contenders.ROWS, "slightly off", slightly_off)
    assert compared("rows", "slightly off")["slightly off"].wrong.startswith("float64")


def test_a_contender_that_raises_is_a_row_in_its_own_words(monkeypatch):
    def refuses(w):
        raise RuntimeError("No BatchNorm!\nIn /home/me/peer.py")

    monkeypatch.setitem(contenders.ROWS, "peer", refuses)
    assert compared("rows", "peer")["peer"].refused == "RuntimeError: No BatchNorm!"


def test_a_race_in_a_process_of_its_own():
    """Every contender has its rounds, none is wrong, and this process is as it was."""
    before = set(operators._installed)
    names = ["floor", "vmapsafe", "vmap(grad)"]
    found = measuring.race("rows", "tiny net", names, rounds=3)
    assert list(found) == ["plain", *names]
    for measured in found.values():
        assert len(measured.seconds) == 3 and not measured.wrong + measured.refused
    assert operators._installed == before


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("task", ["rows", "norms", "clipped sum"])
def test_a_cuda_graph_needs_a_gpu(task, monkeypatch):
    """There it is a mode of torch.compile, which replays what it recorded."""
    w = contenders.Workload("tiny net", dtype=torch.float64)
    names = [n for n in contenders.TASKS[task] if n.endswith(", CUDA graph")]
    assert len(names) == 2
    for name in names:
        with pytest.raises(NotImplementedError, match="needs a GPU"):
            contenders.TASKS[task][name](w)
    modes = []

    def compile(function, mode):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    expected = contenders.REFERENCES[task](w)()
    w.device = "cuda"
    for name in names:
        answer = contenders.TASKS[task][name](w)()
        assert max(measuring.distances(answer, expected)) < 1e-9
    assert modes == ["reduce-overhead"] * 2


def test_first_line_names_no_path():
    error = ImportError("cannot import name 'a' from 'b' (/home/me/b.py)")
    assert measuring.first_line(error) == (
        "ImportError: cannot import name 'a' from 'b' (…)"
    )


def test_max_grad_norm_clips_half():
    w = contenders.Workload("tiny net", dtype=torch.float64)
    norms = contenders.norms(contenders.loop(w)())
    assert int((norms > w.max_grad_norm).sum()) == w.batch // 2


# ------------------------------------------------------------------------------- runs


def test_a_kept_run_reads_as_it_was(run, tmp_path):
    results.write(tmp_path / "run.json", run)
    assert results.read(tmp_path / "run.json") == run


def test_what_the_plugin_wrote_reads_like_a_kept_run(tmp_path):
    names = ("task", "x_plain")
    kept = row("plain", 1.0)
    params = ("net", "batch", "precision", "contender")
    written = {
        "machine_info": {"device": "cpu"},
        "datetime": "2026-01-31T12:00:00",
        "commit_info": {},
        "benchmarks": [
            {
                "extra_info": {n: kept[n] for n in names},
                "params": {n: kept[n] for n in params},
                "stats": {**{n: kept[n] for n in results.STATS}, "mean": 1.0},
            }
        ],
        "refused": [],
    }
    (tmp_path / "run.json").write_text(json.dumps(written))
    (read,) = results.read(tmp_path / "run.json")["rows"]
    assert read == {n: kept[n] for n in (*names, *params, *results.STATS)}


def test_lines_read_like_a_kept_run(run, tmp_path):
    """A run may be made in parts, each of which begins with a line for the machine."""
    path = tmp_path / "run.jsonl"
    head = {name: run[name] for name in ("machine", "date", "commit")}
    results.add_lines(path, [head, *run["rows"][:3]])
    results.add_lines(path, [head, *run["rows"][3:], *run["refused"]])
    assert results.read(path) == run
    path.write_text(json.dumps(head) + "\n")  # ended before its first race
    assert results.read(path) == {**head, "rows": [], "refused": []}


def test_a_run_that_ended_early_goes_on(tmp_path):
    """Each race is in the file when it ends. No race begins after the limit."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "run.jsonl"
    bench = Path(report.__file__).parent

    def lines(select, *more):
        """Of the file, and the reasons for skips."""
        asked = ["-k", f"tiny and ({select})", "--results", str(path)]
        asked += ["--rounds", "3", "-q", "-rs", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", str(bench), *asked]
        env = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
        found = subprocess.run(
            [*command, *more], capture_output=True, text=True, env=env
        )
        assert found.returncode == 0, found.stdout
        return path.read_text().splitlines(), found.stdout

    first, _ = lines("test_block")
    (_, *rows), refused = results.read(path)["rows"], results.read(path)["refused"]
    assert [r["contender"] for r in rows] == [*contenders.BLOCK][1:] and not refused
    assert len(first) == 2 + len(rows)

    second, printed = lines("test_block or test_forward", "--limit", "0")
    assert second == first
    assert f"[{len(contenders.BLOCK)}] " in printed and "--results has it" in printed
    assert f"[{len(contenders.FORWARD)}] " in printed and "see --limit" in printed


def test_parts_of_a_run_are_joined(run):
    """The joined run has the rows of both; a later row replaces an earlier one.

    It names its commit if that differs. Parts of two versions of torch are refused.
    """
    other = copy.deepcopy(run)
    assert results.joined([run, other]) == run
    other["commit"]["id"] = "fedcba98765432"
    del other["rows"][1:]
    other["rows"][0]["median"] = 7.0
    first, *rest = results.joined([run, other])["rows"]
    assert first == {**other["rows"][0], "commit": "fedcba9876"}
    assert rest == run["rows"][1:]
    other["rows"][0]["commit"] = "0f0f0f0f0f"  # which a joined part says itself
    assert results.joined([run, other])["rows"][0]["commit"] == "0f0f0f0f0f"
    del other["rows"][0]["commit"]
    task = run["rows"][0]["task"]
    again = report.machine_line(results.joined([run, other]))
    assert f"commit 0123456789 (some {task}: fedcba9876)." in " ".join(again.split())
    for row in other["rows"]:
        row["net"] = "another"
    assert len(results.joined([run, other])["rows"]) == len(run["rows"]) + 1
    key = {name: run["rows"][0][name] for name in results.KEY}
    refusing = {**run, "rows": [], "refused": [{**key, "why": "no"}]}
    assert results.joined([refusing, run])["refused"] == run["refused"]
    found = results.joined([run, refusing])
    assert found["rows"] == run["rows"][1:] and found["refused"][-1]["why"] == "no"
    other["machine"]["torch"] = "2.14"
    with pytest.raises(ValueError, match="differ in torch"):
        results.joined([run, other])


def test_tables_and_pictures(run, tmp_path):
    """A table has ratios to the floor, the least of a line in bold, and refusals.

    Only the part between the comments of the README changes.
    """
    results.write(tmp_path / "run.json", run)
    readme = tmp_path / "README.rst"
    readme.write_text(f"before\n\n{report.BEGIN}\nstale words\n{report.END}\n\nafter\n")
    report.main(
        [str(tmp_path / "run.json"), "--into", str(tmp_path / "out")]
        + ["--readme", str(readme), "--command", "pytest bench -k some"]
    )
    page = (tmp_path / "out" / "cpu-2026-01-31.rst").read_text()
    (line,) = [x for x in page.splitlines() if x.startswith("a net, 2") and "**" in x]
    assert line.split()[3:] == ["1.25", "2.50", "**0.75**"]
    assert "BackPACK (a net): ``ImportError: No module 'backpack'``" in page
    for name in ("rows", "growth", "shapes"):
        assert f"cpu-2026-01-31-{name}.png" in page
        picture = (tmp_path / "out" / f"cpu-2026-01-31-{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "stale" not in text and ".. image:: out/cpu-2026-01-31-rows.png" in text
    assert "pytest bench -k some" in text


# ------------------------------------------------------------------------- comparison


def test_ratios_by_batch_size(run):
    """The table has the networks that were measured at several batch sizes."""
    rows = [
        row(contender, x_plain, batch=batch)
        for batch, times in ((8, (3.0, 2.0)), (2, (1.0, 4.0)))
        for contender, x_plain in zip(("vmapsafe", "vmap(grad)"), times)
    ]
    rows += [row("vmapsafe", 1.0, "another net"), row("plain", 1.0, "another net", 4)]
    table = report.by_batch({**run, "rows": [*rows, row("floor", 1.0, "once")]}, "fp32")
    cells = [line.split() for line in table.splitlines()]
    assert ["network", "2", "4", "8"] in cells
    assert ["a", "net", "0.25", "–", "1.50"] in cells
    assert ["another", "net", "–", "–", "–"] in cells
    assert "once" not in table


def test_compare_finds_what_got_slower(run, tmp_path, capsys):
    """It compares ratios to plain of vmapsafe only. A new refusal counts as slower."""
    new = copy.deepcopy(run)
    for each in new["rows"]:
        each["median"] *= 10  # a slower machine
        if each["contender"] == "vmap(grad)":
            each["x_plain"] *= 2  # not ours
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, content in zip(paths, (run, new)):
        results.write(path, content)
    assert compare.main([str(path) for path in paths]) == 0

    new["rows"][2]["x_plain"] *= 1.2
    gone = new["rows"].pop(4)
    params = ("task", "net", "batch", "precision", "contender")
    new["refused"].append({**{n: gone[n] for n in params}, "why": "an error"})
    results.write(paths[1], new)
    capsys.readouterr()
    assert compare.main([str(path) for path in paths]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "inf times slower: vmapsafe, out=, rows, a net" in lines[0]
    assert "1.20 times slower: vmapsafe, rows, a net, batch 2" in lines[1]
    assert "2.50 -> 3.00 x plain" in lines[1] and len(lines) == 3
    assert compare.main([*map(str, paths), "--threshold", "1e999"]) == 0


def test_both_panels_of_reductions_mean_the_same_network(run, monkeypatch, tmp_path):
    """This does not depend on the order in which the parts of a run were made."""
    rows = []
    for task, nets in (("norms", ("one", "other")), ("clipped sum", ("other", "one"))):
        for net in nets:
            for name, times in (
                ("plain", 1.0),
                ("vmapsafe", 2.0 if net == "one" else 4.0),
            ):
                rows.append({**row(name, times, net=net), "task": task})
    shown = []
    monkeypatch.setattr(report, "_finish", lambda figure, *rest: shown.append(figure))
    report.draw_reductions({**run, "rows": rows}, tmp_path / "picture.png")
    first = shown[0].axes[0]  # only it has labels
    labels = [label.get_text() for label in first.get_yticklabels()]
    for axes in shown[0].axes:
        points = [line for line in axes.lines if line.get_linestyle() == "None"]
        found = {
            labels[round(y)].split(",")[0]: float(x)
            for line in points
            for x, y in zip(line.get_xdata(), line.get_ydata())
        }
        assert found == {"one": 2.0, "other": 4.0}
