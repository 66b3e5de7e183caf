"""Every mode × network × transform, against a slow form in plain torch."""

import copy
import itertools

import pytest
import torch
from blocks import EACH_ALONE, block
from cases import CASES, Case
from plain import switched
from state import assert_same_state, everything
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from vmapsafe import vmap_safe


@pytest.fixture(params=EACH_ALONE)
def mode(request):
    return request.param


@pytest.fixture(params=[c for c in CASES if c.name != "no affine"], ids=str)
def case_with_parameters(request):
    return request.param


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_forward_equals_the_loop_and_leaves_the_model(case, mode, device):
    """vmap(model)(x) in a block is the loop over a model that was switched by hand."""
    model, x = case.model(device), case.slices(device=device)
    plain = switched(model, mode)
    before = everything(model)
    with block(model, mode):
        out = vmap(model)(x)
        one = model(x[0])
    assert_same_state(model, before)
    close(out, torch.stack([plain(slice_) for slice_ in x]))
    close(one, plain(x[0]))


@pytest.mark.parametrize("transform", ["vmap", "vjp"])
def test_a_function_of_autograd_that_calls_the_model(case, mode, transform):
    """torch calls its forward from inside an operator, where the rules apply too."""
    model, x = case.model(), case.slices()
    plain = switched(model, mode)

    class Calls(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return model(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad_output):
            return torch.zeros(x.shape[1:], dtype=x.dtype)

    with block(model, mode):
        if transform == "vmap":
            out = vmap(Calls.apply)(x)
        else:
            out = torch.stack([vjp(Calls.apply, slice_)[0] for slice_ in x])
    close(out, torch.stack([plain(slice_) for slice_ in x]))


def test_the_modes_differ(case):
    """If they gave the same, the other tests could not tell them apart."""
    model, x = case.model(), case.slices()
    outs = []
    for mode in EACH_ALONE:
        with block(model, mode):
            outs.append(vmap(model)(x))
    if case.name == "no statistics":  # "eval" takes those of the slice
        outs = [outs[0], outs[-1]]
    if "instance norm" in case.name:  # "group_norm" leaves it alone
        outs = outs[:2]
    for a, b in itertools.combinations(outs, 2):
        assert not torch.allclose(a, b, atol=1e-4)


def test_rows_equal_the_loop(case, mode, device):
    """vmap(grad) gives each slice's own gradient."""
    model, x = case.model(device), case.slices(device=device)
    plain = switched(model, mode)
    params = dict(model.named_parameters())

    def loss(params, x):
        return functional_call(model, params, (x,)).square().sum()

    before = everything(model)
    with block(model, mode):
        rows, dx = vmap(grad(loss, argnums=(0, 1)), (None, 0))(params, x)
    assert_same_state(model, before)
    names, slow = list(params), list(plain.parameters())
    for i, slice_ in enumerate(x):
        slice_ = slice_.clone().requires_grad_()
        total = plain(slice_).square().sum()
        expected = torch.autograd.grad(total, [*slow, slice_])
        for name, g in zip(names, expected):
            close(rows[name][i], g)
        close(dx[i], expected[-1])


# -- Transforms: each alone, and one inside another ------------------------------------


def of_parameters(model, x):
    """A scalar function of the model's parameters, flattened to one vector."""
    params = {k: p.detach() for k, p in model.named_parameters()}
    sizes = [p.numel() for p in params.values()]

    def f(vector):
        pieces = vector.split(sizes)
        values = {
            name: piece.view_as(p) for (name, p), piece in zip(params.items(), pieces)
        }
        out = functional_call(model, values, (x,))
        return (out.square() * torch.arange(1.0, out.numel() + 1).view_as(out)).sum()

    return f, torch.cat([p.flatten() for p in params.values()])


def derivative_vjp(f):
    return lambda v: vjp(f, v)[1](torch.ones_like(f(v)))[0]


def derivative_jvp(f):
    return lambda v: jvp(f, (v,), (torch.cos(torch.arange(v.numel()).to(v)),))[1]


def over_a_batch(f):
    return lambda v: vmap(f)(torch.stack([v, 1.1 * v, 0.9 * v]))


TRANSFORMS = {
    "vmap": over_a_batch,
    "grad": grad,
    "vjp": derivative_vjp,
    "jvp": derivative_jvp,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
}
SMALL = Case(
    "small",
    lambda: torch.nn.Sequential(
        torch.nn.Linear(2, 2),
        torch.nn.BatchNorm1d(2),
        torch.nn.Tanh(),
        torch.nn.Linear(2, 1),
    ),
    (2,),
)


def scalar(f):
    """A scalar of what f gives, so that any transform can follow any other."""
    return lambda v: f(v).sin().sum()


@pytest.mark.parametrize("transform", [*TRANSFORMS, "hessian"])
def test_each_transform(case_with_parameters, mode, transform):
    """Of every network by its parameters, on one batch in a block."""
    model, x = case_with_parameters.model(), case_with_parameters.slices()[0]
    plain = switched(model, mode)
    derive = hessian if transform == "hessian" else TRANSFORMS[transform]
    before = everything(model)
    f, at = of_parameters(model, x)
    with block(model, mode):
        actual = derive(f)(at)
    assert_same_state(model, before)
    f, at = of_parameters(plain, x)
    if transform == "vmap":  # which plain torch cannot do with every layer
        expected = torch.stack([f(v) for v in (at, 1.1 * at, 0.9 * at)])
    else:
        expected = derive(f)(at)
    close(actual, expected)


@pytest.mark.parametrize("outer", TRANSFORMS)
@pytest.mark.parametrize("inner", [None, *TRANSFORMS, "hessian"])
def test_every_nesting_of_two_transforms(outer, inner, mode):
    """outer(inner(f)) in a block is the same on a model that was switched by hand, and
    the counters and statistics of a training net do not move."""
    model = SMALL.model()
    # num_groups=1, as two channels a sample are too few for two groups
    plain = switched(model, mode, num_groups=1)
    x = torch.randn(4, 2, dtype=torch.float64)
    results = []
    before = everything(model)
    for net in (plain, model):
        f, at = of_parameters(net, x)
        if inner == "hessian":
            f = scalar(hessian(f))
        elif inner is not None:
            f = scalar(TRANSFORMS[inner](f))
        g = TRANSFORMS[outer](f)
        if net is plain:
            results.append(g(at))
        else:
            with vmap_safe(model, mode=mode, num_groups=1):
                results.append(g(at))
    assert_same_state(model, before)
    close(results[1], results[0])


def test_plain_autograd_around_it_and_double_backward(case_with_parameters, mode):
    """backward, inside the block or after it, gives the plain numbers."""
    case = case_with_parameters
    model, x = case.model(), case.slices()
    plain = switched(model, mode)
    params = list(model.parameters())
    with block(model, mode):
        out = vmap(model)(x)
        inside = torch.autograd.grad(
            out.pow(3).sum(), params, create_graph=True, retain_graph=True
        )
    after = torch.autograd.grad(out.pow(3).sum(), params, create_graph=True)
    twice = torch.autograd.grad(sum(g.square().sum() for g in after), params)
    slow_params = list(plain.parameters())
    slow_out = torch.stack([plain(slice_) for slice_ in x])
    slow = torch.autograd.grad(slow_out.pow(3).sum(), slow_params, create_graph=True)
    slow_twice = torch.autograd.grad(sum(g.square().sum() for g in slow), slow_params)
    for i in range(len(params)):
        close(inside[i], slow[i])
        close(after[i], slow[i])
        close(twice[i], slow_twice[i])


def test_plain_autograd_around_per_sample_gradients(case_with_parameters, mode):
    """A gradient penalty on the rows: torch's own batch norm would hold the statistics
    of the slice constant here, silently."""
    case = case_with_parameters
    model, x = case.model(), case.slices()
    plain = switched(model, mode)
    params = dict(model.named_parameters())

    def loss(params, x):
        return functional_call(model, params, (x,)).pow(3).sum()

    with block(model, mode):
        rows = vmap(grad(loss), (None, 0))(params, x)
    twice = torch.autograd.grad(
        sum(row.square().sum() for row in rows.values()), list(params.values())
    )
    slow_params = list(plain.parameters())
    penalty = 0
    for slice_ in x:
        row = torch.autograd.grad(
            plain(slice_).pow(3).sum(), slow_params, create_graph=True
        )
        penalty = penalty + sum(g.square().sum() for g in row)
    for one, slow in zip(twice, torch.autograd.grad(penalty, slow_params)):
        close(one, slow)


def test_ensemble_of_stacked_states(case, mode):
    """vmap over models by stack_module_state is the loop over the models, and neither
    the stacked buffers nor the models are written."""
    models = [case.model() for _ in range(3)]
    for i, model in enumerate(models):
        with torch.no_grad():
            for t in [*model.parameters(), *model.buffers()]:
                if t.is_floating_point():
                    t.mul_(1 + 0.1 * i)
    x = case.slices()[0]
    params, buffers = stack_module_state(models)
    kept = copy.deepcopy(buffers)
    base = models[0]

    def member(params, buffers, x):
        return functional_call(base, (params, buffers), (x,))

    with block(base, mode):
        out = vmap(member, (0, 0, None))(params, buffers, x)
    close(out, torch.stack([switched(model, mode)(x) for model in models]))
    for name, buffer in buffers.items():
        assert torch.equal(buffer, kept[name])


def test_backward_after_the_block(case_with_parameters, mode):
    """The numbers of backward() do not depend on where it is called."""
    case = case_with_parameters
    model, x = case.model(), case.slices()
    with block(model, mode):
        vmap(model)(x).square().sum().backward()
        inside = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss = vmap(model)(x).square().sum()
    loss.backward()
    for p, g in zip(model.parameters(), inside):
        close(p.grad, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last_and_dtype(mode, dtype):
    """Layout does not change the numbers, and the dtype is the model's."""
    case = CASES[0]
    model, x = case.model(dtype=dtype), case.slices(dtype=dtype)
    with block(model, mode):
        expected = vmap(model)(x)
        last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        out = vmap(model)(last)
        out2 = model(x[0].contiguous(memory_format=torch.channels_last))
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out2, expected[0])


def test_autocast(mode):
    """Under autocast the forward gives what the hand-switched model gives."""
    case = CASES[0]
    model, x = case.model(dtype=torch.float32), case.slices(dtype=torch.float32)
    plain = switched(model, mode)
    with torch.autocast("cpu", torch.bfloat16):
        with block(model, mode):
            out = vmap(model)(x)
        expected = torch.stack([plain(slice_) for slice_ in x])
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.05)


class Recursive(torch.nn.Module):
    """Calls itself, and assigns a buffer after the inner call has returned."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, depth=2):
        if depth:
            x = self(x, depth - 1)
        self.seen = self.seen + 1
        return self.norm(self.mix(x))


class Holder(torch.nn.Module):
    """A module without buffers that calls itself by way of one it holds."""

    def __init__(self):
        super().__init__()
        self.inner = Recursive()

    def forward(self, x, again=True):
        if again:
            x = self(x, False)
        self.inner.seen = self.inner.seen + 1
        return self.inner(x)


@pytest.mark.filterwarnings("ignore::vmapsafe.LeftOutWarning")
@pytest.mark.parametrize("make", [Recursive, Holder])
def test_a_module_that_calls_itself(make, mode):
    """The end of the inner call is not taken for that of the outer one."""
    model = make().double()
    model(torch.randn(6, 4, dtype=torch.float64))
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    plain = switched(model, mode)
    before = everything(model)
    with block(model, mode):
        actual = vmap(model)(x)
    assert_same_state(model, before)
    close(actual, torch.stack([plain(one) for one in x]))
