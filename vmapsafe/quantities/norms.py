"""Losses, and the norms of gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from vmapsafe._modes import check_flag
from vmapsafe.quantities.protocol import All, CallShape, Grads, Part, PerSample
from vmapsafe.rules.formulas import flat, norms_of, wide_norms

T = TypeVar("T", covariant=True)


@dataclass(frozen=True, eq=False)
class Losses(PerSample[Tensor]):
    """The loss of every sample, (B,).

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> per_sample(net, nn.MSELoss(), x, y, want=q.Losses()).shape
    torch.Size([5])

    Attributes:
        gather: "all" for those of all processes, as in :class:`Norms`.
    """

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return _LossesPart()


class _LossesPart(Part):
    _losses: Tensor

    def take_losses(self, losses: Tensor) -> None:
        self._losses = losses

    def take(self, grads: Grads) -> None:
        """Losses are all."""

    def finished(self) -> Tensor:
        return self._losses


@dataclass(frozen=True, eq=False, init=False)
class Norms(PerSample[T]):
    """The Euclidean norm of every sample's gradient, (B,).

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> per_sample(net, nn.MSELoss(), x, y, want=q.Norms()).shape
    torch.Size([5])
    >>> norms = per_sample(net, nn.MSELoss(), x, y, want=q.Norms(per_parameter=True))
    >>> {name: tuple(n.shape) for name, n in norms.items()}
    {'weight': (5,), 'bias': (5,)}

    Args:
        per_parameter: whether to give a norm for each parameter, {name: (B,)}, and not
            one of all.
        gather: "all" gives those of all processes of torch.distributed's default group,
            those of rank 0 first; their batches may differ in size. Every process has
            to make the call; if one fails, all raise.

    The norms are in the dtype of the parameters, and in float32 for half precision. A
    sample with NaN has the norm NaN, and the others have theirs. In "sync" they are
    norms of contributions, which are not independent: a noise scale estimated from them
    may be off by a large factor, see ``vmapsafe.examples.noise_scale``.
    """

    per_parameter: bool
    asks = ("norms",)

    @overload
    def __init__(
        self: Norms[Tensor],
        per_parameter: Literal[False] = False,
        *,
        gather: All = None,
    ) -> None: ...

    @overload
    def __init__(
        self: Norms[dict[str, Tensor]],
        per_parameter: Literal[True],
        *,
        gather: All = None,
    ) -> None: ...

    @overload
    def __init__(
        self: Norms[Any], per_parameter: bool, *, gather: All = None
    ) -> None: ...

    def __init__(self, per_parameter: bool = False, *, gather: All = None) -> None:
        check_flag("Norms(...)", "per_parameter", per_parameter)
        object.__setattr__(self, "per_parameter", per_parameter)
        object.__setattr__(self, "gather", gather)

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return ByParameter(call, Grads.norms) if self.per_parameter else NormsPart()


class ByParameter(Part):
    """Collects what a method of :class:`Grads` gives of each parameter."""

    def __init__(self, call: CallShape, of: Callable[[Grads], Tensor]) -> None:
        self._names, self._of = list(call.parameters), of
        self._found: dict[str, Tensor] = {}

    def take(self, grads: Grads) -> None:
        self._found[grads.name] = self._of(grads)

    def finished(self) -> dict[str, Tensor]:
        return {name: self._found[name] for name in self._names}


class NormsPart(Part):
    """Collects the norms of some samples, over parameters that are known at the end.

    Small rows wait for each other, as this takes fewer operations.
    """

    def __init__(self) -> None:
        self._norms: dict[str, Tensor] = {}
        self._small: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def take(self, grads: Grads) -> None:
        if grads.are_small():
            self._small[grads.name] = flat(grads.rows())
        else:
            self._norms[grads.name] = grads.unrounded_norms()
        self._dtypes[grads.name] = grads.dtype_of_norms

    def finished(self) -> Any:
        norms, _ = self.over(list(self._dtypes))
        return norms

    def over(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(B,): the norms over these parameters; and their small rows (B, numbers), one
        after another, in the order of the names."""
        norms = [self._norms[name] for name in names if name in self._norms]
        small = [self._small[name] for name in names if name in self._small]
        rows = torch.cat(small, 1) if small else None
        if rows is not None:
            norms.append(wide_norms(rows))
        each = torch.stack(norms)
        dtypes = {self._dtypes[name] for name in names}
        dtype = functools.reduce(torch.promote_types, dtypes)
        if each.dtype == dtype:
            return norms_of(each.mT), rows
        return torch.linalg.vector_norm(each, dim=0).to(dtype), rows
