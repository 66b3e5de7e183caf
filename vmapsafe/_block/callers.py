"""Which layer of a model makes a call, and what a rule may ask about it.

Nothing is stored about what is running. The layer that calls ``F.batch_norm`` is found
at each call: by the buffers it passes, else by the Python frames that called, else by
its weight. So an interrupt cannot leave anything behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe._block.covered import Layer, Model
from vmapsafe._block.models import process_group
from vmapsafe._block.open_blocks import Open
from vmapsafe._block.switched import kept_by_forwards
from vmapsafe._modes import Mode, NumGroups, RowsName
from vmapsafe._torch import LISTS_VARS_WHILE_COMPILING, batched_levels

_compiling = torch.compiler.is_compiling

# The calls of normalisation layers.
OF_LAYERS = (F.batch_norm, F.instance_norm)
# The functions below them: the call that each stands for, and the arguments' names.
_FIRST = ("input", "weight", "bias", "running_mean", "running_var")
_LAST = ("momentum", "eps", "cudnn_enabled")
BELOW_LAYERS: dict[Callable[..., Any], tuple[Callable[..., Any], tuple[str, ...]]] = {
    torch.batch_norm: (F.batch_norm, (*_FIRST, "training", *_LAST)),
    torch.instance_norm: (F.instance_norm, (*_FIRST, "use_input_stats", *_LAST)),
}


class Callers:
    """The normalisation layers of a block, among which callers are found."""

    def __init__(self, layers: dict[nn.Module, Layer], mode: Mode) -> None:
        self._layers = layers
        self._mode = mode
        self._in_order = list(layers)
        self._next = 0

    def as_of_a_layer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """A call of a function in BELOW_LAYERS, written as layers write it.

        If a layer of the block does not make the call, it stays as it is.
        """
        function, names = BELOW_LAYERS[func]
        bound = {**dict(zip(names, args)), **kwargs}
        if self.find(bound) is None:
            return func, args, kwargs
        bound.pop(names[-1])
        return function, (), bound

    def find(self, bound: Mapping[str, Any]) -> nn.Module | None:
        """The layer that makes a call with these arguments.

        It is the layer whose buffers or weights the call passes, or, if it passes none
        of them, the layer whose forward is calling.
        """
        mean = bound["running_mean"]
        found = None if mean is None else self.with_mean(mean)
        if found is not None:
            if _compiling() or found._parameters.get("weight") is bound["weight"]:
                return found
            # Another layer may share the statistics.
            nearest = nearest_module()
            if nearest is None or nearest._buffers.get("running_mean") is not mean:
                return found
            return nearest if nearest in self._layers else None
        if _compiling():
            return self._by_weights(bound) or self._without_tensors(bound)
        if (
            mean is None
            or not self._mode.reads_running_stats
            or bound.get("training", True)
        ):
            nearest = nearest_module()
            if nearest in self._layers:
                return nearest
        return self._by_weights(bound)

    def with_mean(self, mean: Tensor) -> nn.Module | None:
        """The layer that has this tensor as its ``running_mean`` now."""
        # The layer after the one found last comes first: mostly, one look is enough.
        layers = self._in_order
        first = 0 if _compiling() else self._next
        for i in range(first, first + len(layers)):
            layer = layers[i % len(layers)]
            if (
                layer._buffers.get("running_mean") is mean
                or layer.__dict__.get("running_mean") is mean
            ):
                if not _compiling():
                    self._next = (i + 1) % len(layers)
                return layer
        return None

    def _by_weights(self, bound: Mapping[str, Any]) -> nn.Module | None:
        """The layer that has the weight or the bias.

        If several layers share it, and the call does not pass running statistics, a
        layer without them comes first.
        """
        for name in ("weight", "bias"):
            given = bound[name]
            if given is None:
                continue
            found = [
                layer
                for layer in self._in_order
                if layer._parameters.get(name) is given
                or layer.__dict__.get(name) is given
            ]
            if bound["running_mean"] is None:
                found.sort(key=lambda x: bool(self._layers[x].owners[1]))
            if found:
                return found[0]
        return None

    def _without_tensors(self, bound: Mapping[str, Any]) -> nn.Module | None:
        """A layer without any tensor that fits a call without any.

        torch.compile has no frames to look at, and all such layers do the same.
        """
        names = ("running_mean", "weight", "bias")
        if any([bound[name] is not None for name in names]):
            return None
        for layer in self._in_order:
            if getattr(layer, "num_features", None) == bound["input"].size(1):
                if not any([getattr(layer, n, None) is not None for n in names]):
                    return layer
        return None


@dataclass(slots=True)
class SiteInBlock:
    """Where a call is made, see :class:`vmapsafe._call.Site`: in which block, and by
    which covered layer, if by one."""

    block: Open
    module: nn.Module | None

    @property
    def layer(self) -> nn.Module | None:
        if self.module is None or self.block.layers[self.module].frozen:
            return None
        return self.module

    @property
    def stays_in_eval(self) -> bool:
        if self.module is None:
            return False
        return self.block.mode.reads_running_stats or self.layer is None

    @property
    def tracks(self) -> bool:
        assert self.module is not None
        return bool(self.block.layers[self.module].owners.track_running_stats)

    @property
    def num_groups(self) -> NumGroups:
        return self.block.options.num_groups

    @property
    def update_running_stats(self) -> bool:
        return self.block.options.update_running_stats

    @property
    def rows(self) -> RowsName:
        return self.block.options.rows

    @property
    def copies_at(self) -> int | None:
        return self.block.options.copies_at

    def merged_levels(self, tensor: Tensor) -> tuple[int, ...]:
        found = batched_levels((tensor,))
        if not found:
            return ()
        assert self.module is not None
        model = self.block.covers[self.module]
        own = batched_levels(_tensors(model)) - {self.copies_at}
        levels = sorted(found - own)
        wanted = self.block.options.sync_levels
        return tuple(levels if wanted is None else levels[-wanted:])

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return None if self.module is None else process_group(self.module)

    def path(self) -> str:
        if self.module is None:
            return "a call outside the model's layers"
        return self.block.covers[self.module].label(self.module)

    def holds(self, tensor: Tensor) -> bool:
        return self.block.owner_of_buffer(tensor) is not None

    def leaves_out(self, tensor: Tensor) -> bool:
        found = self.block.owner_of_buffer(tensor)
        if found is None or not in_a_forward(self.block.covers):
            return False
        self.block.leaves_out(*found)
        return True


# The names of parameters and buffers in torch's own classes begin so; and those of
# layers that vmap can run.
_PARAMETERS = ("weight", "bias", "running_", "in_proj_", *map("{}_proj_".format, "qkv"))
_USUAL = (
    *("weight", "bias", "running_mean", "running_var", "in_proj_weight"),
    *("in_proj_bias", *map("{}_proj_weight".format, "qkv"), "bias_k", "bias_v"),
)


def _tensors(model: Model) -> list[Tensor]:
    """The tensors that a model computes with.

    These are its parameters, its buffers as they were when the forward began, and
    plain attributes in the place of parameters, as older make_functional sets them.
    What a forward stores (``self.features = x``) is not among them.
    """
    found: list[Any] = []
    before = {} if _compiling() else kept_by_forwards()
    for module in model.modules:
        given, names = module.__dict__, model.names.get(module, ())
        found += given["_parameters"].values()
        found += before.get(module, given["_buffers"]).values()
        if _compiling() and not LISTS_VARS_WHILE_COMPILING:
            found += [given.get(name) for name in (*names, *_USUAL)]
            continue
        for name, value in given.items():
            if name in names or name.startswith(_PARAMETERS):
                found.append(value)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


# -- Frames ----------------------------------------------------------------------------


def in_a_forward(modules: Collection[nn.Module]) -> bool:
    """Whether a forward of one of these modules is running; True while compiling."""
    if _compiling():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("_call_impl", "forward"):
            if _module_of(frame) in modules:
                return True
        frame = frame.f_back
    return False


def nearest_module() -> nn.Module | None:
    """The module whose method is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = _module_of(frame)
        if found is not None:
            return found
        frame = frame.f_back
    return None


def _module_of(frame: FrameType) -> nn.Module | None:
    """The module of whose method this is a frame, or None."""
    code = frame.f_code
    if code.co_argcount == 0:
        return None
    name = code.co_varnames[0]
    if name != "self" and code.co_name != "forward":
        return None
    found = frame.f_locals.get(name)  # this makes a dict of all local variables
    return found if isinstance(found, nn.Module) else None
