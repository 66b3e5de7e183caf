"""The one idea: a rule says what a torch call means when it sees one slice of a batch.

A rule has two forms of the same meaning: ``batched``, which runs inside a block, and
``reference``, slow and obviously right, which only tests run. The two must agree in
values and in gradients (:func:`vmapsafe.testing.check_rule`).

There are two kinds. A :class:`FunctionRule` stands for torch functions. A block decides
about each call in this order:

1. If the block's table does not have a rule of the function, torch's own code runs.
2. If the call does not come from the forward of a model that the block covers, torch's
   own code runs.
3. The block asks the function's rules, those that hold in fewer modes first, then in
   the order of registration. The first whose ``accepts`` returns True runs: its
   ``batched`` makes the output.
4. If none returns True, torch's own code runs.

An :class:`OperatorRule` stands for an operator, ``torch.ops.aten.…``. It is a batching
rule with the same meaning, mostly a faster one, see ``_block/operators``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmapsafe._call import Call, Function, Signature, batch_size, slices
from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import check_mode
from vmapsafe._torch import constant_while_compiling


@dataclass(frozen=True, kw_only=True)
class FunctionRule:
    """What torch functions mean inside a block.

    Attributes:
        name: a unique name, for tables and test ids.
        functions: the torch functions it stands for: one, e.g. ``F.batch_norm``, or
            several that differ only in name, as in-place methods do.
        modes: the modes in which it holds.
        accepts: whether the rule applies to this call.
        may_accept: a first look at the arguments, as given. False saves the time that
            finding the layer and ``accepts`` would take.
        batched: makes the output, from the tensors that the call sees under vmap.
        reference: makes the same output for the whole batch (``call.in_dims``), batch
            dimension first. It uses neither vmap nor the code of ``batched``.
    """

    name: str
    functions: tuple[Function, ...]
    modes: Collection[str]
    accepts: Callable[[Call], bool]
    batched: Callable[[Call], Any]
    reference: Callable[[Call], Any]
    may_accept: Callable[..., bool] | None = None


@dataclass(frozen=True, kw_only=True)
class OperatorRule:
    """A batching rule of an operator, in every mode.

    Attributes:
        name: a unique name, for tables and test ids.
        operator: the operator it stands for, ``torch.ops.aten.….default``.
        accepts: whether the rule applies to this call, which holds whole batches
            (``call.in_dims``). If not, torch's own rule runs.
        batched: makes the outputs of the same call. It returns a tuple of whole
            batches, batch dimension first, with None for each output that the caller
            did not ask for.
        reference: as in :class:`FunctionRule`.
        devices: the types of device on which the rule holds, often a table of what was
            measured on each; None for all. On others torch's own rule runs.
        speed: whether the rule changes only speed. ``fast=False`` leaves it out.
        casts: whether ``batched`` casts as autocast does. If not, torch's own rule runs
            where autocast would cast.
        functions: the torch functions that call the operator, themselves or in
            backward. If it only changes speed, the rule holds from the first call in a
            block for which it pays.
        pays: whether a call of one of these functions, with tensors in vmap's wrappers,
            is large enough for the rule to win. By default each call is.
        may_accept: the same for a call of the operator. False saves most of the time
            that ``accepts`` would take.
    """

    name: str
    operator: Any
    accepts: Callable[[Call], bool]
    batched: Callable[[Call], tuple[Tensor | None, ...]]
    reference: Callable[[Call], Any]
    devices: Collection[str] | None
    speed: bool = True
    casts: bool = False
    functions: tuple[Function, ...] = ()
    pays: Callable[..., bool] | None = None
    may_accept: Callable[..., bool] | None = None

    def holds_on(self, device: str) -> bool:
        """Whether the rule holds on this type of device."""
        return self.devices is None or device in self.devices


Rule = FunctionRule | OperatorRule


class Table(dict[Function, tuple[FunctionRule, ...]]):
    """The rules of a mode by function.

    Attributes:
        others: functions met that have no rules and may do nothing but compute.
        first_looks: what tells that no rule of a function accepts a call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.others: set[Function] = set()
        self.first_looks: dict[Function, Callable[..., bool]] = {}


Pays = Callable[..., bool] | None
OperatorTable = Mapping[Function, tuple[OperatorRule, ...]]

_functions: list[FunctionRule] = []
_tables: dict[str, Table] = {}
_operators: dict[Function, tuple[OperatorRule, ...]] = {}
_corrections: list[OperatorRule] = []
_reached: dict[Function, dict[Pays, tuple[OperatorRule, ...]]] = {}
_parameters: dict[Function, Signature] = {}


def register(rule: Rule) -> None:
    """Add a rule to the tables of all blocks entered from now on.

    Args:
        rule: a rule of functions, or of an operator.

    Raises:
        VmapSafeValueError: another rule has this name, or a mode is unknown.
    """
    if any(rule.name == other.name for other in registered()):
        raise VmapSafeValueError(
            "register(...)",
            f"a rule named {rule.name!r} already exists",
            "Give the rule another name",
        )
    if isinstance(rule, OperatorRule):
        _operators[rule.operator] = (*_operators.get(rule.operator, ()), rule)
        if not rule.speed:
            _corrections.append(rule)
        for function in rule.functions:
            found = _reached.setdefault(function, {})
            found[rule.pays] = (*found.get(rule.pays, ()), rule)
        return
    for mode in rule.modes:
        check_mode("register(...)", mode)
    _functions.append(rule)
    _tables.clear()
    for function in rule.functions:
        _parameters.setdefault(function, Signature.of(function))


def registered() -> tuple[Rule, ...]:
    """All rules: those of functions in the order of registration, then of operators."""
    return (*_functions, *[rule for rules in _operators.values() for rule in rules])


def table(mode: str) -> Table:
    """The rules of ``mode`` by function.

    The table does not change when more rules are registered.
    """
    _make_table(mode)
    return _tables[mode]


# If torch.compile saw that a table is made, it would compile a second call again.
@constant_while_compiling
def _make_table(mode: str) -> None:
    if mode in _tables:
        return
    found = Table()
    # A rule for this mode alone comes before one that holds in several.
    for rule in sorted(_functions, key=lambda rule: len(rule.modes)):
        if mode in rule.modes:
            for function in rule.functions:
                found[function] = (*found.get(function, ()), rule)
    for function, rules in found.items():
        looks = {rule.may_accept for rule in rules}
        if len(looks) == 1 and (look := looks.pop()) is not None:
            found.first_looks[function] = look
    _tables[mode] = found


def operator_rules() -> OperatorTable:
    """The rules of operators, by operator."""
    return _operators


def corrections() -> Collection[OperatorRule]:
    """The rules of operators that put torch's own numbers right."""
    return _corrections


def reached_by() -> Mapping[Function, Mapping[Pays, tuple[OperatorRule, ...]]]:
    """The rules of the operators that each function calls, itself or in backward.

    They are in groups, by what tells whether a call is large enough.
    """
    return _reached


def bind(
    function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The arguments by name of a call of a function that has a rule."""
    return _parameters[function].bind(args, kwargs)


def slice_by_slice(plain: Callable[[Call], Any]) -> Callable[[Call], Any]:
    """A reference that calls ``plain`` on each slice, in a Python loop.

    ``plain`` returns a tensor. Like an operator it may also return a tuple of tensors,
    with None for each output that the caller did not ask for.
    """

    def reference(call: Call) -> Any:
        outputs = [plain(one) for one in slices(call, batch_size(call))]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs)
        return tuple(
            [
                None if column[0] is None else torch.stack(column)
                for column in zip(*outputs)
            ]
        )

    return reference
