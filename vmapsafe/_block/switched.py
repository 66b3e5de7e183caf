"""A module that a block covers is, while it is open, of a class that is half ours.

``torch.nn.utils.parametrize`` gives a module a class of its own in the same way. Here
it lets a block change what a module does in the threads the block is open in, and in no
other:

* a normalisation layer *shows* the flags the block wants: ``training`` and
  ``track_running_stats`` are properties. In other threads, in copies, and in
  ``vars(layer)`` they are the owner's, and what anybody assigns is the owner's too;
* what the forward of a module that is not torch's own assigns to a buffer,
  ``self.mean = …``, is put back when it returns.

Other modules are left alone.

So nothing of a module but its class has to be put back, and a class that an interrupt
leaves behind shows the owner's flags.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from vmapsafe._block import open_blocks
from vmapsafe._errors import BlockError
from vmapsafe._modes import Flags
from vmapsafe._torch import constant_while_compiling, is_wrapped, run_while_compiling

_compiling = torch.compiler.is_compiling


def owners_flags(module: nn.Module) -> Flags:
    """The flags its owner gave it, whatever a block shows."""
    return Flags(
        bool(_owners(module, "training")), _owners(module, "track_running_stats")
    )


def _owners(module: nn.Module, name: str) -> Any:
    if not is_switched(module):
        return getattr(module, name, None)
    given = module.__dict__
    return given[name] if name in given else getattr(own_class(module), name, None)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Its class outside all blocks."""
    kind = type(module)
    return kind._vmapsafe_own if issubclass(kind, Switched) else kind


def is_switched(module: nn.Module) -> bool:
    """Whether its class is half ours."""
    return isinstance(type(module), type) and issubclass(type(module), Switched)


_set_class: Callable[[object, type], None]
_set_class = object.__dict__["__class__"].__set__


def switch(module: nn.Module, parts: tuple[type, ...]) -> None:
    """Give the module a class with these parts of ours, and no others."""
    kind = type(module)
    if issubclass(kind, Switched):
        if kind._vmapsafe_parts == parts:
            return
        kind = kind._vmapsafe_own
    _set_class(module, _with(kind, parts) if parts else kind)


_of_torch: dict[tuple[type, tuple[type, ...]], type] = {}


def _with(own: type[nn.Module], parts: tuple[type, ...]) -> type:
    """The class ``own`` with ours in front of it."""
    found = _of_torch.get((own, parts))
    if found is not None:
        return found
    for known in own.__subclasses__():
        if known.__dict__.get("_vmapsafe_parts") == parts:
            return known
    # Past the metaclass's and the class's own hooks for new classes.
    made = type.__new__(
        type(own),
        own.__name__,
        (*parts, own),
        {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__doc__": own.__doc__,
            "_vmapsafe_own": own,
            "_vmapsafe_parts": parts,
        },
    )
    if of_torch(own):  # others would be kept alive
        _of_torch[own, parts] = made
    return made


def of_torch(kind: type) -> bool:
    """Whether a class of modules is one of torch's own."""
    return _is_torch(kind.__module__)


def _is_torch(name: str) -> bool:
    return name.partition(".")[0] == "torch"


class Switched(nn.Module):
    """What is common to our halves."""

    _vmapsafe_own: type[nn.Module]
    _vmapsafe_parts: tuple[type, ...]

    def __init_subclass__(cls, **options: Any) -> None:
        """Not the hook of the class that is switched."""

    # As unittest.mock shows a class: what asks, a __deepcopy__ of the class's own say,
    # gets one that outlives the block.
    __class__ = property(
        lambda self: type(self)._vmapsafe_own,
        lambda self, kind: _set_class(self, kind),
    )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # Copies and pickles are of the owner's class.
        block = covering(self)
        if block is not None:
            block.copied = True
        reduced: Any = super().__reduce_ex__(protocol)
        how, given, *rest = reduced
        ours = type(self)
        given = tuple([ours._vmapsafe_own if a is ours else a for a in given])
        return (how, given, *rest)


# -- Flags -----------------------------------------------------------------------------


def _shown(index: int, name: str) -> property:
    @run_while_compiling
    def get(self: nn.Module) -> Any:
        block = covering(self)
        layer = None if block is None else block.layers.get(self)
        if layer is not None:
            block.see_to_the_rules()
            shown = layer.shown[index]
            if shown is not None:
                return shown
        found = _owners(self, name)
        if found is None:
            raise AttributeError(name)
        return found

    @run_while_compiling
    def put(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


class Layer(Switched):
    """A normalisation layer."""

    training = _shown(0, "training")
    track_running_stats = _shown(1, "track_running_stats")

    # These look at the flags, and are the owner's to call.

    def reset_running_stats(self) -> None:
        _refuse_update_bn(self)
        with open_blocks.instead(()):
            super().reset_running_stats()  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with open_blocks.instead(()):
            super()._load_from_state_dict(*args, **kwargs)


class InEval(Layer):
    """A layer that no rule could put right while torch.compile traces it, which reads
    past properties: one that is not torch's own, or that leaves for its process group.
    """

    _traced_in_training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (_compiling() and _in_a_block()):
            return super().forward(*args, **kwargs)
        before = self.__dict__["training"]
        self.training = self._traced_in_training
        output = super().forward(*args, **kwargs)
        self.training = before
        return output


class InTraining(InEval):
    """The same for a mode that shows it in training mode."""

    _traced_in_training = True


def _refuse_update_bn(layer: nn.Module) -> None:
    """Raise before ``torch.optim.swa_utils.update_bn`` throws statistics away that no
    forward in this block would bring back."""
    block = covering(layer)
    caller = sys._getframe(2).f_code
    if (
        block is None
        or block.options.update_running_stats
        or caller.co_name != "update_bn"
        or not caller.co_filename.endswith("swa_utils.py")
    ):
        return
    raise BlockError(
        f"update_bn inside vmap_safe(..., {block.options})",
        "a block whose forwards do not write running statistics, which update_bn "
        "would leave reset",
        'Call it outside the block, or use mode="sync" with '
        "update_running_stats=True",
    )


def covering(module: nn.Module) -> Any:
    """The innermost open block of this thread that covers the module, or None."""
    for block in reversed(open_blocks.in_force()):
        if module in block.covers and block.alive:
            return block
    return None


@constant_while_compiling
def _in_a_block() -> bool:
    """torch.compile guards the modes that are in force, and so this."""
    return any([block.alive for block in open_blocks.in_force()])


# -- Buffers that a forward assigns ----------------------------------------------------


def may_assign(module: nn.Module) -> bool:
    """Whether the code of its class, or functions this calls by name, may assign a
    buffer of it or below it: ``self.mean = …``, ``setattr``, ``register_buffer``."""
    stored = _stored_by(own_class(module)) | _stored_by_its_functions(module)
    if not stored:
        return False
    if not stored.isdisjoint(_DYNAMIC):
        return True
    return any([not stored.isdisjoint(m._buffers) for m in module.modules()])


_DYNAMIC = {"setattr", "__setattr__", "register_buffer", "_buffers", "__dict__"}
_stored: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def _stored_by(kind: type) -> frozenset[str]:
    """The names of attributes that methods of a class store, but for ``__init__``."""
    found = _stored.get(kind)
    if found is None:
        names: set[str] = set()
        seen: set[Any] = set()
        for base in kind.__mro__:
            if not of_torch(base) and base is not object:
                for name, value in vars(base).items():
                    if name != "__init__":
                        _look_for_stores(value, names, seen)
        found = _stored[kind] = frozenset(names)
    return found


def _stored_by_its_functions(module: nn.Module) -> set[str]:
    """The same for functions among a module's attributes."""
    names: set[str] = set()
    for value in vars(module).values():
        if callable(value):
            _look_for_stores(value, names, set())
    return names


def normalises_itself(module: nn.Module) -> bool:
    """Whether the forward of a batch norm layer is its class's own and does not hand on
    to torch's: its code names neither ``batch_norm`` nor ``super().forward``."""
    own = [k for k in own_class(module).__mro__ if not of_torch(k) and k is not object]
    if not any(["forward" in vars(kind) for kind in own]):
        return False
    for kind in own:
        for value in vars(kind).values():
            function = inspect.unwrap(value) if callable(value) else None
            if inspect.isfunction(function):
                names = {*function.__code__.co_names}
                if "batch_norm" in names or {"super", "forward"} <= names:
                    return False
    return True


def _look_for_stores(value: Any, names: set[str], seen: set[Any]) -> None:
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            _look_for_stores(part, names, seen)
    if isinstance(value, functools.partial):
        value = value.func
    function = inspect.unwrap(value) if callable(value) else value
    function = getattr(function, "__func__", function)
    if isinstance(value, type) or not inspect.isfunction(function):
        return
    if function in seen or _is_torch(function.__module__):
        return
    seen.add(function)
    codes = [function.__code__]
    for code in codes:  # while it grows
        codes += [const for const in code.co_consts if inspect.iscode(const)]
        stores = [i for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"]
        names.update([str(instruction.argval) for instruction in stores])
        names.update(_DYNAMIC.intersection(code.co_names))
        known = [function.__globals__.get(name) for name in code.co_names]
        homes = [m for m in known if inspect.ismodule(m) and not _is_torch(m.__name__)]
        known += [vars(m).get(name) for m in homes for name in code.co_names]
        for one in known:
            _look_for_stores(one, names, seen)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            _look_for_stores(cell.cell_contents, names, seen)


class PutsBack(Switched):
    """A module that may assign buffers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _putting_back(self, super().forward, args, kwargs)


class PutsBackAroundCalls(PutsBack):
    """One whose own ``forward``, or a hook after it, may assign buffers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _putting_back(self, super().__call__, args, kwargs)


def _putting_back(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if _compiling():
        if not _in_a_block():
            return forward(*args, **kwargs)
        kept = kept_buffers(module)
        output = forward(*args, **kwargs)
        for owner, before in kept:
            put_buffers_back(owner, before)
        return output
    block = covering(module)
    if block is None:
        return forward(*args, **kwargs)
    kept = [(owner, dict(owner._buffers)) for owner in block.buffered_below(module)]
    undone: list[tuple[nn.Module, str]] | None = None
    try:
        try:
            output = forward(*args, **kwargs)
        finally:
            undone = _put_back(kept)
    finally:
        if undone is None:  # interrupted while it put them back
            _put_back(kept)
    for owner, name in undone:
        block.leaves_out(owner, name)
    return output


Kept = list[tuple[nn.Module, dict[str, Tensor | None]]]


def kept_by_forwards() -> dict[nn.Module, dict[str, Tensor | None]]:
    """The buffers that modules had when the outermost running forward began, of those
    that may assign them; read off the frames of this thread."""
    found: dict[nn.Module, dict[str, Tensor | None]] = {}
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _putting_back.__code__:
            found.update(frame.f_locals.get("kept", ()))  # the outermost comes last
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _put_back(kept: Kept) -> list[tuple[nn.Module, str]]:
    return [
        (owner, name)
        for owner, before in kept
        for name in put_buffers_back(owner, before)
    ]


def kept_buffers(module: nn.Module) -> Kept:
    """What is registered in it and below it."""
    return [(m, dict(m._buffers)) for m in module.modules() if m._buffers]


def put_buffers_back(
    module: nn.Module, before: dict[str, Tensor | None]
) -> tuple[str, ...]:
    """Undo ``self.mean = …``: same objects, same names. Returns the names.

    A tensor of another shape stays: it is a table that was built or grown, and what the
    module keeps beside it (its size, say) would not fit the old one.
    """
    now = module._buffers
    if len(now) == len(before) and all(
        [now.get(name) is buffer for name, buffer in before.items()]
    ):
        return ()
    tables = {
        name: buffer
        for name, buffer in now.items()
        if buffer is not None
        and getattr(before.get(name), "shape", None) != buffer.shape
        and not is_wrapped(buffer)
    }
    undone = tuple(
        [n for n in before if n not in tables and now.get(n) is not before[n]]
    )
    now.clear()
    now.update({**before, **tables})
    return undone
