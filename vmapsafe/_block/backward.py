"""Code that runs in backward: it runs in the blocks it was made in, or is refused.

Activation checkpointing, reversible networks and adjoint ODE solvers run a forward
again during backward. Backward has none of its thread's modes, and may come after the
block. Python code runs in backward from three places. Each of them records, when it is
made, which blocks are open:

* the backward of an autograd.Function: each node made in a block records them;
* the unpacking of a saved tensor, as non-reentrant checkpoints use it: if hooks for
  saved tensors are in force that are not ours, ours replace them in each call;
* a hook on a tensor.

While those blocks are open, the code runs in them, in whatever thread. After one of
them has closed, a forward of its layers, or a write to its buffers, is an error. A
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
from vmapsafe._block.open_blocks import Open
from vmapsafe._errors import BlockError
from vmapsafe._torch import (
    BackwardCFunction,
    TorchFunctionMode,
    below_modes,
    forward_class_of,
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
def in_blocks(blocks: Sequence[Open]) -> Iterator[None]:
    """A context for code in backward, which runs in these blocks."""
    standing = modes_in_force()
    found = [_open_or_refusing(block) for block in blocks]
    modes = [one for one in found if isinstance(one, TorchFunctionMode)]
    modes = [mode for mode in modes if mode not in standing]
    open_ones = tuple([one for one in found if not isinstance(one, Refusing)])
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


def _open_or_refusing(block: Open) -> Open | Refusing:
    """The block, if it is open; or one of this thread that does the same for its
    models; or a mode that refuses them."""
    if block.alive:
        return block
    for other in reversed(open_blocks.blocks()):
        if other.alive and other.options.agree(block.options):
            if all([model.root in other.covers for model in block.models]):
                return other
    return Refusing(block)


class Refusing(TorchFunctionMode):
    """The mode in which backward runs what was made in a block that has closed."""

    def __init__(self, block: Open) -> None:
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
                f"{layer} ran inside a vmap_safe block and would run again after it, "
                "as under torch.utils.checkpoint, and compute something else there",
                "Call backward inside the block",
            )
        return func(*args, **kwargs)


# -- Backward of an autograd.Function -------------------------------------------------


def listen() -> None:
    """Let each node record, from now on, in which blocks of its thread it is made.

    This is not undone. Undoing it would cost each block 0.2 ms; a node costs 0.3 us.
    """
    if vars(BackwardCFunction).get("__init__") is not _made:
        BackwardCFunction.__init__ = _made  # type: ignore[method-assign, assignment]


def _made(node: Any) -> None:
    if open_blocks.blocks() and not forward_class_of(node).__module__.startswith(
        "vmapsafe."
    ):
        blocks = tuple([block for block in open_blocks.in_force() if block.alive])
        node.apply = _Apply(node, blocks)


class _Apply:
    """Replaces a node's ``apply``, which runs its backward."""

    def __init__(self, node: Any, blocks: tuple[Open, ...]) -> None:
        self._node = weakref.ref(node)
        self._blocks = blocks

    def __call__(self, *grads: Any) -> Any:
        node = self._node()
        with in_blocks(self._blocks):
            kind: Any = type(node)
            return kind.apply(node, *grads)


# -- Saved tensors --------------------------------------------------------------------


def foreign_hooks() -> Hooks | None:
    """The hooks for saved tensors in force, if they are not ours."""
    hooks: Hooks | None = top_hooks(True)
    if hooks is None or isinstance(hooks[1], _Unpack):
        return None
    return hooks if hooks_are_enabled() else None


def unpacking_in(blocks: tuple[Open, ...], hooks: Hooks) -> saved_tensors_hooks:
    """A context in which these hooks save tensors, and unpack them in the blocks."""
    pack, unpack = hooks
    return saved_tensors_hooks(pack, _Unpack(unpack, blocks))


class _Unpack:
    def __init__(self, unpack: Callable[[Any], Any], blocks: tuple[Open, ...]) -> None:
        self._unpack = unpack
        self._blocks = blocks

    def __call__(self, packed: Any) -> Any:
        with in_blocks(self._blocks):
            return self._unpack(packed)


# -- Hooks, and operators that call functions ------------------------------------------

HOOKING = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}


def hooked(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call that registers a hook; it will run in these blocks."""
    if len(args) != 2:
        return args
    hook, blocks = args[1], open_blocks.in_force()

    def run(tensor: Tensor) -> Any:
        with in_blocks(blocks):
            return hook(tensor)

    return args[0], run


class Passed:
    """An operator that calls functions of the user, on its way down the modes.

    One of these functions is the forward of an autograd.Function under a transform.
    Each mode takes itself off the stack to hand the operator on. The modes in
    ``inside`` are in force again while the functions run.
    """

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.__name__ = operator.name()
        self.inside: list[TorchFunctionMode] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if innermost_mode() is not None:
            return handle_torch_function(self, (), *args, **kwargs)
        with _pushed(self.inside):
            return below_modes(self.operator, args, kwargs)
