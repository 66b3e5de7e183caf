"""batched(f)(x)[i] is f(x[i:i+1]) without its leading 1."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from vmapsafe import batched, vmap_safe

X = torch.randn(4, 3, dtype=torch.float64)
Y = torch.randn(4, 3, dtype=torch.float64)


def by_hand(f, *args):
    """The loop over batches of one, for functions of one output."""
    return torch.cat([f(*(a[i : i + 1] for a in args)) for i in range(len(args[0]))])


def test_sees_batches_of_one():
    seen = []

    @batched
    def f(x, y):
        seen.append((tuple(x.shape), tuple(y.shape)))
        return x * y + x.sum(1, keepdim=True)

    out = f(X, Y)
    assert seen == [((1, 3), (1, 3))]
    torch.testing.assert_close(out, X * Y + X.sum(1, keepdim=True))


def test_a_model_inside_a_block():
    """Any network works, without an unsqueeze."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).double()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    model(x)

    @vmap_safe(model)
    @batched
    def forward(x):
        return model(x)

    model.eval()
    expected = by_hand(model, x)
    model.train()
    torch.testing.assert_close(forward(x), expected)
    assert model.training and model[1].num_batches_tracked == 1


def test_modules_numbers_strings_and_none_pass_through():
    """So do 0-dimensional tensors, and modules among the arguments of vmap_safe."""
    model = nn.BatchNorm1d(3).double()
    model(X)

    @vmap_safe
    @batched
    def f(model, x, scale, name, nothing, zero_d):
        assert name == "name" and nothing is None and zero_d.dim() == 0
        return model(x) * scale + zero_d

    out = f(model, X, 2, "name", None, torch.tensor(1.0))
    torch.testing.assert_close(out, 2 * model.eval()(X) + 1)


@pytest.mark.parametrize(
    "in_dims",
    [
        {"w": None},
        {"w": None, "x": 0},
        (None, 0),
        [None, 0],
    ],
    ids=str,
)
def test_in_dims_by_name_and_by_position(in_dims):
    @batched(in_dims=in_dims)
    def f(w, x):
        assert w.shape == (3, 2) and x.shape == (1, 3)
        return x @ w

    w = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(f(w, X), X @ w)


def test_keyword_arguments_are_mapped_over_0():
    """As vmap does; a dict of in_dims reaches them too."""

    def f(x, *, y=None, w=None):
        assert x.shape == y.shape == (1, 3)
        return x * y if w is None else x * y * w.sum()

    torch.testing.assert_close(batched(f)(X, y=Y), X * Y)
    w = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(batched(f, {"w": None})(X, y=Y, w=w), X * Y * 5)


def test_other_dimensions_and_trees():
    """in_dims reach into trees; a slice keeps its dimension of one where it was."""

    @batched(in_dims=({"a": 1, "b": None}, -1))
    def f(tree, z):
        assert tree["a"].shape == (3, 1) and tree["b"].shape == (2,)
        assert z.shape == (3, 1)
        return tree["a"].T + z.T * tree["b"].sum()

    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    out = f({"a": X.T, "b": b}, Y.T)
    torch.testing.assert_close(out, X + 3 * Y)


def test_outputs_that_are_trees_and_scalars():
    @batched
    def f(x):
        return {"row": x, "pair": (x.sum(), x.sum(1))}

    out = f(X)
    torch.testing.assert_close(out["row"], X)
    torch.testing.assert_close(out["pair"], (X.sum(1), X.sum(1)))


def test_out_dims():
    """As in vmap, of outputs that have lost their batch of one."""
    out = batched(lambda x: x, out_dims=1)(X)
    torch.testing.assert_close(out, X.T)


def test_gradients_of_parameters_need_keep_batch_dim_false():
    """Their first dimension is not a batch, so an error says what to write."""
    w = torch.randn(3, 2, dtype=torch.float64)

    def loss(w, x):
        return (x @ w).square().sum()

    with pytest.raises(ValueError, match="keep_batch_dim=False"):
        batched(grad(loss), in_dims=(None, 0))(w, X)
    rows = batched(grad(loss), in_dims=(None, 0), keep_batch_dim=False)(w, X)
    torch.testing.assert_close(rows, vmap(grad(loss), (None, 0))(w, X))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 10])
def test_chunks(chunk_size):
    out = batched(lambda x: x.cumsum(1), chunk_size=chunk_size)(X)
    torch.testing.assert_close(out, X.cumsum(1))


def test_randomness():
    """ "error", "same" and "different", as in vmap."""

    def f(randomness):
        return batched(lambda x: F.dropout(x), randomness=randomness)(torch.ones(64, 9))

    with pytest.raises(RuntimeError, match="randomness"):
        f("error")
    same, different = f("same"), f("different")
    assert (same == same[0]).all()
    assert not (different == different[0]).all()


def test_wrapper_looks_like_the_function():
    @batched
    def f(x):
        """Doc."""
        return x

    assert f.__name__ == "f" and f.__doc__ == "Doc." and f.__wrapped__(3) == 3
    assert batched(functools.partial(lambda x, y: x + y, y=1))(X).shape == (4, 3)
    assert batched(nn.Linear(3, 2).double())(X).shape == (4, 2)


def test_under_grad_and_compile():
    """It is a function like any other to torch.func and torch.compile."""

    def total(x):
        return batched(lambda x: x.sin().sum(1))(x).sum()

    torch.testing.assert_close(grad(total)(X), X.cos())
    compiled = torch.compile(total, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), X.sin().sum())


def test_functional_call_with_parameters_by_name():
    """{"params": None}: one set of parameters for all samples."""
    net = nn.Linear(3, 2).double()

    @batched(in_dims={"params": None})
    def loss(params, x, y):
        return F.mse_loss(functional_call(net, params, (x,)), y, reduction="sum")

    y = torch.randn(4, 2, dtype=torch.float64)
    out = loss(dict(net.named_parameters()), X, y)
    torch.testing.assert_close(out, (net(X) - y).square().sum(1))


# -- Errors ----------------------------------------------------------------------------


def two(x, y):
    return x


ERRORS = [
    (lambda: batched(two)(X, Y[:2]), "x of shape (4, 3) has 4 in dimension 0, y of"),
    (lambda: batched(two)(X, Y[:2]), "batch sizes disagree"),
    (lambda: batched(two, None)(X, Y), "no argument has a batch dimension"),
    (lambda: batched(two, (0,))(X, Y), "1 in_dims for 2 positional arguments"),
    (lambda: batched(two, {"z": 0})(X, Y), "two has no argument 'z', it has ['x', 'y"),
    (lambda: batched(two, (0, 5))(X, Y), "dimension 5 for y, which has shape (4, 3)"),
    (lambda: batched(two, (0, (0, 0)))(X, Y), "in_dims (0, 0) does not fit"),
    (lambda: batched(lambda x: x.sum(0))(X), "has shape (3,), whose first dimension"),
]


@pytest.mark.parametrize("call,text", ERRORS)
def test_errors(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert text in str(caught.value)


def test_not_a_function():
    with pytest.raises(TypeError, match="7 is not callable. Pass a function"):
        batched(7)
