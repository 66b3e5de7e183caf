"""Sketches: rows of a Python loop times a matrix rebuilt from its recipe."""

import hashlib
import inspect
import math
import re
import textwrap

import numpy as np
import pytest
import slow
import torch
import torch.nn.functional as F
from nets import CASES, SYNC, mse, problem, small_mlp
from state import assert_same_state, everything
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmapsafe import per_sample, per_sample_grads, per_sample_sketch
from vmapsafe import quantities as q
from vmapsafe.quantities import sketch as module
from vmapsafe.quantities.signs import Drawer, Lines, key_of
from vmapsafe.testing import assert_same

KINDS = ["rademacher", "gaussian", "kronecker"]
CPU = torch.device("cpu")


def assert_close(found, expected):
    """To 1e-12 of the longest sketch."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    longest = expected.norm(dim=1).amax()
    assert (found - expected).norm(dim=1).amax() <= 1e-12 * longest


# torch's weight norm, under vmap
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name,mode", CASES)
def test_against_the_loop(name, mode):
    """Sketches of every kind of layer, in chunks too; the model is left alone."""
    model, x, y = problem(name)
    expected = slow.rows_in(model, mode, mse, x, y)
    before, drawn = everything(model), torch.get_rng_state()
    options = {"mode": mode, "num_groups": 2}
    for kind in KINDS:
        parts = slow.sketches(expected, 6, kind, 7)
        want = {
            "all": q.Sketch(6, kind, 7),
            "each": q.Sketch(6, kind, 7, per_layer=True),
        }
        for more in ({}, {"chunk_size": 2}, {"fast": False}):
            found = per_sample(model, mse, x, y, want=want, **more, **options)
            assert_close(found["all"], slow.sketch(expected, 6, kind, 7))
            assert found["each"].keys() == parts.keys()
            for name, part in parts.items():
                atol = 1e-12 * found["all"].norm(dim=1).amax()
                assert_same(found["each"][name], part, rtol=1e-11, atol=float(atol))
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
    for kind in KINDS:
        found = per_sample_sketch(model, mse, x, y, k=12, kind=kind, mode="sync")
        assert_close(found, slow.sketch(rows, 12, kind))
    for kind in ("jacobian", "detached"):
        options = {"mode": "sync", "rows": kind}
        rows = per_sample_grads(model, mse, x, y, fast=False, **options)
        for of in KINDS:
            found = per_sample_sketch(model, mse, x, y, k=12, kind=of, **options)
            assert_close(found, slow.sketch(rows, 12, of))


# -- The matrix ------------------------------------------------------------------------

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(9) % 3


@pytest.fixture
def mlp():
    return small_mlp(hidden=30)


def sketch(model, k=6, x=X, y=Y, **options):
    return per_sample_sketch(model, F.cross_entropy, x, y, k=k, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 36, 64, 100])
def test_blocks(mlp, k, kind, monkeypatch):
    """Blocks of the matrix and chunks of samples give what the whole matrix gives."""
    expected = slow.sketch(per_sample_grads(mlp, F.cross_entropy, X, Y), k, kind)
    assert_close(sketch(mlp, k, kind=kind), expected)
    monkeypatch.setattr(module, "_SIZES", {"cpu": module.Sizes(0, 0, 1, 2**20)})
    monkeypatch.setattr(module, "_MANY", 2)
    assert_close(sketch(mlp, k, kind=kind), expected)
    monkeypatch.setattr(module, "_SIZES", {"cpu": module.Sizes(0, 0, 1, 7 * k)})
    assert_close(sketch(mlp, k, kind=kind), expected)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("most,blocks", [(6 * 50, [50, 50, 20]), (1, [1] * 120)])
def test_only_a_block_of_the_matrix_is_there(mlp, kind, most, blocks, monkeypatch):
    """It is drawn into the same memory again."""
    monkeypatch.setattr(module, "_SIZES", {"cpu": module.Sizes(0, 0, 1, most)})
    lines, places = [], set()
    original = Drawer.draw

    def watched(*args):
        block = original(*args)
        lines.append(len(block))
        places.add(block.data_ptr())
        return block

    monkeypatch.setattr(Drawer, "draw", watched)
    sketch(mlp, kind=kind, params=["0.weight"])
    assert lines == blocks and len(places) == 1


def test_small_parameters_are_drawn_together(mlp, monkeypatch):
    draws = []
    original = Drawer.draw
    monkeypatch.setattr(
        Drawer, "draw", lambda *args: (draws.append(args[1]), original(*args))[1]
    )
    sketch(mlp)
    assert [len(wanted) for wanted in draws] == [6]


def test_the_recipe_in_the_docstring():
    """It gives the matrix."""
    code = inspect.getdoc(per_sample_sketch)
    code = re.search(r"\.\. code-block:: python\n\n((    .*\n|\n)+)", code)[1]
    first, gaussian, kronecker = re.split(r'(?m)^ *# kind="[gk].*$', code)
    for k in (3, 12, 70):
        shape = (5, 2, 3)
        names = {
            **{"np": np, "torch": torch, "math": math, "hashlib": hashlib},
            **{"seed": -3, "name": "a.weight", "n": 30, "k": k},
            **{"first": shape[0], "rest": shape[1:]},
        }
        with np.errstate(over="ignore"):
            for kind, text in zip(KINDS, (first, gaussian, kronecker)):
                exec(textwrap.dedent(text), names)
                found = torch.from_numpy(names["R"])
                expected = slow.matrix("a.weight", shape, k, kind, -3)
                assert_same(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_are_the_same_bits(dtype):
    """For any lines of any matrices, also in memory that was used before."""
    names = ["a.weight", "b"]
    matrices = [slow.matrix(name, [40], 70).to(dtype) for name in names]
    drawer = Drawer("signs", 70)
    for reuse in (False, True):
        for start, stop in ((0, 40), (3, 9), (39, 40), (5, 5)):
            lines = [Lines(key_of(0, name), start, stop) for name in names]
            found = drawer.draw(lines, dtype, CPU, reuse)
            assert torch.equal(found, torch.cat([m[start:stop] for m in matrices]))


def correlations(a, b):
    """Between the columns of two matrices, in standard errors."""
    return (a.T @ b) / math.sqrt(len(a))


@pytest.mark.parametrize("numbers", ["signs", "normal"])
def test_numbers_are_independent(numbers):
    """Mean, variance, and all correlations of columns, lines, keys and neighbours have
    the distribution of independent numbers: standard normal, for many."""
    drawer = Drawer(numbers, 256)
    keys = [key_of(seed, name) for seed, name in ((0, "a"), (0, "b"), (1, "a"))]
    keys += [key_of(0, "a", 1), keys[0] ^ 1, keys[0] ^ 2**63]
    drawn = [drawer.draw([Lines(key, 0, 4096)], torch.float64, CPU) for key in keys]
    a = drawn[0]
    assert abs(a.mean()) * math.sqrt(a.numel()) < 4
    assert abs(a.square().mean() - 1) * math.sqrt(a.numel() / 2) < 4
    own = correlations(a, a)
    lines = correlations(a[:512].T, a[:512].T)
    found = [own[~torch.eye(256, dtype=torch.bool)]]
    found += [lines[~torch.eye(512, dtype=torch.bool)]]
    found += [correlations(a, other).flatten() for other in drawn[1:]]
    found += [correlations(a[:-n], a[n:]).flatten() for n in (1, 2, 64, 1024)]
    for z in found:
        assert abs(z).max() < 6
        assert abs(z.square().mean() - 1) < 0.05
    if numbers == "normal":
        kurtosis = a.pow(4).mean()
        assert abs(kurtosis - 3) < 4 * math.sqrt(96 / a.numel()) + 1e-3
        ranks = torch.special.ndtr(a.flatten()).sort().values
        steps = torch.arange(len(ranks)) / len(ranks)
        assert abs(ranks - steps).max() * math.sqrt(len(ranks)) < 2


def test_what_the_matrix_depends_on(mlp):
    """Seed, kind, k and names; not the batch, the chunk, the values or the dtype."""
    found = sketch(mlp)
    assert_same(sketch(mlp, x=X[3:5], y=Y[3:5]), found[3:5])
    others = [{"seed": 1}, {"seed": -1}, {"kind": "gaussian"}, {"kind": "kronecker"}]
    for other in others:
        assert (sketch(mlp, **other) - found).abs().max() > 0.1, other
    single = sketch(mlp.float(), x=X.float())
    assert single.dtype == torch.float32
    assert_same(single.double(), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sets_of_parameters_add_up(mlp, kind):
    """A parameter's part does not depend on which others are there."""
    names = [name for name, _ in mlp.named_parameters()]
    parts = sketch(mlp, kind=kind, params=names[:2])
    parts = parts + sketch(mlp, kind=kind, params=names[2:])
    assert_close(parts, sketch(mlp, kind=kind))
    assert_close(sketch(mlp, kind=kind, params=names[::-1]), sketch(mlp, kind=kind))


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
    assert error.max() < 0.07 * (flat @ flat.T).diagonal().max()


def test_parameters_of_few_or_no_numbers():
    """Parameters without dimensions, and parameters that are empty."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
            self.none = nn.Parameter(torch.zeros(3, 0, dtype=torch.float64))
            self.unused = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

        def forward(self, x):
            return self.scale * x + self.none.sum()

    model = Odd()
    rows = slow.rows(model, F.cross_entropy, X, Y)
    for kind in KINDS:
        assert_close(sketch(model, kind=kind), slow.sketch(rows, 6, kind))
        parts = per_sample(
            model, F.cross_entropy, X, Y, want=q.Sketch(6, kind, per_layer=True)
        )
        assert not parts["none"].any() and not parts["unused"].any()


# -- How it is computed ----------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations that are not views; none may mix the host with a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        given = torch.utils._pytree.tree_leaves((args, kwargs, found))
        places = {
            t.device.type for t in given if isinstance(t, torch.Tensor) if t.dim()
        }
        assert len(places) < 2, function
        self.count += not function.is_view
        return found


def residual(norm, inputs, outputs, stride):
    """A block of a ResNet."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        norm(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        norm(outputs),
        nn.ReLU(),
    )


def resnet():
    """The layers of ResNet-18 for small images, and its 1 x 1 convolutions in a row."""
    norm, width = nn.BatchNorm2d, 64
    layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), norm(64), nn.ReLU()]
    for outputs in (64, 128, 256, 512):
        stride = 1 if outputs == 64 else 2
        if stride == 2:
            layers += [nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)]
        layers += [residual(norm, outputs, outputs, stride)]
        layers += [residual(norm, outputs, outputs, 1)]
        width = outputs
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_few_operations(kind):
    """The whole call has at most 1,500, and none copies numbers to the device."""
    with torch.device("meta"):
        model = resnet()
        x, y = torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.long)
    with Operations() as seen:
        found = per_sample_sketch(model, F.cross_entropy, x, y, k=512, kind=kind)
    assert found.shape == (64, 512) and found.is_meta
    assert seen.count <= 1500


@pytest.mark.parametrize("per_layer", [False, True])
def test_kronecker_makes_no_rows(per_layer):
    """Nothing is as large as the rows by one weight."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(found):
                if isinstance(t, torch.Tensor) and not function.is_view:
                    self.numbers = max(self.numbers, t.numel())
            return found

    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(300, 300), nn.Tanh(), nn.Unflatten(1, (60, 5)), nn.Tanh()),
        *(nn.Conv1d(60, 90, 5), nn.Flatten(), nn.Tanh()),
    )
    x, y = torch.randn(8, 300), torch.randint(90, (8,))
    want = q.Sketch(16, kind="kronecker", per_layer=per_layer)
    with Largest() as seen:
        per_sample(model, F.cross_entropy, x, y, want=want)
    assert seen.numbers <= 300 * 300


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole(mlp, kind, backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x, y, seed):
        return sketch(mlp, x=x, y=y, kind=kind, seed=seed)

    for seed in (0, 1, 2):
        assert_close(compiled(X, Y, seed), sketch(mlp, kind=kind, seed=seed))


# -- Options that per_sample_grads has too ---------------------------------------------


def test_aux_and_empty_batch(mlp):
    def with_aux(output, target):
        return F.cross_entropy(output, target), output.detach()

    for chunk_size in (None, 4):
        options = {"k": 6, "has_aux": True, "chunk_size": chunk_size}
        found, aux = per_sample_sketch(mlp, with_aux, X, Y, **options)
        assert_same(found, sketch(mlp))
        assert_same(aux, mlp.eval()(X))
    for kind in KINDS:
        options = {"k": 6, "kind": kind, "has_aux": True}
        found, aux = per_sample_sketch(mlp, with_aux, X[:0], Y[:0], **options)
        assert found.shape == (0, 6) and aux.shape == (0, 3)
        assert found.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number(mlp, kind):
    """A NaN changes only the sketch of its sample."""
    x = X.clone()
    x[4] = torch.nan
    found = sketch(mlp, x=x, kind=kind)
    assert found[4].isnan().all()
    others = [i for i in range(9) if i != 4]
    assert_same(found[others], sketch(mlp, kind=kind)[others])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_autocast(mlp, kind):
    def sketch(*args, **options):
        return of_any_kind(*args, kind=kind, **options)

    expected = sketch(mlp)
    with torch.autocast("cpu", torch.bfloat16):
        found = sketch(mlp.float(), x=X.float())
    assert found.dtype == torch.float32
    assert_same(found.double(), expected, rtol=0.05, atol=0.05)
    options = {"mode": "sync", "rows": "jacobian"}  # made whole
    with torch.autocast("cpu", torch.bfloat16):
        rows = per_sample_grads(mlp, F.cross_entropy, X.float(), Y, **options)
        found = sketch(mlp, x=X.float(), **options)
    exact = slow.sketch({name: row.double() for name, row in rows.items()}, 6, kind)
    assert_same(found.double(), exact, rtol=1e-5, atol=1e-5)
    found = sketch(mlp.bfloat16(), x=X.bfloat16())
    assert found.dtype == torch.float32
    assert_same(found.double(), expected, rtol=0.2, atol=0.2)


of_any_kind = sketch


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_around(mlp, kind):
    """Under another vmap, and with a derivative through given parameters."""

    def sketch(*args, **options):
        return of_any_kind(*args, kind=kind, **options)

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
        "per_sample_sketch(...): unknown kind 'sparse'. Choose \"rademacher\", "
        '"gaussian" or "kronecker".',
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
