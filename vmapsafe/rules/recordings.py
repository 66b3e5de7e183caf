"""What per-sample gradients keep of a call: each layer says it here, for ``_rows``.

Autograd would make the gradients of all samples' copies of a weight, B x P numbers. So
the functions in this table are called on the whole batch with the plain parameters. A
layer gives that call in one of two forms, and ``_rows/record`` does the rest:

* :class:`ByFormulas`: backward keeps the input and hands the output gradient to a
  formula for each parameter (``formulas``);
* :class:`ByKernel`: one kernel makes the input gradient and all rows, which are small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vmapsafe._call import Function, Parameters
from vmapsafe.rules.formulas import Formula


@dataclass(frozen=True)
class ByFormulas:
    """A call on the whole batch whose rows follow from input and output gradient.

    Attributes:
        forward: of the input (B, ...).
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
        forward: of the input (B, ...); gives the output, and what backward needs.
        backward: of the output gradient, the input, what forward gave, and for the
            input and each parameter whether its gradient is wanted; gives those.
    """

    forward: Callable[[Tensor], Sequence[Tensor]]
    backward: Callable[
        [Tensor, Tensor, Sequence[Tensor], Sequence[bool]], Sequence[Tensor | None]
    ]


Record = ByFormulas | ByKernel


@dataclass(frozen=True)
class Recording:
    """What is kept of the calls of a function.

    Attributes:
        record: has the function's own signature. It is called with the whole batch as
            ``input``, (B, ...), and plain parameters; None where the call is not kept.
        parameters: the names of the arguments that may be parameters.
        otherwise: what a call means that is not kept, on one slice and its own copies
            of the parameters; torch's own by default.
    """

    record: Callable[..., Record | None]
    parameters: tuple[str, ...] = ("weight", "bias")
    otherwise: Function | None = None


# What is kept of the calls of each function, and the names of their arguments.
RECORDINGS: dict[Function, tuple[Recording, Parameters]] = {}


def record_calls(function: Function, recording: Recording) -> None:
    """Say what is kept of the calls of ``function``."""
    RECORDINGS[function] = recording, Parameters.of(recording.record)
