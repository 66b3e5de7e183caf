"""What the benches of this folder share: their form, the clock, simple proposals."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from measuring import SHORTEST, time_of
from torch.utils._pytree import tree_leaves

# What rounding may do, relative to an entry and to the largest entry.
CLOSE = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (5e-2, 5e-2)}


@dataclass(frozen=True)
class Bench:
    """Contenders for one choice that vmapsafe makes by size.

    Attributes:
        name: on the command line and in the rows.
        cases: a function of the device's type that gives what to measure, each case as
            a dict of numbers and words.
        contenders: a function of the device, the dtype and the entries of a case. It
            gives {name: (how to make a context, function to time in it)}. The others
            are compared with the first.
        table: the file in vmapsafe/rules/ that has the table; "" if there is none.
        propose: a function of rows [(case, {name: seconds})] and the device that gives
            {field of the entry: code}. The field is "" if the entry is a number.
        share: how much of the time, relative to the other benches.
    """

    name: str
    cases: Callable[[str], Iterable[dict]]
    contenders: Callable[..., dict]
    table: str = ""
    propose: Callable[[list, str], dict[str, str]] | None = None
    share: float = 1.0


@contextmanager
def setting(*contexts):
    """All of these, such as entries of tables and rules in force."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def entry(table, device, value):
    """A patch of one entry of a table."""
    return mock.patch.dict(table, {device: value})


# ------------------------------------------------------------------------------ clock


@contextmanager
def tf32(convolutions=False):
    """Products of matrices in full precision, and convolutions too unless told."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        # Its other arguments are what is so by default.
        with cudnn.flags(enabled=cudnn.enabled, allow_tf32=convolutions):
            yield
    finally:
        matmul.allow_tf32 = before


def best_times(contenders, device, dtype, allow_tf32, rounds, budget):
    """{name: seconds}, each the best of several rounds in turn.

    Other load can only make a round slower. Answers are compared before, without TF32.
    """
    expected = None
    with tf32():
        for name, (make, run) in contenders.items():
            with make():
                answer = [t for t in tree_leaves(run()) if t is not None]
            expected = answer if expected is None else expected
            compare(name, answer, expected)
    del answer, expected
    found = {name: [] for name in contenders}
    with tf32(allow_tf32):
        numbers = {}
        for name, (make, run) in contenders.items():
            with make():
                time_of(run, 1, device)
                once = time_of(run, 1, device)
            numbers[name] = max(1, round(SHORTEST / max(once, 1e-7)))
            budget -= once
        for i in range(max(2, rounds)):
            for name in list(contenders)[:: 1 if i % 2 else -1]:
                make, run = contenders[name]
                with make():
                    found[name].append(time_of(run, numbers[name], device))
                budget -= found[name][-1] * numbers[name]
            if i and budget < 0:
                break
    return {name: min(times) for name, times in found.items()}


def compare(name, answer, expected):
    for one, other in zip(answer, expected, strict=True):
        relative, of_largest = CLOSE[other.dtype]
        largest = float(other.abs().max())
        torch.testing.assert_close(
            one,
            other,
            rtol=relative,
            atol=of_largest * largest,
            msg=lambda text: f"{name} is wrong: {text}",
        )


# -------------------------------------------------------------------------- proposals


def from_size(size, below, above, field=""):
    """The size from which on ``above`` should be used instead of ``below``.

    Args:
        size: a function of the entries of a case.
        below, above: names of contenders.
        field: of the entry.
    """

    def propose(rows, device):
        ratios = [(size(**case), times[above] / times[below]) for case, times in rows]
        return {field: code(best_threshold(ratios))}

    return propose


def best_threshold(ratios):
    """The threshold with the least time in all, from (size, ratio above it).

    Each size counts by the logarithm of its ratio. The threshold is 0 if the smallest
    size is above it, and ``sys.maxsize`` if no size is.
    """
    sizes = sorted({size for size, _ in ratios})
    found = {sys.maxsize: 0.0}
    for smaller, larger in zip([None, *sizes], sizes):
        total = sum(math.log(ratio) for size, ratio in ratios if size >= larger)
        found[0 if smaller is None else between(smaller, larger)] = total
    return min(found, key=found.get)


def between(smaller, larger):
    """A threshold above ``smaller``, at most ``larger``, if possible a power of two."""
    power = 2 ** round(math.log2(math.sqrt(max(1, smaller) * larger)))
    return power if smaller < power <= larger else larger


def best_number(field=""):
    """The contender with the least time in all. Its name is the code of the number."""

    def propose(rows, device):
        names = [n for n in rows[0][1] if all(n in times for _, times in rows)]
        totals = {
            name: sum(math.log(times[name]) for _, times in rows) for name in names
        }
        return {field: min(totals, key=totals.get)}

    return propose


def code(number):
    """A number of a table as it is written there."""
    if number == sys.maxsize:
        return "sys.maxsize"
    power = number.bit_length() - 1
    return f"2**{power}" if number == 2**power >= 2**13 else str(number)


def numbers(*powers):
    """{code: number} of contenders that are powers of two, and without a limit."""
    return {**{f"2**{p}": 2**p for p in powers}, "sys.maxsize": sys.maxsize}


def summary(rows):
    """The mean and the worst time of each contender, as multiples of the first's."""
    first, *names = rows[0][1]
    texts = []
    for name in names:
        found = [times[name] / times[first] for _, times in rows]
        mean, worst = statistics.geometric_mean(found), max(found)
        texts.append(f"{name} {mean:.2f} ({min(found):.2f} to {worst:.2f})")
    return f"as multiples of {first}: " + ", ".join(texts)
