"""Random projections of per-sample gradients, without the rows and without the matrix.

A sketch of a row g of P numbers is :math:`g R / \\sqrt k` with R (P, k) of independent
numbers of mean 0 and variance 1: then the product of two sketches has the mean of the
product of the two rows, and a variance that falls as 1 / k (Johnson and Lindenstrauss).
Data attribution keeps sketches in the place of rows: TRAK,
https://arxiv.org/abs/2303.14186, section 3.2.

R has a part for each parameter. The seed and the parameter's name determine it. It is
drawn a block at a time, where it is used, as bits of the CPU's generator: so every
device gets the same matrix, and a sign takes one bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vmapsafe._errors import VmapSafeValueError
from vmapsafe._torch import below_all, without_autocast
from vmapsafe.quantities.protocol import CallShape, Grads, Part, PerSample
from vmapsafe.rules.precision import wide

Kind = Literal["rademacher", "gaussian"]
KINDS: tuple[Kind, ...] = ("rademacher", "gaussian")


@dataclass(frozen=True, eq=False)
class Sketch(PerSample[Tensor]):
    """A random projection of every sample's gradient to k numbers, (B, k).

    Attributes:
        k: how many numbers to give for each sample.
        kind: what the matrix holds.
        seed: decides the matrix.
        gather: "all" for those of all processes, as in :class:`Norms`.
    """

    k: int
    kind: Kind = "rademacher"
    seed: int = 0

    def __post_init__(self) -> None:
        check_sketch("Sketch(...)", self.k, self.kind, self.seed)

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return _SketchPart(self.k, self.kind, self.seed)


def check_sketch(called: str, k: object, kind: object, seed: object) -> None:
    """Raise unless these make a sketch.

    Args:
        called: for errors.
        k: how many numbers to give for each sample.
        kind: what the matrix holds.
        seed: decides the matrix.

    Raises:
        VmapSafeValueError: ``k`` below 1, another ``kind``, or a ``seed`` that is not
            an int.
    """
    if type(k) is not int or k < 1:
        raise VmapSafeValueError(
            called, f"k is {k!r}", "Pass how many numbers a sample, at least 1"
        )
    if kind not in KINDS:
        listed = " or ".join([f'"{one}"' for one in KINDS])
        raise VmapSafeValueError(called, f"unknown kind {kind!r}", f"Choose {listed}")
    if type(seed) is not int:
        raise VmapSafeValueError(called, f"seed is {seed!r}", "Pass an int")


class _SketchPart(Part):
    """Adds up the projections of each parameter's rows."""

    def __init__(self, k: int, kind: str, seed: int) -> None:
        self._k, self._kind, self._seed = k, kind, seed
        self._parts: list[Tensor] = []

    def take(self, grads: Grads) -> None:
        parts = [
            self._project(grads.name, grads.samples(slice(i, i + _MANY)).rows())
            for i in range(0, len(grads), _MANY)
        ]
        self._parts.append(torch.cat(parts))

    def finished(self) -> Tensor:
        return sum(self._parts[1:], self._parts[0]) / math.sqrt(self._k)

    def _project(self, name: str, rows: Tensor) -> Tensor:
        rows = wide(rows).unsqueeze(-1).flatten(1)
        seed = seed_of(self._seed, name)
        blocks = _blocks(rows.size(1), self._k, self._kind, seed, rows)
        start = 0
        total = rows.new_zeros(len(rows), self._k)
        with without_autocast(rows.device):
            for block in blocks:
                total = total.addmm(rows[:, start : start + len(block)], block)
                start += len(block)
        return total


def seed_of(seed: int, name: str) -> int:
    """Of a parameter's part of the matrix."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _blocks(
    numbers: int, k: int, kind: str, seed: int, like: Tensor
) -> Iterator[Tensor]:
    """(some, k) at a time, ``numbers`` in all, in the dtype and place of ``like``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device, dtype = like.device, like.dtype
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    signs = (1 - 2 * (byte.unsqueeze(1) >> bit & 1)).to(dtype)
    most = max(64, _BLOCK // k // 64 * 64)  # a word of bits ends with a block
    for start in range(0, numbers, most):
        wanted = min(most, numbers - start)
        many = -(-wanted // 64) * 64
        with below_all():  # vmap would ask whether slices are to draw the same
            if kind == "gaussian":
                block = torch.empty(many, k, dtype=torch.float32, device="cpu")
                block = block.normal_(generator=generator).to(device, dtype)
            else:
                words = torch.empty(many * k // 64, dtype=torch.int64, device="cpu")
                words.random_(-(2**63), None, generator=generator)
                eights = words.view(torch.uint8).to(device).int()
                block = signs.index_select(0, eights).view(many, k)
        yield block[:wanted]


# Samples at a time: with more, drawing the matrix costs less than using it.
_MANY = 64
# Numbers of the matrix at a time.
_BLOCK = 2**19
