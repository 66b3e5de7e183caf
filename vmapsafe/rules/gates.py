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
from collections.abc import Callable, Sequence
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
    """The gradients by the two products and by the projected hidden states, at all
    steps, and by the initial states."""

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
        self, steps: Steps, grad: Tensor, of_last: State, h: Tensor, weights: Weights
    ) -> Gradients:
        """The gradients by all products.

        Args:
            steps: what ``run`` returned.
            grad: the gradient by the hidden states (T, ..., P).
            of_last: that by the last cell, of an LSTM.
            h: the products of the hidden states (T, ..., G), bias included.
            weights: those of ``run``.

        Returns:
            The gradients, in memory of their own.
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
        hidden = _from(state[0], len(x))
        multiply = _multiply(weights.hidden.mT)
        h = hidden.unbind()
        for t, one in enumerate(_with(x, weights.bias)):
            self.in_place(multiply(one, h[t], h[t + 1]))
        return Steps(hidden, None, None, ())

    def back(
        self, steps: Steps, grad: Tensor, of_last: State, h: Tensor, weights: Weights
    ) -> Gradients:
        slope = self.derivative(steps.hidden[1:])
        multiply = _multiply(weights.hidden)
        of_gates = torch.empty_like(slope)
        slopes, found, grads = slope.unbind(), of_gates.unbind(), grad.unbind()
        of_h = grads[-1]
        memory = torch.empty_like(of_h)
        for t in reversed(range(len(grad))):
            torch.mul(of_h, slopes[t], out=found[t])
            of_h = multiply(_before(grads, t), found[t], memory)
        return Gradients(of_gates, of_gates, None, (of_h,))


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
        multiply = _multiply(weights.hidden.mT)
        zero = x.new_zeros(()) if weights.bias is None else _bias(weights.bias)
        product = torch.empty_like(x[0])
        of_r_z, of_n = product[..., : 2 * size], product[..., 2 * size :]
        r_z, n = x.new_empty(*x.shape[:-1], 2 * size), torch.empty_like(hidden[1:])
        h, ns, parts = hidden.unbind(), n.unbind(), r_z.unbind()
        r, z = r_z[..., :size].unbind(), r_z[..., size:].unbind()
        x_r_z, x_n = x[..., : 2 * size].unbind(), x[..., 2 * size :].unbind()
        start = zero.expand_as(product)
        for t in range(len(x)):
            multiply(start, h[t], product)
            torch.add(x_r_z[t], of_r_z, out=parts[t]).sigmoid_()
            torch.addcmul(x_n[t], r[t], of_n, out=ns[t]).tanh_()
            torch.lerp(ns[t], h[t], z[t], out=h[t + 1])
        return Steps(hidden, None, None, (r_z, n))

    def back(
        self, steps: Steps, grad: Tensor, of_last: State, h: Tensor, weights: Weights
    ) -> Gradients:
        r_z, n = steps.saved
        size = n.size(-1)
        r, z = r_z[..., :size], r_z[..., size:]
        # What the gradient by h' is multiplied by, for each of the gates.
        by_n = (1 - z) * (1 - n * n)
        by = torch.empty_like(h)
        torch.mul(by_n, r, out=by[..., 2 * size :])
        by_r_z = by[..., : 2 * size].unflatten(-1, (2, size))
        torch.mul(by_n, h[..., 2 * size :], out=by_r_z[..., 0, :])
        torch.sub(steps.hidden[:-1], n, out=by_r_z[..., 1, :])
        by[..., : 2 * size].mul_(r_z * (1 - r_z))
        multiply = _multiply(weights.hidden)
        of_hidden, of_h = torch.empty_like(h), torch.empty_like(n)
        carried = torch.empty_like(n[0])
        factors = by.unflatten(-1, (3, size)).unbind()
        found = of_hidden.unflatten(-1, (3, size)).unbind()
        flat, zs, totals = of_hidden.unbind(), z.unbind(), of_h.unbind()
        grads, rest = grad.unbind(), torch.empty_like(carried)
        totals[-1].copy_(grads[-1])
        for t in reversed(range(len(grad))):
            torch.mul(totals[t].unsqueeze(-2), factors[t], out=found[t])
            torch.mul(totals[t], zs[t], out=rest)
            multiply(rest, flat[t], carried)
            if t:
                torch.add(grads[t - 1], carried, out=totals[t - 1])
        of_input = of_hidden.clone()
        torch.mul(of_h, by_n, out=of_input[..., 2 * size :])
        return Gradients(of_input, of_hidden, None, (carried,))


class LSTM(Kind):
    """``nn.LSTM``: c' = f c + i g and h' = o tanh(c')."""

    gates = 4

    def step(self, x: Tensor, h: Tensor, state: State) -> State:
        i, f, g, o = (x + h).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def run(self, x: Tensor, state: State, weights: Weights) -> Steps:
        hidden, cells = (_from(one, len(x)) for one in state)
        size = cells.size(-1)
        multiply = _multiply(weights.hidden.mT)
        gates, tanh = torch.empty_like(x), torch.empty_like(cells[1:])
        i_f, g, o = (part.unbind() for part in gates.split([2 * size, size, size], -1))
        i, f = (gates[..., k * size : (k + 1) * size].unbind() for k in (0, 1))
        all_gates, c, tanhs = gates.unbind(), cells.unbind(), tanh.unbind()
        h, unprojected = hidden.unbind(), None
        outputs = h[1:]
        if weights.projection is not None:
            unprojected = torch.empty_like(tanh)
            outputs = unprojected.unbind()
        for t, one in enumerate(_with(x, weights.bias)):
            multiply(one, h[t], all_gates[t])
            i_f[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            torch.mul(f[t], c[t], out=c[t + 1]).addcmul_(i[t], g[t])
            torch.tanh(c[t + 1], out=tanhs[t])
            torch.mul(o[t], tanhs[t], out=outputs[t])
            if weights.projection is not None:
                torch.matmul(outputs[t], weights.projection.mT, out=h[t + 1])
        return Steps(hidden, cells, unprojected, (gates, tanh))

    def back(
        self, steps: Steps, grad: Tensor, of_last: State, h: Tensor, weights: Weights
    ) -> Gradients:
        gates, tanh = steps.saved
        assert steps.cells is not None
        size = tanh.size(-1)
        i, f, g, o = gates.split(size, -1)
        # What the gradients by c' and, for o, by h' are multiplied by.
        by = gates * (1 - gates)
        by_i, by_f, by_g, by_o = by.split(size, -1)
        by_i.mul_(g)
        by_f.mul_(steps.cells[:-1])
        torch.mul(i, 1 - g * g, out=by_g)
        by_o.mul_(tanh)
        by_h = o * (1 - tanh * tanh)
        of_gates = torch.empty_like(gates)
        by_c = by[..., : 3 * size].unflatten(-1, (3, size)).unbind()
        of_c_gates = of_gates[..., : 3 * size].unflatten(-1, (3, size)).unbind()
        of_o, flat = of_gates[..., 3 * size :].unbind(), of_gates.unbind()
        by_os, by_hs, fs = by_o.unbind(), by_h.unbind(), f.unbind()
        multiply, grads = _multiply(weights.hidden), grad.unbind()
        of_hidden = torch.empty_like(grad)
        of_h = of_hidden.unbind()
        of_h[-1].copy_(grads[-1])
        of_first = torch.empty_like(grads[0])
        of_cell = of_last[0].clone()
        of_output = torch.empty_like(of_cell)
        for t in reversed(range(len(grad))):
            if weights.projection is None:
                of_output = of_h[t]
            else:
                torch.matmul(of_h[t], weights.projection, out=of_output)
            of_cell.addcmul_(of_output, by_hs[t])
            torch.mul(of_cell.unsqueeze(-2), by_c[t], out=of_c_gates[t])
            torch.mul(of_output, by_os[t], out=of_o[t])
            of_cell.mul_(fs[t])
            multiply(_before(grads, t), flat[t], of_h[t - 1] if t else of_first)
        projected = None if weights.projection is None else of_hidden
        return Gradients(of_gates, of_gates, projected, (of_first, of_cell))


TANH = Elman(torch.tanh, torch.tanh_, lambda h: 1 - h * h)
RELU = Elman(torch.relu, torch.relu_, lambda h: (h > 0).to(h.dtype))


def _from(first: Tensor, steps: int) -> Tensor:
    """Memory for the states (T + 1, ...), with the initial one written."""
    states = first.new_empty(steps + 1, *first.shape)
    states[0] = first
    return states


def _bias(bias: Tensor) -> Tensor:
    """(G), or (B, 1, G)."""
    return bias if bias.dim() == 1 else bias.unsqueeze(-2)


def _with(x: Tensor, bias: Tensor | None) -> Sequence[Tensor]:
    return (x if bias is None else x + _bias(bias)).unbind()


def _before(grads: Sequence[Tensor], t: int) -> Tensor:
    """The gradient by the hidden state from which step ``t`` begins; that by the first
    comes from the step alone."""
    return grads[t - 1] if t else torch.zeros_like(grads[0])


def _multiply(matrix: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function that writes z + h @ matrix into memory, of z, h and the memory."""
    add = torch.addmm if matrix.dim() == 2 else torch.baddbmm

    def multiply(z: Tensor, h: Tensor, out: Tensor) -> Tensor:
        return add(z, h, matrix, out=out)

    return multiply
