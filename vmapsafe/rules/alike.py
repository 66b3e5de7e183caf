"""Functions that treat samples alike, and how to call each on all samples at once.

A model that takes batches mostly calls functions that compute each sample of a batch by
itself. A forward of only such calls needs no vmap: the batch (B, ...) goes through it
as it is, which saves vmap's price of 10 to 30 us a call. ``_rows/merged`` does so. It
looks up each call here, and gives up at the first that is not in this table, or that
does not treat samples alike.

The code that makes the calls is written for batches of one, and must not see that the
batch is larger. So a tensor of the batch *stands for* its slices, each with a 1 where
the tensor has B. Where that is, its *place*, is what an entry of the table computes. A
loss without dimensions is a tensor (B,), whose place is ``NUMBERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Function, Signature

# The types of device on which this was measured and tested.
DEVICES = ("cpu",)
NUMBERS = -1  # the place of B in a tensor of which each sample has one number


class NotAlike(Exception):
    """A call that may not treat samples alike, or of which this is not known."""


class Batch(Protocol):
    """The tensors of a batch.

    Attributes:
        size: B.
        copied: whether a function copied the batch, and may give a view of a slice. If
            one of them is written later, it is not known what the other holds.
    """

    size: int
    copied: bool

    def place(self, value: Any) -> int | None:
        """Where a tensor of the batch has B; None for what all samples share. Raises
        :class:`NotAlike` if it is not known where the tensor comes from."""

    def is_own(self, value: Any) -> bool:
        """Whether each sample has its own copy of a tensor, as of a parameter."""

    def copies(self, value: Tensor) -> Tensor:
        """These copies, (B, *shape)."""


# A call of a function on tensors of a batch gives the result, and its place. A list or
# a tuple of tensors has one place; None is the place of what all samples share.
Found = tuple[Any, int | None]
Handler = Callable[[Batch, Function, tuple[Any, ...], dict[str, Any]], Found]

# How each function is called.
ALIKE: dict[Function, Handler] = {}


def treat_alike(handler: Handler, *functions: Function) -> None:
    """Register how functions are called."""
    for function in functions:
        ALIKE[function] = handler


def place_of(batch: Batch, value: Any) -> int:
    """The place of what must be a tensor of the batch with dimensions for samples."""
    place = batch.place(value) if isinstance(value, Tensor) else None
    if place is None or place == NUMBERS:
        raise NotAlike
    return place


def bound(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name; a call with others is not known."""
    if len(args) > len(names) or not kwargs.keys() <= {*names[len(args) :]}:
        raise NotAlike
    return {**dict(zip(names, args)), **kwargs}


def dim_of(dim: Any, tensor: Tensor) -> int:
    if type(dim) is not int or not -tensor.dim() <= dim < tensor.dim():
        raise NotAlike
    return dim % tensor.dim()


# -- One number at a time --------------------------------------------------------------


def _elementwise(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    """Of one tensor, and of options that are not tensors."""
    x, *options = args or (kwargs.get("input"),)
    place = batch.place(x) if isinstance(x, Tensor) else None
    if place is None or any([isinstance(v, Tensor) for v in options]):
        raise NotAlike
    if kwargs and "out" in kwargs:
        raise NotAlike
    if any([isinstance(v, Tensor) and v is not x for v in kwargs.values()]):
        raise NotAlike
    at = _INPLACE.get(func)
    if at is not None:
        given = args[at] if len(args) > at else kwargs.get("inplace", False)
        if given and (batch.copied or not x.requires_grad):  # or the caller's own
            raise NotAlike
    return func(*args, **kwargs), place


# The argument ``inplace`` of a function, by its number.
_INPLACE: dict[Function, int] = {}

for _function in (
    *(F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.silu, F.mish),
    *(F.hardswish, F.hardsigmoid, F.gelu, F.softplus, F.logsigmoid, F.softsign),
    *(F.tanhshrink, F.tanh, F.sigmoid, torch.relu, torch.tanh, torch.sigmoid),
    *(torch.exp, torch.log, torch.sqrt, torch.square, torch.abs, torch.sin, torch.cos),
    *(Tensor.relu, Tensor.tanh, Tensor.sigmoid, Tensor.exp, Tensor.log, Tensor.sqrt),
    *(Tensor.square, Tensor.abs, Tensor.sin, Tensor.cos, Tensor.neg, torch.neg),
    Tensor.float,
):
    treat_alike(_elementwise, _function)
    _names = Signature.of(_function).names
    if "inplace" in _names:
        _INPLACE[_function] = _names.index("inplace")


def _pair(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    """Of two numbers: of two tensors, or of a tensor and a number."""
    if kwargs or len(args) != 2:
        raise NotAlike
    a, b = args
    places = [batch.place(v) if isinstance(v, Tensor) else None for v in args]
    if places[0] is not None and places[1] is not None:
        if places[0] != places[1] or a.dim() != b.dim():
            raise NotAlike
        return func(a, b), places[0]
    which = 0 if places[0] is not None else 1
    place, x, other = places[which], args[which], args[1 - which]
    if place is None:
        raise NotAlike
    if isinstance(other, Tensor):
        if place == NUMBERS or other.dtype != x.dtype:  # one number gives its dtype
            raise NotAlike
        missing = x.dim() - other.dim()
        if batch.is_own(other):
            if place or missing < 1:
                raise NotAlike
            ones = [1 for _ in range(missing - 1)]
            other = batch.copies(other).view(batch.size, *ones, *other.shape)
        else:
            behind = place - missing
            if missing < 0 or (behind >= 0 and other.size(behind) != 1):
                raise NotAlike
        return (func(x, other) if which == 0 else func(other, x)), place
    if type(other) not in (int, float, bool):
        raise NotAlike
    return func(a, b), place


def _pair_in_place(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    """The same, which writes the first."""
    if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
        raise NotAlike  # it may be the caller's own
    if batch.copied or batch.place(args[0]) is None:
        raise NotAlike
    return _pair(batch, func, args, kwargs)


for _name in ("add", "sub", "mul", "div", "true_divide", "pow"):
    treat_alike(_pair, getattr(Tensor, _name), getattr(torch, _name))
for _name in ("add", "sub", "mul", "div"):
    treat_alike(_pair_in_place, getattr(Tensor, _name + "_"))
for _name in ("add", "sub", "mul", "truediv", "pow", "radd", "rmul", "rsub"):
    treat_alike(_pair, getattr(Tensor, f"__{_name}__"))
for _name in ("iadd", "isub", "imul"):
    treat_alike(_pair_in_place, getattr(Tensor, f"__{_name}__"))


# -- Within a sample -------------------------------------------------------------------


def _reduction(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    given = bound(("input", "dim", "keepdim"), args, kwargs)
    x, dim = given["input"], given.get("dim")
    place = place_of(batch, x)
    keeps = given.get("keepdim", False)
    if dim is None:  # one number a sample
        if place or keeps:
            raise NotAlike
        return func(x.flatten(1) if x.dim() > 1 else x.unsqueeze(1), 1), NUMBERS
    dims = [dim_of(d, x) for d in (dim if isinstance(dim, (tuple, list)) else (dim,))]
    if not dims or place in dims:
        raise NotAlike
    after = place if keeps else place - sum([d < place for d in dims])
    return func(x, dims, keepdim=keeps), after


for _name in ("mean", "sum"):
    treat_alike(_reduction, getattr(Tensor, _name), getattr(torch, _name))


def _along(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    """Normalised along a dimension."""
    if len(args) > 2 or not kwargs.keys() <= {"dim", "_stacklevel", "dtype"}:
        raise NotAlike
    x, *dims = args
    place = place_of(batch, x)
    if place == dim_of(dims[0] if dims else kwargs.get("dim"), x):
        raise NotAlike
    return func(*args, **kwargs), place


treat_alike(
    _along,
    *(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax),
    *(Tensor.softmax, Tensor.log_softmax),
)


def _image(dims: int) -> Handler:
    """Of an image (1, C, *L), each channel by itself."""

    def handler(
        batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Found:
        x, *options = args or (kwargs.get("input"),)
        given = [*options, *[v for name, v in kwargs.items() if name != "input"]]
        if place_of(batch, x) or x.dim() != dims + 2:
            raise NotAlike
        if any([isinstance(v, Tensor) for v in given]):
            raise NotAlike
        if kwargs.get("return_indices") or len(args) > 6 and args[6] is True:
            raise NotAlike
        return func(*args, **kwargs), 0

    return handler


for _dims in (1, 2, 3):
    for _name in ("max_pool", "avg_pool", "adaptive_avg_pool"):
        treat_alike(_image(_dims), getattr(F, f"{_name}{_dims}d"))
treat_alike(_image(1), torch.adaptive_avg_pool1d)


def _dropout(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    given = bound(("input", "p", "training", "inplace"), args, kwargs)
    x = given["input"]
    if given.get("training", True) and given.get("p", 0.5) != 0:
        raise NotAlike
    return x, place_of(batch, x)


for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"):
    treat_alike(_dropout, getattr(F, _name))


def _attention(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given = bound(names, args, kwargs)
    qkv = [given[name] for name in names[:3]]
    places = [place_of(batch, t) for t in qkv]
    if any(places) or given.get("attn_mask") is not None or given.get("dropout_p"):
        raise NotAlike
    if {t.dim() for t in qkv} != {4}:
        raise NotAlike
    return func(*args, **kwargs), 0


treat_alike(_attention, F.scaled_dot_product_attention)


def _product(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    """Of matrices of each sample."""
    if len(args) != 2 or kwargs:
        raise NotAlike
    places = {place_of(batch, t) for t in args}
    sizes = {t.dim() for t in args}
    if len(places) > 1 or len(sizes) > 1 or [*places][0] >= [*sizes][0] - 2:
        raise NotAlike
    return func(*args), places.pop()


treat_alike(_product, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)
