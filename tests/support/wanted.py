"""What each quantity of ``vmapsafe.quantities`` should be, from slow rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import slow
import torch
from plain import ModeName
from torch import Tensor, nn

from vmapsafe import quantities as q

EXACT = 1e-12


class Cosine(q.Quantity[Tensor]):
    """Of every sample's gradient and the batch's: a quantity of one's own, (B,)."""

    def looks(self, call: q.CallShape) -> q.Looks[Tensor]:
        found = yield {"sum": q.Sum(), "norms": q.Norms()}
        dots = yield q.Dots(found["sum"])
        flat = torch.cat([total.flatten() for total in found["sum"].values()])
        cosines: Tensor = dots / (found["norms"] * flat.norm())
        return cosines


# In float32 where the parameters are in half precision.
WIDE = (q.Norms, q.SumOfSquares, q.Gram, q.Dots, q.Sketch, Cosine)


@dataclass
class Truth:
    """Slow rows and losses of one batch, and the rows of another."""

    rows: slow.Rows
    losses: Tensor
    others: slow.Rows | None = None


def truth(
    model: nn.Module,
    mode: ModeName,
    kind: str,
    loss_fn: slow.Loss,
    *batch: Tensor,
    chunk_size: int | None = None,
    slices: bool = False,
) -> Truth:
    """Of a batch; in "sync" each chunk is a batch of its own.

    Args:
        model: the network.
        mode: of the block.
        kind: of the rows, in "sync".
        loss_fn: of output and targets.
        *batch: tensors (B, ...).
        chunk_size: of the call.
        slices: whether x[i] is a batch of its own.

    Returns:
        The rows and losses.
    """
    if mode != "sync":
        rows = slow.rows_in(model, mode, loss_fn, *batch, slices=slices)
        losses = slow.losses_in(model, mode, loss_fn, *batch, slices=slices)
        return Truth(rows, losses)
    chunks = zip(*[part.split(chunk_size or len(part)) for part in batch])
    found = [
        slow.rows_in_sync(model, kind, loss_fn, *chunk, slices=slices)
        for chunk in chunks
    ]
    rows = {n: torch.cat([rows[n] for rows, _ in found]) for n in found[0][0]}
    return Truth(rows, torch.cat([losses for _, losses in found]))


def expected(quantity: Any, known: Truth) -> Any:
    """What ``per_sample`` should give for a quantity."""
    rows = known.rows
    norms = slow.norms(rows)
    if isinstance(quantity, q.Losses):
        return known.losses
    if isinstance(quantity, q.Rows):
        return rows
    if isinstance(quantity, q.Norms):
        if not quantity.per_parameter:
            return norms
        return {name: slow.norms({name: row}) for name, row in rows.items()}
    if isinstance(quantity, q.Sum):
        return slow.summed(rows)
    if isinstance(quantity, q.SumOfSquares):
        return slow.squares(rows)
    if isinstance(quantity, q.ClippedSum):
        most = quantity.max_grad_norm
        if not isinstance(most, Mapping):
            return slow.clipped(rows, float(most))
        return slow.clipped_by_groups(rows, {n: float(m) for n, m in most.items()})
    if isinstance(quantity, q.WeightedSum):
        weights = quantity.weights
        if not isinstance(weights, Tensor):
            weights = weights(norms)
        return slow.weighted(rows, weights)
    if isinstance(quantity, q.Gram):
        others = rows if quantity.other is None else known.others
        assert others is not None
        return slow.gram(rows, others)
    if isinstance(quantity, q.Dots):
        return slow.dots(rows, dict(quantity.vectors))
    if isinstance(quantity, q.Sketch):
        return slow.sketch(rows, quantity.k, quantity.kind, quantity.seed)
    assert isinstance(quantity, Cosine), f"no slow form of {quantity}"
    total = slow.summed(rows)
    length = slow.norms({name: t.unsqueeze(0) for name, t in total.items()})
    return slow.dots(rows, total) / (norms * length)


def scale(quantity: Any, known: Truth, wanted: Any) -> Tensor | float:
    """What an error is relative to: the largest entry, or products of norms."""
    norms = slow.norms(known.rows)
    if isinstance(quantity, Cosine):
        return 1.0
    if isinstance(quantity, q.Gram):
        others = known.rows if quantity.other is None else known.others
        assert others is not None
        return norms.unsqueeze(1) * slow.norms(others)
    if isinstance(quantity, q.Dots):
        vectors = dict(quantity.vectors)
        names = list(known.rows)
        if vectors[names[0]].dim() < known.rows[names[0]].dim():
            return norms * slow.norms({n: vectors[n].unsqueeze(0) for n in names})
        return norms.unsqueeze(1) * slow.norms({n: vectors[n] for n in names})
    given = wanted.values() if isinstance(wanted, dict) else [wanted]
    return max([float(t.abs().max()) for t in given if t.numel()] or [0.0])


def assert_exact(
    quantity: Any, found: Any, known: Truth, tolerance: float = EXACT
) -> None:
    """Raise unless a value is right, and a plain tensor or a dict of such.

    Args:
        quantity: that was asked for.
        found: its value.
        known: the slow rows.
        tolerance: of the scale.
    """
    off = worst(quantity, found, known)
    assert off <= tolerance, f"{type(quantity).__name__} is off by {off:.1e}"


def worst(quantity: Any, found: Any, known: Truth) -> float:
    """The largest error, of the scale; infinite where shapes or names differ."""
    wanted = expected(quantity, known)
    size = scale(quantity, known, wanted)
    if not isinstance(wanted, dict):
        found, wanted = {"": found}, {"": wanted}
    assert list(found) == list(wanted), f"{list(found)} instead of {list(wanted)}"
    most = 0.0
    for name, right in wanted.items():
        value = found[name]
        assert value.shape == right.shape, f"{tuple(value.shape)} {tuple(right.shape)}"
        assert not value.requires_grad
        off = (value.double() - right.double()).abs()
        if off.numel():
            parts = torch.where(off == 0, 0, off / size)
            most = max(most, float(parts.nan_to_num(torch.inf).max()))
    return most
