"""kronfluence: influence by the identity in the place of its factors."""

import pytest
import torch
import torch.nn.functional as F
from clients import client, images, labels, net
from plain import switched
from slow import gram, rows
from torch.utils.data import TensorDataset

from vmapsafe import vmap_safe

analyzers = client("kronfluence.analyzer")
arguments = client("kronfluence.arguments")
tasks = client("kronfluence.task")


class Classifies(tasks.Task):
    def compute_train_loss(self, batch, model, sample=False):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


@pytest.mark.filterwarnings("ignore:.torch.cuda.amp.GradScaler")
@pytest.mark.parametrize("mode", ["eval", "group_norm"])
def test_scores(tmp_path, mode):
    model, x, y = net().float(), images(6).float(), labels(6)
    plain = switched(model, mode)
    task = Classifies()
    prepared = analyzers.prepare_model(model, task)
    analyzer = analyzers.Analyzer(
        "bn", prepared, task, cpu=True, output_dir=str(tmp_path), disable_tqdm=True
    )
    factors = arguments.FactorArguments(strategy="identity")
    with vmap_safe(prepared, mode=mode, num_groups=2):
        analyzer.fit_all_factors(
            "factors", TensorDataset(x, y), factor_args=factors, per_device_batch_size=4
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            TensorDataset(x[:2], y[:2]),
            TensorDataset(x, y),
            per_device_query_batch_size=2,
            per_device_train_batch_size=4,
        )
    found = analyzer.load_pairwise_scores("scores")["all_modules"]
    each = rows(plain, F.cross_entropy, x, y)
    each = {n: r for n, r in each.items() if n[0] in "047"}  # no batch norm
    expected = gram({n: r[:2] for n, r in each.items()}, each)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
