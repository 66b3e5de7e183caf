"""``batched``: a function written for a batch, run on batches of one under vmap."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import vmap

from vmapsafe._block.loop import (
    Before,
    Fallback,
    a_block_merges,
    by_vmap_or_loop,
    check_fallback,
    in_turn,
    modules_in,
    stacked,
)
from vmapsafe._draws import Draws, Randomness
from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, shown
from vmapsafe._torch import (
    broadcast_to_leaves,
    top_hooks,
    tree_flatten,
    tree_map,
    tree_unflatten,
)

P = ParamSpec("P")
R = TypeVar("R")
# As in torch.func.vmap, and by name.
InDims = int | None | tuple[Any, ...] | list[Any] | dict[str, Any]
OutDims = int | tuple[int, ...] | None


@overload
def batched(
    function: Callable[P, R],
    in_dims: InDims = 0,
    out_dims: OutDims = 0,
    randomness: Randomness = "error",
    *,
    chunk_size: int | None = None,
    keep_batch_dim: bool = True,
    fallback: Fallback = "error",
) -> Callable[P, R]: ...


@overload
def batched(
    function: None = None,
    in_dims: InDims = 0,
    out_dims: OutDims = 0,
    randomness: Randomness = "error",
    *,
    chunk_size: int | None = None,
    keep_batch_dim: bool = True,
    fallback: Fallback = "error",
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def batched(
    function: Callable[P, R] | None = None,
    in_dims: InDims = 0,
    out_dims: OutDims = 0,
    randomness: Randomness = "error",
    *,
    chunk_size: int | None = None,
    keep_batch_dim: bool = True,
    fallback: Fallback = "error",
) -> Callable[P, R] | Callable[[Callable[P, R]], Callable[P, R]]:
    """Vectorise a function that is written for a batch: each slice is a batch of one.

    ``batched(f)(x)[i]`` equals ``f(x[i:i+1])`` without its leading 1, so a model that
    takes (N, C, H, W) does not need ``unsqueeze``:

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import batched, vmap_safe
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
    >>> _ = model(torch.randn(4, 3, 8, 8))
    >>> @batched
    ... def forward(x):
    ...     return model(x)  # x: (1, 3, 8, 8)
    >>> with vmap_safe(model):
    ...     forward(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 288])

    ``in_dims`` says, by position or by name, which arguments all slices share:

    >>> @batched(in_dims={"weight": None})
    ... def scores(weight, x):
    ...     return x @ weight  # weight: (3, 2), x: (1, 3)
    >>> scores(torch.randn(3, 2), torch.randn(5, 3)).shape
    torch.Size([5, 2])

    Args:
        function: the function to run. Without it, ``batched`` returns a decorator.
        in_dims: as in ``torch.func.vmap``: the batch dimension of each positional
            argument, None for one that all slices share; an int for every argument; or
            a tree of these. Or a dict by argument name, where a name left out means 0.
            Modules, numbers, strings, None and 0-dimensional tensors pass through.
            Keyword arguments that are not named are mapped over 0, as in vmap.
        out_dims: where the batch goes in the outputs, as in vmap.
        randomness: "error", "different" or "same", as in vmap.
        chunk_size: how many slices run at a time, as in vmap; None for all.
        keep_batch_dim: True: a slice keeps its batch dimension, of size 1, and each
            output that has a dimension loses its first, which must be 1. False: slices
            come without their batch dimension and outputs stay as they are, as in vmap.
            Functions that return gradients of parameters need False.
        fallback: what to do where vmap refuses the code, as it does if the code calls
            ``.item()``, decides by the numbers of a tensor, takes a boolean mask, calls
            an autograd.Function that has not a rule for vmap, packs sequences or uses
            torch.utils.checkpoint. "error" raises vmap's error. "loop" runs the slices
            one after another, with the same results, and warns once. Other errors are
            raised: those of the code itself, about shapes, or for a draw with
            ``randomness="error"``. In "sync" a loop is refused.

    Returns:
        The vectorised function, with the types of ``function``; or a decorator.

    Raises:
        VmapSafeTypeError: ``function`` is not callable.
        VmapSafeValueError: an unknown ``fallback``; on a call: no argument has a batch
            dimension, batch sizes disagree, or the first dimension of an output is not
            1; with ``fallback="loop"``, a block in "sync" is open, or slices give
            outputs that do not fit together.
        VmapSafeRuntimeError: on a call with ``fallback="loop"``: the code has written
            on its input before vmap refused it, or a slice draws random numbers with
            ``randomness="error"``.

    Warns:
        FallbackWarning: vmap refuses the code, and the slices run one after another.

    It does not open a block of ``vmap_safe``: put the call in one, or decorate with
    both. A loop begins with the random state, and the buffers of the modules that the
    function holds, as they were before vmap refused the code. What else the code had
    changed by then stays. While torch.compile traces there is not a loop.
    """
    if function is None:
        return functools.partial(
            batched,
            in_dims=in_dims,
            out_dims=out_dims,
            randomness=randomness,
            chunk_size=chunk_size,
            keep_batch_dim=keep_batch_dim,
            fallback=fallback,
        )
    if not callable(function):
        raise VmapSafeTypeError(
            "batched(...)", f"{shown(function)} is not callable", "Pass a function"
        )
    name = getattr(function, "__name__", type(function).__name__)
    called = f"batched({name})(...)"
    check_fallback(called, fallback, merges=False)
    # torch.compile cannot trace inspect; without a dict, names only word errors.
    needs_names = isinstance(in_dims, dict) or not torch.compiler.is_compiling()
    names = _parameter_names(function) if needs_names else ()

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        specs = _specs(name, names, in_dims, args, kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        dims = _dims_of_leaves(name, names, specs, args, kwargs)
        mapped = [(i, dim) for i, dim in enumerate(dims) if dim is not None]
        tensors = [leaves[i] for i, _ in mapped]
        # torch puts only the CPU's generator back for each chunk (read in 2.13).
        several = chunk_size is not None and randomness == "same"
        draws = Draws(randomness) if several else None

        def one(*slices: Tensor) -> R:
            filled = list(leaves)
            for (i, dim), piece in zip(mapped, slices):
                filled[i] = piece.unsqueeze(dim) if keep_batch_dim else piece
            inner_args, inner_kwargs = tree_unflatten(filled, tree)
            output = function(*inner_args, **inner_kwargs)
            if keep_batch_dim:
                output = tree_map(lambda leaf: without_batch_dim(called, leaf), output)
            return output

        def one_of_chunk(*slices: Tensor) -> R:
            assert draws is not None
            draws.put_back()
            return one(*slices)

        def by_vmap() -> R:
            return vmap(
                one if draws is None else one_of_chunk,
                in_dims=tuple([dim for _, dim in mapped]),
                out_dims=out_dims,
                randomness=randomness,
                chunk_size=chunk_size,
            )(*tensors)

        if fallback == "error" or torch.compiler.is_compiling():
            return by_vmap()
        check_fallback(called, fallback, merges=a_block_merges())

        def by_loop() -> R:
            dims = [dim for _, dim in mapped]
            return _one_by_one(called, one, tensors, dims, randomness, out_dims)

        def attempt() -> R:
            with _no_hooks():
                return by_vmap()

        held = modules_in([function, *leaves])
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        before = Before(randomness, given, held)
        code = getattr(function, "__code__", type(function))
        return by_vmap_or_loop(called, attempt, by_loop, before, held, code)

    return wrapper


def _no_hooks() -> AbstractContextManager[None]:
    """Refuse hooks for saved tensors, as a checkpoint sets them: in backward they would
    run code on the slices after vmap has ended."""
    if not torch.is_grad_enabled() or top_hooks(True) is not None:
        return nullcontext()
    return disable_saved_tensors_hooks(
        "vmap doesn't support saved tensor hooks, as torch.utils.checkpoint uses them"
    )


def _one_by_one(
    called: str,
    one: Callable[..., R],
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    randomness: str,
    out_dims: OutDims,
) -> R:
    """What ``vmap`` of ``one`` would give, by a loop over the slices."""
    size = tensors[0].size(dims[0])
    if not size:  # one slice of zeros tells the structure and the shapes
        tensors = [t.new_zeros(_with_one(t, dim)) for t, dim in zip(tensors, dims)]

    def run(i: int) -> R:
        return one(*[t.select(dim, i) for t, dim in zip(tensors, dims)])

    draws = Draws(randomness, of_host=True)
    outputs = in_turn(called, size or 1, randomness, run)
    if not size:
        draws.put_back()
    together: R = stacked(called, outputs, out_dims, size)
    return together


def _with_one(tensor: Tensor, dim: int) -> list[int]:
    """Its shape, with 1 as the size of a dimension."""
    return [1 if d == dim else size for d, size in enumerate(tensor.shape)]


def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the positional parameters; empty if there is no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )


def _specs(
    name: str,
    names: Sequence[str],
    in_dims: InDims,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch dimensions of each argument, in the structure of (args, kwargs)."""
    if isinstance(in_dims, dict):
        known = {*names, *kwargs}
        unknown = [key for key in in_dims if key not in known]
        if unknown:
            raise VmapSafeValueError(
                f"batched({name}, in_dims={in_dims})",
                f"{name} has no argument {unknown[0]!r}, it has {list(names)}",
                "Name arguments as the function does",
            )
        by_position = tuple(
            [
                in_dims.get(names[i], 0) if i < len(names) else 0
                for i in range(len(args))
            ]
        )
        return by_position, {key: in_dims.get(key, 0) for key in kwargs}
    if isinstance(in_dims, (tuple, list)):
        if len(in_dims) != len(args):
            raise VmapSafeValueError(
                f"batched({name}, in_dims={in_dims})",
                f"{len(in_dims)} in_dims for {len(args)} positional arguments",
                "Give one for each, or a dict by name",
            )
        return tuple(in_dims), {key: 0 for key in kwargs}
    return tuple([in_dims for _ in args]), {key: 0 for key in kwargs}


def _dims_of_leaves(
    name: str,
    names: Sequence[str],
    specs: tuple[tuple[Any, ...], dict[str, Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[int | None]:
    """The batch dimension of every leaf of (args, kwargs), None for leaves without."""
    labels = [names[i] if i < len(names) else f"argument {i}" for i in range(len(args))]
    dims: list[int | None] = []
    sizes: list[tuple[str, Tensor, int]] = []
    for label, value, spec in (
        *zip(labels, args, specs[0]),
        *((key, value, specs[1][key]) for key, value in kwargs.items()),
    ):
        leaves, tree = tree_flatten(value)
        spread = broadcast_to_leaves(spec, tree)
        if spread is None:
            raise VmapSafeValueError(
                f"batched({name})(...)",
                f"in_dims {shown(spec)} does not fit the structure of {label}",
                "Give an int, None, or a tree of them like the argument",
            )
        for leaf, dim in zip(leaves, spread):
            if dim is None or not isinstance(leaf, Tensor) or leaf.dim() == 0:
                dims.append(None)
                continue
            if not -leaf.dim() <= dim < leaf.dim():
                raise VmapSafeValueError(
                    f"batched({name})(...)",
                    f"in_dims says dimension {dim} for {label}, which has shape "
                    f"{tuple(leaf.shape)}",
                    "Name a dimension that the argument has",
                )
            dims.append(dim % leaf.dim())
            sizes.append((label, leaf, dim % leaf.dim()))
    _check_sizes(name, sizes)
    return dims


def _check_sizes(name: str, sizes: list[tuple[str, Tensor, int]]) -> None:
    if not sizes:
        raise VmapSafeValueError(
            f"batched({name})(...)",
            "no argument has a batch dimension to map over",
            "Pass a tensor with a batch dimension, or in_dims that name it",
        )
    if any([leaf.size(dim) != sizes[0][1].size(sizes[0][2]) for _, leaf, dim in sizes]):
        found = ", ".join(
            f"{label} of shape {tuple(leaf.shape)} has {leaf.size(dim)} in dimension "
            f"{dim}"
            for label, leaf, dim in sizes
        )
        raise VmapSafeValueError(
            f"batched({name})(...)",
            f"batch sizes disagree: {found}",
            "Pass None in in_dims for arguments that all slices share",
        )


def without_batch_dim(called: str, output: Any) -> Any:
    """The output of one slice without its batch dimension, which must have size 1."""
    if not isinstance(output, Tensor) or output.dim() == 0:
        return output
    if output.size(0) != 1:
        raise VmapSafeValueError(
            called,
            f"an output of one slice has shape {tuple(output.shape)}, whose first "
            "dimension is not a batch of one",
            "Return one row for each sample, or pass keep_batch_dim=False and take "
            "the slice as vmap gives it, as functions that return gradients of "
            "parameters must",
        )
    return output.squeeze(0)
