"""What tests of rules and of vmapped code need: the law, the loop, the comparison."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from vmapsafe._call import (
    Call,
    Site,
    broadcast_to_leaves,
    slices,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from vmapsafe._operators import only
from vmapsafe._rule import Rule

__all__ = ["assert_same", "check_rule", "loop"]

_BATCH = 3


def loop(function: Callable[..., Any], in_dims: Any = 0, out_dims: int = 0) -> Any:
    """``torch.func.vmap`` as a Python loop: slow, and obviously right.

    >>> import torch
    >>> from vmapsafe.testing import loop
    >>> x = torch.arange(6.0).reshape(2, 3)
    >>> loop(torch.sum)(x)
    tensor([ 3., 12.])

    Args:
        function: what to run on each slice.
        in_dims: as in vmap.
        out_dims: an int, where the slices are stacked in every output.

    Returns:
        A function of the batched arguments; outputs are trees of tensors.

    It does not map over an empty batch, and draws random numbers slice after slice.
    """

    def looped(*args: Any) -> Any:
        leaves, tree = tree_flatten(args)
        spec = tuple(in_dims) if isinstance(in_dims, (tuple, list)) else in_dims
        dims = broadcast_to_leaves(spec, tree)
        if dims is None:
            raise ValueError(f"loop: in_dims {in_dims!r} do not fit the arguments.")
        (size,) = {x.size(d) for x, d in zip(leaves, dims) if d is not None}
        outputs = []
        for i in range(size):
            picked = [x if d is None else x.select(d, i) for x, d in zip(leaves, dims)]
            outputs.append(function(*tree_unflatten(picked, tree)))
        return tree_map(lambda *parts: torch.stack(parts, out_dims), *outputs)

    return looped


def assert_same(
    actual: Any, expected: Any, *, rtol: float = 1e-8, atol: float = 1e-8
) -> None:
    """Raise unless two trees of tensors agree in structure, shape, dtype and value.

    >>> import torch
    >>> from vmapsafe.testing import assert_same
    >>> assert_same({"w": torch.ones(2)}, {"w": torch.ones(2)})

    Args:
        actual: a tree of tensors.
        expected: the tree it should be.
        rtol: relative tolerance, for values.
        atol: absolute tolerance, for values.

    Raises:
        AssertionError: they differ; the text says where and by how much.
    """
    a, a_tree = tree_flatten(actual)
    e, e_tree = tree_flatten(expected)
    assert a_tree == e_tree, f"structure {a_tree} instead of {e_tree}"
    for x, y in zip(a, e):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def check_rule(
    rule: Rule,
    cases: Iterable[Mapping[str, Any]],
    *,
    site: Site | None = None,
    batched: Collection[str] | None = None,
    derived: Mapping[str, Callable[[Mapping[str, Any]], Tensor]] | None = None,
) -> int:
    """Hold a rule to the law: ``batched ≈ reference``, in values and in gradients.

    For every case and every choice of which of its tensors are batched, along the
    first dimension or the last, the rule under ``vmap`` and under two nested ones is
    compared with its reference: values, dtype, and the gradients of every floating
    tensor for a random cotangent. The rule of an operator is compared once more on
    tensors that nobody differentiates; it is put in the place of
    torch's batching rule, and must take each case for some choice of what is batched.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from vmapsafe._rule import MODES, Rule, slice_by_slice
    >>> from vmapsafe.testing import check_rule
    >>> square = Rule(
    ...     name="square",
    ...     functions=(torch.square,),
    ...     modes=MODES,
    ...     accepts=lambda call: True,
    ...     batched=lambda call: torch.square(call["input"]),
    ...     reference=slice_by_slice(lambda call: call["input"] * call["input"]),
    ... )
    >>> check_rule(square, [{"input": torch.randn(4, dtype=torch.float64)}])
    4

    Args:
        rule: the rule; it need not be registered.
        cases: the arguments of one slice, by name, tensors in float64 where there is a
            choice.
        site: where the calls claim to be made, for rules that ask.
        batched: the names of the arguments that are batched, for rules with no meaning
            for others; default every tensor.
        derived: arguments that follow from the others, as statistics saved by a forward
            do, by name: functions of the arguments of one slice, those before them in
            this dict among them.

    Returns:
        The number of comparisons made.

    Raises:
        AssertionError: the rule does not take a case, or the law does not hold.
    """
    compared = 0
    for case in cases:
        tensors = [
            name
            for name, value in case.items()
            if isinstance(value, Tensor) and (batched is None or name in batched)
        ]
        taken = 0
        if not rule.of_operator:
            assert rule.accepts(
                Call(rule.functions[0], case, site)
            ), f"{rule.name}: does not accept {_shapes(case)}"
        choices = itertools.product((None, 0, -1), repeat=len(tensors))
        for choice in choices:
            in_dims = dict(zip(tensors, choice))
            if all(dim is None for dim in choice):
                continue
            for nested, plain in itertools.product((False, True), repeat=2):
                if rule.of_operator or not plain:
                    taken += _compare(
                        rule, case, in_dims, site, derived or {}, nested, plain
                    )
        assert taken, f"{rule.name}: does not take {_shapes(case)}, whatever is batched"
        compared += taken
    assert compared, f"{rule.name}: no case with a tensor to batch"
    return compared


def _compare(
    rule: Rule,
    case: Mapping[str, Any],
    in_dims: Mapping[str, int | None],
    site: Site | None,
    derived: Mapping[str, Callable[[Mapping[str, Any]], Tensor]],
    nested: bool,
    plain: bool,
) -> bool:
    """One comparison, unless the rule leaves the call to torch; says so.

    Nested, an outer vmap runs over the innermost batch of two. Plain, no derivatives
    are taken, and a rule may write in place.
    """
    generator = torch.Generator().manual_seed(0)
    size = 2 * _BATCH if nested else _BATCH
    batched = {}
    for name, dim in in_dims.items():
        value = case[name]
        if dim is not None:
            value = torch.stack([_varied(value, generator) for _ in range(size)])
        wanted = value.is_floating_point() and not plain
        batched[name] = value.detach().clone().requires_grad_(wanted)
    at_front = {n: None if d is None else 0 for n, d in in_dims.items()}
    whole = Call(rule.functions[0], {**case, **batched}, site, at_front)
    ones = [_completed(one.arguments, derived) for one in slices(whole, size)]
    saved = {name: torch.stack([one[name] for one in ones]) for name in derived}
    whole = replace(
        whole,
        arguments={**whole.arguments, **saved},
        in_dims={**at_front, **dict.fromkeys(derived, 0)},
    )
    if rule.of_operator and not rule.accepts(whole):
        return False
    taken: list[Call] = []

    def noted(call: Call) -> Any:
        taken.append(call)
        return rule.batched(call)

    def fast(values: Mapping[str, Tensor]) -> Any:
        arguments = _completed({**case, **values}, derived)
        if not rule.of_operator:
            return rule.batched(Call(rule.functions[0], arguments, site))
        with only(replace(rule, batched=noted)):
            outputs = rule.functions[0](**arguments)
        return _as_tuple(outputs)

    if nested:
        spec = {n: d for n, d in at_front.items()}
        split = {
            n: v if at_front[n] is None else v.unflatten(0, (2, _BATCH))
            for n, v in batched.items()
        }
        actual = vmap(vmap(fast, (spec,)), (spec,))(split)
        actual = tree_map(lambda out: out.flatten(0, 1), actual)
    else:
        moved = {
            n: v if in_dims[n] is None else v.movedim(0, in_dims[n] or 0)
            for n, v in batched.items()
        }
        actual = vmap(fast, (dict(in_dims),))(moved)
    expected = rule.reference(whole)
    where = f"{rule.name}, in_dims {dict(in_dims)}, {_shapes(case)}"
    if rule.of_operator:
        # Inside a second vmap tensors are wrapped, which not every rule takes.
        assert taken or nested and plain, f"never called: {where}"
        expected = _as_tuple(expected)
    actual, expected = tree_flatten(actual)[0], tree_flatten(expected)[0]
    assert len(actual) == len(expected), where
    leaves = [v for v in batched.values() if v.requires_grad]
    for one, other in zip(actual, expected):
        _same(one, other, f"values of {where}")
        if not (leaves and other.requires_grad):
            continue
        assert one.requires_grad, f"no gradients of {where}"
        cotangent = torch.randn(
            other.shape, generator=generator, dtype=torch.float64
        ).to(other)
        grads = [
            torch.autograd.grad(
                out, leaves, cotangent, retain_graph=True, allow_unused=True
            )
            for out in (one, other)
        ]
        for a, e, leaf in zip(*grads, leaves):
            zero = torch.zeros_like(leaf)
            a, e = zero if a is None else a, zero if e is None else e
            _same(a, e, f"gradients of {where}")
    return True


def _completed(
    arguments: Mapping[str, Any],
    derived: Mapping[str, Callable[[Mapping[str, Any]], Tensor]],
) -> dict[str, Any]:
    """The arguments of one slice, and those that follow from them."""
    completed = dict(arguments)
    for name, function in derived.items():
        completed[name] = function(completed)
    return completed


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of an operator, without those that it was not asked for."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(out for out in outputs if out is not None)


# What the dtype leaves of equality, relative to the largest entry.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def _same(actual: Tensor, expected: Tensor, what: str) -> None:
    relative = _TOLERANCES.get(expected.dtype, 1e-8)
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    try:
        assert_same(actual, expected, rtol=relative, atol=relative * max(1.0, largest))
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def _varied(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
    return value * (0.5 + noise).to(value)


def _shapes(case: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value.shape) if isinstance(value, Tensor) else value
        for name, value in case.items()
    }
