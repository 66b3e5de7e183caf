"""What a block covers: one model, and its normalisation layers, as found at entry."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from vmapsafe._errors import a_kind
from vmapsafe._modes import Flags

Buffers = dict[str, Tensor | None]


class Layer(NamedTuple):
    """The flags of a normalisation layer.

    Attributes:
        shown: what it shows in the block; the owner's flags if it is frozen.
        frozen: whether its owner has put it in eval mode in a model in training mode.
        owners: what it shows outside all blocks.
    """

    shown: Flags
    frozen: bool
    owners: Flags


@dataclass(eq=False)
class Model:
    """One module handed to a block, as it was found at entry.

    Attributes:
        root: the module, without its wrappers.
        paths: the name in the model of every module in it, the root first.
        layers: the normalisation layers among them.
        buffered: the modules that own buffers.
        parts: for each module, the classes of ours that its class gets in front.
        given: the ``vars()`` of these modules.
        scripted: the ``training`` flags of TorchScript layers, which cannot get one.
        computed: of modules with hooks before their forward, the attributes that are
            tensors.
        names: of modules with parameters, the names of these.
        device: the type of device of its first parameter or buffer.
        kept: the buffers, while torch.compile traces.
    """

    root: nn.Module
    paths: dict[nn.Module, str]
    layers: dict[nn.Module, Layer] = field(default_factory=dict)
    buffered: list[nn.Module] = field(default_factory=list)
    parts: dict[nn.Module, tuple[type, ...]] = field(default_factory=dict)
    given: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    scripted: dict[nn.Module, bool] = field(default_factory=dict)
    computed: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)
    names: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)
    device: str = "cpu"
    kept: list[tuple[nn.Module, Buffers]] = field(default_factory=list)

    @property
    def modules(self) -> Collection[nn.Module]:
        """Every module in it, the root first."""
        return self.paths.keys()

    def path(self, module: nn.Module) -> str:
        """The module's name in the model, "" for the root."""
        if module in self.paths:
            return self.paths[module]
        return f"<{a_kind(module)} that was not part of the model>"

    def label(self, module: nn.Module) -> str:
        """``'layer1.0.bn1' (BatchNorm2d)``, for errors."""
        name = self.path(module) or "the model itself"
        return f"'{name}' ({type(module).__name__})"
