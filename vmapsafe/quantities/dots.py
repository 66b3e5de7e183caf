"""Products of the samples' gradients with given vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, a_kind, shown
from vmapsafe._torch import without_autograd
from vmapsafe.quantities.protocol import (
    CallShape,
    Gathers,
    Grads,
    OneLook,
    Part,
    PerSample,
    Quantity,
)
from vmapsafe.rules.precision import wide


@dataclass(frozen=True, eq=False)
class Dots(Gathers[Tensor], OneLook[Tensor]):
    r"""The inner products of each gradient with given vectors, (B,) or (B, K).

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> v = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    >>> per_sample(net, nn.MSELoss(), x, y, want=q.Dots(v)).shape
    torch.Size([5])
    >>> three = {name: torch.randn(3, *p.shape) for name, p in net.named_parameters()}
    >>> per_sample(net, nn.MSELoss(), x, y, want=q.Dots(three)).shape
    torch.Size([5, 3])

    Attributes:
        vectors: a tensor for each parameter by which the call differentiates, by name:
            (*shape) for one vector, (K, *shape) for K of them.
        gather: "all" for those of all processes, as in :class:`Norms`.

    They are :math:`\langle g_i, v_k \rangle`, summed over the parameters, in the dtype
    of the parameters, and in float32 for half precision. One layer's product with one
    vector costs about as much as its forward. With the sum of some gradients as the
    vector, these are influences as in TracIn (Pruthi et al.,
    https://arxiv.org/abs/2002.08484).
    """

    vectors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not isinstance(self.vectors, Mapping):
            raise VmapSafeTypeError(
                "Dots(...)",
                f"vectors is {shown(self.vectors)}, {a_kind(self.vectors)}",
                "Pass a dict from names of parameters to tensors",
            )

    def begin(self, call: CallShape) -> Quantity[Tensor]:
        many = _checked(call, self.vectors)
        vectors = {}
        for name, value in call.parameters.items():
            vector = without_autograd(self.vectors[name])
            vector = vector.to(wide(value.new_empty(0)).dtype)
            vectors[name] = vector if many else vector.unsqueeze(0)
        return _DotsOfCall(vectors, many)


def _checked(call: CallShape, vectors: Mapping[str, Tensor]) -> bool:
    """Whether each name has several vectors; raises where they do not fit."""
    called = f"{call.called} with Dots(...)"
    names = call.parameters
    missing = [name for name in names if name not in vectors]
    unknown = [name for name in vectors if name not in names]
    if missing or unknown:
        raise VmapSafeValueError(
            called,
            (
                f"vectors lacks {missing[0]!r}"
                if missing
                else f"vectors has {shown(unknown[0])}, by which the call does not "
                "differentiate"
            ),
            "Give one for each name in " + shown([*names]) + ", or choose with params=",
        )
    counts: dict[str, int | None] = {}
    for name, value in names.items():
        given = vectors[name]
        shape = tuple(given.shape) if isinstance(given, Tensor) else None
        if shape is not None and shape == tuple(value.shape):
            counts[name] = None
        elif shape is not None and shape[1:] == tuple(value.shape) and shape[0]:
            counts[name] = shape[0]
        else:
            raise VmapSafeValueError(
                called,
                f"vectors[{name!r}] is {shown(given)}, and the parameter has shape "
                f"{tuple(value.shape)}",
                f"Give {tuple(value.shape)} for one vector, or K of them as "
                f"{('K', *value.shape)}".replace("'", ""),
            )
        if given.is_complex() or given.device != value.device:
            raise VmapSafeValueError(
                called,
                f"vectors[{name!r}] is {given.dtype}, on {given.device}",
                f"Give a real tensor on {value.device}",
            )
    first = next(iter(counts.values()))
    for name, count in counts.items():
        if count != first:
            one, other = ("one" if c is None else str(c) for c in (first, count))
            raise VmapSafeValueError(
                called,
                f"vectors[{next(iter(counts))!r}] holds {one} and vectors[{name!r}] "
                f"{other}",
                "Give the same number of vectors for every name",
            )
    return first is not None


@dataclass(frozen=True, eq=False)
class _DotsOfCall(PerSample[Tensor]):
    vectors: Mapping[str, Tensor]
    many: bool

    def part(self, call: CallShape, start: int, stop: int) -> Part:
        return _DotsPart(self.vectors, self.many)


class _DotsPart(Part):
    def __init__(self, vectors: Mapping[str, Tensor], many: bool) -> None:
        self._vectors, self._many = vectors, many
        self._dots: list[Tensor] = []

    def take(self, grads: Grads) -> None:
        self._dots.append(grads.dots(self._vectors[grads.name]))

    def finished(self) -> Tensor:
        total = torch.stack(self._dots).sum(0)
        return total if self._many else total.squeeze(1)
