"""Products of all pairs of samples' gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vmapsafe._errors import VmapSafeTypeError, a_kind, shown
from vmapsafe.quantities.protocol import Block, CallShape, Grads, Paired


@dataclass(frozen=True, eq=False)
class Gram(Paired):
    r"""The inner products :math:`\langle g_i, g_j \rangle` of all pairs, (B, B).

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> per_sample(net, nn.MSELoss(), x, y, want=q.Gram()).shape
    torch.Size([5, 5])
    >>> x2, y2 = torch.randn(3, 4), torch.randn(3, 2)
    >>> per_sample(net, nn.MSELoss(), x, y, want=q.Gram(other=(x2, y2))).shape
    torch.Size([5, 3])

    Attributes:
        other: another batch, a tuple as the call's own batch is: the result is (B, B2),
            the products with the gradients of its samples. It is a batch of its own,
            with its own forward, random draws and, in "sync", statistics; it updates
            none.

    With ``chunk_size`` the matrix is put together from blocks, without approximation: n
    chunks take n (n + 1) / 2 forward and backward passes. The products are in the dtype
    of the parameters, and in float32 for half precision.
    """

    other: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.other, list):  # as a DataLoader gives it
            object.__setattr__(self, "other", tuple(self.other))
        if self.other is not None and not isinstance(self.other, tuple):
            raise VmapSafeTypeError(
                "Gram(...)",
                f"other is {shown(self.other)}, {a_kind(self.other)}",
                "Pass a tuple as the batch of the call is, Gram(other=(x, y))",
            )

    def block(self, call: CallShape) -> Block:
        return _Products()


class _Products(Block):
    """Adds up the products by each parameter."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def take(self, grads: Grads, others: Grads) -> None:
        found = grads.gram(None if others is grads else others)
        self._total = found if self._total is None else self._total + found

    def finished(self) -> Tensor:
        assert self._total is not None
        return self._total
