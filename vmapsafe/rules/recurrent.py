"""Recurrent layers and cells, which torch (2.14) cannot run under vmap.

``nn.RNN``, ``nn.GRU``, ``nn.LSTM`` and their cells call one function of torch each. It
does not have a batching rule, and torch's kernels do not have all derivatives. A rule
here makes such a call in one of three ways:

* where all slices share the weights and no transform takes derivatives, by torch's own
  function on the merged batch;
* where the slices have copies of the weights for per-sample gradients, by
  ``through_time``;
* elsewhere step by step in ordinary operations (``gates``).

Outside vmap, torch's own function runs wherever it has the derivative asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe._call import Call, Function
from vmapsafe._errors import NotUnderVmap, VmapSafeValueError
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, register, slice_by_slice
from vmapsafe._torch import (
    PACK_SEQUENCES,
    autocasts,
    batched_levels,
    below_innermost,
    beyond_reverse_mode,
    current_level,
    is_wrapped,
    only_vmaps,
    slices_of,
    vmap_size,
    whole_batches,
)
from vmapsafe.rules.gates import GRU, LSTM, RELU, TANH, Kind, State, Weights
from vmapsafe.rules.through_time import through_time

LAYERS: dict[Function, Kind] = {
    torch.rnn_tanh: TANH,
    torch.rnn_relu: RELU,
    torch.gru: GRU(),
    torch.lstm: LSTM(),
}
CELLS: dict[Function, Kind] = {
    torch.rnn_tanh_cell: TANH,
    torch.rnn_relu_cell: RELU,
    torch.gru_cell: GRU(),
    torch.lstm_cell: LSTM(),
}
_OF_LAYERS = (
    *("input", "hx", "params", "has_biases", "num_layers", "dropout", "train"),
    *("bidirectional", "batch_first"),
)
_OF_CELLS = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


def _named(call: Call, names: Sequence[str]) -> dict[str, Any]:
    """Its arguments by name; torch's functions do not have a signature of Python."""
    return {
        names[int(name)] if name.isdecimal() else name: value
        for name, value in call.arguments.items()
    }


def _is_packed(call: Call) -> bool:
    """Whether a call of a layer is one of a packed sequence."""
    given = call.arguments
    if call.function is torch.lstm:
        return "batch_sizes" in given or isinstance(given.get("1"), Tensor)
    return "batch_sizes" in given or isinstance(given.get("2"), Tensor)


# -- Layers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """The arguments of a call of a layer."""

    function: Function
    input: Tensor
    state: State
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @staticmethod
    def of(call: Call) -> _Layer:
        given = _named(call, _OF_LAYERS)
        state = given.pop("hx")
        state = (state,) if isinstance(state, Tensor) else tuple(state)
        return _Layer(function=call.function, state=state, **given)

    @property
    def kind(self) -> Kind:
        return LAYERS[self.function]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.input, *self.state, *self.params]

    @property
    def draws(self) -> bool:
        """Whether it drops something."""
        return bool(self.train and self.dropout and self.num_layers > 1)

    @property
    def projects(self) -> bool:
        """Whether the hidden states are projected; they are smaller then."""
        return len({one.size(-1) for one in self.state}) > 1

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def weights(self, i: int) -> tuple[Tensor, Tensor | None, Weights]:
        """The i-th weight and bias of the input, and those of the hidden states."""
        each = 2 + 2 * self.has_biases + self.projects
        given = self.params[i * each : (i + 1) * each]
        bias, of_hidden = given[2:4] if self.has_biases else (None, None)
        projection = given[-1] if self.projects else None
        return given[0], bias, Weights(given[1], of_hidden, projection)

    def by_torch(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Call the function itself with another input and other states."""
        hx = state if self.function is torch.lstm else state[0]
        found: tuple[Tensor, ...] = self.function(
            *(x, hx, self.params, self.has_biases, self.num_layers, self.dropout),
            *(self.train, self.bidirectional, self.batch_first),
        )
        return found


def _needs_a_rule(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's own function cannot make a call with these tensors."""
    if torch.compiler.is_compiling():
        return current_level() > 0
    return beyond_reverse_mode(*tensors) or bool(batched_levels(tensors))


def _is_a_layer(call: Call) -> bool:
    if _is_packed(call):
        return False
    layer = _Layer.of(call)
    return layer.input.dim() == 3 and _needs_a_rule(layer.tensors)


def _layer(call: Call) -> tuple[Tensor, ...]:
    layer = _Layer.of(call)
    length: int = layer.input.size(1 if layer.batch_first else 0)
    if not length:
        raise VmapSafeValueError(
            f"torch.{call.function.__name__}",
            "the sequences have no steps",
            "Leave empty sequences out",
        )
    if not torch.compiler.is_compiling() and only_vmaps():
        forward = beyond_reverse_mode()
        if not forward and not layer.draws and not batched_levels(layer.params):
            return _merged(layer, layer.input, layer.state)
    return _in_the_dtypes_of_torch(layer, _by_directions(call, layer))


def _merged(layer: _Layer, x: Tensor, state: State) -> tuple[Tensor, ...]:
    """The outputs of one call for all slices of all vmaps, the only transforms."""
    level = current_level()
    if not level:
        return layer.by_torch(x, *state)
    size = vmap_size(level)
    at = [0 if layer.batch_first else 1, *[1 for _ in state]]
    with below_innermost():
        named = {str(i): tensor for i, tensor in enumerate((x, *state))}
        values, dims = whole_batches(named, level)
        if all([dim is None for dim in dims.values()]):
            return _merged(layer, values["0"], tuple([*values.values()][1:]))
        merged, each = [], 0
        for (name, value), n in zip(values.items(), at):
            dim = dims[name]
            if dim is None:
                value = value.unsqueeze(n).expand(
                    *value.shape[:n], size, *value.shape[n:]
                )
            else:
                value = value.movedim(dim, n)
            each = value.size(n + 1)
            merged.append(value.flatten(n, n + 1))
        outputs = _merged(layer, merged[0], tuple(merged[1:]))
        apart = [
            out.unflatten(n, (size, each)).movedim(n, 0) for out, n in zip(outputs, at)
        ]
    return tuple([slices_of(out, level) for out in apart])


def _by_directions(call: Call, layer: _Layer) -> tuple[Tensor, ...]:
    """The outputs, layer by layer and direction by direction."""
    x = layer.input.transpose(0, 1) if layer.batch_first else layer.input
    last = []
    for i in range(layer.num_layers):
        both = []
        for j in range(layer.directions):
            k = i * layer.directions + j
            state = tuple([one[k] for one in layer.state])
            of_input, bias, weights = layer.weights(k)
            products = F.linear(x, of_input, bias)
            products = products.flip(0) if j else products
            if _is_recorded(call, products, state, weights):
                found, state = through_time(layer.kind, products, state, weights)
            else:
                found, state = _step_by_step(layer.kind, products, state, weights)
            both.append(found.flip(0) if j else found)
            last.append(state)
        x = both[0] if len(both) == 1 else torch.cat(both, -1)
        if layer.draws and i < layer.num_layers - 1:
            x = F.dropout(x, layer.dropout)
    output = x.transpose(0, 1) if layer.batch_first else x
    return (output, *[torch.stack([*states]) for states in zip(*last)])


def _is_recorded(call: Call, x: Tensor, state: State, weights: Weights) -> bool:
    """Whether this is for per-sample gradients by one pass. Under autocast the dtypes
    differ."""
    if torch.compiler.is_compiling() or call.site is None:
        return False
    level = call.site.copies_at
    given = [w for w in weights if w is not None]
    return (
        level is not None
        and level == current_level()
        and only_vmaps()
        and not beyond_reverse_mode()
        and len({t.dtype for t in (x, *state, *given)}) == 1
    )


def _step_by_step(
    kind: Kind, x: Tensor, state: State, weights: Weights
) -> tuple[Tensor, State]:
    """The hidden states (T, N, P) and the last state."""
    found = []
    for one in x.unbind():
        h = F.linear(state[0], weights.hidden, weights.bias)
        state = kind.step(one, h, state)
        if weights.projection is not None:
            state = F.linear(state[0], weights.projection), *state[1:]
        found.append(state[0])
    return torch.stack(found), state


def _in_the_dtypes_of_torch(
    layer: _Layer, outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The outputs in the dtypes of torch's own function, which autocast changes."""
    if not autocasts(layer.input.device):
        return outputs
    own = _specimen(layer)
    return tuple([out.to(one.dtype) for out, one in zip(outputs, own)])


def _specimen(layer: _Layer) -> tuple[Tensor, ...]:
    """The outputs for one number, of one layer with one gate of each sort."""
    cells = 2 if layer.projects else 1
    gates = layer.kind.gates * cells
    shapes = [(gates, 1), (gates, 1), *[(gates,), (gates,)][: 2 * layer.has_biases]]
    shapes += [(1, cells)] if layer.projects else []
    one = _Layer(
        function=layer.function,
        input=_zeros(layer.input, 1, 1, 1),
        state=tuple([_zeros(s, 1, 1, n) for s, n in zip(layer.state, (1, cells))]),
        params=[_zeros(p, *shape) for p, shape in zip(layer.params, shapes)],
        has_biases=layer.has_biases,
        num_layers=1,
        dropout=0.0,
        train=layer.train,
        bidirectional=False,
        batch_first=layer.batch_first,
    )
    return one.by_torch(one.input, *one.state)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


# -- Cells -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """The arguments of a call of a cell."""

    function: Function
    input: Tensor
    state: State
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None

    @staticmethod
    def of(call: Call) -> _Cell:
        given = _named(call, _OF_CELLS)
        state = given.pop("hx")
        state = (state,) if isinstance(state, Tensor) else tuple(state)
        return _Cell(function=call.function, state=state, **given)

    @property
    def tensors(self) -> list[Tensor]:
        weights = self.w_ih, self.w_hh, self.b_ih, self.b_hh
        return [self.input, *self.state, *[w for w in weights if w is not None]]

    def by_torch(self) -> State:
        hx = self.state if self.function is torch.lstm_cell else self.state[0]
        weights = self.w_ih, self.w_hh, self.b_ih, self.b_hh
        found = self.function(self.input, hx, *weights)
        return (found,) if isinstance(found, Tensor) else found


def _is_a_cell(call: Call) -> bool:
    return _needs_a_rule(_Cell.of(call).tensors)


def _cell(call: Call) -> Tensor | State:
    cell = _Cell.of(call)
    x = F.linear(cell.input, cell.w_ih, cell.b_ih)
    h = F.linear(cell.state[0], cell.w_hh, cell.b_hh)
    kind = CELLS[call.function]
    found = kind.step(x, h, cell.state)
    if autocasts(x.device):
        own = _specimen_of_cell(cell, kind.gates).by_torch()
        found = tuple([one.to(other.dtype) for one, other in zip(found, own)])
    return found if call.function is torch.lstm_cell else found[0]


def _specimen_of_cell(cell: _Cell, gates: int) -> _Cell:
    bias = None if cell.b_ih is None else _zeros(cell.b_ih, gates)
    return _Cell(
        cell.function,
        _zeros(cell.input, 1, 1),
        tuple([_zeros(one, 1, 1) for one in cell.state]),
        _zeros(cell.w_ih, gates, 1),
        _zeros(cell.w_hh, gates, 1),
        bias,
        bias,
    )


# -- Addresses -------------------------------------------------------------------------
#
# On a GPU a layer whose weights have changed, as under functional_call, asks for their
# addresses. If two are the same, it leaves the weights as they are. Tensors of a
# transform have none, so torch raises an error. (Read in nn.RNNBase of torch 2.13.)


def _asks_for_addresses(call: Call) -> bool:
    if torch.compiler.is_compiling() or not is_wrapped(call["0"]):
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "flatten_parameters":
            return isinstance(frame.f_locals.get("self"), nn.RNNBase)
        frame = frame.f_back
    return False


def _same_address(call: Call) -> int:
    return 0


# -- Refused ---------------------------------------------------------------------------
#
# How many sequences run at a step depends on the lengths, which differ by slice.


def _is_packed_under_vmap(call: Call) -> bool:
    if call.function is not PACK_SEQUENCES and not _is_packed(call):
        return False
    tensors = []
    for value in call.arguments.values():
        several = value if isinstance(value, (tuple, list)) else (value,)
        tensors += [one for one in several if isinstance(one, Tensor)]
    return bool(batched_levels(tensors))


def _refuse(call: Call) -> Any:
    raise NotUnderVmap(
        f"torch.{call.function.__name__.lstrip('_')} under vmap",
        "the sequences are packed, so that their lengths decide what is computed",
        "Run the layer on the padded sequences, and take each output at its sequence's "
        'last step with torch.gather. Or pass fallback="loop" to batched, or to '
        "per_sample and its short forms: they then loop over the slices",
    )


# -- The slow forms --------------------------------------------------------------------


def _plain_step(function: Function, a: Tensor, b: Tensor, state: State) -> State:
    """The equations in the documentation of nn.RNN, nn.GRU and nn.LSTM; a and b are the
    products of the input and of the hidden state."""
    name, size = function.__name__, state[-1].size(-1)
    part = [slice(k * size, (k + 1) * size) for k in range(4)]

    def sigmoid(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    if "lstm" in name:
        i, f, o = (sigmoid(a[:, part[k]] + b[:, part[k]]) for k in (0, 1, 3))
        c = f * state[1] + i * torch.tanh(a[:, part[2]] + b[:, part[2]])
        return o * torch.tanh(c), c
    if "gru" in name:
        r, z = (sigmoid(a[:, part[k]] + b[:, part[k]]) for k in (0, 1))
        n = torch.tanh(a[:, part[2]] + r * b[:, part[2]])
        return ((1 - z) * n + z * state[0],)
    total = a + b
    return (total.clamp_min(0) if "relu" in name else torch.tanh(total),)


def _plain_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = torch.einsum("nc,gc->ng", x, weight)
    return found if bias is None else found + bias


def _plain_layer(call: Call) -> tuple[Tensor, ...]:
    layer = _Layer.of(call)
    x = [*layer.input.unbind(1 if layer.batch_first else 0)]
    last = []
    for i in range(layer.num_layers):
        both = []
        for j in range(layer.directions):
            k = i * layer.directions + j
            weight, bias, others = layer.weights(k)
            state, found = tuple([one[k] for one in layer.state]), []
            for one in reversed(x) if j else x:
                a = _plain_product(one, weight, bias)
                b = _plain_product(state[0], others.hidden, others.bias)
                state = _plain_step(call.function, a, b, state)
                if others.projection is not None:
                    h = _plain_product(state[0], others.projection, None)
                    state = h, *state[1:]
                found.append(state[0])
            both.append(found[::-1] if j else found)
            last.append(state)
        x = [torch.cat(parts, -1) for parts in zip(*both)]
    output = torch.stack(x, 1 if layer.batch_first else 0)
    return (output, *[torch.stack(states) for states in zip(*last)])


def _plain_cell(call: Call) -> Tensor | State:
    cell = _Cell.of(call)
    x, state = cell.input, cell.state
    if x.dim() == 1:
        x, state = x[None], tuple([one[None] for one in state])
    a = _plain_product(x, cell.w_ih, cell.b_ih)
    b = _plain_product(state[0], cell.w_hh, cell.b_hh)
    found = _plain_step(call.function, a, b, state)
    if cell.input.dim() == 1:
        found = tuple([one[0] for one in found])
    return found if len(found) > 1 else found[0]


for _functions, _accepts, _batched, _plain in (
    (LAYERS, _is_a_layer, _layer, _plain_layer),
    (CELLS, _is_a_cell, _cell, _plain_cell),
):
    for _function in _functions:
        register(
            FunctionRule(
                name=f"{_function.__name__}, under transforms",
                functions=(_function,),
                modes=MODES,
                accepts=_accepts,
                batched=_batched,
                reference=slice_by_slice(_plain),
            )
        )
register(
    FunctionRule(
        name="data_ptr, of a recurrent layer's weights under transforms",
        functions=(Tensor.data_ptr,),
        modes=MODES,
        accepts=_asks_for_addresses,
        batched=_same_address,
        reference=_same_address,
    )
)
register(
    FunctionRule(
        name="packed sequences, refused under vmap",
        functions=(PACK_SEQUENCES, *LAYERS),
        modes=MODES,
        accepts=_is_packed_under_vmap,
        batched=_refuse,
        reference=_refuse,
    )
)
