"""torch's own list of modules: they work in a block and do not change.

``module_db`` is the list torch tests its modules with; it is part of the torch package
and needs ``expecttest``. What vmap can do with a module whose normalisation layer was
switched by hand in plain torch, it can do with the module inside a block, with the same
numbers. Where plain vmap cannot, the block may or may not, but the module stays as it
was.

Importing the list freezes the global flags of ``torch.backends`` for the process:
tests that change one use its ``flags()`` context manager.
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from vmapsafe import vmap_safe

# torch's own, on slow batching rules and on reductions that are about to change.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

INFOS = {info.name: info for info in module_db}
CASES = [(name, training) for name in INFOS for training in (True, False)]
WITH_STATISTICS = [
    (name, training)
    for name, training in CASES
    if issubclass(INFOS[name].module_cls, _NormBase)
]
# Modules that plain vmap cannot run on torch 2.13, for some sample inputs at least.
CANNOT_FORWARD = {
    "nn.LinearCrossEntropyLoss": "masked_select has a size that differs by slice",
}
CANNOT_GRAD = {
    "nn.LinearCrossEntropyLoss": "an autograd.Function without a rule for vmap",
}
# Samples of one module that differ in shapes and options can be hundreds; these many
# are taken, evenly spread.
SAMPLES = 12


class Sample(NamedTuple):
    """A module and two slices of what its forward takes."""

    module: nn.Module
    forward: "Forward"
    slices: list[torch.Tensor]
    in_dims: tuple[int | None, ...]


class Forward(NamedTuple):
    """The forward of a module as a function of its tensor arguments."""

    leaves: list
    tree: object

    def __call__(self, module, parameters, *tensors):
        tensors = iter(tensors)
        filled = [
            next(tensors) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in self.leaves
        ]
        args, kwargs = tree_unflatten(filled, self.tree)
        return functional_call(module, parameters, args, kwargs)


@pytest.mark.parametrize("name, training", CASES)
def test_eval_does_what_vmap_does_with_the_layer_in_eval(name, training):
    """Same outputs and per-slice gradients as after ``.eval()`` by hand."""
    assert outcome(name, training, "eval").failures == []


@pytest.mark.parametrize("name, training", WITH_STATISTICS)
def test_no_running_stats_does_what_vmap_does_without_buffers(name, training):
    """Same outputs and per-slice gradients as ``track_running_stats=False`` by hand."""
    found = outcome(name, training, "no_running_stats")
    assert found.failures == []
    assert "outputs" not in found.unable


def test_no_module_passes_by_failing_twice():
    """All but the modules named above work in a block, with all their samples."""
    unable = {"outputs": set(), "rows": set()}
    for name, training in CASES:
        for transform in outcome(name, training, "eval").unable:
            unable[transform].add(name)
    # Those of torch 2.11; later ones have more.
    assert len(CASES) >= 226
    assert sum(outcome(*case, "eval").has_rows for case in CASES) >= 66
    assert unable["outputs"] <= CANNOT_FORWARD.keys()
    assert unable["rows"] <= CANNOT_GRAD.keys()


# -- One case -------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of all samples of a case.

    Attributes:
        failures: where the block is not as good as the switch by hand.
        unable: the transforms that failed inside the block for some sample.
        has_rows: whether there were parameters to differentiate by.
    """

    failures: list[str]
    unable: set[str]
    has_rows: bool


@functools.cache
def outcome(name, training, mode):
    """Every sample of a case, by hand and in a block."""
    having = any(list(one.module.parameters()) for one in samples(name, training))
    found = Outcome([], set(), having)
    for sample in samples(name, training):
        by_hand = switched_by_hand(sample.module, mode)
        for transform in (outputs, rows):
            expected = attempt(transform, by_hand, sample)
            before = state(sample.module)
            with vmap_safe(sample.module, mode=mode):
                got = attempt(transform, sample.module, sample)
            if state(sample.module) != before:
                found.failures.append(f"{sample.module}, {transform}: state changed")
            if isinstance(got, Exception):
                found.unable.add(transform.__name__)
            if not isinstance(expected, Exception) and not same(got, expected):
                found.failures.append(f"{sample.module}, {transform}: {got!r}")
    return found


def same(got, expected):
    if isinstance(got, Exception):
        return False
    got, tree = tree_flatten(got)
    expected, expected_tree = tree_flatten(expected)
    return tree == expected_tree and all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        for a, b in zip(got, expected)
        if isinstance(a, torch.Tensor)
    )


def attempt(transform, module, sample):
    """The result or the error; draws are the same for the same sample."""
    torch.manual_seed(0)
    try:
        return transform(module, sample)
    except Exception as error:
        return error


def outputs(module, sample):
    """vmap of the forward, parameters shared."""

    def forward(*tensors):
        return tree_leaves(sample.forward(module, {}, *tensors))

    return vmap(forward, in_dims=sample.in_dims, randomness="different")(*sample.slices)


def rows(module, sample):
    """vmap of grad with respect to all parameters, of a sum with uneven weights."""
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    if not parameters:
        return {}

    def loss(parameters, *tensors):
        leaves = tree_leaves(sample.forward(module, parameters, *tensors))
        return sum(
            (leaf * torch.arange(leaf.numel()).cos().view_as(leaf)).sum()
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        )

    return vmap(grad(loss), in_dims=(None, *sample.in_dims), randomness="different")(
        parameters, *sample.slices
    )


def switched_by_hand(module, mode):
    """A copy whose normalisation layers a user has switched, in plain torch."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, _NormBase) and mode == "eval":
            layer.eval()
        elif isinstance(layer, _NormBase):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return module


def state(module):
    """Everything a block could have changed, with tensors by identity and by bits."""
    return [
        (
            path,
            layer.training,
            getattr(layer, "track_running_stats", None),
            [
                (n, id(t), t._version, t.numpy().tobytes())
                for n, t in layer._buffers.items()
                if t is not None
            ],
            [
                (n, id(t), t._version, t.requires_grad, t.grad)
                for n, t in layer._parameters.items()
                if t is not None
            ],
            {k: v for k, v in vars(layer).items() if "hooks" in k and v},
            sorted(vars(layer)),
            sorted(torch.nn.modules.module._global_forward_hooks),
        )
        for path, layer in module.named_modules()
    ]


# -- Samples --------------------------------------------------------------------------


@functools.cache
def samples(name, training):
    """The sample inputs of a module that differ in shapes or options."""
    info = INFOS[name]
    torch.manual_seed(0)
    made = info.module_inputs_func(info, "cpu", torch.float64, False, training)
    distinct = list({described(one): one for one in made}.values())
    every = -(-len(distinct) // SAMPLES)
    return [sample_of(info, one, training) for one in distinct[::every]]


def described(made):
    return str(
        [
            tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf
            for given in (made.constructor_input, made.forward_input)
            for leaf in (*tree_leaves((given.args, given.kwargs)), *given.kwargs)
        ]
    )


def sample_of(info, made, training):
    module = info.module_cls(
        *made.constructor_input.args, **made.constructor_input.kwargs
    ).to(torch.float64)
    args, kwargs = made.forward_input.args, made.forward_input.kwargs
    if info.is_lazy:
        module(*args, **kwargs)
    # Away from mean 0 and variance 1, or a mix-up of statistics would not show.
    for buffer in module.buffers():
        buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape) * 0.3 + 0.7)
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return Sample(
        module=module.train(training),
        forward=Forward(leaves, tree),
        slices=[t if is_mask(t) else torch.stack([t, other(t)]) for t in tensors],
        in_dims=tuple(None if is_mask(t) else 0 for t in tensors),
    )


def other(tensor):
    """Another slice as valid as the first, which for indices is the same again."""
    return tensor * 0.9 if tensor.is_floating_point() else tensor


def is_mask(tensor):
    """Masks are shared by all slices: most attention code asks for their values."""
    return tensor.dtype is torch.bool
