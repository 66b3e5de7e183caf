"""What was asked: function, loss, model and loader, in words and digests.

A folder of results keeps them, and a later run compares. They are the same in another
process, and differ where the results could differ, as far as that can be seen.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from types import CellType, CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vmapsafe._block.models import device_of, unwrapped
from vmapsafe._data.batches import Places
from vmapsafe._errors import VmapSafeTypeError
from vmapsafe._modes import MODES
from vmapsafe.quantities.protocol import Quantity


def fingerprint(
    loader: object,
    function: Callable[..., object],
    model: nn.Module,
    loss_fn: Callable[..., object],
    keys: Places | None,
    options: Mapping[str, object],
) -> dict[str, str | int | None]:
    """What was asked, for people and for comparison.

    Args:
        loader: of the batches.
        function: of a batch.
        model: its first argument.
        loss_fn: its second argument.
        keys: how a batch that is a dict is taken apart.
        options: those of the function, with defaults.

    Returns:
        Descriptions and digests by name.
    """
    net = unwrapped(model)
    tensors = [*net.named_parameters(), *net.named_buffers()]
    written = function, loss_fn, *options.values()
    flags = [(n, m.training) for n, m in net.named_modules()]
    flags += [(n, p.requires_grad) for n, p in net.named_parameters()]
    asked: dict[str, str | int | None] = {
        "function": described(function),
        "loss_fn": described(loss_fn),
        "model": type(net).__qualname__,
        "layers": _digest_of_text(_settings(net)),
        "parameters and buffers": digest([part for nt in tensors for part in nt]),
        "training and requires_grad": _digest_of_text(repr(flags)),
        "precision": _precision(device_of(net)),
        "keys": None if keys is None else repr(keys),
        "batches": number_of(loader),
        "batch_size": getattr(loader, "batch_size", None),
        "samples": number_of(getattr(loader, "dataset", None)),
        "code": _digest_of_text(repr([_written(value) for value in written])),
    }
    ignored = {"out"}
    mode = MODES.get(str(options.get("mode")))
    if mode is None or not mode.merges:
        ignored.add("chunk_size")
    for name, value in options.items():
        if name not in ignored:
            asked[name] = described(value)
    return asked


def with_defaults(
    function: Callable[..., object],
    given: Collection[object],
    options: Mapping[str, object],
) -> dict[str, object]:
    """The options of a call, by name, and those that were not given.

    Args:
        function: what will be called.
        given: its first arguments.
        options: its options, as the user gave them.

    Returns:
        The options, as far as the function's signature tells them.

    Raises:
        VmapSafeTypeError: the function has no such option, or needs another one.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        return dict(options)
    try:
        bound = signature.bind_partial(*given, **options)
    except TypeError as error:
        raise VmapSafeTypeError(
            "over(...)", f"{described(function)}: {error}", "See its arguments"
        ) from None
    bound.apply_defaults()
    found = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            if name not in bound.arguments:
                raise VmapSafeTypeError(
                    "over(...)",
                    f"{described(function)} needs {name}=",
                    f"Write over(..., {name}=...)",
                )
            found[name] = bound.arguments[name]
        elif parameter.kind is parameter.VAR_KEYWORD:
            found.update(bound.arguments.get(name, {}))
    return found


def digest(values: Iterable[object]) -> str:
    """A digest of tensors, by their values, and of other things, by their repr."""
    found = hashlib.sha256()
    for value in values:
        if not isinstance(value, Tensor):
            found.update(repr(value).encode())
        elif not is_lazy(value):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def described(value: Any) -> str:
    """In words that are the same in another process."""
    if isinstance(value, functools.partial):
        given = [*value.args, *sorted(value.keywords.items())]
        return f"{described(value.func)} with {[described(v) for v in given]}"
    if isinstance(value, nn.Module):
        tensors = digest([*value.state_dict().values()])
        return (
            f"{type(value).__qualname__} {_digest_of_text(_settings(value))} {tensors}"
        )
    if isinstance(value, Quantity):
        kind = type(value)
        held = {name: described(v) for name, v in sorted(_fields(value).items())}
        return f"{kind.__module__}.{kind.__qualname__} {held}"
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{getattr(value, '__module__', '')}.{name}"
    if isinstance(value, Tensor):
        return digest([value])
    if _is_array(value):  # whose own repr leaves numbers out
        return f"{value.dtype} {value.shape} {_digest_of_text(repr(value.tolist()))}"
    if isinstance(value, Mapping):
        return repr({str(k): described(v) for k, v in sorted(value.items())})
    if isinstance(value, Collection) and not isinstance(value, (str, bytes)):
        parts = [described(v) for v in value]
        return repr(sorted(parts) if isinstance(value, Set) else parts)
    return repr(value)


def number_of(things: Any) -> int | None:
    """Their number, if they know it."""
    try:
        return len(things)
    except TypeError:
        return None


def _written(value: object) -> str:
    """What a user's function does: its own code, and the values that it holds.

    A function of a library is known by its name.
    """
    if isinstance(value, functools.partial):
        return _written(value.func)
    if inspect.ismethod(value):
        return _written(value.__func__) + _written(value.__self__)
    if isinstance(value, Mapping):
        return "".join([_written(v) for _, v in sorted(value.items(), key=str)])
    if isinstance(value, Quantity):
        fields = "".join([_written(v) for _, v in sorted(_fields(value).items())])
        return fields + "".join([_written_class(kind) for kind in type(value).__mro__])
    module = str(getattr(value, "__module__", ""))
    if module.partition(".")[0] in ("torch", "vmapsafe", "builtins"):
        return ""
    if inspect.isfunction(value):
        cells = zip(value.__code__.co_freevars, value.__closure__ or ())
        held = {name: _contents(cell) for name, cell in cells}
        given = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        held |= {f"default {i}": default for i, default in enumerate(given)}
        return f"{_code(value.__code__)}{_plain(held)}"
    if callable(value) and not isinstance(value, (type, nn.Module)):
        call = getattr(type(value), "__call__")  # noqa: B004
        return _written(call) + _plain(getattr(value, "__dict__", {}))
    return ""


def _fields(value: object) -> dict[str, object]:
    """The attributes of an object, those in slots included."""
    slots = [n for kind in type(value).__mro__ for n in _slots(kind)]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> list[str]:
    named = vars(kind).get("__slots__", ())
    return [named] if isinstance(named, str) else list(named)


def _written_class(kind: type) -> str:
    """What the methods of a user's class do."""
    if kind.__module__.partition(".")[0] in ("torch", "vmapsafe", "builtins"):
        return ""
    own = sorted(vars(kind).items())
    return "".join([_written(v) for _, v in own if inspect.isfunction(v)])


def _code(code: CodeType) -> list[object]:
    constants = [_code(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    # Of ``x in {...}``, which has no order.
    constants = [
        sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in constants
    ]
    return [code.co_code.hex(), code.co_names, constants]


def _plain(values: Mapping[str, object]) -> str:
    """Those that are numbers, texts and the like, tuples of such, tensors, arrays, or
    functions."""
    found = {
        name: described(value) + _written(value)
        for name, value in sorted(values.items())
        if _is_plain(value) or inspect.isfunction(value)
    }
    return f" {found}" if found else ""


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, frozenset)):  # in a list a function may keep a log
        return all(map(_is_plain, value))
    kinds = (bool, int, float, complex, str, bytes, type(None), torch.dtype, Tensor)
    return isinstance(value, kinds) or _is_array(value)


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _settings(net: nn.Module) -> str:
    """What a network is, apart from its tensors, flags and code."""
    said = [
        f"{path} {type(module).__qualname__} {module.extra_repr()} "
        + _plain({k: v for k, v in vars(module).items() if k not in _OF_ANY_MODULE})
        for path, module in net.named_modules(remove_duplicate=False)
    ]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(said))


_OF_ANY_MODULE = frozenset(vars(nn.Module()))  # its flag, tensors, parts and hooks


def _precision(device: torch.device) -> str:
    """The dtypes that operations compute in by themselves."""
    said = str(torch.get_default_dtype())
    if torch.is_autocast_enabled(device.type):
        said += f", autocast to {torch.get_autocast_dtype(device.type)}"
    return said


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
