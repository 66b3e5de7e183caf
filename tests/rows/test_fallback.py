"""fallback="loop": the results are those of a loop of plain backward passes."""

import random
import warnings

import numpy as np
import pytest
import slow
import torch
import torch.nn.functional as F
from blocks import EACH_ALONE
from refusing import CHECKPOINTS, LAYERS, Refused, around, numbers, refusing, unchecked
from state import assert_same_state, everything
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from wanted import Cosine, assert_exact, truth

from vmapsafe import (
    FallbackWarning,
    VmapSafeRuntimeError,
    VmapSafeValueError,
    clipped_grad_sum,
    over,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
)
from vmapsafe import quantities as q
from vmapsafe._block import loop
from vmapsafe.testing import assert_same

pytestmark = pytest.mark.filterwarnings("ignore::vmapsafe.FallbackWarning")


def mse(output, target):
    return F.mse_loss(output, target)


def total(output):
    return output.sum()


X, Y = numbers(5, 2, 5, 5, seed=1), numbers(5, 3, seed=2)
OTHER = numbers(3, 2, 5, 5, seed=3), numbers(3, 3, seed=4)
LOOP = {"fallback": "loop"}


def everything_wanted(model):
    named = {n: p for n, p in model.named_parameters()}
    weights = numbers(5)
    weights[1] = 0
    return {
        "losses": q.Losses(),
        "norms": q.Norms(),
        "norms by parameter": q.Norms(per_parameter=True),
        "sum": q.Sum(),
        "squares": q.SumOfSquares(),
        "clipped": q.ClippedSum(1.0),
        "clipped by groups": q.ClippedSum({"0.*": 0.5, "*": 1.0}),
        "weighted": q.WeightedSum(weights),
        "automatic": q.WeightedSum(lambda norms: 1 / (norms + 0.1)),
        "gram": q.Gram(),
        "gram with another": q.Gram(other=OTHER),
        "dots": q.Dots({n: numbers(2, *p.shape) for n, p in named.items()}),
        "sketch": q.Sketch(k=7),
        "kronecker sketch": q.Sketch(k=12, kind="kronecker"),
        "rows": q.Rows(),
        "cosine": Cosine(),
    }


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("name", [*LAYERS, *CHECKPOINTS])
def test_exact(name, mode):
    """Every quantity, alone and together, whatever the chunks."""
    model = refusing(name)
    wanted = everything_wanted(model)
    known = truth(unchecked(model), mode, "", mse, X, Y)
    known.others = truth(unchecked(model), mode, "", mse, *OTHER).rows
    options = {"mode": mode, "num_groups": 2}
    if name not in CHECKPOINTS:
        with pytest.raises(RuntimeError):
            per_sample(model, mse, X, Y, want=q.Norms(), **options)
        options |= LOOP
    before = everything(model)
    for quantity in wanted.values():
        found = per_sample(model, mse, X, Y, want=quantity, **options)
        assert_exact(quantity, found, known)
    for chunk_size in (None, 1, 2, 7, "auto"):
        asked = dict(wanted)
        if chunk_size == "auto":
            del asked["gram"], asked["gram with another"]
        found = per_sample(
            model, mse, X, Y, want=asked, chunk_size=chunk_size, **options
        )
        assert list(found) == list(asked)
        for key, quantity in asked.items():
            assert_exact(quantity, found[key], known)
    assert_same_state(model, before)


@pytest.mark.parametrize("name", ["item", *CHECKPOINTS])
def test_short_forms(name):
    model = refusing(name)
    known = truth(unchecked(model), "eval", "", mse, X, Y)
    given = model, mse, X, Y
    assert_same(per_sample_grads(*given, **LOOP), known.rows)
    norms = slow.norms(known.rows)
    assert_same(per_sample_grad_norms(*given, **LOOP), norms)
    clipped = slow.clipped(known.rows, 0.1)
    assert_same(clipped_grad_sum(*given, max_grad_norm=0.1, **LOOP), clipped)
    sketch = slow.sketch(known.rows, 8)
    assert_same(per_sample_sketch(*given, k=8, **LOOP), sketch)


def test_into_memory():
    model = refusing("item")
    rows = slow.rows_in(model, "eval", mse, X, Y)
    out = {name: torch.full_like(row, torch.nan) for name, row in rows.items()}
    assert per_sample_grads(model, mse, X, Y, out=out, **LOOP) is out
    assert_same(out, rows)


def test_an_empty_batch():
    model = refusing("item")
    found = per_sample(model, mse, X[:0], Y[:0], want=everything_wanted_of_none, **LOOP)
    assert found["rows"]["0.weight"].shape == (0, 4, 2, 2, 2)
    assert found["norms"].shape == (0,)
    assert not found["sum"]["0.weight"].any()


everything_wanted_of_none = {"rows": q.Rows(), "norms": q.Norms(), "sum": q.Sum()}


def test_slices_that_are_batches():
    model = refusing("condition")
    x, y = numbers(3, 4, 2, 5, 5), numbers(3, 4, 3)
    rows = slow.rows_in(model, "eval", mse, x, y, slices=True)
    found = per_sample_grads(model, mse, x, y, keep_batch_dim=False, **LOOP)
    assert_same(found, rows)


@pytest.mark.parametrize("keep", [True, False])
def test_aux(keep):
    model = refusing("item")
    x, y = (X, Y) if keep else (X[:, None], Y[:, None])

    def loss_fn(output, target):
        return mse(output, target), {"output": output, "loss": mse(output, target)}

    norms, aux = per_sample_grad_norms(
        model, loss_fn, x, y, has_aux=True, keep_batch_dim=keep, **LOOP
    )
    outputs = torch.cat([model.eval()(one) for one in X.split(1)])
    outputs = outputs if keep else outputs[:, None]
    assert_same(aux["output"], outputs.detach())
    assert_same(aux["loss"], (outputs - y).square().mean([*range(1, y.dim())]).detach())
    assert norms.shape == (5,) and not aux["output"].requires_grad


def test_aux_that_is_not_a_tensor():
    with pytest.raises(VmapSafeValueError, match="aux holds 3"):
        per_sample_grads(
            refusing("item"), lambda *a: (mse(*a), 3), X, Y, has_aux=True, **LOOP
        )
    with pytest.raises(VmapSafeValueError, match="a slice gives 3, an int"):
        per_sample_grads(
            refusing("item"),
            lambda *a: (mse(*a), 3),
            X[:, None],
            Y[:, None],
            has_aux=True,
            keep_batch_dim=False,
            **LOOP,
        )


def test_trees_of_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x, scale):
            return self.a(x) * scale * x.sum().item()

    net, x, scale = Two().double(), numbers(4, 3), numbers(4, 1, seed=6)
    rows = {n: [] for n, _ in net.named_parameters()}
    for i in range(4):
        net.zero_grad()
        net(x[i : i + 1], scale[i : i + 1]).square().sum().backward()
        for n, p in net.named_parameters():
            rows[n].append(p.grad.clone())
    net.zero_grad()
    rows = {n: torch.stack(row) for n, row in rows.items()}
    for inputs in ((x, scale), {"scale": scale, "x": x}):
        found = per_sample_grads(net, lambda o: o.square().sum(), inputs, **LOOP)
        assert_same(found, rows)


# -- Parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["item", *CHECKPOINTS])
def test_chosen_parameters(name):
    """By name, frozen ones too; and at other values, of parameters and of all."""
    model = refusing(name)
    plain = unchecked(model)
    rows = slow.rows_in(plain, "eval", mse, X, Y)
    names = ["4.bias", "0.weight"]
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        found = per_sample_grads(model, mse, X, Y, params=names, **LOOP)
    assert_same(found, {n: rows[n] for n in names})
    assert all(p.grad is None for p in model.parameters())
    rest = {n: row for n, row in rows.items() if n != "0.weight"}
    assert_same(per_sample_grads(model, mse, X, Y, **LOOP), rest)
    assert all(p.grad is None for p in model.parameters())

    model[0].weight.requires_grad_(True)
    other = {n: numbers(*p.shape, seed=7) for n, p in plain.named_parameters()}
    plain.load_state_dict(other, strict=False)
    rows = slow.rows_in(plain, "eval", mse, X, Y)
    assert_same(per_sample_grads(model, mse, X, Y, params=other, **LOOP), rows)
    plain[1].running_mean += 1
    rows = slow.rows_in(plain, "eval", mse, X, Y)
    state = plain.state_dict()
    assert_same(per_sample_grads(model, mse, X, Y, params=state, **LOOP), rows)


class ByHand(nn.Module):
    """Reads its weight from a list, past the modules, in a checkpoint if asked."""

    def __init__(self, how):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.held = [self.conv.weight]
        self.how = how

    def run(self, x):
        return torch.tanh(F.conv2d(x, self.held[0]) + self.conv(x))

    def forward(self, x):
        if self.how == "item":
            return self.run(x) * x.mean().item()
        if self.how == "plain":
            return self.run(x)
        return checkpoint(self.run, x, use_reentrant=self.how == "reentrant")


@pytest.mark.parametrize("how", ["item", "reentrant", "not reentrant"])
def test_parameters_read_past_the_modules(how):
    """Backward runs a checkpointed function again, with the copies in it too."""
    model = around(ByHand(how))
    other = {n: numbers(*p.shape, seed=7) for n, p in model.named_parameters()}
    plain = around(ByHand("item" if how == "item" else "plain"))
    plain.load_state_dict({**model.state_dict(), **other})
    rows = slow.rows_in(plain, "eval", mse, X, Y)
    for params in (other, ["2.conv.weight", "0.bias"]):
        if isinstance(params, list):
            model.load_state_dict(plain.state_dict())
        with torch.no_grad():
            found = per_sample_grads(model, mse, X, Y, params=params, **LOOP)
        assert_same(found, {n: rows[n] for n in params})
    assert all(p.grad is None for p in model.parameters())


def test_tied_parameters_and_those_of_no_use():
    both = nn.Sequential(*[Refused(lambda x: x * x.mean().item()) for _ in range(2)])
    both[1].weight = both[0].weight
    both[0].unused = nn.Parameter(numbers(3))
    model = around(both)
    rows = slow.rows(model.eval(), mse, X, Y)
    found = per_sample_grads(model, mse, X, Y, **LOOP)
    assert list(found) == list(rows) and "2.1.weight" not in found
    assert_same(found, rows)
    assert not found["2.0.unused"].any()


def test_a_loss_that_reads_parameters():
    model = refusing("item")

    def loss_fn(output, target):
        return mse(output, target) + model[2].weight.square().sum()

    rows = slow.rows_in(model, "eval", mse, X, Y)
    rows["2.weight"] = rows["2.weight"] + 2 * model[2].weight.detach()
    assert_same(per_sample_grads(model, loss_fn, X, Y, **LOOP), rows)


def test_a_parameter_that_the_code_writes():
    model = refusing("item")

    def loss_fn(output, target):
        with torch.no_grad():
            model[4].bias.add_(1)
        return mse(output, target)

    before = everything(model)
    with pytest.raises(VmapSafeRuntimeError, match="writes on the parameter '4.bias'"):
        per_sample_grads(model, loss_fn, X, Y, **LOOP)
    assert_same_state(model, before)


class InAdvance(nn.Module):
    """Uses a view of its weight that was made before."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 1, dtype=torch.float64))
        self.views = [self.weight.view(4, 1, 1)]

    def forward(self, x):
        return x * self.views[0] * x.mean().item()


def test_a_way_past_the_modules():
    model = around(InAdvance())
    with pytest.raises(VmapSafeRuntimeError, match="depends on '2.weight' by a way"):
        per_sample_grads(model, mse, X, Y, **LOOP)


class Words(nn.Module):
    def __init__(self, reads, **options):
        super().__init__()
        self.words = nn.Embedding(7, 3, **options)
        self.reads = reads

    def forward(self, x):
        y = self.words(x)
        if self.reads:
            y = y + self.words.weight.sum()
        return y * y.sum().item()


def test_embeddings():
    """Sparse gradients give rows as others do; a weight that is renormalised is not
    written, and may not be used otherwise."""
    x = torch.tensor([[1, 2], [2, 2], [0, 6]])
    net = Words(False, sparse=True).double()
    rows = per_sample_grads(net, total, x, **LOOP)["words.weight"]
    for row, one in zip(rows, x.split(1)):
        net.zero_grad()
        total(net(one)).backward()
        assert_same(row, net.words.weight.grad.to_dense())
    net = Words(True, max_norm=0.5).double()
    with pytest.raises(VmapSafeRuntimeError, match="embedding with max_norm"):
        per_sample_grads(net, total, x, **LOOP)
    net.reads = False
    before = net.words.weight.detach().clone()
    rows = per_sample_grads(net, total, x, **LOOP)["words.weight"]
    assert torch.equal(net.words.weight, before)
    plain = Words(False).double()
    plain.words.weight.data = before / before.norm(dim=1, keepdim=True).clamp(min=0.5)
    plain.words.weight.data *= 0.5
    assert_same(rows, slow.rows(plain, total, x)["words.weight"], rtol=1e-5)


# -- Derivatives of rows, and other contexts -------------------------------------------


def slow_energy(model, x, weight):
    total = 0
    for i in range(len(x)):
        output = torch.func.functional_call(model, {"4.weight": weight}, x[i : i + 1])
        loss = mse(output, Y[i : i + 1])
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        total = total + grad.pow(3).sum()
    return total


@pytest.mark.parametrize("name", ["item", "condition", "old autograd.Function"])
def test_derivatives_of_rows(name):
    """By plain autograd, by the parameters that were passed and by the batch."""
    model = refusing(name).eval()
    x = X.clone().requires_grad_()
    weight = model[4].weight.detach().clone().requires_grad_()
    rows = per_sample_grads(model, mse, x, Y, params={"4.weight": weight}, **LOOP)
    found = torch.autograd.grad(rows["4.weight"].pow(3).sum(), (weight, x))
    right = torch.autograd.grad(slow_energy(model, x, weight), (weight, x))
    assert_same(found, right)
    norms = per_sample_grad_norms(model, mse, x, Y, **LOOP)
    assert not norms.requires_grad
    assert x.grad is None and weight.grad is None


def test_derivatives_that_a_reentrant_checkpoint_does_not_have():
    model = refusing("checkpoint, reentrant")
    with pytest.raises(VmapSafeRuntimeError, match="under torch.no_grad()"):
        per_sample_grads(model, mse, X, Y, params=["0.weight"])
    norms = per_sample_grad_norms(model, mse, X, Y, params=["0.weight"])
    rows = slow.rows_in(unchecked(model), "eval", mse, X, Y)
    assert_same(norms, slow.norms({"0.weight": rows["0.weight"]}))


def test_derivatives_by_what_a_loss_holds():
    model, factor = refusing("item").eval(), torch.tensor(2.0, requires_grad=True)

    def loss_fn(output, target):
        return mse(output, target) * factor.square()

    rows = per_sample_grads(model, loss_fn, X, Y, **LOOP)
    once = slow.rows_in(model, "eval", mse, X, Y)
    assert_same(rows["0.weight"].detach(), 4 * once["0.weight"])
    (found,) = torch.autograd.grad(rows["0.weight"].sum(), factor)
    assert_same(found, (4 * once["0.weight"].sum()).float())
    with torch.no_grad():
        assert not per_sample_grads(model, loss_fn, X, Y, **LOOP)[
            "0.weight"
        ].requires_grad
    assert factor.grad is None


def test_inside_a_transform():
    model = refusing("item").eval()

    def energy(weight):
        params = {"4.weight": weight}
        rows = per_sample_grads(model, mse, X, Y, params=params, **LOOP)
        return rows["4.weight"].pow(3).sum()

    weight = model[4].weight.detach().clone().requires_grad_()
    right = torch.autograd.grad(slow_energy(model, X, weight), weight)[0]
    assert_same(torch.func.grad(energy)(weight.detach()), right)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["item", *CHECKPOINTS])
def test_without_gradients_outside(context, name):
    model = refusing(name)
    rows = slow.rows_in(unchecked(model), "eval", mse, X, Y)
    with context():
        found = per_sample_grads(model, mse, X.clone(), Y.clone(), **LOOP)
        norms = per_sample_grad_norms(model, mse, X, Y, **LOOP)
    assert_same({n: row.clone() for n, row in found.items()}, rows)
    assert_same(norms.clone(), slow.norms(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    model = refusing("condition").to(dtype)
    x, y = X.to(dtype), Y.to(dtype)
    found = per_sample(model, mse, x, y, want={"r": q.Rows(), "n": q.Norms()}, **LOOP)
    rows = slow.rows_in(model, "eval", mse, x, y)
    for name, row in found["r"].items():
        torch.testing.assert_close(row, rows[name])
    assert found["n"].dtype == torch.float32


def test_autocast():
    model = refusing("condition").float()
    with torch.autocast("cpu", torch.bfloat16):
        rows = per_sample_grads(model, mse, X.float(), Y.float(), **LOOP)
    exact = slow.rows_in(model, "eval", mse, X.float(), Y.float())
    for name, row in rows.items():
        assert row.dtype == torch.float32
        torch.testing.assert_close(row, exact[name], rtol=0.1, atol=0.02)


class Watching(torch.autograd.Function):
    """Notes whether autocast is on in backward."""

    seen = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Watching.seen.append(torch.is_autocast_enabled("cpu"))
        return grad


def test_backward_is_not_under_autocast():
    model = around(Refused(Watching.apply)).float()
    Watching.seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        per_sample_grads(model, mse, X.float(), Y.float(), **LOOP)
    assert Watching.seen == [False] * 5


def test_a_batch_that_requires_a_gradient():
    """Its gradient is left alone, also where backward has to reach all leaves."""
    for name in ("item", *CHECKPOINTS):
        model, x = refusing(name), X.clone().requires_grad_()
        rows = slow.rows_in(unchecked(model), "eval", mse, X, Y)
        norms = per_sample_grad_norms(model, mse, x, Y, **LOOP)
        assert_same(norms, slow.norms(rows))
        assert x.grad is None


class Sizes(q.PerSample):
    """Notes how many samples come at a time."""

    def __init__(self):
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "gather", None)

    def part(self, call, start, stop):
        self.seen.append(stop - start)
        return q.Norms().part(call, start, stop)


def test_how_many_samples_run():
    """One at a time takes little memory, and each runs once."""
    model, calls = refusing("item"), []
    item = model[2].function
    model[2].function = lambda x: calls.append(x.shape) or item(x)
    sizes = Sizes()
    per_sample(model, mse, X, Y, want=sizes, **LOOP)
    assert sizes.seen[-5:] == [1] * 5
    for quantity in (q.Norms(), q.Gram(), Cosine(), q.Rows(), q.ClippedSum(1.0)):
        calls.clear()
        per_sample(model, mse, X, Y, want=quantity, **LOOP)
        assert sum(shape[0] == 1 for shape in calls) == 5 + 1  # and under vmap


def test_over(tmp_path):
    model = refusing("mask")
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    known = slow.rows_in(model, "eval", mse, X, Y)
    norms = over(loader, per_sample_grad_norms, model, mse, **LOOP)
    assert_same(torch.cat([*norms]), slow.norms(known))
    saved = norms.save(tmp_path)
    assert_same(torch.from_numpy(np.array(saved)), slow.norms(known))


# -- Random numbers, and what the attempt had done -------------------------------------


class Dropped(nn.Module):
    """Draws before vmap refuses it, and after that."""

    def __init__(self, draw=F.dropout, last=F.dropout):
        super().__init__()
        self.w = nn.Parameter(torch.ones(60, dtype=torch.float64))
        self.draw, self.last = draw, last

    def forward(self, x):
        x = self.draw(x * self.w)
        return self.last(x * (1 + 0 * x.sum().item()))


ONES = torch.ones(6, 60, dtype=torch.float64)


def by_torch_loop(model, randomness):
    rows = []
    state = torch.get_rng_state()
    for one in ONES.split(1):
        if randomness == "same":
            torch.set_rng_state(state)
        rows.append(torch.autograd.grad(model(one).sum(), model.w)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_draws(randomness, chunk_size):
    """As of a loop that begins where the call did; and where that ends, so do others.
    A second look draws again what the first one did."""
    model = Dropped()
    options = {"randomness": randomness, "chunk_size": chunk_size, **LOOP}
    torch.manual_seed(3)
    rows = by_torch_loop(model, randomness)
    after = torch.rand(1)
    known = truth_of(rows)
    for quantity in (q.Rows(), q.Norms(), Cosine(), q.Gram(), q.Sum()):
        torch.manual_seed(3)
        found = per_sample(model, total, ONES, want=quantity, **options)
        assert_exact(quantity, found, known)
        assert torch.equal(torch.rand(1), after)
    assert rows[0].equal(rows[1]) == (randomness == "same")


def truth_of(rows):
    from wanted import Truth

    return Truth({"w": rows}, rows.sum(1))


@pytest.mark.parametrize(
    "draw", [random.random, np.random.random], ids=["python", "numpy"]
)
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_draws_of_python_and_numpy(draw, randomness):
    """Shared by all samples as under vmap, which runs the code once; but "different"
    has one for each. The attempt's own is put back."""
    model = Dropped(lambda x: x * draw(), lambda x: x)
    random.seed(0)
    np.random.seed(0)
    each = [draw() for _ in range(6)]
    if randomness != "different":
        each = each[:1] * 6
    for chunk_size in (None, 2):
        random.seed(0)
        np.random.seed(0)
        found = per_sample_grads(
            model, total, ONES, randomness=randomness, chunk_size=chunk_size, **LOOP
        )
        assert_same(found["w"][:, 0], torch.tensor(each, dtype=torch.float64))


@pytest.mark.parametrize("first", [True, False])
def test_a_draw_in_mode_error(first):
    """It raises, before vmap has refused the code and after that."""

    def same(x):
        return x

    model = Dropped(F.dropout if first else same, same if first else F.dropout)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="randomness error mode") as caught:
        per_sample_grads(model, total, ONES, **LOOP)
    assert isinstance(caught.value, VmapSafeRuntimeError) != first
    assert torch.equal(torch.get_rng_state(), state)


class Loss(nn.Module):
    """Counts its calls in a buffer, which no block covers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output, target):
        self.calls += 1
        return mse(output, target) * (1 + 0 * output.sum().item())


def test_buffers_of_the_loss_are_as_before():
    model, loss_fn = refusing("item"), Loss()
    model[2].function = torch.tanh  # only the loss is refused
    per_sample_grads(model, loss_fn, X, Y, **LOOP)
    assert loss_fn.calls == 5  # of the loop
    per_sample_grads(model, lambda *args: loss_fn(*args), X, Y, **LOOP)
    assert loss_fn.calls == 10


def test_a_batch_that_the_attempt_has_written():
    class Written(nn.Linear):
        def forward(self, x):
            x += 1
            return super().forward(x) * x.sum().item()

    net, x = Written(4, 2).double(), numbers(3, 4)
    with pytest.raises(VmapSafeRuntimeError, match="already written on its input"):
        per_sample_grads(net, total, x, **LOOP)


# -- What does not start a loop --------------------------------------------------------


def test_refused_in_sync():
    model = refusing("item")
    for rows in ("contribution", "jacobian", "detached"):
        with pytest.raises(VmapSafeValueError, match="share their statistics"):
            per_sample_grads(model, mse, X, Y, mode="sync", rows=rows, **LOOP)
    for name in CHECKPOINTS:
        with pytest.raises(RuntimeError) as caught:
            per_sample_grads(refusing(name), mse, X, Y, mode="sync")
        assert "fallback=" not in caught.value.__notes__[0]


def test_unknown():
    with pytest.raises(VmapSafeValueError, match="unknown fallback 'slow'"):
        per_sample_grads(refusing("item"), mse, X, Y, fallback="slow")


def test_errors_of_the_code_itself():
    """They are raised from the first forward, and the code does not run again."""
    for error in (
        RuntimeError("vmap: data-dependent control flow"),
        ValueError("calling .item() on a Tensor"),
        KeyError("w"),
    ):
        calls = []

        def fails(x, error=error, calls=calls):
            calls.append(x.shape)
            raise error

        with pytest.raises(type(error)) as caught:
            per_sample_grads(around(Refused(torch.tanh)), mse, X, Y)
            model = around(Refused(torch.tanh))
            model[2].function = fails
            per_sample_grads(model, mse, X, Y, **LOOP)
        assert caught.value is error
        assert len(calls) <= 2  # as without a fallback: as one batch, and under vmap


def test_errors_about_shapes():
    model = refusing("item")
    with pytest.raises(RuntimeError, match="shape|size"):
        per_sample_grads(model, mse, X[:, :1], Y, **LOOP)


def test_a_loop_raises_its_own_error():
    def fails(x):
        if x.sum().item() != 0:
            raise KeyError("negative")
        return x

    model = around(Refused(torch.tanh))
    model[2].function = fails
    with pytest.raises(KeyError, match="negative") as caught:
        per_sample_grads(model, mse, X, Y, **LOOP)
    assert caught.value.__context__ is None


# -- Words -----------------------------------------------------------------------------


def test_one_warning():
    """It names the layer and the reason, once for each class."""

    class Net(nn.Sequential):
        pass

    def net():
        return Net(*refusing("mask"))

    with pytest.warns(FallbackWarning) as caught:
        per_sample_grads(net(), mse, X, Y, **LOOP)
        per_sample_grad_norms(net(), mse, X, Y, **LOOP)
    (warning,) = caught
    assert str(warning.message).startswith(
        "per_sample_grads(...): vmap cannot run '2' (Refused): it makes a shape of "
        "values, as a boolean mask does. So the slices run one after another"
    )
    assert warning.filename == __file__

    model = net()
    model[2].function = refusing("item")[2].function
    with pytest.warns(FallbackWarning, match="value of a tensor, as .item()"):
        per_sample_grads(model, mse, X, Y, **LOOP)


def test_no_warning_where_vmap_runs_and_of_checkpoints():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        per_sample_grads(around(Refused(torch.tanh)), mse, X, Y, **LOOP)
        for name in CHECKPOINTS:
            per_sample_grads(refusing(name), mse, X, Y, **LOOP)
            per_sample_grads(refusing(name), mse, X, Y)


def test_errors_name_the_option():
    with pytest.raises(RuntimeError) as caught:
        per_sample_grads(refusing("item"), mse, X, Y)
    (note,) = caught.value.__notes__
    assert note.endswith(
        'Or pass fallback="loop" to batched, or to per_sample and its short forms: '
        "they then loop over the slices."
    )


def test_vmap_is_left_where_it_runs(monkeypatch):
    """A fallback costs nothing where there is nothing to fall back from."""

    def never(*args):
        raise AssertionError

    monkeypatch.setattr(loop, "in_turn", never)
    model = around(Refused(torch.tanh))
    rows = slow.rows_in(model, "eval", mse, X, Y)
    assert_same(per_sample_grads(model, mse, X, Y, **LOOP), rows)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_draws_in_a_checkpoint(reentrant, randomness):
    """Backward draws again what forward drew."""

    def drawn(x):
        return checkpoint(F.dropout, x.tanh(), use_reentrant=reentrant)

    model = Dropped(drawn, lambda x: x)
    torch.manual_seed(3)
    plain = Dropped(lambda x: F.dropout(x.tanh()), lambda x: x)
    rows = by_torch_loop(plain, randomness)
    after = torch.rand(1)
    torch.manual_seed(3)
    found = per_sample_grads(model, total, ONES, randomness=randomness, **LOOP)
    assert_same(found["w"], rows)
    assert torch.equal(torch.rand(1), after)
