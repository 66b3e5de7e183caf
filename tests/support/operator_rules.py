"""Rules of operators: transforms to try them under, and which calls they took."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from vmapsafe._block import operators
from vmapsafe._call import Call
from vmapsafe._rule import OperatorRule
from vmapsafe.rules import memory

Params = dict[str, Tensor]
# Of a network, its parameters and slices of inputs.
Transform = Callable[[nn.Module, Params, Tensor], object]

SEEDED = torch.Generator().manual_seed(1)
# Three slices of two samples.
X = torch.randn(3, 2, 2, 4, 4, generator=SEEDED, dtype=torch.float64)


# -- Transforms ------------------------------------------------------------------------


def tensors(net: nn.Module) -> Params:
    return {name: p.detach() for name, p in net.named_parameters()}


def loss_of(net: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    return lambda params, x: functional_call(net, params, (x,)).square().sum()


def rows(net: nn.Module, params: Params, x: Tensor, **options: Any) -> Any:
    return vmap(grad(loss_of(net), (0, 1)), (None, 0), **options)(params, x)


def squares(net: nn.Module, params: Params, x: Tensor) -> Tensor:
    found = [row.square().sum() for row in rows(net, params, x)[0].values()]
    return torch.stack(found).sum()


def like(tree: Params) -> Params:
    torch.manual_seed(3)
    return {name: torch.randn_like(t) for name, t in tree.items()}


def plain_double_backward(net: nn.Module, params: Params, x: Tensor) -> object:
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    x = x.clone().requires_grad_()
    return torch.autograd.grad(squares(net, leaves, x), [*leaves.values(), x])


def forward_over_reverse(net: nn.Module, params: Params, x: Tensor) -> object:
    derive, tangent = grad(loss_of(net)), like(params)
    return vmap(lambda x: jvp(lambda p: derive(p, x), (params,), (tangent,))[1])(x)


def reverse_over_reverse(net: nn.Module, params: Params, x: Tensor) -> object:
    derive, cotangent = grad(loss_of(net)), like(params)
    return vmap(lambda x: vjp(lambda p: derive(p, x), params)[1](cotangent))(x)


def ensemble(net: nn.Module, params: Params, x: Tensor) -> object:
    members = {n: torch.stack([p, p + 0.1, p - 0.2]) for n, p in params.items()}
    each = vmap(grad(loss_of(net)), (None, 0))
    return vmap(each, (0, None))(members, x), vmap(grad(loss_of(net)))(members, x)


def nested(net: nn.Module, params: Params, x: Tensor) -> object:
    x = torch.stack([x, 2 * x], 1)
    return vmap(vmap(grad(loss_of(net)), (None, 0)), (None, 1))(params, x)


CL = torch.channels_last
TRANSFORMS: dict[str, Transform] = {
    "vmap(grad)": rows,
    "chunk_size": lambda net, p, x: rows(net, p, x, chunk_size=2),
    "in_dims": lambda net, p, x: vmap(grad(loss_of(net)), (None, 3))(
        p, x.movedim(0, 3)
    ),
    "channels_last": lambda net, p, x: rows(
        net,
        {
            n: t.contiguous(memory_format=CL) if t.dim() == 4 else t
            for n, t in p.items()
        },
        x.flatten(0, 1).contiguous(memory_format=CL).unflatten(0, (3, 2)),
    ),
    "grad(vmap(grad))": lambda net, p, x: grad(lambda p, x: squares(net, p, x), (0, 1))(
        p, x
    ),
    "autograd(vmap(grad))": plain_double_backward,
    "jvp(vmap(grad))": lambda net, p, x: jvp(
        lambda p: rows(net, p, x)[0], (p,), (like(p),)
    ),
    "vmap(hvp), forward over reverse": forward_over_reverse,
    "vmap(hvp), reverse over reverse": reverse_over_reverse,
    "jacrev(vmap(grad))": lambda net, p, x: jacrev(
        lambda x: rows(net, p, x)[0]["0.weight"].sum((0, 3, 4))
    )(x),
    "vmap(jacrev)": lambda net, p, x: vmap(
        jacrev(lambda p, x: functional_call(net, p, (x,))), (None, 0)
    )(p, x),
    "vmap(jacfwd)": lambda net, p, x: vmap(
        jacfwd(lambda p, x: functional_call(net, p, (x,))), (None, 0)
    )(p, x),
    "vmap(hessian)": lambda net, p, x: vmap(
        hessian(lambda w, x: loss_of(net)({**p, "3.weight": w}, x)), (None, 0)
    )(p["3.weight"], x),
    "ensemble": ensemble,
    "nested vmap": nested,
}


# -- Rules at work ---------------------------------------------------------------------


def watch(
    monkeypatch: pytest.MonkeyPatch,
    rules: Iterable[OperatorRule],
    taken: Callable[[OperatorRule, Call], object],
) -> None:
    """Puts ``rules`` in force and no others; ``taken`` hears of each call they take."""

    def watched(rule: OperatorRule) -> OperatorRule:
        def batched(call: Call) -> tuple[Tensor | None, ...]:
            taken(rule, call)
            return rule.batched(call)

        return replace(rule, batched=batched)

    table: dict[object, tuple[OperatorRule, ...]] = {}
    for rule in rules:
        table[rule.operator] = (*table.get(rule.operator, ()), watched(rule))
    monkeypatch.setattr(operators, "operator_rules", lambda: table)


def take_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of zeros pays, however small."""
    monkeypatch.setattr(memory, "LARGE", 0)
    monkeypatch.setattr(memory, "pays", lambda shape, like, writes: True)
