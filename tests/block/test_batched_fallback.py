"""batched(fallback="loop"): where vmap refuses, the slices run one after another."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from blocks import EACH_ALONE, block
from refusing import CHECKPOINTS, FUNCTIONS, LAYERS, around, numbers, refusing
from slow import plain_in
from state import assert_same_state, everything
from torch import nn
from torch.func import functional_call, grad, vmap

from vmapsafe import (
    FallbackWarning,
    VmapSafeRuntimeError,
    VmapSafeValueError,
    batched,
    vmap_safe,
)
from vmapsafe.testing import assert_same

pytestmark = pytest.mark.filterwarnings("ignore::vmapsafe.FallbackWarning")


X = numbers(5, 2, 5, 5, seed=1)
ROWS = numbers(4, 3, seed=2)


@pytest.mark.parametrize("mode", EACH_ALONE)
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", [*LAYERS, *CHECKPOINTS])
def test_networks(name, chunk_size, mode):
    """In a block, as slice by slice by hand; with derivatives through it."""
    model = refusing(name)
    plain = plain_in(model, mode)
    expected = torch.cat([plain(x) for x in X.split(1)])
    forward = batched(model, chunk_size=chunk_size, fallback="loop")
    before = everything(model)
    with block(model, mode):
        found = forward(X)
        assert_same(found, expected)
        loss = found.square().sum()
        loss.backward()
    expected.square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters()):
        assert_same(one.grad, other.grad)
        one.grad = None
    assert_same_state(model, before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    """Without a block, and with slices as they are."""
    function = FUNCTIONS[name]
    x = ROWS.abs()
    expected = torch.cat([function(one) for one in x.split(1)])
    assert_same(batched(function, fallback="loop")(x), expected)
    as_they_are = batched(function, keep_batch_dim=False, fallback="loop")
    expected = torch.stack([function(one) for one in x])
    assert_same(as_they_are(x), expected)


def value(x):
    """A number that vmap does not give."""
    return x.sum().item()


@pytest.mark.parametrize("keep", [True, False])
def test_as_vmap_gives_it(keep):
    """The same function without what vmap refuses gives the same, by vmap: shapes,
    strides of dimensions, structure, dtypes."""

    def function(tree, shared, flag, *, by_name, refuse):
        if refuse:
            value(tree["a"])
        a, b = tree["a"], tree["b"]
        assert flag == "flag" and shared.shape == (3,)
        y = a * 2 + shared[0]
        return {"rows": y, "pair": (y.sum(), (b > 0).int()), "named": by_name.float()}

    given = {"a": ROWS.T, "b": ROWS}, numbers(3), "flag"
    for out_dims in (0, -1, {"rows": 1, "pair": 0, "named": 0}):
        options = {
            "in_dims": ({"a": 1, "b": 0}, None, None),
            "out_dims": out_dims if keep or out_dims != -1 else 0,
            "keep_batch_dim": keep,
        }
        if keep:  # a slice of "a" is (3, 1)
            options["in_dims"] = ({"a": 0, "b": 0}, None, None)
            given = {"a": ROWS, "b": ROWS}, given[1], "flag"
        right = batched(function, **options)(*given, by_name=ROWS, refuse=False)
        loops = batched(function, fallback="loop", **options)
        found = loops(*given, by_name=ROWS, refuse=True)
        assert_same(found, right)


def test_outputs_that_all_slices_share():
    def function(x, shared, same):
        value(x)
        return x, (shared * 2 if same else x.sum()), None

    dims = (0, None, None)
    loops = batched(function, dims, dims, keep_batch_dim=False, fallback="loop")
    rows, shared, nothing = loops(ROWS, numbers(3), True)
    assert_same(rows, ROWS)
    assert_same(shared, numbers(3) * 2)
    assert nothing is None
    with pytest.raises(VmapSafeValueError, match="differs from slice to slice"):
        loops(ROWS, numbers(3), False)


WRONG = {
    "shapes": (lambda x: x[:, x[0] > 0], "that do not fit together, .*, torch.float64"),
    "structures": (
        lambda x: (x, x) if value(x) > 0 else [x],
        "outputs of different structures",
    ),
    "not a tensor": (lambda x: value(x), "a slice gives .*, a float, and not a tensor"),
    "not a batch of one": (lambda x: x[0] * value(x), "not a batch of one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_outputs_that_do_not_fit(name):
    function, said = WRONG[name]
    with pytest.raises(VmapSafeValueError, match=said):
        batched(function, fallback="loop")(ROWS)


def test_out_dims_that_do_not_fit():
    def function(x):
        value(x)
        return x

    with pytest.raises(VmapSafeValueError, match="does not fit the structure"):
        batched(function, out_dims=(0, 0), fallback="loop")(ROWS)


def test_an_empty_batch():
    def function(x):
        return {"y": x * value(x), "sum": x.sum()}

    found = batched(function, fallback="loop")(ROWS[:0])
    assert found["y"].shape == (0, 3) and found["sum"].shape == (0,)
    assert found["y"].dtype == torch.float64


def test_under_transforms():
    """Outside: grad passes through, an outer vmap raises its own error. Inside: the
    function takes derivatives itself."""

    @batched(fallback="loop")
    def function(x):
        return x.pow(3) if value(x.detach()) else x

    assert_same(grad(lambda x: function(x).sum())(ROWS), 3 * ROWS.square())
    with pytest.raises(RuntimeError, match="item"):
        vmap(function)(ROWS[None])

    model = refusing("item")

    @batched(in_dims=(None, 0), keep_batch_dim=False, fallback="loop")
    def gradients(params, x):
        def loss(params):
            return functional_call(model, params, x[None]).square().sum()

        return grad(loss)(params)

    with vmap_safe(model):
        params = {n: p.detach() for n, p in model.named_parameters()}
        found = gradients(params, X)
    plain = plain_in(model, "eval")
    for i, x in enumerate(X.split(1)):
        plain.zero_grad()
        plain(x).square().sum().backward()
        for name, p in plain.named_parameters():
            assert_same(found[name][i], p.grad)


# -- Random numbers, and what the attempt had done -------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_draws(randomness, chunk_size):
    def function(x):
        y = F.dropout(x)
        value(x)
        return y + torch.rand(1, 8, dtype=x.dtype)

    loops = batched(
        function, randomness=randomness, chunk_size=chunk_size, fallback="loop"
    )
    x = torch.ones(6, 8, dtype=torch.float64)
    torch.manual_seed(4)
    rows, state = [], torch.get_rng_state()
    for one in x.split(1):
        if randomness == "same":
            torch.set_rng_state(state)
        rows.append(function(one))
    after = torch.rand(1)
    torch.manual_seed(4)
    assert_same(loops(x), torch.cat(rows))
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_draws_of_python(randomness):
    def function(x):
        y = x * random.random()
        value(x)
        return y

    random.seed(0)
    each = [random.random() for _ in range(4)]
    if randomness != "different":
        each = each[:1] * 4
    random.seed(0)
    found = batched(function, randomness=randomness, fallback="loop")(ROWS)
    assert_same(found, ROWS * torch.tensor(each, dtype=torch.float64)[:, None])


@pytest.mark.parametrize("first", [True, False])
def test_a_draw_in_mode_error(first):
    def function(x):
        if first:
            x = F.dropout(x)
        value(x)
        return F.dropout(x)

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="randomness error mode") as caught:
        batched(function, fallback="loop")(ROWS)
    assert isinstance(caught.value, VmapSafeRuntimeError) != first
    assert torch.equal(torch.get_rng_state(), state)


class Counts(nn.Module):
    """Counts its calls, in place and by assignment."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.assigned = self.assigned + 1
        value(x)
        return x


class Holder:
    def __init__(self, net):
        self.net = net

    def run(self, x):
        return self.net(x)


GLOBAL = Counts()


def by_default(x, net=GLOBAL):
    return net(x)


def by_global(x):
    return GLOBAL(x)


HOLDING = {
    "itself": lambda net: net,
    "method": lambda net: net.forward,
    "closure": lambda net: lambda x: net(x),
    "list": lambda net, nets=None: (lambda nets: lambda x: nets[0](x))([net]),
    "object": lambda net: Holder(net).run,
    "global": lambda net: by_global,
    "default": lambda net: by_default,
}


@pytest.mark.parametrize("how", HOLDING)
def test_buffers_are_as_before(how):
    """Of modules that no block covers: the loop alone counts."""
    net = GLOBAL if how in ("global", "default") else Counts()
    with torch.no_grad():
        net.calls.zero_()
        net.assigned.zero_()
    calls = net.calls
    batched(HOLDING[how](net), fallback="loop")(ROWS)
    assert net.calls is calls and net.calls == 4 and net.assigned == 4


def test_buffers_among_the_arguments():
    net = Counts()
    batched(lambda net, x: net(x), fallback="loop")(net, ROWS)
    assert net.calls == 4 and net.assigned == 4


def test_a_batch_that_the_attempt_has_written():
    def function(x):
        x += 1
        value(x)
        return x

    with pytest.raises(VmapSafeRuntimeError, match="already written on its input"):
        batched(function, fallback="loop")(ROWS.clone())


def test_a_shared_argument_that_the_attempt_has_written():
    def function(x, total):
        total += 1
        value(x)
        return x + total

    with pytest.raises(VmapSafeRuntimeError, match="already written on its input"):
        batched(function, (0, None), fallback="loop")(ROWS, ROWS[:1].clone())


# -- What does not start a loop --------------------------------------------------------


def test_refused_in_sync():
    model = refusing("item")
    forward = batched(model, fallback="loop")
    with vmap_safe(model, mode="sync"):
        with pytest.raises(VmapSafeValueError, match="share their statistics"):
            forward(X)
        with vmap_safe(refusing("item")):
            with pytest.raises(VmapSafeValueError, match="share their statistics"):
                forward(X)
    with vmap_safe(model):
        assert forward(X).shape == (5, 3)
    with pytest.raises(RuntimeError) as caught:
        with vmap_safe(model, mode="sync"):
            batched(model)(X)
    assert "fallback=" not in caught.value.__notes__[0]


def test_unknown():
    with pytest.raises(VmapSafeValueError, match="unknown fallback 'slow'"):
        batched(fallback="slow")(lambda x: x)


ERRORS = [
    RuntimeError("vmap: data-dependent control flow"),
    ValueError("calling .item() on a Tensor"),
    KeyError("w"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_of_the_code_itself(error):
    calls = []

    @batched(fallback="loop")
    def function(x):
        calls.append(x)
        raise error

    with pytest.raises(type(error)) as caught:
        function(ROWS)
    assert caught.value is error and len(calls) == 1


def test_errors_about_shapes():
    calls = []

    @batched(fallback="loop")
    def function(x):
        calls.append(x)
        return F.linear(x, torch.ones(2, 4, dtype=x.dtype))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        function(ROWS)
    assert len(calls) == 1


def test_a_loop_raises_its_own_error():
    @batched(fallback="loop")
    def function(x):
        if value(x) != 0:
            raise KeyError("negative")
        return x

    with pytest.raises(KeyError, match="negative") as caught:
        function(ROWS)
    assert caught.value.__context__ is None


# -- Words -----------------------------------------------------------------------------


def test_one_warning():
    model = refusing("mask")

    @batched(fallback="loop")
    def forward(x):
        return model(x)

    with pytest.warns(FallbackWarning) as caught:
        with vmap_safe(model):
            forward(X)
            forward(X)
    (warning,) = caught
    assert str(warning.message).startswith(
        "batched(forward)(...): vmap cannot run '2' (Refused): it makes a shape of "
        "values, as a boolean mask does. So the slices run one after another"
    )
    assert warning.filename == __file__


def test_a_warning_outside_of_modules():
    @batched(fallback="loop")
    def function(x):
        return x * value(x)

    with pytest.warns(FallbackWarning, match="cannot run code outside of modules: it"):
        function(ROWS)


def test_no_warning_where_vmap_runs():
    model = around(nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vmap_safe(model):
            found = batched(model, fallback="loop")(X)
    assert_same(found, torch.cat([model.eval()(x) for x in X.split(1)]))


def test_errors_name_the_option():
    model = refusing("item")
    with pytest.raises(RuntimeError) as caught:
        with vmap_safe(model):
            batched(model)(X)
    (note,) = caught.value.__notes__
    assert note.endswith(
        'Or pass fallback="loop" to batched, or to per_sample and its short forms: '
        "they then loop over the slices."
    )
