"""torchopt: MAML over tasks that have statistics of their own, in one vmap."""

import copy

import pytest
import torch
from clients import client, images, labels, net
from torch import nn
from torch.func import functional_call, grad, vmap

from vmapsafe import vmap_safe

torchopt = client("torchopt")


def batches(tasks):
    x = torch.stack([images(5) for _ in range(tasks)])
    return x, torch.stack([labels(5) for _ in range(tasks)])


def by_hand(model, tasks):
    """The meta-gradient by plain autograd: each task a copy, one step of SGD."""
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    total, copies = 0, []
    for x, y in zip(*tasks):
        plain = copy.deepcopy(model)
        copies.append(plain)

        def loss(params):
            return nn.functional.cross_entropy(functional_call(plain, params, (x,)), y)

        found = torch.autograd.grad(
            loss(params), list(params.values()), create_graph=True
        )
        adapted = {n: p - 0.1 * g for (n, p), g in zip(params.items(), found)}
        total = total + loss(adapted)
    return dict(zip(params, torch.autograd.grad(total, list(params.values())))), copies


@pytest.mark.parametrize("update", [False, True])
def test_maml(update):
    model, tasks = net(), batches(3)
    expected, copies = by_hand(model, tasks)
    params = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.expand(3, *b.shape).clone() for n, b in model.named_buffers()}
    kept = {n: b.clone() for n, b in buffers.items()}

    def of_task(params, buffers, x, y):
        def loss(params):
            out = functional_call(model, (params, buffers), (x,))
            return nn.functional.cross_entropy(out, y)

        transform = torchopt.sgd(lr=0.1)
        state = transform.init(params)
        updates, _ = transform.update(grad(loss)(params), state, inplace=False)
        return loss(torchopt.apply_updates(params, updates, inplace=False))

    def total(params):
        return vmap(of_task, (None, 0, 0, 0))(params, buffers, *tasks).sum()

    with pytest.raises(RuntimeError):
        grad(total)(params)
    for name, buffer in buffers.items():
        buffer.copy_(kept[name])
    with vmap_safe(model, mode="no_running_stats", update_running_stats=update):
        found = grad(total)(params)
    torch.testing.assert_close(found, expected)
    for name, buffer in buffers.items():
        stepped = torch.stack([dict(m.named_buffers())[name] for m in copies])
        torch.testing.assert_close(buffer, stepped if update else kept[name])
