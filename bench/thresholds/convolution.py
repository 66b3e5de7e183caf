"""The fastest way to the per-sample weight gradients of a convolution, by its shape.

The algorithms of vmapsafe/rules/convolution.py and torch's own batching rule run in
turn under vmap. Winners are proposed that cost little for any shape. Two more benches
are about the rows of a convolution: how many copied windows to keep at a time, and from
which size on one call for each sample wins over one convolution.
"""

from __future__ import annotations

import itertools
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch.func import vmap

from vmapsafe._block import operators
from vmapsafe._rule import operator_rules
from vmapsafe.rules import convolution
from vmapsafe.rules.convolution_regimes import ANY, REGIMES, Winner

from .bench import Bench, best_number, entry, from_size, numbers, setting

(RULE,) = operator_rules()[convolution._backward]
FEATURES = [field.name for field in fields(Winner)[1:]]


@dataclass(frozen=True)
class Shape:
    """A convolution. Channels and outputs count all groups together."""

    dims: int
    channels: int
    outputs: int
    kernel: int
    size: int
    stride: int = 1
    groups: int = 1
    transposed: bool = False

    @property
    def features(self):
        seen = self.size if self.transposed else self.lengths
        channels, outputs = self.channels, self.outputs
        if self.transposed:
            channels, outputs = outputs, channels
        return {
            "dims": self.dims,
            "kernel": self.kernel**self.dims,
            "groups": self.groups,
            "channels": channels // self.groups,
            "outputs": outputs // self.groups,
            "positions": seen**self.dims,
        }

    @property
    def padding(self):
        return (self.kernel - 1) // 2

    @property
    def lengths(self):
        if self.transposed:
            return (self.size - 1) * self.stride - 2 * self.padding + self.kernel
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def numbers(self, batch):
        """Of the largest of the tensors of a call."""
        f = self.features
        columns = f["channels"] * f["groups"] * f["kernel"] * f["positions"]
        weights = f["channels"] * f["outputs"] * f["groups"] * f["kernel"]
        return batch * max(columns, weights)

    def __str__(self):
        kind = "T" if self.transposed else ""
        text = f"conv{kind}{self.dims}d {self.channels:4} -> {self.outputs:<4}"
        text += f" k={self.kernel:<2} size {self.size:<4}"
        text += f" stride {self.stride}" if self.stride > 1 else ""
        return text + (f" groups {self.groups}" if self.groups > 1 else "")


def shapes():
    few, many, wide = (1, 3, 16), (16, 64, 256), (16, 64, 256, 1024)
    product = itertools.product
    for c, o, s in product(wide, wide, (2, 4, 8, 16, 32)):
        yield Shape(2, c, o, 1, s)
    for k, c, o, s in product((3, 5, 7), (1, 3, 16, 32), (16, 64, 192), (4, 8, 16, 32)):
        yield Shape(2, c, o, k, s)
    for k, c, o, s in product((2, 3), (64, 128, 256), many, (2, 4, 8, 16, 32)):
        yield Shape(2, c, o, k, s)
    for c, o, s in product((3, 64, 256), (64, 256), (8, 16, 64)):
        yield Shape(2, c, o, 3, s, stride=2)
    for k, c, o, s in product((1, 3, 7, 15), (1, 16, 128), many, (16, 64, 256, 1024)):
        yield Shape(1, c, o, k, s)
    for k, c, o, s in product((3, 7), (2, 32, 128), (32, 128), (64, 512)):
        yield Shape(1, c, o, k, s, stride=2)
    for k, c, o, s in product((1, 2, 3), (*few, 64), (16, 64), (2, 4, 8, 16)):
        yield Shape(3, c, o, k, s)
    for k, c, s in product((3, 5, 7), (32, 128, 512), (1, 2, 3, 4, 8, 16, 32)):
        yield Shape(2, c, c, k, s, groups=c)
    for k, c, s in product((3, 31), (32, 256), (2, 4, 16, 64, 256)):
        yield Shape(1, c, c, k, s, groups=c)
    for g, c, o, s in product((2, 8, 32), (4, 16, 64), (4, 16, 64), (4, 8, 16)):
        if g * max(c, o) <= 512:
            yield Shape(2, g * c, g * o, 3, s, groups=g)
    for k, c, o, s in product((2, 3, 4), (16, 64, 256), (3, 16, 64), (4, 8, 16)):
        yield Shape(2, c, o, k, s, stride=2, transposed=True)
    for c, o, s in product((16, 64), (3, 16, 64), (16, 64, 256)):
        yield Shape(1, c, o, 4, s, stride=2, transposed=True)


# The layers of networks for images, from the first to the last, and of a network for
# sequences.
USUAL = (
    *[Shape(2, c, o, k, s) for c, o, k, s in ((3, 64, 3, 32), (3, 64, 7, 64))],
    *[Shape(2, c, c, 3, s) for c, s in ((16, 32), (64, 32), (128, 16), (256, 8))],
    *[Shape(2, c, c, 3, s) for c, s in ((512, 4), (512, 2), (64, 8), (128, 4))],
    *[Shape(2, c, 2 * c, 3, s, stride=2) for c, s in ((64, 32), (128, 16), (256, 8))],
    *[Shape(2, c, c, 3, s, groups=c) for c, s in ((32, 32), (144, 16), (576, 4))],
    *[Shape(1, c, o, k, s) for c, o, k, s in ((2, 32, 7, 512), (64, 128, 3, 64))],
)


def cases(shapes, device):
    batches, most = ((16,), 2**24) if device == "cpu" else ((64,), 2**27)
    for shape in shapes:
        for batch in batches:
            if shape.numbers(batch) <= most:
                yield {"batch": batch, **asdict(shape)}


def usual_cases(device):
    for batch in (16,) if device == "cpu" else (16, 128, 512):
        for shape in USUAL:
            if shape.numbers(batch) <= (2**26 if device == "cpu" else 2**28):
                yield {"batch": batch, **asdict(shape)}


def tensors(shape, batch, **given):
    """x (B, 1, C, *S), the gradient of the output, and the weight."""
    torch.manual_seed(0)
    n, groups = shape.dims, shape.groups
    first, second = shape.outputs, shape.channels // groups
    if shape.transposed:
        first, second = shape.channels, shape.outputs // groups
    return (
        torch.randn(batch, 1, shape.channels, *[shape.size] * n, **given),
        torch.randn(batch, 1, shape.outputs, *[shape.lengths] * n, **given),
        torch.randn(first, second, *[shape.kernel] * n, **given),
    )


def algorithms(device, dtype, batch, **shape):
    """Each algorithm for all shapes; "torch" is torch's own rule."""
    shape = Shape(**shape)
    x, grad, weight = tensors(shape, batch, device=device, dtype=dtype)
    rest = (
        *(None, [shape.stride] * shape.dims, [shape.padding] * shape.dims),
        *([1] * shape.dims, shape.transposed, [0] * shape.dims, shape.groups),
        [False, True, False],
    )

    def run():
        return vmap(lambda g, x: convolution._backward(g, x, weight, *rest)[1])(grad, x)

    def only(name):
        changed = use(device, winners=(Winner(name),))
        return lambda: setting(operators.only(RULE), changed)

    names = {"torch": None, **convolution.ALGORITHMS}
    if shape.channels != shape.groups or shape.outputs != shape.groups:
        del names["sums"]  # they would be far too large
    return {name: (only(name), run) for name in names}


def ours_and_torchs(device, dtype, batch, **shape):
    """The fastest algorithm, with a kernel of ours in force or without one."""
    run = algorithms(device, dtype, batch, **shape)["torch"][1]
    return {"torch": (nullcontext, run), "ours": (lambda: operators.only(RULE), run)}


def batches(device):
    for shape in USUAL:
        for batch in (1, 4, 8, 16, 64):
            if of_outputs(batch, **asdict(shape)) < 2**21:
                yield {"batch": batch, **asdict(shape)}


def of_outputs(batch, **shape):
    shape = Shape(**shape)
    return batch * shape.outputs * shape.lengths**shape.dims


def use(device, **changed):
    return entry(REGIMES, device, replace(REGIMES[device], **changed))


def rows_of(device, dtype, batch, **shape):
    """A function that makes the rows of a convolution, without vmap."""
    shape = Shape(**shape)
    x, grad, weight = tensors(shape, batch, device=device, dtype=dtype)
    formula = convolution.Weight(
        *(weight.shape, weight, [shape.stride] * shape.dims),
        *([shape.padding] * shape.dims, [1] * shape.dims, shape.groups),
    )
    return lambda: formula.new_rows(x, grad)


def lengths_of_columns(device, dtype, **case):
    run = rows_of(device, dtype, **case)
    powers = (15, 17, 19, 21, 23) if device == "cpu" else (19, 21, 23, 25, 27)

    def keeping(most):
        changed = use(device, winners=(Winner("products"),), columns=most)
        return lambda: setting(changed)

    return {name: (keeping(most), run) for name, most in numbers(*powers).items()}


def one_or_each(device, dtype, **case):
    run = rows_of(device, dtype, **case)

    def from_numbers(least):
        changed = use(device, winners=(), one_by_one=least)
        return lambda: setting(changed)

    return {
        "one convolution": (from_numbers(sys.maxsize), run),
        "one by one": (from_numbers(0), run),
    }


# -- From numbers to rows -------------------------------------------------------------


def rows(measured, least, worst):
    """A few rows that select the fastest algorithm, without much loss.

    At first, torch's own is used for all shapes. In each step, the box of shapes and
    the algorithm that gain the most together become a row, which comes before the
    others. They must gain at least ``least`` (the logarithm of time, summed over
    shapes), and no shape in the box may take longer than before by more than a factor
    of ``worst``.
    """
    found = []
    while True:
        gains = {}
        for name in next(iter(measured.values())):
            box, gain = best_box(measured, name, found, worst)
            gains[gain] = Winner(name, **bounds(box, measured))
        gain = max(gains)
        if gain < least:
            return found
        found.insert(0, gains[gain])


def in_force(shape, found):
    for row in found:
        if row.holds(**shape.features):
            return row.algorithm
    return "torch"


def best_box(measured, name, found, worst):
    """The shapes, within bounds on their features, for which ``name`` gains the most.

    Removes the side of the box whose removal helps most, until no shape in the box
    loses too much. This follows Friedman and Fisher's PRIM,
    https://doi.org/10.1023/A:1008894516817.
    """
    gain = {
        shape: math.log(times[in_force(shape, found)] / times[name])
        for shape, times in measured.items()
    }
    box = list(gain)
    while True:
        harm = sum(min(0.0, gain[shape]) for shape in box)
        if not box or min(gain[shape] for shape in box) >= -math.log(worst):
            return box, sum(gain[shape] for shape in box)
        smaller = []
        for feature in FEATURES:
            values = [shape.features[feature] for shape in box]
            for edge in {min(values), max(values)}:
                rest = [s for s, value in zip(box, values) if value != edge]
                lost = sum(max(0.0, gain[s]) for s in box) - sum(
                    max(0.0, gain[s]) for s in rest
                )
                healed = sum(min(0.0, gain[s]) for s in rest) - harm
                smaller.append((lost / (healed + 1e-9), len(smaller), rest))
        box = min(smaller)[2]


def bounds(box, measured):
    """Intervals by feature. An end is half-way to the next value measured."""
    found = {}
    for feature in FEATURES:
        values = sorted({shape.features[feature] for shape in measured})
        inside = [shape.features[feature] for shape in box] or values
        low, high = values.index(min(inside)), values.index(max(inside))
        ends = [0, math.inf]
        if low:
            ends[0] = math.ceil(math.sqrt(values[low - 1] * values[low]))
        if high < len(values) - 1:
            ends[1] = math.floor(math.sqrt(values[high] * values[high + 1]))
            ends[1] = max(ends[1], values[high])
        if ends != list(ANY):
            found[feature] = tuple(ends)
    return found


LONG = 1e6  # seconds


def show(row):
    given = {k: v for k, v in asdict(row).items() if v != ANY and k != "algorithm"}
    text = ", ".join([f'"{row.algorithm}"', *(f"{k}={v}" for k, v in given.items())])
    return f"Winner({text}),".replace("inf", "MANY")


def winners(found, device, least=0.7, worst=1.03):
    """The field of an entry. ``least`` and ``worst`` are as in ``rows``."""
    names = {name for _, times in found for name in times}
    measured = {
        Shape(**{k: v for k, v in case.items() if k != "batch"}): {
            **dict.fromkeys(names, LONG),  # of those that did not run
            **times,
        }
        for case, times in found
    }
    lines = [f"    {show(row)}" for row in rows(measured, least, worst)]
    return {"winners": "\n".join(["(", *lines, ")"]) if lines else "()"}


def of_rows(batch, **shape):
    f = Shape(**shape).features
    return batch * f["channels"] * f["outputs"] * f["groups"] * f["kernel"]


BENCHES = [
    Bench(
        name="convolution, batch",
        cases=batches,
        contenders=ours_and_torchs,
        table="convolution_regimes",
        propose=from_size(of_outputs, "torch", "ours", "batch"),
    ),
    Bench(
        name="columns",
        cases=usual_cases,
        contenders=lengths_of_columns,
        table="convolution_regimes",
        propose=best_number("columns"),
    ),
    Bench(
        name="one convolution",
        cases=usual_cases,
        contenders=one_or_each,
        table="convolution_regimes",
        propose=from_size(of_rows, "one convolution", "one by one", "one_by_one"),
    ),
    Bench(
        name="convolution",
        cases=lambda device: cases(shapes(), device),
        contenders=algorithms,
        table="convolution_regimes",
        propose=winners,
        share=6.0,
    ),
]
