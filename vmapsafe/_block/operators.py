"""Other batching rules replace those of torch's operators while a block is open.

A rule of an aten operator changes speed, never meaning, or puts right what torch's own
gets wrong. So it may hold in the whole process: in other threads that compute while a
block is open somewhere, and in backward on a GPU, which runs in a thread of its own. It
does not need a derivative, because autograd differentiates the operations it calls.

The first block of the process registers a kernel, which stays registered. If no block
is open, or if no rule applies to a call, the kernel passes the call to torch's own
rule, which costs about 15 microseconds. To remove the kernel at the end of each block
would be cheap (0.02 ms) but is not safe: an operator's table must not change while
another thread calls it. When one thread registers and removes kernels while another
runs ``vmap(grad)``, torch fails with an internal error within seconds (torch 2.13; it
frees the memory of a kernel that is still running).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vmapsafe._block import open_blocks
from vmapsafe._call import Call, Function, Signature
from vmapsafe._rule import (
    OperatorRule,
    OperatorTable,
    operator_rules,
    operators_with_rules_on,
)
from vmapsafe._torch import (
    below_vmap,
    current_level,
    run_while_compiling,
    schema_of,
    unseen_by_modes,
    whole_batches,
    would_be_cast,
    wrapped_again,
)


def install(types_of_device: Callable[[], Collection[str]]) -> None:
    """Register a kernel for each operator with a rule for one of these device types.

    Does nothing in older versions of torch, where torch's own rule cannot be called.
    """
    if not hasattr(torch.library, "get_kernel"):
        return
    for device in types_of_device():
        wanted = operators_with_rules_on(device)
        if _complete.get(device) is not wanted:
            with open_blocks.lock:
                for operator in wanted:
                    if operator not in _installed:
                        _install(operator)
            _complete[device] = wanted


@contextmanager
def only(rule: OperatorRule) -> Iterator[None]:
    """Use ``rule`` instead of all other rules of its operator, without a block.

    The rules of other operators hold as in a block: what ``rule`` calls may be batched
    by a vmap outside. Tests use this, one at a time. The rule need not be registered.
    """
    global _instead
    table = {**operator_rules(), rule.operator: (rule,)}
    with open_blocks.lock:
        for operator in table:
            if operator not in _installed:
                _install(operator)
    before, _instead = _instead, table
    try:
        yield
    finally:
        _instead = before


_KEY = "FuncTorchBatched"
_instead: OperatorTable | None = None
_installed: dict[Function, torch.library.Library] = {}
# By type of device, the operators with rules on it, once all of them are installed.
_complete: dict[str, frozenset[Function]] = {}

# torch warns so once in a process. The code adds and removes this filter by hand,
# because warnings.catch_warnings is not thread-safe.
_QUIET = (
    "ignore",
    re.compile("Warning only once for all operators"),
    UserWarning,
    None,
    0,
)


def _install(operator: Any) -> None:
    kernel = _kernel(operator)
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    warnings.filters.insert(0, _QUIET)  # type: ignore[attr-defined]
    try:
        library.impl(  # type: ignore[no-untyped-call]
            operator, kernel, _KEY, with_keyset=True
        )
    finally:
        if _QUIET in warnings.filters:
            warnings.filters.remove(_QUIET)  # type: ignore[attr-defined]
    _installed[operator] = library


def _kernel(operator: Any) -> Callable[..., Any]:
    parameters = Signature.of(operator)
    torchs_own = torch.library.get_kernel(operator, _KEY)
    one_output = len(schema_of(operator).returns) == 1

    @run_while_compiling
    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        rules = _in_force(operator)
        if rules:
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
