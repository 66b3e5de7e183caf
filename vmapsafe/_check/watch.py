"""What happens while the modules of a model run.

Hooks on the modules tell which one runs: where an error was raised, a random number
drawn, or a warning given. In a backward pass no module runs. There, hooks on the
tensors that enter and leave modules tell how far back the pass has come.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from vmapsafe._block.refusals import avoided_by_a_loop, is_of_checkpoint
from vmapsafe._draws import Draws
from vmapsafe._torch import current_level, tree_flatten


@dataclass(frozen=True)
class Failure:
    """An error of a run.

    Attributes:
        path: of the module that raised it.
        transform: what was run.
        error: what was raised, without the frames it has passed through.
        looped: whether a loop over the slices avoids it.
        of_checkpoint: whether it is about torch.utils.checkpoint.
    """

    path: str
    transform: str
    error: Exception
    looped: bool
    of_checkpoint: bool


@dataclass
class Outcome:
    """What one or several runs have shown, by path of the module.

    Attributes:
        random: where random numbers were drawn.
        fallbacks: the operators that torch runs slice by slice, without a rule.
        written: the buffers and parameters that the run left changed.
        built: those of them that have another shape: tables that were built or grown.
        failures: what was raised.
        finished: where a forward has returned.
        outside: the modules that ran and are not part of the net, and whether a tensor
            of theirs was written.
    """

    random: set[str] = field(default_factory=set)
    fallbacks: dict[str, list[str]] = field(default_factory=dict)
    written: dict[str, list[str]] = field(default_factory=dict)
    built: set[tuple[str, str]] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    outside: dict[nn.Module, bool] = field(default_factory=dict)


class Watch:
    """Notes in an outcome what happens while the modules of ``net`` run."""

    def __init__(self, net: nn.Module, outcome: Outcome) -> None:
        self._net, self._outcome = net, outcome
        self._paths = {module: path for path, module in net.named_modules()}
        self._running: list[nn.Module] = []
        self._backward_at = ""
        self._marked: dict[int, Tensor] = {}  # kept alive, so that no id is used twice
        self._handles: list[RemovableHandle] = []
        self._draws: Draws | None = None
        self._thread = threading.get_ident()
        self._before: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}

    def __enter__(self) -> Watch:
        self._handles.append(register_module_forward_pre_hook(self._called))
        for module in self._paths:
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                self._handles += [
                    module.register_forward_pre_hook(self._begin, prepend=True),
                    module.register_forward_hook(self._end),
                ]
        return self

    def __exit__(self, *_: object) -> None:
        # A tensor, its hook and this object hold each other where Python's garbage
        # collector cannot see it.
        for handle in self._handles:
            handle.remove()
        self._marked.clear()
        for module, before in self._before.items():
            written = _put_back(module, before)
            self._outcome.outside[module] = self._outcome.outside[module] or written

    def run(
        self, transform: str, function: Callable[[], object], *, draws: bool
    ) -> None:
        """Call a function that runs the net, and note what happens.

        Args:
            transform: what the function does, for failures.
            function: what to call.
            draws: whether to look for random numbers at each module. That is not
                possible under a transform, where the generators cannot be compared.
        """
        before = tensors_of(self._net)
        values = {key: tensor.detach().clone() for key, tensor in before.items()}
        self._draws = Draws("different") if draws else None
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("always")
            warnings.showwarning = self._warned
            try:
                function()
            except Exception as error:
                looped = avoided_by_a_loop(error) is not None
                failure = Failure(
                    self._path, transform, error, looped, is_of_checkpoint(error)
                )
                _forget_frames(error)  # which these have looked at
                self._outcome.failures.append(failure)
        self._listen()
        known = set(self._paths.values())  # not the modules that the run has made
        for key, tensor in tensors_of(self._net).items():
            if key[0] not in known:
                continue
            if tensor is not before.get(key) or not same_values(tensor, values[key]):
                _note(self._outcome.written, *key)
                if key not in before or tensor.shape != values[key].shape:
                    self._outcome.built.add(key)

    @property
    def _path(self) -> str:
        """Where the run is, or was when it raised."""
        return self._paths[self._running[-1]] if self._running else self._backward_at

    def _called(self, module: nn.Module, args: object) -> None:
        """Note a module that is not part of the net; other threads are not watched."""
        if module in self._paths or threading.get_ident() != self._thread:
            return
        if module not in self._outcome.outside:
            self._outcome.outside[module] = False
        # A copy of the net may call the original, whose tensors are to stay. Runs under
        # a transform come after one without.
        if module not in self._before and current_level() == 0:
            named = (*module._parameters.items(), *module._buffers.items())
            self._before[module] = {
                name: (tensor, tensor.detach().clone())
                for name, tensor in named
                if tensor is not None and not is_lazy(tensor)
            }

    def _begin(self, module: nn.Module, args: object) -> None:
        self._mark(args)
        self._listen()
        self._running.append(module)

    def _end(self, module: nn.Module, args: object, out: object) -> None:
        self._mark(out)
        self._listen()
        self._outcome.finished.add(self._paths[module])
        while self._running and self._running.pop() is not module:
            pass

    def _mark(self, tree: object) -> None:
        """Let a backward pass that reaches these tensors say so."""
        reached = self._reached(self._path)
        for leaf in tree_flatten(tree)[0]:
            if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                continue
            if id(leaf) not in self._marked:
                self._marked[id(leaf)] = leaf
                hook = leaf.register_hook(reached)  # type: ignore[no-untyped-call]
                self._handles.append(hook)

    def _reached(self, path: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self._backward_at = path

        return hook

    def _listen(self) -> None:
        """Note whether anything was drawn since the last call of this."""
        if self._draws is not None and self._draws.moved():
            self._draws = Draws("different")
            self._outcome.random.add(self._path)

    def _warned(self, message: Warning | str, *_: Any, **__: Any) -> None:
        # Read in torch 2.13.
        found = re.search(r"performance drop because.*?rule for (\S+?)\.", str(message))
        if found:
            # A backward pass warns when it is over, without a place.
            path, when = (self._path, "") if self._running else ("", " (backward)")
            _note(self._outcome.fallbacks, path, found[1] + when)


def tensors_of(net: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Parameters and buffers by the module's path and their name in it."""
    return {
        (path, name): tensor
        for path, module in net.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and not is_lazy(tensor)
    }


def _put_back(module: nn.Module, before: dict[str, tuple[Tensor, Tensor]]) -> bool:
    """Give a module the tensors it had; return whether that changed anything."""
    changed = False
    for name, (tensor, value) in before.items():
        home = module._parameters if name in module._parameters else module._buffers
        if home.get(name) is not tensor:
            home[name] = tensor  # type: ignore[assignment]
            changed = True
        if not same_values(tensor, value):
            with torch.no_grad():
                tensor.copy_(value)
            changed = True
    return changed


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether values are equal, NaN equal to NaN; those of meta tensors always are."""
    if a.is_meta:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    try:
        return bool(((a == b) | ((a != a) & (b != b))).all())
    except RuntimeError:  # a transform that is over has left its tensor in a buffer
        return False


def _forget_frames(error: BaseException | None) -> None:
    """Release the values in the frames that an error has passed through."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _note(notes: dict[str, list[str]], path: str, what: str) -> None:
    if what not in notes.setdefault(path, []):
        notes[path].append(what)
