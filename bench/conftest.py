"""Options of ``pytest bench``, contenders in turn, and what a saved run records.

pytest-benchmark times one test after the other. On a machine with other load, ratios
are reliable only if the contenders take turns. So the first test of a task on a network
runs all its contenders together. Each test then hands its own rounds to the plugin,
through a timer that replays them. The plugin's tables, ``--benchmark-json``,
``--benchmark-autosave``, ``--benchmark-compare`` and its other options work as usual.
"""

from __future__ import annotations

import datetime
import functools
import statistics
import time
from pathlib import Path

import pytest
import torch
from measuring import machine, race, work
from pytest_benchmark.utils import get_commit_info
from results import KEY, add_lines, read

# It needs another environment; these are no tests.
collect_ignore = ["jax_rows.py", "thresholds"]


def pytest_addoption(parser):
    group = parser.getgroup("vmapsafe")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"])
    group.addoption("--threads", type=int, default=1, help="threads of torch")
    group.addoption(
        "--rounds", type=int, default=11, help="the most rounds; at least 3 are run"
    )
    group.addoption(
        "--budget",
        type=float,
        default=60.0,
        help="seconds for all rounds of one network",
    )
    group.addoption(
        "--results",
        type=Path,
        metavar="FILE",
        help="where the results of each race are added; what is there is not repeated",
    )
    group.addoption(
        "--limit",
        type=float,
        metavar="SECONDS",
        default=float("inf"),
        help="after this time no race begins",
    )
    group.addoption("--no-memory", action="store_true", help="do not measure peaks")
    group.addoption(
        "--jax-python",
        help="the python of an environment with jax (default: $VMAPSAFE_JAX_PYTHON)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: under three minutes on two CPU cores")
    config.addinivalue_line("markers", "races: the parameters of a test")
    torch.set_num_threads(config.getoption("threads"))
    config.stash[RUN] = Run(config)


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("device")
    precisions = ["fp32", "tf32", "bf16"] if device == "cuda" else ["fp32"]
    for marker in metafunc.definition.iter_markers("races"):
        # In this order the tests of one race follow each other.
        metafunc.parametrize("precision", precisions)
        metafunc.parametrize(
            ("net", "batch", "contender"), [*parameters(device, *marker.args)]
        )


def parameters(device, sizes, contenders, quick, waits):
    """One for each contender, as ``races`` of test_bench.py has it."""
    for net, batch in sizes(device):
        for contender in contenders:
            is_quick = net in quick and not any(w in contender for w in waits)
            yield pytest.param(
                *(net, batch, contender),
                id=f"{net}, {batch}: {contender}",
                marks=[pytest.mark.quick] * is_quick,
            )


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))
        # The warnings of other libraries are not tested here.
        item.add_marker(pytest.mark.filterwarnings("ignore"))


class Replay:
    """A timer that reads what was measured before, one interval after the other."""

    def __init__(self):
        self.readings = iter(())

    def load(self, seconds):
        self.readings = iter([reading for s in seconds for reading in (0.0, s)])

    def __call__(self):
        return next(self.readings)


REPLAY = Replay()
RUN = pytest.StashKey["Run"]()


class Run:
    """The races of a run, of which the last is kept, and what is written of them."""

    def __init__(self, config):
        self.option = config.getoption
        self.end = time.monotonic() + self.option("limit")
        self.key, self.last, self.about = None, {}, {}
        self.refused, self.known, self.begun = [], set(), False
        path = self.option("results")
        if path and path.exists():
            before = read(path)
            for row in (*before["rows"], *before["refused"]):
                self.known.add(tuple(row[name] for name in KEY))

    def race(self, task, net, batch, precision, names):
        """The race with these contenders, unless it was the last; None if too late."""
        key = task, net, batch, precision
        if key != self.key:
            if time.monotonic() > self.end:
                return None
            # The tests of one race follow each other. If it fails, all of them do.
            self.key, self.last = key, {}
            self.last = race(
                task,
                net,
                [name for name in names if (*key, name) not in self.known],
                rounds=self.option("rounds"),
                budget=self.option("budget"),
                memory=not self.option("no_memory"),
                batch=batch,
                device=self.option("device"),
                precision=precision,
                jax_python=self.option("jax_python"),
            )
            self._keep()
        return self.last

    def _keep(self):
        self.about = {name: self._about(name) for name in self.last}
        rows = []
        for name, measured in self.last.items():
            row = dict(zip(KEY, (*self.key, name)))
            if measured.refused:
                self.refused.append({**row, "why": measured.refused})
                rows.append(self.refused[-1])
            elif measured.seconds and not measured.wrong:
                q1, median, q3 = quartiles(measured.seconds)
                times = rounded({"median": median, "q1": q1, "q3": q3})
                rounds = {"rounds": len(measured.seconds)}
                rows.append({**row, **self.about[name], **times, **rounds})
        path = self.option("results")
        if path:
            if not self.begun:
                add_lines(path, [head(self.option("device"))])
                self.begun = True
            add_lines(path, rows)

    def _about(self, contender):
        """What a row has beside the times."""
        task, net, batch, _ = self.key
        measured, plain = self.last[contender], self.last["plain"]
        about = {}
        if measured.peak is not None:
            about["peak_bytes"] = measured.peak
        if measured.distance is not None:
            about["distance"] = float(f"{measured.distance:.1e}")
        if measured.seconds:
            # By round: noise that slowed one contender slowed the others of its round.
            ratios = [s / p for s, p in zip(measured.seconds, plain.seconds)]
            names = ("x_plain_q1", "x_plain", "x_plain_q3")
            about.update((n, round(r, 4)) for n, r in zip(names, quartiles(ratios)))
        if contender == "plain" and task == "rows":
            about.update(work(net, batch))
        return about


def quartiles(values):
    return statistics.quantiles(values, n=4, method="inclusive")


def rounded(stats):
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in stats.items()
    }


@functools.cache
def head(device):
    """The line that a part of a run begins with."""
    today = datetime.date.today().isoformat()
    return {"machine": machine(device), "date": today, "commit": commit()}


def commit():
    found = get_commit_info("vmapsafe")
    return {name: found[name] for name in ("id", "time", "dirty") if name in found}


@pytest.fixture
def contend(request, benchmark):
    """Run the race that this test belongs to, unless it has run; report one part."""
    run = request.config.stash[RUN]

    def report(task, net, batch, precision, contender):
        if (task, net, batch, precision, contender) in run.known:
            pytest.skip("the file of --results has it")
        names = [item.callspec.params["contender"] for item in _siblings(request)]
        found = run.race(task, net, batch, precision, names)
        if found is None:
            pytest.skip("no time left, see --limit")
        assert contender in found, "the race failed as a whole"
        measured = found[contender]
        assert not measured.wrong, measured.wrong
        if measured.refused:
            pytest.skip(measured.refused)
        benchmark.group = ", ".join([task, net, str(batch), precision])
        benchmark.extra_info.update({"task": task, **run.about[contender]})
        REPLAY.load(measured.seconds)
        benchmark.pedantic(lambda: None, rounds=max(1, len(measured.seconds)))

    return report


def _siblings(request):
    """The selected tests that differ from this one only in the contender."""

    def race_of(item):
        return {n: v for n, v in item.callspec.params.items() if n != "contender"}

    for item in request.session.items:
        if getattr(item, "function", None) is request.function:
            if race_of(item) == race_of(request.node):
                yield item


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keep what the numbers depend on, and not the machine's host name."""
    machine_info.clear()
    machine_info.update(head(config.getoption("device"))["machine"])


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.clear()
    commit_info.update(commit())


def pytest_benchmark_update_json(config, output_json):
    output_json["refused"] = config.stash[RUN].refused
    for row in output_json["benchmarks"]:
        # They describe the plugin's own rounds, which do not take place.
        row["options"] = {}
        row["stats"] = rounded(row["stats"])
