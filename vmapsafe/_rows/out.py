"""Given memory for rows: whether they can be written there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, a_kind, shown
from vmapsafe._rows.samples import Samples
from vmapsafe._torch import current_level, dispatch_modes_are_on


def check_out(called: str, out: Mapping[str, Tensor], samples: Samples) -> None:
    """Raise unless rows can be written into ``out``.

    Args:
        called: the public function, for errors.
        out: what the caller gave.
        samples: of the call.

    Raises:
        VmapSafeTypeError: ``out`` is not a dict.
        VmapSafeValueError: they cannot; the text says which tensor and why.
    """
    called = f"{called} with out="
    if not isinstance(out, Mapping):
        raise VmapSafeTypeError(
            called,
            f"out is {shown(out)}, not a dict of tensors",
            "Pass what an earlier call returned",
        )
    if current_level() > 0:
        raise VmapSafeValueError(
            called,
            "a transform of torch.func around it, whose results may not be written "
            "into given memory",
            "Call it without out=",
        )
    if set(out) != set(samples.values):
        raise VmapSafeValueError(
            called,
            f"out has the names {sorted(out)}, the parameters are "
            f"{sorted(samples.values)}",
            "Give one tensor for each, such as an earlier call returned",
        )
    for name, value in samples.values.items():
        given, shape = out[name], (samples.size, *value.shape)
        wanted = f"{shape}, {value.dtype}, on {value.device}"
        if not isinstance(given, Tensor):
            found = f"is {a_kind(given)}"
        elif (tuple(given.shape), given.dtype, given.device) != (
            shape,
            value.dtype,
            value.device,
        ):
            found = f"is {tuple(given.shape)}, {given.dtype}, on {given.device}"
        elif not given.is_contiguous():
            found = f"has strides {given.stride()}"
        elif given.requires_grad:
            found = "requires a gradient"
        else:
            continue
        raise VmapSafeValueError(
            called,
            f"out[{name!r}] {found}",
            f"Pass a contiguous tensor {wanted}",
        )
    if not dispatch_modes_are_on():  # fake tensors lie nowhere
        _check_memory(called, out, samples)


def _check_memory(called: str, out: Mapping[str, Tensor], samples: Samples) -> None:
    """Raise where rows would be written over rows or over what is read."""
    read = {
        id(tensor): tensor
        for tensors in (
            samples.tensors,
            samples.values.values(),
            samples.parameters.known.values(),
            samples.net.buffers(),
        )
        for tensor in tensors
    }
    tensors = [*out.values(), *read.values()]
    spans = sorted([(*_span(tensor), i) for i, tensor in enumerate(tensors)])
    end_of_rows = end_of_all = (0, 0)
    for start, end, i in spans:
        end_before, before = end_of_all if i < len(out) else end_of_rows
        if start < min(end_before, end):
            row, other = sorted((i, before))
            _refuse_memory(called, [*out], row, other, tensors, samples)
        if i < len(out):
            end_of_rows = max(end_of_rows, (end, i))
        end_of_all = max(end_of_all, (end, i))


def _refuse_memory(
    called: str,
    names: list[str],
    row: int,
    other: int,
    tensors: list[Tensor],
    samples: Samples,
) -> None:
    """Raise for two of ``tensors``, which begin with the rows."""
    if other < len(names):
        said = f"out[{names[other]!r}]"
    elif any(tensors[other] is leaf for leaf in samples.tensors):
        said = "a tensor of the batch"
    else:
        said = "a parameter or buffer"
        for name, tensor in (
            *samples.parameters.known.items(),
            *samples.net.named_buffers(),
        ):
            if tensor is tensors[other]:
                said = f"{name!r} of the model"
    raise VmapSafeValueError(
        called,
        f"out[{names[row]!r}] shares memory with {said}, which it would overwrite",
        "Give each name memory of its own, such as an earlier call returned",
    )


def _span(tensor: Tensor) -> tuple[int, int]:
    """From where to where in memory a tensor reaches; nowhere if it has no address."""
    if tensor.layout != torch.strided or not tensor.numel():
        return 0, 0
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes if start else 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum([(size - 1) * step for size, step in steps])
    return start, start + (last + 1) * tensor.itemsize if start else 0
