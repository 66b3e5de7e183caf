"""What users call for per-sample gradients: rows, norms, clipped sums, sketches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from torch import Tensor, nn

from vmapsafe import quantities as q
from vmapsafe._block.loop import Fallback
from vmapsafe._draws import Randomness
from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, a_kind, shown
from vmapsafe._modes import Also, ModeName, NumGroups, RowsName, check_flag
from vmapsafe._rows.chunks import ChunkSize
from vmapsafe._rows.compute import Asked, BlockOptions
from vmapsafe._rows.parameters import Params
from vmapsafe._rows.samples import Loss
from vmapsafe._rows.turns import in_turn
from vmapsafe.quantities.sketch import Kind, check_sketch
from vmapsafe.quantities.sums import check_max_grad_norm

A = TypeVar("A")
T = TypeVar("T")


class _Options(TypedDict, total=False):
    """What all functions here take, for type checkers."""

    mode: ModeName
    rows: RowsName
    params: Params
    chunk_size: ChunkSize
    randomness: Randomness
    keep_batch_dim: bool
    fallback: Fallback
    num_groups: NumGroups
    update_running_stats: bool
    sync_levels: int | None
    also: Also
    fast: bool


@overload
def per_sample(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    want: q.Quantity[T],
    has_aux: Literal[False] = False,
    **options: Unpack[_Options],
) -> T: ...


@overload
def per_sample(
    model: nn.Module,
    loss_fn: Callable[..., tuple[Tensor, A]],
    *batch: Any,
    want: q.Quantity[T],
    has_aux: Literal[True],
    **options: Unpack[_Options],
) -> tuple[T, A]: ...


@overload
def per_sample(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    want: Mapping[str, q.Quantity[Any]],
    has_aux: Literal[False] = False,
    **options: Unpack[_Options],
) -> dict[str, Any]: ...


@overload
def per_sample(
    model: nn.Module,
    loss_fn: Callable[..., tuple[Tensor, A]],
    *batch: Any,
    want: Mapping[str, q.Quantity[Any]],
    has_aux: Literal[True],
    **options: Unpack[_Options],
) -> tuple[dict[str, Any], A]: ...


@in_turn
def per_sample(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    want: q.Quantity[Any] | Mapping[str, q.Quantity[Any]],
    mode: ModeName = "eval",
    rows: RowsName = "contribution",
    params: Params = None,
    chunk_size: ChunkSize = None,
    randomness: Randomness = "error",
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    fallback: Fallback = "error",
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: Also = (),
    fast: bool = True,
) -> Any:
    r"""Any quantity of the samples' gradients, from one forward and one backward pass.

    The gradients are the rows of :func:`per_sample_grads`. Of the quantities only
    ``Rows`` makes all of them. With ``chunk_size`` some quantities run the chunks more
    than once, and say so.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    >>> _ = model(torch.randn(16, 4))
    >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> want = {"losses": q.Losses(), "norms": q.Norms(), "sum": q.Sum()}
    >>> found = per_sample(model, F.cross_entropy, x, y, want=want)
    >>> found["norms"].shape, found["sum"]["0.weight"].shape
    (torch.Size([5]), torch.Size([8, 4]))
    >>> per_sample(model, F.cross_entropy, x, y, want=q.Gram()).shape
    torch.Size([5, 5])

    Args:
        model: a network that takes batches. The call opens the block itself.
        loss_fn: of the model's output on a batch of one, and of the rest of the batch;
            returns a tensor of one number, or ``(loss, aux)`` with ``has_aux``.
        *batch: the inputs, then what ``loss_fn`` takes after the output: trees of
            tensors (B, ...). Inputs that are a tuple are positional arguments of the
            model, a dict is its keyword arguments.
        want: a quantity of ``vmapsafe.quantities``, or a dict of some.
        mode: "eval", "no_running_stats", "group_norm" or "sync", as in ``vmap_safe``,
            whose block the call enters.
        rows: in "sync", what the gradient of a sample is: "contribution", "jacobian" or
            "detached", see :func:`per_sample_grads`.
        params: names of parameters, a dict of tensors by name, or a whole state dict,
            of a checkpoint say, whose buffers count too.
        chunk_size: samples at a time; None for all, "auto" for what fits the memory.
        randomness: "error", "different" or "same", as in vmap.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        keep_batch_dim: True: the model sees each sample as a batch of one. False: it
            sees x[i] as it is. x[i] may then be a batch, such as the 8 images of user i
            with x (users, 8, C, H, W), and there is one gradient for each user. aux is
            taken as it is.
        fallback: what to do where vmap refuses the model or the loss, as it does if
            they call ``.item()``, decide by the numbers of a tensor, take a boolean
            mask, call an autograd.Function that has not a rule for vmap, or pack
            sequences. "error" raises vmap's error. "loop" runs sample by sample with
            plain autograd, with the same results, and warns once. Other errors are
            raised: those of the code itself, about shapes, or for a draw with
            ``randomness="error"``. In "sync" a loop is refused.
        num_groups: in "group_norm", the number of groups, or a function of the number
            of channels.
        update_running_stats: in "sync", whether the running statistics are updated.
        sync_levels: in "sync", how many batch dimensions to merge: 1 for the samples,
            more for vmaps around the call; None for all.
        also: in "eval", classes of hand-made layers to put in eval mode too.
        fast: whether faster batching rules may take the place of torch's own.

    Returns:
        The value of the quantity, or a dict of the values. With ``has_aux`` a pair:
        that, and aux with the leading 1 of its tensors replaced by B.

    Raises:
        VmapSafeTypeError: as :func:`per_sample_grads`; ``want`` holds something else.
        VmapSafeValueError: as :func:`per_sample_grads`; a quantity does not fit the
            parameters or the batch; ``keep_batch_dim=False`` with other ``rows``;
            ``fallback="loop"`` in "sync".
        VmapSafeRuntimeError: a quantity of all processes without a process group;
            another process failed; the loss cannot be followed, and a second forward
            would update the running statistics twice; before a loop, the code has
            written on the batch; in a loop, it draws random numbers with
            ``randomness="error"``.

    Warns:
        FallbackWarning: vmap refuses the code, and the samples run one after another.

    A parameter takes little or no memory if one linear layer, convolution, embedding,
    or batch, group, layer or RMS norm uses it, once. A parameter that is used otherwise
    (twice, tied, or by another operation) takes the memory of its rows. A loss that
    only ``vmap(grad)`` can follow takes the memory of all rows, of one chunk at a time.

    A model that calls torch.utils.checkpoint, of either kind, runs sample by sample
    with plain autograd, without a warning. That takes less memory than a training step
    with checkpoints, and a few times as long; a small ``chunk_size`` without
    checkpoints is faster. In "sync" it is an error.

    A loop begins with the buffers of modules in ``loss_fn`` as they were before vmap
    refused the code, and, with ``fallback="loop"``, with the random state of then. What
    else the code had changed stays. For quantities of pairs, and those that look twice,
    it takes the memory of all rows, of one chunk at a time. While torch.compile traces
    there is not a loop.

    Only ``Rows`` carries derivatives for plain autograd. Under transforms of torch.func
    all do. Clipping is not differentially private by itself. The algorithm is the
    book-keeping of Bu et al., https://arxiv.org/abs/2210.00038, with vmap in the place
    of hooks; the formulas of layers are in ``vmapsafe/rules/``.
    """
    block = BlockOptions(
        mode, rows, num_groups, update_running_stats, sync_levels, also, fast
    )
    asked = Asked(
        _PER_SAMPLE,
        model,
        loss_fn,
        batch,
        params,
        chunk_size,
        randomness,
        has_aux,
        keep_batch_dim,
        fallback,
        block,
    )
    _check_want(want)
    if isinstance(want, q.Quantity):
        return asked.one(lambda: want, *want.across())
    return asked.all(want)


def _check_want(want: object) -> None:
    """Raise unless it is a quantity, or a dict of some."""
    several = isinstance(want, Mapping)
    for key, one in want.items() if isinstance(want, Mapping) else [("", want)]:
        if isinstance(one, q.Quantity):
            continue
        what = f"want[{key!r}]" if several else "want"
        found = f"{what} is {shown(one)}, {a_kind(one)}"
        do = "Pass an object of vmapsafe.quantities, such as Norms(), or a dict of some"
        if isinstance(one, type) and issubclass(one, q.Quantity):
            found = f"{what} is the class {one.__name__}"
            do = f"Write {one.__name__}(...), with parentheses"
        raise VmapSafeTypeError(_PER_SAMPLE, found, do)
    if several and not want:
        raise VmapSafeValueError(
            _PER_SAMPLE, "want is empty", 'Name at least one, {"norms": Norms()}'
        )


_PER_SAMPLE = "per_sample(...)"


@overload
def per_sample_grads(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    out: Mapping[str, Tensor] | None = None,
    has_aux: Literal[False] = False,
    **options: Unpack[_Options],
) -> dict[str, Tensor]: ...


@overload
def per_sample_grads(
    model: nn.Module,
    loss_fn: Callable[..., tuple[Tensor, A]],
    *batch: Any,
    out: Mapping[str, Tensor] | None = None,
    has_aux: Literal[True],
    **options: Unpack[_Options],
) -> tuple[dict[str, Tensor], A]: ...


@in_turn
def per_sample_grads(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    mode: ModeName = "eval",
    rows: RowsName = "contribution",
    params: Params = None,
    chunk_size: ChunkSize = None,
    randomness: Randomness = "error",
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    fallback: Fallback = "error",
    out: Mapping[str, Tensor] | None = None,
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: Also = (),
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
        model: a network that takes batches. The call opens the block itself.
        loss_fn: of the model's output on a batch of one, and of the rest of the batch;
            returns a tensor of one number, or ``(loss, aux)`` with ``has_aux``.
        *batch: the inputs, then what ``loss_fn`` takes after the output: trees of
            tensors (B, ...). Inputs that are a tuple are positional arguments of the
            model, a dict is its keyword arguments.
        mode: "eval", "no_running_stats", "group_norm" or "sync", as in ``vmap_safe``,
            whose block the call enters.
        rows: in "sync", where samples share their statistics, what a row is; see below.
        params: the names to differentiate by, or a dict of tensors by name, at whose
            values the gradients are taken and through which outer derivatives pass. The
            call gives rows of exactly these, frozen ones too; by default of every
            parameter that requires a gradient. A tied parameter appears once. Names may
            begin with "module.", as in a wrapper. A dict with all keys of
            ``model.state_dict()`` replaces buffers and frozen parameters too.
        chunk_size: samples at a time, as in ``torch.func.vmap``; None for all; "auto"
            for what fits into half of the free memory, found by trying. In "sync" each
            chunk is a batch with statistics of its own, and "auto" is refused.
        randomness: of dropout and the like: "error"; "different", a draw for each
            sample, the same for the same seed and ``chunk_size``; "same", one draw for
            all samples, whatever the chunks.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        keep_batch_dim: False if a slice x[i] is a batch of its own, as in
            :func:`per_sample`.
        fallback: "error", or "loop" for one sample after another where vmap refuses the
            code, as in :func:`per_sample`.
        out: a dict such as an earlier call returned, to be filled and returned, as in
            ``rows = per_sample_grads(..., out=rows)``. In small networks fresh memory
            takes most of the time. The earlier rows are overwritten, also by a call
            that raises half-way.
        num_groups: in "group_norm", the number of groups, or a function of the number
            of channels.
        update_running_stats: in "sync", whether the running statistics are updated.
        sync_levels: in "sync", how many batch dimensions to merge: 1 for the samples,
            more for vmaps around the call; None for all.
        also: in "eval", classes of hand-made layers to put in eval mode too.
        fast: False for torch's own batching rules and, without ``out``, for
            ``vmap(grad)`` in the place of one recorded pass.

    Returns:
        A dict from parameter names to tensors (B, *parameter.shape), in the dtype of
        the parameter. With ``has_aux`` a pair: that, and aux with the leading 1 of its
        tensors replaced by B.

    Raises:
        VmapSafeTypeError: ``model`` is not a module, or ``loss_fn`` is not callable.
        VmapSafeValueError: batch sizes disagree; the loss has dimensions; a parameter
            does not exist, is named twice or none requires a gradient; ``out`` has
            other names, shapes, dtypes or devices, or tensors that share memory.

    A loss that does not depend on a parameter has rows of zeros, as in torch.func.grad.
    One backward pass gives the rows, layer by layer (``vmapsafe/_rows/record.py``).
    ``vmap(grad)`` gives them where somebody could want their derivatives: under
    transforms, and where the batch, a parameter that is not chosen, or a tensor that
    the loss uses requires a gradient. It also gives them with ``fast=False`` or
    ``update_running_stats=True``, and where the loss itself calls autograd. Rows in
    ``out`` carry no derivatives.

    In "eval", "no_running_stats" and "group_norm" samples are independent, and there is
    one gradient of sample i. In "sync" there are three definitions. With
    :math:`\theta^{(i)}` sample i's own copy of the parameters, and all statistics those
    of the batch:

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
    backward pass for each sample. In all three a row depends on other samples too.
    Where SyncBatchNorm runs in several processes, the batch is that of all of them and
    the sum is over the losses of all of them; Jacobian rows are refused there.

    The formula is that of torch's tutorial on per-sample gradients
    (https://pytorch.org/tutorials/intermediate/per_sample_grads.html). The rows are
    not clipped (:func:`clipped_grad_sum` does that, :func:`per_sample_grad_norms` gives
    their norms), and clipping them is not differentially private by itself. The call
    writes nothing on the model, ``.grad`` included.
    """
    block = BlockOptions(
        mode, rows, num_groups, update_running_stats, sync_levels, also, fast
    )
    asked = Asked(
        _GRADS,
        model,
        loss_fn,
        batch,
        params,
        chunk_size,
        randomness,
        has_aux,
        keep_batch_dim,
        fallback,
        block,
    )
    return asked.one(lambda: q.Rows(out))


_GRADS = "per_sample_grads(...)"


@overload
def per_sample_grad_norms(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    per_parameter: Literal[False] = False,
    gather: Literal["all"] | None = None,
    has_aux: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def per_sample_grad_norms(
    model: nn.Module,
    loss_fn: Callable[..., tuple[Tensor, A]],
    *batch: Any,
    per_parameter: Literal[False] = False,
    gather: Literal["all"] | None = None,
    has_aux: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, A]: ...


@overload
def per_sample_grad_norms(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    per_parameter: Literal[True],
    gather: Literal["all"] | None = None,
    has_aux: Literal[False] = False,
    **options: Unpack[_Options],
) -> dict[str, Tensor]: ...


@overload
def per_sample_grad_norms(
    model: nn.Module,
    loss_fn: Callable[..., tuple[Tensor, A]],
    *batch: Any,
    per_parameter: Literal[True],
    gather: Literal["all"] | None = None,
    has_aux: Literal[True],
    **options: Unpack[_Options],
) -> tuple[dict[str, Tensor], A]: ...


@in_turn
def per_sample_grad_norms(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    per_parameter: bool = False,
    gather: Literal["all"] | None = None,
    mode: ModeName = "eval",
    rows: RowsName = "contribution",
    params: Params = None,
    chunk_size: ChunkSize = None,
    randomness: Randomness = "error",
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    fallback: Fallback = "error",
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: Also = (),
    fast: bool = True,
) -> Any:
    """The Euclidean norm of every row of :func:`per_sample_grads`.

    One forward and one backward pass for the activations give them. The rows themselves
    are not made, or only a few at a time.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from torch import nn
    >>> from vmapsafe import per_sample_grad_norms
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    >>> _ = model(torch.randn(16, 4))
    >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> per_sample_grad_norms(model, F.cross_entropy, x, y).shape
    torch.Size([5])
    >>> names = {"per_parameter": True, "params": ["0.weight", "2.bias"]}
    >>> by_name = per_sample_grad_norms(model, F.cross_entropy, x, y, **names)
    >>> {name: tuple(norms.shape) for name, norms in by_name.items()}
    {'0.weight': (5,), '2.bias': (5,)}

    Args:
        model: a network that takes batches. The call opens the block itself.
        loss_fn: of the model's output on a batch of one, and of the rest of the batch.
        *batch: the inputs, then what ``loss_fn`` takes after the output: trees of
            tensors (B, ...).
        per_parameter: whether to give a norm for each parameter, and not one of all.
        gather: "all" gives the norms of all processes of torch.distributed's default
            group, those of rank 0 first; their batches may differ in size. Every
            process has to make the call; if one fails, all raise.
        mode: "eval", "no_running_stats", "group_norm" or "sync", as in ``vmap_safe``.
        rows: in "sync", what a row is: "contribution", "jacobian" or "detached".
        params: names of parameters, a dict of tensors by name, or a whole state dict.
        chunk_size: samples at a time; None for all, "auto" for what fits the memory.
        randomness: "error", "different" or "same", as in vmap.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        keep_batch_dim: False if a slice x[i] is a batch of its own, as in
            :func:`per_sample`.
        fallback: "error", or "loop" for one sample after another where vmap refuses the
            code, as in :func:`per_sample`.
        num_groups: in "group_norm", the number of groups, or a function of the number
            of channels.
        update_running_stats: in "sync", whether the running statistics are updated.
        sync_levels: in "sync", how many batch dimensions to merge: 1 for the samples,
            more for vmaps around the call; None for all.
        also: in "eval", classes of hand-made layers to put in eval mode too.
        fast: whether faster batching rules may take the place of torch's own.

    Returns:
        (B,), or with ``per_parameter`` a dict from parameter names to (B,), in the
        dtype of the parameters, and in float32 for those in half precision. With
        ``has_aux`` a pair: that, and aux of this process.

    Raises:
        VmapSafeTypeError: as :func:`per_sample_grads`.
        VmapSafeValueError: as :func:`per_sample_grads`; an unknown ``gather``.
        VmapSafeRuntimeError: ``gather`` without a process group; another process
            failed; the loss cannot be followed, and a second forward would update the
            running statistics twice.

    A parameter takes little or no memory for its rows if one linear layer, convolution,
    embedding, or batch, group, layer or RMS norm uses it, once. A parameter that is
    used otherwise (twice, tied, or by another operation) takes the memory of its rows;
    its norm is that of their sum, cross terms included. The formulas, with their
    sources, are in ``vmapsafe/rules/``. The result carries no derivatives, except under
    transforms of torch.func. A sample with NaN has the norm NaN, and the others have
    theirs.
    """
    block = BlockOptions(
        mode, rows, num_groups, update_running_stats, sync_levels, also, fast
    )
    asked = Asked(
        _NORMS,
        model,
        loss_fn,
        batch,
        params,
        chunk_size,
        randomness,
        has_aux,
        keep_batch_dim,
        fallback,
        block,
    )

    def norms() -> q.Norms[Any]:
        check_flag(_NORMS, "per_parameter", per_parameter)
        return q.Norms(per_parameter, gather=gather)

    return asked.one(norms, "gather", gather)


_NORMS = "per_sample_grad_norms(...)"


@overload
def clipped_grad_sum(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    max_grad_norm: float | Mapping[str, float],
    reduce: Literal["all"] | None = None,
    has_aux: Literal[False] = False,
    **options: Unpack[_Options],
) -> dict[str, Tensor]: ...


@overload
def clipped_grad_sum(
    model: nn.Module,
    loss_fn: Callable[..., tuple[Tensor, A]],
    *batch: Any,
    max_grad_norm: float | Mapping[str, float],
    reduce: Literal["all"] | None = None,
    has_aux: Literal[True],
    **options: Unpack[_Options],
) -> tuple[dict[str, Tensor], A]: ...


@in_turn
def clipped_grad_sum(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    max_grad_norm: float | Mapping[str, float],
    reduce: Literal["all"] | None = None,
    mode: ModeName = "eval",
    rows: RowsName = "contribution",
    params: Params = None,
    chunk_size: ChunkSize = None,
    randomness: Randomness = "error",
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    fallback: Fallback = "error",
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: Also = (),
    fast: bool = True,
) -> Any:
    r"""The sum of the rows of :func:`per_sample_grads`, each clipped to a norm.

    With :math:`g_i` row i over all parameters,

    .. math:: \sum_i g_i \min(1, c / \|g_i\|), \quad c = \text{max\_grad\_norm}

    (Abadi et al., https://arxiv.org/abs/1607.00133, algorithm 1, without its noise).
    The factor of a row that is 0 is 1. Opacus adds 1e-6 to the norm; nothing is added
    here.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from torch import nn
    >>> from vmapsafe import clipped_grad_sum
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    >>> _ = model(torch.randn(16, 4))
    >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> total = clipped_grad_sum(model, F.cross_entropy, x, y, max_grad_norm=1.0)
    >>> total["0.weight"].shape
    torch.Size([8, 4])

    Args:
        model: a network that takes batches. The call opens the block itself.
        loss_fn: of the model's output on a batch of one, and of the rest of the batch.
        *batch: the inputs, then what ``loss_fn`` takes after the output: trees of
            tensors (B, ...).
        max_grad_norm: the largest norm that a row keeps, above 0; or a dict of norms
            for groups of parameters, as in :class:`vmapsafe.quantities.ClippedSum`.
        reduce: "all" adds up the sums of all processes of torch.distributed's default
            group, each with its own samples. Every process has to make the call, with
            a model of the same parameters; if one fails, all raise.
        mode: "eval", "no_running_stats", "group_norm" or "sync", as in ``vmap_safe``.
        rows: in "sync", what a row is: "contribution", "jacobian" or "detached".
        params: names of parameters, a dict of tensors by name, or a whole state dict.
        chunk_size: samples at a time; None for all, "auto" for what fits the memory.
        randomness: "error", "different" or "same", as in vmap.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        keep_batch_dim: False if a slice x[i] is a batch of its own, as in
            :func:`per_sample`.
        fallback: "error", or "loop" for one sample after another where vmap refuses the
            code, as in :func:`per_sample`.
        num_groups: in "group_norm", the number of groups, or a function of the number
            of channels.
        update_running_stats: in "sync", whether the running statistics are updated.
        sync_levels: in "sync", how many batch dimensions to merge: 1 for the samples,
            more for vmaps around the call; None for all.
        also: in "eval", classes of hand-made layers to put in eval mode too.
        fast: whether faster batching rules may take the place of torch's own.

    Returns:
        A dict from parameter names to tensors of the parameters' shape and dtype. With
        ``has_aux`` a pair: that, and aux of this process.

    Raises:
        VmapSafeTypeError: as :func:`per_sample_grads`; ``max_grad_norm`` is not a
            number.
        VmapSafeValueError: as :func:`per_sample_grads`; ``max_grad_norm`` is not above
            0; an unknown ``reduce``.
        VmapSafeRuntimeError: ``reduce`` without a process group; another process
            failed; the loss cannot be followed, and a second forward would update the
            running statistics twice.

    Warns:
        UserWarning: in "sync", where clipping a row does not bound what a sample does.

    A row with NaN, or with a norm that is not finite, makes the whole sum NaN: it is
    not left out in silence. Chunks change nothing but in "sync". The result carries no
    derivatives, except under transforms of torch.func.

    It is not differentially private by itself: it adds no noise, and draws no batch at
    random. Such a scheme cannot use it where a row depends on more than its sample: in
    "sync", and in "eval" unless the running statistics come from public data.
    """
    block = BlockOptions(
        mode, rows, num_groups, update_running_stats, sync_levels, also, fast
    )
    asked = Asked(
        _CLIPPED,
        model,
        loss_fn,
        batch,
        params,
        chunk_size,
        randomness,
        has_aux,
        keep_batch_dim,
        fallback,
        block,
    )

    def clipped_sum() -> q.ClippedSum:
        check_max_grad_norm(_CLIPPED, max_grad_norm)
        return q.ClippedSum(max_grad_norm, reduce=reduce)

    return asked.one(clipped_sum, "reduce", reduce)


_CLIPPED = "clipped_grad_sum(...)"


@overload
def per_sample_sketch(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    k: int,
    kind: Kind = "rademacher",
    seed: int = 0,
    gather: Literal["all"] | None = None,
    has_aux: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def per_sample_sketch(
    model: nn.Module,
    loss_fn: Callable[..., tuple[Tensor, A]],
    *batch: Any,
    k: int,
    kind: Kind = "rademacher",
    seed: int = 0,
    gather: Literal["all"] | None = None,
    has_aux: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, A]: ...


@in_turn
def per_sample_sketch(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    k: int,
    kind: Kind = "rademacher",
    seed: int = 0,
    gather: Literal["all"] | None = None,
    mode: ModeName = "eval",
    rows: RowsName = "contribution",
    params: Params = None,
    chunk_size: ChunkSize = None,
    randomness: Randomness = "error",
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    fallback: Fallback = "error",
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: Also = (),
    fast: bool = True,
) -> Any:
    r"""A random projection of every row of :func:`per_sample_grads` to k numbers.

    With G (B, P) the rows, all parameters side by side, it is :math:`G R / \sqrt k`
    with a random matrix R, and products of sketches estimate products of rows:

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from torch import nn
    >>> from vmapsafe import per_sample_grad_norms, per_sample_sketch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    >>> _ = model(torch.randn(16, 4))
    >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> sketch = per_sample_sketch(model, F.cross_entropy, x, y, k=4096)
    >>> sketch.shape
    torch.Size([5, 4096])
    >>> norms = per_sample_grad_norms(model, F.cross_entropy, x, y)
    >>> torch.allclose(sketch.norm(dim=1), norms, rtol=0.05)
    True

    Args:
        model: a network that takes batches. The call opens the block itself.
        loss_fn: of the model's output on a batch of one, and of the rest of the batch.
        *batch: the inputs, then what ``loss_fn`` takes after the output: trees of
            tensors (B, ...).
        k: how many numbers to give for each sample.
        kind: what the matrix is: "rademacher", of signs; "gaussian", of normal numbers;
            "kronecker", for each weight a Kronecker product of two matrices of signs,
            with which no rows of linear layers and convolutions are made.
        seed: an int that decides the matrix.
        gather: "all" gives the sketches of all processes of torch.distributed's default
            group, those of rank 0 first; their batches may differ in size. Every
            process has to make the call; if one fails, all raise.
        mode: "eval", "no_running_stats", "group_norm" or "sync", as in ``vmap_safe``.
        rows: in "sync", what a row is: "contribution", "jacobian" or "detached".
        params: names of parameters, a dict of tensors by name, or a whole state dict.
        chunk_size: samples at a time; None for all, "auto" for what fits the memory.
        randomness: "error", "different" or "same", as in vmap.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        keep_batch_dim: False if a slice x[i] is a batch of its own, as in
            :func:`per_sample`.
        fallback: "error", or "loop" for one sample after another where vmap refuses the
            code, as in :func:`per_sample`.
        num_groups: in "group_norm", the number of groups, or a function of the number
            of channels.
        update_running_stats: in "sync", whether the running statistics are updated.
        sync_levels: in "sync", how many batch dimensions to merge: 1 for the samples,
            more for vmaps around the call; None for all.
        also: in "eval", classes of hand-made layers to put in eval mode too.
        fast: whether faster batching rules may take the place of torch's own.

    Returns:
        (B, k), in the dtype of the parameters, and in float32 for those in half
        precision. With ``has_aux`` a pair: that, and aux of this process.

    Raises:
        VmapSafeTypeError: as :func:`per_sample_grads`.
        VmapSafeValueError: as :func:`per_sample_grads`; ``k`` below 1; an unknown
            ``kind`` or ``gather``; a ``seed`` that is not an int.
        VmapSafeRuntimeError: ``gather`` without a process group; another process
            failed; the loss cannot be followed, and a second forward would update the
            running statistics twice.

    The matrix depends on ``seed``, ``kind``, ``k`` and the names and shapes of the
    parameters alone. So sketches of other batches, chunks and devices, and of other
    models with these names, can be compared, and the sketch by two sets of parameters
    is the sum of the sketches by each. A hash, computed on the device, gives the
    numbers: signs are the same on every device and in every version of torch, normal
    numbers may differ in the last place. The part of a parameter of n numbers is

    .. code-block:: python

        def words(part, lines, each):  # (lines, each), of 64 bits, by numpy
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            key = np.frombuffer(digest, "<u8")[part]
            counter = np.arange(lines * each, dtype=np.uint64)
            word = key + counter * np.uint64(0x9E3779B97F4A7C15)
            word ^= word >> np.uint64(32)
            for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
                word *= np.uint64(factor)
                word ^= word >> np.uint64(32)
            return word.reshape(lines, each)

        def signs(part, lines, k):  # a bit a sign, the lowest first
            found = words(part, lines, -(-k // 64)).astype("<u8").view(np.uint8)
            return 1.0 - 2 * np.unpackbits(found, axis=1, bitorder="little")[:, :k]

        R = signs(0, n, k)  # kind="rademacher"

        # kind="gaussian": 16 bits a number, the lowest first
        table = torch.erfinv(torch.arange(1 - 2**16, 2**16, 2).double() / 2**16)
        table = (table / table.square().mean().sqrt()).numpy()
        R = table[words(0, n, -(-k // 4)).astype("<u8").view("<u2")[:, :k]]

        # kind="kronecker", of a parameter of shape (first, *rest)
        left = max(i for i in range(1, math.isqrt(k) + 1) if k % i == 0)
        R = np.kron(signs(1, first, left), signs(2, math.prod(rest), k // left))

    where "kronecker" has parameters of fewer than two dimensions as "rademacher" has
    them. :class:`vmapsafe.quantities.Sketch` gives its formula and source, and gives
    sketches by each parameter too.

    "rademacher" and "gaussian" take the memory of the rows by one parameter of 64
    samples where the layer allows it (:func:`per_sample_grad_norms` says where), and
    that of a block of the matrix, which has up to twice as many numbers as these rows,
    and 2^27 at most. Each chunk draws the matrix again. "kronecker" takes little memory
    and less time than the gradient of the summed loss, in ResNet-18 on a CPU. The
    result carries no derivatives, except under transforms of torch.func.
    """
    block = BlockOptions(
        mode, rows, num_groups, update_running_stats, sync_levels, also, fast
    )
    asked = Asked(
        _SKETCH,
        model,
        loss_fn,
        batch,
        params,
        chunk_size,
        randomness,
        has_aux,
        keep_batch_dim,
        fallback,
        block,
    )

    def sketch() -> q.Sketch:
        check_sketch(_SKETCH, k, kind, seed)
        return q.Sketch(k=k, kind=kind, seed=seed, gather=gather)

    return asked.one(sketch, "gather", gather)


_SKETCH = "per_sample_sketch(...)"
