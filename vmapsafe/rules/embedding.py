"""The backward of an embedding, of one sample each: a faster batching rule.

Almost all of the rows' numbers are zero. torch writes them all, and then adds what is
not; here nothing is written but that, where the memory is large enough to come from
the system, which hands out zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmapsafe._call import Call, batch_first, batch_size
from vmapsafe._rule import OperatorRule, register, slice_by_slice
from vmapsafe._torch import is_plain
from vmapsafe.rules import memory

_backward = torch.ops.aten.embedding_dense_backward.default


def _makes_large_rows(call: Call) -> bool:
    grad, indices = call["grad_output"], call["indices"]
    return (
        call.in_dims["grad_output"] is not None
        and call.in_dims["indices"] is not None
        and grad.numel() > 0
        and not call["scale_grad_by_freq"]
        and is_plain(grad)
        and is_plain(indices)
        and memory.pays(_shape(call), grad, grad.numel() // grad.size(-1))
    )


def _shape(call: Call) -> tuple[int, int, int]:
    width = batch_first(call, "grad_output").size(-1)
    return batch_size(call), call["num_weights"], width


def _sparse_sum(call: Call) -> tuple[Tensor]:
    """(B, V, D) from (B, ..., D) and (B, ...)."""
    grad, indices = (batch_first(call, name) for name in ("grad_output", "indices"))
    size, words, width = _shape(call)
    starts = words * torch.arange(size, device=indices.device).unsqueeze(1)
    places = (indices.reshape(size, -1) + starts).flatten()
    rows = memory.zeros((size, words, width), grad)
    rows.view(-1, width).index_put_((places,), grad.reshape(-1, width), accumulate=True)
    if call["padding_idx"] >= 0:
        rows[:, call["padding_idx"]] = 0
    return (rows,)


# -- The slow form -------------------------------------------------------------------


def _plain(call: Call) -> Tensor:
    """Row v is the sum of the gradients at the places of word v."""
    grad: Tensor = call["grad_output"]
    indices = call["indices"].reshape(-1, 1)
    words = torch.arange(call["num_weights"], device=indices.device)
    places = (indices == words) & (words != call["padding_idx"])
    rows: Tensor = places.mT.to(grad.dtype) @ grad.reshape(-1, grad.size(-1))
    return rows


register(
    OperatorRule(
        name="embedding_dense_backward, into memory of zeros",
        operator=_backward,
        accepts=_makes_large_rows,
        batched=_sparse_sum,
        reference=slice_by_slice(_plain),
        devices=("cpu",),
    )
)
