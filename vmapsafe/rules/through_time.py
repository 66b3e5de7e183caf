"""A recurrent layer for per-sample gradients, with one product for the steps' weights.

Let W be the weight that multiplies the hidden state h_(t-1) at step t, and d_t the
gradient by the product. Sample i has the row

.. math:: dW_i = \\sum_t d_{i,t} h_{i,t-1}^T

It is that of a linear layer which is called once, with the states of all steps as its
input, as in Opacus's DPLSTM and in BackPACK. So all states are computed first, without
derivatives. :func:`products` of them follows, which is kept as ``F.linear`` is
(``kept_calls``). Its output gets the gradient that :class:`_ThroughTime` computes by
going back through all steps. The projection of an LSTM is done in the same way.

The states are constants in that call. So this is right for one reverse mode, and not
for a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vmapsafe._torch import (
    batch_behind,
    below_innermost,
    current_level,
    handle_torch_function,
    has_torch_function,
    slices_of,
    unseen_by_modes,
    unwatched,
    vmap_size,
)
from vmapsafe.rules.formulas import Bias, Formula
from vmapsafe.rules.gates import Kind, State, Steps, Weights
from vmapsafe.rules.kept_calls import ByFormulas, KeptCalls, keep_calls
from vmapsafe.rules.linear import Weight


def through_time(
    kind: Kind, x: Tensor, state: State, weights: Weights
) -> tuple[Tensor, State]:
    """One layer in one direction.

    Args:
        kind: its kind.
        x: the products of the inputs (T, N, G).
        state: the initial states (N, ...).
        weights: those of the hidden states.

    Returns:
        The hidden states (T, N, P) and the last state.
    """
    level = current_level()
    size = vmap_size(level)

    def batch(tensor: Tensor) -> Tensor:
        found = batch_behind(tensor, level, size)
        assert found is not None
        return found

    with below_innermost():
        given = [batch(x), *map(batch, state)]
        with torch.no_grad(), unseen_by_modes(), unwatched():
            values, shared = _values(weights, batch)
            layout = _Layout(size, x.size(1), shared)
            first, *initial = [one.detach() for one in given]
            starts = tuple([layout.merged(one) for one in initial])
            steps = kind.run(layout.by_time(first), starts, values)
            hidden = _copy(layout.by_sample(steps.hidden[:-1]))
            unprojected = None
            if steps.unprojected is not None:
                unprojected = _copy(layout.by_sample(steps.unprojected))
    h = products(slices_of(hidden, level), weights.hidden, weights.bias)
    projected = None
    if unprojected is not None and weights.projection is not None:
        projected = products(slices_of(unprojected, level), weights.projection)
    with below_innermost():
        outputs = _ThroughTime.apply(
            _Passed(kind, steps, layout, values),
            batch(h),
            None if projected is None else batch(projected),
            *given,
        )
    found, *last = [slices_of(one, level) for one in outputs]
    return found, tuple(last)


# -- The products of all steps ---------------------------------------------------------


def products(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A tensor of zeros that has the gradients of ``F.linear``.

    Nobody needs the values, as the states are computed. A mode sees the call.
    """
    if has_torch_function((input,)):
        given = input, weight, bias
        shown: Tensor = handle_torch_function(products, (), *given)
        return shown
    found = F.linear(input, weight, bias)
    return found - found.detach()


def _keep(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> ByFormulas | None:
    formulas: dict[str, Formula] = {"weight": Weight(weight.shape, None)}
    if bias is not None:
        formulas["bias"] = Bias(bias.shape, -1)
    return ByFormulas(
        forward=lambda x: x.new_zeros(()).expand(*x.shape[:-1], len(weight)),
        input_gradient=lambda x, grad: grad @ weight,
        formulas=formulas,
    )


keep_calls(products, KeptCalls(_keep))


# -- The pass back ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How sequences lie: (B, T, N, ...) for the samples; (T, B * N, ...) for all steps,
    or (T, B, N, ...) where the weights of the samples differ."""

    size: int
    sequences: int
    shared: bool

    def by_time(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return x.flatten(1, 2) if self.shared else x

    def by_sample(self, x: Tensor) -> Tensor:
        return self.apart(x, 1).transpose(0, 1)

    def merged(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.shared else x

    def apart(self, x: Tensor, dim: int = 0) -> Tensor:
        return x.unflatten(dim, (self.size, self.sequences)) if self.shared else x


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _values(
    weights: Weights, batch: Callable[[Tensor], Tensor]
) -> tuple[Weights, bool]:
    """The numbers of the samples' weights; and whether all samples have the same."""
    found = [None if w is None else batch(w).detach() for w in weights]
    copies = [w for w in found if w is not None]
    shared = all([len(w) == 1 or w.stride(0) == 0 for w in copies])
    if shared:
        found = [None if w is None else w[0] for w in found]
    hidden, bias, projection = found
    assert hidden is not None
    return Weights(hidden, bias, projection), shared


@dataclass(frozen=True)
class _Passed:
    """What the pass through time found, for the pass back."""

    kind: Kind
    steps: Steps
    layout: _Layout
    weights: Weights


class _ThroughTime(Function):
    """The states, as a function of all products and of the initial states."""

    @staticmethod
    def forward(
        ctx: Any,
        passed: _Passed,
        h: Tensor,
        projected: Tensor | None,
        x: Tensor,
        *initial: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.passed = passed
        ctx.set_materialize_grads(False)
        steps, layout = passed.steps, passed.layout
        states = [one for one in (steps.hidden, steps.cells) if one is not None]
        # A copy, as the user may write in place what a layer returns.
        return (
            _copy(layout.by_sample(steps.hidden[1:])),
            *[layout.apart(one[-1]) for one in states],
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        passed: _Passed = ctx.passed
        steps, layout = passed.steps, passed.layout
        of_all, *of_last = grads
        with unseen_by_modes():
            if of_all is None:
                grad = torch.zeros_like(steps.hidden[1:])
            else:
                grad = layout.by_time(of_all)
            if of_last[0] is not None:
                grad = grad.clone()
                grad[-1] += layout.merged(of_last[0])
            last = [
                torch.zeros_like(cells[-1]) if one is None else layout.merged(one)
                for one, cells in zip(of_last[1:], [steps.cells])
                if cells is not None
            ]
            found = passed.kind.back(steps, grad, tuple(last), passed.weights)
            projected = found.projected
            return (
                None,
                layout.by_sample(found.hidden).contiguous(),
                None if projected is None else layout.by_sample(projected),
                layout.by_sample(found.input).contiguous(),
                *[layout.apart(one) for one in found.initial],
            )
