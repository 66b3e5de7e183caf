"""laplace-torch: the diagonal empirical Fisher of the network in eval mode."""

import pytest
import torch
import torch.nn.functional as F
from clients import client, images, labels, net
from plain import switched
from slow import rows
from torch.utils.data import DataLoader, TensorDataset

from vmapsafe import vmap_safe

laplace = client("laplace")
curvature = client("laplace.curvature")


@pytest.mark.parametrize("mode", ["eval", "group_norm"])
def test_diagonal_empirical_fisher(mode):
    model, x, y = net(), images(8), labels(8)
    plain = switched(model, mode)
    with vmap_safe(model, mode=mode, num_groups=2):
        found = laplace.Laplace(
            model,
            "classification",
            subset_of_weights="all",
            hessian_structure="diag",
            backend=curvature.CurvlinopsEF,
        )
        found.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    each = rows(plain, F.cross_entropy, x, y)
    expected = torch.cat([r.square().sum(0).flatten() for r in each.values()])
    torch.testing.assert_close(found.H, expected)


def test_gradients_in_training_mode():
    """Outside a fit it leaves the mode to the user."""
    model, x, y = net(), images(8), labels(8)
    plain = switched(model, "eval")
    backend = curvature.CurvlinopsEF(model, "classification")
    with pytest.raises(RuntimeError):
        backend.gradients(x, y)
    with vmap_safe(model):
        found, _ = backend.gradients(x, y)
    each = rows(plain, F.cross_entropy, x, y)
    torch.testing.assert_close(
        found, torch.cat([r.flatten(1) for r in each.values()], 1)
    )
