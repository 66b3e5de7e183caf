"""Sums over the samples' gradients: plain, weighted, clipped, of squares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from vmapsafe._errors import (
    VmapSafeTypeError,
    VmapSafeValueError,
    a_kind,
    shown,
    warn_user,
    worded,
)
from vmapsafe._torch import constant_while_compiling, is_wrapped, without_autograd
from vmapsafe.quantities.norms import ByParameter, Norms, NormsPart
from vmapsafe.quantities.protocol import (
    CallShape,
    Grads,
    Looks,
    OneLook,
    Part,
    Quantity,
    Reduces,
    Summed,
)
from vmapsafe.rules.formulas import weighted_sum

Number = float | Tensor
Group = tuple[Number, list[str]]  # the norm, and the names of parameters

# -- Sum, and the sum of squares -------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sum(Summed):
    """The sum of the samples' gradients, {name: shape}.

    It is the gradient of the summed loss, what ``backward`` gives; with
    ``rows="detached"`` in "sync" it is the sum of those rows, another vector.

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> total = per_sample(net, nn.MSELoss(), x, y, want=q.Sum())
    >>> total["weight"].shape
    torch.Size([2, 4])

    Attributes:
        reduce: "all" for the sum over all processes, as in :class:`Summed`.

    The sums are in the dtype of the parameters, and carry no derivatives.
    """

    asks = ("sum",)

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return ByParameter(call, Grads.sum)


@dataclass(frozen=True, eq=False)
class SumOfSquares(Summed):
    r"""The sum of the entrywise squares of the samples' gradients, {name: shape}.

    Divided by B it is the diagonal of the empirical Fisher matrix,
    :math:`\frac1B \sum_i g_i \odot g_i`. The Fisher matrix itself has labels drawn from
    the model's output, not the data's (Kunstner et al.,
    https://arxiv.org/abs/1905.12558).

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> squares = per_sample(net, nn.MSELoss(), x, y, want=q.SumOfSquares())
    >>> squares["weight"].shape
    torch.Size([2, 4])

    Attributes:
        reduce: "all" for the sum over all processes, as in :class:`Summed`.

    The sums are in the dtype of the parameters, and in float32 for half precision.
    """

    asks = ("squares",)

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return ByParameter(call, Grads.sum_of_squares)


# -- Weighted sums ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class WeightedSum(Reduces):
    r"""The weighted sum of the samples' gradients, :math:`\sum_i w_i g_i`.

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    >>> total = per_sample(net, nn.MSELoss(), x, y, want=q.WeightedSum(mask))
    >>> total["weight"].shape
    torch.Size([2, 4])
    >>> automatic = q.WeightedSum(lambda norms: 1 / (norms + 0.01))
    >>> total = per_sample(net, nn.MSELoss(), x, y, want=automatic)

    Attributes:
        weights: a tensor (B,), or a function of the norms (B,) of all samples that
            returns one. The function of the example is automatic clipping (Bu et al.,
            https://arxiv.org/abs/2206.07136), which is not differentially private by
            itself.
        reduce: "all" for the sum over all processes, as in :class:`Summed`. A function
            sees the norms of its own process.

    A weight of exactly 0 leaves its sample out, even if the gradient is not finite. In
    "sync" it leaves out the gradient, and not the sample's part in the statistics. The
    sum is the gradient of :math:`\sum_i w_i \ell_i`, except in "sync", where only
    ``rows="jacobian"`` gives that; a warning says so. With a function of the norms, and
    ``chunk_size``, each chunk runs twice.
    """

    weights: Tensor | Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Tensor) and not callable(self.weights):
            raise VmapSafeTypeError(
                "WeightedSum(...)",
                f"weights is {shown(self.weights)}, {a_kind(self.weights)}",
                "Pass a tensor (B,), or a function of the norms that returns one",
            )

    def begin(self, call: CallShape) -> Quantity[dict[str, Tensor]]:
        if call.mode.merges and call.rows != "jacobian":
            warn_user(
                worded(
                    f'{call.called} with WeightedSum(...) in mode "{call.mode.name}"',
                    "samples share their statistics there, so that the weighted sum of "
                    f'rows="{call.rows}" is not the gradient of the weighted loss',
                    'For that pass rows="jacobian", or weigh the losses in loss_fn and '
                    "use Sum()",
                ),
                UserWarning,
            )
        if not isinstance(self.weights, Tensor):
            return self
        return _Weighted(_checked(call, self.weights, "weights"))

    def looks(self, call: CallShape) -> Looks[dict[str, Tensor]]:
        norms = yield Norms()
        assert not isinstance(self.weights, Tensor)
        weights = self.weights(norms)
        weights = _checked(call, weights, "what the function of the norms gave")
        found: dict[str, Tensor] = yield _Weighted(weights)
        return found


def _checked(call: CallShape, weights: Any, what: str) -> Tensor:
    count = 0 if call.made_up else call.count
    fits = isinstance(weights, Tensor) and weights.shape == (count,)
    if not fits:
        raise VmapSafeValueError(
            f"{call.called} with WeightedSum(...)",
            f"{what} is {shown(weights)}, and the batch has {count} samples",
            f"Give one real weight for each, a tensor ({count},)",
        )
    device = next(iter(call.parameters.values())).device
    if weights.is_complex() or weights.device != device:
        raise VmapSafeValueError(
            f"{call.called} with WeightedSum(...)",
            f"{what} is {weights.dtype}, on {weights.device}",
            f"Give a real tensor on {device}",
        )
    return without_autograd(weights)


@dataclass(frozen=True, eq=False)
class _Weighted(Summed):
    weights: Tensor

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        weights = self.weights[start:stop]
        if call.made_up:
            weights = self.weights.new_zeros(stop - start)
        return ByParameter(call, lambda grads: grads.weighted_sum(weights))


# -- Clipped sums ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClippedSum(Reduces, OneLook[dict[str, Tensor]]):
    r"""The sum of the samples' gradients, each clipped to a norm.

    With :math:`g_i` the gradient of sample i over all parameters,

    .. math:: \sum_i g_i \min(1, c / \|g_i\|), \quad c = \text{max\_grad\_norm}

    (Abadi et al., https://arxiv.org/abs/1607.00133, algorithm 1, without its noise). It
    is not differentially private by itself.

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> x, y = torch.randn(5, 4), torch.randn(5, 2)
    >>> total = per_sample(net, nn.MSELoss(), x, y, want=q.ClippedSum(1.0))
    >>> groups = q.ClippedSum({"0.*": 1.0, "*": 0.5})
    >>> total = per_sample(net, nn.MSELoss(), x, y, want=groups)
    >>> total["0.weight"].shape
    torch.Size([3, 4])

    Attributes:
        max_grad_norm: the largest norm that a gradient keeps, above 0; or a dict of one
            for each group of parameters. Its keys are patterns of names as in
            ``fnmatch``. The parameters whose first matching pattern is the same are one
            group: their gradients together are clipped to its norm, and each group
            apart. infinity does not clip. A tensor on another device than the CPU is
            not looked at, so if its number is not above 0, the sum is NaN.
        reduce: "all" for the sum over all processes, as in :class:`Summed`.

    The factor of a gradient that is 0 is 1. Opacus adds 1e-6 to the norm; nothing is
    added here. A gradient with NaN, or with a norm that is not finite, makes the whole
    sum NaN.
    """

    max_grad_norm: Number | Mapping[str, Number]

    def __post_init__(self) -> None:
        check_max_grad_norm("ClippedSum(...)", self.max_grad_norm)

    def begin(self, call: CallShape) -> Quantity[dict[str, Tensor]]:
        _warn_if_merged(call)
        return _Clipped(self._groups(call))

    def _groups(self, call: CallShape) -> list[Group]:
        """The norm and the parameters of each group."""
        _check_devices(call, self.max_grad_norm)
        if not isinstance(self.max_grad_norm, Mapping):
            return [(_plain(self.max_grad_norm), list(call.parameters))]
        groups: dict[str, list[str]] = {pattern: [] for pattern in self.max_grad_norm}
        called = f"{call.called} with ClippedSum(...)"
        for name in call.parameters:
            fits = [pattern for pattern in groups if _matches(name, pattern)]
            if not fits:
                raise VmapSafeValueError(
                    called,
                    f"none of the patterns {[*groups]} matches the parameter {name!r}",
                    'Add one that does; "*" matches all that is left',
                )
            groups[fits[0]].append(name)
        empty = [pattern for pattern, names in groups.items() if not names]
        if empty:
            raise VmapSafeValueError(
                called,
                f"the pattern {empty[0]!r} matches no parameter, or only such as an "
                "earlier pattern does",
                "Names are those of model.named_parameters(), and patterns those of "
                "fnmatch; leave it out, or put it first",
            )
        most = self.max_grad_norm
        return [(_plain(most[pattern]), names) for pattern, names in groups.items()]


def _check_devices(call: CallShape, given: Number | Mapping[str, Number]) -> None:
    device = next(iter(call.parameters.values())).device
    for number in given.values() if isinstance(given, Mapping) else (given,):
        if isinstance(number, Tensor) and number.device not in (device, _CPU):
            raise VmapSafeValueError(
                f"{call.called} with ClippedSum(...)",
                f"max_grad_norm is on {number.device}, and the parameters on {device}",
                "Pass a number, or a tensor on the device of the parameters",
            )


_CPU = torch.device("cpu")  # whose numbers combine with tensors everywhere


@constant_while_compiling
def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern)


def _plain(number: Number) -> Number:
    if not isinstance(number, Tensor):
        return number
    number = without_autograd(number)
    return torch.where(number > 0, number, torch.nan)


def check_max_grad_norm(called: str, given: Any) -> None:
    """Raise unless it is a number above 0, or a dict of such.

    Args:
        called: for errors.
        given: what the caller wrote.

    Raises:
        VmapSafeTypeError: it is neither.
        VmapSafeValueError: a number is not above 0, or the dict is empty.
    """
    if isinstance(given, Mapping):
        if not given or not all([isinstance(pattern, str) for pattern in given]):
            raise VmapSafeValueError(
                called,
                f"max_grad_norm is {shown(given)}",
                'Give patterns of names and their norms, as {"0.*": 1.0, "*": 0.5}',
            )
        for pattern, number in given.items():
            _check_number(called, f"max_grad_norm[{pattern!r}]", number)
        return
    _check_number(called, "max_grad_norm", given)


def _check_number(called: str, what: str, given: Any) -> None:
    number = isinstance(given, (int, float, Tensor))
    has_dims = isinstance(given, Tensor) and given.dim() > 0
    if not number or isinstance(given, bool) or has_dims:
        raise VmapSafeTypeError(
            called,
            f"{what} is {shown(given)}, {a_kind(given)}",
            "Pass one number, the largest norm a row may keep",
        )
    if isinstance(given, Tensor) and (given.device.type != "cpu" or is_wrapped(given)):
        return  # whose number may not be looked at, or only by waiting for the device
    if not given > 0:
        raise VmapSafeValueError(
            called,
            f"{what} is {given!r}",
            "Pass the largest norm a row may keep, above 0",
        )


def _warn_if_merged(call: CallShape) -> None:
    if call.mode.merges:
        warn_user(
            worded(
                f'{call.called} in mode "{call.mode.name}"',
                "samples share their statistics there, so that a row depends on "
                "all samples and clipping it bounds no sample's influence",
                "Use another mode if that is what clipping is for",
            ),
            UserWarning,
        )


@dataclass(frozen=True, eq=False)
class _Clipped(Summed):
    groups: list[Group]
    asks = ("norms",)

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return _ClippedPart(call, self.groups)


class _ClippedPart(Part):
    """Keeps what the rows come from until the norms of all parameters are known."""

    def __init__(self, call: CallShape, groups: list[Group]) -> None:
        self._names, self._groups = list(call.parameters), groups
        self._norms = NormsPart()
        self._grads: dict[str, Grads] = {}

    def take(self, grads: Grads) -> None:
        held = grads.held()
        self._norms.take(held)
        self._grads[grads.name] = held

    def finished(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for most, names in self._groups:
            norms, small = self._norms.over(names)
            factors = (most / norms).clamp(max=1)
            factors = torch.where(norms.isfinite(), factors, torch.nan)
            total = None if small is None else weighted_sum(small, factors)
            start = 0
            for name in names:
                grads = self._grads.pop(name)
                if total is not None and grads.are_small():
                    stop = start + grads.shape.numel()
                    sums[name] = total[start:stop].view(grads.shape).to(grads.dtype)
                    start = stop
                else:
                    sums[name] = grads.scaled_sum(factors)
        return {name: sums[name] for name in self._names}
