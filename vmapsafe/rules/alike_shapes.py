"""Functions of the shape of each sample of a batch, see ``alike``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vmapsafe._call import Function
from vmapsafe._torch import shares_memory
from vmapsafe.rules.alike import (
    NUMBERS,
    Batch,
    Found,
    NotAlike,
    bound,
    dim_of,
    place_of,
    treat_alike,
)

# -- Shapes ----------------------------------------------------------------------------


def _noted(batch: Batch, x: Tensor, found: Tensor) -> Tensor:
    """What a function gives that copies only if it must: fewer slices need a copy."""
    batch.copied |= shares_memory(found, [x]) is None
    return found


def _flatten(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    given = bound(("input", "start_dim", "end_dim"), args, kwargs)
    x = given["input"]
    place = place_of(batch, x)
    first = dim_of(given.get("start_dim", 0), x)
    last = dim_of(given.get("end_dim", -1), x)
    if first <= place <= last:
        raise NotAlike
    return _noted(batch, x, torch.flatten(x, first, last)), (
        place if place < first else place - (last - first)
    )


treat_alike(_flatten, torch.flatten, Tensor.flatten)


def _view(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    """Of slices (1, ...), in a shape that begins with 1."""
    x, *shape = args
    place = place_of(batch, x)
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = [*shape[0]]
    if kwargs or place or not shape or not all([type(n) is int for n in shape]):
        raise NotAlike
    first, *rest = shape
    if first != 1:
        if first != -1 or math.prod(rest) != x.numel() // batch.size:
            raise NotAlike
    return _noted(batch, x, func(x, (batch.size, *rest))), 0


treat_alike(_view, Tensor.view, Tensor.reshape, torch.reshape)


def _permute(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    x, *dims = args
    place = place_of(batch, x)
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = [*dims[0]]
    if kwargs or len(dims) != x.dim():
        raise NotAlike
    dims = [dim_of(dim, x) for dim in dims]
    return x.permute(dims), dims.index(place)


treat_alike(_permute, Tensor.permute, torch.permute)


def _transpose(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    given = bound(("input", "dim0", "dim1"), args, kwargs)
    x = given["input"]
    place = place_of(batch, x)
    one, other = dim_of(given.get("dim0"), x), dim_of(given.get("dim1"), x)
    moved = {one: other, other: one}
    return x.transpose(one, other), moved.get(place, place)


def _unsqueeze(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    given = bound(("input", "dim"), args, kwargs)
    x, dim = given["input"], given.get("dim")
    place = place_of(batch, x)
    if type(dim) is not int or not -x.dim() - 1 <= dim <= x.dim():
        raise NotAlike
    return x.unsqueeze(dim), place + (dim % (x.dim() + 1) <= place)


treat_alike(_unsqueeze, Tensor.unsqueeze, torch.unsqueeze)


def _squeeze(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    given = bound(("input", "dim"), args, kwargs)
    x = given["input"]
    place, dim = place_of(batch, x), dim_of(given.get("dim"), x)
    if dim == place:
        raise NotAlike
    gone = x.size(dim) == 1 and dim < place
    return x.squeeze(dim), place - gone


treat_alike(_squeeze, Tensor.squeeze, torch.squeeze)
treat_alike(_transpose, Tensor.transpose, torch.transpose)


def _unbind(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    given = bound(("input", "dim"), args, kwargs)
    x = given["input"]
    place, dim = place_of(batch, x), dim_of(given.get("dim", 0), x)
    if place == dim:
        raise NotAlike
    return x.unbind(dim), place - (dim < place)


treat_alike(_unbind, Tensor.unbind, torch.unbind)


def _index(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    """By ints and slices, of which that of the batch takes all."""
    x, index = args
    place = place_of(batch, x)
    index = index if isinstance(index, tuple) else (index,)
    for i in index:
        ends = (i.start, i.stop, i.step) if type(i) is slice else (i,)
        if not all([type(end) is int or end is None for end in ends]) or i is None:
            raise NotAlike
    if len(index) > place and index[place] != slice(None):
        raise NotAlike
    return x[index], place - sum([type(i) is int for i in index[:place]])


treat_alike(_index, Tensor.__getitem__)


def _same_shape(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    if len(args) != 1 or kwargs:
        raise NotAlike
    (x,) = args
    return _noted(batch, x, func(x)), place_of(batch, x)


treat_alike(_same_shape, Tensor.contiguous)


def _cat(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    given = bound(("tensors", "dim"), args, kwargs)
    tensors = given["tensors"]
    if not isinstance(tensors, (list, tuple)) or not tensors:
        raise NotAlike
    places = {place_of(batch, t) for t in tensors}
    dim = dim_of(given.get("dim", 0), tensors[0])
    if len(places) > 1 or dim in places or len({t.dim() for t in tensors}) > 1:
        raise NotAlike
    return torch.cat(tensors, dim), places.pop()


treat_alike(_cat, torch.cat)


def _split(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    if len(args) < 2:
        raise NotAlike
    x, size, *rest = args
    given = bound(("dim",), tuple(rest), kwargs)
    place, dim = place_of(batch, x), dim_of(given.get("dim", 0), x)
    if place == dim:
        raise NotAlike
    return func(x, size, dim), place


treat_alike(_split, torch.chunk, Tensor.chunk, torch.split, Tensor.split)


# -- What code asks of a tensor --------------------------------------------------------


def _asked(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    """What a tensor and its slices have in common."""
    return func(*args, **kwargs), None


def _shape(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    x, *dims = args
    place = batch.place(x)
    if place == NUMBERS or kwargs:
        raise NotAlike
    shape = [*x.shape]
    if place is not None:
        shape[place] = 1
    if dims:
        return shape[dim_of(dims[0], x)], None
    if func is Tensor.__len__:
        return shape[0], None
    return torch.Size(shape), None


_PROPERTIES: Any = Tensor
for _name in ("dtype", "device", "is_cuda", "layout"):
    treat_alike(_asked, getattr(_PROPERTIES, _name).__get__)
treat_alike(_asked, Tensor.is_floating_point, torch.is_floating_point)


def _requires_grad(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    return batch.is_own(args[0]) or func(*args), None


treat_alike(_requires_grad, _PROPERTIES.requires_grad.__get__)


def _dimensions(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    if batch.place(args[0]) == NUMBERS:
        return 0, None
    return func(*args, **kwargs), None


treat_alike(_dimensions, Tensor.dim, _PROPERTIES.ndim.__get__)
treat_alike(_shape, _PROPERTIES.shape.__get__, Tensor.size, Tensor.__len__)
