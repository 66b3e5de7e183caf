"""The classes that modules have while a block covers them: their own, and half ours.

``torch.nn.utils.parametrize`` gives a module a class of its own in the same way. Here,
the class changes what a module does in the threads in which a block is open, and in no
other:

* A normalisation layer *shows* the flags that the block wants: ``training`` and
  ``track_running_stats`` are properties. Other threads, copies and ``vars(layer)`` have
  the owner's flags, and an assignment changes the owner's flag.
* If the forward of a module that is not torch's own assigns a buffer,
  ``self.mean = …``, the old buffer is put back when the forward returns.

Other modules keep their class.

So only the class of a module has to be put back, and a class that an interrupt leaves
behind shows the owner's flags.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, SupportsIndex

import torch
from torch import nn

from vmapsafe._block import open_blocks
from vmapsafe._block.covered import Buffers
from vmapsafe._block.open_blocks import Open
from vmapsafe._errors import BlockError
from vmapsafe._modes import Flags
from vmapsafe._torch import (
    LISTS_VARS_WHILE_COMPILING,
    constant_while_compiling,
    is_wrapped,
    run_while_compiling,
)

_compiling = torch.compiler.is_compiling


def owners_flags(module: nn.Module) -> Flags:
    """The flags that a module has outside all blocks."""
    return Flags(owners_training(module), _owners(module, "track_running_stats"))


def owners_training(module: nn.Module) -> bool:
    """Whether a module is in training mode outside all blocks."""
    return bool(_owners(module, "training"))


def _owners(module: nn.Module, name: str) -> Any:
    if not is_switched(module):
        return getattr(module, name, None)
    given = module.__dict__
    return given[name] if name in given else getattr(own_class(module), name, None)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has outside all blocks."""
    kind = type(module)
    return kind._vmapsafe_own if issubclass(kind, Switched) else kind


def is_switched(module: nn.Module) -> bool:
    """Whether the class of a module is half ours."""
    return isinstance(type(module), type) and issubclass(type(module), Switched)


_set_class: Callable[[object, type], None]
_set_class = object.__dict__["__class__"].__set__


def give_class(module: nn.Module, parts: tuple[type, ...]) -> None:
    """Give a module its own class with these parts of ours in front, and no others."""
    kind = type(module)
    if issubclass(kind, Switched):
        if kind._vmapsafe_parts == parts:
            return
        kind = kind._vmapsafe_own
    _set_class(module, _with(kind, parts) if parts else kind)


_of_torch: dict[tuple[type, tuple[type, ...]], type] = {}


def _with(own: type[nn.Module], parts: tuple[type, ...]) -> type:
    """The class ``own`` with parts of ours in front of it."""
    found = _of_torch.get((own, parts))
    if found is not None:
        return found
    for known in own.__subclasses__():
        if known.__dict__.get("_vmapsafe_parts") == parts:
            return known
    # This calls neither the metaclass nor the class's own hooks for new classes.
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
    if of_torch(own):  # this table would keep other classes alive
        _of_torch[own, parts] = made
    return made


def of_torch(kind: type) -> bool:
    """Whether a class of modules is one of torch's own."""
    return is_torchs(kind.__module__)


def is_torchs(name: str | None) -> bool:
    """Whether a Python module of this name belongs to torch.

    Functions that ``exec`` makes may have no name of a module.
    """
    return name is not None and name.partition(".")[0] == "torch"


class Switched(nn.Module):
    """The base of our halves."""

    _vmapsafe_own: type[nn.Module]
    _vmapsafe_parts: tuple[type, ...]

    def __init_subclass__(cls, **options: object) -> None:
        """Do nothing: the hook of the class that is switched is not called."""

    # As unittest.mock shows a class: code that asks, such as the class's own
    # __deepcopy__, gets a class that outlives the block.
    __class__ = property(
        lambda self: type(self)._vmapsafe_own,
        lambda self, kind: _set_class(self, kind),
    )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # Copies and pickles are of the owner's class.
        block = covering(self)
        reduced: Any = super().__reduce_ex__(protocol)
        how, given, *rest = reduced
        ours = type(self)
        if block is not None:
            block.copied = True
            # A pickle would store what is called here.
            if sys._getframe(1).f_globals.get("__name__") == "copy":
                how = _noting(block, self, how)
        given = tuple([ours._vmapsafe_own if a is ours else a for a in given])
        return (how, given, *rest)


def _noting(
    block: Open, original: nn.Module, make: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    """``make``, whose results the block knows as copies."""

    def noting(*given: Any) -> nn.Module:
        made = make(*given)
        block.copies[made] = original
        return made

    return noting


# -- Flags -----------------------------------------------------------------------------


def _shown(index: int, name: str) -> property:
    @run_while_compiling
    def get(self: nn.Module) -> Any:
        if torch.compiler.is_dynamo_compiling():  # torch 2.11 and 2.14 trace this
            given = self.__dict__ if LISTS_VARS_WHILE_COMPILING else _traced(self)
            return given[name]
        block = covering(self)
        layer = None if block is None else block.layers.get(self)
        if block is not None and layer is not None:
            block.see_to_the_rules()
            shown = layer.shown[index]
            if shown is not None:
                return shown
        found = _owners(self, name)
        if found is None:
            raise AttributeError(name)
        return found

    @run_while_compiling
    def put(self: nn.Module, value: object) -> None:
        self.__dict__[name] = value

    return property(get, put)


def _traced(module: nn.Module) -> dict[str, Any]:
    """``vars(module)``, in which that of torch 2.11 would find the property again."""
    for block in open_blocks.everywhere():
        for model in block.models:
            if module in model.given:
                return model.given[module]
    raise AttributeError


class ShowsFlags(Switched):
    """A normalisation layer."""

    training = _shown(0, "training")
    track_running_stats = _shown(1, "track_running_stats")

    # These two read the owner's flags.

    def reset_running_stats(self) -> None:
        _refuse_update_bn(self)
        with open_blocks.instead(()):
            super().reset_running_stats()  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with open_blocks.instead(()):
            super()._load_from_state_dict(*args, **kwargs)


class InEval(ShowsFlags):
    """A layer that shows eval mode, and for which there is no rule.

    It is not torch's own, or it computes with its process group. torch.compile sees the
    owner's flags, so the flag is set while it traces the forward.
    """

    _traced_in_training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (_compiling() and _in_a_block()):
            return super().forward(*args, **kwargs)
        # Not by the property, whose setter torch.compile of 2.12 cannot guard.
        given = self.__dict__
        before = given["training"]
        given["training"] = self._traced_in_training
        output = super().forward(*args, **kwargs)
        given["training"] = before
        return output


class InTraining(InEval):
    """The same for a layer that shows training mode."""

    _traced_in_training = True


def _refuse_update_bn(layer: nn.Module) -> None:
    """Raise if ``torch.optim.swa_utils.update_bn`` is about to reset statistics.

    Forwards in this block would not compute them again.
    """
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
        "forwards in this block do not write running statistics, so update_bn would "
        "leave them reset",
        'Call it outside the block, or use mode="sync" with '
        "update_running_stats=True",
    )


def covering(module: nn.Module) -> Open | None:
    """The innermost open block of this thread that covers a module."""
    for block in reversed(open_blocks.in_force()):
        if module in block.covers and block.alive:
            return block
    return None


@constant_while_compiling
def _in_a_block() -> bool:
    """Whether a block is open. torch.compile guards the modes in force, and so this."""
    return any([block.alive for block in open_blocks.in_force()])


# -- Buffers that a forward assigns ----------------------------------------------------


class PutsBack(Switched):
    """A module that may assign buffers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _putting_back(self, super().forward, args, kwargs)


class PutsBackAroundCalls(PutsBack):
    """The same, where an attribute ``forward`` or a hook may assign them."""

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


def kept_by_forwards() -> dict[nn.Module, Buffers]:
    """The buffers that modules had when the outermost running forward began.

    They are read from the frames of this thread, and so known of modules that may
    assign buffers.
    """
    found: dict[nn.Module, Buffers] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _putting_back.__code__:
            found.update(frame.f_locals.get("kept", ()))  # the outermost comes last
        frame = frame.f_back
    return found


def _put_back(
    kept: Sequence[tuple[nn.Module, Buffers]],
) -> list[tuple[nn.Module, str]]:
    return [
        (owner, name)
        for owner, before in kept
        for name in put_buffers_back(owner, before)
    ]


def kept_buffers(module: nn.Module) -> list[tuple[nn.Module, Buffers]]:
    """The buffers registered in a module and in those below it."""
    return [(m, dict(m._buffers)) for m in module.modules() if m._buffers]


def put_buffers_back(module: nn.Module, before: Buffers) -> tuple[str, ...]:
    """Undo ``self.mean = …``: register the same tensors under the same names.

    A tensor of another shape stays: it is a table that was built or has grown, and what
    the module stores about it, such as its size, would not fit the old one.

    Args:
        module: the module.
        before: its buffers as they were.

    Returns:
        The names of the buffers that were put back.
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
