"""What backward runs again: in the block it was made in, or refused.

Activation checkpointing, reversible networks and adjoint ODE solvers run a forward
again during backward, which sees none of its thread's modes, and may come after the
block. Python code runs in backward from three places, and each is told when it is made
in which blocks that was:

* the backward of an autograd.Function: while a block is open, a new node notes it;
* the unpacking of a saved tensor, as non-reentrant checkpoints use it: while somebody
  else's hooks for saved tensors are in force, ours take their place call by call;
* a hook on a tensor.

While those blocks are open, that code runs in them, in whatever thread. After one has
closed, a forward of its layers, or a write to its buffers, is refused with words. A
graph that was made outside all blocks is left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vmapsafe._block import open_blocks
from vmapsafe._errors import BlockError
from vmapsafe._torch import (
    BackwardCFunction,
    TorchFunctionMode,
    below_modes,
    handle_torch_function,
    hooks_are_enabled,
    innermost_mode,
    modes_in_force,
    put_on,
    take_off_innermost,
    top_hooks,
)

Hooks = tuple[Callable[[Any], Any], Callable[[Any], Any]]


@contextmanager
def in_blocks(blocks: Sequence[Any]) -> Iterator[None]:
    """What is computed here, in backward, is computed in these blocks."""
    standing = {id(mode) for mode in modes_in_force()}
    found = [_open_or_refusing(block) for block in blocks]
    modes = [mode for mode in found if id(mode) not in standing]
    open_ones = tuple([b for b in found if not isinstance(b, Refusing)])
    with open_blocks.instead(open_ones), _pushed(modes):
        yield


@contextmanager
def _pushed(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    pushed = 0
    try:
        for mode in modes:
            put_on(mode)
            pushed += 1
        yield
    finally:
        for _ in range(pushed):
            take_off_innermost()


def _open_or_refusing(block: Any) -> Any:
    """The block; or one of this thread that means the same for its models; or what
    refuses them."""
    if block.alive:
        return block
    for other in reversed(open_blocks.blocks()):
        if other.alive and other.options.agree(block.options):
            if all([model.root in other.covers for model in block.models]):
                return other
    return Refusing(block)


class Refusing(TorchFunctionMode):
    """The mode in which backward runs what was made in a block that has closed."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self._block = block

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        layer = self._block.refused(func, args, kwargs)
        if layer is not None:
            raise BlockError(
                "backward",
                f"{layer} ran inside a vmap_safe block and is to run again after "
                "it, as under torch.utils.checkpoint, where it would compute "
                "something else",
                "Call backward inside the block",
            )
        return func(*args, **kwargs)


# -- Backward of an autograd.Function -------------------------------------------------


def listen() -> None:
    """A block opens: nodes note from now on in which blocks of their thread they are
    made. It stays so: taking it back would cost each block 0.2 ms, a node costs 0.3 us.
    """
    if vars(BackwardCFunction).get("__init__") is not _made:
        BackwardCFunction.__init__ = _made  # type: ignore[method-assign, assignment]


def _made(node: Any) -> None:
    if open_blocks.blocks() and not node._forward_cls.__module__.startswith(
        "vmapsafe."
    ):
        blocks = tuple([block for block in open_blocks.in_force() if block.alive])
        node.apply = _Apply(node, blocks)


class _Apply:
    """Takes the place of a node's ``apply``, which runs its backward."""

    def __init__(self, node: Any, blocks: tuple[Any, ...]) -> None:
        self._node = weakref.ref(node)
        self._blocks = blocks

    def __call__(self, *grads: Any) -> Any:
        node = self._node()
        with in_blocks(self._blocks):
            kind: Any = type(node)
            return kind.apply(node, *grads)


# -- Saved tensors --------------------------------------------------------------------


def foreign_hooks() -> Hooks | None:
    """The hooks for saved tensors in force, if there are any that are not ours."""
    hooks: Hooks | None = top_hooks(True)
    if hooks is None or isinstance(hooks[1], _Unpack):
        return None
    return hooks if hooks_are_enabled() else None


def unpacking_in(blocks: tuple[Any, ...], hooks: Hooks) -> saved_tensors_hooks:
    """A context in which tensors are saved by these hooks, and unpacked in blocks."""
    pack, unpack = hooks
    return saved_tensors_hooks(pack, _Unpack(unpack, blocks))


class _Unpack:
    def __init__(self, unpack: Callable[[Any], Any], blocks: tuple[Any, ...]) -> None:
        self._unpack = unpack
        self._blocks = blocks

    def __call__(self, packed: Any) -> Any:
        with in_blocks(self._blocks):
            return self._unpack(packed)


# -- Hooks, and operators that call functions ------------------------------------------

HOOKING = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}


def hooked(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call that hooks something to a tensor, so that it runs in the
    blocks of now."""
    if len(args) != 2:
        return args
    hook, blocks = args[1], open_blocks.in_force()

    def run(tensor: Tensor) -> Any:
        with in_blocks(blocks):
            return hook(tensor)

    return args[0], run


class Passed:
    """An operator that calls functions of the user's, among them the forward of an
    autograd.Function under a transform, on its way down the modes. Each takes itself
    off the stack to hand it on; those that ask for it are in force again inside."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.__name__ = operator.name()
        self.inside: list[TorchFunctionMode] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if innermost_mode() is not None:
            return handle_torch_function(self, (), *args, **kwargs)
        with _pushed(self.inside):
            return below_modes(self.operator, args, kwargs)
