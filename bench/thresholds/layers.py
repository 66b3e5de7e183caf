"""Rules of layer norm, linear layers, embedding and attention, and torch's own."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from functools import partial

import torch
from torch.func import vmap

from vmapsafe._block import operators
from vmapsafe._rule import operator_rules
from vmapsafe.rules import attention, embedding, layer_norm, linear

from .bench import Bench, entry, from_size, setting

# -- Calls -----------------------------------------------------------------------------


def layer_norm_forward(batch, tokens, width, **given):
    x = torch.randn(batch, tokens, width, **given)
    w, b = torch.randn(2, width, **given)
    return vmap(lambda x: layer_norm._forward(x, [width], w, b, 1e-5)[0]), (x,)


def layer_norm_backward(batch, tokens, width, **given):
    x, grad = torch.randn(2, batch, tokens, width, **given)
    w, b = torch.randn(2, width, **given)
    _, mean, rstd = torch.native_layer_norm(x, [width], w, b, 1e-5)

    def one(grad, x, mean, rstd):
        rest = ([width], mean, rstd, w, b, [True, True, True])
        return layer_norm._backward(grad, x, *rest)

    return vmap(one), (grad, x, mean, rstd)


def linear_forward(batch, tokens, width, **given):
    x = torch.randn(batch, tokens, width, **given)
    w, b = torch.randn(width, width, **given), torch.randn(width, **given)
    return vmap(lambda x: linear._addmm(b, x, w)), (x,)


def embedding_rows(batch, tokens, width, **given):
    grad = torch.randn(batch, tokens, width, **given)
    words = torch.randint(10 * tokens, (batch, tokens), device=given["device"])

    def one(grad, words):
        return embedding._backward(grad, words, 10 * tokens, -1, False)

    return vmap(one), (grad, words)


def attention_forward(batch, tokens, width, **given):
    heads = max(1, width // 64)
    shape = (3, batch, 1, heads, tokens, width // heads)
    q, k, v = torch.randn(shape, **given)
    return vmap(lambda q, k, v: attention._forward(q, k, v)[0]), (q, k, v)


def attention_backward(batch, tokens, width, **given):
    _, (q, k, v) = attention_forward(batch, tokens, width, **given)
    parts = [t.flatten(0, 1) for t in (q, k, v)]
    found = [t.unflatten(0, (batch, 1)) for t in attention._forward(*parts)]

    def one(*args):
        return attention._backward(*args, 0.0, False)

    return vmap(one), (torch.randn_like(q), q, k, v, *found)


# -- Contenders ------------------------------------------------------------------------

# name: (operator, function of a case that makes a call, its lengths and widths)
CALLS = {
    "layer norm": (
        layer_norm._forward,
        layer_norm_forward,
        *((1, 4, 16, 64, 256), (16, 64, 192, 768)),
    ),
    "layer norm, backward": (
        layer_norm._backward,
        layer_norm_backward,
        *((1, 4, 16, 64, 256), (16, 64, 192, 768)),
    ),
    "linear": (linear._addmm, linear_forward, (1, 16, 64, 256), (16, 64, 192, 768)),
    "embedding": (
        embedding._backward,
        embedding_rows,
        *((4, 32, 256), (16, 64, 256)),
    ),
    "attention": (attention._forward, attention_forward, (8, 64, 256), (64, 256)),
    "attention, backward": (
        attention._backward,
        attention_backward,
        *((8, 64, 256), (64, 256)),
    ),
}


def cases(names, device):
    batches, most = ((4, 16, 64), 2**23)
    if device == "cuda":
        batches, most = (16, 128, 512), 2**26
    for name in names:
        _, _, lengths, widths = CALLS[name]
        if device != "cpu" and "attention" in name:
            continue  # these operators exist only on the CPU
        for batch, tokens, width in itertools.product(batches, lengths, widths):
            if batch * tokens * width <= most:
                yield {"call": name, "batch": batch, "tokens": tokens, "width": width}


def ours_and_torchs(device, dtype, call, **case):
    operator, make, *_ = CALLS[call]
    function, args = make(**case, device=device, dtype=dtype)
    rule = operator_rules()[operator][0]
    refuses = replace(rule, accepts=lambda call: False)
    accepts = replace(rule, accepts=lambda call: True, devices=None)

    def run():
        return function(*args)

    return {
        "torch": (lambda: operators.only(refuses), run),
        "ours": (lambda: operators.only(accepts), run),
    }


def at_once_and_by_slice(device, dtype, call, **case):
    """Two ways to the rows: all sums at once, or one call of the kernel for a slice."""
    function, args = layer_norm_backward(**case, device=device, dtype=dtype)
    rule = operator_rules()[layer_norm._backward][0]

    def from_numbers(least):
        regime = layer_norm.Regime(batch=0, slice=least)
        changed = entry(layer_norm.REGIMES, device, regime)
        return lambda: setting(operators.only(rule), changed)

    def run():
        return function(*args)

    return {
        "at once": (from_numbers(sys.maxsize), run),
        "by slice": (from_numbers(0), run),
    }


def of_batch(batch, tokens, width, **_):
    return batch * tokens * width


def of_slice(tokens, width, **_):
    return tokens * width


BENCHES = [
    Bench(
        name="layer norm, batch",
        cases=partial(cases, ["layer norm", "layer norm, backward"]),
        contenders=ours_and_torchs,
        table="layer_norm",
        propose=from_size(of_batch, "torch", "ours", "batch"),
    ),
    Bench(
        name="layer norm, slice",
        cases=partial(cases, ["layer norm, backward"]),
        contenders=at_once_and_by_slice,
        table="layer_norm",
        propose=from_size(of_slice, "at once", "by slice", "slice"),
    ),
    Bench(
        name="linear",
        cases=partial(cases, ["linear"]),
        contenders=ours_and_torchs,
        table="linear",
        propose=from_size(of_batch, "torch", "ours"),
    ),
    # These have no table: their rules hold for all sizes.
    Bench("embedding", partial(cases, ["embedding"]), ours_and_torchs),
    Bench(
        name="attention",
        cases=partial(cases, ["attention", "attention, backward"]),
        contenders=ours_and_torchs,
    ),
]
