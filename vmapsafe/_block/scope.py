"""A block in force: the rules that hold, for which models, in which thread.

A :class:`Scope` is a ``TorchFunctionMode``, so torch keeps one stack of them a thread.
Nothing is kept about what is running. Which layer calls ``F.batch_norm`` is told, at
each call, by the buffers it passes, else by the Python frames that called, else by its
weight; whether a write comes from a forward, by those frames. So there is nothing that
an interrupt could leave behind. The scope looks up the rules; it does not know what
they do.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vmapsafe._block import open_blocks
from vmapsafe._block.backward import (
    HOOKING,
    Passed,
    foreign_hooks,
    hooked,
    listen,
    unpacking_in,
)
from vmapsafe._block.models import (
    Layer,
    Model,
    device_of,
    find,
    is_hand_made_write,
    process_group,
    put_back,
    put_back_flags,
    switch,
)
from vmapsafe._block.operators import install
from vmapsafe._block.switched import covering, kept_by_forwards, own_class
from vmapsafe._call import Call
from vmapsafe._errors import BlockError, LeftOutWarning, warn_user, worded
from vmapsafe._modes import NumGroups, Options
from vmapsafe._rule import Table, bind, table
from vmapsafe._torch import (
    NATIVE_BATCH_NORMS,
    HigherOrderOperator,
    OpOverloadPacket,
    TorchFunctionMode,
    batched_levels,
    below_all,
    innermost_mode,
    is_wrapped,
    lies_alone,
    modes_in_force,
    put_on,
    run_while_compiling,
    shares_memory,
    take_off,
    take_off_innermost,
    top_hooks,
    tree_flatten,
    tree_map,
)

_compiling = torch.compiler.is_compiling


@dataclass(slots=True)
class Place:
    """Where a call is made, see :class:`vmapsafe._call.Site`: by which covered layer,
    if by one."""

    scope: Scope
    module: nn.Module | None

    @property
    def layer(self) -> nn.Module | None:
        if self.module is None or self.scope.layers[self.module].frozen:
            return None
        return self.module

    @property
    def stays_in_eval(self) -> bool:
        if self.module is None:
            return False
        return self.scope.mode.reads_running_stats or self.layer is None

    @property
    def tracks(self) -> bool:
        assert self.module is not None
        return bool(self.scope.layers[self.module].owners.track_running_stats)

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
        found = batched_levels((tensor,))
        if not found:
            return ()
        assert self.module is not None
        model = self.scope.covers[self.module]
        own = batched_levels(_tensors(model)) - {self.copies_at}
        levels = sorted(found - own)
        wanted = self.scope.options.sync_levels
        return tuple(levels if wanted is None else levels[-wanted:])

    @property
    def process_group(self) -> Any:
        return None if self.module is None else process_group(self.module)

    def path(self) -> str:
        if self.module is None:
            return "a call outside the model's layers"
        return self.scope.covers[self.module].label(self.module)

    def holds(self, tensor: Tensor) -> bool:
        return self.scope.owner_of_buffer(tensor) is not None

    def leaves_out(self, tensor: Tensor) -> bool:
        """Whether a write to ``tensor`` is one to a buffer in a forward of the model,
        which does not happen; says so where nobody would expect it."""
        found = self.scope.owner_of_buffer(tensor)
        if found is None or not self.scope.in_a_forward():
            return False
        self.scope.leaves_out(*found)
        return True


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.device != b.device or a.dtype != b.dtype or a.is_meta:
        return False
    with below_all():
        return torch.equal(a, b)


def _tensors(model: Model) -> list[Tensor]:
    """What a model computes with: parameters, buffers as they were when its forward
    began, and tensors that stand as plain attributes in the place of parameters, as
    make_functional of old puts them. What a forward keeps (``self.features = x``) is
    none of these."""
    found: list[Any] = []
    before = {} if _compiling() else kept_by_forwards()
    for module in model.modules:
        given, names = module.__dict__, model.names.get(module, ())
        found += given["_parameters"].values()
        found += before.get(module, given["_buffers"]).values()
        for name, value in given.items():
            if isinstance(value, Tensor):
                if name in names or name.startswith(_PARAMETERS):
                    found.append(value)
    return [tensor for tensor in found if tensor is not None]


# The names of parameters and buffers in torch's own classes begin so.
_PARAMETERS = ("weight", "bias", "running_", "in_proj_", *map("{}_proj_".format, "qkv"))


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
        self.table: Table = table(options.mode, options.fast)
        self.covers: dict[nn.Module, Model] = {}
        self.layers: dict[nn.Module, Layer] = {}
        for model in models:
            for module in model.modules:
                self.covers[module] = model
            self.layers.update(model.layers)
        self.in_order = list(self.layers)
        self.next = 0
        self.copied = False  # whether a layer was, inside
        self._handling = 0  # calls
        self.warns = True  # of writes that are left out
        self._below: dict[nn.Module, list[nn.Module]] = {}
        self._traced = _compiling()
        if not _compiling():
            self.thread = threading.current_thread()
            self.since = open_blocks.next_node()
            self._looked_at = WeakTensorKeyDictionary()
            self.belongs_to(block)

    def __str__(self) -> str:
        names = ", ".join([own_class(model.root).__name__ for model in self.models])
        return f"vmap_safe({names}, {self.options})"

    def belongs_to(self, block: object) -> None:
        """Nobody but the owner of ``block`` will close it, and he cannot when it is
        gone."""
        self._block = weakref.ref(block)

    @property
    def block(self) -> object | None:
        return self._block()

    @property
    def alive(self) -> bool:
        return not self.closed and (_compiling() or self._block() is not None)

    @run_while_compiling
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _compiling():
            return self._call(func, types, args, kwargs)
        if not self.closed and self._traced:
            self._refuse_a_break()
        if not self.alive:
            return func(*args, **kwargs)
        blocks = open_blocks.in_force()
        if self not in blocks:  # backward of a graph from before the block
            return func(*args, **kwargs)
        self._handling += 1
        try:
            if top_hooks(True) is not None and (hooks := foreign_hooks()):
                with unpacking_in(blocks, hooks):
                    return self._call(func, types, args, kwargs)
            return self._call(func, types, args, kwargs)
        finally:
            self._handling -= 1

    def see_to_the_rules(self) -> None:
        """A layer's forward begins. torch takes a mode off the stack while it handles a
        call; an interrupt at one place of that leaves it off."""
        if not self._handling and self not in modes_in_force():
            put_on(self)

    def _call(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if func in _UNDER:
            func, args, kwargs = self._as_of_a_layer(func, args, kwargs)
        rules = self.table.get(func)
        out = kwargs.get("out")
        if rules is None and out is None and not kwargs.get("inplace"):
            if not _compiling():
                if func in NATIVE_BATCH_NORMS or isinstance(func, OpOverloadPacket):
                    self._refuse_native(func, args, kwargs)
                if func in _BY_SCHEMA or isinstance(func, _OPERATORS):
                    return self._call_operator(func, args, kwargs)
                if isinstance(func, HigherOrderOperator):
                    func = Passed(func)
                if isinstance(func, Passed):
                    func.inside.insert(0, self)
                elif func in HOOKING:
                    args = hooked(args)
            return func(*args, **kwargs)
        if rules is not None:
            bound = bind(func, args, kwargs)
            module = None
            if func in _OF_LAYERS:
                module = self._caller(func, bound)
                if module is None:
                    if self._is_anothers(func, bound):
                        return func(*args, **kwargs)
                    self._look_for_copies(bound)
            if module is None or self._owns(module):
                call = Call(func, bound, Place(self, module))
                for rule in rules:
                    if rule.accepts(call):
                        return rule.batched(call)
        written = args[0] if out is None and kwargs.get("inplace") else out
        if written is not None:
            targets = (written,) if isinstance(written, Tensor) else written
            place = Place(self, None)
            if any([place.leaves_out(target) for target in targets]):
                return written
        return func(*args, **kwargs)

    def _refuse_native(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Raise for what lies below ``F.batch_norm`` and is called on the buffers of a
        layer, unless it normalises by them, as in eval mode. What torch.compile made
        calls overloads, and is left alone."""
        name = func.__name__
        if "batch_norm" not in name or "backward" in name:
            return
        given = {**dict(zip(_NATIVE_NAMES, args)), **kwargs}
        mean, training = given.get("running_mean"), given.get("training")
        layer = self._with("running_mean", mean) if isinstance(mean, Tensor) else None
        if layer is None or not self._owns(layer):
            return
        stays = self.mode.reads_running_stats or self.layers[layer].frozen
        if training or not stays:
            raise BlockError(
                f"{name} on the buffers of {self.covers[layer].label(layer)} in "
                f"{self}",
                "an operator below F.batch_norm, which the mode does not reach",
                "Call the layer, or F.batch_norm",
            )

    def _call_operator(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One that writes as its schema says, without its writes to buffers: of one in
        place on nothing else there is nothing left, others write to copies."""
        place = Place(self, None)
        targets = _written_by(func, args, kwargs)
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

    # -- Who calls ---------------------------------------------------------------------

    def _as_of_a_layer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """What torch's layers call by another name, as they call it, where a layer of
        the block makes the call."""
        function, names = _UNDER[func]
        bound = {**dict(zip(names, args)), **kwargs}
        if self._caller(function, bound) is None:
            return func, args, kwargs
        bound.pop(names[-1])
        return function, (), bound

    def _caller(
        self, func: Callable[..., Any], bound: Mapping[str, Any]
    ) -> nn.Module | None:
        """The layer that makes a call: whose buffers or weights it passes, or, where it
        passes none of them, whose forward is calling."""
        mean = bound["running_mean"]
        found = None if mean is None else self._with("running_mean", mean)
        if found is not None:
            if _compiling() or found._parameters.get("weight") is bound["weight"]:
                return found
            # Another layer may share the statistics.
            nearest = _nearest_module()
            if nearest is None or nearest._buffers.get("running_mean") is not mean:
                return found
            return nearest if nearest in self.layers else None
        if _compiling():
            return self._by_weights(bound) or self._bare(bound)
        if (
            mean is None
            or not self.mode.reads_running_stats
            or bound.get("training", True)
        ):
            nearest = _nearest_module()
            if nearest in self.layers:
                return nearest
        return self._by_weights(bound)

    def _by_weights(self, bound: Mapping[str, Any]) -> nn.Module | None:
        """A layer that has the weight or the bias; of those that share it, one that
        would not have passed running statistics where none are passed."""
        for name in ("weight", "bias"):
            given = bound[name]
            if given is None:
                continue
            found = [
                layer
                for layer in self.in_order
                if layer._parameters.get(name) is given
                or layer.__dict__.get(name) is given
            ]
            if bound["running_mean"] is None:
                found.sort(key=lambda x: bool(self.layers[x].owners[1]))
            if found:
                return found[0]
        return None

    def _with(self, name: str, given: Tensor) -> nn.Module | None:
        """The layer that has this buffer now; the one after the last found first, so
        that one look will do."""
        layers = self.in_order
        first = 0 if _compiling() else self.next
        for i in range(first, first + len(layers)):
            layer = layers[i % len(layers)]
            if layer._buffers.get(name) is given or layer.__dict__.get(name) is given:
                if not _compiling():
                    self.next = (i + 1) % len(layers)
                return layer
        return None

    def _bare(self, bound: Mapping[str, Any]) -> nn.Module | None:
        """While compiling there are no frames to look at; layers without any tensor do
        the same, whichever it is."""
        names = ("running_mean", "weight", "bias")
        if any([bound[name] is not None for name in names]):
            return None
        for layer in self.in_order:
            if getattr(layer, "num_features", None) == bound["input"].size(1):
                if not any([getattr(layer, n, None) is not None for n in names]):
                    return layer
        return None

    def _is_anothers(self, func: Callable[..., Any], bound: Mapping[str, Any]) -> bool:
        """Whether a block around this one covers the layer that calls."""
        if _compiling():
            return True  # nobody knows
        others = [b for b in open_blocks.in_force() if b is not self and b.alive]
        return any([other._caller(func, bound) is not None for other in others])

    def _look_for_copies(self, bound: Mapping[str, Any]) -> None:
        """Say once that a copy of a covered layer, made inside the block, is not
        covered: it normalises as its owner's flags say."""
        mean = bound["running_mean"]
        if not self.copied or self.mode.reads_running_stats or _compiling():
            return
        if mean is None or is_wrapped(mean) or mean in self._looked_at:
            return
        self._looked_at[mean] = True
        for layer in self.in_order:
            own = layer._buffers.get("running_mean")
            if own is not None and not is_wrapped(own) and _same(own, mean):
                warn_user(
                    worded(
                        str(self),
                        f"a copy of {self.covers[layer].label(layer)} runs in the "
                        "block, which does not cover it",
                        "Hand the copy to vmap_safe as well",
                    ),
                    UserWarning,
                )
                self.copied = False
                return

    def _owns(self, module: nn.Module) -> bool:
        """Whether no block inside this one covers the module."""
        if _compiling():
            return True
        return covering(module) is self

    def owner_of_buffer(self, tensor: Tensor) -> tuple[nn.Module, str] | None:
        """Which buffer of which module ``tensor`` is, or shares memory with."""
        modules = [module for model in self.models for module in model.buffered]
        base = None if _compiling() or is_wrapped(tensor) else tensor._base
        for module in modules:
            for buffer in module._buffers.values():
                if buffer is not None and (buffer is tensor or buffer is base):
                    names = [n for n, b in module._buffers.items() if b is buffer]
                    return module, names[0]
        if not modules or (not _compiling() and lies_alone(tensor, base)):
            return None
        buffers = [
            (module, name, buffer)
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        shared = shares_memory(tensor, [buffer for _, _, buffer in buffers])
        return None if shared is None else buffers[shared][:2]

    def in_a_forward(self) -> bool:
        """Whether a forward of a covered module is running. All that is traced is."""
        if _compiling():
            return True
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name in ("_call_impl", "forward"):
                if _module_of(frame) in self.covers:
                    return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def buffered_below(self, module: nn.Module) -> list[nn.Module]:
        """The modules with buffers in it, itself included."""
        found = self._below.get(module)
        if found is None:
            found = [m for m in module.modules() if m._buffers]
            self._below[module] = found
        return found

    def leaves_out(self, module: nn.Module, name: str) -> None:
        """Say once a class that a write of a hand-made layer did not happen."""
        if _compiling():
            return
        kind = own_class(module)
        if not self.warns or kind in _warned or not is_hand_made_write(module, name):
            return
        _warned.add(kind)
        model = self.covers[module]
        warn_user(
            worded(
                f"vmap_safe({type(model.root).__name__}, {self.options})",
                f"the forward of {model.label(module)} writes its buffer {name!r}, "
                "which does not happen inside the block; otherwise it does what it "
                "does in training mode",
                f"Pass also=({kind.__name__},) to have it in eval mode, with mode="
                '"eval"; or nothing, where that is what you want',
            ),
            LeftOutWarning,
        )

    def refused(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """After the block: the layer or buffer to which this call would do something
        else than in it."""
        if func in _UNDER:
            func, args, kwargs = self._as_of_a_layer(func, args, kwargs)
        if func in _OF_LAYERS:
            bound = bind(func, args, kwargs)
            module = self._caller(func, bound)
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
        if func in _BY_SCHEMA or isinstance(func, _OPERATORS):
            targets += _written_by(func, args, kwargs)
        for target in targets:
            if isinstance(target, Tensor):
                found = self.owner_of_buffer(target)
                if found is not None and self.in_a_forward():
                    return self.covers[found[0]].label(found[0])
        return None

    # -- Opening and closing -----------------------------------------------------------

    def open(self) -> None:
        """Put it in force."""
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
        if self.fast:
            install({device_of(model.root).type for model in self.models})
        open_blocks.set_blocks((*open_blocks.blocks(), self))
        put_on(self)

    def close(self) -> str:
        """Take it back, as far as it got. Says where in the thread's stack it was."""
        if _compiling():
            take_off_innermost()
            put_back(self.models, ())
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
        finally:
            self.closing = False
        return found

    def _refuse_a_break(self) -> None:
        """Raise where torch.compile goes on without tracing in a block that it traced,
        which the block does not survive; once, and the model is put back."""
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


# The calls of normalisation layers.
_OF_LAYERS = (F.batch_norm, F.instance_norm)
# What is under them, with the names of its arguments.
_FIRST = ("input", "weight", "bias", "running_mean", "running_var")
_LAST = ("momentum", "eps", "cudnn_enabled")
_UNDER: dict[Callable[..., Any], tuple[Callable[..., Any], tuple[str, ...]]] = {
    torch.batch_norm: (F.batch_norm, (*_FIRST, "training", *_LAST)),
    torch.instance_norm: (F.instance_norm, (*_FIRST, "use_input_stats", *_LAST)),
}
_OPERATORS = OpOverloadPacket  # overloads are what torch.compile made, which may write
# Functions that write to several tensors.
_NATIVE_NAMES = (
    *("input", "weight", "bias", "running_mean", "running_var"),
    "training",
)
_BY_SCHEMA = frozenset(
    [
        torch.fused_moving_avg_obs_fake_quant,
        *[
            getattr(torch, name)
            for name in dir(torch)
            if name.startswith("_foreach_") and name.endswith("_")
        ],
    ]
)
_warned: weakref.WeakSet[type] = weakref.WeakSet()


def sweep_traced() -> None:
    """Take back what torch.compile has left of blocks in which it broke the graph."""
    for mode in reversed(modes_in_force()):
        if isinstance(mode, Scope) and mode._traced:
            take_off(mode)
            if not mode.closed:
                put_back_flags(mode.models)


def _written_by(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """The tensors that it writes, as the schema of the operator says."""
    if func in _BY_SCHEMA:
        func = getattr(torch.ops.aten, func.__name__)
    overloads = [func]
    if isinstance(func, OpOverloadPacket):
        names: list[str] = func.overloads()  # type: ignore[no-untyped-call]
        overloads = [getattr(func, name) for name in names]
    written: dict[int, Tensor] = {}  # each once
    for overload in overloads:
        for i, argument in enumerate(overload._schema.arguments):
            if argument.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                tensors = [t for t in tree_flatten(given)[0] if isinstance(t, Tensor)]
                written.update({id(tensor): tensor for tensor in tensors})
    return list(written.values())


def sweep() -> None:
    """Close what nobody will close any more: blocks that an interrupt, or the end of
    their thread, left open, and what torch.compile left."""
    sweep_traced()
    left = [mode for mode in modes_in_force() if isinstance(mode, Scope)]
    for scope in left:  # what torch puts on again when an interrupted call is freed
        if scope.closed:
            take_off(scope)
    for block in (*open_blocks.blocks(), *open_blocks.everywhere()):
        if block.closing:  # by what a signal handler or a finalizer has interrupted
            continue
        if not block.alive or not block.thread.is_alive():
            block.close()


def opened(roots: Sequence[nn.Module], options: Options, block: object) -> Scope:
    """Open a block for the object ``block``; all of it or, with an error, nothing."""
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


def innermost() -> Scope | None:
    """The block opened last in this thread and still open."""
    for block in reversed(open_blocks.in_force()):
        if block.alive:
            found: Scope = block
            return found
    return None


def entered_by(block: object) -> Scope | None:
    """The innermost one of this thread that ``block`` has opened."""
    if _compiling():
        mode = innermost_mode()
        return mode if isinstance(mode, Scope) else None
    for scope in reversed(open_blocks.blocks()):
        if scope.alive and scope.block is block:
            found: Scope = scope
            return found
    return None


def _nearest_module() -> nn.Module | None:
    """The module whose method is running."""
    frame = sys._getframe(1)
    while frame is not None:
        found = _module_of(frame)
        if found is not None:
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _module_of(frame: Any) -> nn.Module | None:
    """The module of whose method this is a frame, or None."""
    code = frame.f_code
    if code.co_argcount == 0:
        return None
    name = code.co_varnames[0]
    if name != "self" and code.co_name != "forward":
        return None
    found = frame.f_locals.get(name)  # which makes a dict of all
    return found if isinstance(found, nn.Module) else None
