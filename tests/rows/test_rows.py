"""Rows, norms, sums and sketches of models and losses that do more than layers do,
against a loop of plain backward passes."""

import copy
import functools
import warnings

import pytest
import slow
import torch
import torch.nn.functional as F
from measured import change_regimes, take_regimes_of_a_gpu
from nets import small_mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vmapsafe import (
    NeverUpdatedWarning,
    clipped_grad_sum,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
)
from vmapsafe import quantities as q
from vmapsafe._block import vmap_safe as vmap_safe_module
from vmapsafe.testing import assert_same


def check_all(model, loss_fn, *batch, want=None, fast=(True, False), **options):
    """All four functions, at once and in chunks."""
    want = want or slow.rows(model, loss_fn, *batch)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    norms = slow.norms(want)
    most = float(norms.median()) or 1.0
    total = slow.clipped(want, most)
    for way in fast:
        for chunk_size in (None, 1, 2):
            given = {"chunk_size": chunk_size, "fast": way, **options}
            call = model, loss_fn, *batch
            assert_same(per_sample_grads(*call, **given), want)
            out = {n: row.new_empty(row.shape) for n, row in want.items()}
            assert_same(per_sample_grads(*call, out=out, **given), want)
            assert_same(per_sample_grad_norms(*call, **given), norms)
            assert_same(clipped_grad_sum(*call, max_grad_norm=most, **given), total)
            assert_same(per_sample_sketch(*call, k=4, **given), slow.sketch(want, 4))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), f"{name} was written"


def mlp():
    return small_mlp().eval()


def data():
    return torch.randn(3, 4).double(), torch.tensor([0, 2, 1])


# -- What a loss reads ----------------------------------------------------------------


def regularised(model):
    return lambda output, y: F.cross_entropy(output, y) + 0.1 * sum(
        [p.square().sum() for p in model.parameters()]
    )


def reads_one(model):
    return lambda output, y: F.cross_entropy(output, y) + model[3].weight.norm()


def calls_again(model):
    return lambda output, y: F.cross_entropy(output, y) + model(output @ GRID).sum()


GRID = torch.linspace(-1, 1, 12).double().view(3, 4)


@pytest.mark.parametrize("make", [regularised, reads_one, calls_again])
def test_a_loss_that_reads_the_model(make):
    model = mlp()
    check_all(model, make(model), *data())


def test_a_loss_for_each_sample():
    """reduction="none" gives one number for a batch of one."""
    model = mlp()

    def loss_fn(output, y):
        return F.cross_entropy(output, y, reduction="none")

    check_all(model, loss_fn, *data())
    rows, aux = per_sample_grads(
        model, lambda o, y: (loss_fn(o, y), loss_fn(o, y)), *data(), has_aux=True
    )
    assert aux.shape == (3,)


# -- Parameters read without their modules ---------------------------------------------


class Listed(nn.Module):
    """Uses parameters from a list, an attribute of another module and a closure."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.conv = nn.Conv1d(1, 2, 2)
        self.idle = nn.Parameter(torch.ones(2))
        self.weights = [self.a.weight, self.b.weight]
        self.holder = [nn.ParameterList([self.conv.weight])]
        self.apply_bias = functools.partial(torch.add, other=self.b.bias)
        self.log_scale = lambda: self.a.bias.exp()
        a_bias = self.a.bias
        self.outer = lambda x: x * a_bias
        self.biases = [self.a.bias, self.b.bias]

    def forward(self, x):
        h = F.linear(x, self.weights[0]).tanh() * self.log_scale()
        h = h + F.conv1d(h.unsqueeze(1), self.holder[0][0]).mean((1, 2)).unsqueeze(1)
        h = torch.cat([self.outer(h), torch.stack([*self.a.weight])[:1]])[:-1]
        h = h * torch.cat(self.biases).sum() + self.biases[1].square().sum()
        return self.apply_bias(h @ self.weights[1].T)


def test_parameters_in_lists_and_closures():
    model, (x, y) = Listed().double(), data()
    check_all(model, F.cross_entropy, x, y)
    rows = per_sample_grads(model, F.cross_entropy, x, y)
    assert not rows["idle"].any()  # is used nowhere


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_a_loss_that_holds_parameters():
    model = mlp()
    held = list(model.parameters())
    weight, norm = model[0].weight, model[1]

    def loss_fn(output, y):
        total = torch.cat([p.flatten() for p in held]).abs().sum()
        flat = nn.utils.parameters_to_vector([norm.weight, norm.bias])
        pairs = torch.einsum("ij,kj->", weight, weight)
        pairs = pairs + Doubled.apply(weight).sin().sum()
        return F.cross_entropy(output, y) + total + flat.square().sum() + pairs

    check_all(model, loss_fn, *data())


def test_chosen_parameters_in_lists():
    """Also frozen ones, and other values in their place."""
    model, (x, y) = Listed().double(), data()
    want = slow.rows(model, F.cross_entropy, x, y)
    model.requires_grad_(False)
    names = ["a.weight", "b.bias"]
    for fast in (True, False):
        call = model, F.cross_entropy, x, y
        rows = per_sample_grads(*call, params=names, fast=fast)
        assert_same(rows, {n: want[n] for n in names})
        other = {"a.weight": torch.randn(4, 4).double()}
        rows = per_sample_grads(*call, params=other, fast=fast)
        moved = copy.deepcopy(model)
        moved.a.weight.requires_grad_()
        moved.weights, moved.log_scale = [
            moved.a.weight,
            moved.b.weight,
        ], model.log_scale
        with torch.no_grad():
            moved.a.weight.copy_(other["a.weight"])
        expected = slow.rows(moved, F.cross_entropy, x, y)
        assert_same(rows, expected)


def through_a_view(model):
    half = model[3].weight[:1]
    return lambda output, y: F.cross_entropy(output, y) + half.sum()


def computed_before(model):
    penalty = model[3].weight.norm()
    return lambda output, y: F.cross_entropy(output, y) + penalty


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("make", [through_a_view, computed_before])
def test_parameters_that_a_copy_cannot_replace(make, fast):
    """An error names the parameter; there is no row without that use."""
    model = mlp()
    call = model, make(model), *data()
    for function, options in (
        (per_sample_grads, {}),
        (per_sample_grad_norms, {}),
        (clipped_grad_sum, {"max_grad_norm": 1.0}),
        (per_sample_sketch, {"k": 3}),
    ):
        with pytest.raises(RuntimeError, match="depends on '3.weight' by a way past"):
            function(*call, fast=fast, **options)


# -- Nothing is written --------------------------------------------------------------


class Writes(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.write = write

    def forward(self, x):
        with torch.no_grad():
            self.write(self.linear.weight)
        return self.linear(x)


def assign(weight):
    weight.data = weight.data * 2


WRITES = {
    "clamp_": lambda w: w.clamp_(-0.1, 0.1),
    "data": lambda w: w.data.mul_(2),
    "a view": lambda w: w.view(-1)[:2].zero_(),
    "an item": lambda w: w.__setitem__(0, 1.0),
    "operator": lambda w: w.__imul__(2),
    "out": lambda w: torch.renorm(w, 2, 0, 0.1, out=w.detach()),
    "assignment": assign,
    "init": lambda w: nn.init.zeros_(w),
    "renormalised": lambda w: torch.embedding_renorm_(w, torch.tensor([0]), 0.1, 2.0),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", WRITES)
def test_a_forward_that_writes_on_a_parameter(name, fast, size):
    model = Writes(WRITES[name]).double()
    before = model.linear.weight.detach().clone()
    x, y = data()
    with pytest.raises(RuntimeError, match="(writes on|`data` under vmap)"):
        per_sample_grads(model, F.cross_entropy, x[:size], y[:size], fast=fast)
    assert torch.equal(model.linear.weight, before)


# -- Embeddings that renormalise -------------------------------------------------------


def renormalised(model, name="0"):
    """The same model with the weight renormalised for good."""
    model = copy.deepcopy(model)
    layer = model.get_submodule(name)
    with torch.no_grad():
        norms = layer.weight.norm(layer.norm_type, dim=1, keepdim=True)
        factor = layer.max_norm / (norms + 1e-7)
        layer.weight.mul_(torch.where(norms > layer.max_norm, factor, 1))
    layer.max_norm = None
    return model


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_embedding_with_max_norm(norm_type):
    """Rows of the renormalised weight, which is not written."""
    options = {"max_norm": 0.5, "norm_type": norm_type, "padding_idx": 1}
    embedding = nn.Embedding(6, 4, **options)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        embedding.weight.mul_(torch.linspace(0, 10, 6).view(-1, 1).double())
    x, y = torch.tensor([[0, 1, 2], [5, 5, 4], [3, 1, 1]]), torch.tensor([0, 2, 1])
    want = slow.rows(renormalised(model), F.cross_entropy, x, y)
    check_all(model, F.cross_entropy, x, y, want=want)


# torch's, under vmap
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_embedding_bag(mode, max_norm):
    embedding = nn.EmbeddingBag(6, 4, mode=mode, max_norm=max_norm, padding_idx=1)
    model = nn.Sequential(embedding, nn.Linear(4, 3)).double()
    x, y = torch.tensor([[0, 1, 2], [5, 5, 4], [3, 1, 1]]), torch.tensor([0, 2, 1])
    same = model if max_norm is None else renormalised(model)
    want = slow.rows(same, F.cross_entropy, x, y)
    check_all(model, F.cross_entropy, x, y, want=want)


class Renormalises(nn.Module):
    """Looks up twice, and may use the weight for its outputs too."""

    def __init__(self, tied):
        super().__init__()
        self.words, self.tied = nn.Embedding(5, 4, max_norm=0.3), tied

    def forward(self, x):
        x = x.clamp(max=self.words.weight.shape[0])  # which reads no numbers
        h = self.words(x).tanh() + self.words(x.flip(1)).sin()
        return F.linear(h.sum(1), self.words.weight) if self.tied else h.sum((1,))


@pytest.mark.parametrize("fast", [True, False])
def test_a_renormalised_weight_that_is_read_otherwise(fast):
    x, y = torch.tensor([[0, 1], [4, 4], [2, 0]]), torch.tensor([0, 2, 1])
    model = Renormalises(tied=False).double()
    want = slow.rows(renormalised(model, "words"), F.cross_entropy, x, y)
    check_all(model, F.cross_entropy, x, y, want=want)
    model.tied = True
    with pytest.raises(RuntimeError, match="max_norm renormalises 'words.weight'"):
        per_sample_grads(model, F.cross_entropy, x, y, fast=fast)


# -- Biases --------------------------------------------------------------------------


class Biased(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).double())
        self.bias = nn.Parameter(torch.randn(shape).double())

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("tokens", [(), (2,)])
@pytest.mark.parametrize("shape", [(3,), (1,), (), (1, 3), (1, 1)])
def test_a_bias_that_broadcasts(shape, tokens):
    model = Biased(shape)
    x = torch.randn(3, *tokens, 4).double()
    check_all(model, lambda o: o.sin().sum(), x)
    model.weight.requires_grad_(False)
    rows = per_sample_grads(model, lambda o: o.sin().sum(), x)
    losses = [model(one[None]).sin().sum() for one in x]
    want = [torch.autograd.grad(loss, model.bias)[0] for loss in losses]
    assert_same(rows["bias"], torch.stack(want))


# -- Empty dimensions -----------------------------------------------------------------

EMPTY = {
    "embedding": (lambda: nn.Embedding(4, 3, padding_idx=1), (0,), True),
    "linear": (lambda: nn.Linear(4, 3), (0, 4), False),
    "linear twice": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        (2, 0, 4),
        False,
    ),
    "no outputs": (lambda: nn.Linear(4, 0), (2, 4), False),
    "no inputs": (lambda: nn.Linear(0, 3), (2, 0), False),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
        (0, 4),
        False,
    ),
    "batch norm": (lambda: nn.BatchNorm1d(4).eval(), (4, 0), False),
    "batch norm of planes": (lambda: nn.BatchNorm2d(4).eval(), (4, 0, 3), False),
    "folded": (
        lambda: nn.Sequential(
            nn.Flatten(0, 1), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.Tanh()
        ),
        (0, 2, 5, 5),
        False,
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # never updated; no elements
@pytest.mark.parametrize("name", EMPTY)
def test_empty_dimensions(name):
    make, shape, words = EMPTY[name]
    model = make().double()
    x = torch.randn(3, *shape).double()
    x = x.long() if words else x
    want = {n: torch.zeros(3, *p.shape).double() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        if name == "no inputs" and n == "bias":  # the one that is seen
            want[n] = torch.full((3, *p.shape), 2.0).double()
    check_all(model, lambda o: o.sum(), x, want=want)


# -- Options and inputs that layers seldom get -----------------------------------------


class Words(nn.Module):
    """An embedding with vectors that never change."""

    def __init__(self, padding_idx):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 2).double())
        self.padding_idx = padding_idx

    def forward(self, x):
        return F.embedding(x, self.weight, self.padding_idx).sin()


@pytest.mark.parametrize("padding_idx", [0, 1, 7, 8, -1, -4])
@pytest.mark.parametrize("words", [3, 40])
def test_a_word_without_a_gradient(padding_idx, words):
    """Its number may be larger than the width of the vectors, or count from the end."""
    model = Words(padding_idx)
    x = torch.randint(9, (3, words))
    x[:, 0] = padding_idx % 9
    check_all(model, lambda output: output.sum(), x)


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_same_number_of_positions(kernel, dilation):
    model = nn.Conv1d(2, 3, kernel, padding="same", dilation=dilation).double()
    check_all(model, lambda output: output.sin().sum(), torch.randn(3, 2, 9).double())


class OfAGrid(nn.Module):
    """A layer that sees the same for all samples."""

    def __init__(self, layer, grid):
        super().__init__()
        self.layer, self.grid = layer.eval(), grid

    def forward(self, x):
        return (x.sum(1, keepdim=True) * self.layer(self.grid).reshape(1, -1)).sin()


OF_A_GRID = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "convolution": (lambda: nn.Conv2d(4, 3, 2), (2, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(5, 3), None),
    "batch norm": (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3)),
    "batch norm of one": (lambda: nn.BatchNorm2d(4), (1, 4, 3, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "layer norm": (lambda: nn.LayerNorm(4), (2, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (2, 4, 3, 3)),
}


def test_the_warning_is_about_the_statistics_of_the_checkpoint():
    """Those that ``params`` brings, and not those of the model."""

    def fresh():
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        return net.double()

    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    trained = fresh()
    trained(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = trained.state_dict()
        for _ in range(2):
            found = per_sample_grads(fresh(), F.cross_entropy, x, y, params=state)
        for _ in range(2):
            assert_same(found, per_sample_grads(trained, F.cross_entropy, x, y))
    for function in (per_sample_grads, per_sample_grad_norms):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vmap_safe_module._warned_of_statistics.discard(nn.Sequential)
            function(trained, F.cross_entropy, x, y, params=fresh().state_dict())
        assert [w.category for w in caught] == [NeverUpdatedWarning]


@pytest.mark.filterwarnings("ignore::vmapsafe.NeverUpdatedWarning")
@pytest.mark.parametrize("name", OF_A_GRID)
def test_a_layer_of_what_no_sample_has(name):
    make, shape = OF_A_GRID[name]
    torch.manual_seed(2)
    grid = torch.randn(shape).double() if shape else torch.randint(5, (2, 4))
    model = OfAGrid(make().double(), grid)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 4).double()
    check_all(model, lambda output: output.sum(), x)


class ByDefaults(nn.Module):
    """Functions of torch, with only the arguments that are required."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, x):
        return self.function(x, *self.weights).sin()


BY_DEFAULTS = {
    "linear": (F.linear, (4, 2, 6), (3, 6)),
    "conv1d": (F.conv1d, (4, 2, 6), (3, 2, 3)),
    "conv2d": (F.conv2d, (4, 2, 6, 5), (3, 2, 3, 2)),
    "conv3d": (F.conv3d, (4, 2, 3, 4, 3), (3, 2, 2, 2, 2)),
    "embedding": (F.embedding, None, (5, 3)),
}


@pytest.mark.parametrize("name", BY_DEFAULTS)
def test_defaults_are_torchs(name):
    function, shape, *shapes = BY_DEFAULTS[name]
    model = ByDefaults(function, *shapes).double()
    x = torch.randn(shape).double() if shape else torch.randint(5, (4, 2))
    w = torch.randn(model(x).shape).double()
    check_all(model, lambda o, w: (o * w).sum(), x, w)


class PastItsCall(nn.Module):
    """Hands a layer's tensors to torch, and asks for the statistics of the input."""

    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x):
        layer = self.layer
        given = layer.running_mean, layer.running_var, layer.weight, layer.bias
        y = self.function(x, *given, True)
        return y.permute(0, 2, 3, 1).flatten(1).sin()


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_layer_that_is_reached_past_its_call(layer):
    """The layer follows its mode, in any order of the numbers in memory."""
    layer = layer(3, affine=True, track_running_stats=True).double()
    function = F.batch_norm if isinstance(layer, nn.BatchNorm2d) else F.instance_norm
    for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
        tensor.data.add_(torch.rand(3) * 2)
    model, written = PastItsCall(layer, function), WrittenOut()
    written.load_state_dict(layer.state_dict(), strict=False)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    written.statistics = mean, var
    w = torch.randn(3, 48).double()
    images = torch.randn(3, 3, 4, 4).double()
    for x in (images, images.contiguous(memory_format=torch.channels_last)):
        rows = slow.rows(written, lambda o, w: (o * w).sum(), x, w)
        want = {f"layer.{name}": row for name, row in rows.items()}
        check_all(model, lambda o, w: (o * w).sum(), x, w, want=want)
    assert torch.equal(layer.running_mean, mean)


class ByItsOwn(nn.Module):
    """A user's layer that passes a sample's statistics to batch norm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3).double() + 1)
        self.bias = nn.Parameter(torch.randn(3).double())
        self.statistics = None

    def forward(self, x):
        own = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3))
        mean, var = self.statistics or own
        return self.normed(x, mean, var).permute(0, 2, 3, 1).flatten(1).sin()

    def normed(self, x, mean, var):
        return F.batch_norm(x, mean, var, self.weight, self.bias)


class WrittenOut(ByItsOwn):
    def normed(self, x, mean, var):
        weight, bias, mean, var = (
            p.view(3, 1, 1) for p in (self.weight, self.bias, mean, var)
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def test_batch_norm_by_statistics_that_are_handed_over():
    model, written = ByItsOwn(), WrittenOut()
    written.load_state_dict(model.state_dict())
    w = torch.randn(3, 48).double()
    images = torch.randn(3, 3, 4, 4).double()
    for x in (images, images.contiguous(memory_format=torch.channels_last)):
        want = slow.rows(written, lambda o, w: (o * w).sum(), x, w)
        check_all(model, lambda o, w: (o * w).sum(), x, w, want=want)


# -- Very small and very large --------------------------------------------------------


class Folds(nn.Module):
    """Linear layers, convolutions and embeddings whose rows are made in every way."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.mix = nn.Linear(8, 9)
        self.conv = nn.Conv1d(9, 10, 3, padding=1)
        self.grouped = nn.Conv1d(10, 10, 3, groups=5)
        self.norm = nn.LayerNorm(10)
        self.scale = nn.Parameter(torch.randn(10))
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        h = self.mix(self.words(x)).tanh().mT
        h = self.grouped(self.conv(h).tanh()).mT
        return self.out((self.norm(h) * self.scale).mean(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-30, -22, -12, 0, 12, 19, 30])
def test_norms_over_the_range_of_numbers(exponent, dtype):
    """A norm is right if the row is, also if the dtype cannot hold the squares."""
    if dtype is torch.float64:
        exponent *= 7
    torch.manual_seed(0)
    model = Folds().to(dtype)
    x = torch.randint(50, (4, 5))
    scale = torch.tensor([1.0, 0.0, 1.0, 3.0], dtype=dtype) * 10.0**exponent

    def loss_fn(output, scale):
        return (output.sin() * scale).sum()

    call = model, loss_fn, x, scale
    rows = per_sample_grads(*call)
    exact = {n: row.double() for n, row in rows.items()}
    largest = max([float(row.abs().max()) for row in exact.values()])
    # In units in which float64 can square them.
    want = slow.norms({n: row / largest for n, row in exact.items()}) * largest
    # What a sum of products rounds to differs from the rows' own rounding.
    rtol = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    norms = per_sample_grad_norms(*call)
    assert norms.dtype == (torch.float32 if dtype is torch.bfloat16 else dtype)
    torch.testing.assert_close(norms.double(), want, rtol=rtol, atol=0)
    by_name = per_sample_grad_norms(*call, per_parameter=True)
    for n, row in exact.items():
        wanted = slow.norms({n: row / largest}) * largest
        torch.testing.assert_close(
            by_name[n].double(), wanted, rtol=rtol, atol=rtol * float(want.max())
        )
    most = float(want[0]) or 1.0
    factors = (most / want).clamp(max=1)
    total = clipped_grad_sum(*call, max_grad_norm=most)
    for n, row in exact.items():
        wanted = torch.tensordot(factors, row / largest, 1)
        torch.testing.assert_close(
            total[n].double() / largest, wanted, rtol=rtol, atol=rtol
        )


@pytest.mark.parametrize("piece", [1, 2**25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-22, 0, 19])
def test_norms_where_numbers_are_not_read(exponent, dtype, piece, monkeypatch):
    """As on a GPU, whose numbers would have to be waited for; by rows and by products
    of inputs and gradients."""
    take_regimes_of_a_gpu(monkeypatch)
    change_regimes(monkeypatch, formulas={"piece": piece})
    test_norms_over_the_range_of_numbers(exponent, dtype)


@pytest.mark.parametrize("reads", [True, False])
def test_norms_of_rows_that_are_small_differences(reads, monkeypatch):
    """A Gram matrix in float32 would give only rounding errors."""
    if not reads:
        take_regimes_of_a_gpu(monkeypatch)
        change_regimes(monkeypatch, formulas={"piece": 1})
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(2, 1, 64).expand(2, 4, 64).contiguous()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0 + 2**-12]).view(4, 1)

    def loss_fn(output):
        return (output * signs).sum()

    rows = per_sample_grads(layer, loss_fn, x)["weight"].double()
    norms = per_sample_grad_norms(layer, loss_fn, x)
    torch.testing.assert_close(
        norms.double(), slow.norms({"": rows}), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("tokens", [(), (2,)])
@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("of_input", [1e38, 1e-38])
def test_norms_of_large_times_small(of_input, reads, tokens, monkeypatch):
    """Products of numbers at one end of the range and numbers at the other."""
    if not reads:
        take_regimes_of_a_gpu(monkeypatch)
        change_regimes(monkeypatch, formulas={"piece": 2**10})
    layer = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(layer.weight)
    x = torch.randn(2, *tokens, 64)
    w = torch.randn(2, *tokens, 64) * 1e-3 / of_input
    x = x / x.abs().amax() * of_input
    rows = per_sample_grads(layer, lambda o, w: (o * w).sum(), x, w)["weight"]
    norms = per_sample_grad_norms(layer, lambda o, w: (o * w).sum(), x, w)
    want = slow.norms({"": rows.double()})
    torch.testing.assert_close(norms.double(), want, rtol=1e-4, atol=0)


def test_clipped_sums_are_within_their_bound(monkeypatch):
    """Also where the terms of each row nearly cancel, on a GPU: a norm that is too
    small would not clip."""
    take_regimes_of_a_gpu(monkeypatch)
    change_regimes(monkeypatch, formulas={"piece": 2**12})
    layer = nn.Linear(200, 200, bias=False)
    x, signs = torch.randn(6, 16, 200) + 30000, torch.randn(6, 16, 200)
    signs = signs - signs.mean(1, keepdim=True)

    def loss_fn(output, signs):
        return (output * signs).sum()

    total = clipped_grad_sum(layer, loss_fn, x, signs, max_grad_norm=1.0)
    assert total["weight"].norm() <= 6.1
    rows = torch.einsum("bto,btc->boc", signs.double(), x.double())
    norms = per_sample_grad_norms(layer, loss_fn, x, signs)
    torch.testing.assert_close(
        norms.double(), slow.norms({"": rows}), rtol=1e-4, atol=0
    )
    gram = per_sample(layer, loss_fn, x, signs, want=q.Gram()).double()
    flat = rows.flatten(1)
    within = 1e-4 * float(flat.norm(dim=1).max()) ** 2
    torch.testing.assert_close(gram, flat @ flat.T, rtol=0, atol=within)


STRIDED = {
    "a line": (lambda: nn.Conv1d(16, 24, 3, stride=2, bias=False), (16, 9)),
    "wide": (lambda: nn.Conv1d(16, 24, 4, stride=3, dilation=1, bias=False), (16, 12)),
    "a plane": (
        lambda: nn.Conv2d(8, 40, 3, stride=(2, 1), padding=(1, 0), bias=False),
        (8, 5, 4),
    ),
}


@pytest.mark.parametrize("name", STRIDED)
def test_norms_of_strided_convolutions(name):
    """The shapes have few positions, for which rows are not made."""
    make, shape = STRIDED[name]
    model = make().double()
    check_all(model, lambda o: o.sin().sum(), torch.randn(3, *shape).double())


def test_factors_below_the_range_of_half_precision():
    layer = nn.Linear(3, 2, bias=False).half()
    x = torch.full((2, 3), 2.0**10).half()
    total = clipped_grad_sum(layer, lambda o: (o * 16).sum(), x, max_grad_norm=1e-5)
    want = torch.full((2, 3), 2 * 1e-5 / 6**0.5)
    torch.testing.assert_close(total["weight"].float(), want, rtol=1e-2, atol=6e-8)


# -- Options of torch -----------------------------------------------------------------


@pytest.fixture
def switches():
    backends = torch.backends
    places = backends, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    # torch.testing._internal, which other tests import, forbids it.
    with getattr(backends, "__allow_nonbracketed_mutation")():
        yield backends
        torch.set_float32_matmul_precision("highest")
        for place, value in zip(places, before):
            place.fp32_precision = value


@pytest.mark.parametrize(
    "switch",
    [
        lambda b: setattr(b.cuda.matmul, "fp32_precision", "tf32"),
        lambda b: setattr(b, "fp32_precision", "tf32"),
        lambda b: setattr(b.mkldnn, "fp32_precision", "bf16"),
        lambda b: setattr(b.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda b: torch.set_float32_matmul_precision("medium"),
        lambda b: (
            torch.set_float32_matmul_precision("high"),
            setattr(b.mkldnn.matmul, "fp32_precision", "bf16"),
        ),
    ],
)
def test_float32_precision_of_products(switch, switches):
    """Rows of convolutions do not lose what convolutions keep, whichever of torch's
    switches is used, the older, the newer, or both."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.Tanh()),
        *(nn.Conv2d(16, 12, 3), nn.Flatten()),
    )
    x = torch.randn(4, 12, 4, 4)
    model(x)
    call = model.eval(), lambda o: o.square().sum(), x
    rows, norms = per_sample_grads(*call), per_sample_grad_norms(*call)
    names = ["3.weight", "0.weight"]
    switch(switches)
    found = per_sample_grads(*call)
    assert_same({n: found[n] for n in names}, {n: rows[n] for n in names})
    assert_same(per_sample_grad_norms(*call), norms, rtol=1e-6)


class Watches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Watches, lambda: FlopCounterMode(display=False)])
def test_modes_that_watch_operators(mode):
    model, batch = mlp(), data()
    want = slow.rows(model, F.cross_entropy, *batch)
    with mode():
        check_all(model, F.cross_entropy, *batch, want=want)


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_by_running_statistics_under_autocast(affine):
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(4, affine=affine, track_running_stats=True)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), norm, nn.Flatten(), nn.Linear(24, 3))
    x, y = torch.randn(5, 2, 8), torch.randint(3, (5,))
    model(x)
    rows = per_sample_grads(model, F.cross_entropy, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        rough = per_sample_grads(model, F.cross_entropy, x, y)
    for name, row in rows.items():
        assert rough[name].dtype == torch.float32
        torch.testing.assert_close(rough[name], row, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("fast", [True, False])
def test_group_norm_of_one_value_is_refused(fast):
    """It is refused as by torch itself, because only the bias would be left."""
    net = nn.Sequential(nn.GroupNorm(4, 4), nn.Flatten())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        per_sample_grads(net, lambda y: y.sum(), torch.randn(5, 4, 1, 1), fast=fast)
    # Without a parameter of the norm, which would be kept.
    net = nn.Sequential(nn.Conv2d(2, 4, 1), net)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        options = {"params": ["0.weight"], "fast": fast}
        per_sample_grad_norms(
            net, lambda y: y.sum(), torch.randn(5, 2, 1, 1), **options
        )
