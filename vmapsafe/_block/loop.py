"""``fallback="loop"``: the slices one after another, where vmap refuses the code."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from vmapsafe._block import open_blocks
from vmapsafe._block.advice import module_of
from vmapsafe._block.covered import Model
from vmapsafe._block.refusals import Refusal, avoided_by_a_loop
from vmapsafe._draws import Draws
from vmapsafe._errors import (
    FallbackWarning,
    VmapSafeRuntimeError,
    VmapSafeValueError,
    a_kind,
    shown,
    warn_user,
    worded,
)
from vmapsafe._torch import (
    broadcast_to_leaves,
    innermost,
    tree_flatten,
    tree_unflatten,
)

T = TypeVar("T")
Fallback = Literal["error", "loop"]


def check_fallback(called: str, fallback: object, merges: bool) -> None:
    """Raise unless ``fallback`` is one, and makes sense.

    Args:
        called: the public function, for the error.
        fallback: what the user wrote.
        merges: whether slices share their statistics.

    Raises:
        VmapSafeValueError: it is another value, or a loop where slices share
            statistics.
    """
    if fallback not in ("error", "loop"):
        raise VmapSafeValueError(
            called,
            f"unknown fallback {shown(fallback)}",
            'Choose one of "error", "loop"',
        )
    if fallback == "loop" and merges:
        raise VmapSafeValueError(
            f'{called} with fallback="loop"',
            'in mode "sync" the slices share their statistics, so that they cannot run '
            "one after another",
            "Leave fallback out, or use another mode",
        )


def a_block_merges() -> bool:
    """Whether slices share their statistics in an open block of this thread."""
    return any([b.alive and b.mode.merges for b in open_blocks.blocks()])


# -- The attempt under vmap, and the loop ----------------------------------------------


def by_vmap_or_loop(
    called: str,
    by_vmap: Callable[[], T],
    by_loop: Callable[[], T],
    before: Before,
    models: Iterable[nn.Module],
    warns_of: object,
    quietly: Callable[[BaseException], bool] = lambda error: False,
) -> T:
    """Make a call under vmap, and by a loop if vmap refuses it.

    Args:
        called: the public function, for errors and warnings.
        by_vmap: makes the call.
        by_loop: makes it by a loop.
        before: what was before the call.
        models: for the names of layers, with those of the blocks that are open.
        warns_of: the class or the code of which a warning says once that it runs in a
            loop; None if no loop was asked for.
        quietly: whether an error starts a loop without being asked, and a warning.

    Returns:
        What either of them gives.

    Raises:
        RuntimeError: vmap's error, if no loop avoids it or none was asked for.
    """
    try:
        return by_vmap()
    except RuntimeError as error:
        refusal = avoided_by_a_loop(error)
        quiet = refusal is not None and quietly(error)
        if refusal is None or not quiet and warns_of is None:
            raise
        where = module_of(error, _known(models))
    # Outside of the handler: the loop's errors are not about the attempt.
    before.put_back(called)
    if not quiet:
        _warn(called, refusal, where, warns_of)
    return by_loop()


class Before:
    """What an attempt under vmap may change, as it was before.

    Args:
        randomness: as in vmap.
        tensors: the input, those that all slices share included.
        modules: whose buffers may be written, if no block covers them.
        of_host: whether to keep the state of Python's and numpy's generators too.
    """

    def __init__(
        self,
        randomness: str,
        tensors: Sequence[Tensor],
        modules: Iterable[nn.Module],
        of_host: bool = True,
    ) -> None:
        self._draws = Draws(randomness, of_host)
        self._versions = [(tensor, _version(tensor)) for tensor in tensors]
        covered = [block.covers for block in open_blocks.blocks() if block.alive]
        self._buffers = [
            (owner._buffers, name, buffer, _version(buffer), buffer.detach().clone())
            for module in modules
            for owner in module.modules()
            if not any([owner in covers for covers in covered])
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    def put_back(self, called: str) -> None:
        """Put it back.

        Args:
            called: the public function, for the error.

        Raises:
            VmapSafeRuntimeError: the attempt has written on the tensors.
        """
        if any([_version(tensor) != version for tensor, version in self._versions]):
            raise VmapSafeRuntimeError(
                f'{called} with fallback="loop"',
                "vmap refuses the code, which has already written on its input, so "
                "that a loop would write a second time",
                "Write out of place, or pass a clone",
            )
        self._draws.put_back()
        for buffers, name, buffer, version, value in self._buffers:
            buffers[name] = buffer
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(value)


def _version(tensor: Tensor) -> int:
    """How often its memory has been written; 0 if that is not known."""
    inside = innermost(tensor)
    return 0 if inside.is_inference() else inside._version


def _known(modules: Iterable[nn.Module]) -> list[Model]:
    """The models of this thread's blocks, and others, for their layers' names."""
    models = [m for block in open_blocks.blocks() if block.alive for m in block.models]
    others = [
        Model(module, {part: name for name, part in module.named_modules()})
        for module in modules
    ]
    return [*models, *others]


# Of what a warning has been given, and why.
_warned: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def _warn(called: str, refusal: Refusal, where: str | None, of: object) -> None:
    """Warn that a loop runs, once for each class or code and reason."""
    reasons = _warned.setdefault(of, set())
    if refusal.why in reasons:
        return
    reasons.add(refusal.why)
    warn_user(
        worded(
            called,
            f"vmap cannot run {where or 'code outside of modules'}: {refusal.why}. "
            "So the slices run one after another, which takes longer",
            f"Ignore this warning, or change the code. {refusal.do.rstrip('.')}",
        ),
        FallbackWarning,
    )


def in_turn(
    called: str, count: int, randomness: str, run: Callable[[int], T]
) -> list[T]:
    """Call ``run(i)`` for each slice, with the random numbers that vmap would give.

    Args:
        called: the public function, for the error.
        count: how many slices there are.
        randomness: as in vmap. Unless it is "different", slices also share what they
            draw from Python's and numpy's generators, as under vmap.
        run: of the index of a slice.

    Returns:
        What it returns, in order.

    Raises:
        VmapSafeRuntimeError: a slice draws random numbers with ``randomness="error"``.
    """
    shared, of_torch = Draws("same", of_host=True), Draws("same")
    found = []
    for i in range(count):
        if i and randomness != "different":
            shared.put_back()
        found.append(run(i))
        if randomness == "error" and of_torch.moved():
            shared.put_back()
            raise VmapSafeRuntimeError(
                f'{called} with fallback="loop"',
                "a slice called a random operation while in randomness error mode",
                'Pass randomness="different" (a draw of its own for each slice) or '
                '"same", or put the layer in eval mode before',
            )
    return found


# -- The results of slices, put together -----------------------------------------------


def stacked(
    called: str, outputs: Sequence[Any], out_dims: Any = 0, size: int | None = None
) -> Any:
    """Trees of the slices' outputs as one tree, as vmap would give it.

    Args:
        called: the public function, for errors.
        outputs: of the slices, at least one.
        out_dims: as in vmap.
        size: how many of them count; None for all.

    Returns:
        The tree.

    Raises:
        VmapSafeValueError: the outputs are not alike, are not tensors, or do not fit
            ``out_dims``.
    """
    flat = [tree_flatten(output) for output in outputs]
    tree = flat[0][1]
    dims = broadcast_to_leaves(out_dims, tree)
    if dims is None:
        raise VmapSafeValueError(
            called,
            f"out_dims {shown(out_dims)} does not fit the structure of what a slice "
            f"gives, {shown(outputs[0])}",
            "Give an int, None, or a tree of them like the output",
        )
    if any([other != tree for _, other in flat]):
        other = next(o for o, (_, t) in zip(outputs, flat) if t != tree)
        raise VmapSafeValueError(
            called,
            f"slices give outputs of different structures, {shown(outputs[0])} and "
            f"{shown(other)}",
            "Return the same structure for every slice",
        )
    size = len(outputs) if size is None else size
    leaves = [
        _together(called, each, dim, size)
        for each, dim in zip(zip(*[leaves for leaves, _ in flat]), dims)
    ]
    return tree_unflatten(leaves, tree)


def _together(called: str, each: Sequence[Any], dim: int | None, size: int) -> Any:
    """One output of every slice, as one of ``size`` slices."""
    if dim is None:
        first = each[0]
        if all([_same(first, other) for other in each]):
            return first
        raise VmapSafeValueError(
            called,
            "out_dims is None for an output that differs from slice to slice",
            "Give it a dimension in out_dims",
        )
    for one in each:
        if not isinstance(one, Tensor):
            raise VmapSafeValueError(
                called,
                f"a slice gives {shown(one)}, {a_kind(one)}, and not a tensor",
                "Return tensors, or pass out_dims with None for what all slices share",
            )
    kinds = {(tuple(one.shape), one.dtype, one.device) for one in each}
    if len(kinds) > 1:
        found = " and ".join(
            [f"{s}, {t}, {d}" for s, t, d in sorted(kinds, key=str)[:2]]
        )
        raise VmapSafeValueError(
            called,
            f"slices give tensors that do not fit together, {found}",
            "Return the same shape and dtype for every slice",
        )
    whole = torch.stack([*each], dim)
    return whole if size == len(each) else whole.narrow(dim, 0, size)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and bool(((a == b) | ((a != a) & (b != b))).all())
    return a is b or bool(a == b)


# -- Which modules a function holds ----------------------------------------------------


def modules_in(values: Iterable[Any]) -> list[nn.Module]:
    """The modules among values, and among what functions there hold on to."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += _held_by(value)
    return [*found.values()]


def _held_by(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield value.__func__
        yield value.__self__
        yield from _modules(getattr(value.__self__, "__dict__", {}).values())
    elif isinstance(value, types.FunctionType):
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # it may be empty
                yield cell.cell_contents
        given = value.__globals__  # of which functions would lead far away
        yield from _modules([given.get(name) for name in value.__code__.co_names])
    elif isinstance(value, (list, tuple)):
        yield from _modules(value)
    elif isinstance(value, dict):
        yield from _modules(value.values())


def _modules(values: Iterable[Any]) -> list[nn.Module]:
    return [value for value in values if isinstance(value, nn.Module)]
