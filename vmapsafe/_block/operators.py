"""Other batching rules replace those of torch's operators while a block is open.

A rule of an aten operator changes speed, never meaning, or puts right what torch's own
gets wrong. So it may hold in the whole process: in other threads that compute while a
block is open somewhere, and in backward on a GPU, which runs in a thread of its own. It
does not need a derivative, because autograd differentiates the operations it calls.

A kernel is registered when a function that leads to its operator is first called in a
block, on slices that are large enough. The last block of the process that closes
removes all kernels. If no block is open, or if no rule applies to a call, a kernel
passes the call to torch's own rule, which costs about 10 microseconds.

An operator's table must not change while another thread calls the operator: when one
thread registers and removes kernels while another runs ``vmap(grad)``, torch fails with
an internal error within seconds (torch 2.13; it frees the memory of a kernel that is
still running). So kernels stay while other threads run, as in a notebook, until a block
closes when there are none.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from vmapsafe._block import open_blocks
from vmapsafe._call import Call, Function, Signature
from vmapsafe._rule import (
    OperatorRule,
    OperatorTable,
    corrections,
    operator_rules,
    reached_by,
)
from vmapsafe._torch import (
    batched_levels,
    below_vmap,
    constant_while_compiling,
    current_level,
    is_wrapped,
    run_while_compiling,
    schema_of,
    unseen_by_modes,
    whole_batches,
    would_be_cast,
    wrapped_again,
)
from vmapsafe.rules.kept_calls import KEPT_CALLS


def install(devices: Collection[str]) -> None:
    """Register the kernels that put torch's own numbers right on these devices."""
    for rule in corrections():
        if any([rule.holds_on(device) for device in devices]):
            _install((rule.operator,))


def leading(recorded: bool) -> Collection[Function]:
    """The functions that lead to operators with rules.

    Args:
        recorded: whether per-sample gradients keep some of their calls.

    Returns:
        The functions.
    """
    found = reached_by()
    return found.keys() - KEPT_CALLS.keys() if recorded else found


def prepare(function: Function, args: tuple[Any, ...]) -> None:
    """Register the kernels of the operators to which a call leads, if that pays.

    Args:
        function: one of ``reached_by()``.
        args: the positional arguments of the call.
    """
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not is_wrapped(x):
        return
    with unseen_by_modes():
        device, complete = x.device.type, True
        if (function, device) in _complete:
            return
        wanted: list[Function] = []
        for pays, rules in reached_by()[function].items():
            if pays is None or pays(*args):
                wanted += [rule.operator for rule in rules if rule.holds_on(device)]
            else:
                complete = False
        if wanted and batched_levels((x,)):
            _install(wanted)
            if complete:
                _complete.add((function, device))


@constant_while_compiling
def prepare_traced() -> None:
    """Register all kernels, for what torch.compile traces: it then runs vmap once."""
    _install(operator_rules())


def remove() -> None:
    """Remove all kernels, if no block is open and no other thread can be in torch."""
    if not _libraries or _instead is not None:
        return
    with open_blocks.lock:
        if any([block.alive for block in open_blocks.everywhere()]):
            return
        if len(sys._current_frames()) > 1 or _is_running():
            return
        _complete.clear()
        _installed.clear()
        while _libraries:
            _libraries.pop()._destroy()  # type: ignore[no-untyped-call]


def _is_running() -> bool:
    """Whether a kernel is running in this thread."""
    codes = {kernel.__code__ for kernel in _kernels.values()}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


@contextmanager
def only(rule: OperatorRule) -> Iterator[None]:
    """Use ``rule`` instead of all other rules of its operator, without a block.

    The rules of other operators hold as in a block: what ``rule`` calls may be batched
    by a vmap outside. Tests use this, one at a time. The rule need not be registered.
    """
    global _instead
    table = {**operator_rules(), rule.operator: (rule,)}
    _install(table)
    before, _instead = _instead, table
    try:
        yield
    finally:
        _instead = before
        remove()


_KEY = "FuncTorchBatched"
_instead: OperatorTable | None = None
# What is registered now: the libraries that hold the kernels, their operators, and the
# functions, by type of device, that lead to no other operators.
_libraries: list[torch.library.Library] = []
_installed: set[Function] = set()
_complete: set[tuple[Function, str]] = set()
# The kernels are made once. They call the kernels of torch that they replace.
_kernels: dict[Function, Any] = {}

# torch warns so once in a process. The code adds and removes this filter by hand,
# because warnings.catch_warnings is not thread-safe.
_QUIET = (
    "ignore",
    re.compile("Warning only once for all operators"),
    UserWarning,
    None,
    0,
)


def _install(operators: Iterable[Any]) -> None:
    """Register kernels for operators that do not have one of ours.

    Does nothing in versions of torch in which torch's own rule cannot be called.
    """
    missing = [one for one in operators if one not in _installed]
    if not missing or not hasattr(torch.library, "get_kernel"):
        return
    with open_blocks.lock:
        library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        _libraries.append(library)
        warnings.filters.insert(0, _QUIET)  # type: ignore[attr-defined]
        try:
            for operator in missing:
                if operator not in _installed:
                    if operator not in _kernels:
                        _kernels[operator] = _kernel(operator)
                    library.impl(  # type: ignore[no-untyped-call]
                        operator, _kernels[operator], _KEY, with_keyset=True
                    )
                    _installed.add(operator)
        finally:
            if _QUIET in warnings.filters:
                warnings.filters.remove(_QUIET)  # type: ignore[attr-defined]


def _kernel(operator: Any) -> Callable[..., Any]:
    parameters = Signature.of(operator)
    torchs_own = torch.library.get_kernel(operator, _KEY)
    one_output = len(schema_of(operator).returns) == 1

    @run_while_compiling
    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        rules = _in_force(operator)
        if rules and _instead is None:
            with unseen_by_modes():
                rules = tuple([rule for rule in rules if _may_accept(rule, args)])
        if rules:
            with unseen_by_modes():
                level = current_level()
                given = parameters.bind(args, kwargs)
                values, in_dims = whole_batches(given, level)
                call = Call(operator, values, None, in_dims)
                # If no argument is batched at this level, there is nothing to merge.
                batched = any([dim is not None for dim in in_dims.values()])
                tensors = [call[name] for name in in_dims]
                device = tensors[0].device.type
                for rule in rules if batched else ():
                    if (
                        rule.holds_on(device)
                        and rule.accepts(call)
                        and (rule.casts or not would_be_cast(tensors))
                    ):
                        with below_vmap():
                            outputs = rule.batched(call)
                        found = wrapped_again(outputs, level)
                        return found[0] if one_output else found
        return torchs_own.call_boxed(keyset, *args, **kwargs)

    return kernel


def _may_accept(rule: OperatorRule, args: tuple[Any, ...]) -> bool:
    """Whether the arguments, in vmap's wrappers, are not ruled out at a first look."""
    return rule.may_accept is None or rule.may_accept(*args)


def _in_force(operator: Function) -> tuple[OperatorRule, ...]:
    if _instead is not None:
        return _instead.get(operator, ())
    blocks = open_blocks.everywhere()
    if not blocks:
        return ()
    alive = [block for block in blocks if block.alive]
    rules = operator_rules().get(operator, ()) if alive else ()
    if all([block.fast for block in alive]):
        return rules
    return tuple([rule for rule in rules if not rule.speed])
