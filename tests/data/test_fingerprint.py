"""A folder is of one function, with the values that it holds: others are refused."""

import functools

import numpy
import pytest
import torch.nn.functional as F
from nets import small_mlp
from small_data import X, Y
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vmapsafe import over, per_sample_grad_norms


def save(folder, model, function, loss_fn, **options):
    batches = DataLoader(TensorDataset(X, Y), batch_size=4)
    return over(batches, function, model, loss_fn, **options).save(folder)


def first_of(values):
    """The first number in collections of such."""
    while not isinstance(values, float):
        values = next(iter(values.values() if isinstance(values, dict) else values))
    return values


def norms(model, loss_fn, x, y, *, factors):
    return first_of(factors) * per_sample_grad_norms(model, loss_fn, x, y)


def as_option(values):
    return small_mlp(), norms, F.cross_entropy, {"factors": values}


def in_a_closure(values):
    def loss(output, target):
        return first_of(values) * F.cross_entropy(output, target)

    return small_mlp(), per_sample_grad_norms, loss, {}


class Times:
    def __init__(self, values):
        self.values = values

    def __call__(self, output, target):
        return first_of(self.values) * F.cross_entropy(output, target)


def as_attribute(values):
    return small_mlp(), per_sample_grad_norms, Times(values), {}


def bound(values):
    function = functools.partial(norms, factors=values)
    return small_mlp(), function, F.cross_entropy, {}


class Scaled(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.net, self.values = small_mlp(), values

    def forward(self, x):
        return first_of(self.values) * self.net(x)


def in_the_model(values):
    return Scaled(values), per_sample_grad_norms, F.cross_entropy, {}


MANY = [1.0, *[float(i) for i in range(2000)]]
VALUES = {
    "a tuple": ((1.0, 2.0), (2.0, 1.0)),
    "a list": ([1.0, 2.0], [2.0, 1.0]),
    "a dict": ({"a": 1.0}, {"a": 2.0}),
    "tuples in a list": ([(1.0, 2.0)], [(2.0, 1.0)]),
    "an array": (numpy.array([1.0, 2.0]), numpy.array([2.0, 1.0])),
    "the middle of an array": (
        numpy.array(MANY),
        numpy.array([*MANY[:1000], -1.0, *MANY[1001:]]),
    ),
}


# A function may keep a log in a list or a dict that it holds.
ANY = [(held, values) for held in (as_option, bound) for values in VALUES]
FIXED = [
    (held, values)
    for held in (in_a_closure, as_attribute, in_the_model)
    for values in ("a tuple", "an array", "the middle of an array")
]


@pytest.mark.parametrize("held,values", [*ANY, *FIXED])
def test_values_in_collections_count(tmp_path, held, values):
    """Their order included."""
    before, after = VALUES[values]
    model, function, loss_fn, options = held(before)
    found = save(tmp_path, model, function, loss_fn, **options)
    model, function, loss_fn, options = held(before)
    again = save(tmp_path, model, function, loss_fn, **options)
    assert numpy.array_equal(found, again)
    model, function, loss_fn, options = held(after)
    with pytest.raises(ValueError, match="begun with something else"):
        save(tmp_path, model, function, loss_fn, **options)


def test_a_log_does_not_count(tmp_path):
    log = []

    def loss(output, target):
        log.append(len(output))
        return F.cross_entropy(output, target)

    for _ in range(2):
        save(tmp_path, small_mlp(), per_sample_grad_norms, loss)
    assert log


def test_the_order_of_a_set_does_not_count(tmp_path):
    """It differs from process to process."""
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    for order in (names, names[::-1]):
        model, function, loss_fn, options = as_option([1.0, Ordered(order)])
        save(tmp_path, model, function, loss_fn, **options)


class Ordered(frozenset):
    """A set in an order of its own."""

    def __new__(cls, values):
        found = super().__new__(cls, values)
        found.values = values
        return found

    def __iter__(self):
        return iter(self.values)
