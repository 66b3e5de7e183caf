"""Per-sample quantities under torch.compile: one pass, and no more rows than needed.

What is compiled is compared with the loop of plain backward passes, in float64.
"""

import pytest
import slow
import torch
import torch.nn.functional as F
from nets import batch, mse, problem, small_mlp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from wanted import Cosine, assert_exact, truth

from vmapsafe import per_sample, per_sample_grad_norms, per_sample_grads
from vmapsafe import quantities as q


@pytest.fixture(autouse=True)
def fresh_cache():
    torch._dynamo.reset()


class Looks:
    """A backend that notes the sizes of all tensors in its graphs, which it runs."""

    def __init__(self):
        self.graphs, self.sizes = 0, []

    def __call__(self, module, inputs):
        self.graphs += 1
        return aot_module_simplified(
            module, inputs, fw_compiler=self._look, bw_compiler=self._look
        )

    def _look(self, module, inputs):
        for node in module.graph.nodes:
            value = node.meta.get("val")
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(one, torch.Tensor):
                    self.sizes.append(one.numel())
        return module.forward


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def reductions(model):
    """All but rows."""
    generator = torch.Generator().manual_seed(0)
    vectors = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    weights = torch.tensor([0.0, 2, 1, 0.5, 3], dtype=torch.float64)
    return {
        "losses": q.Losses(),
        "norms": q.Norms(),
        "each": q.Norms(per_parameter=True),
        "sum": q.Sum(),
        "clipped": q.ClippedSum(0.3),
        "weighted": q.WeightedSum(weights),
        "automatic": q.WeightedSum(lambda norms: 1 / (norms + 0.1)),
        "squares": q.SumOfSquares(),
        "gram": q.Gram(),
        "dots": q.Dots(vectors),
        "kronecker": q.Sketch(6, "kronecker"),
        "cosines": Cosine(),
    }


# Layers of most kinds, shared and unknown uses.
CASES = [
    ("conv2d, stride and padding", "group_norm"),
    ("conv1d", "no_running_stats"),
    ("frozen", "sync"),
    ("norms", "eval"),
    ("tied", "eval"),
    ("attention", "eval"),
]


@pytest.mark.parametrize("name, mode", CASES)
@pytest.mark.filterwarnings("ignore:.*samples share their statistics")
def test_equals_the_slow_form(name, mode):
    """In one graph, which serves a second call too."""
    model, x, y = problem(name)
    wanted = reductions(model)
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, y):
        options = {"num_groups": 2} if mode == "group_norm" else {}
        return per_sample(model, mse, x, y, want=wanted, mode=mode, **options)

    function = compiled(call, counter)
    for targets in (y, y.sin()):
        known = truth(model, mode, "contribution", mse, x, targets)
        found = function(x, targets)
        for key, quantity in wanted.items():
            assert_exact(quantity, found[key], known)
    assert counter.frame_count == 1


def wide_net():
    """Most of its numbers are in a convolution and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(16, 64, 3, stride=2, bias=False), nn.BatchNorm2d(64), nn.SiLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.LayerNorm([2, 2]), nn.SiLU()),
        *(nn.Flatten(), nn.Linear(256, 150), nn.SiLU(), nn.Linear(150, 3)),
    ).double()
    x, y = batch(16, 6, 6)(), torch.randint(3, (5,))
    model(x)
    return model, x, y


@pytest.mark.parametrize("mode", ["eval", "sync"])
@pytest.mark.filterwarnings("ignore:.*samples share their statistics")
def test_no_tensor_of_all_rows(mode):
    """Neither forward nor backward makes the rows of one large layer."""
    model, x, y = wide_net()
    most = len(x) * max([p.numel() for p in model.parameters()])
    wanted = reductions(model)

    def call(x, y, want):
        return per_sample(model, F.cross_entropy, x, y, want=want, mode=mode)

    backend = Looks()
    found = compiled(lambda x, y: call(x, y, wanted), backend)(x, y)
    assert backend.graphs == 1
    assert max(backend.sizes) < most
    known = truth(model, mode, "contribution", F.cross_entropy, x, y)
    for key, quantity in wanted.items():
        assert_exact(quantity, found[key], known)
    backend = Looks()
    rows = compiled(lambda x, y: call(x, y, q.Rows()), backend)(x, y)
    assert_exact(q.Rows(), rows, known)
    assert max(backend.sizes) == most


# -- What the one pass does not follow -------------------------------------------------


class Unseen(nn.Module):
    """Reads an attribute of its weight, of which torch.compile tells no mode."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return torch.tanh(x @ self.first.weight.T) @ self.second.weight.mT


@pytest.mark.parametrize("want", [q.Norms(), q.Rows()], ids=["norms", "rows"])
def test_an_unseen_use_counts(want):
    model = Unseen().double()
    x, y = batch(4)(), batch(3)()
    found = compiled(lambda x, y: per_sample(model, mse, x, y, want=want))(x, y)
    assert_exact(want, found, truth(model, "eval", "contribution", mse, x, y))


def test_uses_past_the_modules_count():
    """A loss that reads a parameter itself, and one through its module."""
    model = small_mlp()
    weight, x, y = model[0].weight, batch(4)(), batch(3)()

    def loss(output, target):
        regular = weight.square().sum() + model[3].weight.sin().sum()
        return mse(output, target) + regular

    found = compiled(lambda x, y: per_sample(model, loss, x, y, want=q.Norms()))(x, y)
    rows = slow.rows(model.eval(), loss, x, y)
    torch.testing.assert_close(found, slow.norms(rows), rtol=1e-12, atol=0)


class Alternating(nn.Module):
    """Runs another layer each time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layers[self.calls % 2](x)


def test_a_forward_that_does_something_else_each_time():
    """The two forwards of a trace do not mix: a row is that of one layer."""
    model, x, y = Alternating().double(), batch(4)(), batch(3)()
    found = compiled(lambda x, y: per_sample(model, mse, x, y, want=q.Norms()))(x, y)
    norms = []
    for layer in model.layers:
        rows = slow.rows(layer, mse, x, y)
        norms.append(slow.norms(rows))
    assert any([torch.allclose(found, one) for one in norms])


# -- Options ---------------------------------------------------------------------------


def test_random_draws_are_those_of_the_eager_call():
    """The forward that finds the shapes draws nothing."""
    layers = nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3)
    model = nn.Sequential(*layers, nn.AlphaDropout(0.3)).double()
    x, y = batch(4)(), batch(3)()
    model(x)

    def noisy(output, target):
        return mse(output * torch.rand_like(output), target)

    def call(x, y):
        return per_sample_grad_norms(model, noisy, x, y, randomness="different")

    function = compiled(call)
    torch.manual_seed(1)
    expected = call(x, y)
    after = torch.rand(())
    torch.manual_seed(1)
    torch.testing.assert_close(function(x, y), expected)
    assert torch.rand(()) == after
    assert not torch.allclose(function(x, y), expected)


@pytest.mark.parametrize(
    "want, randomness",
    [(q.WeightedSum(lambda norms: 1 / norms), "different"), (q.Norms(), "same")],
    ids=["looks twice", "the same draw in each chunk"],
)
def test_draws_that_would_be_made_anew_are_refused(want, randomness):
    """The compiler does not show the state of the generators."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = batch(4)(), batch(3)()

    def call(x, y):
        options = {"randomness": randomness, "chunk_size": 2}
        return per_sample(model, mse, x, y, want=want, **options)

    with pytest.raises(Exception, match="would have to be drawn again"):
        compiled(call)(x, y)


def test_running_statistics_are_updated_once():
    """One training step of the statistics a call."""
    model, x, y = problem("conv2d")
    twin = problem("conv2d")[0]

    def call(model, x, y):
        options = {"mode": "sync", "update_running_stats": True}
        return per_sample_grad_norms(model, mse, x, y, **options)

    function = compiled(lambda x, y: call(model, x, y))
    for shift in (0, 1):
        expected = call(twin, x + shift, y)
        torch.testing.assert_close(function(x + shift, y), expected)
        for found, wanted in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(found, wanted)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, given, factor):
        return self.layers(given) * factor


def test_other_forms_of_a_call():
    """A dict of inputs, aux, some parameters, others in their place, chunks, slices."""
    model, x, y = Named().double(), batch(2, 4)(), batch(2, 3)()
    inputs = {"given": x, "factor": y.cos()}
    others = {
        f"layers.{i}.weight": torch.randn_like(model.layers[i].weight) for i in (0, 2)
    }

    def loss(output, target):
        return mse(output, target), output.sum()

    def call(inputs, y, want, **options):
        return per_sample(model, loss, inputs, y, want=want, has_aux=True, **options)

    for options in (
        {"chunk_size": 2},
        {"params": ["layers.2.bias"]},
        {"params": others, "keep_batch_dim": False},
        {"fast": False},
    ):
        for want in (q.ClippedSum(0.1), q.Rows()):
            torch._dynamo.reset()
            function = compiled(lambda x, y: call(x, y, want, **options))
            expected = call(inputs, y, want, **options)
            torch.testing.assert_close(function(inputs, y), expected)


def test_rows_with_derivatives():
    """Rows keep the derivatives that plain autograd asks for."""
    model, x, y = problem("mlp")
    x.requires_grad_()

    def call(x, y):
        rows = per_sample_grads(model, mse, x, y)
        return sum([row.sin().sum() for row in rows.values()])

    (expected,) = torch.autograd.grad(call(x, y), x)
    (found,) = torch.autograd.grad(compiled(call)(x, y), x)
    torch.testing.assert_close(found, expected)


def test_an_empty_batch_and_one_sample():
    model, x, y = problem("conv2d")
    for size in (0, 1):
        torch._dynamo.reset()
        function = compiled(lambda x, y: per_sample_grad_norms(model, mse, x, y))
        found = function(x[:size], y[:size])
        expected = per_sample_grad_norms(model, mse, x[:size], y[:size])
        torch.testing.assert_close(found, expected)


def test_other_batch_sizes():
    """Linear layers alone: one graph for all sizes. With batch norm in "eval",
    convolutions or cross entropy, torch makes one graph a size (2.13)."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, y):
        found = {"norms": q.Norms(), "clipped": q.ClippedSum(0.1), "gram": q.Gram()}
        return per_sample(model, mse, x, y, want=found)

    function = compiled(call, counter, dynamic=True)
    for size in (5, 7, 3):
        x, y = torch.randn(size, 4).double(), torch.randn(size, 3).double()
        torch.testing.assert_close(function(x, y), call(x, y))
    assert counter.frame_count == 1


def test_inductor():
    """With the default backend."""
    model, x, y = problem("conv2d, stride and padding")
    want = {"norms": q.Norms(), "clipped": q.ClippedSum(0.3), "gram": q.Gram()}
    found = compiled(lambda x, y: per_sample(model, mse, x, y, want=want), "inductor")(
        x, y
    )
    known = truth(model, "eval", "contribution", mse, x, y)
    for key, quantity in want.items():
        assert_exact(quantity, found[key], known)
