"""What is asked of per-sample gradients, without the tensor of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vmapsafe._errors import VmapSafeValueError, warn_user, worded
from vmapsafe._modes import NumGroups, Options
from vmapsafe._rows.chunks import check_chunk_size
from vmapsafe._rows.formulas import Formula, norms_of, weighted_sum
from vmapsafe._rows.processes import agreed, check_all_or_none, gathered, summed
from vmapsafe._rows.samples import Loss, Params, Samples
from vmapsafe._rows.turns import in_turn
from vmapsafe._torch import tree_map, without_autocast


@in_turn
def per_sample_grad_norms(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    per_parameter: bool = False,
    gather: str | None = None,
    mode: str = "eval",
    rows: str = "contribution",
    params: Params = None,
    chunk_size: int | str | None = None,
    randomness: str = "error",
    has_aux: bool = False,
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: tuple[type[nn.Module], ...] = (),
    fast: bool = True,
) -> Any:
    """The Euclidean norm of every row of :func:`per_sample_grads`.

    One forward and one backward for the activations; the rows themselves are not made,
    or a few at a time.

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
        model: as in :func:`per_sample_grads`, like all that is not named here.
        loss_fn: as there.
        *batch: as there.
        per_parameter: a dict of norms, one for each parameter, and not one of all.
        gather: "all" gives the norms of all processes of torch.distributed's default
            group, those of rank 0 first; their batches may differ in size. Every
            process has to make the call; if one fails, all raise.
        mode: as there.
        rows: as there.
        params: as there.
        chunk_size: as there.
        randomness: as there.
        has_aux: as there.
        num_groups: as there.
        update_running_stats: as there.
        sync_levels: as there.
        also: as there.
        fast: as there; the norms themselves have one form.

    Returns:
        (B,), or a dict from parameter names to (B,), in the dtype of the parameters and
        in float32 for those in half precision. With ``has_aux`` a pair: that, and aux,
        of this process.

    Raises:
        ValueError: as :func:`per_sample_grads`.
        RuntimeError: ``gather`` without process group, or another process failed.

    A parameter that is used once, by a linear layer, a convolution or an embedding, or
    by a normalisation layer, takes no memory for its rows, or little. One that is
    used otherwise (twice, tied, or by any other operation) takes its rows' memory; the
    norm is that of their sum, cross terms included. The formulas, with their sources,
    are in ``vmapsafe/_rows/formulas.py``. The result carries no derivatives, transforms
    of torch.func around it excepted. A sample with NaN has the norm NaN, and no other.
    """
    check_all_or_none(_NORMS, "gather", gather, "the norms")

    def compute() -> Any:
        options = Options(
            called=_NORMS,
            mode=mode,
            num_groups=num_groups,
            update_running_stats=update_running_stats,
            sync_levels=sync_levels,
            also=also,
            fast=fast,
            rows=rows,
        )
        check_chunk_size(_NORMS, chunk_size, options)
        samples = Samples.of(
            _NORMS, model, loss_fn, batch, params, options, randomness, has_aux
        )

        def norms(batch: tuple[Any, ...]) -> Any:
            into = _Norms()
            aux = samples.collect(batch, into)
            found = {name: into.norms[name] for name in samples.values}
            return found if per_parameter else _total(found), aux

        return tree_map(
            lambda *parts: torch.cat(parts)[: samples.size],
            *samples.by_chunk(chunk_size, norms),
        )

    if gather == "all":
        found, aux = agreed(f'{_NORMS} with gather="all"', model, compute)
        found = tree_map(gathered, found), aux
    else:
        found = compute()
    return found if has_aux else found[0]


@in_turn
def clipped_grad_sum(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    max_grad_norm: float,
    reduce: str | None = None,
    mode: str = "eval",
    rows: str = "contribution",
    params: Params = None,
    chunk_size: int | str | None = None,
    randomness: str = "error",
    has_aux: bool = False,
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: tuple[type[nn.Module], ...] = (),
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
        model: as in :func:`per_sample_grads`, like all that is not named here.
        loss_fn: as there.
        *batch: as there.
        max_grad_norm: above 0.
        reduce: "all" adds up the sums of all processes of torch.distributed's default
            group, each with its own samples; every process has to make the call, with
            a model of the same parameters. If one fails, all raise.
        mode: as there.
        rows: as there.
        params: as there.
        chunk_size: as there; the factors are of samples, so chunks change nothing but
            in "sync".
        randomness: as there.
        has_aux: as there.
        num_groups: as there.
        update_running_stats: as there.
        sync_levels: as there.
        also: as there.
        fast: as there.

    Returns:
        A dict from parameter names to tensors of the parameters' shape and dtype. With
        ``has_aux`` a pair: that, and aux, of this process.

    Raises:
        ValueError: as :func:`per_sample_grads`; ``max_grad_norm`` not above 0.
        RuntimeError: ``reduce`` without process group, or another process failed.

    A row with NaN, or with a norm that is not finite, makes the whole sum NaN: it is
    not left out in silence. The result carries no derivatives, transforms of torch.func
    around it excepted.

    It is not differentially private by itself: no noise is added and no batch is drawn
    at random. Neither can it be a part of such a scheme where a row depends on more
    than its sample: in "sync", which warns, and in "eval" unless the running
    statistics come from public data.
    """
    check_all_or_none(_CLIPPED, "reduce", reduce, "the sum")
    if mode == "sync":
        _warn_of_sync()

    def compute() -> Any:
        _check_clipping(max_grad_norm)
        options = Options(
            called=_CLIPPED,
            mode=mode,
            num_groups=num_groups,
            update_running_stats=update_running_stats,
            sync_levels=sync_levels,
            also=also,
            fast=fast,
            rows=rows,
        )
        check_chunk_size(_CLIPPED, chunk_size, options)
        samples = Samples.of(
            _CLIPPED, model, loss_fn, batch, params, options, randomness, has_aux
        )

        def clipped(batch: tuple[Any, ...]) -> Any:
            into = _Kept()
            aux = samples.collect(batch, into)
            with without_autocast(samples.device):
                return into.clipped_sum(samples, max_grad_norm), aux

        parts = samples.by_chunk(chunk_size, clipped)
        total = {
            name: sum([part[0][name] for part in parts[1:]], parts[0][0][name])
            for name in samples.values
        }
        aux = tree_map(
            lambda *auxs: torch.cat(auxs)[: samples.size], *[part[1] for part in parts]
        )
        return total, aux

    if reduce == "all":
        total, aux = agreed(f'{_CLIPPED} with reduce="all"', model, compute)
        found = summed(total), aux
    else:
        found = compute()
    return found if has_aux else found[0]


_NORMS = "per_sample_grad_norms(...)"
_CLIPPED = "clipped_grad_sum(...)"


class _Norms:
    """Collects the norms of each parameter's rows."""

    def __init__(self) -> None:
        self.norms: dict[str, Tensor] = {}

    def storage(self, name: str) -> None:
        return None

    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        self.norms[name] = formula.norms(x, grad)

    def whole(self, name: str, rows: Tensor) -> None:
        self.norms[name] = norms_of(rows)


class _Kept(_Norms):
    """Also keeps what the rows come from, until the norm of all is known."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[str, tuple[Formula, Tensor, Tensor]] = {}
        self._rows: dict[str, Tensor] = {}

    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        if formula.shape.numel() * len(grad) <= x.numel() + grad.numel():
            self.whole(name, formula.rows(x, grad))  # made once, and no larger
        else:
            super().streamed(name, formula, x, grad)
            self._uses[name] = formula, x, grad

    def whole(self, name: str, rows: Tensor) -> None:
        super().whole(name, rows)
        self._rows[name] = rows

    def clipped_sum(self, samples: Samples, most: float) -> dict[str, Tensor]:
        norms = _total(self.norms)
        factors = (most / norms).clamp(max=1)
        factors = torch.where(norms.isfinite(), factors, torch.nan)
        if samples.size == 0:
            factors = torch.zeros_like(factors)
        found = {}
        for name in samples.values:
            if name in self._rows:
                found[name] = weighted_sum(self._rows.pop(name), factors)
            else:
                formula, x, grad = self._uses.pop(name)
                found[name] = formula.weighted(x, grad, factors)
        return found


def _total(norms: Mapping[str, Tensor]) -> Tensor:
    return norms_of(torch.stack(list(norms.values()), 1))


def _check_clipping(most: float) -> None:
    if not most > 0:
        raise VmapSafeValueError(
            _CLIPPED,
            f"max_grad_norm is {most!r}",
            "Pass the largest norm a row may keep, above 0",
        )


def _warn_of_sync() -> None:
    warn_user(
        worded(
            f'{_CLIPPED} in mode "sync"',
            "samples share their statistics there, so that a row depends on all "
            "samples and clipping it bounds no sample's influence",
            "Use another mode if that is what clipping is for",
        ),
        UserWarning,
    )
