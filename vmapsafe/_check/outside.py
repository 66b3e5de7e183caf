"""Modules that a model calls and does not register, out of the reach of a block.

``self.__dict__["backbone"] = net``, a list ``self.parts = [net]`` or a global keep a
module out of ``model.modules()``. A block around the model cannot know it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from vmapsafe._check.finding import HAND_OVER, Finding
from vmapsafe._check.layers import findings_of_layers
from vmapsafe._check.question import Question
from vmapsafe._modes import MODES, ModeName


class Outside(NamedTuple):
    """A module outside, with layers that a block should cover.

    Attributes:
        module: the module.
        path: its name in the model, which leads through attributes; "" where none does.
        layers: the classes of its layers that matter.
        unsafe: the modes in which the model is not safe unless the block covers it.
        refused: whether a block cannot cover it.
    """

    module: nn.Module
    path: str
    layers: tuple[str, ...]
    unsafe: tuple[ModeName, ...]
    refused: bool

    @property
    def code(self) -> str:
        """What to write to hand it over."""
        if not self.path:
            return "the_other_module"
        atoms = self.path.split(".")
        return "model" + "".join(f"[{a}]" if a.isdecimal() else f".{a}" for a in atoms)

    def in_copy(self, net: nn.Module) -> nn.Module:
        """The module that a copy of the model calls."""
        for path, module in _held(net):
            if path == self.path:
                return module
        return self.module  # a copy of the model does not copy what no attribute holds


def outside(
    question: Question, net: nn.Module, called: Mapping[nn.Module, bool]
) -> list[Outside]:
    """What a run has called and should be handed over.

    Args:
        question: which modes, with which options.
        net: the copy that has run.
        called: the modules that ran and are not part of it, and whether a tensor of
            theirs was written.

    Returns:
        The modules, outermost ones only.
    """
    inside = set(net.modules())  # also what the run has made and registered
    around: dict[nn.Module, tuple[str, nn.Module]] = {}
    # A module is called before those in it.
    for path, holder in [*_held(net), *[("", module) for module in called]]:
        if holder not in inside:
            for module in holder.modules():
                around.setdefault(module, (path, holder))
    roots: dict[nn.Module, tuple[str, list[nn.Module]]] = {}
    for module in called:
        if module not in inside:
            path, root = around[module]
            roots.setdefault(root, (path, []))[1].append(module)
    found = []
    for root, (path, modules) in roots.items():
        about = replace(question, net=root, modules=dict(root.named_modules()))
        layers = [f for f in findings_of_layers(about) if f.kind != "random"]
        kinds = [f.module for f in layers]
        kinds += [type(module).__name__ for module in modules if called[module]]
        if kinds:
            writes = any([called[m] for m in modules])
            writes = writes or any([f.kind == "writes buffers" for f in layers])
            unsafe = [m for m in question.modes if writes or MODES[m].by_rule]
            refused = any([f.kind == "unsupported" for f in layers])
            unsafe = [*question.modes] if refused else unsafe
            names = tuple(dict.fromkeys(kinds))
            found.append(Outside(root, path, names, tuple(unsafe), refused))
    return found


def finding_of(question: Question, found: Outside) -> Finding:
    """What the report says of a module outside."""
    kind = type(found.module).__name__
    where = "" if found.path else ", and which no attribute of the model holds"
    return Finding(
        path=found.path,
        module=kind,
        kind="not registered",
        detail=f"the model calls it and does not register it{where}, so a block around "
        f"the model does not cover its {', '.join(found.layers)}",
        becomes=dict.fromkeys(question.modes, "covered if it is handed over as well"),
        safe={mode: mode not in found.unsafe for mode in question.modes},
        advice=f"Register it, or hand it over as well: vmap_safe(model, {found.code}).",
        needs=HAND_OVER,
        named=found.code,
    )


def _held(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What attributes of the model's modules hold, by path; registered ones too."""
    seen: set[int] = set()
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            yield from _in_value(value, f"{path}.{name}" if path else name, 3, seen)


def _in_value(
    value: object, path: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif depth == 0 or id(value) in seen or isinstance(value, (Tensor, type)):
        return
    elif isinstance(value, (list, tuple)):
        seen.add(id(value))
        for i, item in enumerate(value):
            yield from _in_value(item, f"{path}[{i}]", depth - 1, seen)
    elif isinstance(value, dict):
        seen.add(id(value))
        for key, item in value.items():
            yield from _in_value(item, f"{path}[{key!r}]", depth - 1, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        seen.add(id(value))
        for name, item in vars(value).items():
            yield from _in_value(item, f"{path}.{name}", depth - 1, seen)
