"""Find the fastest algorithm for the per-sample weight gradients of a convolution.

The algorithms of vmapsafe/rules/convolution.py and torch's own batching rule run in
turn under vmap. The table has one line per shape. Its numbers are times as multiples of
torch's own. At the end it prints the rows to write into
vmapsafe/rules/convolution_regimes.py. Run it in the folder bench::

    python -m thresholds.convolution
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from dataclasses import asdict, dataclass, fields, replace

import torch
from measuring import now
from torch.func import vmap

from vmapsafe._block import operators
from vmapsafe._rule import operator_rules
from vmapsafe.rules import convolution
from vmapsafe.rules.convolution_regimes import ANY, REGIMES, Regime, Winner

(RULE,) = operator_rules()[convolution._backward]
# For a type of device that has no entry yet.
_NEW = Regime(winners=(), columns=2**24, one_by_one=2**63)
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
    for k, c, s in product((3, 5, 7), (32, 128, 512), (2, 4, 8, 16, 32)):
        yield Shape(2, c, c, k, s, groups=c)
    for k, c, s in product((3, 31), (32, 256), (16, 64, 256)):
        yield Shape(1, c, c, k, s, groups=c)
    for g, c, o, s in product((2, 8, 32), (4, 16, 64), (4, 16, 64), (4, 8, 16)):
        if g * max(c, o) <= 512:
            yield Shape(2, g * c, g * o, 3, s, groups=g)
    for k, c, o, s in product((2, 3, 4), (16, 64, 256), (3, 16, 64), (4, 8, 16)):
        yield Shape(2, c, o, k, s, stride=2, transposed=True)
    for c, o, s in product((16, 64), (3, 16, 64), (16, 64, 256)):
        yield Shape(1, c, o, 4, s, stride=2, transposed=True)


def call_of(shape, batch, device, dtype):
    """A function that computes only the weight gradient, under vmap, several times."""
    torch.manual_seed(0)
    n, groups = shape.dims, shape.groups
    options = {"device": device, "dtype": dtype}
    kernel = [shape.kernel] * n
    first, second = shape.outputs, shape.channels // groups
    if shape.transposed:
        first, second = shape.channels, shape.outputs // groups
    weight = torch.randn(first, second, *kernel, **options)
    x = torch.randn(batch, 1, shape.channels, *[shape.size] * n, **options)
    grad = torch.randn(batch, 1, shape.outputs, *[shape.lengths] * n, **options)
    rest = (
        *(None, [shape.stride] * n, [shape.padding] * n, [1] * n, shape.transposed),
        *([0] * n, groups, [False, True, False]),
    )

    def call(repeats):
        def one(grad, x):
            # All are kept: in a network, too, each result has memory of its own.
            return tuple(
                convolution._backward(grad, x, weight, *rest)[1] for _ in range(repeats)
            )

        return vmap(one)(grad, x)

    return call


def use(algorithm, device):
    """Use the algorithm for all shapes; "torch" is torch's own rule."""
    today = REGIMES.get(device, _NEW)
    REGIMES[device] = replace(today, winners=(Winner(algorithm),))


def ratios(shape, batch, rounds, device, dtype):
    """{algorithm: time as a multiple of torch's own}, the best of rounds in turn."""
    call = call_of(shape, batch, device, dtype)
    names = ["torch", *convolution.ALGORITHMS]
    best, repeats, expected = {}, {}, None
    with operators.only(RULE):
        for name in names:
            use(name, device)
            (result,) = call(1)
            expected = result if expected is None else expected
            close = 1e-4 if dtype == torch.float32 else 5e-2
            largest = float(expected.abs().max())
            torch.testing.assert_close(result, expected, rtol=1, atol=close * largest)
            started = now(device)
            call(1)
            repeats[name] = min(20, math.ceil(4e-3 / max(1e-4, now(device) - started)))
        for i in range(rounds):
            for name in names[:: 1 if i % 2 else -1]:
                use(name, device)
                started = now(device)
                call(repeats[name])
                taken = (now(device) - started) / repeats[name]
                best[name] = min(taken, best.get(name, taken))
    return {name: value / best["torch"] for name, value in best.items()}


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


def show(row):
    given = {k: v for k, v in asdict(row).items() if v != ANY and k != "algorithm"}
    text = ", ".join([f'"{row.algorithm}"', *(f"{k}={v}" for k, v in given.items())])
    return f"Winner({text}),".replace("inf", "MANY")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--largest", type=int, default=2**24, help="the most numbers in a tensor"
    )
    parser.add_argument(
        "--only", default="", help="only shapes whose line contains this"
    )
    parser.add_argument(
        "--least", type=float, default=0.7, help="smallest gain of a row"
    )
    parser.add_argument(
        "--worst", type=float, default=1.03, help="largest loss in a row"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    given = REGIMES.get(asked.device, _NEW).winners
    measured = {}
    dtype = getattr(torch, asked.dtype)
    for shape in shapes():
        if asked.only in str(shape) and shape.numbers(asked.batch) <= asked.largest:
            found = ratios(shape, asked.batch, asked.rounds, asked.device, dtype)
            measured[shape] = found
            numbers = "  ".join(
                f"{name} {found[name]:.2f}" for name in convolution.ALGORITHMS
            )
            taken = in_force(shape, given)
            print(f"{shape!s:42} {numbers}  now: {taken} {found[taken]:.2f}")
    new = rows(measured, asked.least, asked.worst)
    for title, table in (("today", given), ("proposed", new)):
        left = [
            times[in_force(shape, table)] / min(times.values())
            for shape, times in measured.items()
        ]
        own = [times[in_force(shape, table)] for shape, times in measured.items()]
        print(
            f"{title}: {statistics.geometric_mean(own):.2f} of torch's own time,"
            f" at most {max(own):.2f};"
            f" {statistics.geometric_mean(left):.2f} of the fastest one's,"
            f" at most {max(left):.2f}"
        )
    print(*map(show, new), sep="\n")


if __name__ == "__main__":
    main()
