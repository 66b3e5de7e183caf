"""A model run on an example, on a copy, to see what only a run can show.

Which module runs is noted by hooks on the copy: it is where an error was raised, a
random number drawn, or a warning given. In a backward pass no module runs; there, hooks
on the tensors that enter and leave modules tell how far back the pass has come.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.parameter import is_lazy

from vmapsafe._block.scope import opened
from vmapsafe._modes import Options
from vmapsafe._torch import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Failure:
    """An error: in the module at ``path``, of which ``transform``."""

    path: str
    transform: str
    error: Exception


@dataclass
class Outcome:
    """What one or several runs have shown, by path of the module.

    Attributes:
        random: where random numbers were drawn.
        fallbacks: the operators that torch runs slice by slice for want of a rule.
        written: the buffers and parameters that the run left changed.
        built: those of them that have another shape: tables that were built or grown.
        failures: what was raised.
    """

    random: set[str] = field(default_factory=set)
    fallbacks: dict[str, list[str]] = field(default_factory=dict)
    written: dict[str, list[str]] = field(default_factory=dict)
    built: set[tuple[str, str]] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """A batch of inputs: the tensors with a first dimension are sliced along it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def leaves(self) -> tuple[list[Any], list[int | None], Any]:
        """Copies of the leaves, which of them are sliced, and the tree they make."""
        leaves, tree = tree_flatten((self.args, dict(self.kwargs)))
        leaves = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
        dims = [0 if isinstance(t, Tensor) and t.dim() else None for t in leaves]
        return leaves, dims, tree


def plain(model: nn.Module, example: Example) -> Outcome:
    """Call ``model`` as it is: without a block, without vmap. Changes ``model``."""
    outcome = Outcome()
    leaves, _, tree = example.leaves()
    with _Watch(model, outcome) as watch:
        watch.run(PLAIN, lambda: _called(model, None, leaves, tree))
    return outcome


def in_block(
    model: nn.Module, example: Example, options: Options, randomness: str
) -> Outcome:
    """Slices of one under vmap and vmap(grad) in a block, each on a fresh copy.

    A run of one sample without vmap comes first, as some errors are not vmap's.
    """
    outcome = Outcome()
    leaves, dims, tree = example.leaves()
    one = [leaf if dim is None else leaf[:1].clone() for leaf, dim in zip(leaves, dims)]

    def forward(net: nn.Module) -> Any:
        def f(*slices: Any) -> list[Tensor]:
            return _called(net, None, _batch_of_one(slices, dims), tree)

        return vmap(f, tuple(dims), randomness=randomness)(*leaves)

    def gradient(net: nn.Module) -> Any:
        params = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
        if not params:
            return None

        def loss(params: dict[str, Tensor], *slices: Any) -> Tensor:
            return _loss(_called(net, params, _batch_of_one(slices, dims), tree))

        in_dims = (None, *dims)
        return vmap(grad(loss), in_dims, randomness=randomness)(params, *leaves)

    runs: dict[str, Callable[[nn.Module], Any]] = {
        ALONE: lambda net: _called(net, None, one, tree),
        "vmap": forward,
        "vmap(grad)": gradient,
    }
    for transform, run in runs.items():
        net = copy.deepcopy(model)
        scope = opened((net,), options, outcome)
        scope.warns = False  # the report says it, and a block of the user's will
        try:
            with _Watch(net, outcome) as watch:
                watch.run(transform, lambda: run(net))
        finally:
            scope.close()
        if outcome.written:
            break  # ``self.mean.data = …`` under a transform ends the process (2.13)
    return outcome


PLAIN = "a call without vmap"
ALONE = "a call on one sample without vmap"


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Give tensors of ``model`` that change inside their old values back.

    A copy does not keep a run from the original where a function holds on to it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors = [t for t in tensors if not is_lazy(t)]
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                if not _same(tensor, value):
                    tensor.copy_(value)


# -- Calls ----------------------------------------------------------------------------


def _called(
    net: nn.Module, params: dict[str, Tensor] | None, leaves: Sequence[Any], tree: Any
) -> list[Tensor]:
    """The tensors that the model returns."""
    args, kwargs = tree_unflatten(list(leaves), tree)
    if params is None:
        out = net(*args, **kwargs)
    else:
        out = functional_call(net, params, args, kwargs)
    return [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]


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


# -- Watching -------------------------------------------------------------------------


class _Watch:
    """Notes in an outcome what happens while the modules of ``net`` run."""

    def __init__(self, net: nn.Module, outcome: Outcome) -> None:
        self.net = net
        self.outcome = outcome
        self.paths = {module: path for path, module in net.named_modules()}
        self.running: list[nn.Module] = []
        self.backward_at = ""
        self.marked: dict[int, Tensor] = {}  # held, so that an id stays one tensor's

    def __enter__(self) -> _Watch:
        self.handles: list[Any] = [
            handle
            for module in self.paths
            if not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
            for handle in (
                module.register_forward_pre_hook(self._begin, prepend=True),
                module.register_forward_hook(self._end),
            )
        ]
        return self

    def __exit__(self, *_: object) -> None:
        # A tensor, its hook and this object hold each other where Python's garbage
        # collector cannot see it.
        for handle in self.handles:
            handle.remove()
        self.marked.clear()

    def run(self, transform: str, function: Callable[[], Any]) -> None:
        """Call ``function``, which runs the net, and note what becomes of it."""
        before = _tensors(self.net)
        values = {key: tensor.detach().clone() for key, tensor in before.items()}
        # Under a transform the generators cannot be compared.
        self.generators = _generators() if transform in (PLAIN, ALONE) else None
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("always")
            warnings.showwarning = self._warned
            try:
                function()
            except Exception as error:
                _forget_frames(error)
                self.outcome.failures.append(Failure(self.path, transform, error))
        self._listen()
        known = set(self.paths.values())  # not the modules that the run has made
        for key, tensor in _tensors(self.net).items():
            if key[0] not in known:
                continue
            if tensor is not before.get(key) or not _same(tensor, values[key]):
                _note(self.outcome.written, *key)
                if key not in before or tensor.shape != values[key].shape:
                    self.outcome.built.add(key)

    @property
    def path(self) -> str:
        """Where the run is, or was when it raised."""
        return self.paths[self.running[-1]] if self.running else self.backward_at

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._mark(args)
        self._listen()
        self.running.append(module)

    def _end(self, module: nn.Module, args: Any, out: Any) -> None:
        self._mark(out)
        self._listen()
        while self.running and self.running.pop() is not module:
            pass

    def _mark(self, tree: Any) -> None:
        """Let a backward pass that reaches these tensors say so."""
        reached = self._reached(self.path)
        for leaf in tree_flatten(tree)[0]:
            if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                continue
            if id(leaf) not in self.marked:
                self.marked[id(leaf)] = leaf
                hook = leaf.register_hook(reached)  # type: ignore[no-untyped-call]
                self.handles.append(hook)

    def _reached(self, path: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.backward_at = path

        return hook

    def _listen(self) -> None:
        """Note whether torch's generators have moved since the last call of this."""
        if self.generators is not None:
            before, self.generators = self.generators, _generators()
            if not all(torch.equal(a, b) for a, b in zip(before, self.generators)):
                self.outcome.random.add(self.path)

    def _warned(self, message: Warning | str, *_: Any, **__: Any) -> None:
        # Read in torch 2.13.
        found = re.search(r"performance drop because.*?rule for (\S+?)\.", str(message))
        if found:
            # A backward pass warns when it is over, of no place in particular.
            path, when = (self.path, "") if self.running else ("", " (backward)")
            _note(self.outcome.fallbacks, path, found[1] + when)


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the functions that an error has passed through were working on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _generators() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    return states


def _note(notes: dict[str, list[str]], path: str, what: str) -> None:
    if what not in notes.setdefault(path, []):
        notes[path].append(what)


def _tensors(net: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Parameters and buffers by the module's path and their name in it."""
    return {
        (path, name): tensor
        for path, module in net.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and not is_lazy(tensor)
    }


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal values, NaN equal to NaN; meta tensors have none."""
    if a.is_meta:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    try:
        return bool(((a == b) | ((a != a) & (b != b))).all())
    except RuntimeError:  # what a transform that is over has left in a buffer
        return False
