"""Speed rules of layer norm, attention, linear layers and embedding: under every
transform they equal the same layers, written out in plain operations."""

import mmap

import pytest
import torch
import torch.nn.functional as F
from measured import change_regimes, take_regimes_of_a_gpu
from operator_rules import (
    TRANSFORMS,
    X,
    like,
    loss_of,
    rows,
    take_any_memory,
    tensors,
    watch,
)
from torch import nn
from torch.func import grad, jvp, vmap

from vmapsafe import per_sample_grads, vmap_safe
from vmapsafe._block.operators import only
from vmapsafe._rule import operator_rules
from vmapsafe.rules import attention, embedding, layer_norm, linear, memory
from vmapsafe.testing import assert_same

# torch's own rule for attention is a loop, and says so
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

FILES = (attention, embedding, layer_norm, linear)
OPERATORS = {
    operator
    for file in FILES
    for name, operator in vars(file).items()
    if name in ("_forward", "_backward", "_addmm")
}
RULES = [rule for operator in OPERATORS for rule in operator_rules()[operator]]
LAYER_NORM = {
    "native_layer_norm, batches merged",
    "native_layer_norm_backward, batches merged",
}
ATTENTION = {
    "attention on the CPU, batches merged",
    "attention_backward on the CPU, batches merged",
}
LINEAR = {"addmm, batches merged"}
AGAIN = "native_layer_norm_backward, differentiated again"
(BACKWARD,) = [rule for rule in RULES if rule.name == AGAIN]
EMBEDDING = {"embedding_dense_backward, into memory of zeros"}


@pytest.fixture
def taken(monkeypatch):
    """The names of the rules that took a call while a block was open."""
    names = set()
    watch(monkeypatch, RULES, lambda rule, call: names.add(rule.name))
    return names


@pytest.fixture(params=[2**3, 2**40], ids=["a kernel a slice", "plain operations"])
def every_size(request, monkeypatch):
    """Let the rules take small calls too, in both ways of layer norm's backward."""
    of_layer_norm = {"batch": 0, "slice": request.param}
    change_regimes(monkeypatch, layer_norm=of_layer_norm, linear=0)
    take_any_memory(monkeypatch)


class PlainLayerNorm(nn.LayerNorm):
    def forward(self, x):
        dims = list(range(-len(self.normalized_shape), 0))
        centred = x - x.mean(dims, keepdim=True)
        var = centred.square().mean(dims, keepdim=True)
        y = centred / torch.sqrt(var + self.eps) * self.weight
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Two heads."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        n, tokens, width = x.shape
        split = self.qkv(x).view(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        return self.attend(*split).transpose(1, 2).reshape(n, tokens, width)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class PlainAttention(Attention):
    def attend(self, q, k, v):
        return (q @ k.mT * q.size(-1) ** -0.5).softmax(-1) @ v


class Tokens(nn.Module):
    """(N, C, 4, 4) as (N, 16, C)."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


def normalising(plain=False):
    norm = PlainLayerNorm if plain else nn.LayerNorm
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), Tokens(), nn.Tanh()),
        *(norm(4), nn.Linear(4, 3), nn.Tanh(), norm((16, 3), bias=False), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(48, 5), norm(5)),
    ).double()


def attending(plain=False):
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), Tokens(), nn.Tanh()),
        *(
            nn.Linear(4, 4),
            (PlainAttention if plain else Attention)(4),
            nn.Linear(4, 2),
        ),
    ).double()


def scattered(net):
    """Set random parameters, so that none is one or zero."""
    torch.manual_seed(2)
    return {n: p + 0.3 * torch.randn_like(p) for n, p in tensors(net).items()}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_layer_norm_and_linear(name, taken, every_size):
    """The rules give what plain operations do, and were there."""
    params = scattered(normalising())
    expected = TRANSFORMS[name](normalising(plain=True), params, X)
    assert not taken
    net = normalising()
    with vmap_safe(net):
        actual = TRANSFORMS[name](net, params, X)
    assert_same(actual, expected)
    for rule, not_there in (
        ("native_layer_norm", WRITTEN_OUT),
        ("native_layer_norm_backward", {*WRITTEN_OUT, "vmap(jacrev)"}),
    ):
        assert (f"{rule}, batches merged" in taken) == (name not in not_there)
    assert ("addmm, batches merged" in taken) == (name not in NO_ADDMM)


# Layer norm, where derivatives of derivatives may be taken, or forward mode.
WRITTEN_OUT = {
    *("grad(vmap(grad))", "autograd(vmap(grad))", "jvp(vmap(grad))"),
    *("vmap(hvp), forward over reverse", "vmap(hvp), reverse over reverse"),
    *("jacrev(vmap(grad))", "vmap(jacfwd)", "vmap(hessian)"),
}
NO_ADDMM = {"vmap(jacfwd)", "vmap(hessian)"}
# torch has no derivative of the backward of its fused attention.
FIRST_ORDER = {
    *("vmap(grad)", "chunk_size", "in_dims", "channels_last", "vmap(jacrev)"),
    *("ensemble", "nested vmap"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_attention(name, taken, every_size):
    """The same holds for attention; what torch refuses raises the same error."""
    net = attending()
    params = scattered(net)
    if name in FIRST_ORDER:
        expected = TRANSFORMS[name](attending(plain=True), params, X)
        with vmap_safe(net):
            actual = TRANSFORMS[name](net, params, X)
        assert_same(actual, expected)
        assert taken >= ATTENTION
        return
    words = []
    for fast in (False, True):
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            with vmap_safe(net, fast=fast):
                TRANSFORMS[name](net, params, X)
        words.append((caught.type, str(caught.value)))
    assert words[0] == words[1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, (16, 16), (2, 1, 16, 16), (3, 1, 2, 16, 16)])
def test_attention_with_a_mask(mask, causal, taken):
    """A mask of all slices, or one each; booleans as well as numbers."""
    q, k, v = torch.randn(3, 3, 2, 2, 16, 4, dtype=torch.float64)
    masks = [None]
    if mask is not None:
        masks = [torch.randn(mask, dtype=torch.float64), torch.randn(mask) > -1]
    for given in masks if mask is None or not causal else []:

        def loss(q, k, v, given):
            y = F.scaled_dot_product_attention(q, k, v, given, is_causal=causal)
            return y.square().sum()

        def plain(q, k, v, given):
            weights = q @ k.mT / 2
            if causal:
                given = torch.ones(16, 16, dtype=torch.bool).tril()
            if given is not None and given.dtype == torch.bool:
                given = torch.zeros(given.shape).masked_fill(~given, float("-inf"))
            if given is not None:
                weights = weights + given
            return (weights.softmax(-1) @ v).square().sum()

        in_dims = (0, 0, 0, 0 if mask and len(mask) == 5 else None)
        expected = vmap(grad(plain, (0, 1, 2)), in_dims)(q, k, v, given)
        with vmap_safe(nn.ReLU()):
            actual = vmap(grad(loss, (0, 1, 2)), in_dims)(q, k, v, given)
        assert_same(actual, expected)
        assert taken == ATTENTION
        taken.clear()


# -- Embedding: parameters alone have derivatives -------------------------------------


class Words(nn.Module):
    """Ten words, some twice in a sample; word 1 pads."""

    def __init__(self, plain=False):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(7, 4, padding_idx=1, dtype=torch.float64)
        self.head = nn.Linear(4, 2, dtype=torch.float64)
        self.plain = plain

    def forward(self, words):
        if self.plain:
            weight = self.embedding.weight
            known = torch.arange(7) == 1
            weight = torch.where(known.unsqueeze(1), weight.detach(), weight)
            x = (words.unsqueeze(-1) == torch.arange(7)).to(weight) @ weight
        else:
            x = self.embedding(words)
        return self.head(x.tanh())


WORDS = torch.randint(7, (3, 2, 5), generator=torch.Generator().manual_seed(0))


def word_rows(net, params, words, **options):
    return vmap(grad(loss_of(net)), (None, 0), **options)(params, words)


def squared_rows(net, params, words):
    return sum(row.square().sum() for row in word_rows(net, params, words).values())


def tangent(params):
    """torch's padding word has no gradient, but a tangent if one is given."""
    found = like(params)
    found["embedding.weight"][1] = 0
    return found


OF_WORDS = {
    "vmap(grad)": word_rows,
    "chunk_size": lambda net, p, x: word_rows(net, p, x, chunk_size=2),
    "in_dims": lambda net, p, x: vmap(grad(loss_of(net)), (None, 2))(
        p, x.movedim(0, 2)
    ),
    "grad(vmap(grad))": lambda net, p, x: grad(lambda p: squared_rows(net, p, x))(p),
    "jvp(vmap(grad))": lambda net, p, x: jvp(
        lambda p: word_rows(net, p, x), (p,), (tangent(p),)
    ),
    "vmap(hvp)": lambda net, p, x: vmap(
        lambda x, t: jvp(lambda p: grad(loss_of(net))(p, x), (p,), (t,))[1], (0, None)
    )(x, tangent(p)),
    "ensemble": lambda net, p, x: vmap(vmap(grad(loss_of(net)), (None, 0)), (0, None))(
        {n: torch.stack([t, -t]) for n, t in p.items()}, x
    ),
    "nested vmap": lambda net, p, x: vmap(
        vmap(grad(loss_of(net)), (None, 0)), (None, 1)
    )(p, torch.stack([x, x.flip(0)], 1)),
}
# Written in place: not where something watches what is computed from the gradient.
WATCHED = {"grad(vmap(grad))", "jvp(vmap(grad))", "ensemble", "vmap(hvp)"}


@pytest.mark.parametrize("name", OF_WORDS)
def test_embedding(name, taken, every_size):
    """Equal to a product with one-hot rows; a padding word has no gradient."""
    expected = OF_WORDS[name](Words(plain=True), tensors(Words()), WORDS)
    net = Words()
    with vmap_safe(net):
        actual = OF_WORDS[name](net, tensors(net), WORDS)
    assert_same(actual, expected)
    assert (taken >= EMBEDDING) == (name not in WATCHED)


def test_embedding_by_frequency_is_left_to_torch(taken, every_size):
    net = nn.Embedding(7, 4, scale_grad_by_freq=True)
    expected = word_rows(net, tensors(net), WORDS)
    with vmap_safe(net):
        assert_same(word_rows(net, tensors(net), WORDS), expected)
    assert not taken


# -- torch's own ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grad(vmap(grad))", "jvp(vmap(grad))"])
def test_torchs_own_layer_norm_is_wrong_there(name):
    """Derivatives of rows of layer norm's weight; the day this fails, the part of the
    rule that takes calls of every size can go."""
    params = scattered(normalising())
    expected = TRANSFORMS[name](normalising(plain=True), params, X)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(TRANSFORMS[name](normalising(), params, X), expected)


@pytest.mark.parametrize("name", ["grad(vmap(grad))", "jvp(vmap(grad))"])
def test_layer_norm_is_right_at_every_size(name, monkeypatch):
    """However small, and in no block of this thread."""
    params = scattered(normalising())
    expected = TRANSFORMS[name](normalising(plain=True), params, X)
    with only(BACKWARD):
        assert_same(TRANSFORMS[name](normalising(), params, X), expected)


def test_small_calls_are_left_alone(taken):
    """With the regimes as they are; attention is a loop in torch at every size."""
    for net in (normalising(), attending()):
        with vmap_safe(net):
            rows(net, tensors(net), X)
    net = Words()
    with vmap_safe(net):
        word_rows(net, tensors(net), WORDS)
    assert taken == ATTENTION


def test_regimes_of_a_gpu(taken, monkeypatch):
    """Calls of every size are merged, and never by a kernel a slice."""
    take_regimes_of_a_gpu(monkeypatch)
    net = normalising()
    with vmap_safe(net, fast=False):
        expected = rows(net, tensors(net), X)
    by_kernel = []
    monkeypatch.setattr(layer_norm, "_rows_by_kernel", by_kernel.append)
    with vmap_safe(net):
        assert_same(rows(net, tensors(net), X), expected)
    assert taken == LAYER_NORM | LINEAR and not by_kernel


def test_fast_false(taken, every_size):
    for net in (normalising(), attending()):
        with vmap_safe(net, fast=False):
            rows(net, tensors(net), X)
    assert not taken


def test_layer_norm_without_weights_or_in_two_dtypes(taken, every_size):
    """Where torch's own is one kernel already, or its dtypes are not ours."""
    net = nn.LayerNorm(4, elementwise_affine=False).double()
    with vmap_safe(net):
        vmap(grad(lambda x: net(x).pow(3).sum()))(X)
    for bias in (True, False):
        net = nn.LayerNorm(4, bias=bias)  # float32; torch's own backward raises then
        expected = vmap(net)(X.bfloat16())
        with vmap_safe(net):
            assert_same(vmap(net)(X.bfloat16()), expected)
    weight, bias = torch.ones(4, dtype=torch.float64), torch.zeros(4)
    with vmap_safe(net), pytest.raises(RuntimeError, match="scalar type"):
        vmap(lambda x: F.layer_norm(x, (4,), weight, bias))(X)
    assert not taken


@pytest.mark.parametrize("own", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_layer_norm_of_members_that_share_a_part(own, axes, again, every_size):
    """Members of an ensemble may have a bias each and one weight, or the other way."""
    x = torch.randn(3, 2, 5, 4).double()
    shape = x.shape[-axes:]
    params = {
        name: torch.randn(*([3] if name in own else []), *shape).double() + 2
        for name in ("weight", "bias")
    }

    def loss(params, x):
        y = F.layer_norm(x, shape, params["weight"], params["bias"])
        return y.sin().square().sum()

    def written(params, x):
        dims = list(range(-axes, 0))
        centred = x - x.mean(dims, keepdim=True)
        y = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        return (y * params["weight"] + params["bias"]).sin().square().sum()

    def by_loop(x):
        rows = [
            grad(written, (0, 1))(
                {n: p[i] if n in own else p for n, p in params.items()}, x[i]
            )
            for i in range(3)
        ]
        weights, biases = ([row[0][n] for row in rows] for n in ("weight", "bias"))
        parts = weights, biases, [row[1] for row in rows]
        return tuple([torch.stack(part) for part in parts])

    def by_vmap(x):
        in_dims = ({name: 0 if name in own else None for name in params}, 0)
        rows, of_input = vmap(grad(loss, (0, 1)), in_dims)(params, x)
        return rows["weight"], rows["bias"], of_input

    def energy(function):
        return grad(lambda x: sum([p.square().sum() for p in function(x)]))

    with vmap_safe(nn.ReLU()):
        actual = energy(by_vmap)(x) if again else by_vmap(x)
    assert_same(actual, energy(by_loop)(x) if again else by_loop(x))


@pytest.mark.parametrize("own", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("kind", ["layer norm", "batch norm"])
def test_members_that_plain_autograd_derives(own, kind):
    """Autograd around the vmap, with a part of the parameters for each member."""
    x = torch.randn(3, 2, 5, 4).double().requires_grad_()
    size = 4 if kind == "layer norm" else 5
    dims = [2] if kind == "layer norm" else [0, 2]  # of a slice
    params = {
        name: torch.randn(*([3] if name in own else []), size).double() + 2
        for name in ("weight", "bias")
    }
    leaves = [x, *[p.requires_grad_() for p in params.values()]]
    shape = (4,) if kind == "layer norm" else (5, 1)

    def function(p, x):
        if kind == "layer norm":
            return F.layer_norm(x, (4,), p["weight"], p["bias"])
        return F.batch_norm(x, None, None, p["weight"], p["bias"], True)

    def written(i):
        weight, bias = (p[i] if n in own else p for n, p in params.items())
        centred = x[i] - x[i].mean(dims, keepdim=True)
        y = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        return y * weight.reshape(shape) + bias.reshape(shape)

    def gradients(y):
        found = torch.autograd.grad(y.sin().square().sum(), leaves, create_graph=True)
        energy = sum([part.square().sum() for part in found])
        return found, torch.autograd.grad(energy, leaves)

    in_dims = ({name: 0 if name in own else None for name in params}, 0)
    with vmap_safe(nn.ReLU()):
        actual = gradients(vmap(function, in_dims)(params, x))
    assert_same(actual, gradients(torch.stack([written(i) for i in range(3)])))


def test_a_bias_for_each_row_is_left_to_torch(taken, every_size):
    """addmm adds matrices too, which do not fit the merged batch."""
    x, w, b = torch.randn(3, 2, 4), torch.randn(4, 5), torch.randn(2, 5)
    with vmap_safe(nn.ReLU()):
        actual = vmap(lambda x: torch.addmm(b, x, w))(x)
    assert_same(actual, x @ w + b, rtol=1e-5, atol=1e-5)
    assert not taken


# -- Dtypes, compiling, empty batches, memory -----------------------------------------


@pytest.mark.parametrize(
    "make, dtype",
    [
        (normalising, torch.float32),
        (normalising, torch.bfloat16),
        (attending, torch.float32),
        (attending, torch.bfloat16),
        (attending, "autocast"),  # torch's own layer norm raises behind a convolution
    ],
)
def test_dtypes(make, dtype, taken, every_size):
    """Values and dtypes are those without the rules."""
    net = make()
    autocast = dtype == "autocast"
    dtype = torch.float32 if autocast else dtype
    params = {n: p.to(dtype) for n, p in scattered(net).items()}
    found = []
    for fast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with vmap_safe(net, fast=fast):
                found.append(rows(net, params, X.to(dtype)))
    assert taken
    tolerance = 1e-4 if dtype == torch.float32 and not autocast else 0.1
    for one, other in zip(*(torch.utils._pytree.tree_leaves(f) for f in found)):
        assert one.dtype == other.dtype
        largest = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("make", [normalising, attending])
def test_compiled(make, taken, every_size):
    """A compiled function in an open block gets the rules' graph."""
    torch._dynamo.reset()
    net = make()
    params = scattered(net)
    expected = rows(make(plain=True), params, X)
    with vmap_safe(net):
        compiled = torch.compile(
            lambda p, x: rows(net, p, x), fullgraph=True, backend="aot_eager"
        )
        actual = compiled(params, X)
    assert_same(actual, expected)
    assert taken


@pytest.mark.parametrize("make", [normalising, attending])
def test_per_sample_grads(make, every_size):
    """Rows of parameters that require gradients, and an empty batch of samples."""
    net = make()
    x, y = X[0], torch.randn(2, 1, dtype=torch.float64)

    def loss(out, y):
        return (out.mean((-1,)) - y).square().sum()

    expected = per_sample_grads(net, loss, x, y, fast=False)
    assert_same(per_sample_grads(net, loss, x, y), expected)
    empty = per_sample_grads(net, loss, x[:0], y[:0])
    assert {n: r.shape for n, r in empty.items()} == {
        n: (0, *p.shape) for n, p in net.named_parameters()
    }


def test_slices_without_samples(every_size):
    """A slice of none has no gradient."""
    for net in (normalising(), attending()):
        with vmap_safe(net):
            found, _ = rows(net, tensors(net), X[:, :0])
        for name, p in net.named_parameters():
            assert_same(found[name], torch.zeros(3, *p.shape, dtype=p.dtype))


def test_memory():
    """Large results are ordinary tensors: zeros that can be written, saved, copied."""
    like = torch.empty(0, dtype=torch.float64)
    shape = (3, memory.LARGE // 16)
    large = memory.zeros(shape, like)
    pages = large.nbytes // mmap.PAGESIZE
    assert memory.pays(shape, like, 1)
    assert memory.pays((pages, mmap.PAGESIZE // 8), like, pages // 4)  # two pages each
    assert not memory.pays((pages, mmap.PAGESIZE // 8), like, pages // 4 + 1)
    assert large.shape == shape and large.dtype == like.dtype
    assert large.is_contiguous() and not large.any()
    large[1, 2] = 3
    del shape
    view = large[1]
    del large  # the memory lives as long as a view of it
    assert view[2] == 3 and view.sum() == 3
    assert view.clone().sum() == 3
    assert not memory.pays((2, 3), like, 1)
    assert not memory.zeros((2, 3), like).any()


def test_memory_elsewhere(monkeypatch):
    """Systems that have no such mappings give ordinary memory."""
    monkeypatch.delattr(memory.mmap, "MAP_ANONYMOUS")
    like = torch.empty(0)
    assert not memory.pays((2**24,), like, 1)
    assert not memory.zeros((2**24,), like).any()
