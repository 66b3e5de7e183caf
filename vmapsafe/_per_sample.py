"""Per-sample gradients in one call: ``vmap(grad)`` inside a block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from vmapsafe._batched import without_batch_dim
from vmapsafe._call import tree_flatten, tree_map
from vmapsafe._errors import worded
from vmapsafe._groups import NumGroups
from vmapsafe._scope import Options
from vmapsafe._state import process_group, unwrapped
from vmapsafe._wrap import Block, checked

Loss = Callable[..., Any]


def per_sample_grads(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    mode: str = "eval",
    rows: str = "contribution",
    params: Collection[str] | Mapping[str, Tensor] | None = None,
    chunk_size: int | None = None,
    randomness: str = "error",
    has_aux: bool = False,
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    fast: bool = True,
) -> Any:
    r"""Every sample's gradient of the loss with respect to the model's parameters.

    Row i is :math:`\partial \ell_i / \partial \theta` with
    :math:`\ell_i` = ``loss_fn(model(x[i:i+1]), y[i:i+1])``, x and y being the batch, so
    a mean and a sum loss both mean "this sample's loss".

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from torch import nn
    >>> from vmapsafe import per_sample_grads
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    >>> _ = model(torch.randn(16, 4))
    >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> rows = per_sample_grads(model, F.cross_entropy, x, y)
    >>> {name: tuple(row.shape) for name, row in rows.items() if "0" in name}
    {'0.weight': (5, 8, 4), '0.bias': (5, 8)}

    Args:
        model: takes batches; it need not be in a block already.
        loss_fn: of the model's output on a batch of one and the rest of the batch;
            returns a tensor without dimensions, or ``(loss, aux)`` with ``has_aux``.
        *batch: the inputs, then what ``loss_fn`` takes after the output; trees of
            tensors (B, ...). A tuple as the inputs is positional arguments of the
            model, a dict its keyword arguments.
        mode: of :func:`vmap_safe`, whose block is entered for this call.
        rows: in "sync", where samples share their statistics, what a row is; see below.
        params: the names to differentiate by, or a dict from names to the tensors at
            which to, through which outer derivatives pass; default every parameter
            that requires a gradient. Tied parameters appear once.
        chunk_size: samples at a time, as in ``torch.func.vmap``; None for all. In
            "sync" each chunk is a batch with statistics of its own.
        randomness: of dropout and the like: "error", "different" or "same".
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        num_groups: of :func:`vmap_safe`.
        update_running_stats: of :func:`vmap_safe`.
        sync_levels: of :func:`vmap_safe`.
        fast: of :func:`vmap_safe`.

    Returns:
        A dict from parameter names to tensors (B, *parameter.shape), in the dtype of
        the parameter. With ``has_aux`` a pair: that, and aux with the leading 1 of its
        tensors replaced by B.

    Raises:
        ValueError: batch sizes that disagree, a loss that has dimensions, parameters
            that do not exist, none that requires a gradient.

    In "eval", "no_running_stats" and "group_norm" samples are independent, and there is
    one gradient of sample i. In "sync" the field knows three. With :math:`\theta^{(i)}`
    sample i's own copy of the parameters, and all statistics those of the batch:

    ================  ==============================================  ==================
    rows              row i                                           sum of the rows
    ================  ==============================================  ==================
    "contribution"    :math:`\sum_j \partial \ell_j /                 training gradient
                      \partial \theta^{(i)}`: all losses, through
                      sample i's copy (what ``vmap(grad)`` gives,
                      and BackPACK's BatchGrad)
    "jacobian"        :math:`\partial \ell_i / \partial \theta`:      training gradient
                      sample i's loss, through all copies
    "detached"        :math:`\partial \ell_i / \partial \theta`       another vector
                      with mean and variance held constant
    ================  ==============================================  ==================

    The training gradient is that of :math:`\sum_i \ell_i`. Jacobian rows take one
    backward pass a sample. In none of the three does a row depend on sample i alone.
    Where SyncBatchNorm runs in several processes, the batch is that of all of them and
    the sum is over the losses of all of them; Jacobian rows are refused there.

    The formula is that of torch's tutorial on per-sample gradients
    (https://pytorch.org/tutorials/intermediate/per_sample_grads.html). The rows are
    not clipped, and clipping them is not differentially private by itself. It writes
    nothing on the model, ``.grad`` included.
    """
    _check_rows(rows, mode)
    options = checked(
        Options(mode, num_groups, update_running_stats, sync_levels, rows, fast)
    )
    net = unwrapped(model)
    values = _chosen(net, params)
    places = _places(net, values)
    size = _batch_size(batch)
    if size == 0:  # made-up samples, whose rows are thrown away
        _check_one_process(net, mode)
        options = replace(options, update_running_stats=False)
        batch = tree_map(lambda t: t.new_zeros(2, *t.shape[1:]), batch)

    def loss(values: Mapping[str, Tensor], inputs: Any, *rest: Any) -> Any:
        inputs, rest = tree_map(lambda t: t.unsqueeze(0), (inputs, rest))
        args, kwargs = _as_call(inputs)
        placed = {place: values[name] for place, name in places}
        output = functional_call(net, placed, args, kwargs, tie_weights=False)
        result = loss_fn(output, *rest)
        if not has_aux:
            return _scalar(result)
        value, aux = result
        return _scalar(value), tree_map(lambda t: without_batch_dim(_CALLED, t), aux)

    in_dims = (None, *[0 for _ in batch])
    with Block((model,), options):
        if rows == "jacobian":
            losses = vmap(loss, in_dims, randomness=randomness)
            derive = jacrev(losses, has_aux=has_aux)
            parts = [derive(values, *chunk) for chunk in _chunks(batch, chunk_size)]
            found = tree_map(lambda *chunks: torch.cat(chunks), *parts)
        else:
            found = vmap(
                grad(loss, has_aux=has_aux),
                in_dims,
                randomness=randomness,
                chunk_size=chunk_size,
            )(values, *batch)
    return tree_map(lambda t: t[:0], found) if size == 0 else found


ROWS = ("contribution", "jacobian", "detached")
_CALLED = "per_sample_grads(...)"


def _check_rows(rows: str, mode: str) -> None:
    if rows not in ROWS:
        listed = ", ".join(f'"{r}"' for r in ROWS)
        raise ValueError(f"{_CALLED}: unknown rows {rows!r}. Choose one of {listed}.")
    if rows != "contribution" and mode != "sync":
        raise ValueError(
            worded(
                _CALLED,
                f'rows="{rows}" has a meaning in "sync" only, and mode is "{mode}", '
                "where samples are independent and all rows are the same",
                "Leave rows out",
            )
        )


def _check_one_process(net: nn.Module, mode: str) -> None:
    if mode == "sync" and any([process_group(m) is not None for m in net.modules()]):
        raise ValueError(
            worded(
                _CALLED,
                "an empty batch in one of several processes, whose SyncBatchNorm "
                "statistics are taken together",
                "Give every process at least one sample",
            )
        )


def _chunks(batch: Any, chunk_size: int | None) -> list[Any]:
    if chunk_size is None:
        return [batch]
    size = _batch_size(batch)
    return [
        tree_map(lambda t: t[start : start + chunk_size], batch)
        for start in range(0, size, chunk_size)
    ]


def _chosen(
    net: nn.Module, params: Collection[str] | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors to differentiate by, by name; tied ones once."""
    named = dict(net.named_parameters())
    if params is None:
        chosen = {n: p.detach() for n, p in named.items() if p.requires_grad}
        if not chosen:
            raise ValueError(
                worded(
                    _CALLED,
                    f"no parameter of {type(net).__name__} requires a gradient",
                    "Unfreeze some, or name the ones you want with params=",
                )
            )
        return chosen
    known = dict(net.named_parameters(remove_duplicate=False))
    names = list(params)
    if isinstance(params, str):
        names = [params]
    for name in names:
        if name not in known:
            raise ValueError(
                worded(
                    _CALLED,
                    f"{type(net).__name__} has no parameter {name!r}",
                    "Names are those of model.named_parameters()",
                )
            )
    if isinstance(params, Mapping):
        return {name: params[name] for name in names}  # outer derivatives pass through
    return {name: known[name].detach() for name in names}


def _places(net: nn.Module, values: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Every place of the parameters in ``values``, once, with the name given.

    Left to tie weights, functional_call (torch 2.13) leaves plain tensors in the place
    of parameters behind in a module that has two names.
    """
    known = dict(net.named_parameters(remove_duplicate=False))
    given = {known[name]: name for name in values}
    return [
        (f"{path}.{name}".lstrip("."), given[parameter])
        for path, module in net.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in given
    ]


def _batch_size(batch: tuple[Any, ...]) -> int:
    """The first dimension of every tensor of the batch, which must agree."""
    shapes = []
    for i, part in enumerate(batch):
        leaves, _ = tree_flatten(part)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                raise ValueError(
                    worded(
                        _CALLED,
                        f"batch[{i}] holds {leaf!r}, which has no batch dimension",
                        "Pass tensors (B, ...); what all samples share belongs into "
                        "loss_fn",
                    )
                )
            shapes.append((i, tuple(leaf.shape)))
    if not shapes:
        raise ValueError(
            worded(_CALLED, "got no batch", "Pass the inputs, then the targets")
        )
    if len({shape[0] for _, shape in shapes}) > 1:
        found = ", ".join(f"batch[{i}] has shape {shape}" for i, shape in shapes)
        raise ValueError(
            worded(
                _CALLED,
                f"batch sizes disagree: {found}",
                "The first dimension is the batch, and each has one row a sample",
            )
        )
    return int(shapes[0][1][0])


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            worded(
                _CALLED,
                f"loss_fn gave {found} for a batch of one instead of a tensor without "
                "dimensions",
                'Let it return the mean or the sum, e.g. reduction="sum"',
            )
        )
    return loss
