"""Random networks through every function of the library, against loops written out.

    python tests/support/fuzz.py --seed N          one case: what it is, and how it ends
    python tests/support/fuzz.py --cases 50000 --jobs 2 [--first N]

A case is decided by one integer. It ends in one of three ways: the numbers agree and
the model is as it was; there is no right number and the library says so; or neither,
which is a mismatch, and is printed. Nothing is made smaller: nets are small already.
"""

import argparse
import collections
import contextlib
import copy
import itertools
import math
import multiprocessing
import multiprocessing.pool
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from fuzz_cases import FIRST_ORDER, OF_ONE, OUTS, QUANTITIES, SHORT, Case, Values
from fuzz_reference import (
    Own,
    Reference,
    Refused,
    Slices,
    derivative,
    directional,
    jacobian,
    total_of,
)
from slow import matrix
from state import State, assert_same_state, everything
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from wanted import WIDE, Truth, expected

from vmapsafe.quantities import Gram, Losses

# Of the largest entry: what may differ. In lower precision also some times the error
# of the reference itself in that precision.
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.05}
# What is added to the largest entry: smaller numbers are as good as 0.
FLOORS = {torch.float64: 1e-6, torch.float32: 0.05, torch.bfloat16: 0.5}


# Seed, how it ended, what was asked, what was said.
Ending = tuple[int, str, str, str]


class Mismatch(Exception):
    """The library gave another number, none, or one where there is none to give."""


# -- The slow side ---------------------------------------------------------------------


class World:
    """A case again, in ``dtype``, contiguous, and with no vmap.

    ``shaken``: with the last digits of float64 changed, to see what they decide."""

    def __init__(
        self, case: Case, dtype: torch.dtype, aux: Any, shaken: bool = False
    ) -> None:
        self.case, self.dtype, self.shaken = case, dtype, shaken
        self.net = copy.deepcopy(case.net).to(dtype)
        self.ids = {n: id(p) for n, p in self.net.named_parameters()}
        self.values = {n: self.cast(v) for n, v in case.values.items()}
        self.x, self.y = self.cast(case.x), self.cast(case.y)
        self.scale, self.another = self.cast(case.scale), self.cast(case.another)
        self.buffers = {
            id(b): self.cast(case.state[n])
            for n, b in self.net.named_buffers()
            if n in case.state
        }
        if case.what == "backward of rows" and case.by_input:
            self.x.requires_grad_()
        self.merged = False
        self.masks = [self.cast(m) for m in aux[1]] if case.dropout else []
        self.size = case.size
        self.losses: Slices = []

    def other(self) -> "World":
        """The same with the other batch."""
        world = copy.copy(self)
        parts = [self.cast(t) for t in self.case.other]
        world.x, world.y, world.scale, world.another = parts
        world.size, world.losses = len(world.x), []
        return world

    def cast(self, t: Tensor) -> Tensor:
        t = t.detach().clone(memory_format=torch.contiguous_format)
        if not t.is_floating_point():
            return t
        if self.shaken and t.dtype == torch.float64:
            last = torch.cos(torch.arange(t.numel(), dtype=torch.float64))
            t = t * (1 + 1e-13 * last.reshape(t.shape))
        return t.to(self.dtype)

    def run(
        self,
        xs: Slices,
        values: Sequence[Values],
        scales: Slices | None = None,
        which: Sequence[int] = (),
        buffers: list[Own] | None = None,
    ) -> Slices:
        """Outputs of slices, each with ``values`` of its own, by name. ``which`` are
        their places among the masks."""
        case = self.case
        masks = [[m[i] for i in which] for m in self.masks]
        detached = case.rows == "detached"
        net = Reference(self.net, case.mode, case.groups_of, masks, detached)
        own = []
        for i, given in enumerate(values):
            all_of = {**self.values, **given}
            own.append({self.ids[n]: v for n, v in all_of.items()})
            own[-1].update(self.buffers if buffers is None else buffers[i])
        outs = net(xs, own, scales)
        self.merged |= net.merged
        return outs

    def groups(self) -> list[list[int]]:
        """Places of the samples that a call sees together."""
        case = self.case
        if case.mode != "sync":
            return [[i] for i in range(self.size)]
        step = case.chunk_size if type(case.chunk_size) is int else self.size
        places = list(range(self.size))
        return [places[i : i + step] for i in range(0, self.size, step)]

    def slices(self, where: Sequence[int], tensor: Tensor) -> Slices:
        part = [tensor[i] for i in where]
        return [t.unsqueeze(0) for t in part] if self.case.what in OF_ONE else part

    def loss_of(
        self, out: Tensor, i: int, values: Values, extra: Tensor | None
    ) -> Tensor:
        case = self.case
        y = self.slices([i], self.y)[0]
        value = case.base_loss(out, y).sum()
        value = value * (0.7 if case.heated else 1)
        if case.regularised:
            all_of = {**self.values, **values}
            penalty = 0.1 * total_of(p.square().sum() for p in all_of.values())
            value = value + penalty
        if extra is not None:
            value = value + (out * extra).sum()
        return value

    def row_parts(
        self, shared: Values | None = None, by_input: bool = False
    ) -> tuple[Values, Tensor, Tensor]:
        """Rows, gradients by the inputs, and outputs, sample by sample."""
        case = self.case
        rows, inputs, outs = [], [], []
        for where in self.groups():
            xs = self.slices(where, self.x)
            if by_input:
                xs = [x.requires_grad_() for x in xs]
            names = case.names
            if shared is not None:
                copies = [{n: v.clone() for n, v in shared.items()} for _ in where]
            else:
                copies = [
                    {n: self.values[n].clone().requires_grad_() for n in names}
                    for _ in where
                ]
            if case.rows == "jacobian":
                copies = [copies[0]] * len(where)
            scales = None
            if case.inputs != "x":
                scales = self.slices(where, self.scale)
            found = self.run(xs, copies, scales, where)
            extra: Sequence[Tensor | None] = [None] * len(where)
            if case.twice:
                extra = self.run(self.slices(where, self.another), copies, None, where)
            parts = zip(found, where, copies, extra)
            losses = [self.loss_of(o, i, c, e) for o, i, c, e in parts]
            outs += found
            self.losses += [loss.detach() for loss in losses]
            for j, own in enumerate(copies):
                total = losses[j] if case.rows == "jacobian" else total_of(losses)
                leaves = [own[n] for n in names] + ([xs[j]] if by_input else [])
                grads = derivative(total, leaves)
                rows.append(dict(zip(names, grads)))
                inputs.append(grads[-1])
        stacked = {n: torch.stack([r[n] for r in rows]) for n in case.names}
        return stacked, torch.stack(inputs), torch.stack(outs)

    def answer(self) -> tuple[object, object]:
        """What the library should have given: (found, aux's outputs or None)."""
        case, what = self.case, self.case.what
        if what in SHORT:
            if case.size == 0:
                heads = (0,) if what in OF_ONE else (0, case.each)
                return self.made_of(self.no_rows()), (
                    torch.zeros(*heads, OUTS) if case.has_aux else None
                )
            rows, _, outs = self.row_parts()
            outs = outs.squeeze(1) if what in OF_ONE else outs
            return self.made_of(rows), outs if case.has_aux else None
        if what == "vmap of grad":
            rows, inputs, outs = self.row_parts(by_input=case.by_input)
            found = (rows, inputs) if case.by_input else rows
            return found, outs if case.dropout else None
        if what == "batched grad":
            return self.row_parts()[0], None
        if what in ("grad of rows", "backward of rows"):
            leaves = {n: self.values[n].clone().requires_grad_() for n in case.names}
            rows = self.row_parts(leaves)[0]
            total = total_of(r.square().sum() for r in rows.values())
            if what == "backward of rows" and case.by_input:
                leaves["the input"] = self.x
            return dict(zip(leaves, derivative(total, list(leaves.values())))), None
        return getattr(self, "of_" + what.replace(" ", "_"))(), None

    def no_rows(self) -> Values:
        shapes = {n: (0, *self.values[n].shape) for n in self.case.names}
        return {n: torch.zeros(s, dtype=self.dtype) for n, s in shapes.items()}

    def quantities_of(self, rows: Values) -> object:
        """Of each quantity that was asked for, from rows."""
        known = Truth(_double(rows), torch.stack(self.losses or [torch.zeros(0)]))
        known.losses = known.losses.reshape(self.size)
        wanted = self.case.wanted
        if any(isinstance(w, Gram) and w.other is not None for w in wanted.values()):
            world = self.other()
            others = world.row_parts()[0] if world.size else self.no_rows()
            known.others = _double(others)
        return {key: expected(quantity, known) for key, quantity in wanted.items()}

    def made_of(self, rows: Values) -> object:
        case = self.case
        if case.what in QUANTITIES:
            return self.quantities_of(rows)
        flat = {n: r.reshape(len(r), r.shape[1:].numel()) for n, r in rows.items()}
        squares = {n: r.square().sum(1) for n, r in flat.items()}
        if case.what == "rows":
            return rows
        # The rows are those of a loss that is smaller by ``factor``.
        if case.what == "norms" and case.per_parameter:
            return {n: s.sqrt() * case.factor for n, s in squares.items()}
        norms = total_of(squares.values()).sqrt()
        if case.what == "norms":
            return norms * case.factor
        if case.what == "clipped":
            factors = (case.max_grad_norm / norms).clamp(max=1) * case.factor
            return {
                n: (r * factors.reshape([-1] + [1] * (r.dim() - 1))).sum(0)
                for n, r in rows.items()
            }
        parts = [
            r @ matrix(n, rows[n].shape[1:], case.k, case.kind, case.seed).to(r.dtype)
            for n, r in flat.items()
        ]
        return total_of(parts) / math.sqrt(case.k)

    # -- Transforms --------------------------------------------------------------------

    def all_slices(self, values: Values, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        outs, values = [], values or {}
        for where in self.groups():
            outs += self.run([x[i] for i in where], [values] * len(where), None, where)
        return torch.stack(outs)

    def of_vmap(self) -> object:
        return self.all_slices({})

    def of_vmap_of_vmap(self) -> object:
        parts = [list(x) for x in self.x]
        if self.case.mode == "sync" and self.case.sync_levels is None:
            outs = self.run(
                [x for part in parts for x in part], [{}] * 2 * self.case.size
            )
        else:
            outs = [y for part in parts for y in self.run(part, [{}] * len(part))]
        return torch.stack(outs).reshape(2, self.case.size, *outs[0].shape)

    def of_batched(self) -> object:
        outs = []
        for where in self.groups():
            xs = self.slices(where, self.x)
            outs += self.run(xs, [{}] * len(where))
        return torch.cat(outs)

    def of_vmap_of_jvp(self) -> object:
        found = []
        for where in self.groups():
            few = self.values[self.case.few].clone().requires_grad_()
            if self.case.words:
                leaves, tangents = [few], [torch.ones_like(few)]
                xs = [self.x[i] for i in where]
            else:
                xs = [self.x[i].clone().requires_grad_() for i in where]
                leaves, tangents = xs, [self.case.tangent(x).detach() for x in xs]
            outs = self.run(xs, [{self.case.few: few}] * len(where))
            found += [directional(y, leaves, tangents) for y in outs]
        return torch.stack(found)

    def of_vmap_of_jacrev(self) -> object:
        found = []
        for where in self.groups():
            own = [self.values[self.case.few].clone().requires_grad_() for _ in where]
            outs = self.run(
                [self.x[i] for i in where], [{self.case.few: w} for w in own]
            )
            found += [jacobian(total_of(outs), [w])[0] for w in own]
        return torch.stack(found)

    def second(self, value: Tensor, leaf: Tensor) -> Tensor:
        first = derivative(value, [leaf])[0]
        return jacobian(first, [leaf])[0]

    def of_vmap_of_hessian(self) -> object:
        found = []
        for where in self.groups():
            own = [self.values[self.case.few].clone().requires_grad_() for _ in where]
            outs = self.run(
                [self.x[i] for i in where], [{self.case.few: w} for w in own]
            )
            for y, i, w in zip(outs, where, own):
                found.append(self.second(self.case.base_loss(y, self.y[i]), w))
        return torch.stack(found)

    def leaves(self) -> Values:
        return {n: self.values[n].clone().requires_grad_() for n in self.case.names}

    def summed(self, values: Values, x: Tensor | None = None) -> Tensor:
        out = self.all_slices(values, x)
        return (out.tanh() * self.case.weigh(out)).sum()

    def of_grad_of_vmap(self) -> object:
        leaves = self.leaves()
        x = self.x.clone()
        if self.case.by_input:
            x.requires_grad_()
        inputs = [*leaves.values(), *([x] if self.case.by_input else [])]
        found = derivative(self.summed(leaves, x), inputs)
        grads = dict(zip(leaves, found))
        return (grads, found[-1]) if self.case.by_input else grads

    def along(self, f: Callable[[Values], Tensor]) -> Tensor:
        leaves = self.leaves()
        tangents = [torch.cos(v + 1).detach() for v in leaves.values()]
        return directional(f(leaves), list(leaves.values()), tangents)

    def few(self) -> Tensor:
        return self.values[self.case.few].clone().requires_grad_()

    def of_jvp_of_vmap(self) -> object:
        return self.along(self.all_slices)

    def of_jacrev_of_vmap(self) -> object:
        w = self.few()
        return jacobian(self.all_slices({self.case.few: w}), [w])[0]

    of_jacfwd_of_vmap = of_jacrev_of_vmap

    def of_hessian_of_vmap(self) -> object:
        w = self.few()
        return self.second(self.summed({self.case.few: w}), w)

    def one(self, values: Values) -> Tensor:
        return self.run([self.x[0]], [values])[0]

    def of_grad(self) -> object:
        leaves = self.leaves()
        loss = self.case.base_loss(self.one(leaves), self.y[0])
        return dict(zip(leaves, derivative(loss, list(leaves.values()))))

    def of_backward(self) -> object:
        own = dict(self.net.named_parameters())
        names = [n for n in self.case.names if own[n].requires_grad]
        names = names or [n for n, p in own.items() if p.requires_grad]
        leaves = {n: self.values[n].clone().requires_grad_() for n in names}
        loss = self.case.base_loss(self.one(leaves), self.y[0])
        return dict(zip(leaves, derivative(loss, list(leaves.values()))))

    def of_jvp(self) -> object:
        return self.along(self.one)

    def of_jacrev(self) -> object:
        w = self.few()
        return jacobian(self.one({self.case.few: w}), [w])[0]

    of_jacfwd = of_jacrev

    def of_hessian(self) -> object:
        w = self.few()
        value = self.case.base_loss(self.one({self.case.few: w}), self.y[0])
        return self.second(value, w)

    def of_ensemble(self) -> object:
        x = self.x[0]
        xs = [x, x if self.case.inside or self.case.words else x * 2]
        return torch.stack([self.member(m, [x])[0][0] for m, x in enumerate(xs)])

    def of_ensemble_of_grad(self) -> object:
        rows = []
        for m in range(2):
            out, leaves = self.member(m, [self.x[0]], leaves=True)
            loss = self.case.base_loss(out[0], self.y[0])
            rows.append(derivative(loss, list(leaves.values())))
        return {n: torch.stack(parts) for n, parts in zip(leaves, zip(*rows))}

    def once_along(self, leaves: Values, out: Tensor) -> Tensor:
        tangents = [torch.cos(v + 1).detach() for v in leaves.values()]
        return directional(out, list(leaves.values()), tangents)

    def of_jvp_of_jvp(self) -> object:
        leaves = self.leaves()
        return self.once_along(leaves, self.once_along(leaves, self.all_slices(leaves)))

    def of_grad_of_jvp(self) -> object:
        leaves = self.leaves()
        out = self.once_along(leaves, self.all_slices(leaves))
        total = (out.tanh() * self.case.weigh(out)).sum()
        if not total.requires_grad:
            return {n: torch.zeros_like(v) for n, v in leaves.items()}
        return dict(zip(leaves, derivative(total, list(leaves.values()))))

    def of_jacrev_of_rows(self) -> object:
        w, rows = self.few(), []
        for where in self.groups():
            own = [w.clone() for _ in where]
            xs = [self.x[i] for i in where]
            outs = self.run(xs, [{self.case.few: one} for one in own])
            losses = [self.case.base_loss(o, self.y[i]) for o, i in zip(outs, where)]
            rows += [derivative(total_of(losses), [one])[0] for one in own]
        return jacobian(torch.stack(rows), [w])[0]

    of_jacfwd_of_rows = of_rows_pulled_back = of_jacrev_of_rows

    def of_grad_of_adapted(self) -> object:
        leaves = self.leaves()
        losses = []
        for x, y in zip(self.x, self.y):
            own = {n: v.clone() for n, v in leaves.items()}
            loss = self.case.base_loss(self.run([x], [own])[0], y)
            first = dict(zip(own, derivative(loss, list(own.values()))))
            adapted = {n: v - 0.1 * first[n] for n, v in own.items()}
            losses.append(self.case.base_loss(self.run([x], [adapted])[0], y))
        grads = derivative(total_of(losses), list(leaves.values()))
        return dict(zip(leaves, grads))

    def of_converted(self) -> object:
        return self.one({})

    def of_ensemble_of_slices(self) -> object:
        found = []
        for m in range(2):
            outs: Slices = []
            groups = [[i] for i in range(self.case.size)]
            if self.case.mode == "sync":
                groups = [list(range(self.case.size))]
            for where in groups:
                outs += self.member(m, [self.x[i] for i in where])[0]
            found.append(torch.stack(outs))
        return torch.stack(found)

    def member(self, m: int, xs: Slices, leaves: bool = False) -> tuple[Slices, Values]:
        """Outputs of one network of the ensemble."""
        member = self.case.members()[m]
        given = {n: self.cast(p) for n, p in member.named_parameters()}
        theirs = dict(member.named_buffers())
        buffers = {id(b): self.cast(theirs[n]) for n, b in self.net.named_buffers()}
        if leaves:
            given = {n: p.requires_grad_() for n, p in given.items()}
        outs = self.run(xs, [given] * len(xs), None, (), [buffers] * len(xs))
        return outs, given


def _double(rows: Values) -> Values:
    return {n: r.detach().double() for n, r in rows.items()}


def in_training(net: nn.Module) -> nn.Module:
    """A copy whose layers are in training, but for those that their owner froze."""
    frozen = net.training
    net = copy.deepcopy(net)
    for m in net.modules():
        if isinstance(m, _NormBase) and not frozen:
            m.train()
    return net


def updated_members(case: Case) -> Values:
    """The buffers of an ensemble after the plain layers have seen the batch."""
    first = case.x[0]
    xs = [first, first if case.inside or case.words else first * 2]
    found = []
    for member, x in zip(case.members(), xs):
        net = in_training(member)
        with torch.no_grad():
            net(x.contiguous())
        found.append(dict(net.named_buffers()))
    return {n: torch.stack([one[n] for one in found]) for n in found[0]}


def updated(case: Case) -> Values:
    """The buffers after the plain layers have seen the merged batches."""
    net = in_training(case.net)
    if case.size == 0:
        return dict(net.named_buffers())
    step = case.chunk_size if type(case.chunk_size) is int else case.size
    if case.what in ("grad", "backward"):
        batches = [(case.x[0], case.another[0])]
    else:
        batches = list(zip(case.x.split(step), case.another.split(step)))
        if case.what not in OF_ONE:
            batches = [(x.flatten(0, 1), a.flatten(0, 1)) for x, a in batches]
    with torch.no_grad():
        for x, another in batches:
            net(x.contiguous())
            if case.twice:
                net(another.contiguous())
    return dict(net.named_buffers())


# -- Comparison ------------------------------------------------------------------------


def leaves_of(tree: Any, at: str = "") -> Values:
    if isinstance(tree, torch.Tensor):
        return {at: tree.detach().double()}
    found: Values = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found.update(leaves_of(value, f"{at}.{key}" if at else str(key)))
    return found


def difference(found: object, expected: object, floor: float) -> tuple[float, str]:
    """The largest, of its tensor's largest entry and a little of all; and its name."""
    found, expected = leaves_of(found), leaves_of(expected)
    if found.keys() != expected.keys():
        raise Mismatch(f"names {sorted(found)} instead of {sorted(expected)}")
    all_of = max([float(e.abs().max()) for e in expected.values() if e.numel()] or [0])
    worst, where = 0.0, ""
    for name, e in expected.items():
        f = found[name]
        if f.shape != e.shape:
            raise Mismatch(f"{name} has shape {tuple(f.shape)} not {tuple(e.shape)}")
        if not e.numel():
            continue
        own = float(e.abs().max()) + 0.01 * all_of + floor
        off = float((f - e).abs().max()) / own
        if not off <= worst:  # not a number is the worst
            worst, where = off, name
            if math.isnan(off):
                break
    return worst, where


def off_by(case: Case, found: Any, expected: Any, floor: float) -> tuple[float, str]:
    """:func:`difference`, of each quantity for itself."""
    if case.what not in QUANTITIES:
        return difference(found, expected, floor)
    if isinstance(expected, tuple):  # with aux
        all_of = [("aux", found[1], expected[1])]
        found, expected = found[0], expected[0]
    else:
        all_of = []
    all_of += [(key, found[key], wanted) for key, wanted in expected.items()]
    worst, where = 0.0, ""
    for key, one, wanted in all_of:
        off, name = difference(one, wanted, floor)
        if not off <= worst:
            worst, where = off, f"{key}: {name}"
            if math.isnan(off):
                break
    return worst, where


def check_dtypes(case: Case, found: Any) -> None:
    """Raise where a result has another dtype than the parameters, or float32."""
    halves = case.dtype == torch.bfloat16
    given = found.items() if case.what in QUANTITIES else [(case.what, found)]
    for key, value in given:
        wide = case.what in ("norms", "sketch")
        if case.what in QUANTITIES:
            quantity = case.wanted[key]
            if isinstance(quantity, Losses) and case.autocast:
                continue
            wide = isinstance(quantity, WIDE)
        of = torch.float32 if halves and wide else case.dtype
        leaves = list(value.values()) if isinstance(value, dict) else [value]
        if any(leaf.dtype != of for leaf in leaves):
            raise Mismatch(f"{key} has dtype {leaves[0].dtype} instead of {of}")


def compare(case: Case, found: Any, aux: Any) -> str:
    world = World(case, torch.float64, aux)
    expected, outs = world.answer()
    if outs is not None:
        found, expected = (found, aux[0]), (expected, outs)
    if case.what in SHORT:
        check_dtypes(case, found[0] if outs is not None else found)
    rough = torch.bfloat16 if case.autocast else case.dtype
    tolerance = TOLERANCES[rough]
    floor = FLOORS[rough] * case.factor
    off, where = off_by(case, found, expected, floor)
    if not off < tolerance:
        same, outs = World(case, rough, aux, shaken=True).answer()
        if outs is not None:
            same = same, outs
        itself, _ = off_by(case, same, expected, floor)
        tolerance = max(tolerance, 10 * itself)
        if tolerance > 0.5 or math.isnan(itself):
            return "too rough to compare"
    if not off < tolerance:
        raise Mismatch(f"{where or 'the result'} is off by {off:.1e}")
    return "agrees"


# What an error says that is raised because there is no number to give.
SAYS = ("one value", "Expected more than 1", "no agreed meaning", "a chunk is a batch")


# Other errors, and where they are as good as a number. Most are torch's own: what it
# cannot do under vmap, and the library leaves to it.
LIMITS: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    ("embedding_renorm_", lambda case: "max_norm" in str(case.net)),
    ("max_norm renormalises", lambda case: case.regularised or case.twice),
    ("which does more than", lambda case: case.what == "converted"),
    ("not support dtype: Long", lambda case: "EmbeddingBag" in str(case.net)),
    ("silu_backward", lambda case: case.what not in FIRST_ORDER),
    ("grad_weight needs to be contiguous", lambda case: "Transp" in str(case.net)),
    (
        "must have the same dtype",
        lambda case: case.autocast and "Bilinear" in str(case.net),
    ),
    (
        "BFloat16",
        lambda case: case.autocast
        and ("Transpose" in str(case.net) or "Standardised" in str(case.net)),
    ),
)


def must_refuse(case: Case, aux: Any = None) -> str | None:
    """Why there is no number, or None."""
    if case.mode == "sync" and case.chunk_size == "auto":
        return "a chunk is a batch"
    if aux is None and case.dropout:
        ones = torch.ones(())
        aux = None, [ones.expand(case.size)] * 20
    if case.size == 0:
        return "one value"  # the samples that are made up in its place may have one
    world = World(case, torch.float64, aux)
    try:
        world.answer()
    except Refused as refused:
        return str(refused)
    if case.what == "vmap of hessian" and world.merged:
        return "a hessian inside"
    return None


def same_masks(case: Case, masks: Iterable[Tensor]) -> None:
    """One draw for all samples, where that was asked for."""
    for m in masks:
        kept = m > 0.5
        if case.randomness == "same" and not torch.equal(kept, kept[:1].expand_as(m)):
            raise Mismatch("samples have masks of their own")


def run(seed: int) -> tuple[str, str]:
    """(how it ended, what was asked): "agrees", "refused", or "too rough to compare".

    Raises:
        Mismatch: says what is wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = Case(seed)
        return _run(case), f"{case.what}, {case.mode}"


def _run(case: Case) -> str:
    before = everything(case.net)
    given = [(t, t._version, t.clone()) for t in (case.x, case.y, case.scale)]
    held = [*case.values.values(), *case.state.values()]
    given += [(t, t._version, t.clone()) for t in held]
    case.members()
    asked = case.chunk_size
    error = None
    torch.manual_seed(case.seed)
    try:
        found, aux = case.library()
    except (ValueError, TypeError, RuntimeError, IndexError, AssertionError) as raised:
        error = raised
    after = {n: b.clone() for n, b in case.net.named_buffers()}
    _same_state(case, before)
    if error is not None:
        why = must_refuse(case)
        said = str(error) + " ".join(getattr(error, "__notes__", []))
        if why is None or not any(words in said for words in SAYS):
            if any(words in said and holds(case) for words, holds in LIMITS):
                return "refused"
            text = said.strip().splitlines()
            raise Mismatch(
                f"{type(error).__name__}: {text[0] if text else ''}"
            ) from error
        return "refused"
    for tensor, version, value in given:
        if tensor._version != version or not torch.equal(tensor, value):
            raise Mismatch("an argument was written")
    if case.dropout:
        masks = aux[1]
        if type(asked) is not str:
            torch.manual_seed(case.seed)
            off, _ = difference(case.library(), (found, aux), 1e-6)
            if off > 1e-9:
                raise Mismatch("another result from the same seed")
        if any(not m.isfinite().all() for m in masks):
            return "too rough to compare"
        same_masks(case, masks)
        aux = aux[0], [_for_one(case, m) for m in masks]
    if case.mode == "sync" and asked == "auto":
        raise Mismatch("chunk_size='auto' was not refused")
    try:
        ended = compare(case, found, aux)
    except Refused as refused:
        if case.what == "converted":
            return "refused"  # what it is converted to has torch's own manners
        raise Mismatch(f"not refused: {refused}") from None
    if case.own_buffers_written:
        off, where = difference(case.buffers, updated_members(case), 1e-6)
        if not off < 1e-6:
            raise Mismatch(f"a member's buffer {where} is off by {off:.1e}")
    if case.what == "vmap of hessian" and must_refuse(case):
        raise Mismatch("not refused: a hessian inside")
    if case.updates:
        off, where = difference(after, updated(case), 1e-6)
        if not off < 10 * TOLERANCES[torch.bfloat16 if case.autocast else case.dtype]:
            raise Mismatch(f"buffer {where} is off by {off:.1e}")
    return ended


def _for_one(case: Case, mask: Tensor) -> Tensor:
    """With the dimension of a batch of one where the slices are samples."""
    return mask.unsqueeze(1) if case.what in OF_ONE else mask


def _same_state(case: Case, before: State) -> None:
    if case.updates:  # the buffers are looked at later
        for name, buffer in case.net.named_buffers():
            buffer.data = before[2][name][2].clone()
            before[2][name] = (id(buffer), buffer._version, *before[2][name][2:])
    try:
        assert_same_state(case.net, before)
    except AssertionError as error:
        said = traceback.format_exception(error)[-2:]
        raise Mismatch(" ".join(["state:", *" ".join(said).split()])) from None


# -- Command line ----------------------------------------------------------------------


def _one(seed: int) -> Ending:
    torch.set_num_threads(1)
    try:
        ended, kind = run(seed)
        return seed, ended, kind, ""
    except Mismatch as error:
        return seed, "mismatch", "", str(error)
    except Exception as error:
        return seed, "mismatch", "", f"the fuzzer: {type(error).__name__}: {error}"


_BLOCK = 100


def _apart(seeds: Sequence[int]) -> list[Ending]:
    """Run them in processes of their own: some kernels of torch end theirs (group norm
    of a batch of one that lies in memory in an odd order, in 2.13)."""
    found: list[Ending] = []
    while len(found) < len(seeds):
        receive, send = multiprocessing.Pipe(duplex=False)
        rest = seeds[len(found) :]
        process = multiprocessing.Process(target=_send, args=(send, rest))
        process.start()
        send.close()
        with contextlib.suppress(EOFError):
            while True:
                found.append(receive.recv())
        process.join()
        if len(found) < len(seeds):
            said = f"the process ended with {process.exitcode}"
            found.append((seeds[len(found)], "mismatch", "", said))
    return found


def _send(connection: Connection, seeds: Sequence[int]) -> None:
    for seed in seeds:
        connection.send(_one(seed))


def many(first: int, cases: int, jobs: int) -> int:
    """Run them; prints mismatches as they come, counts at the end."""
    counts: collections.Counter[str] = collections.Counter()
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    start = time.monotonic()
    seeds = range(first, first + cases)
    with multiprocessing.pool.ThreadPool(jobs) as pool:
        blocks = [seeds[i : i + _BLOCK] for i in range(0, cases, _BLOCK)]
        found = pool.imap_unordered(_apart, blocks)
        for seed, ended, kind, said in itertools.chain.from_iterable(found):
            counts[ended] += 1
            if ended == "mismatch":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    case = Case(seed)
                kind = f"{case.what}, {case.mode}"
                print(f"seed {seed}: {kind}: {said[:200]}", flush=True)
            kinds[kind][ended] += 1
    for kind in sorted(kinds):
        print(f"{kind:35}", dict(kinds[kind]))
    took = time.monotonic() - start
    print(f"{cases} cases from seed {first} in {took:.0f} s: {dict(counts)}")
    return counts["mismatch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.seed is None:
        raise SystemExit(min(1, many(asked.first, asked.cases, asked.jobs)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(Case(asked.seed).describe())
    try:
        print(run(asked.seed))
    except Mismatch:
        traceback.print_exc()
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
