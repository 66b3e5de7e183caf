"""What the code of a module's class does, read from its bytecode."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import weakref
from collections.abc import Collection

from torch import nn

from vmapsafe._block.switched import is_torchs, of_torch, own_class


def may_assign(module: nn.Module) -> bool:
    """Whether a forward may assign a buffer: ``self.mean = …``, ``register_buffer``, ….

    The code searched is that of the module's class, of functions among its attributes,
    and of functions that these call by name; the buffers are those of the module and of
    modules below it.
    """
    stored: Collection[str] = _stored_by(own_class(module))
    if len(vars(module)) > _ATTRIBUTES:
        functions = [value for value in vars(module).values() if callable(value)]
        if functions:
            stored = {*stored}
            for function in functions:
                _look_for_stores(function, stored, set())
    if not stored:
        return False
    if not _DYNAMIC.isdisjoint(stored):
        return True
    return any([not m._buffers.keys().isdisjoint(stored) for m in module.modules()])


def normalises_itself(module: nn.Module) -> bool:
    """Whether a layer has a forward that calls neither ``F.batch_norm`` nor torch's own
    forward: the code of its class names neither ``batch_norm`` nor ``super().forward``.
    """
    own = _own_bases(own_class(module))
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


def _own_bases(kind: type) -> list[type]:
    """The class and its bases, without those of torch."""
    return [base for base in kind.__mro__ if base is not object and not of_torch(base)]


# Code that names one of these may assign any attribute.
_DYNAMIC = {"setattr", "__setattr__", "register_buffer", "_buffers", "__dict__"}
_ATTRIBUTES = len(vars(nn.Module()))  # what every module has
_stored: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def _stored_by(kind: type) -> frozenset[str]:
    """The names of the attributes that methods other than ``__init__`` store."""
    found = _stored.get(kind)
    if found is None:
        names: set[str] = set()
        seen: set[object] = set()
        for base in _own_bases(kind):
            for name, value in vars(base).items():
                if name != "__init__":
                    _look_for_stores(value, names, seen)
        found = _stored[kind] = frozenset(names)
    return found


def _look_for_stores(value: object, names: set[str], seen: set[object]) -> None:
    """Add to ``names`` what a function stores, and what those store that it calls."""
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            _look_for_stores(part, names, seen)
    if isinstance(value, functools.partial):
        value = value.func
    function = inspect.unwrap(value) if callable(value) else value
    function = getattr(function, "__func__", function)
    if isinstance(value, type) or not inspect.isfunction(function):
        return
    if function in seen or is_torchs(function.__module__):
        return
    seen.add(function)
    codes = [function.__code__]
    for code in codes:  # while it grows
        codes += [const for const in code.co_consts if inspect.iscode(const)]
        stores = [i for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"]
        names.update([str(instruction.argval) for instruction in stores])
        names.update(_DYNAMIC.intersection(code.co_names))
        known = [function.__globals__.get(name) for name in code.co_names]
        homes = [m for m in known if inspect.ismodule(m) and not is_torchs(m.__name__)]
        known += [vars(m).get(name) for m in homes for name in code.co_names]
        for one in known:
            _look_for_stores(one, names, seen)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            _look_for_stores(cell.cell_contents, names, seen)
