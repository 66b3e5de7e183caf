"""What per-sample gradients keep of a call: each layer says it here, for ``_rows``.

Autograd would make the gradients of all samples' copies of a weight, B x P numbers. So
the functions in this table are called on the whole batch with the plain parameters. A
layer gives that call in one of two forms, and ``_rows/record`` does the rest:

* :class:`ByFormulas`: backward keeps the input and hands the output gradient to a
  formula for each parameter (``formulas``);
* :class:`ByKernel`: one kernel makes the input gradient and all rows, which are small.

The input of such a call is (B, N, ...): of each of B samples what its slice passes, and
N is the length of the slice's own batch dimension, 1 in most networks. So channels are
dimension 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vmapsafe._call import Function, Signature
from vmapsafe.rules.formulas import Formula


@dataclass(frozen=True)
class ByFormulas:
    """A call on the whole batch whose rows follow from input and output gradient.

    Attributes:
        forward: of the input (B, N, ...).
        input_gradient: of the input and the output gradient, in one dtype; None where
            the input has no gradient.
        formulas: by the argument's name.
    """

    forward: Callable[[Tensor], Tensor]
    input_gradient: Callable[[Tensor, Tensor], Tensor] | None
    formulas: Mapping[str, Formula]


@dataclass(frozen=True)
class ByKernel:
    """A call on the whole batch whose rows come out of one kernel.

    Attributes:
        forward: of the input (B, N, ...); gives the output, and what backward needs.
        backward: of the output gradient, the input, what forward gave, and for the
            input and each parameter whether its gradient is wanted; gives those.
    """

    forward: Callable[[Tensor], Sequence[Tensor]]
    backward: Callable[
        [Tensor, Tensor, Sequence[Tensor], Sequence[bool]], Sequence[Tensor | None]
    ]


KeptCall = ByFormulas | ByKernel


@dataclass(frozen=True)
class KeptCalls:
    """What is kept of the calls of a function.

    Attributes:
        keep: has the function's own signature. It gets the whole batch as ``input``,
            and plain parameters; it gives None for a call that is not kept.
        parameters: the names of the arguments that may be parameters.
        otherwise: what makes a call that is not kept, on one slice and its own copies
            of the parameters; by default the function itself.
    """

    keep: Callable[..., KeptCall | None]
    parameters: tuple[str, ...] = ("weight", "bias")
    otherwise: Function | None = None


# What is kept of the calls of each function, and the names of their arguments.
KEPT_CALLS: dict[Function, tuple[KeptCalls, Signature]] = {}


def keep_calls(function: Function, kept: KeptCalls) -> None:
    """Say what is kept of the calls of ``function``."""
    KEPT_CALLS[function] = kept, Signature.of(kept.keep)
