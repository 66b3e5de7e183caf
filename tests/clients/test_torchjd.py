"""torchjd: Jacobians of the losses of the samples, combined into one direction."""

import copy

import pytest
import torch
import torch.nn.functional as F
from clients import client, images, labels, net
from plain import switched
from slow import rows

from vmapsafe import covers, vmap_safe

autojac = client("torchjd.autojac")
autogram = client("torchjd.autogram")
aggregation = client("torchjd.aggregation")


def test_autojac():
    """One row of the Jacobian a sample, as in eval mode, and what becomes of them."""
    model, x, y = net(), images(6), labels(6)
    plain = switched(model, "eval")
    kept = {name: b.clone() for name, b in model.named_buffers()}
    params = list(model.parameters())
    aggregator = aggregation.UPGrad()
    mixing = copy.deepcopy(model)
    losses = F.cross_entropy(mixing(x), y, reduction="none")
    mixed = autojac.jac(losses, [*mixing.parameters()])
    with vmap_safe(model):
        losses = F.cross_entropy(model(x), y, reduction="none")
        found = autojac.jac(losses, params)
        losses = F.cross_entropy(model(x), y, reduction="none")
        autojac.backward(losses)
    each = [*rows(plain, F.cross_entropy, x, y).values()]
    torch.testing.assert_close(list(found), each)
    assert not torch.allclose(mixed[0], each[0], rtol=0.1)
    autojac.jac_to_grad(params, aggregator)
    expected = aggregator(torch.cat([r.flatten(1) for r in each], 1))
    found = torch.cat([p.grad.flatten() for p in params])
    torch.testing.assert_close(found, expected)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, kept[name])


def test_autogram():
    """With a batch dimension it refuses batch norm by class. Without one it works."""
    model, x, y = net(), images(6), labels(6)
    plain = switched(model, "eval")
    with vmap_safe(model):
        assert covers(model, "eval", "group_norm")
        with pytest.raises(ValueError, match="incompatible with the autogram engine"):
            autogram.Engine(model, batch_dim=0)
        engine = autogram.Engine(model, batch_dim=None)
        losses = F.cross_entropy(model(x), y, reduction="none")
        found = engine.compute_gramian(losses)
    flat = [r.flatten(1) for r in rows(plain, F.cross_entropy, x, y).values()]
    torch.testing.assert_close(found, torch.cat(flat, 1) @ torch.cat(flat, 1).T)


def test_autogram_if_it_asked(monkeypatch):
    """Its batched engine is right for layers that a block covers."""
    engines = client("torchjd.autogram._engine")
    check = engines.Engine._check_module_is_compatible

    def asking(self, module):
        if not covers(module, "eval", "group_norm"):
            check(self, module)

    monkeypatch.setattr(engines.Engine, "_check_module_is_compatible", asking)
    model, x, y = net(), images(6), labels(6)
    plain = switched(model, "eval")
    with pytest.raises(ValueError, match="incompatible with the autogram engine"):
        engines.Engine(model, batch_dim=0)
    with vmap_safe(model):
        engine = engines.Engine(model, batch_dim=0)
        losses = F.cross_entropy(model(x), y, reduction="none")
        found = engine.compute_gramian(losses)
    flat = [r.flatten(1) for r in rows(plain, F.cross_entropy, x, y).values()]
    torch.testing.assert_close(found, torch.cat(flat, 1) @ torch.cat(flat, 1).T)
