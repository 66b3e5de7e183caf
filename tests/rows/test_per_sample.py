"""per_sample_grads: rows equal those of one plain backward per sample."""

import pytest
import slow
import torch
import torch.nn.functional as F
from blocks import EACH_ALONE
from cases import CASES
from nets import small_mlp
from state import assert_same_state, everything
from torch import nn

from vmapsafe import per_sample_grads, vmap_safe
from vmapsafe.testing import assert_same


def mse(output, target):
    return F.mse_loss(output, target)


def total(output, target):
    return F.mse_loss(output, target, reduction="sum")


def problem(case):
    model = case.model()
    x = case.slices(4, 1)[:, 0]
    return model, x, torch.randn_like(model(x)).detach()


# One sample has one value a channel in these, which only "eval" can take.
ONE_VALUE = {"mlp", "tied weights"}
SLOW = [
    (case, mode)
    for case in CASES
    for mode in EACH_ALONE
    if case.name != "no affine" and (mode == "eval" or case.name not in ONE_VALUE)
]


@pytest.mark.parametrize("case,mode", SLOW, ids=str)
@pytest.mark.parametrize("loss_fn", [mse, total])
def test_rows(case, mode, loss_fn):
    """Row i is the gradient of sample i's loss, for a mean and for a sum."""
    model, x, y = problem(case)
    before = everything(model)
    rows = per_sample_grads(model, loss_fn, x, y, mode=mode, num_groups=2)
    assert_same_state(model, before)
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert_same(rows, slow.rows_in(model, mode, loss_fn, x, y))


@pytest.fixture
def net():
    return small_mlp(3, 4, 2)


X, Y = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])


def test_chosen_parameters_by_name(net):
    rows = per_sample_grads(net, F.cross_entropy, X, Y)
    some = per_sample_grads(net, F.cross_entropy, X, Y, params=["3.bias", "1.weight"])
    assert list(some) == ["3.bias", "1.weight"]
    assert_same(some, {name: rows[name] for name in some})


def test_parameters_at_other_values(net):
    """With a dict of tensors the gradient is taken there, not at the parameters."""
    other = {"3.weight": torch.randn(2, 4).double()}
    rows = per_sample_grads(net, F.cross_entropy, X, Y, params=other)
    with torch.no_grad():
        net[3].weight.copy_(other["3.weight"])
    expected = per_sample_grads(net, F.cross_entropy, X, Y, params=["3.weight"])
    assert_same(rows, expected)


def test_derivatives_of_rows(net):
    """Outer derivatives pass through a dict of tensors, and stop at the model's own."""

    def energy(weight):
        params = {"3.weight": weight}
        rows = per_sample_grads(net, F.cross_entropy, X, Y, params=params)
        return rows["3.weight"].square().sum()

    weight = net[3].weight.detach().clone()
    actual = torch.func.grad(energy)(weight)
    net.eval()
    total = 0
    for i in range(len(X)):
        loss = F.cross_entropy(net(X[i : i + 1]), Y[i : i + 1])
        (g,) = torch.autograd.grad(loss, net[3].weight, create_graph=True)
        total = total + g.square().sum()
    assert_same(actual, torch.autograd.grad(total, net[3].weight)[0])
    rows = per_sample_grads(net, F.cross_entropy, X, Y)
    assert not any(row.requires_grad for row in rows.values())


def test_frozen_parameters_are_left_out_and_tied_ones_appear_once(net):
    rows = per_sample_grads(net, F.cross_entropy, X, Y)
    net[0].requires_grad_(False)
    assert list(per_sample_grads(net, F.cross_entropy, X, Y)) == list(rows)[2:]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    tied[2].weight = tied[0].weight
    rows = per_sample_grads(tied, F.cross_entropy, X, Y)
    assert list(rows) == ["0.weight", "0.bias", "2.bias"]
    assert_same(rows, slow.rows(tied, F.cross_entropy, X, Y))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7])
def test_chunks(net, chunk_size):
    rows = per_sample_grads(net, F.cross_entropy, X, Y)
    chunked = per_sample_grads(net, F.cross_entropy, X, Y, chunk_size=chunk_size)
    assert_same(chunked, rows)


def test_aux(net):
    """aux has one row a sample, without the batch of one; trees and scalars."""

    def loss_fn(output, target):
        correct = (output.argmax(1) == target).double()
        return F.cross_entropy(output, target), {"logits": output, "ok": correct.sum()}

    rows, aux = per_sample_grads(net, loss_fn, X, Y, has_aux=True)
    assert_same(rows, per_sample_grads(net, F.cross_entropy, X, Y))
    net.eval()
    assert_same(aux["logits"], net(X).detach())
    assert_same(aux["ok"], (net(X).argmax(1) == Y).double())


def test_several_inputs():
    """A tuple is positional inputs of the model, a dict keyword inputs."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

        def forward(self, left, right):
            return self.a(left) * self.b(right).sin()

    model, left, right = Two(), X, torch.randn_like(X)
    rows = per_sample_grads(model, F.cross_entropy, (left, right), Y)
    by_name = {"right": right, "left": left}
    assert_same(rows, per_sample_grads(model, F.cross_entropy, by_name, Y))
    for i in range(len(X)):
        loss = F.cross_entropy(model(left[i : i + 1], right[i : i + 1]), Y[i : i + 1])
        for row, g in zip(rows.values(), torch.autograd.grad(loss, model.parameters())):
            assert_same(row[i], g)


def test_empty_batch(net):
    """(0, *shape), with aux and in chunks too."""
    rows = per_sample_grads(net, F.cross_entropy, X[:0], Y[:0], chunk_size=2)
    for name, p in net.named_parameters():
        assert rows[name].shape == (0, *p.shape) and rows[name].dtype == p.dtype
    _, aux = per_sample_grads(
        net, lambda o, y: (o.sum(), o), X[:0], Y[:0], has_aux=True
    )
    assert aux.shape == (0, 2)


def test_dropout():
    """randomness is vmap's: reproducible under a seed, different from row to row."""
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(), nn.Linear(64, 2)).double()

    def rows(randomness):
        torch.manual_seed(5)
        x = X[:1].expand(5, 3)
        return per_sample_grads(
            model, F.cross_entropy, x, Y * 0, randomness=randomness
        )["0.bias"]

    same, different = rows("same"), rows("different")
    assert_same(same, same[:1].expand_as(same))
    assert not torch.equal(different[0], different[1])
    assert torch.equal(different, rows("different"))
    with pytest.raises(RuntimeError, match="randomness") as caught:
        rows("error")
    (note,) = caught.value.__notes__
    assert "'1' (Dropout)" in note and 'randomness="different"' in note


def test_writes_nothing_and_fits_into_a_block(net):
    """No .grad is written; an open block, of any mode, does not change the rows."""
    rows = per_sample_grads(net, F.cross_entropy, X, Y)
    assert all(p.grad is None for p in net.parameters())
    with vmap_safe(net, mode="no_running_stats"):
        assert_same(per_sample_grads(net, F.cross_entropy, X, Y), rows)
        assert net[1].training
    assert_same(
        per_sample_grads(torch.compile(net, backend="eager"), F.cross_entropy, X, Y),
        rows,
    )


@pytest.mark.parametrize("fast", [True, False])
def test_model_comes_back_after_an_error(fast):
    """The parameters are in their places, also those of a module with two names."""
    shared = nn.Linear(3, 3).double()
    net = nn.Sequential(shared, nn.BatchNorm1d(3).double(), shared)
    net(X)  # has statistics now
    before = everything(net)
    parameters = [*net.parameters()]

    def fails(module, args, output):
        assert not any(p is q for p in net.parameters() for q in parameters)
        raise KeyboardInterrupt

    with net[1].register_forward_hook(fails), pytest.raises(KeyboardInterrupt):
        per_sample_grads(net, F.cross_entropy, X, Y, fast=fast)
    assert_same_state(net, before)
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_torchscript(net):
    scripted = torch.jit.script(net)
    before = everything(scripted)
    rows = per_sample_grads(scripted, F.cross_entropy, X, Y)
    assert_same(rows, per_sample_grads(net, F.cross_entropy, X, Y))
    assert_same_state(scripted, before)


ERRORS = [
    (lambda net: per_sample_grads(net, mse), "got no batch"),
    (
        lambda net: per_sample_grads(net, mse, X, Y[:3]),
        "batch sizes disagree: batch[0] has shape (5, 3), batch[1] has shape (3,)",
    ),
    (
        lambda net: per_sample_grads(net, mse, X, 3.0),
        "batch[1] holds 3.0, a float, which has no batch dimension",
    ),
    (
        lambda net: per_sample_grads(
            net, lambda o, y: F.mse_loss(o, y, reduction="none"), X, X[:, :2]
        ),
        "loss_fn gave (1, 2) for a batch of one instead of a tensor without dimensions",
    ),
    (
        lambda net: per_sample_grads(net, lambda o, y: 1.0, X, Y),
        "loss_fn gave float for a batch of one",
    ),
    (
        lambda net: per_sample_grads(net, mse, X, Y, params=["nope"]),
        "Sequential has no parameter 'nope'",
    ),
    (
        lambda net: per_sample_grads(net.requires_grad_(False), mse, X, Y),
        "no parameter of Sequential requires a gradient",
    ),
    (
        lambda net: per_sample_grads(net, mse, X, Y, mode="training"),
        "unknown mode 'training'",
    ),
]


@pytest.mark.parametrize("call,text", ERRORS, ids=[text for _, text in ERRORS])
def test_errors(net, call, text):
    before = everything(net)[0]
    with pytest.raises(ValueError) as caught:
        call(net)
    assert text in str(caught.value)
    assert everything(net)[0] == before
