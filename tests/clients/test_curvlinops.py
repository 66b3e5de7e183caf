"""curvlinops: curvature matrices of the network in eval mode, or of its slice."""

import pytest
import torch
import torch.nn.functional as F
from clients import client, images, labels, net
from plain import switched
from slow import rows
from torch import nn

from vmapsafe import vmap_safe

curvlinops = client("curvlinops")


def dense(kind, model, data):
    params = [p for p in model.parameters() if p.requires_grad]
    operator = getattr(curvlinops, kind)(model, nn.CrossEntropyLoss(), params, [data])
    return operator @ torch.eye(operator.shape[1], dtype=torch.float64)


def flat(rows):
    return torch.cat([r.flatten(1) for r in rows.values()], 1)


def ggn(plain, x):
    """The mean over samples of JᵀHJ, H the Hessian of cross entropy by the output."""
    total = 0
    outputs = [flat(rows(plain, lambda out, k=k: out[:, k].sum(), x)) for k in range(3)]
    jacobian = torch.stack(outputs, 1)  # (N, classes, parameters)
    for one, j in zip(plain(x).detach().softmax(1), jacobian):
        total = total + j.T @ (one.diag() - one.outer(one)) @ j
    return total / len(x)


def hessian(plain, x, y):
    """By two plain backward passes."""
    params = list(plain.parameters())
    loss = F.cross_entropy(plain(x), y)
    found = torch.autograd.grad(loss, params, create_graph=True)
    lines = [
        torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(
                    torch.autograd.grad(
                        entry, params, retain_graph=True, allow_unused=True
                    ),
                    params,
                )
            ]
        )
        for entry in torch.cat([g.flatten() for g in found])
    ]
    return torch.stack(lines)


@pytest.mark.parametrize("kind", ["GGN", "EF", "Hessian"])
def test_matrices(kind):
    model, x, y = net(), images(6), labels(6)
    plain = switched(model, "eval")
    with vmap_safe(model):
        found = dense(f"{kind}LinearOperator", model, (x, y))
    if kind == "GGN":
        expected = ggn(plain, x)
    elif kind == "EF":
        each = flat(rows(plain, F.cross_entropy, x, y))
        expected = each.T @ each / len(x)
    else:
        expected = hessian(plain, x, y)
    torch.testing.assert_close(found, expected)


def test_in_training_mode_without_a_block():
    """Its own check refuses a network that answers differently each time, or torch's
    functional transforms refuse the update of the running statistics."""
    with pytest.raises(RuntimeError):
        dense("GGNLinearOperator", net(), (images(6), labels(6)))
