"""posteriors: a diagonal Fisher by gradients of each sample."""

import pytest
import torch
import torch.nn.functional as F
from clients import client, images, labels, net
from plain import switched
from slow import rows
from torch.func import functional_call

from vmapsafe import vmap_safe

posteriors = client("posteriors")


def test_diagonal_fisher():
    model, x, y = net(), images(6), labels(6)
    plain = switched(model, "eval")

    def log_posterior(params, batch):
        out = functional_call(model, params, (batch[0],))
        return -F.cross_entropy(out, batch[1]), torch.zeros(())

    params = dict(model.named_parameters())
    transform = posteriors.laplace.diag_fisher.build(log_posterior)
    state = transform.init(params)
    with pytest.raises(RuntimeError):
        transform.update(state, (x, y))
    with vmap_safe(model):
        state, _ = transform.update(state, (x, y))
    each = rows(plain, F.cross_entropy, x, y)
    found = {name: state.prec_diag[name] for name in params}
    torch.testing.assert_close(found, {n: r.square().sum(0) for n, r in each.items()})
