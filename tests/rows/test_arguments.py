"""Arguments of the functions of per-sample gradients are right, or raise an error
before anything is computed."""

from collections import OrderedDict, namedtuple

import numpy
import pytest
import slow
import torch
import torch.nn.functional as F
from state import assert_same_state, everything
from torch import nn

from vmapsafe import (
    check,
    clipped_grad_sum,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
    vmap_safe,
)
from vmapsafe._errors import shown, worded
from vmapsafe.testing import assert_same

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(5) % 3


class Net(nn.Sequential):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self[2].weight = self[0].weight


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def clipped(*args, **options):
    return clipped_grad_sum(*args, max_grad_norm=1.0, **options)


def sketch(*args, **options):
    return per_sample_sketch(*args, k=3, **options)


FUNCTIONS = [per_sample_grads, per_sample_grad_norms, clipped, sketch]
each_function = pytest.mark.parametrize("function", FUNCTIONS)


def fails(call, kind, *words):
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "tensor(" not in text and "array(" not in text and len(text) < 700
    return text


# -- Model and loss --------------------------------------------------------------------

LARGE = nn.Sequential(*[nn.Linear(4, 4) for _ in range(200)])
WRONG = {
    "exchanged": (F.cross_entropy, LARGE, "model is cross_entropy", "an nn.Module"),
    "exchanged, a loss module": (nn.MSELoss(), LARGE, "nn.Module MSELoss without", ""),
    "called already": (X.repeat(9, 90), F.cross_entropy, "Do not call the model", ""),
    "a class": (nn.Linear, F.cross_entropy, "model is the class Linear", ""),
    "a state dict": (LARGE.state_dict(), F.cross_entropy, "not an nn.Module", ""),
    "no loss": (LARGE, X.repeat(90, 90), "loss_fn is Tensor (450, 360)", "model, loss"),
    "no loss but a name": (LARGE, "cross_entropy", "loss_fn is 'cross_entropy'", ""),
    "the class of a loss": (LARGE, nn.MSELoss, "Pass MSELoss()", "loss_fn"),
}


@pytest.mark.parametrize("name", WRONG)
@each_function
def test_no_model_or_no_loss(function, name):
    model, loss_fn, *words = WRONG[name]
    fails(lambda: function(model, loss_fn, X, Y), TypeError, *words)


def test_no_model_elsewhere():
    many = torch.zeros(999)
    fails(lambda: check(many), TypeError, "Tensor (999,) is a Tensor, not an nn.Module")
    with pytest.raises(TypeError) as caught:
        vmap_safe(many)
    assert len(str(caught.value)) < 400


# -- The batch -------------------------------------------------------------------------

BATCHES = {
    "arrays": ((X.numpy(), Y), "batch[0] holds ndarray (5, 4)"),
    "an array as target": ((X, Y.numpy()), "batch[1] holds ndarray (5,)"),
    "a list of numbers": ((X, Y.tolist()), "batch[1] holds 0, an int"),
    "a ragged list": ((X, [[0, 1], [2]]), "batch[1] holds 0, an int"),
    "a number in numpy": ((X, numpy.float32(3)), "batch[1] holds float32 ()"),
    "0-dimensional": ((X, torch.tensor(3)), "batch[1] holds Tensor (), a Tensor"),
    "a text": ((X, "label" * 99), "batch[1] holds 'label"),
    "a batch of texts": ((X, ["a", "b"]), "batch[1] holds 'a', a str"),
    "nothing": ((X, None), "batch[1] holds None"),
    "an array by keyword": (({"input": X.numpy()}, Y), "batch[0] holds ndarray (5, 4)"),
}


@pytest.mark.parametrize("name", BATCHES)
@each_function
def test_batches_that_are_not_tensors(net, function, name):
    batch, words = BATCHES[name]
    call = lambda: function(net, F.cross_entropy, *batch)  # noqa: E731
    fails(call, ValueError, words, "torch.as_tensor")


@each_function
def test_samples_in_a_list(net, function):
    samples = [x[: 1 + i % 3] for i, x in enumerate(X)]
    call = lambda: function(net, F.cross_entropy, X, samples)  # noqa: E731
    fails(call, ValueError, "batch sizes disagree", "torch.stack")
    fails(lambda: function(net, F.cross_entropy), ValueError, "got no batch")


# -- Options ---------------------------------------------------------------------------

CHOICES = [
    ({"randomness": "all"}, 'unknown randomness \'all\'. Choose one of "error", "diff'),
    ({"randomness": None}, "unknown randomness None. Choose one of"),
    ({"randomness": X}, "unknown randomness Tensor (5, 4). Choose one of"),
    ({"chunk_size": 0}, "chunk_size is 0. Pass an int of at least 1"),
    ({"chunk_size": 2.0}, "chunk_size is 2.0. Pass an int of at least 1"),
    ({"chunk_size": True}, "chunk_size is True. Pass an int of at least 1"),
    ({"chunk_size": "all"}, "chunk_size is 'all'. Pass an int of at least 1"),
    ({"chunk_size": X}, "chunk_size is Tensor (5, 4). Pass an int of at least 1"),
    ({"mode": "train"}, "unknown mode 'train'. Choose one of"),
    ({"rows": "all", "mode": "sync"}, "unknown rows 'all'. Choose one of"),
    ({"num_groups": 0, "mode": "group_norm"}, "num_groups=0"),
]


@pytest.mark.parametrize("options,words", CHOICES, ids=[words for _, words in CHOICES])
@pytest.mark.filterwarnings("ignore:clipped_grad_sum.* in mode .sync.:UserWarning")
@each_function
def test_options(net, function, options, words):
    """The error comes before anything is computed: the loss is not called."""

    def loss(output, target):
        raise AssertionError

    fails(lambda: function(net, loss, X, Y, **options), ValueError, words)


# -- Parameters ------------------------------------------------------------------------


@each_function
def test_two_names_of_one_parameter(net, function):
    both = ["0.weight", "2.weight"]
    words = "'0.weight' and '2.weight', which are one parameter of Net"
    for params in (both, {name: net.get_parameter(name) for name in both}):
        call = lambda: function(net, F.cross_entropy, X, Y, params=params)  # noqa: E731
        fails(call, ValueError, words)


NAMES = [
    ([], ValueError, "params is empty"),
    ({}, ValueError, "params is empty"),
    (["0.weigth"], ValueError, "Net has no parameter '0.weigth'. Names are those of"),
    (["module.nope"], ValueError, "Net has no parameter 'module.nope'"),
    ([3], ValueError, "Net has no parameter 3"),
    (["module.0.bias", "0.bias"], ValueError, "'0.bias' and 'module.0.bias', which"),
    ({"module.0.bias": X[0], "0.bias": X[0]}, ValueError, "which are one"),
    ([X.expand(99, 5, 4)], ValueError, "Net has no parameter Tensor (99, 5, 4)"),
    (X, TypeError, "params is Tensor (5, 4). Pass names, or a dict"),
    (3, TypeError, "params is 3. Pass names, or a dict"),
    ({"0.bias": [1.0, 2.0]}, ValueError, "params['0.bias'] is [1.0, 2.0], and the"),
    (
        {"0.bias": X[0, :3]},
        ValueError,
        "Tensor (3,), and the parameter is Parameter (4",
    ),
]


@pytest.mark.parametrize("params,kind,words", NAMES, ids=[str(n[2]) for n in NAMES])
@each_function
def test_names_that_are_wrong(net, function, params, kind, words):
    call = lambda: function(net, F.cross_entropy, X, Y, params=params)  # noqa: E731
    fails(call, kind, words)


def test_exactly_the_parameters_that_are_named(net):
    """Frozen ones too, by either name of a tied one, and by the name in a wrapper."""
    expected = slow.rows(net, F.cross_entropy, X, Y)
    net[0].bias.requires_grad_(False)
    before = everything(net)
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        for weight in ("0.weight", "2.weight"):
            names = [prefix + "0.bias", prefix + weight]
            given = {n: net.get_parameter(n.removeprefix(prefix)) for n in names}
            for params in (names, given, iter(names), tuple(names)):
                rows = per_sample_grads(net, F.cross_entropy, X, Y, params=params)
                assert list(rows) == ["0.bias", weight]
                assert_same(rows["0.bias"], expected["0.bias"])
                assert_same(rows[weight].detach(), expected["0.weight"])
    assert_same_state(net, before)
    alone = per_sample_grads(net, F.cross_entropy, X, Y, params="module.0.bias")
    assert list(alone) == ["0.bias"]


# -- What the loss returns -------------------------------------------------------------


@each_function
def test_a_loss_without_reduction(net, function):
    """A loss of shape (1,) counts as that number."""
    one = function(net, lambda o, y: F.cross_entropy(o, y, reduction="none"), X, Y)
    assert_same(one, function(net, F.cross_entropy, X, Y))


AUX = {
    "no batch": (lambda o, y: (o.sum(), o[0]), "aux holds Tensor (4,) for one sample"),
    "a number": (lambda o, y: (o.sum(), {"n": 3.0}), "aux holds 3.0 for one sample"),
    "empty": (lambda o, y: (o.sum(), o[:0]), "aux holds Tensor (0, 4) for one sample"),
    "no pair": (lambda o, y: o.sum(), "loss_fn gave Tensor () instead of a pair. Let"),
    "three": (lambda o, y: (o.sum(), o, o), "instead of a pair. Let it return (loss,"),
}


@pytest.mark.parametrize("name", AUX)
@each_function
def test_aux_of_no_use(net, function, name):
    loss, words = AUX[name]
    call = lambda: function(net, loss, X, Y, has_aux=True)  # noqa: E731
    text = fails(call, ValueError, words, "has_aux=True")
    assert "keep_batch_dim" not in text


@each_function
def test_aux_that_was_not_asked_for(net, function):
    call = lambda: function(net, lambda o, y: (o.sum(), o), X, Y)  # noqa: E731
    fails(call, ValueError, "loss_fn gave tuple for", "has_aux=True")


# -- Words -----------------------------------------------------------------------------


Pair = namedtuple("Pair", "x y")


def test_values_are_shown_in_a_few_words():
    values = [
        X,
        X.numpy(),
        [X] * 99,
        {"x": nn.Parameter(X)},
        "a" * 999,
        LARGE,
        nn.Module,
    ]
    values += [OrderedDict(x=X), Pair(X, X), LARGE.state_dict()]
    for value in (*values, torch.Tensor, lambda: 3, 10**500, range(10**9)):
        assert len(shown(value)) < 200 and "tensor(" not in shown(value)
    assert shown([3, "a", None, 0.5]) == "[3, 'a', None, 0.5]"
    text = worded("f(...)", f"found {torch.zeros(999)} at the end", "Do this")
    assert len(text) < 300 and text.endswith("]) at the end. Do this.")
    text = worded("f(...)", "found " + "x" * 99999 + " end", "Do this")
    assert len(text) < 2000 and text.endswith("x end. Do this.")
