"""captum: TracInCP, products of the gradients of samples."""

import pytest
import torch
import torch.nn.functional as F
from clients import client, images, labels, net
from plain import switched
from slow import gram, rows
from torch import nn
from torch.utils.data import TensorDataset

from vmapsafe import vmap_safe

influence = client("captum.influence")


def load(model, state):
    model.load_state_dict(state)
    return 1.0


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require")
@pytest.mark.parametrize("trick", [False, True])
def test_tracin(tmp_path, trick):
    """Samples are independent, in training mode too."""
    model, x, y = net(), images(6), labels(6)
    plain, kept = switched(model, "eval"), {
        n: b.clone() for n, b in model.named_buffers()
    }
    # The trick of captum is for linear layers and convolutions.
    names = ["0", "4", "7"] if trick else None
    tracin = influence.TracInCP(
        model,
        TensorDataset(x, y),
        [model.state_dict()],
        checkpoints_load_func=load,
        layers=names,
        loss_fn=nn.CrossEntropyLoss(reduction="sum" if trick else "none"),
        batch_size=4,
        sample_wise_grads_per_batch=trick,
    )
    mixed = tracin.influence((x[:2], y[:2]))
    model.load_state_dict(kept, strict=False)  # captum has moved the statistics
    with vmap_safe(model):
        found = tracin.influence((x[:2], y[:2]))
    each = rows(plain, F.cross_entropy, x, y)
    if trick:
        each = {n: r for n, r in each.items() if n[0] in names}
    expected = gram({n: r[:2] for n, r in each.items()}, each)
    torch.testing.assert_close(found.to(expected), expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(mixed.to(expected), expected, rtol=0.1)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, kept[name])
