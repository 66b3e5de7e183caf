"""Runs of a copy of a model on an example, to see what only a run can show."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from vmapsafe._block.models import is_lazy
from vmapsafe._block.refusals import asks_for_randomness
from vmapsafe._block.scope import opened
from vmapsafe._check.finding import Finding, one_line
from vmapsafe._check.outside import Outside, outside
from vmapsafe._check.question import Question
from vmapsafe._check.watch import Outcome, Watch, same_values, tensors_of
from vmapsafe._draws import Draws, Randomness
from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import ModeName, Options
from vmapsafe._torch import (
    tree_flatten,
    tree_map,
    tree_unflatten,
    without_inference_mode,
)


@dataclass(frozen=True)
class Trial:
    """What all runs have shown.

    Attributes:
        plain: of a call without a block and without vmap.
        in_mode: of the runs in a block, by mode.
        outside: modules that the model calls and does not register. In the runs in a
            block they were handed over as well.
        notes: what was not looked at, in sentences.
    """

    plain: Outcome = field(default_factory=Outcome)
    in_mode: Mapping[ModeName, Outcome] = field(default_factory=dict)
    outside: Sequence[Outside] = ()
    notes: tuple[str, ...] = ()

    @property
    def outcomes(self) -> list[Outcome]:
        """Those of all runs."""
        return [self.plain, *self.in_mode.values()]


@dataclass(frozen=True)
class Example:
    """A batch of inputs: the tensors with a first dimension are sliced along it."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    @property
    def of_one(self) -> bool:
        """Whether it is a batch of one sample."""
        leaves = tree_flatten((self.args, dict(self.kwargs)))[0]
        return all([len(leaf) == 1 for leaf in leaves if _has_batch(leaf)])

    def leaves(self) -> tuple[list[Any], list[int | None], Any]:
        """Copies of the leaves, which of them are sliced, and the tree they make."""
        leaves, tree = tree_flatten((self.args, dict(self.kwargs)))
        leaves = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
        dims = [0 if _has_batch(t) else None for t in leaves]
        return leaves, dims, tree


def example_of(given: tuple[object, ...]) -> Example | None:
    """The first two samples of the example that ``check`` was given, if it was."""
    if not given:
        return None
    args: tuple[object, ...] = given
    kwargs: Mapping[str, object] = {}
    if len(given) == 1 and isinstance(given[0], tuple):
        args = given[0]
    elif len(given) == 1 and isinstance(given[0], dict):
        args, kwargs = (), given[0]
    leaves = tree_flatten((args, kwargs))[0]
    shapes = [tuple(t.shape) for t in leaves if _has_batch(t)]
    if len({shape[0] for shape in shapes}) != 1 or shapes[0][0] == 0:
        found = ", ".join(map(str, shapes)) or "none"
        raise VmapSafeValueError(
            "check(...)",
            f"the shapes of the example's tensors, {found}, have no batch in common",
            "Pass a small batch of the model's inputs, as check(model, x[:2])",
        )
    args, kwargs = tree_map(lambda t: t[:2] if _has_batch(t) else t, (args, kwargs))
    return Example(args, kwargs)


def tried(
    question: Question, example: Example | None, known: Collection[Finding]
) -> Trial:
    """Run a copy of the model, if there is an example and a copy can be made.

    Args:
        question: which model, in which modes.
        example: its inputs.
        known: the findings of the layers. A mode that refuses one is not run.

    Returns:
        What the runs have shown, without any where none was possible.
    """
    net = question.net
    if example is None:
        return Trial(notes=(_NO_EXAMPLE,))
    if any([is_lazy(module) for module in net.modules()]):
        return Trial(notes=(_LAZY,))
    with _generators_kept(), _left_alone(net):
        try:
            model = copy.deepcopy(net)
        except Exception as error:
            return Trial(notes=(_NO_COPY.format(one_line(error)),))
        if not set(net.modules()).isdisjoint(model.modules()):
            return Trial(notes=(_NO_COPY.format("the copy shares modules with it"),))
        called = copy.deepcopy(model)
        plain = _plain(called, example)
        others = outside(question, called, plain.outside)
        draws = bool(plain.random) or any(f.kind == "random" for f in known)
        in_mode = {
            mode: _in_mode(question, model, others, example, mode, draws)
            for mode in question.modes
            if all(f.safe[mode] for f in known if f.kind == "unsupported")
        }
    notes = [_OF_ONE] if example.of_one else []
    if plain.failures and not all(o.failures for o in in_mode.values()):
        notes.append(_NOT_WHOLE.format(one_line(plain.failures[0].error)))
    return Trial(plain, in_mode, others, tuple(notes))


_NO_EXAMPLE = (
    "Without an example only the layers were looked at and nothing was run: errors "
    "of vmap, hand-made layers and random functions were not looked for. Pass a "
    "small batch, check(model, x[:2])."
)
_NO_COPY = (
    "The model could not be copied ({}), so nothing was run and only the layers were "
    "looked at."
)
_LAZY = "The model is lazy, so nothing was run and only the layers were looked at."
_NOT_WHOLE = (
    "A plain call on the example raised ({}), so writes to buffers were not looked for."
)
_OF_ONE = (
    "The example is a batch of one. Pass two samples, check(model, x[:2]): one does "
    'not show code that treats samples differently, and what "sync" makes of a batch.'
)


# -- Runs ------------------------------------------------------------------------------

PLAIN = "a call without vmap"
ALONE = "a call on one sample without vmap"


def _plain(model: nn.Module, example: Example) -> Outcome:
    """Call ``model`` as it is: without a block, without vmap. Changes ``model``."""
    outcome = Outcome()
    leaves, _, tree = example.leaves()
    with Watch(model, outcome) as watch:
        watch.run(PLAIN, lambda: _called(model, None, leaves, tree), draws=True)
    return outcome


def _in_mode(
    question: Question,
    model: nn.Module,
    others: Sequence[Outside],
    example: Example,
    mode: ModeName,
    draws: bool,
) -> Outcome:
    """The runs in one mode; once more if they failed only for want of randomness."""
    options = replace(question.options, mode=mode)

    def run(randomness: Randomness) -> Outcome:
        return _in_block(model, others, example, options, randomness)

    if question.randomness != "error":
        return run(question.randomness)
    if draws:
        return run("different")
    outcome = run("error")
    drew = {f.path for f in outcome.failures if asks_for_randomness(f.error)}
    if drew or outcome.random:
        outcome = run("different")
        outcome.random |= drew
    return outcome


def _in_block(
    model: nn.Module,
    others: Sequence[Outside],
    example: Example,
    options: Options,
    randomness: Randomness,
) -> Outcome:
    """Slices of one under vmap and vmap(grad) in a block, each on a fresh copy.

    A run of one sample without vmap comes first, to tell which errors vmap is not to
    blame for.
    """
    outcome = Outcome()
    leaves, dims, tree = example.leaves()
    one = [leaf if dim is None else leaf[:1].clone() for leaf, dim in zip(leaves, dims)]

    def forward(net: nn.Module) -> object:
        def f(*slices: Any) -> list[Tensor]:
            return _called(net, None, _batch_of_one(slices, dims), tree)

        return vmap(f, tuple(dims), randomness=randomness)(*leaves)

    def gradient(net: nn.Module) -> object:
        params = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
        if not params:
            return None

        def loss(params: dict[str, Tensor], *slices: Any) -> Tensor:
            return _loss(_called(net, params, _batch_of_one(slices, dims), tree))

        in_dims = (None, *dims)
        with without_inference_mode():
            return vmap(grad(loss), in_dims, randomness=randomness)(params, *leaves)

    runs: dict[str, Callable[[nn.Module], object]] = {
        ALONE: lambda net: _called(net, None, one, tree),
        "vmap": forward,
        "vmap(grad)": gradient,
    }
    for transform, run in runs.items():
        net = copy.deepcopy(model)
        more = [other.in_copy(net) for other in others if not other.refused]
        scope = opened((net, *more), options, outcome)
        scope.warns = False  # the report says it, and so will the user's own block
        try:
            with Watch(net, outcome) as watch:
                watch.run(transform, lambda: run(net), draws=transform == ALONE)
        finally:
            scope.close()
        if outcome.written:
            break  # ``self.mean.data = …`` under a transform ends the process (2.13)
    return outcome


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Put the values of tensors that change inside back.

    A run of a copy can reach the original, where a function holds on to it.
    """
    tensors = list(tensors_of(model).values())
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                if not same_values(tensor, value):
                    tensor.copy_(value)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put torch's and Python's random generators back."""
    draws, state = Draws("different"), random.getstate()
    try:
        yield
    finally:
        draws.put_back()
        random.setstate(state)


# -- Calls -----------------------------------------------------------------------------


def _called(
    net: nn.Module,
    params: dict[str, Tensor] | None,
    leaves: Sequence[object],
    tree: Any,
) -> list[Tensor]:
    """The tensors that the model returns."""
    args, kwargs = tree_unflatten(list(leaves), tree)
    if params is None:
        out = net(*args, **kwargs)
    else:
        out = functional_call(net, params, args, kwargs)
    return [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]


def _has_batch(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _batch_of_one(slices: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    return [s if dim is None else s.unsqueeze(0) for s, dim in zip(slices, dims)]


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    """Any smooth number that depends on all of the output."""
    parts = [
        (out * out.conj()).real.sum()
        for out in outputs
        if out.is_floating_point() or out.is_complex()
    ]
    if not parts:
        return torch.zeros((), device="cpu")
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
