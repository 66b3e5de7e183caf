"""TRAK: its features are projected gradients of the network in eval mode."""

import pytest
import torch
from clients import client, images, labels, net
from plain import switched
from slow import rows

from vmapsafe import vmap_safe

trak = client("trak")
projectors = client("trak.projectors")


def margin(out, y):
    """TRAK's own function of the output, written out."""
    others = torch.cat([out[:, :y], out[:, y + 1 :]], 1)
    return out[:, y].sum() - others.logsumexp(1).sum()


@pytest.mark.parametrize("mode", ["eval", "group_norm"])
def test_features(tmp_path, mode):
    model, x, y = net(), images(6), labels(6)
    kept = {name: b.clone() for name, b in model.named_buffers()}
    plain = switched(model, mode)
    size = sum(p.numel() for p in model.parameters())
    projector = projectors.BasicProjector(
        grad_dim=size,
        proj_dim=8,
        seed=0,
        proj_type="normal",
        device="cpu",
        dtype=torch.float64,
    )
    traker = trak.TRAKer(
        model,
        "image_classification",
        train_set_size=6,
        save_dir=tmp_path,
        device="cpu",
        projector=projector,
        use_half_precision=False,
    )
    with vmap_safe(model, mode=mode, num_groups=2):
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize([x, y], num_samples=6)
    found = torch.tensor(traker.saver.current_store["grads"])
    flat = torch.cat([r.flatten(1) for r in rows(plain, margin, x, y).values()], 1)
    expected = flat @ projector.proj_matrix / traker.normalize_factor
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, kept[name])
