"""How things are measured: one clock, contenders in turn, answers compared first.

On a CPU with one thread the clock is the process's CPU time, which other load on the
same core disturbs least. Otherwise the clock is elapsed time, on a GPU until it is
idle. All contenders run in every round, in alternating order, so that the same noise
affects all of them.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import multiprocessing
import os
import platform
import re
import statistics
import textwrap
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from contenders import (
    COMPILED,
    OTHER_MEANING,
    REFERENCES,
    TASKS,
    YARDSTICKS,
    Workload,
)
from networks import usual_batch
from torch.utils.flop_counter import FlopCounterMode

import vmapsafe

# The largest distances to the loop. In float64 it is the distance of each parameter,
# which shows that a contender is correct. In the precision that is timed it is the
# distance of the whole gradient: rounding moves single values across the kinks of ReLU,
# and a mistake is of the order of 1.
TOLERANCES = {"float64": 1e-9, "fp32": 5e-2, "tf32": 1e-1, "bf16": 3e-1}
# The clipping factor of Opacus adds 1e-6 to the norm.
ROUGHER = {"Opacus ghost clipping": 1e-5}
# Bytes of rows in float64. If there are more, fewer samples are compared.
LARGEST = 1_500_000_000
SHORTEST = 5e-3  # seconds; shorter calls are repeated within a round


@dataclass
class Measured:
    """The results of a race for one contender."""

    seconds: list[float] = field(default_factory=list)  # one per round
    peak: int | None = None  # bytes above what was in use before
    distance: float | None = None  # of the whole answer to the loop's, as timed
    refused: str = ""  # in its own words
    wrong: str = ""


def race(task, net, names, rounds=7, budget=60.0, memory=True, **workload):
    """Compare, then time, contenders for one task on one network.

    Args:
        task: a key of ``TASKS``.
        net: a key of ``NETWORKS`` or ``GROWN``.
        names: the names of contenders. "plain" always runs too.
        rounds: how often each runs; 0 only compares answers.
        budget: the seconds for all rounds; at least three rounds run.
        memory: whether to measure peaks too.
        **workload: options of ``Workload``.

    Returns:
        {name: Measured}.
    """
    names = list(dict.fromkeys(["plain", *names]))
    found = {name: Measured() for name in names}
    found = apart(compared, task, net, found, **workload)
    return apart(timed, task, net, found, rounds, budget, memory, **workload)


def apart(function, *args, **kwargs):
    """Call a function in a process of its own, as a training script has one.

    In a process that has measured other things before, the allocator reuses memory that
    has been written before, if a request happens to fit. That is three times faster for
    a result of 100 MB.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    threads = torch.get_num_threads()
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_quietly, threads, function, args, kwargs).result()


def _quietly(threads, function, args, kwargs):
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of other libraries
        return function(*args, **kwargs)


def compared(task, net, found, batch=None, **workload):
    """Fill ``refused`` and ``wrong``, in float64; ``timed`` does the compiled ones."""
    if task not in REFERENCES:
        return found
    w = Workload(net, 1)
    batch = batch or usual_batch(net, workload.get("device", "cpu"))
    samples = min(batch, max(4, LARGEST // (8 * w.numbers)))
    w = Workload(net, samples, torch.float64, **workload)
    references = {}
    for name, measured in found.items():
        if name in YARDSTICKS or name in COMPILED:
            continue
        run = None
        try:
            expected = _reference(task, w, name, references)
            run = TASKS[task][name](w)
            far = max(distances(run(), expected))
        except Exception as error:  # whatever a library raises is reported
            measured.refused = first_line(error)
        else:
            if not far < ROUGHER.get(name, TOLERANCES["float64"]):
                measured.wrong = f"float64: {far:.1e} from the loop"
        finally:
            if hasattr(run, "close"):
                run.close()
    return found


def timed(task, net, found, rounds, budget, memory, **workload):
    """Fill the rest, for contenders that neither refused nor are wrong."""
    w = Workload(net, **workload)
    runs = {}
    try:
        with w.arithmetic():
            _start(task, w, found, runs)
            if memory and rounds:
                for name, run in runs.items():
                    if "CUDA graph" not in name:  # it keeps its memory between calls
                        found[name].peak = peak(run, w.device)
            times = seconds_in_turn(runs, rounds, budget, w.device)
        for name, seconds in times.items():
            found[name].seconds = seconds
    finally:
        for run in runs.values():
            if hasattr(run, "close"):
                run.close()
    return found


def _start(task, w, found, runs):
    """Fill ``runs``, after running each contender once and comparing its answer."""
    references = {}
    for name, measured in found.items():
        if measured.refused or measured.wrong:
            continue
        answer = None  # one answer at a time, besides the loop's, fits into memory
        try:
            run = TASKS[task][name](w)
            # The second call records a CUDA graph, and the third replays it.
            for _ in range(3 if "CUDA graph" in name else 1):
                answer = run()
        except Exception as error:
            measured.refused = first_line(error)
            continue
        runs[name] = run
        if task in REFERENCES and name not in YARDSTICKS:
            expected = _reference(task, w, name, references)
            measured.distance = distances(answer, expected)[0]
            # The statistics of the four values of a small image amplify rounding.
            factor = 10 if name in OTHER_MEANING else 1
            if not measured.distance < factor * TOLERANCES[w.precision]:
                measured.wrong = f"{w.precision}: {measured.distance:.1e} from the loop"


def _reference(task, w, name, known):
    """The answer of the loop, computed once."""
    refer = OTHER_MEANING.get(name, REFERENCES[task])
    if refer not in known:
        known[refer] = refer(w)()
    return known[refer]


def first_line(error):
    """An exception for a table: its type and its first line, without paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"(?<![\w.])/[\w./-]+", "…", lines[0] if lines else "")
    name = type(error).__name__
    return textwrap.shorten(f"{name}: {text}", 160, placeholder=" …")


def distances(actual, expected):
    """The distance of the whole, then of each tensor, relative to what is expected.

    A thousandth of the whole norm is added to that of each tensor, so that a tiny
    tensor does not matter.
    """
    if isinstance(expected, torch.Tensor):
        actual, expected = {"": actual}, {"": expected}
    if {n: t.shape for n, t in actual.items()} != {
        n: t.shape for n, t in expected.items()
    }:
        return [float("inf")]
    sizes = {name: float(t.norm()) for name, t in expected.items()}
    whole = sum(size**2 for size in sizes.values()) ** 0.5
    apart = {n: float((actual[n].to(t) - t).norm()) for n, t in expected.items()}
    return [
        sum(d**2 for d in apart.values()) ** 0.5 / whole,
        *(d / (sizes[name] + 1e-3 * whole) for name, d in apart.items()),
    ]


# ------------------------------------------------------------------------------ clock


def seconds_in_turn(runs, rounds, budget, device):
    """{name: seconds of each round}. All have run once before."""
    if not rounds:
        return {name: [] for name in runs}
    first = {name: time_of(run, 1, device) for name, run in runs.items()}
    numbers = {
        name: max(1, round(SHORTEST / max(t, 1e-7))) for name, t in first.items()
    }
    once = sum(numbers[name] * t for name, t in first.items())
    rounds = max(3, min(rounds, int(budget / once)))
    times = {name: [] for name in runs}
    # The collector must not free one contender's cycles during another's time. Objects
    # that exist already are frozen: to search them takes a quarter of a second.
    gc.collect()
    gc.freeze()
    try:
        for i in range(rounds):
            for name in list(runs)[:: 1 if i % 2 else -1]:
                gc.collect()
                times[name].append(time_of(runs[name], numbers[name], device))
    finally:
        gc.unfreeze()
    return times


def now(device):
    """Seconds, when a GPU has nothing left to do.

    With one thread on a CPU, other load on the core does not count.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def time_of(run, number, device):
    """Seconds of one call. The result is freed after the clock has stopped."""
    if hasattr(run, "seconds"):
        return run.seconds(number)
    result = None
    started = now(device)
    for _ in range(number):
        result = run()
    taken = now(device) - started
    del result
    return taken / number


# ----------------------------------------------------------------------------- memory


def peak(run, device):
    """Bytes above what was in use before, for a call that has run once before.

    None if the system does not keep a peak that can be reset; only Linux does.
    """
    if hasattr(run, "peak"):
        return run.peak()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    except (OSError, AttributeError):
        return None
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    result = run()
    after = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    del result
    return 1024 * max(0, after - before)


# ---------------------------------------------------------------------------- machine


def machine(device):
    """The machine that is measured on: names, versions, and rates of the device."""
    record = {
        "device": device,
        "device_name": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vmapsafe": vmapsafe.__version__,
        "allocator": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("MALLOC_", "THP_MEM_")) or name == "LD_PRELOAD"
        },
        **rates(device),
    }
    if device == "cuda":
        record["device_name"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
    return record


def cpu_name():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"model name\s*:\s*(.+)", text)
    return named[1].strip() if named else platform.machine()


def rates(device, megabytes=256, size=2048):
    """Bytes and operations per second.

    They are those of a copy, of filling kept and fresh memory, and of a matrix product
    in float32, on a GPU also in tf32 and bfloat16.
    """
    n = megabytes * 2**20 // 4
    if device == "cpu":
        size //= 2
    source, target = torch.ones(n, device=device), torch.ones(n, device=device)
    a = torch.randn(size, size, device=device)

    def median(run):
        run()
        return statistics.median(time_of(run, 1, device) for _ in range(5))

    found = {
        "copy_bytes_per_s": 8 * n / median(lambda: target.copy_(source)),
        "fill_bytes_per_s": 4 * n / median(lambda: target.fill_(1.0)),
        "fresh_fill_bytes_per_s": 4
        * n
        / median(lambda: torch.empty(n, device=device).fill_(1.0)),
        "matmul_flop_per_s": 2 * size**3 / median(lambda: a @ a),
    }
    if device == "cuda":
        low = a.bfloat16()
        found["bf16_matmul_flop_per_s"] = 2 * size**3 / median(lambda: low @ low)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32_matmul_flop_per_s"] = 2 * size**3 / median(lambda: a @ a)
        torch.backends.cuda.matmul.allow_tf32 = before
    return found


def work(net, batch=None):
    """The operations of the plain gradient and the bytes of the rows."""
    w = Workload(net, batch, device="meta")
    with FlopCounterMode(display=False) as counter:
        TASKS["rows"]["plain"](w)()
    return {"flop": counter.get_total_flops(), "bytes": 4 * w.numbers}
