"""Options of ``pytest bench``, contenders in turn, and what a saved run records.

pytest-benchmark times one test after the other. On a machine with other load, ratios
are reliable only if the contenders take turns. So the first test of a task on a network
runs all its contenders together. Each test then hands its own rounds to the plugin,
through a timer that replays them. The plugin's tables, ``--benchmark-json``,
``--benchmark-autosave``, ``--benchmark-compare`` and its other options work as usual.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from measuring import machine, race, work

collect_ignore = ["jax_rows.py"]  # it needs another environment


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
    group.addoption("--no-memory", action="store_true", help="do not measure peaks")
    group.addoption(
        "--jax-python",
        help="the python of an environment with jax (default: $VMAPSAFE_JAX_PYTHON)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: under three minutes on two CPU cores")
    torch.set_num_threads(config.getoption("threads"))


def pytest_generate_tests(metafunc):
    if "precision" in metafunc.fixturenames:
        cuda = metafunc.config.getoption("device") == "cuda"
        metafunc.parametrize(
            "precision", ["fp32", "tf32", "bf16"] if cuda else ["fp32"]
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
X_PLAIN = {"median": "x_plain", "q1": "x_plain_q1", "q3": "x_plain_q3"}
RACES = pytest.StashKey[dict]()
REFUSED = pytest.StashKey[list]()
WORK = pytest.StashKey[dict]()


@pytest.fixture
def contend(request, benchmark):
    """Run the race that this test belongs to, unless it has run; report one part."""
    config = request.config
    races = config.stash.setdefault(RACES, {})
    refused = config.stash.setdefault(REFUSED, [])

    def report(task, net, batch, precision, contender):
        if (task, net, batch, precision) not in races:
            races.clear()  # the tests of one race follow each other
            races[task, net, batch, precision] = race(
                task,
                net,
                [item.callspec.params["contender"] for item in _siblings(request)],
                rounds=0 if benchmark.disabled else config.getoption("rounds"),
                budget=config.getoption("budget"),
                memory=not config.getoption("no_memory"),
                batch=batch,
                device=config.getoption("device"),
                precision=precision,
                jax_python=config.getoption("jax_python"),
            )
        found = races[task, net, batch, precision]
        measured, plain = found[contender], found["plain"]
        assert not measured.wrong, measured.wrong
        if measured.refused:
            who = {"task": task, **request.node.callspec.params}
            refused.append({**who, "why": measured.refused})
            pytest.skip(measured.refused)
        benchmark.group = ", ".join([task, net, str(batch), precision])
        benchmark.extra_info["task"] = task
        if measured.peak is not None:
            benchmark.extra_info["peak_bytes"] = measured.peak
        if measured.distance is not None:
            benchmark.extra_info["distance"] = float(f"{measured.distance:.1e}")
        if measured.seconds:
            # By round: noise that slowed one contender slowed the others of its round.
            ratios = [s / p for s, p in zip(measured.seconds, plain.seconds)]
            quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
            for name, value in zip(("q1", "median", "q3"), quartiles):
                benchmark.extra_info[X_PLAIN[name]] = round(value, 4)
        if contender == "plain" and task == "rows":
            benchmark.extra_info.update(work(net, batch))
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
    machine_info.update(machine(config.getoption("device")))


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[name]


def pytest_benchmark_update_json(config, output_json):
    output_json["refused"] = config.stash.get(REFUSED, [])
    for row in output_json["benchmarks"]:
        row["options"] = (
            {}
        )  # they describe the plugin's own rounds, which do not take place
        for name, value in row["stats"].items():
            if isinstance(value, float):
                row["stats"][name] = float(f"{value:.5g}")
