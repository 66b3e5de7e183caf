"""What per-sample gradients keep of a call: each layer says it here, for ``_rows``.

Autograd would make the gradients of all samples' copies of a weight, B x P numbers. So
``_rows/record`` calls the functions in this table on the whole batch, with the
parameters themselves instead of their copies. A layer describes that call in one of two
forms:

* :class:`ByFormulas`: the input is kept, and backward gives it and the output gradient
  to a formula for each parameter (``formulas``);
* :class:`ByKernel`: one kernel makes the input gradient and all rows, which are small.

The input of such a call is (B, N, ...): for each of B samples, the input of its slice.
N is the length of the slice's own batch dimension, 1 in most networks. So channels are
dimension 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vmapsafe._call import Function, Signature
from vmapsafe.rules.formulas import Formula, Scale, Shift, along
from vmapsafe.rules.precision import wide


@dataclass(frozen=True)
class ByFormulas:
    """A call on the whole batch whose rows follow from input and output gradient.

    Attributes:
        forward: takes the input (B, N, ...) and returns the output.
        input_gradient: takes the input and the output gradient, in one dtype, and
            returns the input gradient. It is None if the input does not have one.
        formulas: the formula of each parameter, by the argument's name.
    """

    forward: Callable[[Tensor], Tensor]
    input_gradient: Callable[[Tensor, Tensor], Tensor] | None
    formulas: Mapping[str, Formula]


@dataclass(frozen=True)
class ByKernel:
    """A call on the whole batch whose rows come out of one kernel.

    Attributes:
        forward: takes the input (B, N, ...). It returns the output, followed by the
            tensors that backward needs.
        backward: takes the output gradient, the input, those tensors, and for the input
            and each parameter whether its gradient is wanted. It returns the gradients,
            each in memory of its own.
        affine: how to make it where only one slice is to be seen, if it can be made so.
        rows: takes the output gradient, the input, and for each parameter whether its
            rows are wanted, and returns them. It is None if they need more than that.
    """

    forward: Callable[[Tensor], Sequence[Tensor]]
    backward: Callable[
        [Tensor, Tensor, Sequence[Tensor], Sequence[bool]], Sequence[Tensor | None]
    ]
    affine: Affine | None = None
    rows: Callable[[Tensor, Tensor, Sequence[bool]], Sequence[Tensor | None]] | None = (
        None
    )


@dataclass(frozen=True)
class Affine:
    """A call that multiplies by a weight, and adds a bias, in the end.

    Attributes:
        before: takes the input of a slice, (N, ...), and returns what is multiplied.
        first: the dimension of that, in a whole batch (B, N, ...), that is the first of
            the parameters.
    """

    before: Callable[[Tensor], Tensor]
    first: int


KeptCall = ByFormulas | ByKernel


@dataclass(frozen=True)
class KeptCalls:
    """How per-sample gradients keep the calls of a function.

    Attributes:
        keep: has the function's own signature. It gets the whole batch as ``input``,
            and the parameters themselves. It returns None for a call that cannot be
            kept.
        parameters: the names of the arguments that may be parameters.
        otherwise: runs a call that is not kept, on one slice and its own copies of the
            parameters. By default it is the function itself.
    """

    keep: Callable[..., KeptCall | None]
    parameters: tuple[str, ...] = ("weight", "bias")
    otherwise: Function | None = None


# How the calls of each function are kept, and the names of their arguments.
KEPT_CALLS: dict[Function, tuple[KeptCalls, Signature]] = {}


def keep_calls(function: Function, kept: KeptCalls) -> None:
    """Register how the calls of ``function`` are kept."""
    KEPT_CALLS[function] = kept, Signature.of(kept.keep)


# -- On a slice ------------------------------------------------------------------------


@dataclass(frozen=True)
class OnASlice:
    """A call on one slice, (N, ...), with the parameters themselves.

    Attributes:
        run: makes it. It returns what the formulas need in the place of the input, and
            the output.
        formulas: the formula of each parameter, by the argument's name.
    """

    run: Callable[[], tuple[Tensor, Tensor]]
    formulas: Mapping[str, Formula]


def on_a_slice(
    function: Function, kept: KeptCalls, arguments: Mapping[str, Any]
) -> OnASlice | None:
    """The call of a function, if it can be kept, where only one slice is to be seen."""
    x: Tensor = arguments["input"]
    call = kept.keep(**{**arguments, "input": x.unsqueeze(0)})
    if isinstance(call, ByFormulas):
        return OnASlice(lambda: (x, function(**arguments)), call.formulas)
    if call is None or call.affine is None or wide(x).dtype != x.dtype:
        return None
    affine = call.affine
    first = affine.first - 1 if affine.first > 0 else affine.first
    weight, bias = arguments.get("weight"), arguments.get("bias")

    def run() -> tuple[Tensor, Tensor]:
        before = y = affine.before(x)
        if weight is not None:
            y = y * along(weight, y, first)
        if bias is not None:
            y = y + along(bias, y, first)
        return before, y

    formulas: dict[str, Formula] = {}
    if weight is not None:
        formulas["weight"] = Scale(weight.shape, affine.first)
    if bias is not None:
        formulas["bias"] = Shift(bias.shape, affine.first)
    return OnASlice(run, formulas)
