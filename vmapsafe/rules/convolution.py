"""The backward of a convolution, of one sample each: a faster batching rule.

Under ``vmap(grad)`` torch computes the weight gradients of all samples as one
convolution with a group a sample. Where that loses, they are a batch of matrix
products, of the output gradients and what the kernel saw at each output position.
Where is a matter of the machine: ``REGIMES``, by type of device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call, batch_size, is_plain, slices
from vmapsafe._rule import MODES, Rule, register

_backward = torch.ops.aten.convolution_backward.default

_ANY = 2**62


@dataclass(frozen=True)
class Bounds:
    """Where an algorithm wins; both ends of an interval belong to it.

    Attributes:
        dims: spatial dimensions.
        channels: of the input, C.
        outputs: channels of the output, O.
        positions: N x L, output positions of a slice.
    """

    dims: tuple[int, int] = (1, 2)
    channels: tuple[int, int] = (1, _ANY)
    outputs: tuple[int, int] = (1, _ANY)
    positions: tuple[int, int] = (1, _ANY)

    def hold(self, dims: int, channels: int, outputs: int, positions: int) -> bool:
        return (
            self.dims[0] <= dims <= self.dims[1]
            and self.channels[0] <= channels <= self.channels[1]
            and self.outputs[0] <= outputs <= self.outputs[1]
            and self.positions[0] <= positions <= self.positions[1]
        )


@dataclass(frozen=True)
class Regimes:
    """What wins on one type of device.

    Attributes:
        work: below B x O x C x K x N x L products, the whole batch's, torch's own rule.
        pointwise: whether matrix products win for kernels of one position.
        windows: other kernels: where matrix products with copied windows win.
        columns: how many numbers of copied windows to hold at a time, at most; they
            are to stay in the cache.
    """

    work: int
    pointwise: bool
    windows: tuple[Bounds, ...]
    columns: int


# Read off bench/convolution.py, on an x86 server core. A device that is not here has
# torch's own rule.
REGIMES = {
    "cpu": Regimes(
        work=2**21,
        pointwise=True,
        windows=(
            Bounds(
                dims=(2, 2), channels=(2, 4), outputs=(1, 32), positions=(256, _ANY)
            ),
            Bounds(
                dims=(2, 2), channels=(2, 4), outputs=(1, 64), positions=(1024, _ANY)
            ),
            Bounds(channels=(128, _ANY), outputs=(64, _ANY), positions=(1, 16)),
            Bounds(channels=(64, _ANY), outputs=(128, _ANY), positions=(1, 64)),
            Bounds(
                dims=(2, 2), channels=(96, 192), outputs=(128, _ANY), positions=(1, 256)
            ),
            Bounds(
                dims=(2, 2),
                channels=(192, _ANY),
                outputs=(256, _ANY),
                positions=(1, 256),
            ),
        ),
        columns=2**19,
    ),
}


def _accepts(call: Call) -> bool:
    grad, x, weight = call["grad_output"], call["input"], call["weight"]
    regimes = REGIMES.get(weight.device.type)
    if regimes is None or weight.numel() * grad.numel() < regimes.work * len(weight):
        return False  # cheap to ask, and small calls are many
    kernel = weight.shape[2:]
    return (
        call.in_dims["grad_output"] is not None
        and call.in_dims["input"] is not None
        and call.in_dims["weight"] is None
        and call["output_mask"][1]
        and call["groups"] == 1
        and not call["transposed"]
        and len(kernel) in (1, 2)
        and len(call["stride"]) == len(call["padding"]) == len(kernel)
        and grad.dtype == x.dtype == weight.dtype
        and x.numel() > 0
        and _wins(call, regimes)
        # That precision holds for matrix products, not for convolutions.
        and (
            weight.dtype != torch.float32
            or torch.get_float32_matmul_precision() == "highest"
        )
    )


def _wins(call: Call, regimes: Regimes) -> bool:
    """Whether ours is the faster one, if it can be used at all."""
    grad, weight = call["grad_output"], call["weight"]
    outputs, channels = weight.shape[:2]
    positions = grad.numel() // (batch_size(call) * outputs)
    if _is_pointwise(weight):
        return regimes.pointwise and not any(call["padding"])
    return set(call["dilation"]) == {1} and any(
        [
            bounds.hold(weight.dim() - 2, channels, outputs, positions)
            for bounds in regimes.windows
        ]
    )


def _is_pointwise(weight: Tensor) -> bool:
    return weight.shape[2:].numel() == 1


def _merged(call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All three gradients; that of the input is one call for the whole batch."""
    grad, x = (
        call[name].movedim(call.in_dims[name], 0) for name in ("grad_output", "input")
    )
    wants_input, _, wants_bias = call["output_mask"]
    of_input = of_bias = None
    if wants_input:
        merged = {
            "grad_output": grad.flatten(0, 1),
            "input": x.flatten(0, 1),
            "bias_sizes": None,
            "output_mask": [True, False, False],
        }
        found, *_ = _backward(*{**call.arguments, **merged}.values())
        of_input = found.reshape(x.shape)
    if wants_bias:
        rest = [d for d in range(grad.dim()) if d not in (0, 2)]
        of_bias = grad.sum(rest, dtype=grad.dtype)  # autocast widens a plain sum
    return of_input, weight_gradient(call, grad, x), of_bias


def weight_gradient(
    call: Call, grad: Tensor, x: Tensor, out: Tensor | None = None
) -> Tensor:
    """(B, O, C, *K) from (B, N, O, *L) and (B, N, C, *S); in ``out``, contiguous and
    only for plain tensors, if given."""
    weight = call["weight"]
    if _is_pointwise(weight) and not any(call["padding"]):
        windows = _strided(x, call["stride"])
        limit = None
    else:
        windows = _windows(x, call, grad.shape[3:])
        limit = REGIMES[weight.device.type].columns
    if out is not None:
        out = out.view(len(out), len(weight), -1)
    product = _products(grad.movedim(1, 2).flatten(2), windows, limit, out)
    return product.view(-1, *weight.shape)


def seen_by_kernel(call: Call, x: Tensor) -> Tensor:
    """(B, C * K, N * L): what the kernel sees at each output position; no groups, no
    dilation."""
    if _is_pointwise(call["weight"]) and not any(call["padding"]):
        return _strided(x, call["stride"]).flatten(2)
    windows = _windows(x, call, ())
    return windows.reshape(len(x), call["weight"][0].numel(), -1)


def _strided(x: Tensor, stride: list[int]) -> Tensor:
    """The values of ``x`` that a kernel of one position sees: (B, C, N, *L)."""
    index: tuple[Any, ...] = (..., *[slice(None, None, step) for step in stride])
    return x[index].movedim(1, 2)


def _windows(x: Tensor, call: Call, lengths: Sequence[int]) -> Tensor:
    """What the kernel sees at each output position: (B, C, *K, N, *L)."""
    kernel, stride = call["weight"].shape[2:], call["stride"]
    n = len(kernel)
    if any(call["padding"]):
        x = F.pad(x, [p for size in reversed(call["padding"]) for p in (size, size)])
    if is_plain(x):  # views
        for d in range(n):
            x = x.unfold(3 + d, kernel[d], stride[d])
        offsets, positions = range(3 + n, 3 + 2 * n), range(3, 3 + n)
        return x.permute(0, 2, *offsets, 1, *positions)
    # The backward of unfold has no batching rule in torch 2.13, that of slices has.
    seen = []
    for offset in itertools.product(*[range(size) for size in kernel]):
        ends = [o + s * (size - 1) + 1 for o, s, size in zip(offset, stride, lengths)]
        index: tuple[Any, ...] = (..., *map(slice, offset, ends, stride))
        seen.append(x[index])
    windows = torch.stack(seen, 3).movedim(1, 3)
    return windows.reshape(*windows.shape[:2], *kernel, *windows.shape[3:])


def _products(
    grad: Tensor, windows: Tensor, limit: int | None, out: Tensor | None
) -> Tensor:
    """(B, O, C * K) from (B, O, N * L) and (B, C, *K, N, *L).

    Plain tensors a few samples at a time, so that the windows' copies stay in the
    cache, and into the result, as fresh memory is dear.
    """
    batch, outputs, positions = grad.shape
    columns = windows[0].numel()
    if limit is None or not (is_plain(grad) and is_plain(windows)):
        windows = windows.reshape(batch, -1, positions)
        return torch.matmul(grad, windows.mT, out=out)
    result = out
    if result is None:
        result = grad.new_empty(batch, outputs, columns // positions)
    step = max(1, limit // columns)
    for i in range(0, batch, step):
        part = windows[i : i + step]
        part = part.reshape(len(part), -1, positions)
        torch.bmm(grad[i : i + step], part.mT, out=result[i : i + step])
    return result


# -- The slow form -------------------------------------------------------------------


def _slice_by_slice(call: Call) -> tuple[Tensor | None, ...]:
    rows = [_by_autograd(one) for one in slices(call, batch_size(call))]
    return tuple(
        None if column[0] is None else torch.stack(column) for column in zip(*rows)
    )


def _by_autograd(call: Call) -> tuple[Tensor | None, ...]:
    """The gradients that torch's convolution itself has."""
    asked = call["output_mask"]
    values = [
        call["input"],
        call["weight"],
        call["input"].new_zeros(len(call["weight"])),
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
    Rule(
        name="convolution_backward, weights by matrix products",
        functions=(_backward,),
        modes=MODES,
        accepts=_accepts,
        batched=_merged,
        reference=_slice_by_slice,
    )
)
