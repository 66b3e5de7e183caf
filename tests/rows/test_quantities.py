"""per_sample and vmapsafe.quantities, against loops of plain backward passes."""

import copy
import math
import random
import re
import warnings
import weakref

import numpy
import pytest
import slow
import torch
import torch.nn.functional as F
from blocks import MODES
from nets import CASES, NETS, NORMED, images, mse, net, problem, small_mlp
from state import assert_same_state, everything
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from wanted import WIDE, Cosine, assert_exact, expected, truth

from vmapsafe import per_sample, per_sample_grads
from vmapsafe import quantities as q
from vmapsafe.testing import assert_same

# What torch says of its weight norm under vmap, and the library of clipping in "sync".
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*bounds no sample's influence:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient of the weighted loss:UserWarning"),
]


def numbers(*shape, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def automatic(norms):
    return 1 / (norms + 0.1)


def everything_wanted(model, size, other):
    """One or two of each quantity, by name."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    first = next(iter(named))
    rest = {"*": 1.0} if len(named) > 1 else {}
    weights = numbers(size)
    weights[1:2] = 0
    one = {n: numbers(*p.shape) for n, p in named.items()}
    three = {n: numbers(3, *p.shape, seed=6) for n, p in named.items()}
    return {
        "losses": q.Losses(),
        "norms": q.Norms(),
        "norms by parameter": q.Norms(per_parameter=True),
        "sum": q.Sum(),
        "squares": q.SumOfSquares(),
        "clipped": q.ClippedSum(1.0),
        "clipped by groups": q.ClippedSum({first: 0.5, **rest}),
        "weighted": q.WeightedSum(weights),
        "automatic": q.WeightedSum(automatic),
        "gram": q.Gram(),
        "gram with another": q.Gram(other=other),
        "dots": q.Dots(one),
        "dots with three": q.Dots(three),
        "sketch": q.Sketch(k=7),
        "gaussian sketch": q.Sketch(k=3, kind="gaussian", seed=1),
        "kronecker sketch": q.Sketch(k=12, kind="kronecker"),
        "rows": q.Rows(),
        "cosine": Cosine(),
    }


KINDS = ("contribution", "jacobian", "detached")
SHARED = ["used twice", "tied", "attention", "direct", "mlp"]
EXACT = [
    *((name, mode, "contribution") for name, mode in CASES),
    *((name, "sync", kind) for name in (*NORMED, *SHARED) for kind in KINDS),
]


SIZES = (1, 2, 3, 5, 9, "auto")  # of chunks, of five samples
ALL_SIZES = ("conv2d", "tied", "used twice", "linear on tokens")


def another(name, y):
    torch.manual_seed(8)
    return NETS[name][1]()[:3], torch.randn_like(y[:3])


@pytest.mark.parametrize("name,mode,kind", EXACT)
def test_exact(name, mode, kind):
    """Each alone, and all from one call, whatever the chunks."""
    model, x, y = problem(name)
    other = another(name, y)
    wanted = everything_wanted(model, 5, other)
    known = truth(model, mode, kind, mse, x, y)
    known.others = truth(model, mode, kind, mse, *other).rows
    before = everything(model)
    options = {"mode": mode, "rows": kind, "num_groups": 2}
    for quantity in wanted.values():
        assert_exact(
            quantity, per_sample(model, mse, x, y, want=quantity, **options), known
        )
    sizes = SIZES if name in ALL_SIZES else (None, 2)
    for chunk_size in sizes:
        if mode == "sync" and (chunk_size == "auto" or name == "mlp" and chunk_size):
            continue  # one value a channel
        asked = dict(wanted)
        if chunk_size == "auto":
            del asked["gram"], asked["gram with another"]
        if mode == "sync":
            known = truth(model, mode, kind, mse, x, y, chunk_size=chunk_size)
            those = truth(model, mode, kind, mse, *other, chunk_size=chunk_size)
            known.others = those.rows
        found = per_sample(
            model, mse, x, y, want=asked, chunk_size=chunk_size, **options
        )
        assert list(found) == list(asked)
        for key, quantity in asked.items():
            assert_exact(quantity, found[key], known)
    assert_same_state(model, before)


@pytest.mark.parametrize("name", NETS)
def test_by_vmap(name):
    """The same where only vmap(grad) can follow the loss."""
    model, x, y = problem(name)
    other = another(name, y)
    wanted = everything_wanted(model, 5, other)
    known = truth(model, "eval", "", mse, x, y)
    known.others = truth(model, "eval", "", mse, *other).rows

    def asks(output, target):
        _ = output.grad_fn  # which one pass cannot give
        return mse(output, target)

    for options in ({"fast": False}, {"chunk_size": 2}):
        found = per_sample(model, asks, x, y, want=wanted, **options)
        for key, quantity in wanted.items():
            assert_exact(quantity, found[key], known)


@pytest.fixture
def mlp():
    return small_mlp()


X, Y = numbers(5, 4, seed=1), numbers(5, 3, seed=2)
OTHER = numbers(3, 4, seed=3), numbers(3, 3, seed=4)


def known_of(model, x=X, y=Y, **options):
    return truth(model, "eval", "", mse, x, y, **options)


def test_one_sample_and_larger_batches(mlp):
    """B = 1; and so many samples that sketches and weights take some at a time."""
    for size in (1, 70):
        x, y = numbers(size, 4), numbers(size, 3)
        known = known_of(mlp, x, y)
        known.others = known_of(mlp, *OTHER).rows
        wanted = everything_wanted(mlp, size, OTHER)
        for chunk_size in (None, 32):
            found = per_sample(mlp, mse, x, y, want=wanted, chunk_size=chunk_size)
            for key, quantity in wanted.items():
                assert_exact(quantity, found[key], known)


def test_chosen_parameters(mlp):
    """By name, and with other values; vectors and patterns are for these alone."""
    values = {"3.weight": numbers(3, 6), "1.bias": numbers(6)}
    changed = copy.deepcopy(mlp)
    with torch.no_grad():
        changed[3].weight.copy_(values["3.weight"])
        changed[1].bias.copy_(values["1.bias"])
    for params, model in (([*values], mlp), (values, changed)):
        known = known_of(model)
        known.rows = {name: known.rows[name] for name in values}
        for quantity in (
            *(q.Norms(per_parameter=True), q.Sum(), q.Gram(), q.Sketch(k=3)),
            *(q.Dots(values), q.ClippedSum({"1*": 0.1, "3*": 0.2})),
        ):
            found = per_sample(mlp, mse, X, Y, want=quantity, params=params)
            assert_exact(quantity, found, known)


@pytest.mark.parametrize("mode", ["eval", "no_running_stats", "sync"])
def test_one_slice_and_a_vector_with_gaps(mlp, mode):
    """torch's batch norm reads such a weight wrongly in backward."""
    values = {n: p.detach().clone() for n, p in mlp.named_parameters()}
    values["1.weight"] = numbers(12)[::2]
    changed = copy.deepcopy(mlp)
    changed.load_state_dict(values, strict=False)
    x, y = numbers(1, 5, 4), numbers(1, 5, 3)
    known = truth(changed, mode, "contribution", mse, x, y, slices=True)
    options = {"mode": mode, "keep_batch_dim": False, "params": values}
    for quantity in (q.Norms(), q.Sum(), q.Gram(), q.Rows()):
        found = per_sample(mlp, mse, x, y, want=quantity, **options)
        assert_exact(quantity, found, known)


def test_forms(mlp):
    """A dict for a dict, a value for a quantity, a pair with has_aux."""

    def with_aux(output, target):
        return mse(output, target), output

    logits = copy.deepcopy(mlp).eval()(X).detach()
    one, aux = per_sample(mlp, with_aux, X, Y, want=q.Norms(), has_aux=True)
    assert_same(aux, logits)
    wanted = {"a": q.WeightedSum(automatic), "b": q.Gram(other=OTHER), "c": q.Norms()}
    for chunk_size in (None, 2):
        found, aux = per_sample(
            mlp, with_aux, X, Y, want=wanted, has_aux=True, chunk_size=chunk_size
        )
        assert_same(aux, logits)
        assert list(found) == ["a", "b", "c"]
        assert_same(found["c"], one)


def test_an_object_may_be_used_again(mlp):
    """In two calls, and twice in one."""
    norms, gram = q.Norms(), q.Gram(other=OTHER)
    first = per_sample(mlp, mse, X, Y, want={"a": norms, "b": gram, "c": gram})
    second = per_sample(mlp, mse, X[:2], Y[:2], want={"a": norms, "b": gram})
    assert torch.equal(first["b"], first["c"])
    assert_same(second["a"], first["a"][:2])
    assert_same(second["b"], first["b"][:2])


def test_into_memory(mlp):
    """Rows(out=) are written over and returned, beside other quantities."""
    out = {n: X.new_full((5, *p.shape), 7) for n, p in mlp.named_parameters()}
    for chunk_size in (None, 2):
        wanted = {"rows": q.Rows(out=out), "gram": q.Gram(), "norms": q.Norms()}
        found = per_sample(mlp, mse, X, Y, want=wanted, chunk_size=chunk_size)
        assert found["rows"] is out
        for key, quantity in wanted.items():
            assert_exact(quantity, found[key], known_of(mlp))


# -- Dtypes ----------------------------------------------------------------------------


def cast(tree, dtype):
    if isinstance(tree, tuple):
        return tuple(cast(t, dtype) for t in tree)
    return tree.to(dtype) if tree.is_floating_point() else tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["conv2d", "mlp", "linear on tokens", "tied", "norms"])
def test_lower_precision(name, dtype):
    """About those of float64; float32 for half precision, but for sums and rows."""
    model, x, y = problem(name)
    other = another(name, y)
    lower = copy.deepcopy(model).to(dtype)
    model = copy.deepcopy(lower).double()
    x, y, other = (cast(cast(t, dtype), torch.float64) for t in (x, y, other))
    known = truth(model, "eval", "", mse, x, y)
    known.others = truth(model, "eval", "", mse, *other).rows
    wanted = everything_wanted(model, 5, other)
    wanted["gram with another"] = q.Gram(other=cast(other, dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    for chunk_size in (None, 2):
        found = per_sample(
            lower, mse, *cast((x, y), dtype), want=wanted, chunk_size=chunk_size
        )
        for key, quantity in wanted.items():
            value = found[key]
            given = [*value.values()] if isinstance(value, dict) else [value]
            of = torch.float32 if isinstance(quantity, WIDE) else dtype
            assert {t.dtype for t in given} == {of}, key
            if "clipped" not in key:  # which has a corner
                assert_exact(quantity, value, known, tolerance)


def test_sums_of_half_precision_take_small_weights():
    """A weight below the range of half precision counts."""
    model = nn.Linear(4, 3).half()
    x, y = X.half() * 100, Y.half()
    known = known_of(copy.deepcopy(model).double(), x.double(), y.double())
    quantity = q.WeightedSum(torch.full((5,), 1e-8))
    found = per_sample(model, mse, x, y, want=quantity)
    assert found["weight"].dtype == torch.float16
    assert_exact(quantity, found, known, 0.01)


def test_autocast():
    """In the parameters' dtype; they are of rows that are not rounded to bfloat16."""
    model, x, y = images()
    other = torch.randn(3, 2, 6, 6), torch.randn(3, 3)
    wanted = everything_wanted(model, 5, other)
    with torch.autocast("cpu", torch.bfloat16):
        rows = per_sample_grads(model, mse, x, y)
        others = per_sample_grads(model, mse, *other)
        at_once = per_sample(model, mse, x, y, want=wanted)
        chunked = per_sample(model, mse, x, y, want=wanted, chunk_size=2)
    known = truth(model, "eval", "", mse, x, y)
    known.rows = {n: r.double() for n, r in rows.items()}
    known.others = {n: r.double() for n, r in others.items()}
    for key, quantity in wanted.items():
        for value in (at_once[key], chunked[key]):
            given = [*value.values()] if isinstance(value, dict) else [value]
            assert {t.dtype for t in given} == {torch.float32}, key
            tolerance = 0.05 if key == "losses" else 2.0**-8
            assert_exact(quantity, value, known, tolerance)


def test_channels_last():
    model, x, y = images()
    model, x, y = model.double(), x.double(), y.double()
    other = numbers(3, 2, 6, 6), numbers(3, 3)
    known = known_of(model, x, y)
    known.others = known_of(model, *other).rows
    model.to(memory_format=torch.channels_last)
    wanted = everything_wanted(model, 5, other)
    for chunk_size in (None, 2):
        found = per_sample(
            model,
            mse,
            x.to(memory_format=torch.channels_last),
            y,
            want=wanted,
            chunk_size=chunk_size,
        )
        for key, quantity in wanted.items():
            assert_exact(quantity, found[key], known)


# -- Draws -----------------------------------------------------------------------------


class Drops(nn.Module):
    """A network with dropout that also gives its mask."""

    def __init__(self, joins):
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 6, 3), nn.Linear(12, 3)
        self.norm = nn.BatchNorm1d(6) if joins else nn.Tanh()

    def forward(self, x):
        h = self.norm(self.a(x))
        mask = F.dropout(torch.ones_like(h))
        return self.b((h * mask).flatten(1)), mask.flatten(1)


class Masked(Drops):
    """The same, with the mask behind the input."""

    def forward(self, both):
        x, mask = both[:, :8].unflatten(1, (2, 4)), both[:, 8:]
        return self.b(self.norm(self.a(x)).flatten(1) * mask)


def masked_loss(output, target):
    return mse(output[0], target), output[1]


def rows_by_masks(model, plain, x, y, mode, **options):
    """The truth of a batch whose masks were drawn by a call for its rows."""
    options["mode"] = mode
    _, masks = per_sample_grads(model, masked_loss, x, y, has_aux=True, **options)
    both = torch.cat([x.flatten(1), masks], 1)
    step = options["chunk_size"]
    return truth(plain, mode, "contribution", mse, both, y, chunk_size=step)


@pytest.mark.parametrize("joins,mode", [(False, "eval"), (True, "sync")])
@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("chunk_size", [None, 2, 3])
def test_draws(joins, mode, randomness, chunk_size):
    """All looks and pairs see the same draws, the other batch those that follow; the
    generator is then where two calls for rows leave it."""
    torch.manual_seed(2)
    model, plain = Drops(joins).double(), Masked(joins).double()
    plain.load_state_dict(model.state_dict())
    x, y = numbers(6, 2, 4, seed=1), numbers(6, 3, seed=2)
    other = numbers(4, 2, 4, seed=3), numbers(4, 3, seed=4)
    options = {"randomness": randomness, "chunk_size": chunk_size}
    torch.manual_seed(11)
    known = rows_by_masks(model, plain, x, y, mode, **options)
    after_one = torch.get_rng_state()
    known.others = rows_by_masks(model, plain, *other, mode, **options).rows
    after_both = torch.get_rng_state()
    wanted = everything_wanted(plain, 6, other)
    before = everything(model)
    options = {"mode": mode, "has_aux": True, **options}

    def check(want, after):
        torch.manual_seed(11)
        found, _ = per_sample(model, masked_loss, x, y, want=want, **options)
        assert torch.equal(torch.get_rng_state(), after)
        for key, quantity in want.items():
            assert_exact(quantity, found[key], known)

    check(wanted, after_both)
    del wanted["gram with another"]
    check(wanted, after_one)
    for key in ("automatic", "cosine", "gram", "norms"):
        check({key: wanted[key]}, after_one)
    assert_same_state(model, before)


@pytest.mark.parametrize("chunk_size", [None, 2, 3])
def test_running_statistics(chunk_size):
    """They are updated once a chunk, by the call's own batch, whatever looks at it."""
    model, x, y = problem("conv2d")
    other = another("conv2d", y)
    plain = copy.deepcopy(model)
    for part in x.split(chunk_size or 5):
        plain(part)
    for keys in (["automatic", "cosine"], ["gram"], ["gram with another"], None):
        wanted = everything_wanted(model, 5, other)
        wanted = {key: wanted[key] for key in keys or wanted}
        updated = copy.deepcopy(model)
        found = per_sample(
            updated,
            mse,
            x,
            y,
            want=wanted,
            mode="sync",
            update_running_stats=True,
            chunk_size=chunk_size,
        )
        assert_same(dict(updated.named_buffers()), dict(plain.named_buffers()))
        kind = "contribution"
        known = truth(model, "sync", kind, mse, x, y, chunk_size=chunk_size)
        those = truth(model, "sync", kind, mse, *other, chunk_size=chunk_size)
        known.others = those.rows
        for key, quantity in wanted.items():
            assert_exact(quantity, found[key], known)


# -- Quantities of one's own -----------------------------------------------------------


class Late(q.Quantity):
    """Pairs the samples with others at the second look."""

    def __init__(self, other):
        self.other = other

    def looks(self, call):
        norms = yield q.Norms()
        found = yield {"own": q.Gram(), "other": q.Gram(other=self.other)}
        more = yield {"rows": q.Rows(), "cosine": Cosine()}
        return norms, found["own"], found["other"], more


@pytest.mark.parametrize("chunk_size", [None, 2, 9])
def test_quantities_of_quantities(mlp, chunk_size):
    """Pairs, rows and other quantities of one's own, at a later look."""
    known = known_of(mlp)
    known.others = known_of(mlp, *OTHER).rows
    found = per_sample(mlp, mse, X, Y, want=Late(OTHER), chunk_size=chunk_size)
    norms, own, other, more = found
    assert_exact(q.Norms(), norms, known)
    assert_exact(q.Gram(), own, known)
    assert_exact(q.Gram(other=OTHER), other, known)
    assert_exact(q.Rows(), more["rows"], known)
    assert_exact(Cosine(), more["cosine"], known)


class Wrong(q.Quantity):
    """Asks for what cannot be asked for."""

    def __init__(self, wanted):
        self.wanted = wanted

    def looks(self, call):
        yield self.wanted


class TooFew(q.PerSample):
    """Gives a number for all samples of a part."""

    def part(self, call, start, stop):
        return TooFewPart()


class TooFewPart(q.Part):
    def take(self, grads):
        self.found = grads.norms()[:1]

    def finished(self):
        return self.found


class NoPart(q.PerSample):
    def part(self, call, start, stop):
        """Return nothing."""


class NoYield(q.Quantity):
    def looks(self, call):
        return q.Norms()


@pytest.mark.parametrize(
    "quantity, text",
    [
        (TooFew(), "with TooFew: its parts gave Tensor .1,. for 5 samples. Return"),
        (NoPart(), "with NoPart: its method part returned None, a NoneType. Return"),
        (NoYield(), "with NoYield: its method looks returned Norms.*not a generator"),
        (Wrong(3), "with Wrong: its method looks yielded 3. Yield an object of"),
        (Wrong(q.Norms), "with Wrong: its method looks yielded Norms. Yield"),
        (Wrong({"a": {"b": q.Norms()}}), "its method looks yielded {'a': {'b'"),
        (Wrong(q.Rows(out={"x": X})), "yielded Rows.out=....*without memory"),
    ],
)
def test_quantities_that_ask_wrongly(mlp, quantity, text):
    with pytest.raises((TypeError, ValueError), match=text):
        per_sample(mlp, mse, X, Y, want=quantity)


def test_weighted_sums_in_sync_warn():
    """The sum of the weighted contributions is not the gradient of the weighted loss;
    that of the Jacobian's rows is."""
    net, weights = small_mlp().double(), torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])
    weights = weights.double()
    options = {"want": q.WeightedSum(weights), "mode": "sync"}
    with pytest.warns(UserWarning, match=r"with WeightedSum.*weigh the losses in loss"):
        per_sample(net, mse, X, Y, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = per_sample(net, mse, X, Y, rows="jacobian", **options)

    def weighed(output, target, weight):
        return weight.squeeze(0) * mse(output, target)

    want = per_sample(net, weighed, X, Y, weights, want=q.Sum(), mode="sync")
    assert_same(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "x, keep, said",
    [
        (torch.randn(3, 2, 2, 6, 6), True, "pass keep_batch_dim=False"),
        (torch.randn(3, 6, 6), False, "is called with x.i. as it is"),
    ],
)
def test_notes_on_the_batch_dimension(x, keep, said):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises((RuntimeError, ValueError)) as caught:
        per_sample(net, lambda o: o.sum(), x, want=q.Norms(), keep_batch_dim=keep)
    assert re.search(said, " ".join(caught.value.__notes__))


class ByLength(nn.Module):
    """A convolution whose options depend on the length of the input."""

    def __init__(self, option):
        super().__init__()
        self.conv, self.last, self.option = (
            nn.Conv1d(32, 32, 3),
            nn.Linear(32, 2),
            option,
        )

    def forward(self, x):
        value = 2 if x.size(-1) > 8 else 1
        options = {self.option: value, "padding": value}
        x = F.conv1d(x, self.conv.weight, self.conv.bias, **options)
        return self.last(torch.tanh(x).mean(-1))


@pytest.mark.parametrize("option", ["dilation", "stride"])
def test_gram_of_batches_that_a_layer_treats_differently(option):
    torch.manual_seed(3)
    net = ByLength(option).double()
    a, b = torch.randn(4, 32, 7).double(), torch.randn(3, 32, 9).double()

    def loss(output):
        return output.square().sum()

    for x, other in ((a, b), (b, a)):
        rows, others = (flat_rows(slow.rows(net, loss, t)) for t in (x, other))
        found = per_sample(net, loss, x, want=q.Gram(other=(other,)))
        sizes = rows.norm(dim=1)[:, None] * others.norm(dim=1)
        assert_same(found / sizes, rows @ others.T / sizes, rtol=0, atol=1e-12)


def flat_rows(rows):
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


@pytest.mark.parametrize("offset", [1e1, 1e3, 1e4])
def test_norms_where_terms_cancel(offset):
    """A gradient that is the small difference of large terms at the positions."""
    torch.manual_seed(3)
    net = nn.Sequential(
        *(nn.Conv1d(32, 32, 1, bias=False), nn.InstanceNorm1d(32), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(192, 5)),
    ).double()
    x, y = offset + torch.randn(8, 32, 6).double(), torch.randint(5, (8,))
    want = {"norms": q.Norms(per_parameter=True), "rows": q.Rows(), "gram": q.Gram()}
    found = per_sample(net, F.cross_entropy, x, y, want=want)
    for name, norms in found["norms"].items():
        assert_same(
            norms, found["rows"][name].flatten(1).norm(dim=1), rtol=1e-12, atol=0
        )


class LayerDrop(nn.Module):
    """Leaves a layer out at random, by Python's or numpy's generator."""

    def __init__(self, draw):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.draw = draw

    def forward(self, x):
        x = self.first(x)
        return self.second(x.tanh()) if self.draw() < 0.5 else x


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand])
@pytest.mark.parametrize("other", [None, (torch.randn(3, 4).double(),)])
def test_draws_of_python_and_numpy(draw, other):
    """A chunk that runs again draws what it drew before."""
    torch.manual_seed(3)
    random.seed(1)
    numpy.random.seed(1)
    x = torch.randn(8, 4).double()
    want = {"gram": q.Gram(), "rows": q.Rows(), "sum": q.Sum()}
    want["again"] = q.WeightedSum(torch.ones_like)
    if other is not None:
        want["other"] = q.Gram(other=other)
    net = LayerDrop(draw)
    found = per_sample(
        net, lambda o: (o.square() + o).sum(), x, want=want, chunk_size=2
    )
    rows = flat_rows(found["rows"])
    assert_same(found["gram"], rows @ rows.T, rtol=1e-10, atol=1e-10)
    assert_same(found["again"], found["sum"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale, weight", [(1e30, 1e-20), (1e-30, 1e20), (1.0, 1e-30)])
@pytest.mark.parametrize("conv", [False, True])
def test_weights_out_of_the_usual_range(scale, weight, conv):
    """Factors that would leave the range of float32, and results that do not."""
    torch.manual_seed(3)
    layer = nn.Conv1d(8, 2, 2, bias=False) if conv else nn.Linear(8, 2, bias=False)
    x = scale * torch.randn(3, 8, *((5,) if conv else ()))  # the larger of the two
    weights = weight * torch.tensor([1.0, -2.0, 3.0])

    def loss(output):
        return (output / scale).sum()

    want = {"rows": q.Rows(), "weighted": q.WeightedSum(weights)}
    found = per_sample(layer, loss, x, want=want)
    rows = found["rows"]["weight"].double()
    expected = torch.tensordot(weights.double(), rows, 1)
    size = float(expected.abs().max())
    assert_same(
        found["weighted"]["weight"].double() / size, expected / size, rtol=0, atol=1e-5
    )


def test_several_norms_to_clip_to_under_vmap(mlp):
    most = torch.tensor([0.1, 1.0, 1e3]).double()

    def clipped(most):
        return per_sample(mlp, mse, X, Y, want=q.ClippedSum(most))

    found = vmap(clipped)(most)
    expected = [clipped(float(one)) for one in most]
    for name in found:
        assert_same(found[name], torch.stack([e[name] for e in expected]))
    with_gradient = clipped(most[1].clone().requires_grad_())
    assert not any(t.requires_grad for t in with_gradient.values())


def test_results_have_memory_of_their_own(mlp):
    def both(output, target):
        loss = mse(output, target)
        return loss, loss

    want = {f"{i} {kind.__name__}": kind() for i in (0, 1) for kind in KINDS}
    found, aux = per_sample(mlp, both, X, Y, want=want, has_aux=True)
    before = copy.deepcopy((found, aux))
    for key in [key for key in found if key.startswith("0")]:
        for leaf in tree_flatten(found[key])[0]:
            leaf.fill_(torch.nan)
    assert_same(aux, before[1])
    for key in [key for key in found if key.startswith("1")]:
        assert_same(found[key], before[0][key])


KINDS = (q.Losses, q.Norms, q.Sum, q.SumOfSquares, q.Gram, q.Rows)


class Largest(q.PerSample):
    """The largest entry of every sample's gradient."""

    def part(self, call, start, stop):
        return LargestPart()


class LargestPart(q.Part):
    def __init__(self):
        self.parts = []

    def take(self, grads):
        few = [rows.flatten(1).abs().amax(1) for rows in grads.few()]
        self.parts.append(torch.cat(few))

    def finished(self):
        return torch.stack(self.parts).amax(0)


@pytest.mark.parametrize("name", ["conv2d", "tied", "embedding", "norms"])
def test_a_quantity_from_a_few_rows_at_a_time(name):
    model, x, y = problem(name)
    rows = slow.rows_in(model, "eval", mse, x, y)
    wanted = torch.stack([r.flatten(1).abs().amax(1) for r in rows.values()]).amax(0)
    for chunk_size in (None, 2):
        found = per_sample(model, mse, x, y, want=Largest(), chunk_size=chunk_size)
        assert_same(found, wanted)


# -- Samples left out, and batches of none ---------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["conv2d", "mlp", "tied", "linear on tokens", "norms"])
def test_weights_of_zero(name, bad):
    """They leave a sample out, whatever its gradient; its own numbers stay its own."""
    model, x, y = problem(name)
    known = truth(model, "eval", "", mse, x, y)
    wanted = everything_wanted(model, 5, (x[:2], y[:2]))
    known.others = {n: r[:2] for n, r in known.rows.items()}
    y = y.clone()
    y[3] = bad  # and a loss of which all rows are such
    kept = torch.tensor([True, True, True, False, True])
    weights = numbers(5).where(kept, 0)
    for chunk_size in (None, 1, 2):
        options = {"want": q.WeightedSum(weights), "chunk_size": chunk_size}
        found = per_sample(model, mse, x, y, **options)
        assert_exact(q.WeightedSum(weights), found, known)
        masks = q.WeightedSum(lambda norms: norms.isfinite())
        found = per_sample(model, mse, x, y, want=masks, chunk_size=chunk_size)
        assert_exact(q.WeightedSum(kept.double()), found, known)
        for quantity in (q.WeightedSum(X.new_zeros(5)), q.WeightedSum(-weights)):
            found = per_sample(model, mse, x, y, want=quantity, chunk_size=chunk_size)
            assert_exact(quantity, found, known)
        for key in ("losses", "norms", "gram", "gram with another", "dots", "sketch"):
            quantity = wanted[key]
            found = per_sample(model, mse, x, y, want=quantity, chunk_size=chunk_size)
            right = expected(quantity, known)
            where = kept.unsqueeze(1) & kept if key == "gram" else kept
            assert_same(found[where], right[where])
            assert not found[~where].isfinite().any()


def test_an_input_that_is_not_a_number():
    model, x, y = problem("conv2d")
    known = truth(model, "eval", "", mse, x, y)
    x[3, 0, 0, 0] = torch.nan
    weights = torch.tensor([1, 2, -1, 0, 1])
    found = per_sample(model, mse, x, y, want=q.WeightedSum(weights))
    assert_exact(q.WeightedSum(weights), found, known)


@pytest.mark.parametrize(
    "mode,chunk_size",
    [
        ("eval", None),
        ("eval", 1),
        ("eval", 2),
        ("eval", 7),
        ("sync", None),
        ("sync", 3),
    ],
)
def test_empty_batches(mlp, mode, chunk_size):
    """Shapes and dtypes are those of a batch without its samples; sums are 0."""
    wanted = everything_wanted(mlp, 0, OTHER)
    before = everything(mlp)
    options = {"mode": mode, "chunk_size": chunk_size}
    found = per_sample(mlp, mse, X[:0], Y[:0], want=wanted, **options)
    assert_same_state(mlp, before)
    sums = q.Sum, q.SumOfSquares, q.ClippedSum, q.WeightedSum
    for key, quantity in wanted.items():
        if isinstance(quantity, (*sums, q.Rows)):
            first = () if isinstance(quantity, sums) else (0,)
            for name, p in mlp.named_parameters():
                assert found[key][name].shape == (*first, *p.shape)
                assert not found[key][name].any()
    shapes = {
        **dict.fromkeys(("losses", "norms", "dots", "cosine"), (0,)),
        **{
            "dots with three": (0, 3),
            "sketch": (0, 7),
            "gaussian sketch": (0, 3),
            "kronecker sketch": (0, 12),
        },
        **{"gram": (0, 0), "gram with another": (0, 3)},
    }
    for key, shape in shapes.items():
        assert found[key].shape == shape and found[key].dtype == torch.float64, key
    assert {n.shape for n in found["norms by parameter"].values()} == {(0,)}
    if mode == "eval":
        nobody = q.Gram(other=(X[:0], Y[:0]))
        assert per_sample(mlp, mse, X, Y, want=nobody, **options).shape == (5, 0)


# -- Slices that are batches -----------------------------------------------------------


SLICES = [
    *((name, mode) for name in ("conv2d", "norms") for mode in MODES),
    *((name, mode) for name in ("tied", "used twice") for mode in ("eval", "sync")),
]


@pytest.mark.parametrize("name,mode", SLICES)
def test_slices_that_are_batches(name, mode):
    """x[i] is a batch of its own, whose row is that of its loss; aux as it is."""
    model, x, y = problem(name)
    torch.manual_seed(4)
    x = torch.stack([x, x.flip(0), x.roll(1, 0)])[:, :4]
    y = torch.randn_like(torch.stack([y, y, y]))[:, :4]
    other = x[:2].flip(1) + 1, y[:2] - 1
    if not x.is_floating_point():
        other = x[:2].flip(2), y[:2]
    options = {"mode": mode, "num_groups": 2, "keep_batch_dim": False}
    before = everything(model)

    def with_aux(output, target):
        return mse(output, target), {"output": output, "number": output.sum()}

    for chunk_size in (None, 2):
        given = {"chunk_size": chunk_size, "slices": True}
        known = truth(model, mode, "contribution", mse, x, y, **given)
        those = truth(model, mode, "contribution", mse, *other, **given)
        known.others = those.rows
        wanted = everything_wanted(model, 3, other)
        found, aux = per_sample(
            model,
            with_aux,
            x,
            y,
            want=wanted,
            has_aux=True,
            chunk_size=chunk_size,
            **options,
        )
        for key, quantity in wanted.items():
            assert_exact(quantity, found[key], known)
        losses = [mse(*pair) for pair in zip(aux["output"], y)]
        assert_same(torch.stack(losses), known.losses)
        assert_same(aux["number"], aux["output"].flatten(1).sum(1))
    assert_same_state(model, before)


def test_slices_train_as_one_batch():
    """In "sync" they update the running statistics as the merged batch does."""
    model, x, y = problem("conv2d")
    x, y = torch.stack([x, x + 1]), torch.stack([y, y])
    plain = copy.deepcopy(model)
    plain(x.flatten(0, 1))
    options = {"mode": "sync", "update_running_stats": True, "keep_batch_dim": False}
    per_sample(model, mse, x, y, want=Cosine(), **options)
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


# -- Derivatives -----------------------------------------------------------------------


def slow_rows_at(model, params, x, y):
    """Rows with autograd's graph."""
    found = []
    for part, target in zip(x.split(1), y.split(1)):
        loss = mse(functional_call(model, params, (part,)), target)
        leaves = list(params.values())
        found.append(torch.autograd.grad(loss, leaves, create_graph=True))
    return {n: torch.stack(column) for n, column in zip(params, zip(*found))}


def as_matrix(rows):
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


def clipped(rows, most):
    return times(rows, (most / as_matrix(rows).norm(dim=1)).clamp(max=1))


def times(rows, factors):
    return {n: torch.tensordot(factors, row, 1) for n, row in rows.items()}


def cosines(rows):
    flat = as_matrix(rows)
    total = flat.sum(0)
    return flat @ total / (flat.norm(dim=1) * total.norm())


WEIGHTS = torch.tensor([1.0, 0.0, -2.0, 0.5, 1.0], dtype=torch.float64)
# A quantity, from vectors, and what it is of rows with a graph.
DERIVED = {
    "norms": (lambda v: q.Norms(), lambda rows, v: as_matrix(rows).norm(dim=1)),
    "sum": (
        lambda v: q.Sum(),
        lambda rows, v: {n: row.sum(0) for n, row in rows.items()},
    ),
    "squares": (
        lambda v: q.SumOfSquares(),
        lambda rows, v: {n: row.square().sum(0) for n, row in rows.items()},
    ),
    "clipped": (lambda v: q.ClippedSum(1.0), lambda rows, v: clipped(rows, 1.0)),
    "weighted": (
        lambda v: q.WeightedSum(WEIGHTS),
        lambda rows, v: times(rows, WEIGHTS),
    ),
    "automatic": (
        lambda v: q.WeightedSum(automatic),
        lambda rows, v: times(rows, automatic(as_matrix(rows).norm(dim=1))),
    ),
    "gram": (
        lambda v: q.Gram(),
        lambda rows, v: as_matrix(rows) @ as_matrix(rows).mT,
    ),
    "dots": (
        q.Dots,
        lambda rows, v: sum([(rows[n] * v[n]).flatten(1).sum(1) for n in rows]),
    ),
    "cosine": (lambda v: Cosine(), lambda rows, v: cosines(rows)),
    "rows": (lambda v: q.Rows(), lambda rows, v: rows),
    "sketch": (lambda v: q.Sketch(k=3), lambda rows, v: slow.sketch(rows, 3)),
}


def a_number(tree):
    """None of its derivatives is special."""
    leaves = list(tree.values()) if isinstance(tree, dict) else [tree]
    flat = torch.cat([leaf.flatten() for leaf in leaves])
    return (flat.sin() * torch.arange(1, len(flat) + 1)).sum()


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_derivatives_by_parameters(mlp, name, chunk_size):
    """Of a function of a quantity, through all that it depends on."""
    quantity, slow_form = DERIVED[name]
    vectors = {n: torch.cos(p.detach() + 1) for n, p in mlp.named_parameters()}
    params = {n: p.detach().clone() for n, p in mlp.named_parameters()}

    def fast(params):
        options = {"params": params, "chunk_size": chunk_size}
        return a_number(per_sample(mlp, mse, X, Y, want=quantity(vectors), **options))

    found = grad(fast)(params)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    rows = slow_rows_at(copy.deepcopy(mlp).eval(), leaves, X, Y)
    right = torch.autograd.grad(a_number(slow_form(rows, vectors)), [*leaves.values()])
    assert_same(found, dict(zip(leaves, right)))


def test_derivatives_by_what_a_quantity_is_given(mlp):
    """Weights, the largest norm, vectors and the other batch."""
    rows = slow.rows_in(mlp, "eval", mse, X, Y)
    vectors = {n: torch.cos(p.detach()) for n, p in mlp.named_parameters()}
    plain = copy.deepcopy(mlp).eval()
    params = dict(plain.named_parameters())

    def pairs(x):
        others = slow_rows_at(plain, params, x, OTHER[1])
        return as_matrix(rows) @ as_matrix(others).mT

    def along(scale):
        return {n: vector * scale for n, vector in vectors.items()}

    for quantity, slow_form, at in (
        (q.WeightedSum, lambda w: times(rows, w), WEIGHTS),
        (q.ClippedSum, lambda most: clipped(rows, most), torch.tensor(1.0).double()),
        (lambda x: q.Gram(other=(x, OTHER[1])), pairs, OTHER[0]),
        (
            lambda s: q.Dots(along(s)),
            lambda s: slow.dots(rows, along(s)),
            torch.tensor(2.0).double(),
        ),
    ):
        for chunk_size in (None, 2):

            def fast(given, quantity=quantity, chunk_size=chunk_size):
                want = quantity(given)
                found = per_sample(mlp, mse, X, Y, want=want, chunk_size=chunk_size)
                return a_number(found)

            leaf = at.clone().requires_grad_()
            (right,) = torch.autograd.grad(a_number(slow_form(leaf)), leaf)
            assert_same(grad(fast)(at), right)


def test_jacobians_and_vmap_around(mlp):
    """jacrev of the products of gradients; vmap over weights and over batches."""
    weight = mlp[3].weight.detach()

    def gram(weight):
        return per_sample(mlp, mse, X, Y, want=q.Gram(), params={"3.weight": weight})

    def slow_gram(weight):
        rows = slow_rows_at(copy.deepcopy(mlp).eval(), {"3.weight": weight}, X, Y)
        return as_matrix(rows) @ as_matrix(rows).mT

    right = torch.autograd.functional.jacobian(slow_gram, weight)
    assert_same(jacrev(gram)(weight), right)
    several = torch.stack([WEIGHTS, 1 - WEIGHTS])
    known = known_of(mlp)
    found = vmap(lambda w: per_sample(mlp, mse, X, Y, want=q.WeightedSum(w)))(several)
    for i, weights in enumerate(several):
        own = {n: total[i] for n, total in found.items()}
        assert_exact(q.WeightedSum(weights), own, known)
    wanted = everything_wanted(mlp, 5, OTHER)
    wanted["late"] = Late(OTHER)
    both = torch.stack([X, X + 1])
    for chunk_size in (None, 2):
        found = vmap(
            lambda x, size=chunk_size: per_sample(
                mlp, mse, x, Y, want=wanted, chunk_size=size
            )
        )(both)
        for i, x in enumerate(both):
            known = known_of(mlp, x)
            known.others = known_of(mlp, *OTHER).rows
            for key, quantity in wanted.items():
                value = found[key]
                if key == "late":
                    key, quantity, value = "rows", q.Rows(), value[3]["rows"]
                if isinstance(value, dict):
                    own = {n: t[i] for n, t in value.items()}
                else:
                    own = value[i]
                assert_exact(quantity, own, known)


def test_plain_autograd(mlp):
    """Rows alone carry its derivatives, beside any other quantities."""
    x = X.clone().requires_grad_()
    weights = WEIGHTS.clone().requires_grad_()
    vectors = {n: p + 1 for n, p in mlp.named_parameters()}
    wanted = everything_wanted(mlp, 5, (OTHER[0].clone().requires_grad_(), OTHER[1]))
    wanted = {**wanted, "given": q.WeightedSum(weights), "moving": q.Dots(vectors)}
    for chunk_size in (None, 2):
        found = per_sample(mlp, mse, x, Y, want=wanted, chunk_size=chunk_size)
        for key, value in found.items():
            given = [*value.values()] if isinstance(value, dict) else [value]
            assert {t.requires_grad for t in given} == {key == "rows"}, key
        (by_input,) = torch.autograd.grad(a_number(found["rows"]), x)
        leaves = dict(copy.deepcopy(mlp).eval().named_parameters())
        plain = X.clone().requires_grad_()
        rows = slow_rows_at(copy.deepcopy(mlp).eval(), leaves, plain, Y)
        assert_same(by_input, *torch.autograd.grad(a_number(rows), plain))


# -- Memory ----------------------------------------------------------------------------


class Tensors(TorchDispatchMode):
    """Notes the largest tensor that any operator makes."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in tensors_in(found):
            self.most = max(self.most, t.untyped_storage().nbytes() // 8)
        return found


def tensors_in(tree):
    leaves = tree_flatten(tree)[0]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


LAYER = 32 * 32


def deep(tokens):
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(32, 32), nn.Tanh())]
    model = net(*layers, *([Average()] if tokens else []), nn.Linear(32, 3)).double()
    return model, numbers(8, *((5, 32) if tokens else (32,))), numbers(8, 3)


class Average(nn.Module):
    def forward(self, x):
        return x.mean(1)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_memory(tokens, chunk_size):
    """No quantity but Rows makes more at a time than the rows of one layer."""
    model, x, y = deep(tokens)
    wanted = everything_wanted(model, 8, (x[:3], y[:3]))
    three = wanted.pop("dots with three")
    del wanted["gaussian sketch"]  # it has a table of 65,536 numbers
    for key, quantity in wanted.items():
        with Tensors() as seen:
            per_sample(model, mse, x, y, want=quantity, chunk_size=chunk_size)
        if key == "rows":
            assert seen.most >= 8 * LAYER
        else:
            assert seen.most <= 8 * LAYER, key
    with Tensors() as seen:
        per_sample(model, mse, x, y, want=three, chunk_size=chunk_size)
    assert seen.most <= 8 * LAYER


class Alive(TorchDispatchMode):
    """The most numbers that are alive at a time, of those made inside."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [t.untyped_storage().data_ptr() for t in tensors_in(args)]
        for t in tensors_in(found):
            if t.untyped_storage().data_ptr() not in given:  # no view
                self.note(t.untyped_storage())
        return found

    def note(self, storage):
        place, size = storage.data_ptr(), storage.nbytes() // 8
        if place in self.known or not size:
            return
        self.known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.known.discard(place)
            self.now -= size

        weakref.finalize(storage, gone)


def peak_of(model, x, y, quantity):
    with Alive() as seen:
        per_sample(model, mse, x, y, want=quantity)
    return seen.peak


def test_peak_memory():
    """Rows take B x P, the others less than half of that."""
    model, x, y = deep(tokens=False)
    rows = 8 * sum(p.numel() for p in model.parameters())
    assert peak_of(model, x, y, q.Rows()) >= rows
    wanted = everything_wanted(model, 8, (x[:3], y[:3]))
    del wanted["rows"], wanted["gaussian sketch"]
    for key, quantity in wanted.items():
        assert peak_of(model, x, y, quantity) < rows / 2, key


# -- Errors ----------------------------------------------------------------------------


def vectors_of(model, **changes):
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    found.update(changes)
    return {n: v for n, v in found.items() if v is not ...}


def three_of(model, **changes):
    return {n: torch.stack([v, v, v]) for n, v in vectors_of(model).items()} | changes


# What a quantity is made of, the other options, and the text.
ERRORS = [
    (
        lambda net: q.WeightedSum(torch.ones(4)),
        {},
        "per_sample(...) with WeightedSum(...): weights is Tensor (4,), and the batch "
        "has 5 samples. Give one real weight for each, a tensor (5,).",
    ),
    (lambda net: q.WeightedSum(torch.ones(5, 1)), {}, "weights is Tensor (5, 1), and"),
    (
        lambda net: q.WeightedSum([1.0] * 5),
        {},
        "WeightedSum(...): weights is [1.0, 1.0, 1.0, 1.0, 1.0], a list. Pass a tensor "
        "(B,), or a function of the norms that returns one.",
    ),
    (
        lambda net: q.WeightedSum(torch.ones(5, device="meta")),
        {},
        "weights is torch.float32, on meta. Give a real tensor on cpu.",
    ),
    (
        lambda net: q.WeightedSum(torch.ones(5, dtype=torch.complex64)),
        {},
        "weights is torch.complex64, on cpu. Give a real tensor on cpu.",
    ),
    (
        lambda net: q.Dots([X]),
        {},
        "Dots(...): vectors is [Tensor (5, 4)], a list. Pass a dict from names of "
        "parameters to tensors.",
    ),
    (
        lambda net: q.Dots(vectors_of(net, **{"3.bias": ...})),
        {},
        "per_sample(...) with Dots(...): vectors lacks '3.bias'. Give one for each "
        "name in ['0.weight', '0.bias',",
    ),
    (
        lambda net: q.Dots(vectors_of(net, nope=X)),
        {},
        "vectors has 'nope', by which the call does not differentiate. Give one for "
        "each name",
    ),
    (
        lambda net: q.Dots(vectors_of(net)),
        {"params": ["3.bias"]},
        "in ['3.bias'], or choose with params=.",
    ),
    (
        lambda net: q.Dots(vectors_of(net, **{"3.bias": X})),
        {},
        "vectors['3.bias'] is Tensor (5, 4), and the parameter has shape (3,). Give "
        "(3,) for one vector, or K of them as (K, 3).",
    ),
    (
        lambda net: q.Dots(vectors_of(net, **{"3.bias": None})),
        {},
        "vectors['3.bias'] is None, and the parameter has shape (3,)",
    ),
    (
        lambda net: q.Dots(three_of(net, **{"3.bias": X.new_zeros(2, 3)})),
        {},
        "vectors['0.weight'] holds 3 and vectors['3.bias'] 2. Give the same number of "
        "vectors for every name.",
    ),
    (
        lambda net: q.Dots(three_of(net, **{"3.bias": X.new_zeros(3)})),
        {},
        "vectors['0.weight'] holds 3 and vectors['3.bias'] one. Give the same number",
    ),
    (
        lambda net: q.Dots(
            vectors_of(net.to("cpu"), **{"3.bias": torch.ones(3).to("meta")})
        ),
        {},
        "vectors['3.bias'] is torch.float32, on meta. Give a real tensor on cpu.",
    ),
    (
        lambda net: q.Gram(other=X),
        {},
        "Gram(...): other is Tensor (5, 4), a Tensor. Pass a tuple as the batch of the "
        "call is, Gram(other=(x, y)).",
    ),
    (
        lambda net: q.Gram(other=(X,)),
        {},
        "per_sample(...) with other=: other holds Tensor (5, 4), torch.float64, cpu, "
        "and the batch Tensor (5, 4), torch.float64, cpu; Tensor (5, 3), torch.float64,"
        " cpu. Give a tuple of the same structure, such as (inputs, targets), on the "
        "same device.",
    ),
    (lambda net: q.Gram(other=({"x": X}, Y)), {}, "Give a tuple of the same structure"),
    (
        lambda net: q.Gram(other=(X[0], Y)),
        {},
        "other holds Tensor (4,), torch.float64, cpu; T",
    ),
    (
        lambda net: q.Gram(other=(X.float(), Y)),
        {},
        "other holds Tensor (5, 4), torch.float32, cpu; Tensor (5, 3), torch.flo",
    ),
    (
        lambda net: q.Gram(other=(X.to("meta"), Y)),
        {},
        "other holds Tensor (5, 4), torch.float64, meta; Tensor (5, 3), torch.fl",
    ),
    (
        lambda net: q.Gram(other=(X, Y[:3])),
        {},
        "per_sample(...) with other=: batch sizes disagree: batch[0] has shape (5, 4), "
        "batch[1] has shape (3, 3).",
    ),
    (
        lambda net: q.Gram(),
        {"chunk_size": "auto"},
        'per_sample(...) with chunk_size="auto": Gram pairs samples of two chunks, and '
        "how many samples fit into memory is only found for one. Pass an int, for "
        "samples of which twice as many fit.",
    ),
    (
        lambda net: {"norms": q.Norms(), "gram": q.Gram(other=OTHER)},
        {"chunk_size": "auto"},
        'per_sample(...) with chunk_size="auto": Gram pairs samples of two chunks',
    ),
    (
        lambda net: q.ClippedSum({"nope*": 1.0, "*": 1.0}),
        {},
        "per_sample(...) with ClippedSum(...): the pattern 'nope*' matches no "
        "parameter, or only such as an earlier pattern does. Names are those of "
        "model.named_parameters()",
    ),
    (
        lambda net: q.ClippedSum({"*": 1.0, "0.*": 1.0}),
        {},
        "the pattern '0.*' matches no parameter, or only such as an earlier",
    ),
    (
        lambda net: q.ClippedSum({"0.*": 1.0}),
        {},
        "none of the patterns ['0.*'] matches the parameter '1.weight'. Add one that "
        'does; "*" matches all that is left.',
    ),
    (
        lambda net: q.ClippedSum({}),
        {},
        "ClippedSum(...): max_grad_norm is {}. Give patterns of names and their norms",
    ),
    (
        lambda net: q.ClippedSum(0.0),
        {},
        "ClippedSum(...): max_grad_norm is 0.0. Pass the largest norm a row may keep, "
        "above 0.",
    ),
    (lambda net: q.ClippedSum(math.nan), {}, "max_grad_norm is nan. Pass the largest"),
    (lambda net: q.ClippedSum({"*": -1}), {}, "max_grad_norm['*'] is -1. Pass the"),
    (lambda net: q.ClippedSum("1"), {}, "max_grad_norm is '1', a str. Pass one number"),
    (lambda net: q.ClippedSum(True), {}, "max_grad_norm is True, a bool. Pass one"),
    (
        lambda net: q.Norms(per_parameter="all"),
        {},
        "Norms(...): per_parameter is 'all', a str. Pass True or False.",
    ),
    (lambda net: {}, {}, 'per_sample(...): want is empty. Name at least one, {"norms"'),
    (
        lambda net: q.Norms,
        {},
        "per_sample(...): want is the class Norms. Write Norms(...), with parentheses.",
    ),
    (
        lambda net: {"a": q.Norms(), "b": q.Gram},
        {},
        "per_sample(...): want['b'] is the class Gram. Write Gram(...), with",
    ),
    (
        lambda net: "norms",
        {},
        "per_sample(...): want is 'norms', a str. Pass an object of "
        "vmapsafe.quantities, such as Norms(), or a dict of some.",
    ),
    (lambda net: {"a": None}, {}, "want['a'] is None, a NoneType. Pass an object of"),
    (
        lambda net: q.Norms(),
        {"keep_batch_dim": False, "mode": "sync", "rows": "jacobian"},
        'per_sample(...) with keep_batch_dim=False: rows="jacobian" is about single '
        'samples. Use rows="contribution", or a batch of single samples.',
    ),
    (
        lambda net: q.Norms(),
        {"keep_batch_dim": False, "mode": "sync", "rows": "detached"},
        'with keep_batch_dim=False: rows="detached" is about single samples.',
    ),
    (
        lambda net: q.Norms(),
        {"keep_batch_dim": 0},
        "per_sample(...): keep_batch_dim is 0, an int. Pass True or False.",
    ),
    (
        lambda net: {"a": q.Sum(), "b": q.Norms(gather="all")},
        {},
        'per_sample(...) with gather="all": torch.distributed has no process group. '
        "Call torch.distributed.init_process_group first, or leave gather out.",
    ),
    (lambda net: q.Sum(reduce="all"), {}, 'per_sample(...) with reduce="all": torch.'),
    (
        lambda net: q.Sum(reduce="mean"),
        {},
        "per_sample(...): unknown reduce 'mean'. Pass None for the sum in this "
        'process, or "all".',
    ),
    (lambda net: q.Rows(out={}), {}, "per_sample(...) with out=: out has the names []"),
]


@pytest.mark.parametrize(
    "want,options,text", ERRORS, ids=[str(i) for i in range(len(ERRORS))]
)
def test_errors(mlp, want, options, text):
    """Before anything is computed."""
    before, calls = everything(mlp), []
    with mlp[0].register_forward_hook(lambda *args: calls.append(args)):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            per_sample(mlp, mse, X, Y, want=want(mlp), **options)
        assert not calls
        per_sample(mlp, mse, X, Y, want=q.Losses())
        assert calls  # it would have been seen
    assert text in str(caught.value)
    assert_same_state(mlp, before)


RETURNED = {
    "a list": (lambda norms: norms.tolist(), "gave is [", "Give one real weight for"),
    "too few": (
        lambda norms: norms[:3],
        "gave is Tensor (3,), and the batch has 5",
        "",
    ),
    "nothing": (lambda norms: None, "gave is None, and the batch has 5 samples", ""),
    "elsewhere": (
        lambda norms: norms.to("meta"),
        "what the function of the norms gave is torch.float64, on meta.",
        "Give a real tensor on cpu.",
    ),
}


@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_weights_that_are_none(mlp, name, chunk_size):
    """A function of the norms that gives something else, after the first look."""
    function, *texts = RETURNED[name]
    before = everything(mlp)
    with pytest.raises(ValueError) as caught:
        want = {"a": q.WeightedSum(function), "b": q.Rows()}
        per_sample(mlp, mse, X, Y, want=want, chunk_size=chunk_size)
    for text in ("per_sample(...) with WeightedSum(...)", *texts):
        assert text in str(caught.value)
    assert_same_state(mlp, before)


def test_an_error_of_the_function_of_the_norms(mlp):
    """It is the user's own, and the model is as it was."""
    before = everything(mlp)
    with pytest.raises(ZeroDivisionError):
        per_sample(mlp, mse, X, Y, want=q.WeightedSum(lambda norms: 1 / 0))
    assert_same_state(mlp, before)
