"""Norms, clipped sums and out=, against a Python loop of plain backward passes."""

import copy
import gc

import pytest
import slow
import torch
import torch.nn.functional as F
from measured import change_regimes, take_regimes_of_a_gpu
from nets import CASES, NETS, SYNC, conv, image, images, mse, net, problem, small_mlp
from state import assert_same_state, everything
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmapsafe import (
    clipped_grad_sum,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
)
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe.rules import convolution, formulas
from vmapsafe.testing import assert_same


# torch's weight norm, under vmap
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "measured", ["as it is", "as a GPU", "small pieces", "one by one"]
)
@pytest.mark.parametrize("name,mode", CASES)
def test_against_the_loop(name, mode, measured, monkeypatch):
    """Norms, norms by parameter, clipped sums and rows into given memory; also on a
    with the regimes of a GPU, and convolutions by a call a sample."""
    if measured in ("as a GPU", "small pieces"):
        take_regimes_of_a_gpu(monkeypatch)
    if measured == "small pieces":
        change_regimes(monkeypatch, formulas={"piece": 10})
    if measured == "one by one":
        one_by_one = {"winners": (), "one_by_one": 0}
        change_regimes(monkeypatch, convolution=one_by_one)
    model, x, y = problem(name)
    expected = slow.rows_in(model, mode, mse, x, y)
    before = everything(model)
    options = {"mode": mode, "num_groups": 2}
    assert_same(
        per_sample_grad_norms(model, mse, x, y, **options), slow.norms(expected)
    )
    by_name = per_sample_grad_norms(model, mse, x, y, per_parameter=True, **options)
    assert list(by_name) == list(expected)
    for key, rows in expected.items():
        assert_same(by_name[key], rows.flatten(1).norm(dim=1))
    most = float(slow.norms(expected).median())
    for chunk_size in (None, 2):
        total = clipped_grad_sum(
            model, mse, x, y, max_grad_norm=most, chunk_size=chunk_size, **options
        )
        assert_same(total, slow.clipped(expected, most))
        assert not any(t.requires_grad for t in total.values())
    out = {key: torch.full_like(rows, torch.nan) for key, rows in expected.items()}
    for chunk_size in (2, None):
        found = per_sample_grads(
            model, mse, x, y, out=out, chunk_size=chunk_size, **options
        )
        assert found is out
        assert_same(found, expected)
    assert_same(per_sample_grads(model, mse, x, y, **options), expected)
    assert_same_state(model, before)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", NETS)
def test_memory_of_rows(name):
    """It is contiguous and not shared, so that rows can be overwritten or be out=."""
    model, x, y = problem(name)
    rows = per_sample_grads(model, mse, x, y)
    given = [x, y, *model.parameters(), *model.buffers()]
    storages = [t.untyped_storage().data_ptr() for t in (*given, *rows.values())]
    assert len({*storages} - {0}) == len([s for s in storages if s])
    assert all(row.is_contiguous() for row in rows.values())
    kept = {n: row.fill_(torch.nan) for n, row in rows.items()}
    again = per_sample_grads(model, mse, x, y, out=rows)
    assert all(again[n] is kept[n] for n in kept)
    assert_same(again, per_sample_grads(model, mse, x, y))


@pytest.mark.parametrize(
    "place, said",
    [
        (lambda m, x, rows: rows["1.bias"], r"out\['1.bias'\]"),
        (lambda m, x, rows: rows["0.weight"].view(-1)[2:5].view(1, 3), "0.weight"),
        (lambda m, x, rows: m[1].weight.data[None], "a parameter or buffer"),
        (lambda m, x, rows: m[1].running_mean[None], "'1.running_mean' of the model"),
        (lambda m, x, rows: x.view(-1)[1:4].view(1, 3), "a tensor of the batch"),
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_rows_are_not_written_over_what_is_read(place, said, chunk_size):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    x, y = torch.randn(1, 4).double(), torch.randn(1, 3).double()
    flat = torch.randn(2 * 21).double()  # disjoint parts of one piece of memory will do
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    parts = iter(flat[:21].split([*sizes.values()]))
    rows = {n: next(parts).view(1, *p.shape) for n, p in model.named_parameters()}
    model(flat[21:].view(7, 3)[:, :1].expand(7, 4))
    before = copy.deepcopy((model.state_dict(), x, y))
    per_sample_grads(model, mse, x, y, out=rows, chunk_size=chunk_size)
    shared = {**rows, "1.weight": place(model, x, rows)}
    with pytest.raises(
        ValueError, match=f"shares memory.*{said}|{said}.*shares memory"
    ):
        per_sample_grads(model, mse, x, y, out=shared, chunk_size=chunk_size)
    assert_same((model.state_dict(), x, y), before)


@pytest.mark.parametrize("name", ["conv2d", "mlp", "tied", "direct", "attention"])
@pytest.mark.parametrize(
    "compute",
    [
        per_sample_grads,
        per_sample_grad_norms,
        lambda *args: clipped_grad_sum(*args, max_grad_norm=1.0),
    ],
)
def test_nothing_waits_for_the_garbage_collector(name, compute):
    """What a call has made is freed with its result, above all rows."""
    model, x, y = problem(name)
    compute(model, mse, x, y)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        compute(model, mse, x, y)
        gc.collect()
        left = [thing for thing in gc.garbage if isinstance(thing, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert left == []


@pytest.mark.parametrize("name", SYNC)
@pytest.mark.parametrize("update", [False, True])
def test_contributions(name, update):
    """In "sync" row i is all losses through sample i's own copy; statistics once."""
    make, shape = SYNC[name]
    torch.manual_seed(3)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    y = torch.randn(5, 3, dtype=torch.float64)
    expected = slow.contributions(model, mse, x, y)
    plain = copy.deepcopy(model)
    plain(x)
    options = {"mode": "sync", "update_running_stats": update}
    for call in (
        lambda m: per_sample_grad_norms(m, mse, x, y, **options),
        lambda m: per_sample_grads(m, mse, x, y, out=like(expected), **options),
        lambda m: clip_in_sync(m, x, y, slow.norms(expected).median(), **options),
    ):
        fresh = copy.deepcopy(model)
        found = call(fresh)
        if isinstance(found, torch.Tensor):
            assert_same(found, slow.norms(expected))
        elif found["0.weight"].dim() > model[0].weight.dim():
            assert_same(found, expected)
        else:
            assert_same(found, slow.clipped(expected, slow.norms(expected).median()))
        if update:
            assert_same(dict(fresh.named_buffers()), dict(plain.named_buffers()))
        else:
            assert_same(dict(fresh.named_buffers()), dict(model.named_buffers()))


def like(rows):
    return {name: torch.empty_like(row) for name, row in rows.items()}


def clip_in_sync(model, x, y, most, **options):
    with pytest.warns(UserWarning, match="bounds no sample's influence") as warned:
        total = clipped_grad_sum(model, mse, x, y, max_grad_norm=most, **options)
    assert {w.filename for w in warned} == {__file__}
    return total


@pytest.mark.parametrize("rows", ["jacobian", "detached"])
def test_other_rows_in_sync(rows):
    """Their norms and sums are those of per_sample_grads, which test_sync tests."""
    make, shape = SYNC["images"]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    y = torch.randn(5, 3, dtype=torch.float64)
    options = {"mode": "sync", "rows": rows}
    expected = per_sample_grads(model, mse, x, y, fast=False, **options)
    assert_same(
        per_sample_grad_norms(model, mse, x, y, **options), slow.norms(expected)
    )
    most = slow.norms(expected).median()
    assert_same(
        clip_in_sync(model, x, y, most, **options), slow.clipped(expected, most)
    )
    out = like(expected)
    assert_same(per_sample_grads(model, mse, x, y, out=out, **options), expected)


# -- Options that per_sample_grads has too ---------------------------------------------


@pytest.fixture
def mlp():
    return small_mlp()


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 2, 1])


def test_chosen_parameters(mlp):
    """Parameters by name, with other values, frozen; the others are left alone."""
    expected = per_sample_grads(mlp, F.cross_entropy, X, Y, fast=False)
    norms = per_sample_grad_norms(
        mlp, F.cross_entropy, X, Y, params=["3.weight", "1.bias"], per_parameter=True
    )
    assert list(norms) == ["3.weight", "1.bias"]
    for name, norm in norms.items():
        assert_same(norm, expected[name].flatten(1).norm(dim=1))
    other = {"3.weight": torch.randn(3, 6, dtype=torch.float64)}
    expected = per_sample_grads(mlp, F.cross_entropy, X, Y, params=other, fast=False)
    out = {"3.weight": torch.empty(5, 3, 6, dtype=torch.float64)}
    per_sample_grads(mlp, F.cross_entropy, X, Y, params=other, out=out)
    assert_same(out, expected)
    assert all(p.grad is None for p in mlp.parameters())


def with_aux(output, target):
    return F.cross_entropy(output, target), {"logits": output, "hits": target * 2}


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_aux(mlp, chunk_size):
    """aux comes in a pair, for the whole batch, without derivatives."""
    _, expected = per_sample_grads(mlp, with_aux, X, Y, has_aux=True, fast=False)
    options = {"has_aux": True, "chunk_size": chunk_size}
    out = {n: X.new_empty(5, *p.shape) for n, p in mlp.named_parameters()}
    for _, aux in (
        per_sample_grad_norms(mlp, with_aux, X, Y, **options),
        clipped_grad_sum(mlp, with_aux, X, Y, max_grad_norm=1.0, **options),
        per_sample_grads(mlp, with_aux, X, Y, out=out, **options),
        per_sample_grads(mlp, with_aux, X, Y, **options),
    ):
        assert_same(aux, expected)
        assert not aux["logits"].requires_grad


def test_empty_batch(mlp):
    """No norms, no rows, and a sum of nothing."""
    x, y = X[:0], Y[:0]
    assert per_sample_grad_norms(mlp, F.cross_entropy, x, y).shape == (0,)
    total = clipped_grad_sum(mlp, F.cross_entropy, x, y, max_grad_norm=1.0)
    out = {n: X.new_empty(0, *p.shape) for n, p in mlp.named_parameters()}
    assert per_sample_grads(mlp, F.cross_entropy, x, y, out=out) is out
    for name, p in mlp.named_parameters():
        assert torch.equal(total[name], torch.zeros_like(p))


def test_dropout():
    """Reproducible under a seed; each sample draws for itself; as in vmap(grad)."""
    model = net(nn.Linear(4, 64), nn.Dropout(), nn.Linear(64, 3)).double()
    x, y = X[:1].expand(5, 4), Y * 0

    def norms(**options):
        torch.manual_seed(5)
        return per_sample_grad_norms(model, F.cross_entropy, x, y, **options)

    different = norms(randomness="different")
    assert torch.equal(different, norms(randomness="different"))
    assert different[0] != different[1]
    torch.manual_seed(5)
    rows = per_sample_grads(
        model, F.cross_entropy, x, y, randomness="different", fast=False
    )
    assert_same(different, slow.norms(rows))
    same = norms(randomness="same")
    assert_same(same, same[:1].expand(5))
    with pytest.raises(RuntimeError, match="randomness"):
        norms()


def test_not_a_number(mlp):
    """NaN in one sample: its norm, its row, and the whole clipped sum."""
    x = X.clone()
    x[2, 1] = torch.nan
    norms = per_sample_grad_norms(mlp, F.cross_entropy, x, Y)
    assert norms.isnan().tolist() == [False, False, True, False, False]
    total = clipped_grad_sum(mlp, F.cross_entropy, x, Y, max_grad_norm=1.0)
    assert all(t.isnan().all() for t in total.values())
    out = {n: X.new_empty(5, *p.shape) for n, p in mlp.named_parameters()}
    per_sample_grads(mlp, F.cross_entropy, x, Y, out=out)
    for row in out.values():
        assert not row[[0, 1, 3, 4]].isnan().any()


def test_norms_beyond_the_largest_number():
    """A finite row with an infinite norm is not dropped silently."""
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[3e38, 3e38], [1.0, 1.0]])
    total = clipped_grad_sum(model, lambda o: o.sum(), x, max_grad_norm=1.0)
    assert total["weight"].isnan().all()


def test_rows_of_zero(mlp):
    """A loss without gradient has norm 0 and adds nothing; so has one of constants."""
    y = torch.tensor([0.0, 1, 0, 0, 1], dtype=torch.float64)

    def loss_fn(output, y):
        return (y * output).sum()

    norms = per_sample_grad_norms(mlp, loss_fn, X, y)
    assert norms.tolist()[0] == 0 != norms.tolist()[1]
    total = clipped_grad_sum(mlp, loss_fn, X, y, max_grad_norm=1e6)
    expected = per_sample_grads(mlp, loss_fn, X, y, fast=False)
    assert_same(total, {n: r.sum(0) for n, r in expected.items()})
    for constant in (
        lambda o, y: y.sum(),
        lambda o, y: o.detach().sum(),
        lambda o, y: y.sum() > 3,
    ):
        assert not per_sample_grad_norms(mlp, constant, X, y).any()
        total = clipped_grad_sum(mlp, constant, X, y, max_grad_norm=1.0)
        assert not any(t.any() for t in total.values())


@pytest.mark.parametrize("names", [["0.weight"], ["0.bias", "1.weight"], ["2.bias"]])
def test_autocast_and_some_of_the_parameters(names):
    """Layers of which none is chosen cast their parameters too."""
    torch.manual_seed(3)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)),
        *(nn.Flatten(), nn.Linear(48, 3)),
    )
    x, y = torch.randn(5, 2, 4, 4), torch.randn(5, 3)
    model(x)
    with torch.autocast("cpu", torch.bfloat16):
        every = per_sample_grad_norms(model, mse, x, y, per_parameter=True)
        some = {"per_parameter": True, "params": names}
        found = per_sample_grad_norms(model, mse, x, y, **some)
    assert_same(found, {name: every[name] for name in names}, rtol=1e-2)


def test_autocast():
    """Rows in the parameters' dtype, about those of a loop under autocast."""
    model, x, y = images()
    exact = per_sample_grads(model, mse, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        norms = per_sample_grad_norms(model, mse, x, y)
        total = clipped_grad_sum(model, mse, x, y, max_grad_norm=1e6)
        rows = per_sample_grads(model, mse, x, y, out=like(exact))
    assert norms.dtype == torch.float32
    assert_same(norms, slow.norms(exact), rtol=0.05, atol=0.0)
    for name, row in exact.items():
        assert rows[name].dtype == total[name].dtype == torch.float32
        size = float(row.abs().max())
        assert_same(rows[name], row, rtol=0.05, atol=0.05 * size)
        assert_same(total[name], row.sum(0), rtol=0.05, atol=0.2 * size)
    assert_same(norms, slow.norms(rows), rtol=5e-3)  # rows are rounded, norms are not


@pytest.mark.parametrize("out", [False, True])
def test_rows_are_multiplied_as_autocast_does(out):
    """In its dtype, as those of vmap(grad); norms and sums are not rounded."""
    torch.manual_seed(2)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(2), nn.Linear(16, 8), nn.Flatten()),
    )
    x, y = torch.randn(5, 2, 6, 6), torch.randn(5, 48)
    memory = {"out": like(per_sample_grads(model, mse, x, y))} if out else {}
    multiplied = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.overloadpacket in PRODUCTS and args[0].numel() > 1:
                multiplied.add(args[0].dtype)
            return operator(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16):
        with Watch():
            rows = per_sample_grads(model, mse, x, y, **memory)
        norms = per_sample_grad_norms(model, mse, x, y)
        total = per_sample(model, mse, x, y, want=q.Sum())
        by_vmap = per_sample_grads(model, mse, x, y, fast=False)
    assert multiplied == {torch.bfloat16}
    for name, row in rows.items():
        assert row.dtype == torch.float32
        size = float(row.abs().max())
        assert_same(row, by_vmap[name], rtol=0.0, atol=0.02 * size)
        if name.endswith("weight"):
            assert torch.equal(row, row.bfloat16().float())
            assert not torch.equal(total[name], total[name].bfloat16().float())
    assert not torch.equal(norms, norms.bfloat16().float())


PRODUCTS = (
    *(torch.ops.aten.bmm, torch.ops.aten.mm, torch.ops.aten.addmm),
    *(torch.ops.aten.convolution, torch.ops.aten.convolution_backward),
)


def test_convolutions_without_products_of_lower_precision(monkeypatch):
    """An option for matrix products makes no convolution rougher."""
    torch.manual_seed(0)
    model = image(conv(2, 2, 8, 3), conv(2, 8, 16, 3, stride=2), channels=16)
    x, y = torch.randn(5, 2, 20, 20), torch.randn(5, 3)
    expected = {n: r.float() for n, r in slow.rows_in(model, "eval", mse, x, y).items()}

    def rounded(*args, **kwargs):
        raise AssertionError("a matrix product")

    monkeypatch.setattr(
        convolution, "ALGORITHMS", dict.fromkeys(convolution.ALGORITHMS, rounded)
    )
    monkeypatch.setattr(convolution, "seen_by_kernel", rounded)
    for compute in (per_sample_grads, per_sample_grad_norms):
        with pytest.raises(AssertionError, match="a matrix product"):
            compute(model, mse, x, y)
    torch.set_float32_matmul_precision("high")
    try:
        rows = per_sample_grads(model, mse, x, y)
        norms = per_sample_grad_norms(model, mse, x, y)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same(rows, expected, rtol=1e-4, atol=1e-6)
    assert_same(norms, slow.norms(expected), rtol=1e-4)


def test_half_precision():
    """Rows in the parameters' dtype, norms in float32."""
    model = net(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    exact = per_sample_grads(model, F.cross_entropy, X.float(), Y)
    half = copy.deepcopy(model).bfloat16()
    norms = per_sample_grad_norms(half, F.cross_entropy, X.bfloat16(), Y)
    total = clipped_grad_sum(half, F.cross_entropy, X.bfloat16(), Y, max_grad_norm=1e6)
    assert norms.dtype == torch.float32
    assert all(t.dtype == torch.bfloat16 for t in total.values())
    assert_same(norms, slow.norms(exact), rtol=0.05, atol=0.05)


# -- Around it and inside it -----------------------------------------------------------


@pytest.mark.parametrize("launches", [False, True])
def test_complex_numbers(launches, monkeypatch):
    """Rows, norms and clipped sums of a network of complex numbers."""
    if launches:
        take_regimes_of_a_gpu(monkeypatch)
    torch.manual_seed(0)
    numbers = {"dtype": torch.complex128}
    model = net(nn.Linear(3, 4, **numbers), nn.Linear(4, 2, **numbers))
    x, y = torch.randn(5, 3).to(torch.complex128) * (1 + 2j), torch.zeros(5)

    def power(output, target):
        return (output.abs() ** 2).sum() + output.real.sum()

    expected = slow.rows(model, power, x, y)
    assert_same(per_sample_grads(model, power, x, y), expected)
    norms = torch.cat([r.flatten(1) for r in expected.values()], 1).abs().square()
    norms = norms.sum(1).sqrt()
    assert_same(per_sample_grad_norms(model, power, x, y), norms)
    most = float(norms.median())
    total = clipped_grad_sum(model, power, x, y, max_grad_norm=most)
    factors = (most / norms).clamp(max=1.0).to(torch.complex128)
    assert_same(total, {n: torch.tensordot(factors, r, 1) for n, r in expected.items()})


def test_complex_and_real_parameters():
    """No real sum is made from complex numbers, of which torch would warn."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.real = nn.Linear(3, 4).double()
            self.other = nn.Linear(4, 2, dtype=torch.complex128)

        def forward(self, x):
            return torch.view_as_real(self.other(self.real(x) * (1 + 1j))).flatten(1)

    torch.manual_seed(0)
    model, x, y = Both(), torch.randn(5, 3).double(), torch.randn(5, 4).double()
    rows = slow.rows(model, mse, x, y)
    norms = torch.cat([r.flatten(1) for r in rows.values()], 1).abs().square()
    norms = norms.sum(1).sqrt()
    assert_same(per_sample_grad_norms(model, mse, x, y), norms)
    most = float(norms.median())
    factors = (most / norms).clamp(max=1.0)
    wanted = {n: torch.tensordot(factors.to(r.dtype), r, 1) for n, r in rows.items()}
    assert_same(clipped_grad_sum(model, mse, x, y, max_grad_norm=most), wanted)


def test_products_that_may_be_rounded(monkeypatch):
    """With torch's switch for a lower precision, norms come from rows, and the sums of
    small rows from no product of matrices."""
    made = []
    monkeypatch.setattr(formulas, "_norms_of_products", lambda *args: made.append(args))
    torch.manual_seed(0)
    layer, x, w = nn.Linear(60, 50), torch.randn(4, 3, 60), torch.randn(4, 3, 50)

    def loss_fn(output, w):
        return (output * w).sum()

    rows = slow.rows(layer, loss_fn, x, w)
    most = float(slow.norms(rows).median())
    torch.set_float32_matmul_precision("medium")
    try:
        norms = per_sample_grad_norms(layer, loss_fn, x, w)
        total = clipped_grad_sum(layer, loss_fn, x, w, max_grad_norm=most)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not made
    assert_same(norms, slow.norms(rows), rtol=2e-2)
    assert_same(total["bias"], slow.clipped(rows, most)["bias"], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("size", [2, 17])
@pytest.mark.parametrize("fast", [True, False])
def test_batch_norm_far_from_zero_in_half_precision(size, fast):
    """The mean is subtracted before anything is summed."""
    torch.manual_seed(0)
    model = net(nn.BatchNorm2d(2), nn.Flatten(1), nn.Linear(2 * size**2, 3)).bfloat16()
    model[0].running_mean.fill_(100)
    x = (100 + torch.randint(-4, 5, (5, 2, size, size)) / 2).bfloat16()
    y = torch.randn(5, 3).bfloat16()
    exact = copy.deepcopy(model).double()
    expected = slow.rows_in(exact, "eval", mse, x.double(), y.double())
    found = per_sample_grads(model, mse, x, y, fast=fast)
    norms = per_sample_grad_norms(model, mse, x, y, per_parameter=True)
    for name in ("0.weight", "0.bias"):
        largest = float(expected[name].abs().max())
        actual = found[name].double()
        assert_same(actual, expected[name], rtol=0.05, atol=0.05 * largest)
        exact = expected[name].norm(dim=1)
        assert_same(norms[name].double(), exact, rtol=0.05, atol=0.05 * largest)


def test_transforms_around(mlp):
    """Under vmap and grad the result is that of the rows, derivatives included."""
    xs = torch.stack([X, X + 1])
    norms = torch.func.vmap(
        lambda x: per_sample_grad_norms(mlp, F.cross_entropy, x, Y)
    )(xs)
    for x, norm in zip(xs, norms):
        assert_same(per_sample_grad_norms(mlp, F.cross_entropy, x, Y), norm)

    def energy(x):
        return per_sample_grad_norms(mlp, F.cross_entropy, x, Y).square().sum()

    def slow_energy(x):
        rows = per_sample_grads(mlp, F.cross_entropy, x, Y, fast=False)
        return slow.norms(rows).square().sum()

    assert_same(torch.func.grad(energy)(X), torch.func.grad(slow_energy)(X))


def test_no_grad_and_inference_mode(mlp):
    """The caller's grad mode does not matter, and no result requires a gradient."""
    expected = per_sample_grad_norms(mlp, F.cross_entropy, X, Y)
    assert not expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(per_sample_grad_norms(mlp, F.cross_entropy, X, Y), expected)
            rows = per_sample_grads(mlp, F.cross_entropy, X, Y)
        assert_same(slow.norms(rows), expected)


def test_derivatives_stay_where_somebody_wants_them(mlp):
    """Rows that depend on a tensor of the caller's carry its graph: a parameter given,
    one not chosen, an input, and one that only the loss knows of."""
    heat = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    x = X.clone().requires_grad_()

    def warm(output, target):
        return F.cross_entropy(output / heat, target)

    for wanted, args, options in (
        (heat, (warm, X, Y), {}),
        (weight, (F.cross_entropy, X, Y), {"params": {"3.weight": weight}}),
        (mlp[0].weight, (F.cross_entropy, X, Y), {"params": ["3.weight"]}),
        (x, (F.cross_entropy, x, Y), {}),
    ):
        found, expected = (
            torch.autograd.grad(
                per_sample_grads(mlp, *args, fast=fast, **options)["3.weight"]
                .square()
                .sum(),
                wanted,
            )
            for fast in (True, False)
        )
        assert_same(*found, *expected)
        mlp.requires_grad_(False)
        own = {"3.weight": weight}
        rows = per_sample_grads(mlp, F.cross_entropy, X, Y, params=own)
        assert rows["3.weight"].requires_grad
        mlp.requires_grad_(True)
        assert heat.grad is None
        norms = per_sample_grad_norms(mlp, *args, **options)
        assert not norms.requires_grad


class Foreign(nn.Module):
    """A layer with its own bias and a weight of another."""

    def __init__(self, apply, shape):
        super().__init__()
        self.weight = [torch.randn(shape, dtype=torch.float64, requires_grad=True)]
        self.bias = nn.Parameter(torch.randn(shape[0], dtype=torch.float64))
        self.apply_it = apply

    def forward(self, x):
        return self.apply_it(x, self.weight[0], self.bias).tanh().flatten(2).sum(2)


FOREIGN = {
    "linear": (lambda x, w, b: F.linear(x, w, b)[..., None], (3, 4), (4,)),
    "conv": (F.conv2d, (3, 2, 2, 2), (2, 4, 4)),
    "norm": (
        lambda x, w, b: F.batch_norm(x, torch.zeros_like(w), torch.ones_like(w), w, b),
        *((3,), (3, 2, 2)),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_derivatives_by_what_a_layer_was_lent(name):
    """The rows of the bias depend on a weight that is not a parameter."""
    apply, shape, sample = FOREIGN[name]
    torch.manual_seed(0)
    model, x = Foreign(apply, shape), torch.randn(5, *sample, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(
            per_sample_grads(model, mse, x, x.new_zeros(5, 3), fast=fast)["bias"].sum(),
            model.weight[0],
        )
        for fast in (True, False)
    )
    assert_same(*found, *expected)
    norms = per_sample_grad_norms(model, mse, x, x.new_zeros(5, 3))
    rows = per_sample_grads(model, mse, x, x.new_zeros(5, 3), fast=False)
    assert_same(norms, slow.norms(rows).detach())


def test_in_a_block_and_beside_one(mlp):
    """A call keeps its own mode inside a block; a second model keeps the block's."""
    teacher = copy.deepcopy(mlp)
    teacher[1].running_mean.add_(1)
    expected = per_sample_grad_norms(mlp, F.cross_entropy, X, Y)

    def taught(output, x, y):
        return F.cross_entropy(output, y) + (output * teacher(x)).sum()

    with vmap_safe(mlp, mode="sync"), vmap_safe(teacher):
        assert_same(per_sample_grad_norms(mlp, F.cross_entropy, X, Y), expected)
        found = per_sample_grad_norms(mlp, taught, X, X, Y)
    teacher.eval()
    assert_same(found, per_sample_grad_norms(mlp, taught, X, X, Y, fast=False))
    rows = per_sample_grads(mlp, taught, X, X, Y, fast=False)
    assert_same(found, slow.norms(rows))


class Forces(nn.Module):
    """A network whose output is a derivative of another, by torch.autograd.grad."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x):
        h = self.a(x)
        energy = self.b(torch.tanh(h)).sum()
        (force,) = torch.autograd.grad(energy, h, create_graph=True)
        return force[:, :3]


def test_autograd_inside():
    """Derivatives that the forward takes by autograd are followed, as by vmap(grad)."""
    model = Forces().double()
    y = torch.randn(5, 3, dtype=torch.float64)
    rows = slow.rows(model, mse, X, y, names=["a.weight", "a.bias", "b.weight"])
    params = list(rows)
    norms = per_sample_grad_norms(model, mse, X, y, params=params)
    assert_same(norms, slow.norms(rows))
    found = per_sample_grads(model, mse, X, y, params=params, out=like(rows))
    assert_same(found, rows)
    with pytest.raises(RuntimeError, match="calls torch.autograd.grad, and a second"):
        per_sample_grad_norms(model, mse, X, y, mode="sync", update_running_stats=True)


def test_functional_transforms_inside():
    """A network that calls vmap and grad of torch.func itself."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            def energy(h):
                return torch.tanh(self.b(h)).sum()

            scales = torch.arange(3, dtype=x.dtype)
            h = torch.func.vmap(self.a)(x)
            h = h + torch.func.vmap(lambda s: self.a(s * x) + s * self.a(x))(
                scales
            ).sum(0)
            return self.b(h + torch.func.vmap(torch.func.grad(energy))(h))

    model = Inner().double()
    y = torch.randn(5, 3, dtype=torch.float64)
    rows = per_sample_grads(model, mse, X, y, fast=False)
    assert_same(per_sample_grad_norms(model, mse, X, y), slow.norms(rows))
    assert_same(per_sample_grads(model, mse, X, y, out=like(rows)), rows)


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.a(x)
        asked = (x, h, self.a.weight)
        return self.b(h) * sum(2**i for i, t in enumerate(asked) if t.requires_grad)


def test_what_a_slice_says_of_itself():
    """A network that asks whether tensors require a gradient is told the truth."""
    model, y = Asks().double(), torch.randn(5, 3, dtype=torch.float64)
    rows = slow.rows(model, mse, X, y, names=["a.weight", "b.weight"])
    by_name = per_sample_grad_norms(model, mse, X, y, per_parameter=True)
    for name, row in rows.items():
        assert_same(by_name[name], row.flatten(1).norm(dim=1))


def test_a_gradient_that_is_not_contiguous():
    """One sample, whose batch norm gets a transposed gradient."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)).flatten(2).transpose(1, 2)

    torch.manual_seed(3)
    model, x = Tokens().double(), torch.randn(4, 2, 5, 5, dtype=torch.float64)
    y = torch.randn(4, 16, 4, dtype=torch.float64)
    model(x)
    whole = per_sample_grad_norms(model, mse, x, y)
    single = [
        per_sample_grad_norms(model, mse, x[i, None], y[i, None]) for i in range(4)
    ]
    assert_same(torch.cat(single), whole)
    assert_same(whole, slow.norms(slow.rows_in(model, "eval", mse, x, y)))


class WritesOver(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.sin(x)
        y = self.a(h)
        h.mul_(2)
        return y


def test_writing_over_an_input_raises():
    """As in plain autograd: a row is never silently wrong."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        per_sample_grad_norms(WritesOver().double(), F.cross_entropy, X, Y)


def test_compiled(mlp):
    """torch.compile around the call gives the same numbers."""
    expected = per_sample_grad_norms(mlp, F.cross_entropy, X, Y)
    function = torch.compile(
        lambda x, y: per_sample_grad_norms(mlp, F.cross_entropy, x, y),
        backend="eager",
    )
    assert_same(function(X, Y), expected)


# -- Errors ----------------------------------------------------------------------------


def out_of(model, **changes):
    out = {n: X.new_empty(5, *p.shape) for n, p in model.named_parameters()}
    return {**out, **changes}


def rows_into(**changes):
    return lambda net: per_sample_grads(
        net, F.cross_entropy, X, Y, out=out_of(net, **changes)
    )


ERRORS = [
    (
        lambda net: clipped_grad_sum(net, F.cross_entropy, X, Y, max_grad_norm=0.0),
        "clipped_grad_sum(...): max_grad_norm is 0.0. Pass the largest norm",
    ),
    (
        lambda net: clipped_grad_sum(
            net, F.cross_entropy, X, Y, max_grad_norm=float("nan")
        ),
        "max_grad_norm is nan",
    ),
    (
        lambda net: clipped_grad_sum(
            net, F.cross_entropy, X, Y, max_grad_norm=1.0, reduce="mean"
        ),
        "unknown reduce 'mean'",
    ),
    (
        lambda net: per_sample_grad_norms(net, mse, X, Y[:3]),
        "per_sample_grad_norms(...): batch sizes disagree",
    ),
    (
        lambda net: per_sample_grad_norms(
            net, lambda o, y: F.mse_loss(o, y, reduction="none"), X, X[:, :3]
        ),
        "per_sample_grad_norms(...): loss_fn gave (1, 3) for a batch of one",
    ),
    (
        lambda net: per_sample_grad_norms(net.requires_grad_(False), mse, X, Y),
        "no parameter of Sequential requires a gradient",
    ),
    (
        lambda net: per_sample_grad_norms(net, mse, X, Y, chunk_size=0),
        "chunk_size is 0. Pass an int of at least 1",
    ),
    (
        lambda net: per_sample_grad_norms(net, mse, X, Y, chunk_size="all"),
        "chunk_size is 'all'",
    ),
    (
        lambda net: per_sample_grads(net, mse, X, Y, mode="sync", chunk_size="auto"),
        'in mode "sync" a chunk is a batch with statistics of its own',
    ),
    (
        lambda net: per_sample_grads(net, mse, X, Y, out={}),
        "out has the names [], the parameters are ['0.bias', '0.weight', '1.bias'",
    ),
    (
        rows_into(**{"0.bias": X.new_empty(4, 6)}),
        "out['0.bias'] is (4, 6), torch.float64, on cpu. Pass a contiguous"
        " tensor (5, 6), torch.float64, on cpu",
    ),
    (rows_into(**{"0.bias": torch.empty(5, 6)}), "out['0.bias'] is (5, 6), torch.fl"),
    (rows_into(**{"0.bias": None}), "out['0.bias'] is a NoneType"),
    (rows_into(**{"0.bias": X.new_empty(6, 5).T}), "out['0.bias'] has strides (1, 5)"),
    (
        rows_into(**{"0.bias": X.new_empty(5, 6).requires_grad_()}),
        "out['0.bias'] requires a gradient",
    ),
    (
        lambda net: torch.func.vmap(
            lambda x: per_sample_grads(net, F.cross_entropy, x, Y, out=out_of(net))
        )(X.unsqueeze(0)),
        "a transform of torch.func around it",
    ),
]


@pytest.mark.parametrize("call,text", ERRORS, ids=[text for _, text in ERRORS])
def test_errors(mlp, call, text):
    before = everything(mlp)[0]
    with pytest.raises(ValueError) as caught:
        call(mlp)
    assert text in str(caught.value)
    assert everything(mlp)[0] == before


def test_reduce_without_a_process_group(mlp):
    with pytest.raises(RuntimeError, match="init_process_group first"):
        clipped_grad_sum(mlp, F.cross_entropy, X, Y, max_grad_norm=1.0, reduce="all")


def test_clipped_to_a_number_that_nobody_may_look_at(mlp):
    """Under vmap, as on a GPU, a norm that is not above 0 makes the sum NaN."""
    most = torch.tensor([0.5, 0.0, -1.0])
    found = torch.func.vmap(
        lambda c: clipped_grad_sum(mlp, F.cross_entropy, X, Y, max_grad_norm=c)
    )(most)
    expected = clipped_grad_sum(mlp, F.cross_entropy, X, Y, max_grad_norm=0.5)
    for name, total in found.items():
        assert_same(total[0], expected[name])
        assert total[1:].isnan().all()
