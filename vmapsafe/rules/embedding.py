"""The backward of an embedding, of one sample each: a faster batching rule.

Almost all of the rows' numbers are zero. torch writes them all, and then adds what is
not; here nothing is written but that, where the memory is large enough to come from
the system, which hands out zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmapsafe import _memory
from vmapsafe._call import Call, batch_first, batch_size, is_plain, slices
from vmapsafe._rule import MODES, Rule, register

_backward = torch.ops.aten.embedding_dense_backward.default

# Numbers in the result, the whole batch's, from which ours wins, by type of device; read
# off bench/layers.py. A device that is not here has torch's own rule.
REGIMES = {"cpu": 2**14}


def _accepts(call: Call) -> bool:
    grad, indices = call["grad_output"], call["indices"]
    from_ = REGIMES.get(grad.device.type)
    return (
        from_ is not None
        and call.in_dims["grad_output"] is not None
        and call.in_dims["indices"] is not None
        and grad.numel() > 0
        and not call["scale_grad_by_freq"]
        and is_plain(grad)
        and is_plain(indices)
        and _numbers(call) >= from_
    )


def _numbers(call: Call) -> int:
    width = batch_first(call, "grad_output").size(-1)
    return batch_size(call) * int(call["num_weights"]) * int(width)


def _sparse_sum(call: Call) -> tuple[Tensor]:
    """(B, V, D) from (B, ..., D) and (B, ...)."""
    grad, indices = (
        batch_first(call, name) for name in ("grad_output", "indices")
    )
    size, width = len(grad), grad.size(-1)
    weights = call["num_weights"]
    starts = weights * torch.arange(size, device=indices.device)
    places = (indices.reshape(size, -1) + starts.unsqueeze(1)).flatten()
    rows = _memory.zeros((size * weights, width), grad)
    rows.index_put_((places,), grad.reshape(-1, width), accumulate=True)
    rows = rows.view(size, weights, width)
    if call["padding_idx"] >= 0:
        rows[:, call["padding_idx"]] = 0
    return (rows,)


# -- The slow form -------------------------------------------------------------------


def _slice_by_slice(call: Call) -> tuple[Tensor]:
    return (torch.stack([_plain(one) for one in slices(call, batch_size(call))]),)


def _plain(call: Call) -> Tensor:
    """Row v is the sum of the gradients at the places of word v."""
    grad, indices = call["grad_output"], call["indices"].reshape(-1, 1)
    words = torch.arange(call["num_weights"], device=indices.device)
    places = (indices == words) & (words != call["padding_idx"])
    return places.mT.to(grad.dtype) @ grad.reshape(-1, grad.size(-1))


register(
    Rule(
        name="embedding_dense_backward, into memory of zeros",
        functions=(_backward,),
        modes=MODES,
        accepts=_accepts,
        batched=_sparse_sum,
        reference=_slice_by_slice,
    )
)
