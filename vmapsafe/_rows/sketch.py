"""Random projections of per-sample gradients, without the rows and without the matrix.

A sketch of a row g of P numbers is :math:`g R / \\sqrt k` with R (P, k) of independent
numbers of mean 0 and variance 1: then the product of two sketches has the mean of the
product of the two rows, and a variance that falls as 1 / k (Johnson and Lindenstrauss).
Data attribution keeps sketches in the place of rows: TRAK,
https://arxiv.org/abs/2303.14186, section 3.2.

R has a part for each parameter, which the seed and the parameter's name decide, and it
is drawn a block at a time where it is used. What is drawn are bits, on the CPU's
generator, so that every device meets the same matrix; a sign takes one bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import NumGroups, Options
from vmapsafe._rows.chunks import check_chunk_size
from vmapsafe._rows.formulas import Formula
from vmapsafe._rows.processes import agreed, check_all_or_none, gathered
from vmapsafe._rows.samples import Loss, Params, Samples
from vmapsafe._rows.turns import in_turn
from vmapsafe._torch import below_all, tree_map, without_autocast
from vmapsafe.rules.batch_norm import wide


@in_turn
def per_sample_sketch(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Any,
    k: int,
    kind: str = "rademacher",
    seed: int = 0,
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
    r"""A random projection of every row of :func:`per_sample_grads` to k numbers.

    With G (B, P) the rows, all parameters side by side, it is :math:`G R / \sqrt k`,
    and products of sketches estimate products of rows:

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
        model: as in :func:`per_sample_grads`, like all that is not named here.
        loss_fn: as there.
        *batch: as there.
        k: numbers a sample.
        kind: of the matrix: "rademacher", signs, or "gaussian".
        seed: of the matrix, any int.
        gather: as in :func:`per_sample_grad_norms`.
        mode: as there.
        rows: as there.
        params: as there.
        chunk_size: as there; each chunk draws the matrix again.
        randomness: as there.
        has_aux: as there.
        num_groups: as there.
        update_running_stats: as there.
        sync_levels: as there.
        also: as there.
        fast: as there; a sketch has one form.

    Returns:
        (B, k), in the dtype of the parameters, and in float32 for those in half
        precision. With ``has_aux`` a pair: that, and aux, of this process.

    Raises:
        ValueError: as :func:`per_sample_grads`; a ``k`` below 1, another ``kind``.
        RuntimeError: ``gather`` without process group, or another process failed.

    The matrix depends on ``seed``, ``kind``, ``k`` and the names and shapes of the
    parameters alone: sketches of other batches, chunks and devices and of other models
    with these names can be compared, and the sketch by two sets of parameters is the
    sum of the sketches by each. The part of a parameter of n numbers is

    .. code-block:: python

        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        many = -(-n // 64) * 64  # rows: n, up to a multiple of 64
        # kind="gaussian"
        R = torch.randn(many, k, generator=generator)[:n]
        # kind="rademacher": a bit a sign, the lowest first
        words = torch.empty(many * k // 64, dtype=torch.int64)
        words.random_(-(2**63), None, generator=generator)
        R = 1.0 - 2 * ((words[:, None] >> torch.arange(64)) & 1).view(many, k)[:n]

    Of the matrix, a block is there at a time, and of the rows those by one parameter,
    of 64 samples where the layer allows it (``per_sample_grad_norms`` says where).
    torch does not promise that other versions of it draw the same numbers. The result
    carries no derivatives, transforms of torch.func around it excepted.
    """
    check_all_or_none(_CALLED, "gather", gather, "the sketches")

    def compute() -> Any:
        _check_matrix(k, kind, seed)
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

        def sketch(batch: tuple[Any, ...]) -> Any:
            into = _Projected(k, kind, seed)
            aux = samples.collect(batch, into)
            return sum(into.parts[1:], into.parts[0]) / math.sqrt(k), aux

        return tree_map(
            lambda *parts: torch.cat(parts)[: samples.size],
            *samples.by_chunk(chunk_size, sketch),
        )

    if gather == "all":
        found, aux = agreed(f'{_CALLED} with gather="all"', model, compute)
        found = gathered(found), aux
    else:
        found = compute()
    return found if has_aux else found[0]


_CALLED = "per_sample_sketch(...)"
KINDS = ("rademacher", "gaussian")


class _Projected:
    """Collects the projection of each parameter's rows."""

    def __init__(self, k: int, kind: str, seed: int) -> None:
        self._k, self._kind, self._seed = k, kind, seed
        self.parts: list[Tensor] = []

    def storage(self, name: str) -> None:
        return None

    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        parts = [
            self._project(name, formula.rows(x[i : i + _MANY], grad[i : i + _MANY]))
            for i in range(0, len(grad), _MANY)
        ]
        self.parts.append(torch.cat(parts))

    def whole(self, name: str, rows: Tensor) -> None:
        self.parts.append(self._project(name, rows))

    def _project(self, name: str, rows: Tensor) -> Tensor:
        rows = wide(rows).unsqueeze(-1).flatten(1)
        seed = seed_of(self._seed, name)
        blocks = _blocks(rows.size(1), self._k, self._kind, seed, rows)
        start = 0
        total = rows.new_zeros(len(rows), self._k)
        with without_autocast(rows.device):
            for block in blocks:
                total = total.addmm(rows[:, start : start + len(block)], block)
                start += len(block)
        return total


def seed_of(seed: int, name: str) -> int:
    """Of a parameter's part of the matrix."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _blocks(
    numbers: int, k: int, kind: str, seed: int, like: Tensor
) -> Iterator[Tensor]:
    """(some, k) at a time, ``numbers`` in all, in the dtype and place of ``like``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device, dtype = like.device, like.dtype
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    signs = (1 - 2 * (byte.unsqueeze(1) >> bit & 1)).to(dtype)
    most = max(64, _BLOCK // k // 64 * 64)  # a word of bits ends with a block
    for start in range(0, numbers, most):
        wanted = min(most, numbers - start)
        many = -(-wanted // 64) * 64
        with below_all():  # vmap would ask whether slices are to draw the same
            if kind == "gaussian":
                block = torch.empty(many, k, dtype=torch.float32, device="cpu")
                block = block.normal_(generator=generator).to(device, dtype)
            else:
                words = torch.empty(many * k // 64, dtype=torch.int64, device="cpu")
                words.random_(-(2**63), None, generator=generator)
                eights = words.view(torch.uint8).to(device).int()
                block = signs.index_select(0, eights).view(many, k)
        yield block[:wanted]


# Samples at a time: from about there on, drawing the matrix costs less than using it.
# Numbers of the matrix at a time.
_MANY = 64
_BLOCK = 2**19


def _check_matrix(k: int, kind: str, seed: int) -> None:
    if type(k) is not int or k < 1:
        raise VmapSafeValueError(
            _CALLED, f"k is {k!r}", "Pass how many numbers a sample, at least 1"
        )
    if kind not in KINDS:
        listed = " or ".join(f'"{one}"' for one in KINDS)
        raise VmapSafeValueError(_CALLED, f"unknown kind {kind!r}", f"Choose {listed}")
    if type(seed) is not int:
        raise VmapSafeValueError(_CALLED, f"seed is {seed!r}", "Pass an int")
