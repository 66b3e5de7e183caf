"""dattri: TracIn and influence functions."""

import pytest
import torch
import torch.nn.functional as F
from clients import client, images, labels, net
from plain import switched
from slow import gram, rows
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from vmapsafe import vmap_safe

task = client("dattri.task")
tracin = client("dattri.algorithm.tracin")


def load(model, state):
    """Without the ``eval()`` of dattri's own."""
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("loading", [None, load], ids=["its own", "in training mode"])
@pytest.mark.parametrize("mode", ["eval", "group_norm"])
def test_tracin(mode, loading):
    model, x, y = net(), images(6), labels(6)
    plain = switched(model, mode)

    def loss(params, batch):
        x, y = batch
        return F.cross_entropy(functional_call(model, params, (x[None],)), y[None])

    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    query = DataLoader(TensorDataset(x[:2], y[:2]), batch_size=2)
    with vmap_safe(model, mode=mode, num_groups=2):
        attributor = tracin.TracInAttributor(
            task.AttributionTask(
                loss, model, model.state_dict(), checkpoints_load_func=loading
            ),
            weight_list=torch.ones(1),
            normalized_grad=False,
        )
        attributor.projector_kwargs = None
        found = attributor.attribute(loader, query)
    each = rows(plain, F.cross_entropy, x, y)
    expected = gram(each, {n: r[:2] for n, r in each.items()})
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
