"""A block in force: the rules that hold, for which models, in which thread.

A :class:`Scope` is a ``TorchFunctionMode``, so torch keeps a stack of them for each
thread. It looks up the rules of each call and does not know what they do.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vmapsafe._block import open_blocks, operators
from vmapsafe._block.backward import (
    HOOKING,
    Passed,
    foreign_hooks,
    hooked,
    listen,
    unpacking_in,
)
from vmapsafe._block.callers import (
    BELOW_LAYERS,
    OF_LAYERS,
    Callers,
    SiteInBlock,
    in_a_forward,
    nearest_module,
)
from vmapsafe._block.covered import Layer, Model
from vmapsafe._block.models import (
    find,
    is_hand_made_write,
    put_back,
    put_back_flags,
    switch,
)
from vmapsafe._block.open_blocks import here
from vmapsafe._block.switched import covering, own_class
from vmapsafe._block.writes import (
    WRITE_SEVERAL,
    BuffersOf,
    writes_by_schema,
    written_by,
)
from vmapsafe._call import Call
from vmapsafe._errors import BlockError, LeftOutWarning, warn_user, worded
from vmapsafe._modes import Options
from vmapsafe._rule import FunctionRule, Table, bind, table
from vmapsafe._torch import (
    NATIVE_BATCH_NORMS,
    HigherOrderOperator,
    OpOverloadPacket,
    TorchFunctionMode,
    below_all,
    innermost_mode,
    is_torchs_own,
    is_wrapped,
    list_weights_again,
    modes_in_force,
    put_on,
    run_while_compiling,
    running_node,
    take_off,
    take_off_innermost,
    top_hooks,
    tree_flatten,
    tree_map,
    unseen_by_modes,
)

_compiling = torch.compiler.is_compiling


class Scope(TorchFunctionMode):
    """One open block of one thread."""

    def __init__(
        self, models: tuple[Model, ...], options: Options, block: object
    ) -> None:
        super().__init__()
        self.options = options
        self.mode = options.meaning
        self.fast = options.fast
        self.models = models
        self.closed = self.closing = False
        self.table: Table = table(options.mode)
        self.covers: dict[nn.Module, Model] = {}
        self.layers: dict[nn.Module, Layer] = {}
        for model in models:
            for module in model.modules:
                self.covers[module] = model
            self.layers.update(model.layers)
        self.callers = Callers(self.layers, self.mode)
        recorded = options.copies_at is not None
        self._leading = operators.leading(recorded) if self.fast else ()
        self._buffers = BuffersOf(models)
        self.copied = False  # whether a layer was, inside
        self.copies: weakref.WeakKeyDictionary[nn.Module, nn.Module]
        self.copies = weakref.WeakKeyDictionary()
        self._handling = 0  # how many calls it is handling
        self.warns = True  # of writes that are left out
        self._traced = _compiling()
        self._block: Callable[[], object | None] = _nobodys
        if not _compiling():
            self.thread = threading.current_thread()
            self.since = open_blocks.next_node()
            self._looked_at = WeakTensorKeyDictionary()
            self.belongs_to(block)

    def __str__(self) -> str:
        names = ", ".join([own_class(model.root).__name__ for model in self.models])
        return f"vmap_safe({names}, {self.options})"

    def belongs_to(self, block: object) -> None:
        """Say for which object it was opened; when that is gone, nobody closes it."""
        self._block = weakref.ref(block)

    @property
    def block(self) -> object | None:
        """The object for which it was opened, if it still exists."""
        return self._block()

    @property
    def alive(self) -> bool:
        """Whether it is open, and its owner, who will close it, still exists."""
        return not self.closed and self._block() is not None

    @run_while_compiling
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _compiling():
            if func in self._leading:
                operators.prepare_traced()
            return self._call(func, args, kwargs or {})
        if self._traced and not self.closed:
            self._refuse_a_break()
        if func in self._leading and not self.closed:
            operators.prepare(func, args)
        if top_hooks(True) is None:
            if func in self.table.others:
                if not kwargs:
                    return func(*args)
                if kwargs.get("out") is None and not kwargs.get("inplace"):
                    return func(*args, **kwargs)
            elif func in self.table.first_looks:
                given = kwargs or {}
                with unseen_by_modes():
                    needs_a_rule = self.table.first_looks[func](*args, **given)
                if not needs_a_rule:
                    return func(*args, **given)
        kwargs = kwargs or {}
        if not self.alive:
            return func(*args, **kwargs)
        blocks = here.blocks if running_node() is None else open_blocks.in_force()
        if self not in blocks:  # backward of a graph from before the block
            return func(*args, **kwargs)
        self._handling += 1
        try:
            if top_hooks(True) is not None and (hooks := foreign_hooks()):
                with unpacking_in(blocks, hooks):
                    return self._call(func, args, kwargs)
            return self._call(func, args, kwargs)
        finally:
            self._handling -= 1

    def see_to_the_rules(self) -> None:
        """Put its rules in force again if an interrupt in torch has removed them.

        torch takes a mode off the stack while the mode handles a call. An interrupt at
        one place there leaves it off.
        """
        if self._handling or innermost_mode() is self:
            return
        if self not in modes_in_force():
            put_on(self)

    def _call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if func in BELOW_LAYERS:
            func, args, kwargs = self.callers.as_of_a_layer(func, args, kwargs)
        rules = self.table.get(func)
        out = kwargs.get("out")
        if rules is None and out is None and not kwargs.get("inplace"):
            if not _compiling():
                if isinstance(func, OpOverloadPacket) or func in _NOT_OF_LAYERS:
                    self._refuse_native(func, args, kwargs)
                    if writes_by_schema(func):
                        return self._call_operator(func, args, kwargs)
                if isinstance(func, HigherOrderOperator):
                    func = Passed(func)
                if isinstance(func, Passed):
                    func.inside.insert(0, self)
                elif func in HOOKING:
                    args = hooked(args)
                elif func not in _NOT_OF_LAYERS and is_torchs_own(func):
                    self.table.others.add(func)
            return func(*args, **kwargs)
        if rules is not None:
            bound = bind(func, args, kwargs)
            module = None
            if func in OF_LAYERS:
                module = self.callers.find(bound)
                if module is None:
                    if self._is_anothers(bound):
                        return func(*args, **kwargs)
                    self._look_for_copies(bound)
            if module is None or self._owns(module):
                call = Call(func, bound, SiteInBlock(self, module))
                rule = _accepting(rules, call)
                if rule is not None:
                    return rule.batched(call)
        written = args[0] if out is None and kwargs.get("inplace") else out
        if written is not None:
            targets = (written,) if isinstance(written, Tensor) else written
            place = SiteInBlock(self, None)
            if any([place.leaves_out(target) for target in targets]):
                return written
        return func(*args, **kwargs)

    def _refuse_native(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Raise for a function below ``F.batch_norm`` called on the buffers of a layer.

        It may be called to normalise with these buffers, as in eval mode. Overloads are
        left alone: code that torch.compile has made calls them.
        """
        name = func.__name__
        if "batch_norm" not in name or "backward" in name:
            return
        given = {**dict(zip(_NATIVE_NAMES, args)), **kwargs}
        mean, training = given.get("running_mean"), given.get("training")
        layer = self.callers.with_mean(mean) if isinstance(mean, Tensor) else None
        if layer is None or not self._owns(layer):
            return
        stays = self.mode.reads_running_stats or self.layers[layer].frozen
        if training or not stays:
            raise BlockError(
                f"{name} on the buffers of {self.covers[layer].label(layer)} in "
                f"{self}",
                "it is below F.batch_norm, where the mode has no effect",
                "Call the layer, or F.batch_norm",
            )

    def _call_operator(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call an operator without its writes to buffers.

        If it only writes buffers in place, it is not called. Otherwise it writes to
        copies of them.
        """
        place = SiteInBlock(self, None)
        targets = written_by(func, args, kwargs)
        written = [target for target in targets if place.leaves_out(target)]
        if not written:
            return func(*args, **kwargs)
        first = tree_flatten(args[0])[0] if args else []
        if len(written) == len(targets) == len(first):
            if all([a is b for a, b in zip(written, first)]):
                return args[0]
        args, kwargs = tree_map(
            lambda t: t.clone() if any([t is one for one in written]) else t,
            (args, kwargs),
        )
        return func(*args, **kwargs)

    # -- Layers and buffers ------------------------------------------------------------

    def _is_anothers(self, bound: Mapping[str, Any]) -> bool:
        """Whether a block around this one covers the layer that makes the call."""
        if _compiling():
            return True  # this cannot be seen
        others = [b for b in open_blocks.in_force() if isinstance(b, Scope) and b.alive]
        return any([b.callers.find(bound) is not None for b in others if b is not self])

    def _look_for_copies(self, bound: Mapping[str, Any]) -> None:
        """Warn once that the block does not cover a copy of a layer, made inside it.

        The copy normalises as its own flags say.
        """
        if not self.copied or self.mode.reads_running_stats or _compiling():
            return
        caller = nearest_module()
        original = None if caller is None else self.copies.get(caller)
        if original is None:
            original = self._with_statistics(bound["running_mean"])
        if original is None:
            return
        self.copied = False
        warn_user(
            worded(
                str(self),
                f"a copy of {self.covers[original].label(original)} runs in the block, "
                "which does not cover it",
                "Hand the copy to vmap_safe as well",
            ),
            UserWarning,
        )

    def _with_statistics(self, mean: Tensor | None) -> nn.Module | None:
        """The layer whose statistics a copy has, if it came out of a pickle."""
        if mean is None or is_wrapped(mean) or mean in self._looked_at:
            return None
        self._looked_at[mean] = True
        for layer in self.layers:
            own = layer._buffers.get("running_mean")
            if own is not None and not is_wrapped(own) and _same(own, mean):
                return layer
        return None

    def _owns(self, module: nn.Module) -> bool:
        """Whether this is the innermost block that covers the module."""
        if _compiling():
            return True
        return covering(module) is self

    def owner_of_buffer(self, tensor: Tensor) -> tuple[nn.Module, str] | None:
        """The module and the name of the buffer that shares memory with ``tensor``."""
        return self._buffers.owner_of(tensor)

    def buffered_below(self, module: nn.Module) -> list[nn.Module]:
        """The modules with buffers in ``module``, itself included."""
        return self._buffers.below(module)

    def leaves_out(self, module: nn.Module, name: str) -> None:
        """Warn that a write to a buffer does not happen, once for each class."""
        if _compiling():
            return
        kind = own_class(module)
        if (
            not self.warns
            or kind in _warned_of_writes
            or not is_hand_made_write(module, name)
        ):
            return
        _warned_of_writes.add(kind)
        model = self.covers[module]
        warn_user(
            worded(
                f"vmap_safe({type(model.root).__name__}, {self.options})",
                f"the forward of {model.label(module)} writes its buffer {name!r}, "
                "which does not happen inside the block. Otherwise the layer does what "
                "it does in training mode",
                f"Pass also=({kind.__name__},) to have it in eval mode, with mode="
                '"eval"; or ignore this warning, if training mode is what you want',
            ),
            LeftOutWarning,
        )

    def refused(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """The layer or buffer for which a call, made after the block, differs."""
        if func in BELOW_LAYERS:
            func, args, kwargs = self.callers.as_of_a_layer(func, args, kwargs)
        if func in OF_LAYERS:
            bound = bind(func, args, kwargs)
            module = self.callers.find(bound)
            if module is None or self.layers[module].frozen:
                return None
            flag = bound.get("training", bound.get("use_input_stats"))
            if self.mode.reads_running_stats and not flag:
                return None
            return self.covers[module].label(module)
        out = kwargs.get("out")
        targets = list(out) if isinstance(out, (tuple, list)) else [out]
        if func in self.table or kwargs.get("inplace"):
            targets.append(next(iter(args), None))
        if writes_by_schema(func):
            targets += written_by(func, args, kwargs)
        for target in targets:
            if isinstance(target, Tensor):
                found = self.owner_of_buffer(target)
                if found is not None and in_a_forward(self.covers):
                    return self.covers[found[0]].label(found[0])
        return None

    # -- Opening and closing -----------------------------------------------------------

    def open(self) -> None:
        """Put the block in force."""
        if _compiling():  # a lock cannot be traced, nor a class changed
            switch(self.models)
            put_on(self)
            return
        with open_blocks.lock:
            sweep()
            self._refuse_other_options()
            open_blocks.set_everywhere((*open_blocks.everywhere(), self))
            listen()
            switch(self.models)
        operators.install([model.device for model in self.models])
        open_blocks.set_blocks((*open_blocks.blocks(), self))
        put_on(self)

    def close(self) -> str:
        """Take the block back, as far as it was opened.

        Returns:
            Where the scope was in the thread's stack, see ``take_off``.
        """
        if _compiling():
            take_off_innermost()
            put_back(self.models, ())
            list_weights_again(self.covers)
            return "top"
        self.closing = True
        try:
            found = take_off(self)
            open_blocks.set_blocks(
                tuple([b for b in open_blocks.blocks() if b is not self])
            )
            with open_blocks.lock:
                left = tuple([b for b in open_blocks.everywhere() if b is not self])
                open_blocks.set_everywhere(left)
                mine = [b for b in reversed(open_blocks.blocks()) if b.alive]
                put_back(self.models, [*mine, *[b for b in reversed(left) if b.alive]])
            self.closed = True
            operators.remove()
        finally:
            self.closing = False
        return found

    def _refuse_a_break(self) -> None:
        """Raise where torch.compile has traced a block and stops tracing inside it.

        Such a block cannot go on. It raises once, and the model is put back.
        """
        self.closed = True
        put_back_flags(self.models)
        raise BlockError(
            str(self),
            "torch.compile breaks the graph inside it",
            "Put the block around the compiled function, or compile with "
            "fullgraph=True to see what breaks it",
        )

    def _refuse_other_options(self) -> None:
        for other in open_blocks.everywhere():
            if other.thread is self.thread or not other.alive:
                continue
            if other.options.agree(self.options):
                continue
            for module, layer in self.layers.items():
                if module in other.layers and not layer.frozen:
                    model = self.covers[module]
                    raise BlockError(
                        f"vmap_safe({type(model.root).__name__}, {self.options})",
                        f"another thread holds {model.label(module)} with "
                        f"{other.options}",
                        "Use the same options in both threads, or a copy of the "
                        "model",
                    )


def _nobodys() -> object:
    """In the place of a weak reference, which torch.compile cannot trace."""
    return _nobodys


# Classes with a write left out.
_warned_of_writes: weakref.WeakSet[type] = weakref.WeakSet()
# What no layer calls, and may write buffers.
_NOT_OF_LAYERS = NATIVE_BATCH_NORMS | WRITE_SEVERAL
# The first arguments of NATIVE_BATCH_NORMS.
_NATIVE_NAMES = (
    *("input", "weight", "bias", "running_mean", "running_var"),
    "training",
)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.device != b.device or a.dtype != b.dtype or a.is_meta:
        return False
    with below_all():
        return torch.equal(a, b)


def _accepting(rules: Sequence[FunctionRule], call: Call) -> FunctionRule | None:
    """The first rule that takes a call."""
    if _compiling():
        for rule in rules:
            if rule.accepts(call):
                return rule
        return None
    # To look at a tensor is a call of torch, which other modes need not see.
    with unseen_by_modes():
        for rule in rules:
            if rule.accepts(call):
                return rule
    return None


def sweep_traced() -> None:
    """Take back blocks that torch.compile has left open by breaking the graph."""
    for mode in reversed(modes_in_force()):
        if isinstance(mode, Scope) and mode._traced:
            take_off(mode)
            if not mode.closed:
                put_back_flags(mode.models)


def sweep() -> None:
    """Close blocks left open by an interrupt, the end of a thread or torch.compile."""
    sweep_traced()
    for mode in modes_in_force():
        # torch puts it on again when an interrupted call is freed.
        if isinstance(mode, Scope) and mode.closed:
            take_off(mode)
    for block in (*open_blocks.blocks(), *open_blocks.everywhere()):
        if block.closing:  # and a signal handler or a finalizer has interrupted that
            continue
        if not block.alive or not block.thread.is_alive():
            block.close()


def opened(roots: Sequence[nn.Module], options: Options, block: object) -> Scope:
    """Open a block for the object ``block``; after an error, nothing of it is open."""
    scope = Scope(find(roots, options), options, block)
    if _compiling():
        scope.open()
        return scope
    done = False
    try:
        try:
            scope.open()
            done = True
        finally:
            if not done:
                scope.close()
    finally:
        if not done:  # interrupted while it was closing
            scope.close()
    return scope


def entered_by(block: object) -> Scope | None:
    """The innermost block of this thread that was opened for the object ``block``."""
    if _compiling():
        mode = innermost_mode()
        return mode if isinstance(mode, Scope) else None
    for scope in reversed(open_blocks.blocks()):
        if isinstance(scope, Scope) and scope.alive and scope.block is block:
            return scope
    return None
