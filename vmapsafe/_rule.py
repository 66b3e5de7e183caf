"""The one idea: a rule says what a torch call means when it sees one slice of a batch.

A rule stands for a torch function. It has two forms of the same meaning: ``batched``,
which runs inside a block, and ``reference``, slow and obviously right, which only tests
run. The law every rule is held to is ``batched ≈ reference``, values and gradients
(:func:`vmapsafe.testing.check_rule`).

What happens to a call inside a block, in this order:

1. its function has no rule in the block's table: torch's own behaviour;
2. the forward of a model that the block covers does not make it: torch's own behaviour;
3. the first rule of the function whose ``accepts`` says yes: its ``batched``. Rules
   that hold in fewer modes come first, then the order is that of registration;
4. none says yes: torch's own behaviour.

A rule may also stand for an operator, ``torch.ops.aten.…``. It is then a faster
batching rule with the same meaning, see ``_operators``, and 2. does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmapsafe._call import Call, Function, Parameters, batch_size, slices
from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import check_mode
from vmapsafe._torch import OpOverload


@dataclass(frozen=True)
class Rule:
    """What a torch function means inside a block.

    Attributes:
        name: for tables and test ids.
        functions: the torch function it stands for, e.g. ``F.batch_norm``, or
            several where they differ in name only, as in-place methods do.
        modes: the modes in which it holds; that of an operator holds in all.
        accepts: whether it takes this call; otherwise torch's own behaviour.
        batched: the meaning that runs, on the tensors the call sees under vmap. That of
            an operator sees whole batches (``call.in_dims``), as do its ``accepts``
            and ``reference``, and returns a tuple of them, batch dimension first.
        reference: the same meaning on the whole batch (``call.in_dims``), batch
            dimension first, in plain torch without vmap and without ``batched``'s code.
        devices: of an operator's rule: the types of device on which it may take a call,
            so that torch's own is left in place where no model is on one; None for all.
        speed: whether it changes speed only, and is left out with ``fast=False``; those
            of operators always are.
    """

    name: str
    functions: tuple[Function, ...]
    modes: Collection[str]
    accepts: Callable[[Call], bool]
    batched: Callable[[Call], Any]
    reference: Callable[[Call], Any]
    devices: Collection[str] | None = None
    speed: bool = False

    @property
    def of_operator(self) -> bool:
        """Whether it changes speed only."""
        return isinstance(self.functions[0], OpOverload)


Table = Mapping[Function, tuple[Rule, ...]]

_rules: list[Rule] = []
_tables: dict[tuple[str, bool], Table] = {}
_speed_rules: dict[Function, tuple[Rule, ...]] = {}
_parameters: dict[Function, Parameters] = {}


def register(rule: Rule) -> Rule:
    """Put ``rule`` in the table of every block entered from now on; returns it.

    Raises:
        ValueError: the name is taken, or a mode is unknown.
    """
    if any(rule.name == other.name for other in _rules):
        raise VmapSafeValueError(
            "register(...)",
            f"a rule named {rule.name!r} is there already",
            "Give the rule another name",
        )
    for mode in rule.modes:
        check_mode("register(...)", mode)
    _rules.append(rule)
    _tables.clear()
    for function in rule.functions:
        _parameters.setdefault(function, Parameters.of(function))
        if rule.of_operator:
            _speed_rules[function] = (*_speed_rules.get(function, ()), rule)
    return rule


def registered() -> tuple[Rule, ...]:
    """All rules, in the order of registration."""
    return tuple(_rules)


def table(mode: str, fast: bool) -> Table:
    """The rules of ``mode`` by function, those for speed only where ``fast``; what is
    registered later is not in it."""
    if (mode, fast) not in _tables:
        found: dict[Function, tuple[Rule, ...]] = {}
        # A rule of this mode is asked before one that holds in several.
        for rule in sorted(_rules, key=lambda rule: len(rule.modes)):
            if rule.of_operator or (rule.speed and not fast):
                continue
            if mode in rule.modes:
                for function in rule.functions:
                    found[function] = (*found.get(function, ()), rule)
        _tables[mode, fast] = found
    return _tables[mode, fast]


def speed_rules() -> Table:
    """The rules of operators, by operator."""
    return _speed_rules


def bind(
    function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The arguments of a call of a function that has a rule, by name."""
    return _parameters[function].bind(args, kwargs)


def slice_by_slice(plain: Callable[[Call], Any]) -> Callable[[Call], Any]:
    """A reference that is a Python loop of ``plain`` over the slices.

    ``plain`` gives a tensor, or, as operators do, several, and None for what was not
    asked.
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
