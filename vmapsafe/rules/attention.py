"""Scaled dot product attention on the CPU: a faster batching rule.

torch (2.13) does not have a batching rule for its fused kernel on the CPU, so it runs
the kernel and its backward sample by sample. The fused kernels of CUDA have one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call, batch_size, expanded
from vmapsafe._rule import OperatorRule, register, slice_by_slice

DEVICES = ("cpu",)
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _accepts(call: Call) -> bool:
    """Every call without dropout: at any size, torch's own rule is a loop."""
    return bool(call["dropout_p"] == 0)


def _merged(call: Call) -> tuple[Tensor, ...]:
    """The outputs of one call of the kernel, on (B * N, H, L, D)."""
    size = batch_size(call)
    merged = {name: expanded(call, name) for name in call.in_dims}
    samples = merged["query"].size(1)
    mask = merged.get("attn_mask")
    if mask is not None and mask.dim() == 3:  # (L, S) of a slice
        mask = mask[:, None, None]
    if mask is not None:
        merged["attn_mask"] = mask.expand(size, samples, *mask.shape[2:])
    merged = {name: _by_rows(value.flatten(0, 1)) for name, value in merged.items()}
    outputs = call.function(**{**call.arguments, **merged})
    return tuple([out.unflatten(0, (size, samples)) for out in outputs])


def _by_rows(value: Tensor) -> Tensor:
    """``value`` in a layout that the kernel reads correctly.

    The kernel assumes that the stride of the last dimension is 1.
    """
    return value if value.stride(-1) == 1 else value.contiguous()


# -- The slow form -------------------------------------------------------------------


def _weights(call: Call) -> Tensor:
    """(N, H, L, S): the attention weights before the softmax."""
    query, key = call["query"], call["key"]
    scale = query.size(-1) ** -0.5 if call["scale"] is None else call["scale"]
    weights: Tensor = query @ key.mT * scale
    if call["is_causal"]:
        later = torch.ones_like(weights, dtype=torch.bool).triu(1)
        weights = weights.masked_fill(later, float("-inf"))
    if call["attn_mask"] is not None:
        weights = weights + call["attn_mask"]
    return weights


def _plain(call: Call) -> tuple[Tensor, Tensor]:
    weights = _weights(call)
    output: Tensor = weights.softmax(-1) @ call["value"]
    half = weights.dtype == torch.bfloat16  # as in torch's kernel
    logsumexp = (weights.float() if half else weights).logsumexp(-1)
    return output, logsumexp.detach()


def _plain_backward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by Dao et al., https://arxiv.org/abs/2205.14135, algorithm 4.

    They are detached, because torch does not have a derivative of this backward.
    """
    query, key, value, grad = (
        call[name].detach() for name in ("query", "key", "value", "grad_out")
    )
    scale = query.size(-1) ** -0.5 if call["scale"] is None else call["scale"]
    shares = torch.exp(_weights(call) - call["logsumexp"].unsqueeze(-1)).detach()
    shares = shares.to(grad.dtype)
    own = (grad * call["out"].detach()).sum(-1, keepdim=True)
    of_weights = shares * (grad @ value.mT - own)
    return of_weights @ key * scale, of_weights.mT @ query * scale, shares.mT @ grad


for _name, _operator, _reference in (
    ("attention", _forward, _plain),
    ("attention_backward", _backward, _plain_backward),
):
    register(
        OperatorRule(
            name=f"{_name} on the CPU, batches merged",
            operator=_operator,
            accepts=_accepts,
            batched=_merged,
            reference=slice_by_slice(_reference),
            devices=DEVICES,
            functions=(
                F.scaled_dot_product_attention,
                F.multi_head_attention_forward,
            ),
        )
    )
