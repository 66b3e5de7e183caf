"""Per-sample gradients in one call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vmapsafe._draws import Draws
from vmapsafe._errors import VmapSafeValueError, a_kind
from vmapsafe._modes import NumGroups, Options
from vmapsafe._rows.chunks import ChunkSize, check_chunk_size, joined
from vmapsafe._rows.formulas import Formula, Memory
from vmapsafe._rows.record import Unrecordable
from vmapsafe._rows.samples import Loss, Samples, part_of
from vmapsafe._rows.turns import in_turn
from vmapsafe._torch import current_level, dispatch_modes_are_on, tree_map


@in_turn
def per_sample_grads(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    mode: str = "eval",
    rows: str = "contribution",
    params: Collection[str] | Mapping[str, Tensor] | None = None,
    chunk_size: int | str | None = None,
    randomness: str = "error",
    has_aux: bool = False,
    out: Mapping[str, Tensor] | None = None,
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: tuple[type[nn.Module], ...] = (),
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
            returns a tensor of one number, or ``(loss, aux)`` with ``has_aux``.
        *batch: the inputs, then what ``loss_fn`` takes after the output; trees of
            tensors (B, ...). A tuple as the inputs is positional arguments of the
            model, a dict its keyword arguments.
        mode: of :func:`vmap_safe`, whose block is entered for this call.
        rows: in "sync", where samples share their statistics, what a row is; see below.
        params: the names to differentiate by, or a dict from names to the tensors at
            which to, through which outer derivatives pass: exactly those, frozen ones
            too; default every parameter that requires a gradient. Tied parameters
            appear once. Names may begin with "module.", as in a wrapper.
        chunk_size: samples at a time, as in ``torch.func.vmap``; None for all; "auto"
            for what fits into half of the free memory, found by trying. In "sync"
            each chunk is a batch with statistics of its own, and "auto" is refused.
        randomness: of dropout and the like: "error"; "different", a draw a sample,
            which a seed decides for a given int as ``chunk_size``; or "same", one draw
            for all samples, whatever the chunks.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        out: a dict such as an earlier call returned, to be filled and returned, as in
            ``rows = per_sample_grads(..., out=rows)``: fresh memory is what takes
            most of the time in small networks. The earlier rows are overwritten,
            also by a call that raises half-way.
        num_groups: of :func:`vmap_safe`.
        update_running_stats: of :func:`vmap_safe`.
        sync_levels: of :func:`vmap_safe`.
        also: of :func:`vmap_safe`.
        fast: of :func:`vmap_safe`; False for ``vmap(grad)`` and nothing else.

    Returns:
        A dict from parameter names to tensors (B, *parameter.shape), in the dtype of
        the parameter. With ``has_aux`` a pair: that, and aux with the leading 1 of its
        tensors replaced by B.

    Raises:
        TypeError: ``model`` is not a module, or ``loss_fn`` cannot be called.
        ValueError: batch sizes that disagree, a loss that has dimensions, parameters
            that do not exist, two names of one, none that requires a gradient, ``out``
            of other names, shapes, dtypes or devices, or of tensors that share memory.

    A loss that does not depend on a parameter has rows of zeros, as in torch.func.grad.
    The rows are computed layer by layer from one backward pass
    (``vmapsafe/_rows/record.py``). ``vmap(grad)`` computes them where somebody could
    want their derivatives: under transforms, and where the batch, a parameter that is
    not chosen, or a tensor the loss knows of requires a gradient. With ``out=`` they
    carry none.

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
    not clipped (:func:`clipped_grad_sum` does that, :func:`per_sample_grad_norms` gives
    their norms), and clipping them is not differentially private by itself. It writes
    nothing on the model, ``.grad`` included.
    """
    options = Options(
        called=_CALLED,
        mode=mode,
        num_groups=num_groups,
        update_running_stats=update_running_stats,
        sync_levels=sync_levels,
        also=also,
        fast=fast,
        rows=rows,
    )
    check_chunk_size(_CALLED, chunk_size, options)
    samples = Samples.of(
        _CALLED, model, loss_fn, batch, params, options, randomness, has_aux
    )
    found: tuple[Any, Any] | None
    if out is None:
        found = _quickly(samples, chunk_size) or _by_vmap(samples, chunk_size)
    else:
        _check_out(out, samples)
        found = out, _into(dict(out), samples, chunk_size)
    if samples.size == 0:
        given, aux = tree_map(lambda t: t[:0], found)
        found = (given if out is None else out), aux
    return found if has_aux else found[0]


_CALLED = "per_sample_grads(...)"


class _Fresh(dict[str, Tensor]):
    """Rows that get their memory when they are first asked for: in backward, where the
    memory of activations has become free."""

    def __init__(self, samples: Samples) -> None:
        super().__init__()
        self._samples = samples

    def __missing__(self, name: str) -> Tensor:
        value = self._samples.values[name]
        self[name] = value.new_empty(self._samples.count, *value.shape)
        return self[name]


class _Rows:
    """Collects the rows of some of the samples into given memory."""

    def __init__(self, into: dict[str, Tensor], start: int, stop: int) -> None:
        self._into = into
        self._part = slice(start, stop)

    def storage(self, name: str) -> Memory:
        return lambda: self._into[name][self._part]

    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        rows = formula.rows(x, grad, self.storage(name))
        if name in self._into:
            self.whole(name, rows)
        else:
            self._into[name] = rows

    def whole(self, name: str, rows: Tensor) -> None:
        into = self._into[name][self._part]
        if rows.data_ptr() != into.data_ptr():
            into.copy_(rows)


def _quickly(samples: Samples, chunk_size: ChunkSize) -> Any:
    """(rows, aux) that carry no derivatives, or None where some are wanted.

    That may show only when the loss has been computed.
    """
    options = samples.options
    if not options.fast or options.update_running_stats:
        return None
    if not samples.recordable() or samples.watched():
        return None
    rows = _Fresh(samples)
    if chunk_size is not None:  # "auto" is to measure what a chunk takes besides
        for name in samples.values:
            rows[name]
    draws = Draws(samples.randomness)
    try:
        aux = _into(rows, samples, chunk_size, derivatives=True)
    except Unrecordable:
        draws.put_back()
        return None
    return {name: rows[name] for name in samples.values}, aux


def _into(
    rows: dict[str, Tensor],
    samples: Samples,
    chunk_size: ChunkSize,
    derivatives: bool = False,
) -> Any:
    """Fill ``rows``; returns aux."""
    if samples.size == 0 and not derivatives:
        rows = {
            n: v.new_empty(samples.count, *v.shape) for n, v in samples.values.items()
        }
    parts: list[Any] = []

    def run(start: int, stop: int) -> None:
        into = _Rows(rows, start, stop)
        batch = part_of(samples.batch, start, stop)
        parts.append(samples.collect(batch, into, derivatives))

    samples.in_chunks(chunk_size, run)
    return joined(parts)


def _by_vmap(samples: Samples, chunk_size: ChunkSize) -> Any:
    """(rows, aux), through which outer derivatives pass."""
    return joined(samples.by_chunk(chunk_size, samples.rows))


def _check_out(out: Mapping[str, Tensor], samples: Samples) -> None:
    """Raise a ValueError unless rows can be written into ``out``."""
    if current_level() > 0:
        raise VmapSafeValueError(
            f"{_CALLED} with out=",
            "a transform of torch.func around it, whose results may not be written "
            "into given memory",
            "Leave out= out",
        )
    if set(out) != set(samples.values):
        raise VmapSafeValueError(
            f"{_CALLED} with out=",
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
            f"{_CALLED} with out=",
            f"out[{name!r}] {found}",
            f"It is to be a plain contiguous tensor {wanted}",
        )
    if not dispatch_modes_are_on():  # fake tensors lie nowhere
        _check_memory(out, samples)


def _check_memory(out: Mapping[str, Tensor], samples: Samples) -> None:
    """Raise a ValueError where rows would be written over rows or over what is read."""
    read = {
        id(tensor): tensor
        for tensors in (
            samples.leaves,
            samples.values.values(),
            samples.known.values(),
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
            _refuse_memory([*out], row, other, tensors, samples)
        if i < len(out):
            end_of_rows = max(end_of_rows, (end, i))
        end_of_all = max(end_of_all, (end, i))


def _refuse_memory(
    names: list[str], row: int, other: int, tensors: list[Tensor], samples: Samples
) -> None:
    """Raise the ValueError for two of ``tensors``, which begin with the rows."""
    if other < len(names):
        said = f"out[{names[other]!r}]"
    elif any(tensors[other] is leaf for leaf in samples.leaves):
        said = "a tensor of the batch"
    else:
        said = "a parameter or buffer"
        for name, tensor in (*samples.known.items(), *samples.net.named_buffers()):
            if tensor is tensors[other]:
                said = f"{name!r} of the model"
    raise VmapSafeValueError(
        f"{_CALLED} with out=",
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
