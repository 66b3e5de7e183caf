"""Backward that runs a forward again: right or an error, and without writes."""

import functools
import gc
import weakref

import pytest
import torch
from blocks import MODES, block
from plain import switched
from state import assert_same_state, everything
from threads import in_a_thread
from torch import nn
from torch.func import functional_call, grad, vjp, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from vmapsafe import BlockError, vmap_safe

pytestmark = pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")


def body():
    """Two blocks of the same width, so that reversible networks can be made of it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
    ).double()
    for _ in range(3):
        model(torch.randn(6, 4, 3, 3).double() * 2 + 1)
    return model


X = torch.randn(5, 4, 3, 3).double()
WEIGHTS = torch.randn(5, 4, 3, 3).double()


def by_hand(model, mode):
    """What the block promises for one batch without vmap, written out."""
    return switched(model, "no_running_stats" if mode == "sync" else mode)


def gradients(output, model, x):
    """The gradients by ``backward``, which checkpoints of the reentrant kind need."""
    tensors = [x, *model.parameters()]
    try:
        (output * WEIGHTS).sum().backward()
        return [tensor.grad for tensor in tensors]
    finally:
        for tensor in tensors:
            tensor.grad = None


# -- The ways --------------------------------------------------------------------------


def run_again(model, x, grad_output, parameters):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = model(x)
    return torch.autograd.grad(output, [x, *parameters], grad_output)


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, x, *parameters):
        ctx.model = model
        ctx.save_for_backward(x)
        with torch.no_grad():
            return model(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        parameters = list(ctx.model.parameters())
        return None, *run_again(ctx.model, x, grad_output, parameters)


class NewStyle(torch.autograd.Function):
    @staticmethod
    def forward(model, x, *parameters):
        return model(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.model, x, *_ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        parameters = list(ctx.model.parameters())
        return None, *run_again(ctx.model, x, grad_output, parameters)


class ByVjp(torch.autograd.Function):
    """A backward that calls torch.func, with the batch as one slice."""

    @staticmethod
    def forward(ctx, model, x, *parameters):
        ctx.model = model
        ctx.save_for_backward(x)
        return model(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        names, parameters = zip(*ctx.model.named_parameters())

        def pulled(g):
            def f(x, *parameters):
                return functional_call(ctx.model, dict(zip(names, parameters)), (x,))

            return vjp(f, x, *[p.detach() for p in parameters])[1](g)

        return None, *[g[0] for g in vmap(pulled)(grad_output[None])]


class Reversible(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1); the inputs are computed from the outputs."""

    @staticmethod
    def forward(ctx, model, x1, x2, *parameters):
        with torch.no_grad():
            y1 = x1 + model[:3](x2)
            y2 = x2 + model[3:](y1)
        ctx.model = model
        ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    def backward(ctx, g1, g2):
        y1, y2 = ctx.saved_tensors
        f, g = ctx.model[:3], ctx.model[3:]
        with torch.no_grad():
            x2 = y2 - g(y1)
        gy1, *for_g = run_again(g, y1, g2, list(g.parameters()))
        gx1 = g1 + gy1
        gx2, *for_f = run_again(f, x2, gx1, list(f.parameters()))
        return None, gx1, g2 + gx2, *for_f, *for_g


class Adjoint(torch.autograd.Function):
    """Euler steps of dx/dt = model(x); in backward the steps are run again."""

    @staticmethod
    def forward(ctx, model, x, *parameters):
        ctx.model, ctx.states = model, []
        with torch.no_grad():
            for _ in range(3):
                ctx.states.append(x)
                x = x + 0.1 * model(x)
        return x

    @staticmethod
    def backward(ctx, adjoint):
        parameters = list(ctx.model.parameters())
        found = [torch.zeros_like(p) for p in parameters]
        for x in reversed(ctx.states):
            g, *steps = run_again(ctx.model, x, 0.1 * adjoint, parameters)
            adjoint = adjoint + g
            found = [a + b for a, b in zip(found, steps)]
        return None, adjoint, *found


class TwoInputs(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, scale, *, shift):
        return self.model(x * scale) + shift


def plainly(model, x):
    return model(x)


def two_inputs(model, x):
    return TwoInputs(model)(x, 2.0, shift=x)


def reversible(model, x):
    y1 = x + model[:3](x)
    return y1 + x + model[3:](y1)


def euler(model, x):
    for _ in range(3):
        x = x + 0.1 * model(x)
    return x


def through(function, model, x):
    return function.apply(model, x, *model.parameters())


def reversible_again(model, x):
    y1, y2 = Reversible.apply(model, x, x, *model.parameters())
    return y1 + y2


def nested(reentrant, model, x):
    def inner(x):
        return checkpoint(model[3:], x, use_reentrant=reentrant)

    return checkpoint(lambda x: inner(model[:3](x)), x, use_reentrant=reentrant)


def by_checkpoint(reentrant, model, x):
    return checkpoint(model, x, use_reentrant=reentrant)


def of_a_part(reentrant, model, x):
    return model[3:](checkpoint(model[:3], x, use_reentrant=reentrant))


def in_sequence(reentrant, model, x):
    return checkpoint_sequential(model, 3, x, use_reentrant=reentrant)


def several_inputs(model, x):
    return checkpoint(TwoInputs(model), x, 2.0, shift=x, use_reentrant=False)


WAYS = {
    "old-style Function": (functools.partial(through, OldStyle), plainly),
    "new-style Function": (functools.partial(through, NewStyle), plainly),
    "vmap(vjp) in backward": (functools.partial(through, ByVjp), plainly),
    "reversible": (reversible_again, reversible),
    "adjoint": (functools.partial(through, Adjoint), euler),
    "several inputs": (several_inputs, two_inputs),
    **{
        f"{name}, {'reentrant' if reentrant else 'not reentrant'}": (
            functools.partial(way, reentrant),
            plainly,
        )
        for name, way in [
            ("checkpoint", by_checkpoint),
            ("nested checkpoints", nested),
            ("checkpoint of a part", of_a_part),
            ("checkpoints in sequence", in_sequence),
        ]
        for reentrant in (False, True)
    },
}


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


class Problem:
    """A model, a batch, and the gradients that the block promises."""

    def __init__(self, model, mode, written_out=plainly):
        self.model, self.mode = model, mode
        self.before = everything(model)
        self.x = X.clone().requires_grad_()
        reference = by_hand(model, mode)
        self.expected = gradients(written_out(reference, self.x), reference, self.x)

    def block(self):
        return block(self.model, self.mode)

    def another_block(self):
        return block(self.model, MODES[MODES.index(self.mode) - 1])

    def gradients(self, output):
        return gradients(output, self.model, self.x)


@pytest.fixture
def problem(mode, way):
    again, written_out = WAYS[way]
    problem = Problem(body(), mode, written_out)
    problem.output = lambda: again(problem.model, problem.x)
    yield problem
    assert_same_state(problem.model, problem.before)


def refused():
    return pytest.raises(BlockError, match="Call backward inside the block")


def test_a_forward_again(problem):
    """Inside the block the numbers are right, after it there is an error. No writes."""
    with problem.block():
        found = problem.gradients(problem.output())
        later = problem.output()
    torch.testing.assert_close(found, problem.expected)
    assert_same_state(problem.model, problem.before)
    with refused():
        problem.gradients(later)


def test_in_another_block(problem):
    """It works in a block with the same options, and is an error in another mode."""
    with problem.block():
        first, second = problem.output(), problem.output()
    with problem.block():
        torch.testing.assert_close(problem.gradients(first), problem.expected)
    with problem.another_block(), refused():
        problem.gradients(second)


def test_in_an_inner_block(problem):
    """A backward in an inner block uses the rules of the block the graph was made in.
    Backward of a graph made in the inner block is an error after that block."""
    with problem.block():
        output = problem.output()
        with problem.another_block():
            torch.testing.assert_close(problem.gradients(output), problem.expected)
            inner = problem.output()
        with refused():
            problem.gradients(inner)


def test_a_graph_made_outside(way, mode):
    """Inside a block and after one, backward works as without any block."""
    again, _ = WAYS[way]
    x = X.clone().requires_grad_()

    def found(inside):
        model = body().train(way != "vmap(vjp) in backward")  # torch refuses
        output, later = again(model, x), again(model, x)
        with block(model, mode) if inside else block(body(), mode):
            rows = gradients(output, model, x)
        rows += gradients(later, model, x)
        return rows, model.state_dict()

    torch.testing.assert_close(found(True), found(False))


def test_backward_in_another_thread(problem):
    """The rules are those of the block that is open in the graph's thread."""
    with problem.block():
        output = problem.output()
        found = in_a_thread(lambda: problem.gradients(output))
    torch.testing.assert_close(found, problem.expected)


# -- Under vmap(grad) ------------------------------------------------------------------


class PerSlice(NewStyle):
    """A Function that torch vmaps by itself."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.model, x, *parameters = inputs
        ctx.save_for_backward(x, *parameters)

    @staticmethod
    def forward(model, x, *parameters):
        return stand_in(model, parameters, x)

    @staticmethod
    def backward(ctx, grad_output):
        x, *parameters = ctx.saved_tensors

        def f(x, *parameters):
            return stand_in(ctx.model, parameters, x)

        return None, *vjp(f, x, *parameters)[1](grad_output)


def stand_in(model, parameters, x):
    names = [name for name, _ in model.named_parameters()]
    return functional_call(model, dict(zip(names, parameters)), (x,))


def test_a_forward_again_in_rows(mode):
    """Rows of a Function whose backward runs the model again are those of the model."""
    model = body()
    before = everything(model)
    parameters = [p.detach() for p in model.parameters()]
    x = torch.randn(3, 2, 4, 3, 3).double()

    def rows(run):
        def loss(parameters, x):
            return (run(parameters, x) * WEIGHTS[:2]).sum()

        return vmap(grad(loss), (None, 0))(parameters, x)

    if mode == "sync":  # the backward is vjp inside vmap(grad)
        with block(model, mode), pytest.raises(RuntimeError, match="agreed meaning"):
            rows(lambda parameters, x: PerSlice.apply(model, x, *parameters))
        assert_same_state(model, before)
        return
    with block(model, mode):
        found = rows(lambda parameters, x: PerSlice.apply(model, x, *parameters))
    reference = by_hand(model, mode)
    own = [*reference.parameters()]
    expected = [
        torch.autograd.grad((reference(slice_) * WEIGHTS[:2]).sum(), own)
        for slice_ in x
    ]
    for row, slices in zip(found, zip(*expected)):
        torch.testing.assert_close(row, torch.stack(slices))
    assert_same_state(model, before)


# -- Random draws ----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_is_drawn_again(reentrant, mode):
    """The masks are the same, as ``preserve_rng_state`` says."""

    def seeded(model, x):
        torch.manual_seed(3)
        return model(x)

    problem = Problem(nn.Sequential(*body(), nn.Dropout(0.5)), mode, seeded)
    with problem.block():
        torch.manual_seed(3)
        output = checkpoint(
            problem.model, problem.x, use_reentrant=reentrant, preserve_rng_state=True
        )
        torch.rand(7)
        found = problem.gradients(output)
    torch.testing.assert_close(found, problem.expected)


# -- Hooks -----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tensor", "leaf", "accumulated"])
def test_a_hook_that_runs_the_model(where, mode):
    """In the block it computes what the block says, after it an error is raised."""
    model = body()
    before = everything(model)
    reference = by_hand(model, mode)
    with torch.no_grad():
        expected = reference(X)
    found = []

    def hook(_):
        with torch.no_grad():
            found.append(model(X))

    def hooked():
        leaf = X.clone().requires_grad_()
        tensor = leaf * 2
        if where == "tensor":
            tensor.register_hook(hook)
        elif where == "leaf":
            leaf.register_hook(hook)
        else:
            leaf.register_post_accumulate_grad_hook(hook)
        return tensor.sum()

    with block(model, mode):
        hooked().backward()
        later = hooked()
    torch.testing.assert_close(found, [expected])
    with refused():
        later.backward()
    assert_same_state(model, before)


def test_hooks_that_run_no_model():
    """They work after the block, and on any thread."""
    model = body()
    x = X.clone().requires_grad_()
    seen = []
    with block(model, "eval"):
        output = model(x)
        output.register_hook(lambda g: seen.append(1) or g * 2)
        handle = output.register_hook(lambda g: seen.append(2))
        handle.remove()
    twice = gradients(output, model, x)
    with block(model, "eval"):
        once = gradients(model(x), model, x)
    assert seen == [1]
    torch.testing.assert_close(twice, [2 * g for g in once])


# -- Double backward -------------------------------------------------------------------


def test_double_backward(mode):
    """Double backward of a graph with a checkpoint works inside the block."""
    model = body()
    reference = by_hand(model, mode)

    def penalty(run, parameters, x):
        (g,) = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), parameters, allow_unused=True)

    x = X.clone().requires_grad_()
    expected = penalty(reference, [*reference.parameters()], x)
    with block(model, mode):
        found = penalty(
            lambda x: checkpoint(model, x, use_reentrant=False),
            [*model.parameters()],
            x,
        )
    torch.testing.assert_close(found, expected)


# -- Saved tensors that are not computed again -----------------------------------------


def saved_in_halves():
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t / 2, lambda t: t * 2)


@pytest.mark.parametrize(
    "hooks", [torch.autograd.graph.save_on_cpu, saved_in_halves], ids=["cpu", "halves"]
)
def test_hooks_of_saved_tensors(hooks, mode):
    """Hooks set outside and inside the block keep working after it."""
    problem = Problem(body(), mode)
    with hooks(), problem.block():
        first = problem.model(problem.x)
    with problem.block(), hooks():
        second = problem.model(problem.x)
    for output in (first, second):
        torch.testing.assert_close(problem.gradients(output), problem.expected)
    assert_same_state(problem.model, problem.before)


# -- Memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_kept_alive(way):
    """Model and graph are freed with their last name, after the block and inside it."""
    again, _ = WAYS[way]

    def run(inside):
        model = body()
        x = X.clone().requires_grad_()
        with block(model, "group_norm"):
            output = again(model, x)
            (output * WEIGHTS).sum().backward()
            if inside:
                refs = [weakref.ref(x), weakref.ref(output)]
                del x, output
                return refs
        return [weakref.ref(model), weakref.ref(output), weakref.ref(x)]

    def plainly():
        model = body()
        x = X.clone().requires_grad_()
        output = again(model.eval(), x)
        (output * WEIGHTS).sum().backward()
        return [weakref.ref(model), weakref.ref(output), weakref.ref(x)]

    gc.disable()
    try:
        without = [ref() is None for ref in plainly()]
        within = [ref() is None for ref in run(False)]
        assert within == without
    finally:
        gc.enable()


def test_an_unused_graph_dies():
    """A graph without a call of backward is freed too."""

    def run():
        model = body()
        with block(model, "eval"):
            output = checkpoint(model, X, use_reentrant=False)
            return [weakref.ref(model), weakref.ref(output)]

    refs = run()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


# -- Solvers ---------------------------------------------------------------------------


def test_torchdiffeq(mode):
    """The adjoint method of the library that people use."""
    torchdiffeq = pytest.importorskip("torchdiffeq")

    class Field(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, t, x):
            return self.model(x)

    times = torch.linspace(0, 0.5, 3).double()
    options = dict(method="rk4")

    def solved(model, x):
        return torchdiffeq.odeint_adjoint(Field(model), x, times, **options)[-1]

    problem = Problem(body(), mode, solved)
    with problem.block():
        found = problem.gradients(solved(problem.model, problem.x))
        later = solved(problem.model, problem.x)
    torch.testing.assert_close(found, problem.expected)
    with refused():
        problem.gradients(later)


def test_a_block_object_that_is_kept():
    """It is closed when it is left, whoever still holds it."""
    model = body()
    block = vmap_safe(model, mode="no_running_stats")
    x = X.clone().requires_grad_()
    with block:
        output = checkpoint(model, x, use_reentrant=False)
    with refused():
        output.sum().backward()
    with block:
        checkpoint(model, x, use_reentrant=False).sum().backward()
