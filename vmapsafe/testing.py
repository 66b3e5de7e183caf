"""For tests of rules and of vmapped code: a rule's reference, the loop, comparison."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from vmapsafe._block.operators import only
from vmapsafe._call import Call, Function, Site, batch_size, slices
from vmapsafe._rule import FunctionRule, OperatorRule, Rule
from vmapsafe._torch import broadcast_to_leaves, tree_flatten, tree_map, tree_unflatten

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


Derived = Mapping[str, Callable[[Mapping[str, Any]], Tensor]]


def check_rule(
    rule: Rule,
    cases: Iterable[Mapping[str, Any]],
    *,
    site: Site | None = None,
    batched: Collection[str] | None = None,
    derived: Derived | None = None,
) -> int:
    """Compare a rule with its reference, in values and in gradients.

    For every case and every choice of which of its tensors are batched, the rule under
    ``vmap``, along the first dimension or the last, and under two nested ones is
    compared with its reference: values, dtype, and the gradients of every floating
    tensor for a random cotangent. The rule of an operator is put in the place of
    torch's batching rule, must take each case for some choice of what is batched, and
    is tried also on tensors without derivatives.

    The same is asked of each case in float32 and bfloat16, with its images and volumes
    channels last, and for an empty batch. There the rule may decline; nothing is asked
    where the reference does not run.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from vmapsafe._rule import FunctionRule, slice_by_slice
    >>> from vmapsafe._modes import MODES
    >>> from vmapsafe.testing import check_rule
    >>> square = FunctionRule(
    ...     name="square",
    ...     functions=(torch.square,),
    ...     modes=MODES,
    ...     accepts=lambda call: True,
    ...     batched=lambda call: torch.square(call["input"]),
    ...     reference=slice_by_slice(lambda call: call["input"] * call["input"]),
    ... )
    >>> check_rule(square, [{"input": torch.randn(4, dtype=torch.float64)}])
    6

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
        AssertionError: the rule does not take a case, or differs from its reference.
    """
    compared = 0
    for case in cases:
        tensors = [
            name
            for name, value in case.items()
            if isinstance(value, Tensor) and (batched is None or name in batched)
        ]
        trial = _Trial(case, {}, site, derived or {})
        if isinstance(rule, FunctionRule):
            assert rule.accepts(
                Call(_function(rule), case, site)
            ), f"{rule.name}: does not accept {_shapes(case)}"
        taken = 0
        for nested, dims in ((False, (None, 0, -1)), (True, (None, 0))):
            for in_dims in _choices(tensors, dims):
                for plain in (False, True)[
                    : 2 if isinstance(rule, OperatorRule) else 1
                ]:
                    one = replace(trial, in_dims=in_dims, nested=nested, plain=plain)
                    taken += _takes(rule, one) and _compare(rule, one)
        assert taken, f"{rule.name}: does not take {_shapes(case)}, whatever is batched"
        compared += taken
        for in_dims in _choices(tensors, (None, 0)):
            for one in _variants(replace(trial, in_dims=in_dims)):
                if _takes(rule, one) and _runs(rule, one):
                    compared += _compare(rule, one)
    assert compared, f"{rule.name}: no case with a tensor to batch"
    return compared


def _function(rule: Rule) -> Function:
    return rule.operator if isinstance(rule, OperatorRule) else rule.functions[0]


def _choices(
    names: Sequence[str], dims: Sequence[int | None]
) -> Iterator[dict[str, int | None]]:
    """Every choice of batch dimensions; something is batched."""
    for choice in itertools.product(dims, repeat=len(names)):
        if any(dim is not None for dim in choice):
            yield dict(zip(names, choice))


@dataclass(frozen=True)
class _Trial:
    """One comparison. ``nested``, an outer vmap runs over the innermost batch of two;
    ``plain``, no derivatives are taken, and a rule may write in place; ``last``, images
    and volumes have their channels last in memory."""

    case: Mapping[str, Any]
    in_dims: Mapping[str, int | None]
    site: Site | None
    derived: Derived
    size: int = _BATCH
    nested: bool = False
    plain: bool = False
    last: bool = False

    def __str__(self) -> str:
        shapes = f"in_dims {dict(self.in_dims)}, {_shapes(self.case)}"
        return f"{shapes}, batch of {self.size}" + ", channels last" * self.last


def _variants(trial: _Trial) -> Iterator[_Trial]:
    tensors = [value for value in trial.case.values() if isinstance(value, Tensor)]
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        for dtype in _TOLERANCES:
            yield replace(trial, case=tree_map(_cast(dtype), dict(trial.case)))
    if any(tensor.dim() in (4, 5) for tensor in tensors):
        yield replace(trial, last=True)
    if not trial.derived:
        yield replace(trial, size=0)


def _cast(dtype: torch.dtype) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return cast


def _takes(rule: Rule, trial: _Trial) -> bool:
    """Whether the rule accepts; the rule of a function is shown one slice."""
    if isinstance(rule, OperatorRule):
        return rule.accepts(_whole(rule, trial, _values(trial)))
    return rule.accepts(Call(rule.functions[0], trial.case, trial.site))


def _runs(rule: Rule, trial: _Trial) -> bool:
    """Whether there is something to compare: not where torch's own fails too."""
    values = _values(trial)
    try:
        _expected(rule, trial, values)
        _actual(rule, trial, values)
    except Exception:
        own = replace(rule, accepts=lambda call: False, batched=_torchs_own)
        try:
            _actual(own, trial, values)
        except Exception:
            return False
        raise
    return True


def _torchs_own(call: Call) -> Any:
    return call.function(*call.arguments.values())


def _compare(rule: Rule, trial: _Trial) -> bool:
    """True; it raises where they differ."""
    taken: list[Call] = []

    def noted(call: Call) -> Any:
        taken.append(call)
        return rule.batched(call)

    values = _values(trial)
    actual = _actual(replace(rule, batched=noted), trial, values)
    expected = _expected(rule, trial, values)
    what = f"{rule.name}, {trial}"
    # Inside a second vmap tensors are wrapped, which not every rule takes.
    assert taken or trial.nested and trial.plain, f"never called: {what}"
    assert len(actual) == len(expected), what
    for one, other in zip(actual, expected):
        watched = other.requires_grad and not trial.plain
        assert one.requires_grad or not watched, f"no gradients of {what}"
    # What the reference does not differentiate has no derivative in torch.
    actual = [a if e.requires_grad else a.detach() for a, e in zip(actual, expected)]
    found = _with_gradients(actual, values)
    right = _with_gradients(expected, values)
    noise = _rounding(rule, trial, right)
    for (kind, one), (_, other), room in zip(found, right, noise):
        _same(one, other, f"{kind} of {what}", 4 * room)
    return True


def _rounding(
    rule: Rule, trial: _Trial, found: Sequence[tuple[str, Tensor]]
) -> list[float]:
    """What rounding does to the reference, much where large numbers cancel."""
    if all(out.dtype == torch.float64 for _, out in found):
        return [0.0] * len(found)
    doubled = {}
    for name, value in _values(trial).items():
        wide = _cast(torch.float64)(value.detach())
        doubled[name] = wide.requires_grad_(value.requires_grad)
    case = tree_map(_cast(torch.float64), dict(trial.case))
    exact = _with_gradients(
        _expected(rule, replace(trial, case=case), doubled), doubled
    )
    return [
        float((out - other).abs().max()) if out.numel() else 0.0
        for (_, out), (_, other) in zip(found, exact)
    ]


def _with_gradients(
    outputs: Sequence[Tensor], values: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    """The outputs, and the gradients of each for a random cotangent."""
    generator = torch.Generator().manual_seed(1)
    leaves = [value for value in values.values() if value.requires_grad]
    found = [("values", out) for out in outputs]
    for out in outputs:
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        if leaves and out.requires_grad:
            grads = torch.autograd.grad(
                out, leaves, cotangent.to(out), retain_graph=True, allow_unused=True
            )
            for grad, leaf in zip(grads, leaves):
                zero = torch.zeros_like(leaf)
                found.append(("gradients", zero if grad is None else grad))
    return [(kind, out.detach()) for kind, out in found]


def _values(trial: _Trial) -> dict[str, Tensor]:
    """What is batched or may be, batch dimension first; the same for the same trial."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * trial.size if trial.nested else trial.size
    values = {}
    for name, dim in trial.in_dims.items():
        value = trial.case[name]
        channels = 1
        if dim is not None:
            slices_ = [_varied(value, generator) for _ in range(size)]
            value = (
                torch.stack(slices_) if slices_ else value.new_empty(0, *value.shape)
            )
            channels = 2
        value = value.detach().clone()
        if trial.last and value.dim() - channels + 1 in (4, 5):
            value = value.movedim(channels, -1).contiguous().movedim(-1, channels)
        wanted = value.is_floating_point() and not trial.plain
        values[name] = value.requires_grad_(wanted)
    return values


def _completed(arguments: Mapping[str, Any], derived: Derived) -> dict[str, Any]:
    """The arguments of one slice, and those that follow from them."""
    completed = dict(arguments)
    for name, function in derived.items():
        completed[name] = function(completed)
    return completed


def _whole(rule: Rule, trial: _Trial, values: Mapping[str, Tensor]) -> Call:
    """The call with its batches, batch dimension first."""
    at_front: dict[str, int | None] = {
        name: 0 if trial.in_dims.get(name) is not None else None
        for name, value in trial.case.items()
        if isinstance(value, Tensor)
    }
    call = Call(_function(rule), {**trial.case, **values}, trial.site, at_front)
    if not trial.derived:
        return call
    ones = [
        _completed(one.arguments, trial.derived)
        for one in slices(call, batch_size(call))
    ]
    saved = {name: torch.stack([one[name] for one in ones]) for name in trial.derived}
    return replace(
        call,
        arguments={**call.arguments, **saved},
        in_dims={**at_front, **dict.fromkeys(saved, 0)},
    )


def _actual(rule: Rule, trial: _Trial, values: Mapping[str, Tensor]) -> list[Tensor]:
    """What the rule makes of the values, batch dimension first."""

    def fast(values: Mapping[str, Tensor]) -> Any:
        arguments = _completed({**trial.case, **values}, trial.derived)
        if isinstance(rule, FunctionRule):
            return rule.batched(Call(rule.functions[0], arguments, trial.site))
        with only(rule):
            outputs = rule.operator(**arguments)
        if isinstance(outputs, Tensor):
            return outputs
        return tuple(out for out in outputs if out is not None)

    batched = [name for name, dim in trial.in_dims.items() if dim is not None]
    if trial.nested:
        spec = {name: 0 if name in batched else None for name in values}
        split = {
            name: value.view(2, -1, *value.shape[1:]) if name in batched else value
            for name, value in values.items()
        }
        outputs = vmap(vmap(fast, (spec,)), (spec,))(split)
        outputs = tree_map(lambda out: out.flatten(0, 1), outputs)
    else:
        moved = {
            name: (
                value.movedim(0, trial.in_dims[name] or 0) if name in batched else value
            )
            for name, value in values.items()
        }
        outputs = vmap(fast, (dict(trial.in_dims),))(moved)
    leaves: list[Tensor] = tree_flatten(outputs)[0]
    return leaves


def _expected(rule: Rule, trial: _Trial, values: Mapping[str, Tensor]) -> list[Tensor]:
    """What its reference does. An empty batch is what is left of one of one."""
    if not trial.size:
        values = {
            name: (
                value
                if trial.in_dims[name] is None
                else torch.cat([value, trial.case[name][None]])
            )
            for name, value in values.items()
        }
    outputs = rule.reference(_whole(rule, trial, values))
    leaves = [out for out in tree_flatten(outputs)[0] if out is not None]
    return leaves if trial.size else [out[:0] for out in leaves]


# What the dtype leaves of equality, relative to the largest entry.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def _same(actual: Tensor, expected: Tensor, what: str, noise: float) -> None:
    relative = _TOLERANCES.get(expected.dtype, 1e-8)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    absolute = relative * max(1.0, largest) + noise
    try:
        assert_same(actual, expected, rtol=0.0, atol=absolute)
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
