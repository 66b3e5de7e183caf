"""One torch call, its arguments bound by name, and the place it was made from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from vmapsafe._modes import NumGroups, RowsName
from vmapsafe._torch import OpOverload, schema_of

Function = Callable[..., Any]


class Site(Protocol):
    """Where in a covered model a call was made: what a rule may ask about it."""

    @property
    def layer(self) -> nn.Module | None:
        """The covered layer that is running, unless its owner has frozen it."""

    @property
    def stays_in_eval(self) -> bool:
        """Whether a layer made it that must normalise as in eval mode."""

    @property
    def tracks(self) -> bool:
        """Whether the layer keeps running statistics outside the block."""

    @property
    def num_groups(self) -> NumGroups:
        """The block's ``num_groups``."""

    @property
    def update_running_stats(self) -> bool:
        """The block's ``update_running_stats``."""

    @property
    def rows(self) -> RowsName:
        """What the rows of ``per_sample_grads`` mean; "contribution" elsewhere."""

    @property
    def copies_at(self) -> int | None:
        """The vmap level whose slices have copies of the parameters, one each, for
        per-sample gradients; None elsewhere."""

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes over which a SyncBatchNorm layer takes its statistics, if there
        are several; None for every other layer."""

    def merged_levels(self, tensor: Tensor) -> tuple[int, ...]:
        """The vmap levels that "sync" merges for this input, the outermost first."""

    def path(self) -> str:
        """The running module's path in its model, for errors."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a buffer of the model, or shares its storage."""

    def leaves_out(self, tensor: Tensor) -> bool:
        """Whether a write to ``tensor`` must not happen, as a forward of the model
        writes a buffer there. Warns of a write that users may expect."""


@dataclass(frozen=True)
class Call:
    """A call of a torch function, bound by name.

    Attributes:
        function: the torch function called.
        arguments: its arguments by name, defaults filled in. A function without
            a Python signature (``Tensor.add_``) has its positional arguments under
            ``"0"``, ``"1"``, ….
        site: where in which model it was made; None outside a block.
        in_dims: the batch dimension of each argument, by name, for calls that hold
            whole batches, as tests do; empty inside a block, where the transforms
            hide it.
    """

    function: Function
    arguments: Mapping[str, Any]
    site: Site | None = None
    in_dims: Mapping[str, int | None] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


@dataclass(frozen=True)
class Signature:
    """The names of a torch function's parameters and their defaults."""

    names: tuple[str, ...]
    defaults: Mapping[str, Any]

    @staticmethod
    def of(function: Function) -> Signature:
        """Read them from the signature; empty if a function has none of its own."""
        if isinstance(function, OpOverload):
            arguments = schema_of(function).arguments
            return Signature(
                tuple(a.name for a in arguments),
                {a.name: a.default_value for a in arguments if a.has_default_value()},
            )
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:
            return Signature((), {})
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return Signature((), {})
        return Signature(
            tuple(p.name for p in parameters),
            {p.name: p.default for p in parameters if p.default is not p.empty},
        )

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Arguments by name, in order. torch.compile traces this: plain loops only."""
        names = self.names or tuple([str(i) for i in range(len(args))])
        bound: dict[str, Any] = dict(zip(names, args))
        for name in names[len(args) :]:
            if name in kwargs:
                bound[name] = kwargs[name]
            elif name in self.defaults:
                bound[name] = self.defaults[name]
        if len(bound) < len(args) + len(kwargs):
            bound.update(kwargs)  # of a function without a signature
        return bound


def slices(call: Call, size: int) -> list[Call]:
    """The calls of the slices of a call that holds whole batches, one by one."""
    batch = []
    for i in range(size):
        arguments = dict(call.arguments)
        for name, dim in call.in_dims.items():
            if dim is not None:
                arguments[name] = arguments[name].select(dim, i)
        batch.append(Call(call.function, arguments, call.site))
    return batch


def batch_size(call: Call) -> int:
    """The size that all batch dimensions of ``call`` have."""
    sizes = {
        call[name].size(dim) for name, dim in call.in_dims.items() if dim is not None
    }
    (size,) = sizes
    return int(size)


def batch_first(call: Call, name: str) -> Tensor:
    """A batched argument of ``call``, with its batch dimension in front."""
    value: Tensor = call[name]
    dim = call.in_dims[name]
    return value.movedim(dim, 0) if dim else value


def expanded(call: Call, name: str) -> Tensor:
    """An argument with a batch dimension in front, whether it is batched or not."""
    if call.in_dims[name] is not None:
        return batch_first(call, name)
    value: Tensor = call[name]
    return value.expand(batch_size(call), *value.shape)
