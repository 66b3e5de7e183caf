"""One step of each kind of recurrent layer, and all steps without derivatives.

A step takes two products: of the input and of the hidden state, each with all gates
side by side and its bias added. Notation is that of torch's documentation.

``run`` makes all steps in memory of its own and returns what backward needs. ``back``
goes through them again, last step first (Werbos, https://doi.org/10.1109/5.58337). Both
take time first: (T, M, ...), for M sequences; or (T, B, N, ...) if each of B samples
has weights of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Weights(NamedTuple):
    """What multiplies the hidden state: ``hidden`` (G, P) or (B, G, P); its bias
    (..., G) or None; for a projection (P, H) or (B, P, H)."""

    hidden: Tensor
    bias: Tensor | None
    projection: Tensor | None


@dataclass(frozen=True)
class Steps:
    """All steps, as ``run`` makes them.

    Attributes:
        hidden: (T + 1, ..., P), the hidden states, the initial one first.
        cells: (T + 1, ..., H), those of an LSTM.
        unprojected: (T, ..., H), the hidden states before a projection.
        saved: what else ``back`` needs.
    """

    hidden: Tensor
    cells: Tensor | None
    unprojected: Tensor | None
    saved: tuple[Tensor, ...]


class Gradients(NamedTuple):
    """The gradients by the products of the inputs, of the hidden states and of a
    projection, at all steps, and by the initial states."""

    input: Tensor
    hidden: Tensor
    projected: Tensor | None
    initial: State


class Kind(ABC):
    """A kind of recurrent layer."""

    gates: int

    @abstractmethod
    def step(self, x: Tensor, h: Tensor, state: State) -> State:
        """The next state, of the products of the input and of the hidden state."""

    @abstractmethod
    def run(self, x: Tensor, state: State, weights: Weights) -> Steps:
        """All steps, from the products of all inputs (T, ..., G)."""

    @abstractmethod
    def back(
        self, steps: Steps, grad: Tensor, of_last: State, weights: Weights
    ) -> Gradients:
        """The gradients by all products.

        Args:
            steps: what ``run`` returned.
            grad: the gradient by the hidden states (T, ..., P).
            of_last: that by the last cell, of an LSTM.
            weights: those of ``run``.

        Returns:
            The gradients. They share no memory with what is passed.
        """


@dataclass(frozen=True)
class Elman(Kind):
    """``nn.RNN``: h' = f(x + h)."""

    function: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    # Of the function, from its value.
    derivative: Callable[[Tensor], Tensor]
    gates = 1

    def step(self, x: Tensor, h: Tensor, state: State) -> State:
        return (self.function(x + h),)

    def run(self, x: Tensor, state: State, weights: Weights) -> Steps:
        hidden = torch.cat([state[0].unsqueeze(0), _biased(x, weights.bias)])
        add_product = _adder(weights.hidden.mT)
        h = hidden.unbind()
        for t in range(len(x)):
            add_product(h[t + 1], h[t])
            self.in_place(h[t + 1])
        return Steps(hidden, None, None, ())

    def back(
        self, steps: Steps, grad: Tensor, of_last: State, weights: Weights
    ) -> Gradients:
        slope = self.derivative(steps.hidden[1:])
        add_product = _adder(weights.hidden)
        of_gates, of_hidden = torch.empty_like(slope), _before(grad)
        slopes, found, of_h = slope.unbind(), of_gates.unbind(), of_hidden.unbind()
        for t in reversed(range(len(grad))):
            torch.mul(of_h[t + 1], slopes[t], out=found[t])
            add_product(of_h[t], found[t])
        return Gradients(of_gates, of_gates, None, (of_h[0],))


class GRU(Kind):
    """``nn.GRU``: h' = (1 - z) n + z h with n = tanh(x_n + r h_n)."""

    gates = 3

    def step(self, x: Tensor, h: Tensor, state: State) -> State:
        (old,) = state
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return (n + z * (old - n),)

    def run(self, x: Tensor, state: State, weights: Weights) -> Steps:
        hidden = _from(state[0], len(x))
        size = hidden.size(-1)
        product = _biased(torch.zeros_like(x), weights.bias)
        r_z = torch.empty_like(product[..., : 2 * size])
        n = torch.empty_like(hidden[1:])
        h, products = hidden.unbind(), product.unbind()
        of_r_z, of_n = (p.unbind() for p in product.split([2 * size, size], -1))
        x_r_z, x_n = (p.unbind() for p in x.split([2 * size, size], -1))
        (r, z), both = (p.unbind() for p in r_z.split(size, -1)), r_z.unbind()
        ns, add_product = n.unbind(), _adder(weights.hidden.mT)
        for t in range(len(x)):
            add_product(products[t], h[t])
            torch.add(x_r_z[t], of_r_z[t], out=both[t]).sigmoid_()
            torch.addcmul(x_n[t], r[t], of_n[t], out=ns[t]).tanh_()
            torch.lerp(ns[t], h[t], z[t], out=h[t + 1])
        return Steps(hidden, None, None, (r_z, n, product[..., 2 * size :]))

    def back(
        self, steps: Steps, grad: Tensor, of_last: State, weights: Weights
    ) -> Gradients:
        r_z, n, of_n = steps.saved
        size = n.size(-1)
        r, z = r_z.split(size, -1)
        # What the gradient by h' is multiplied by, for each of the gates.
        by_n = (1 - z) * (1 - n * n)
        by = torch.empty_like(torch.cat([r_z, n], -1))
        torch.addcmul(r_z, r_z, r_z, value=-1, out=by[..., : 2 * size])
        by[..., :size].mul_(by_n * of_n)
        by[..., size : 2 * size].mul_(steps.hidden[:-1] - n)
        torch.mul(by_n, r, out=by[..., 2 * size :])
        of_products, of_hidden = torch.empty_like(by), _before(grad)
        factors = by.unflatten(-1, (3, size)).unbind()
        found = of_products.unflatten(-1, (3, size)).unbind()
        flat, zs, of_h = of_products.unbind(), z.unbind(), of_hidden.unbind()
        add_product = _adder(weights.hidden)
        for t in reversed(range(len(grad))):
            torch.mul(of_h[t + 1].unsqueeze(-2), factors[t], out=found[t])
            of_h[t].addcmul_(of_h[t + 1], zs[t])
            add_product(of_h[t], flat[t])
        of_input = of_products.clone()
        torch.mul(of_hidden[1:], by_n, out=of_input[..., 2 * size :])
        return Gradients(of_input, of_products, None, (of_h[0],))


class LSTM(Kind):
    """``nn.LSTM``: c' = f c + i g and h' = o tanh(c')."""

    gates = 4

    def step(self, x: Tensor, h: Tensor, state: State) -> State:
        i, f, g, o = (x + h).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def run(self, x: Tensor, state: State, weights: Weights) -> Steps:
        hidden, cells = (_from(one, len(x)) for one in state)
        size, projection = cells.size(-1), weights.projection
        gates = _biased(x, weights.bias)
        g, tanh = torch.empty_like(cells[1:]), torch.empty_like(cells[1:])
        i, f, of_g, o = (part.unbind() for part in gates.split(size, -1))
        all_gates, gs, c, tanhs = (t.unbind() for t in (gates, g, cells, tanh))
        h = hidden.unbind()
        output = hidden[1:] if projection is None else torch.empty_like(g)
        outputs, add_product = output.unbind(), _adder(weights.hidden.mT)
        for t in range(len(x)):
            add_product(all_gates[t], h[t])
            torch.tanh(of_g[t], out=gs[t])
            all_gates[t].sigmoid_()  # of g too, which is faster than to leave it out
            torch.mul(f[t], c[t], out=c[t + 1]).addcmul_(i[t], gs[t])
            torch.tanh(c[t + 1], out=tanhs[t])
            torch.mul(o[t], tanhs[t], out=outputs[t])
            if projection is not None:
                torch.matmul(outputs[t], projection.mT, out=h[t + 1])
        unprojected = None if projection is None else output
        return Steps(hidden, cells, unprojected, (gates, g, tanh, output))

    def back(
        self, steps: Steps, grad: Tensor, of_last: State, weights: Weights
    ) -> Gradients:
        gates, g, tanh, output = steps.saved
        assert steps.cells is not None
        size, projection = g.size(-1), weights.projection
        i, f, _, o = gates.split(size, -1)
        # What the gradients by c' and, for o, by the output are multiplied by.
        by = torch.addcmul(gates, gates, gates, value=-1)
        by_i, by_f, by_g, by_o = by.split(size, -1)
        by_i.mul_(g)
        by_f.mul_(steps.cells[:-1])
        torch.addcmul(i, i * g, g, value=-1, out=by_g)
        by_o.mul_(tanh)
        by_output = torch.addcmul(o, output, tanh, value=-1)
        of_gates, of_hidden = torch.empty_like(gates), _before(grad)
        by_c, of_c = (
            t[..., : 3 * size].unflatten(-1, (3, size)).unbind() for t in (by, of_gates)
        )
        of_o, flat = of_gates[..., 3 * size :].unbind(), of_gates.unbind()
        by_os, by_outputs, fs = by_o.unbind(), by_output.unbind(), f.unbind()
        of_h, add_product = of_hidden.unbind(), _adder(weights.hidden)
        of_cell = of_last[0].clone()
        three = of_cell.unsqueeze(-2)
        for t in reversed(range(len(grad))):
            of_output = of_h[t + 1]
            if projection is not None:
                of_output = torch.matmul(of_output, projection)
            of_cell.addcmul_(of_output, by_outputs[t])
            torch.mul(three, by_c[t], out=of_c[t])
            torch.mul(of_output, by_os[t], out=of_o[t])
            of_cell.mul_(fs[t])
            add_product(of_h[t], flat[t])
        projected = None if projection is None else of_hidden[1:]
        return Gradients(of_gates, of_gates, projected, (of_h[0], of_cell))


TANH = Elman(torch.tanh, torch.tanh_, lambda h: 1 - h * h)
RELU = Elman(torch.relu, torch.relu_, lambda h: (h > 0).to(h.dtype))


def _from(first: Tensor, steps: int) -> Tensor:
    """Memory for the states (T + 1, ...), with the initial one written."""
    states = first.new_empty(steps + 1, *first.shape)
    states[0] = first
    return states


def _before(grad: Tensor) -> Tensor:
    """The gradients by the hidden states (T + 1, ..., P) without those of the steps: 0
    for the initial one."""
    return torch.cat([torch.zeros_like(grad[:1]), grad])


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` (T, ..., G) plus a bias (G) or (B, G), in memory of its own."""
    if bias is None:
        return x.clone()
    return x + (bias if bias.dim() == 1 else bias.unsqueeze(-2))


def _adder(matrix: Tensor) -> Callable[[Tensor, Tensor], object]:
    """A function that adds the product of its second argument and ``matrix`` to its
    first, in place."""
    if matrix.dim() == 2:
        return lambda z, h: z.addmm_(h, matrix)
    return lambda z, h: z.baddbmm_(h, matrix)
