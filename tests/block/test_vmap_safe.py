"""vmap_safe in all its spellings: what is covered, how often, and what is refused."""

import copy
import functools
import inspect

import pytest
import torch
from state import assert_same_state, everything
from torch import nn
from torch.func import vmap

from vmapsafe import NeverUpdatedWarning, vmap_safe


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 3))
    return model


X = torch.randn(5, 2, 3)


def switched(model):
    """Whether the block applies: the layer uses its running statistics."""
    return not model[1].training


# -- Spellings -------------------------------------------------------------------------


def test_as_gives_the_model(model):
    """The model for one, a tuple for several."""
    with vmap_safe(model) as m:
        assert m is model
    with vmap_safe(model, nn.ReLU()) as both:
        assert both[0] is model and len(both) == 2


def spellings():
    def plain(model, calls):
        calls.append(switched(model))

    def in_containers(args, calls):
        calls.append(switched(args["nets"][0][1]))

    yield "without parentheses", lambda m: (vmap_safe(plain), (m,))
    yield "with parentheses", lambda m: (vmap_safe()(plain), (m,))
    yield "with a mode", lambda m: (vmap_safe(mode="eval")(plain), (m,))
    yield "with a model", lambda m: (
        vmap_safe(m)(lambda calls: calls.append(switched(m))),
        (),
    )
    yield "in containers", lambda m: (
        vmap_safe(in_containers),
        ({"nets": [(None, m)]},),
    )
    yield "by keyword", lambda m: (
        vmap_safe(lambda calls, model: calls.append(switched(model))),
        None,
    )


@pytest.mark.parametrize("name,make", list(spellings()), ids=lambda v: v)
def test_decorator(name, make, model):
    """Each spelling covers the model for the call, and runs the function once."""
    before = everything(model)
    function, args = make(model)
    calls = []
    if args is None:
        function(calls, model=model)
    else:
        function(*args, calls)
    assert calls == [True]
    assert_same_state(model, before)


def test_methods_of_a_module(model):
    """A block covers self on methods, class methods, static methods and properties."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        @vmap_safe
        def method(self, x):
            return switched(self.net), vmap(self.net)(x)

        @vmap_safe
        @classmethod
        def of_class(cls, net):
            return cls is Net and switched(net)

        @vmap_safe
        @staticmethod
        def of_nothing(net):
            return switched(net)

        @vmap_safe
        @property
        def flag(self):
            return switched(self.net)

    net = Net()
    assert net.method(X)[0]
    assert Net.of_class(model) and Net.of_nothing(model) and net.flag
    assert not switched(model)


def test_wrapper_looks_like_the_function():
    """Name, docstring, signature and __wrapped__ are those of the function."""

    def step(model, x: int, *, y=3) -> float:
        """A step."""

    wrapped = vmap_safe(step)
    assert wrapped.__name__ == "step" and wrapped.__doc__ == "A step."
    assert inspect.signature(wrapped) == inspect.signature(step)
    assert wrapped.__wrapped__ is step


def test_recursion(model):
    """A decorated function that calls itself: one block a call."""
    depth = []

    @vmap_safe
    def down(model, n):
        depth.append(switched(model))
        if n:
            down(model, n - 1)
        depth.append(switched(model))

    before = everything(model)
    down(model, 3)
    assert depth == [True] * 8
    assert_same_state(model, before)


def test_an_error_and_an_interrupt_inside(model):
    """The error is the user's own, and the model is put back."""

    @vmap_safe
    def fails(model, error):
        raise error

    before = everything(model)
    for error in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            fails(model, error)
        assert caught.value is error
        assert_same_state(model, before)


# -- Generators ------------------------------------------------------------------------


def test_generator_is_covered_and_its_caller_is_not(model):
    """The block is entered again on each resume; send, throw and return work."""

    @vmap_safe
    def steps(model):
        got = yield switched(model)
        try:
            yield switched(model), got
        except KeyError:
            yield "caught", switched(model)
        return "end", switched(model)

    generator = steps(model)
    assert next(generator) and not switched(model)
    assert generator.send(7) == (True, 7) and not switched(model)
    assert generator.throw(KeyError()) == ("caught", True) and not switched(model)
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == ("end", True) and not switched(model)
    assert inspect.isgeneratorfunction(steps)


@pytest.mark.parametrize("how", ["close", "drop", "throw"])
def test_generator_left_early(model, how):
    """Its finally clause runs inside the block, and the model is put back."""
    seen = []

    @vmap_safe
    def steps(model):
        try:
            yield 1
        finally:
            seen.append(switched(model))

    before = everything(model)
    generator = steps(model)
    next(generator)
    if how == "close":
        generator.close()
    elif how == "throw":
        with pytest.raises(KeyError):
            generator.throw(KeyError())
    del generator
    assert seen == [True]
    assert_same_state(model, before)


def test_a_block_held_by_a_generator(model):
    """`with` around a yield: closed when the generator is, in its own order."""

    def steps():
        with vmap_safe(model):
            yield switched(model)

    before = everything(model)
    generator = steps()
    assert next(generator)
    generator.close()
    assert_same_state(model, before)


# -- Which models ----------------------------------------------------------------------


def test_wrappers_are_unwrapped(model):
    """The models inside torch.compile's and DataParallel's wrappers are found."""
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        with vmap_safe(wrapped):
            assert switched(model)
        assert not switched(model)


def test_frozen_is_judged_by_the_outermost_module(model):
    """A model handed over whole keeps its frozen part; the part by itself does not."""
    whole = nn.Sequential(model).train()
    model.eval()
    with vmap_safe(whole, mode="no_running_stats"):
        assert not model[1].training
    with vmap_safe(model, whole, mode="no_running_stats"):
        assert not model[1].training
    with vmap_safe(model, mode="no_running_stats"):
        assert model[1].training and not model[1].track_running_stats
    assert not model[1].training


def test_torchscript_has_its_training_flag_switched(model):
    """In "eval"; the other modes are refused (see test_messages)."""
    scripted = torch.jit.script(model)
    layer = dict(scripted.named_modules())["1"]
    count = layer.num_batches_tracked.clone()
    with vmap_safe(scripted):
        torch.testing.assert_close(scripted(X[0]), model.eval()(X[0]))
    assert layer.training
    assert layer.num_batches_tracked == count


# -- Warnings --------------------------------------------------------------------------


class Fresh(nn.Sequential):
    """A new class, so that it has not been warned about yet."""


def test_never_updated_statistics_warn_once_a_class():
    """Only in "eval", only when nothing has updated them, only the first time."""
    fresh = Fresh(nn.BatchNorm1d(4))
    with vmap_safe(fresh, mode="no_running_stats"):
        pass
    with pytest.warns(NeverUpdatedWarning, match=r"'0' \(BatchNorm1d\) were never"):
        with vmap_safe(fresh):
            pass
    with vmap_safe(Fresh(nn.BatchNorm1d(4))):
        pass


def test_no_warning_for_loaded_or_meta_statistics():
    """A counter of 0 with other statistics comes from an old checkpoint."""

    class Other(nn.Sequential):
        pass

    loaded = Other(nn.BatchNorm1d(4))
    loaded[0].running_mean.add_(1)
    with vmap_safe(loaded):
        pass
    with vmap_safe(Other(nn.BatchNorm1d(4, device="meta"))):
        pass


def test_a_warning_that_is_an_error_leaves_nothing():
    """-W error: entry fails, and the model is as it was."""

    class Third(nn.Sequential):
        pass

    model = Third(nn.BatchNorm1d(4))
    before = everything(model)
    with pytest.raises(NeverUpdatedWarning):
        vmap_safe(model).__enter__()
    assert_same_state(model, before)


def test_a_partial_is_a_function(model):
    """Callables that are not plain functions can be decorated too."""
    calls = []
    function = functools.partial(lambda m, calls: calls.append(switched(m)), model)
    vmap_safe(model)(function)(calls)
    assert calls == [True]


# -- Copies ----------------------------------------------------------------------------


def test_a_copy_made_inside_says_that_it_is_not_covered(model):
    """One warning, if the copy computes something else than the block says."""
    x = X[0]
    with vmap_safe(model, mode="no_running_stats"):
        twin = copy.deepcopy(model)
        with pytest.warns(UserWarning, match=r"a copy of '1' \(BatchNorm1d\) runs in"):
            twin(x)
        twin(x)
        other = nn.BatchNorm1d(4)
        other(torch.randn(3, 4))  # not a copy
    with vmap_safe(model):
        copy.deepcopy(model)(x)
    with vmap_safe(model, mode="no_running_stats"):
        twin = copy.deepcopy(model)
        with vmap_safe(twin, mode="no_running_stats"):
            twin(x)
    outer = copy.deepcopy(model)
    with vmap_safe(outer, mode="group_norm", num_groups=2):
        with vmap_safe(model, mode="no_running_stats"):
            copy.deepcopy(model)
            outer(x)
