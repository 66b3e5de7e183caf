"""Tools for tests: check a rule or a quantity, run a loop, compare results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap

from vmapsafe._block.operators import only
from vmapsafe._call import Call, Function, Site, batch_size, slices
from vmapsafe._rows.per_sample import per_sample
from vmapsafe._rule import FunctionRule, OperatorRule, Rule
from vmapsafe._torch import broadcast_to_leaves, tree_flatten, tree_map, tree_unflatten
from vmapsafe.quantities.norms import Norms
from vmapsafe.quantities.protocol import Quantity
from vmapsafe.quantities.sums import Sum, SumOfSquares

__all__ = ["assert_same", "check_quantity", "check_rule", "loop"]

_BATCH = 3
T = TypeVar("T")


def loop(
    function: Callable[..., T], in_dims: Any = 0, out_dims: int = 0
) -> Callable[..., T]:
    """``torch.func.vmap`` as a Python loop: slow, and obviously right.

    >>> import torch
    >>> from vmapsafe.testing import loop
    >>> x = torch.arange(6.0).reshape(2, 3)
    >>> loop(torch.sum)(x)
    tensor([ 3., 12.])

    Args:
        function: the function to run on each slice.
        in_dims: as in vmap.
        out_dims: the dimension along which every output stacks the slices, an int.

    Returns:
        A function of the batched arguments. It returns a tree of tensors. It cannot map
        over an empty batch, and it draws random numbers slice after slice.
    """

    def looped(*args: Any) -> T:
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
        found: T = tree_map(lambda *parts: torch.stack(parts, out_dims), *outputs)
        return found

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
        expected: the tree that ``actual`` should equal.
        rtol: the relative tolerance for values.
        atol: the absolute tolerance for values.

    Raises:
        AssertionError: the trees differ; the text says where and by how much.
    """
    a, a_tree = tree_flatten(actual)
    e, e_tree = tree_flatten(expected)
    assert a_tree == e_tree, f"structure {a_tree} instead of {e_tree}"
    for x, y in zip(a, e):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


Rows = dict[str, Tensor]
Made = Quantity[Any] | Callable[[Mapping[str, Tensor], int], Quantity[Any]]


def check_quantity(
    quantity: Made, expected: Callable[[Rows, Tensor], Any], *, rtol: float = 1e-11
) -> int:
    """Compare a quantity of per-sample gradients with what follows from the rows.

    The rows come from a loop of plain backward passes. The networks have layers whose
    gradients come from formulas, a layer that is used twice, a tied weight, a weight
    that something else uses, a parameter that the loss does not use, and an embedding.
    Each runs with all samples at once and in chunks of one, two and three, by a
    recorded forward and by ``vmap(grad)``, in float64 and float32, twice with the same
    object, and for an empty batch.

    >>> from vmapsafe import quantities as q
    >>> from vmapsafe.testing import check_quantity
    >>> def total(rows, losses):
    ...     return {name: row.sum(0) for name, row in rows.items()}
    >>> check_quantity(q.Sum(), total) > 0
    True

    Args:
        quantity: the quantity; or a function that makes one, of the parameters by name
            and the number of samples, for quantities that need tensors.
        expected: the same from rows {name: (B, *shape)} and losses (B,), in plain
            torch. B is 5, and 0 for an empty batch.
        rtol: how far results in float64 may be off, as a part of the largest entry;
            those in float32 may be off by a hundred million times as much.

    Returns:
        How many calls were compared.

    Raises:
        AssertionError: a result has another structure, shape, dtype or value; the text
            names the network and the call.
        TypeError: ``quantity`` is a class.
    """
    _refuse_class(quantity)
    compared = 0
    dtypes = {torch.float64: rtol, torch.float32: 1e8 * rtol}
    for (name, make), dtype in itertools.product(_networks().items(), dtypes):
        torch.manual_seed(0)
        model, x = make()
        model = model.to(dtype).eval()
        x = x.to(dtype) if x.is_floating_point() else x
        params = {n: p.detach() for n, p in model.named_parameters()}
        for size in (len(x), 0):
            one = quantity
            one = one if isinstance(one, Quantity) else one(params, size)
            rows, losses = _looped(model, x[:size])
            wanted = expected(rows, losses), _others(rows)
            for chunk_size, by_vmap in itertools.product((None, 1, 2, 3), (0, 1)):
                how = f"chunk_size={chunk_size}" + ", vmap(grad)" * by_vmap
                where = f"{name}, {dtype}, {size} samples, {how}"
                try:
                    found = _asked(model, x[:size], one, chunk_size, bool(by_vmap))
                except Exception as error:
                    error.add_note(f"check_quantity: {where}")
                    raise
                _close(found[0], wanted[0], dtypes[dtype], where)
                beside = f"{where}, what is beside it"
                _close(found[1], wanted[1], dtypes[dtype], beside)
                compared += 1
    return compared


def _refuse_class(quantity: object) -> None:
    if isinstance(quantity, type) and issubclass(quantity, Quantity):
        raise TypeError(f"check_quantity: write {quantity.__name__}(...).")


def _asked(
    model: nn.Module,
    x: Tensor,
    quantity: Quantity[Any],
    chunk_size: int | None,
    by_vmap: bool,
) -> tuple[Any, Any]:
    """The quantity, and others that are computed beside it."""
    want = {"": quantity, "sum": Sum(), "norms": Norms(), "squares": SumOfSquares()}

    def call(x: Tensor) -> Any:
        return per_sample(model, _loss, x, want=want, chunk_size=chunk_size)

    if by_vmap:  # which alone can follow a call inside another transform
        found = vmap(call)(x.unsqueeze(0))
        found = tree_map(lambda t: t.squeeze(0), found)
    else:
        found = call(x)
    return found.pop(""), found


def _others(rows: Rows) -> dict[str, Any]:
    """What stands beside the quantity, from rows."""
    flat = [row.flatten(1) for row in rows.values()]
    return {
        "sum": {name: row.sum(0) for name, row in rows.items()},
        "norms": torch.cat(flat, 1).norm(dim=1),
        "squares": {name: row.square().sum(0) for name, row in rows.items()},
    }


def _loss(output: Tensor) -> Tensor:
    return (output.square() + output).sum()


def _looped(model: nn.Module, x: Tensor) -> tuple[Rows, Tensor]:
    """Rows and losses, by a loop of plain backward passes."""
    names, leaves = zip(*model.named_parameters())
    rows: Rows = {n: p.new_empty(len(x), *p.shape) for n, p in zip(names, leaves)}
    losses = leaves[0].new_empty(len(x))
    for i in range(len(x)):
        loss = _loss(model(x[i : i + 1]))
        losses[i] = loss.detach()
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        for name, leaf, grad in zip(names, leaves, found):
            rows[name][i] = torch.zeros_like(leaf) if grad is None else grad
    return rows, losses


def _close(found: Any, wanted: Any, rtol: float, where: str) -> None:
    f, tree = tree_flatten(found)
    w, wanted_tree = tree_flatten(wanted)
    assert tree == wanted_tree, f"{where}: structure {tree} instead of {wanted_tree}"
    finite = [t[t.isfinite()].abs() for t in w]
    sizes = [float(t.max()) if t.numel() else 0.0 for t in finite]
    for one, other, size in zip(f, w, sizes):
        scale = max(size, 1e-3 * max(sizes))  # small ones have the errors of large ones
        torch.testing.assert_close(
            one,
            other,
            rtol=0,
            atol=rtol * scale,
            equal_nan=True,
            msg=lambda text: f"{where}: {text}",
        )


class _Uses(nn.Module):
    """A layer used twice, a weight that a sum uses too, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(4, 3), nn.Linear(3, 3)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = self.twice(torch.tanh(self.twice(x)))
        return x * self.first.weight.sum(1)


class _Tied(nn.Module):
    """An embedding whose weight is that of the last layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)
        self.last = nn.Linear(3, 5, bias=False)
        self.last.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(torch.tanh(self.layer(self.words(x)).mean(1)))
        return output


def _networks() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    def convolutions() -> tuple[nn.Module, Tensor]:
        layers = nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 4, 2, groups=2)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 2)), _input(2, 5)

    def layers() -> tuple[nn.Module, Tensor]:
        norms = nn.BatchNorm1d(6), nn.Tanh(), nn.LayerNorm(6)
        net = nn.Sequential(nn.Linear(4, 6), *norms, nn.Linear(6, 2))
        net(_input(4))  # so that there are running statistics
        return net, _input(4)

    return {
        "linear layers and norms": layers,
        "convolutions": convolutions,
        "a layer used twice": lambda: (_Uses(), _input(4)),
        "a tied embedding": lambda: (_Tied(), torch.randint(5, (_SAMPLES, 4))),
        # Rows come one at a time where a parameter has many numbers.
        "a large layer": lambda: (
            nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2**18)),
            _input(4),
        ),
        "an embedding": lambda: (
            nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 2)),
            torch.randint(9, (_SAMPLES, 3)),
        ),
    }


def _input(*shape: int) -> Tensor:
    return torch.randn(_SAMPLES, *shape)


_SAMPLES = 5  # not a multiple of most chunk sizes

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

    For each case and each choice of which of its tensors are batched, this runs the
    rule under ``vmap``, along the first dimension or the last, and under two nested
    vmaps. It compares values, dtypes and, for a random cotangent, the gradients of all
    floating tensors with those of the reference. The rule of an operator replaces
    torch's batching rule. It must apply to each case for at least one choice of what is
    batched, and it also runs on tensors without derivatives.

    Then this does the same for each case in float32 and bfloat16, with images and
    volumes channels last, and for an empty batch. Here the rule need not apply, and
    a comparison is skipped if torch's own behaviour fails as well.

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
        rule: the rule, which need not be registered.
        cases: the arguments of one slice by name for each case. Use float64 where
            there is a choice.
        site: where in a model the calls are made, for rules that ask.
        batched: the names of the arguments that may be batched; by default all tensors.
            Name them if the rule has no meaning for others.
        derived: by name, the arguments that follow from the others, such as statistics
            saved by a forward. Each is a function of the arguments of one slice, which
            include the derived ones before it in this dict.

    Returns:
        The number of comparisons made.

    Raises:
        AssertionError: the rule does not apply to a case, or differs from its
            reference.
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
    """Every choice of batch dimensions in which something is batched."""
    for choice in itertools.product(dims, repeat=len(names)):
        if any(dim is not None for dim in choice):
            yield dict(zip(names, choice))


@dataclass(frozen=True)
class _Trial:
    """One comparison.

    If ``nested``, two vmaps run, one inside the other. If ``plain``, no derivatives are
    taken, and a rule may write in place. If ``last``, images and volumes have their
    channels last in memory.
    """

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
    """Whether the rule accepts the call; the rule of a function sees one slice."""
    if isinstance(rule, OperatorRule):
        return rule.accepts(_whole(rule, trial, _values(trial)))
    return rule.accepts(Call(rule.functions[0], trial.case, trial.site))


def _runs(rule: Rule, trial: _Trial) -> bool:
    """Whether there is something to compare. False if torch's own code fails too."""
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
    """Raise if the rule differs from its reference; return True otherwise."""
    taken: list[Call] = []

    def noted(call: Call) -> Any:
        taken.append(call)
        return rule.batched(call)

    values = _values(trial)
    actual = _actual(replace(rule, batched=noted), trial, values)
    expected = _expected(rule, trial, values)
    what = f"{rule.name}, {trial}"
    # Inside a second vmap tensors are wrapped, and some rules do not apply to those.
    assert taken or trial.nested and trial.plain, f"never called: {what}"
    assert len(actual) == len(expected), what
    for one, other in zip(actual, expected):
        watched = other.requires_grad and not trial.plain
        assert one.requires_grad or not watched, f"no gradients of {what}"
    # torch has no derivative of an output that the reference does not differentiate.
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
    """How far rounding moves the reference: far if large numbers cancel."""
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
    """The tensors that are or may be batched, batch dimension first.

    They are the same for the same trial.
    """
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
    """The arguments of one slice, with the derived ones."""
    completed = dict(arguments)
    for name, function in derived.items():
        completed[name] = function(completed)
    return completed


def _whole(rule: Rule, trial: _Trial, values: Mapping[str, Tensor]) -> Call:
    """The call on whole batches, batch dimension first."""
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
    """The outputs of the rule for these values, batch dimension first."""

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
    """The outputs of the rule's reference.

    For an empty batch it runs on a batch of one, whose outputs are cut to length 0.
    """
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


# The tolerance for each dtype, relative to the largest entry.
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
