"""Convolutions: a faster batching rule of the backward, and the rows of the weight.

Under ``vmap(grad)`` torch computes the weight gradients of all samples as one
convolution with one group for each sample. For some shapes one of ``ALGORITHMS`` is
faster and runs instead. Which shapes these are depends on the machine, see
``convolution_regimes``.

These alternatives were tried on a CPU, and were slower for every shape:

* a matrix product for each position of the kernel, with or without a copy of the
  inputs seen there;
* an ordinary convolution for each sample;
* ``F.unfold``, which takes up to ten times as long as a copy of strided windows;
* torch's own form, without the copies that its rule makes of tensors whose values are
  not used.

For a depthwise convolution, torch's own rule is already one call with B * C channels.
It is fast for 3 x 3 kernels but not for larger ones, or for images of a few positions.
Its forward merges the batch dimensions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call, batch_first, batch_size
from vmapsafe._rule import OperatorRule, register, slice_by_slice
from vmapsafe._torch import (
    autocast_dtype,
    autocasts,
    innermost,
    is_plain,
    multiplies_as_it_convolves,
    multiplies_exactly,
    unwatched,
)
from vmapsafe.rules.convolution_regimes import REGIMES
from vmapsafe.rules.formulas import Bias, Formula, Products, times
from vmapsafe.rules.kept_calls import ByFormulas, KeptCalls, keep_calls
from vmapsafe.rules.opaque import keep_opaque
from vmapsafe.rules.outer_products import batched_product
from vmapsafe.rules.precision import HALVES, wide

_backward = torch.ops.aten.convolution_backward.default
FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)  # by the number of dimensions


def _pays(x: Tensor, *others: Any) -> bool:
    """Whether a call with this input, or output gradient, is large enough."""
    whole = innermost(x).numel()
    return whole > x.numel() and whole >= REGIMES[x.device.type].batch


def _may_accept(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Any, *rest: Any
) -> bool:
    """Whether a rule is faster, for an operator's arguments in vmap's wrappers."""
    *_, transposed, _, groups, _ = rest
    seen_by = x if transposed else grad
    return _pays(grad) and _fastest(weight, groups, seen_by.numel()) in ALGORITHMS


def _accepts(call: Call) -> bool:
    in_dims = call.in_dims
    return (
        call["output_mask"][1]
        and in_dims["grad_output"] is not None
        and in_dims["input"] is not None
        and in_dims["weight"] is None
        and len(call["stride"]) == len(call["padding"]) == call["weight"].dim() - 2
        and algorithm(call) in ALGORITHMS
    )


def algorithm(call: Call) -> str:
    """The name of the fastest algorithm, or "torch" if torch's own rule is faster."""
    weight, groups = call["weight"], call["groups"]
    grad, x = call["grad_output"], call["input"]
    empty = not (grad.numel() and x.numel() and weight.numel())
    if empty or not _products_are_as_precise(weight):
        return "torch"
    seen_by = x if call["transposed"] else grad
    return _fastest(weight, groups, seen_by.numel() // batch_size(call))


def _fastest(weight: Tensor, groups: int, numbers: int) -> str:
    """The same, from the numbers in the output of a slice."""
    outputs, channels, *kernel = weight.shape
    positions = numbers // max(1, outputs)
    shape = (len(kernel), math.prod(kernel), groups, channels, outputs // groups)
    for winner in REGIMES[weight.device.type].winners:
        if winner.holds(*shape, positions):
            return winner.algorithm
    return "torch"


# torch has options for a lower precision of products, and others of convolutions.


def _products_are_as_precise(weight: Tensor) -> bool:
    """Whether matrix products are as precise as convolutions."""
    return weight.dtype != torch.float32 or multiplies_as_it_convolves(weight.device)


def _products_are_exact(weight: Tensor) -> bool:
    """Whether matrix products have full precision."""
    return weight.dtype != torch.float32 or multiplies_exactly(weight.device)


def _merged(call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All three gradients. That of the input is one call for the whole batch."""
    grad, x = (batch_first(call, name) for name in ("grad_output", "input"))
    wants_input, _, wants_bias = call["output_mask"]
    of_input = input_gradient(call, grad, x) if wants_input else None
    of_bias = None
    if wants_bias:
        rest = [d for d in range(grad.dim()) if d not in (0, 2)]
        of_bias = grad.sum(rest, dtype=grad.dtype)  # without dtype autocast widens it
    return of_input, ALGORITHMS[algorithm(call)](call, grad, x), of_bias


def input_gradient(call: Call, grad: Tensor, x: Tensor) -> Tensor:
    """The input gradient (B, N, C, *S) in one call.

    ``grad`` is (B, N, O, *L), and ``x`` is (B, N, C, *S).
    """
    merged = {
        "grad_output": grad.flatten(0, 1),
        "input": x.flatten(0, 1),
        "bias_sizes": None,
        "output_mask": [True, False, False],
    }
    found: Tensor
    found, *_ = _backward(*{**call.arguments, **merged}.values())
    return found.reshape(x.shape)


def seen_by_kernel(call: Call, x: Tensor) -> Tensor:
    """(B, C * K, N * L): what the kernel sees at each output position.

    ``x`` is a plain tensor (B, N, C, *S), and the convolution is not grouped.
    """
    if any(call["padding"]):
        x = _padded(call, x)
    sizes = zip(x.shape[3:], call["weight"].shape[2:], call["stride"], call["dilation"])
    lengths = torch.Size([(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes])
    seen = _windows(call, x, lengths, last=False)
    return seen.reshape(len(x), call["weight"][0].numel(), -1)


# -- Algorithms ------------------------------------------------------------------------
#
# Each computes the weight gradients (B, O, C, *K) from the output gradient
# (B, N, O, *L) and the input (B, N, C, *S). If ``out`` is given, it writes them there.
# ``out`` must be contiguous, and then all tensors must be plain (``is_plain``).


def _products(
    call: Call,
    grad: Tensor,
    x: Tensor,
    out: Tensor | None = None,
    turned: bool = False,
) -> Tensor:
    """One matrix product for each sample: output gradients times what the kernel saw.

    If ``turned``, it computes the transposed products, which is faster if a kernel sees
    few numbers.
    """
    if call["transposed"]:
        grad, x = x, grad  # as for the convolution that it transposes
    weight, groups, lengths = call["weight"], call["groups"], grad.shape[3:]
    # (B * G, O, N * L), where O is that of a group
    grads = grad.movedim(1, 2).reshape(len(x) * groups, len(weight) // groups, -1)
    if is_plain(grad) and is_plain(x):
        with unwatched():
            return _plain_products(call, grads, x, lengths, out, turned)
    seen = _watched_windows(call, x, lengths).reshape(len(grads), -1, grads.size(2))
    return batched_product(grads, seen.mT).view(-1, *weight.shape)


def _plain_products(
    call: Call,
    grads: Tensor,
    x: Tensor,
    lengths: torch.Size,
    out: Tensor | None,
    turned: bool,
) -> Tensor:
    """The products of :func:`_products` for plain tensors, a few samples at a time.

    So the copies of windows stay in the cache. They use the same memory again, and the
    products go straight into the result, because new memory is slow.
    """
    groups, (outputs, channels, *kernel) = call["groups"], call["weight"].shape
    columns, positions = channels * math.prod(kernel), grads.size(2)
    # If channels are next to each other in memory, they are copied together.
    last = out is None and groups == 1 and channels > 1 and x.stride(2) == 1
    shape = (-1, positions, columns) if last else (-1, columns, positions)
    shape_of_result = (*grads.shape[:2], columns)
    if out is None:
        result = grads.new_empty(shape_of_result)
    else:
        result = out.view(shape_of_result)
    padding = call["padding"]
    step = max(1, REGIMES[x.device.type].columns // (groups * columns * positions))
    copies = room = None
    as_it_is = columns == channels and not any(padding)  # a kernel of one position
    if as_it_is and x.shape[1:].numel() == groups * columns * positions:
        step = len(x)
    else:
        step = min(step, len(x))
        copies = x.new_empty(step * groups, *shape[1:])
        if any(padding):
            room = _padded(call, x[:step])
    inside: tuple[Any, ...] = (..., *[slice(p, -p or None) for p in padding])
    for i in range(0, len(x), step):
        part = x[i : i + step]
        if room is not None:
            room[: len(part)][inside] = part
            part = room[: len(part)]
        seen = _windows(call, part, lengths, last)
        if copies is not None:
            seen = copies[: len(part) * groups].view(seen.shape).copy_(seen)
        seen = seen.reshape(shape)
        these = slice(i * groups, i * groups + len(seen))
        if not last:
            seen = seen.mT
        if turned:
            result[these] = batched_product(seen.mT, grads[these].mT).mT
        else:
            batched_product(grads[these], seen, result[these])
    if last:
        return result.view(-1, outputs, *kernel, channels).movedim(-1, 2)
    return result.view(-1, outputs, channels, *kernel)


def _windows(call: Call, x: Tensor, lengths: torch.Size, last: bool) -> Tensor:
    """What the kernel sees at each output position, as a view of padded samples.

    Its shape is (B, G, C, *K, N, *L), or (B, G, N, *L, *K, C) if ``last``.
    """
    groups, (_, channels, *kernel) = call["groups"], call["weight"].shape
    of_sample, of_slice, of_channel, *steps = x.stride()
    # Of groups, channels, the kernel, slices and positions.
    sizes = [groups], [channels], kernel, [x.size(1)], lengths
    strides = (
        *([of_channel * channels], [of_channel]),
        [step * d for step, d in zip(steps, call["dilation"])],
        [of_slice],
        [step * s for step, s in zip(steps, call["stride"])],
    )
    order = (0, 3, 4, 2, 1) if last else range(5)
    return x.as_strided(
        (len(x), *itertools.chain(*[sizes[i] for i in order])),
        (of_sample, *itertools.chain(*[strides[i] for i in order])),
    )


def _watched_windows(call: Call, x: Tensor, lengths: torch.Size) -> Tensor:
    """The windows (B, C, K, N, *L) as a stack of slices of ``x``.

    The backward of such slices has batching rules.
    """
    if any(call["padding"]):
        x = _padded(call, x)
    seen = []
    for offset in itertools.product(*map(range, call["weight"].shape[2:])):
        index: list[Any] = [...]
        for at, size, s, d in zip(offset, lengths, call["stride"], call["dilation"]):
            index.append(slice(at * d, at * d + s * (size - 1) + 1, s))
        seen.append(x[tuple(index)])
    return torch.stack(seen, 3).movedim(1, 3)


def _padded(call: Call, x: Tensor) -> Tensor:
    sizes = [p for size in reversed(call["padding"]) for p in (size, size)]
    # F.pad keeps the memory layout of a batch of images.
    padded = F.pad(x.flatten(0, 1), sizes)
    return padded.view(*x.shape[:2], *padded.shape[1:])


def _turned_products(
    call: Call, grad: Tensor, x: Tensor, out: Tensor | None = None
) -> Tensor:
    return _products(call, grad, x, out, turned=True)


def _sums(call: Call, grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """For each number of the kernel, a sum over the positions where it sees an input.

    It does not compute with padding, which is most of what a kernel sees of an image of
    a few positions.
    """
    if call["transposed"]:
        grad, x = x, grad
    weight, groups, dtype = call["weight"], call["groups"], grad.dtype
    # (B, N, G, O, 1, *L) and (B, N, G, 1, C, *S)
    grads = wide(grad).reshape(*grad.shape[:2], groups, -1, 1, *grad.shape[3:])
    inputs = wide(x).reshape(*x.shape[:2], groups, 1, -1, *x.shape[3:])
    options = [call[name] for name in ("stride", "padding", "dilation")]
    sums = []
    for offset in itertools.product(*map(range, weight.shape[2:])):
        at_grads: list[Any] = [...]
        at_inputs: list[Any] = [...]
        for n, size, k, s, p, d in zip(
            *(grads.shape[5:], inputs.shape[5:], offset), *options
        ):
            first = k * d - p  # what it sees from the first position
            begin = max(0, -(first // s))
            count = max(0, min(n, (size - 1 - first) // s + 1) - begin)
            at_grads.append(slice(begin, begin + count))
            seen = first + s * begin
            at_inputs.append(slice(seen, seen + s * count, s))
        products = grads[tuple(at_grads)] * inputs[tuple(at_inputs)]
        sums.append(products.flatten(5).sum(5).sum(1))
    rows = torch.stack(sums, 4).reshape(-1, *weight.shape).to(dtype)
    return rows if out is None else out.copy_(rows)


ALGORITHMS: Mapping[str, Callable[..., Tensor]] = {
    "products": _products,
    "turned products": _turned_products,
    "sums": _sums,
}


# -- The slow form -------------------------------------------------------------------


def _by_autograd(call: Call) -> tuple[Tensor | None, ...]:
    """The gradients of torch's own convolution, by autograd."""
    asked = call["output_mask"]
    values = [
        call["input"],
        call["weight"],
        call["input"].new_zeros(call["grad_output"].size(1)),
    ]
    leaves = [v if v.requires_grad else v.detach().requires_grad_() for v in values]
    y = torch.ops.aten.convolution(
        *leaves,
        call["stride"],
        call["padding"],
        call["dilation"],
        call["transposed"],
        call["output_padding"],
        call["groups"],
    )
    wanted = [leaf for leaf, want in zip(leaves, asked) if want]
    found = iter(torch.autograd.grad(y, wanted, call["grad_output"], create_graph=True))
    return tuple(next(found) if want else None for want in asked)


register(
    OperatorRule(
        name="convolution_backward, weights by matrix products",
        operator=_backward,
        accepts=_accepts,
        batched=_merged,
        reference=slice_by_slice(_by_autograd),
        devices=None,
        functions=(
            *FUNCTIONS,
            *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        ),
        pays=_pays,
        may_accept=_may_accept,
    )
)


# -- Rows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight(Products):
    """Rows of ``F.conv1d`` to ``F.conv3d``: x (B, N, C, *S), grad (B, N, O, *L).

    Attributes:
        autocast: the dtype in which autocast ran the forward; None without it.

    The others are arguments of the call.
    """

    weight: Tensor
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    autocast: torch.dtype | None = None

    def columns(self, x: Tensor) -> Tensor:
        return seen_by_kernel(self._call(x, x), x)

    def outputs(self, grad: Tensor) -> Tensor:
        return grad.movedim(2, 1).flatten(2)

    def rows(self, x: Tensor, grad: Tensor) -> Tensor:
        if self.autocast is not None:
            return self.new_rows(x, grad)
        call = self._call(x, grad)
        winner = algorithm(call)
        if winner in ALGORITHMS:
            return ALGORITHMS[winner](call, grad, x)
        return self.new_rows(x, grad)

    def write_rows(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        if self.autocast is not None:
            out.copy_(self._rows_by_autocast(x, grad))
            return
        call = self._call(x, grad)
        winner = algorithm(call)
        if self._is_one_convolution(winner, grad):
            out.copy_(self._groups(x, grad))
        else:
            self._write(call, winner, out)

    def new_rows(self, x: Tensor, grad: Tensor) -> Tensor:
        if self.autocast is not None:
            return self._rows_by_autocast(x, grad).to(grad.dtype)
        call = self._call(x, grad)
        winner = algorithm(call)
        if self._is_one_convolution(winner, grad):
            return self._groups(x, grad)
        out = grad.new_empty(len(grad), *self.shape)
        self._write(call, winner, out)
        return out

    def _rows_by_autocast(self, x: Tensor, grad: Tensor) -> Tensor:
        plain, dtype = replace(self, autocast=None), self.autocast
        return plain.new_rows(x.to(dtype), grad.to(dtype))

    def _is_one_convolution(self, winner: str, grad: Tensor) -> bool:
        """Whether one convolution for all samples is faster than one for each."""
        if winner in ALGORITHMS:
            return False
        regime = REGIMES[grad.device.type]
        return len(grad) * self.shape.numel() < regime.one_by_one

    def _write(self, call: Call, winner: str, out: Tensor) -> None:
        """Write the rows by an algorithm, or by one convolution for each sample."""
        x, grad = call["input"], call["grad_output"]
        if winner in ALGORITHMS:
            ALGORITHMS[winner](call, grad, x, out)
            return
        for row, one_x, one_grad in zip(out, x, grad):
            row.copy_(self._ordinary(one_x, one_grad))

    def is_one_product(self) -> bool:
        products = set(self.dilation) == {1} and _products_are_exact(self.weight)
        return self.groups == 1 and products

    def tangent(self, x: Tensor, vector: Tensor) -> Tensor:
        function = FUNCTIONS[len(self.stride) - 1]
        options = self.stride, self.padding, self.dilation, self.groups
        merged = function(x.flatten(0, 1), vector, None, *options)
        return merged.view(*x.shape[:2], *merged.shape[1:])

    def projected(self, x: Tensor, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if self.groups > 1:
            return Formula.projected(self, x, grad, left, right)
        return super().projected(x, grad, left, right)

    def weighted(self, x: Tensor, grad: Tensor, factors: Tensor | None) -> Tensor:
        if algorithm(self._call(x, grad)) == "sums":  # also faster for all together
            return super().weighted(x, grad, factors)
        dtype = grad.dtype
        x, grad = times(x, grad, factors)
        return self._ordinary(x.flatten(0, 1), grad.flatten(0, 1)).to(dtype)

    def input_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """(B, N, C, *S): the input gradient, in the dtype of both arguments."""
        return input_gradient(self._call(x, grad), grad, x)

    def _ordinary(self, x: Tensor, grad: Tensor) -> Tensor:
        """The weight gradient of one batch, from x (N, C, *S) and grad (N, O, *L)."""
        return _weight_gradient(self._call(x, grad).arguments)

    def _groups(self, x: Tensor, grad: Tensor) -> Tensor:
        """The rows by one convolution of (N, B * C, *S), with all samples' groups.

        torch's own batching rule does the same. A direct call saves the cost of vmap.
        """
        size, (outputs, *rest) = len(x), self.shape
        merged = {
            "grad_output": grad.movedim(0, 1).flatten(1, 2),
            "input": x.movedim(0, 1).flatten(1, 2),
            # Only its shape counts.
            "weight": self.weight.new_empty(()).expand(size * outputs, *rest),
            "groups": size * self.groups,
        }
        arguments = {**self._call(x, grad).arguments, **merged}
        return _weight_gradient(arguments).view(size, *self.shape)

    def _call(self, x: Tensor, grad: Tensor) -> Call:
        arguments = {
            "grad_output": grad,
            "input": x,
            "weight": self.weight.to(grad.dtype),
            "bias_sizes": None,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "transposed": False,
            "output_padding": [0 for _ in self.stride],
            "groups": self.groups,
            "output_mask": [False, True, False],
        }
        in_dims = {"grad_output": 0, "input": 0, "weight": None}
        return Call(_backward, arguments, None, in_dims)


def _weight_gradient(arguments: Mapping[str, Any]) -> Tensor:
    found: Tensor
    _, found, _ = _backward(*arguments.values())
    return found


def _of_options(options: Sequence[Any], like: Tensor) -> Weight:
    """A formula, whose weight may have any values."""
    shape, *rest = options
    return Weight(shape, like.new_empty(()).expand(shape), *rest)


keep_opaque(Weight, "convolution", _of_options)


def _keep(
    function: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> ByFormulas | None:
    if input.dim() != dims + 3:
        return None
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    if padding == "same":
        widths = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        if any([width % 2 for width in widths]):
            return None
        padding = [width // 2 for width in widths]
    padding = _each(0 if padding == "valid" else padding, dims)
    options = (stride, padding, dilation, groups)
    formula = Weight(weight.shape, weight, *options, autocast_dtype(weight))
    formulas: dict[str, Formula] = {"weight": formula}
    if bias is not None:
        formulas["bias"] = Bias(bias.shape, 2)

    def forward(x: Tensor) -> Tensor:
        merged = function(x.flatten(0, 1), weight, bias, *options)
        return merged.view(*x.shape[:2], *merged.shape[1:])

    return ByFormulas(forward, formula.input_gradient, formulas)


def _otherwise(
    function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A call that is not kept. Under vmap torch's convolution does not cast its weight
    to the dtype of autocast, in which layers that are kept give their output (2.13)."""
    if not autocasts(input.device) or input.dtype not in HALVES:
        return function(input, *args, **kwargs)

    def cast(value: Any) -> Any:
        return value.to(input.dtype) if isinstance(value, Tensor) else value

    named = {name: cast(value) for name, value in kwargs.items()}
    return function(input, *[cast(value) for value in args], **named)


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


for _dims, _function in enumerate(FUNCTIONS, 1):
    _kept = partial(_keep, _function, _dims)
    keep_calls(_function, KeptCalls(_kept, otherwise=partial(_otherwise, _function)))
