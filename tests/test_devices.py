"""Devices other than the one that regimes were measured on.

The "meta" device computes only shapes and refuses tensors of other devices. It has
neither autocast nor measured regimes. So a test that runs there shows, on any machine,
that nothing is made on the CPU by mistake.
"""

import pytest
import torch
import torch.nn.functional as F
from blocks import MODES
from devices import on_fake_cuda
from torch import nn
from torch._subclasses import FakeTensorMode

from vmapsafe import (
    clipped_grad_sum,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
    vmap_safe,
)


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4), nn.ReLU()),
        *(nn.Conv2d(4, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.Flatten()),
        nn.Linear(8 * 4 * 4, 3),
    )


class Words(nn.Module):
    """Embeddings, attention, layer norm, and batch norm over the words."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 8), nn.Linear(8, 24)
        self.norm, self.batch_norm = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        split = self.mix(self.norm(self.embed(x))).unflatten(-1, (3, 2, 4))
        y = F.scaled_dot_product_attention(*split.permute(2, 0, 3, 1, 4))
        y = y.transpose(1, 2).flatten(2)
        return self.out(self.batch_norm(y.mT).mean(2))


NETS = {
    "convolutions": (convolutions, lambda n: torch.empty(n, 3, 6, 6)),
    "words": (Words, lambda n: torch.zeros(n, 5, dtype=torch.long)),
}


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs a torch that was built for CUDA"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_block", [True, False])
def test_channels_last_on_cuda(in_block, mode):
    """There torch's own batch norm asks vmap for the layout, which it refuses."""
    with FakeTensorMode():
        layer = on_fake_cuda(nn.BatchNorm2d(4))
        x = torch.empty(5, 2, 6, 6, 4, device="cuda").movedim(-1, 2)
        if in_block:
            with vmap_safe(layer, mode=mode, num_groups=2):
                assert torch.func.vmap(layer)(x).shape == x.shape
        else:
            with pytest.raises(RuntimeError, match="querying is_contiguous"):
                torch.func.vmap(layer.eval())(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings(r"ignore:clipped_grad_sum.* in mode \"sync\":UserWarning")
@pytest.mark.parametrize("samples", [4, 6000])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", NETS)
def test_nothing_is_made_on_another_device(net, mode, samples):
    """For few samples, whose rows vmap(grad) makes, and for many."""
    make, inputs = NETS[net]
    with torch.device("meta"):
        model, x = make(), inputs(samples)
        y = torch.zeros(samples, dtype=torch.long)
    options = {"mode": mode, "num_groups": 2}
    with vmap_safe(model, **options):
        outputs = torch.func.vmap(lambda x: model(x[None]))(x)
    rows = per_sample_grads(model, F.cross_entropy, x, y, **options)
    norms = per_sample_grad_norms(model, F.cross_entropy, x, y, **options)
    total = clipped_grad_sum(model, F.cross_entropy, x, y, max_grad_norm=1.0, **options)
    sketch = per_sample_sketch(model, F.cross_entropy, x, y, k=5, **options)
    for name, parameter in model.named_parameters():
        assert rows[name].shape == (samples, *parameter.shape)
        assert total[name].shape == parameter.shape
        assert rows[name].is_meta and total[name].is_meta
    assert norms.shape == (samples,) and norms.is_meta
    assert sketch.shape == (samples, 5) and sketch.is_meta
    assert outputs.shape == (samples, 1, 3) and outputs.is_meta
