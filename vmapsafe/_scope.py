"""A block in force: the rules that hold, for which models, in which thread.

A :class:`Scope` is a ``TorchFunctionMode``, so torch keeps one stack of them a thread,
and nothing of the block lives on the object that opened it. Two process-wide module
hooks, there only while a block is open somewhere, tell the scopes of their own thread
which module is running: which layer called ``F.batch_norm`` cannot be told from its
arguments. The scope looks up the rules; it does not know what they do.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from vmapsafe._call import (
    Call,
    batched_levels,
    is_wrapped,
    run_while_compiling,
    storage_of,
)
from vmapsafe._checkpoint import in_checkpoint, refuse_recomputation, watch
from vmapsafe._errors import BlockError, worded
from vmapsafe._groups import NumGroups
from vmapsafe._operators import enter, leave
from vmapsafe._rule import Table, bind, table
from vmapsafe._state import Model, find, put_back, switch


@dataclass(frozen=True)
class Options:
    """What a block was asked to do."""

    mode: str = "eval"
    num_groups: NumGroups = 32
    update_running_stats: bool = False
    sync_levels: int | None = None
    rows: str = "contribution"  # of per_sample_grads
    fast: bool = True
    copies_at: int | None = None  # of per-sample gradients, see Site

    def __str__(self) -> str:
        given = [f'mode="{self.mode}"']
        if self.mode == "group_norm":
            given.append(f"num_groups={self.num_groups}")
        if self.update_running_stats:
            given.append("update_running_stats=True")
        if self.sync_levels is not None:
            given.append(f"sync_levels={self.sync_levels}")
        if not self.fast:
            given.append("fast=False")
        return ", ".join(given)


@dataclass(slots=True)
class Place:
    """Where a call is made: in a module of a model that a block covers.

    What rules ask of it is :class:`vmapsafe._call.Site`. ``levels`` are those of the
    vmaps that batch a parameter or a buffer of the model, where the mode needs them.
    """

    scope: Scope
    model: Model
    module: nn.Module
    levels: frozenset[int]

    @property
    def layer(self) -> nn.Module | None:
        layer = self.model.layers.get(self.module)
        return None if layer is None or layer.frozen else self.module

    @property
    def tracks(self) -> bool:
        return bool(self.model.layers[self.module].original.track_running_stats)

    @property
    def num_groups(self) -> NumGroups:
        return self.scope.options.num_groups

    @property
    def update_running_stats(self) -> bool:
        return self.scope.options.update_running_stats

    @property
    def rows(self) -> str:
        return self.scope.options.rows

    @property
    def copies_at(self) -> int | None:
        return self.scope.options.copies_at

    def merged_levels(self, tensor: Tensor) -> tuple[int, ...]:
        own = (self.levels | _levels_of((self.module,))) - {self.copies_at}
        levels = sorted(batched_levels((tensor,)) - own)
        wanted = self.scope.options.sync_levels
        return tuple(levels if wanted is None else levels[-wanted:])

    def path(self) -> str:
        return self.model.label(self.module)

    def holds(self, tensor: Tensor) -> bool:
        buffers = [
            buffer
            for module in self.model.buffered
            for buffer in module._buffers.values()
            if buffer is not None
        ]
        if any([buffer is tensor for buffer in buffers]):
            return True
        if torch.compiler.is_compiling():
            return False
        storage = storage_of(tensor)
        return storage is not None and any(storage_of(b) == storage for b in buffers)


@dataclass(slots=True)
class Running:
    """A module whose forward is running.

    Attributes:
        module: the module.
        place: where in which model it is, for the innermost block that covers it; None
            where no block does.
        buffers: on the outermost module of a model, what each of its modules had
            registered when the forward began.
        adopted: whether the block was put in force for this forward alone, as backward
            runs it again.
    """

    module: nn.Module
    place: Place | None
    buffers: dict[nn.Module, dict[str, Tensor | None]]
    adopted: bool

    def put_buffers_back(self) -> None:
        """Undo ``self.mean = …`` of the forward that ends: same objects, same names.

        A tensor of another shape stays: it is a table that was built or grown, and
        what the module keeps beside it (its size, say) would not fit the old one.
        """
        for module, before in self.buffers.items():
            now = module._buffers
            if len(now) == len(before) and all(
                [now.get(name) is buffer for name, buffer in before.items()]
            ):
                continue
            tables = {
                name: buffer
                for name, buffer in now.items()
                if buffer is not None
                and getattr(before.get(name), "shape", None) != buffer.shape
                and not is_wrapped(buffer)
            }
            now.clear()
            now.update({**before, **tables})


class Scope(TorchFunctionMode):
    """One open block of one thread."""

    def __init__(
        self, models: tuple[Model, ...], options: Options, block: object
    ) -> None:
        super().__init__()
        self.block = block
        self.options = options
        self.models = models
        self.closed = False
        self.checkpointed: set[nn.Module] = set()
        self.table: Table = table(options.mode, options.fast)
        self.outer = innermost()
        self.running: list[Running] = [] if self.outer is None else self.outer.running
        self.traced: list[Running] = []
        self.covers = {module: model for model in models for module in model.modules}

    @run_while_compiling
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rules = self.table.get(func)
        out = kwargs.get("out")
        if rules is None and out is None:
            return func(*args, **kwargs)
        running = running_under(self)
        place = running[-1].place if running else None
        if place is not None and place.scope is self:
            if rules is not None:
                call = Call(func, bind(func, args, kwargs), place)
                for rule in rules:
                    if rule.accepts(call):
                        return rule.batched(call)
            if out is not None:
                targets = (out,) if isinstance(out, Tensor) else out
                if any([place.holds(target) for target in targets]):
                    return out
        return func(*args, **kwargs)

    def owner_of(self, module: nn.Module) -> Scope | None:
        """The innermost open block of this thread that covers ``module``."""
        scope: Scope | None = self
        while scope is not None and (scope.closed or module not in scope.covers):
            scope = scope.outer
        return scope

    def open(self) -> None:
        """Switch the layers, listen to the modules, put the rules in force."""
        self.depth = len(self.running)
        switch(self.models, self.options)
        self.listening = False
        try:
            self.listening = _listen(self)
            enter(self, self.options.fast, [model.root for model in self.models])
            _push_mode(self)  # type: ignore[no-untyped-call]
        except BaseException:
            leave(self)
            if self.listening:
                _stop_listening(self)
            put_back(self.models)
            raise

    def close(self) -> None:
        """Take all of it back, whatever happened inside.

        Raises:
            BlockError: blocks opened later are still open, or the block belongs to
                another thread. The model is put back all the same.
        """
        self.closed = True
        try:
            found = _remove(self)
            if self.listening:
                _stop_listening(self)
            while len(self.running) > self.depth:  # left by an interrupted forward
                self.running.pop().put_buffers_back()
        finally:
            leave(self)
            put_back(self.models)
        if found != "top":
            raise BlockError(
                worded(
                    f"vmap_safe({', '.join(type(m.root).__name__ for m in self.models)}"
                    f", {self.options})",
                    f"closed while it was {found}. Its models are put back",
                    "Close blocks in the reverse order, in the thread that opened them",
                )
            )


def running_under(scope: Scope) -> list[Running]:
    """The modules of this thread whose forwards are running, the outermost first.

    What torch.compile traces is a list of its own: a graph must not depend on the
    modules that happen to run around it.
    """
    return scope.traced if torch.compiler.is_compiling() else scope.running


def opened(roots: Sequence[nn.Module], options: Options, block: object) -> Scope:
    """Open a block for the object ``block``; all of it or, with an error, nothing."""
    scope = Scope(find(roots, options.mode, _enclosing_models()), options, block)
    scope.open()
    return scope


def innermost() -> Scope | None:
    """The block opened last in this thread and still open."""
    # Read in torch 2.13: the stack's public form is a list made anew at each call.
    for i in range(torch._C._len_torch_function_stack() - 1, -1, -1):
        mode = torch._C._get_function_stack_at(i)
        if isinstance(mode, Scope) and not mode.closed:
            return mode
    return None


def _enclosing_models() -> list[Model]:
    models: list[Model] = []
    scope = innermost()
    while scope is not None:
        models.extend(scope.models)
        scope = scope.outer
    return models


def _remove(scope: Scope) -> str:
    """Take ``scope`` off this thread's stack; says where it was."""
    above: list[TorchFunctionMode] = []
    found = "open in another thread"
    for _ in range(torch._C._len_torch_function_stack()):
        mode = _pop_mode()  # type: ignore[no-untyped-call]
        if mode is scope:
            found = "top" if not above else "not the innermost block"
            break
        above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)  # type: ignore[no-untyped-call]
    return found


# The hooks. They stand in torch's own tables for hooks on all modules, under a key no
# handle of torch's has: registering through the public function makes a handle that
# torch.compile cannot trace (read in torch 2.13).
_KEY = -1
# torch warns at each call of a compiled module while such hooks stand. The filter is
# put in and taken out by hand: warnings.filterwarnings would have every warning of the
# process shown again.
_QUIET = (
    "ignore",
    re.compile(r"Using `torch.compile\(module\)` when there are global hooks"),
    UserWarning,
    None,
    0,
)
_listeners: list[object] = []  # the open blocks, and what _checkpoint watches
_listeners_lock = threading.RLock()


def _listen(listener: object) -> bool:
    """Install the hooks unless they are there; says whether to take them out again."""
    if torch.compiler.is_compiling():  # a lock cannot be traced
        if _KEY in _module._global_forward_pre_hooks:
            return False
        _install()
        return True
    with _listeners_lock:
        _listeners.append(listener)
        if len(_listeners) == 1:
            _install()
            warnings.filters.insert(0, _QUIET)  # type: ignore[attr-defined]
    return True


def _stop_listening(listener: object) -> None:
    if torch.compiler.is_compiling():
        _uninstall()
        return
    with _listeners_lock:
        _listeners.remove(listener)
        if not _listeners:
            _uninstall()
            if _QUIET in warnings.filters:
                warnings.filters.remove(_QUIET)  # type: ignore[attr-defined]


def _install() -> None:
    _module._global_forward_pre_hooks[_KEY] = _begin
    _module._global_forward_hooks[_KEY] = _end
    _module._global_forward_hooks_always_called[_KEY] = True


def _uninstall() -> None:
    del _module._global_forward_pre_hooks[_KEY]
    del _module._global_forward_hooks[_KEY]
    del _module._global_forward_hooks_always_called[_KEY]


@run_while_compiling
def _begin(module: nn.Module, args: Any) -> None:
    """A module's forward begins: note it, and hold its flags to what was asked for."""
    scope = innermost()
    adopted = False
    if scope is None:
        scope = _recomputing(module)
        if scope is None:
            return
        _push_mode(scope)  # type: ignore[no-untyped-call]
        adopted = True
    running = running_under(scope)
    if not adopted and _is_nothing_new(module, scope, running):
        return
    owner = scope.owner_of(module)
    if owner is None:
        running.append(Running(module, None, {}, adopted))
        return
    model = owner.covers[module]
    layer = model.layers.get(module)
    if layer is not None:
        layer.enforce()
        if not torch.compiler.is_compiling() and in_checkpoint():
            owner.checkpointed.add(module)
    around = [one.place for one in running if one.place and one.place.model is model]
    if around:
        buffers, levels = {}, around[0].levels
    else:
        buffers = {module: dict(module._buffers) for module in model.buffered}
        sync = owner.options.mode == "sync"
        levels = _levels_of(model.modules) if sync else frozenset()
    place = Place(owner, model, module, levels)
    running.append(Running(module, place, buffers, adopted))


def _is_nothing_new(
    module: nn.Module, scope: Scope, running: Sequence[Running]
) -> bool:
    """Whether rules may take the calls of ``module`` for those of the module around it,
    as they may for most modules, which are many and whose forwards should cost little.

    A layer has buffers. A module that is running already is noted again, as its end
    ends the last of that name.
    """
    if module._buffers or not running:
        return False
    place = running[-1].place
    if place is None or scope.covers.get(module) is not place.model:
        return False
    return not _is_running(module, running)


def _is_running(module: nn.Module, running: Sequence[Running]) -> bool:
    for one in running:  # which costs less than any()
        if one.module is module:
            return True
    return False


def _levels_of(modules: Iterable[nn.Module]) -> frozenset[int]:
    """The levels of the vmaps that batch a parameter or a buffer of ``modules``."""
    return batched_levels(
        [
            tensor
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for tensor in tensors.values()
            if tensor is not None
        ]
    )


def _recomputing(module: nn.Module) -> Scope | None:
    """The open block under which backward is running ``module`` again, if it is.

    Backward sees none of its thread's modes, on the CPU neither (read in torch 2.13).
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return None
    for scope in reversed(_listeners):
        if isinstance(scope, Scope) and scope.checkpointed and module in scope.covers:
            return scope
    refuse_recomputation(module)
    return None


@run_while_compiling
def _end(module: nn.Module, args: Any, output: Any) -> None:
    """A module's forward has returned or raised."""
    scope = innermost()
    if scope is None:
        return
    running = running_under(scope)
    if not _is_running(module, running):
        return
    while True:
        last = running.pop()
        last.put_buffers_back()
        if last.adopted:
            _remove(scope)
        if last.module is module:
            break
    if last.buffers and last.place and last.place.scope.checkpointed:
        _watch_layers(last.place, output)


def _watch_layers(place: Place, output: Any) -> None:
    """Have the layers that ran in a checkpoint watched while the graph lives."""
    labels = {
        layer: place.model.label(layer)
        for layer in place.scope.checkpointed
        if layer in place.model.layers
    }
    _listen(labels)
    if not watch(labels, output, lambda: _stop_listening(labels)):
        _stop_listening(labels)
