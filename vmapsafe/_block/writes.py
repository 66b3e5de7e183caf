"""What a call writes, and which buffer of a model that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vmapsafe._block.covered import Model
from vmapsafe._torch import (
    OpOverloadPacket,
    base_of,
    is_wrapped,
    lies_alone,
    schema_of,
    shares_memory,
    tree_flatten,
)

_compiling = torch.compiler.is_compiling

# Functions that write to several tensors, as their operators' schemas say.
WRITE_SEVERAL = frozenset(
    [
        torch.fused_moving_avg_obs_fake_quant,
        *[
            getattr(torch, name)
            for name in dir(torch)
            if name.startswith("_foreach_") and name.endswith("_")
        ],
    ]
)


class BuffersOf:
    """The buffers of the models of a block."""

    def __init__(self, models: tuple[Model, ...]) -> None:
        self._owners = [module for model in models for module in model.buffered]
        self._below: dict[nn.Module, list[nn.Module]] = {}

    def owner_of(self, tensor: Tensor) -> tuple[nn.Module, str] | None:
        """The module and the name of the buffer that shares memory with ``tensor``."""
        base = None if _compiling() or is_wrapped(tensor) else base_of(tensor)
        for module in self._owners:
            for buffer in module._buffers.values():
                if buffer is not None and (buffer is tensor or buffer is base):
                    names = [n for n, b in module._buffers.items() if b is buffer]
                    return module, names[0]
        if not self._owners or (not _compiling() and lies_alone(tensor, base)):
            return None
        buffers = [
            (module, name, buffer)
            for module in self._owners
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        shared = shares_memory(tensor, [buffer for _, _, buffer in buffers])
        return None if shared is None else buffers[shared][:2]

    def below(self, module: nn.Module) -> list[nn.Module]:
        """The modules with buffers in ``module``, itself included."""
        found = self._below.get(module)
        if found is None:
            found = [m for m in module.modules() if m._buffers]
            self._below[module] = found
        return found


def writes_by_schema(func: Callable[..., object]) -> bool:
    """Whether the schema of an operator says what a function writes.

    Overloads do not count: torch.compile calls them in code that it has made, which may
    write.
    """
    return func in WRITE_SEVERAL or isinstance(func, OpOverloadPacket)


def written_by(
    func: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """The tensors that a function writes, as the schema of its operator says."""
    if func in WRITE_SEVERAL:
        func = getattr(torch.ops.aten, func.__name__)
    overloads: list[Any] = [func]
    if isinstance(func, OpOverloadPacket):
        names: list[str] = func.overloads()  # type: ignore[no-untyped-call]
        overloads = [getattr(func, name) for name in names]
    written: dict[int, Tensor] = {}  # each once
    for overload in overloads:
        for i, argument in enumerate(schema_of(overload).arguments):
            if argument.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                tensors = [t for t in tree_flatten(given)[0] if isinstance(t, Tensor)]
                written.update({id(tensor): tensor for tensor in tensors})
    return list(written.values())
