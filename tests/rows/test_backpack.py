"""Contributions are what BackPACK calls individual gradients, in training mode.

BackPACK's requirements name torchvision, whose wheels do not import beside a torch
without CUDA; what is used of it here does not need that one. So it is not in the
extra ``test``: ``pip install --no-deps backpack-for-pytorch einops unfoldNd``.
"""

import copy

import pytest
import torch
from state import assert_same_state, everything
from torch import nn

from vmapsafe import per_sample_grads
from vmapsafe.testing import assert_same

backpack = pytest.importorskip(
    "backpack",
    reason="no BackPACK: pip install --no-deps backpack-for-pytorch einops unfoldNd",
    exc_type=ImportError,
)
extensions = pytest.importorskip("backpack.extensions", exc_type=ImportError)

NETS = {
    "1d": (
        lambda: nn.Sequential(
            nn.Linear(3, 5),
            nn.BatchNorm1d(5),
            nn.Tanh(),
            nn.Linear(5, 4),
            nn.BatchNorm1d(4),
        ),
        (3,),
    ),
    "2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Sigmoid(),
            nn.Conv2d(4, 3, 2),
            nn.BatchNorm2d(3),
            nn.Flatten(),
            nn.Linear(12, 4),
        ),
        (2, 5, 5),
    ),
    "3d": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(16, 4)
        ),
        (1, 3, 3, 3),
    ),
}


@pytest.mark.filterwarnings("ignore:Encountered BatchNorm module in training mode")
@pytest.mark.parametrize("name", NETS)
def test_contributions_are_batch_grad(name):
    """Row by row, for the sum of cross entropies."""
    make, shape = NETS[name]
    torch.manual_seed(1)
    net = make().double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, y = torch.randn(6, *shape).double(), torch.arange(6) % 4
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    before = everything(net)
    rows = per_sample_grads(net, loss_fn, x, y, mode="sync", rows="contribution")
    assert_same_state(net, before)

    theirs = backpack.extend(copy.deepcopy(net))
    loss = backpack.extend(copy.deepcopy(loss_fn))(theirs(x.requires_grad_()), y)
    with backpack.backpack(extensions.BatchGrad()):
        loss.backward()
    assert_same(rows, {name: p.grad_batch for name, p in theirs.named_parameters()})
