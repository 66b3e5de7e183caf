"""Sketches: rows of a Python loop times a matrix rebuilt from its recipe."""

import math

import pytest
import slow
import torch
import torch.nn.functional as F
from nets import CASES, SYNC, mse, problem, small_mlp
from state import assert_same_state, everything

from vmapsafe import per_sample_grads, per_sample_sketch
from vmapsafe.quantities import sketch as module
from vmapsafe.testing import assert_same

KINDS = ["rademacher", "gaussian"]


# torch's weight norm, under vmap
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name,mode", CASES)
def test_against_the_loop(name, mode):
    """Sketches of every kind of layer, in chunks too; the model is left alone."""
    model, x, y = problem(name)
    expected = slow.rows_in(model, mode, mse, x, y)
    before, drawn = everything(model), torch.get_rng_state()
    options = {"mode": mode, "num_groups": 2, "k": 5}
    for kind in KINDS:
        for chunk_size in (None, 2):
            found = per_sample_sketch(
                model, mse, x, y, kind=kind, seed=7, chunk_size=chunk_size, **options
            )
            assert found.dtype == torch.float64
            assert_same(found, slow.sketch(expected, 5, kind, 7))
    assert_same_state(model, before)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("name", SYNC)
def test_contributions(name):
    """In "sync", row i projects the gradient of all losses by sample i's own copy."""
    make, shape = SYNC[name]
    torch.manual_seed(3)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    y = torch.randn(5, 3, dtype=torch.float64)
    rows = slow.contributions(model, mse, x, y)
    found = per_sample_sketch(model, mse, x, y, k=70, mode="sync")
    assert_same(found, slow.sketch(rows, 70))
    for kind in ("jacobian", "detached"):
        options = {"mode": "sync", "rows": kind}
        rows = per_sample_grads(model, mse, x, y, fast=False, **options)
        found = per_sample_sketch(model, mse, x, y, k=70, **options)
        assert_same(found, slow.sketch(rows, 70))


# -- The matrix ------------------------------------------------------------------------

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(9) % 3


@pytest.fixture
def mlp():
    return small_mlp(hidden=30)


def sketch(model, k=6, x=X, y=Y, **options):
    return per_sample_sketch(model, F.cross_entropy, x, y, k=k, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 64, 100])
def test_blocks(mlp, k, kind, monkeypatch):
    """Blocks of the matrix and chunks of samples give what the whole matrix gives."""
    expected = slow.sketch(per_sample_grads(mlp, F.cross_entropy, X, Y), k, kind)
    assert_same(sketch(mlp, k, kind=kind), expected)
    monkeypatch.setattr(module, "_BLOCK", 1)
    monkeypatch.setattr(module, "_MANY", 2)
    assert_same(sketch(mlp, k, kind=kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_block_of_the_matrix_is_there(mlp, kind, monkeypatch):
    """A block has 64 rows of it, and there is never more."""
    monkeypatch.setattr(module, "_BLOCK", 1)
    blocks = []
    original = module._blocks

    def watched(*args):
        for block in original(*args):
            blocks.append(len(block))
            yield block

    monkeypatch.setattr(module, "_blocks", watched)
    sketch(mlp, kind=kind, params=["0.weight"])
    assert blocks == [64, 56]


def test_what_the_matrix_depends_on(mlp):
    """Seed, kind, k and names; not the batch, the chunk, the values or the dtype."""
    found = sketch(mlp)
    assert_same(sketch(mlp, x=X[3:5], y=Y[3:5]), found[3:5])
    for other in ({"seed": 1}, {"seed": -1}, {"kind": "gaussian"}):
        assert (sketch(mlp, **other) - found).abs().max() > 0.1, other
    single = sketch(mlp.float(), x=X.float())
    assert single.dtype == torch.float32
    assert_same(single.double(), found, rtol=1e-4, atol=1e-5)


def test_sets_of_parameters_add_up(mlp):
    """A parameter's part does not depend on which others are there."""
    names = [name for name, _ in mlp.named_parameters()]
    parts = sketch(mlp, params=names[:2]) + sketch(mlp, params=names[2:])
    assert_same(parts, sketch(mlp))
    assert_same(sketch(mlp, params=names[::-1]), sketch(mlp))


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_kept_in_expectation(mlp, kind):
    """Over many seeds the mean product of two sketches is that of the two rows, within
    four standard errors."""
    rows = per_sample_grads(mlp, F.cross_entropy, X, Y)
    flat = torch.cat([r.flatten(1) for r in rows.values()], 1)
    several = [sketch(mlp, 20, kind=kind, seed=seed) for seed in range(200)]
    products = torch.stack([s @ s.T for s in several])
    error = products.std(0) / math.sqrt(len(several))
    distance = (products.mean(0) - flat @ flat.T).abs() / error
    assert distance.max() < 4
    assert error.max() < 0.05 * (flat @ flat.T).diagonal().max()


# -- Options that per_sample_grads has too ---------------------------------------------


def test_aux_and_empty_batch(mlp):
    def with_aux(output, target):
        return F.cross_entropy(output, target), output.detach()

    for chunk_size in (None, 4):
        options = {"k": 6, "has_aux": True, "chunk_size": chunk_size}
        found, aux = per_sample_sketch(mlp, with_aux, X, Y, **options)
        assert_same(found, sketch(mlp))
        assert_same(aux, mlp.eval()(X))
    found, aux = per_sample_sketch(mlp, with_aux, X[:0], Y[:0], k=6, has_aux=True)
    assert found.shape == (0, 6) and aux.shape == (0, 3)
    assert found.dtype == torch.float64


def test_not_a_number(mlp):
    """A NaN changes only the sketch of its sample."""
    x = X.clone()
    x[4] = torch.nan
    found = sketch(mlp, x=x)
    assert found[4].isnan().all()
    others = [i for i in range(9) if i != 4]
    assert_same(found[others], sketch(mlp)[others])


def test_half_precision_and_autocast(mlp):
    expected = sketch(mlp)
    with torch.autocast("cpu", torch.bfloat16):
        found = sketch(mlp.float(), x=X.float())
    assert found.dtype == torch.float32
    assert_same(found.double(), expected, rtol=0.05, atol=0.05)
    options = {"mode": "sync", "rows": "jacobian"}  # made whole
    with torch.autocast("cpu", torch.bfloat16):
        rows = per_sample_grads(mlp, F.cross_entropy, X.float(), Y, **options)
        found = sketch(mlp, x=X.float(), **options)
    exact = slow.sketch({name: row.double() for name, row in rows.items()}, 6)
    assert_same(found.double(), exact, rtol=1e-5, atol=1e-5)
    found = sketch(mlp.bfloat16(), x=X.bfloat16())
    assert found.dtype == torch.float32
    assert_same(found.double(), expected, rtol=0.2, atol=0.2)


def test_transforms_around(mlp):
    """Under another vmap, and with a derivative through given parameters."""
    two = torch.stack([X, X.flip(0)])
    found = torch.func.vmap(lambda x: sketch(mlp, x=x))(two)
    assert_same(found[0], sketch(mlp))
    assert_same(found[1], sketch(mlp, x=X.flip(0)))
    params = {n: p.detach() for n, p in mlp.named_parameters()}

    def energy(params):
        return sketch(mlp, params=params).square().sum()

    name, step = "3.bias", 1e-6
    slope = torch.func.grad(energy)(params)[name][0]
    up, down = params[name].clone(), params[name].clone()
    up[0] += step
    down[0] -= step
    rise = energy({**params, name: up}) - energy({**params, name: down})
    assert_same(slope, rise / (2 * step), rtol=1e-5, atol=1e-7)


ERRORS = [
    ({"k": 0}, "per_sample_sketch(...): k is 0. Pass how many numbers a sample"),
    ({"k": 2.0}, "k is 2.0"),
    ({"k": True}, "k is True"),
    (
        {"kind": "sparse"},
        "per_sample_sketch(...): unknown kind 'sparse'. Choose \"rademacher\" or "
        '"gaussian".',
    ),
    ({"seed": 1.5}, "per_sample_sketch(...): seed is 1.5. Pass an int."),
    ({"seed": None}, "seed is None"),
    ({"chunk_size": 0}, "per_sample_sketch(...): chunk_size is 0"),
    ({"gather": "sum"}, "per_sample_sketch(...): unknown gather 'sum'. Pass None"),
    ({"y": Y[:2]}, "per_sample_sketch(...): batch sizes disagree"),
    ({"params": ["nope"]}, "per_sample_sketch(...): Sequential has no parameter"),
]


@pytest.mark.parametrize("changed,text", ERRORS, ids=[text for _, text in ERRORS])
def test_errors(mlp, changed, text):
    before = everything(mlp)
    with pytest.raises(ValueError) as caught:
        sketch(mlp, **changed)
    assert text in str(caught.value)
    assert_same_state(mlp, before)


def test_gather_without_a_process_group(mlp):
    with pytest.raises(RuntimeError, match='gather="all": torch.distributed has no'):
        sketch(mlp, gather="all")
