"""Time the speed rules of layer norm, linear layers, embedding and attention.

For each shape it prints the time of vmapsafe's rule as a multiple of the time of
torch's own. ``REGIMES`` in the files of vmapsafe/rules/ comes from these tables: a rule
may be used for a shape if all ratios are below 1. Run it in the folder bench::

    python -m thresholds.layers
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch
from measuring import now
from torch.func import vmap

from vmapsafe._block import operators
from vmapsafe._rule import operator_rules
from vmapsafe.rules import attention, embedding, layer_norm, linear

BATCHES = (4, 16, 64)


def layer_norm_forward(batch, tokens, width, device):
    x = torch.randn(batch, tokens, width, device=device)
    w, b = torch.randn(2, width, device=device)
    return vmap(lambda x: layer_norm._forward(x, [width], w, b, 1e-5)[0]), (x,)


def layer_norm_backward(batch, tokens, width, device):
    x, grad = torch.randn(2, batch, tokens, width, device=device)
    w, b = torch.randn(2, width, device=device)
    _, mean, rstd = torch.native_layer_norm(x, [width], w, b, 1e-5)

    def one(grad, x, mean, rstd):
        rest = ([width], mean, rstd, w, b, [True, True, True])
        return layer_norm._backward(grad, x, *rest)

    return vmap(one), (grad, x, mean, rstd)


def linear_forward(batch, tokens, width, device):
    x = torch.randn(batch, tokens, width, device=device)
    w, b = torch.randn(width, width, device=device), torch.randn(width, device=device)
    return vmap(lambda x: linear._addmm(b, x, w)), (x,)


def embedding_rows(batch, tokens, width, device):
    grad = torch.randn(batch, tokens, width, device=device)
    words = torch.randint(10 * tokens, (batch, tokens), device=device)

    def one(grad, words):
        return embedding._backward(grad, words, 10 * tokens, -1, False)

    return vmap(one), (grad, words)


def attention_forward(batch, tokens, width, device):
    heads = max(1, width // 64)
    shape = (3, batch, 1, heads, tokens, width // heads)
    q, k, v = torch.randn(shape, device=device)
    return vmap(lambda q, k, v: attention._forward(q, k, v)[0]), (q, k, v)


def attention_backward(batch, tokens, width, device):
    _, (q, k, v) = attention_forward(batch, tokens, width, device)
    parts = [t.flatten(0, 1) for t in (q, k, v)]
    found = [t.unflatten(0, (batch, 1)) for t in attention._forward(*parts)]

    def one(*args):
        return attention._backward(*args, 0.0, False)

    return vmap(one), (torch.randn_like(q), q, k, v, *found)


# name: (operator, function of a shape, tokens, widths)
FAMILIES = {
    "layer norm": (
        layer_norm._forward,
        layer_norm_forward,
        *((1, 16, 64, 256), (16, 64, 192, 768)),
    ),
    "layer norm backward": (
        layer_norm._backward,
        layer_norm_backward,
        *((1, 4, 16, 64, 256), (16, 64, 192, 768)),
    ),
    "linear": (linear._addmm, linear_forward, (1, 16, 64, 256), (16, 64, 192, 768)),
    "embedding, rows": (
        embedding._backward,
        embedding_rows,
        *((4, 32, 256), (16, 64, 256)),
    ),
    "attention": (attention._forward, attention_forward, (8, 64, 256), (64, 256)),
    "attention backward": (
        attention._backward,
        attention_backward,
        *((8, 64, 256), (64, 256)),
    ),
}


def ratio(operator, call, args, rounds, device):
    """Our time as a multiple of torch's: medians of rounds in turn, of 2 ms each."""
    rule = operator_rules()[operator][0]
    rules = {
        "ours": replace(rule, accepts=lambda call: True, devices=None),
        "torch": replace(rule, accepts=lambda call: False),
    }
    times = {name: [] for name in rules}
    results, repeat = {}, 1
    for i in range(-2, rounds):
        for name in list(rules)[:: 1 if i % 2 else -1]:
            with operators.only(rules[name]):
                started = now(device)
                for _ in range(repeat):
                    results[name] = call(*args)
                taken = (now(device) - started) / repeat
            if i >= 0:
                times[name].append(taken)
        if i == -2:
            compare(results["ours"], results["torch"])
        if i == -1:
            repeat = max(1, int(2e-3 / taken))
    return statistics.median(times["ours"]) / statistics.median(times["torch"])


def compare(ours, torchs):
    pairs = zip(ours, torchs) if isinstance(ours, tuple) else [(ours, torchs)]
    for one, other in pairs:
        largest = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    layer_norm.REGIMES.setdefault(asked.device, layer_norm.REGIMES["cpu"])
    # torch warns in every call that its own attention is a loop.
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    for name in asked.only:
        operator, make, lengths, widths = FAMILIES[name]
        if asked.device != "cpu" and "attention" in name:
            continue  # these operators exist only on the CPU
        for tokens in lengths:
            for width in widths:
                row = []
                for batch in BATCHES:
                    if batch * tokens * width > 2**23:
                        continue
                    torch.manual_seed(0)
                    call, args = make(batch, tokens, width, asked.device)
                    found = ratio(operator, call, args, asked.rounds, asked.device)
                    row.append(f"B={batch}: {found:.2f}")
                print(f"{name} T={tokens} C={width}".ljust(36), "  ".join(row))


if __name__ == "__main__":
    main()
