"""Mode "sync": slice by slice what the plain layer computes for the whole batch."""

import copy
import itertools

import pytest
import slow
import torch
import torch.nn.functional as F
from cases import CASES
from state import assert_same_state, everything
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)

from vmapsafe import per_sample_grads, vmap_safe
from vmapsafe.testing import assert_same


def plain_step(model, x):
    """A copy in training mode after one call on the merged batch, and its output."""
    model = copy.deepcopy(model)
    return model, model(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def assert_same_buffers(model, other):
    for (name, a), b in zip(model.named_buffers(), other.buffers()):
        assert torch.equal(a, b), name


# -- Forward and running statistics ----------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
def test_forward_is_the_plain_layers(case, device, n):
    """vmap(model)(x) is model(x) on the whole batch; nothing is written."""
    model, x = case.model(device), case.slices(4, n, device=device)
    before = everything(model)
    with vmap_safe(model, mode="sync"):
        out = vmap(model)(x)
    assert_same_state(model, before)
    assert_same(out, plain_step(model, x)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "layer,shape",
    [
        (nn.BatchNorm1d, (4,)),
        (nn.BatchNorm1d, (4, 3)),
        (nn.BatchNorm2d, (4, 3, 2)),
        (nn.BatchNorm3d, (4, 2, 2, 2)),
        (nn.SyncBatchNorm, (4, 3, 2)),
    ],
)
def test_bit_equal(layer, shape, affine, momentum, dtype):
    """If the same kernel runs, outputs and running statistics are bit-identical."""
    model = layer(4, affine=affine, momentum=momentum).to(dtype)
    model.num_batches_tracked.fill_(2)
    x = (3 + 2 * torch.randn(5, 2, *shape)).to(dtype)
    plain, expected = plain_step(model, x)
    with vmap_safe(model, mode="sync", update_running_stats=True):
        out = vmap(model)(x)
    assert torch.equal(out, expected)
    assert_same_buffers(model, plain)


def scalar_of(model, t):
    def f(params, x):
        out = vmap(lambda x: functional_call(model, params, (x,)))(x)
        return (out.tanh() * t).sum()

    return f


TRANSFORMS = {
    "vmap": lambda f, p, x: f(p, x),
    "grad of vmap": lambda f, p, x: grad(f)(p, x),
    "jvp": lambda f, p, x: jvp(lambda x: f(p, x), (x,), (x,)),
    "jacrev": lambda f, p, x: jacrev(f)(p, x),
    "jacfwd": lambda f, p, x: jacfwd(f, argnums=1)(p, x),
    "hessian": lambda f, p, x: hessian(lambda b: f({**p, "norm.bias": b}, x))(
        p["norm.bias"]
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_under_every_transform(transform, momentum):
    """One call is one training step, whatever is derived around it."""
    model = nn.Sequential()
    model.add_module("norm", nn.BatchNorm1d(3, momentum=momentum).double())
    x, t = torch.randn(4, 2, 3).double(), torch.randn(4, 2, 3).double()
    plain, _ = plain_step(model, x)
    params = dict(model.named_parameters())
    with vmap_safe(model, mode="sync", update_running_stats=True):
        TRANSFORMS[transform](scalar_of(model, t), params, x)
    assert_same_buffers(model, plain)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_running_statistics_of_rows_and_of_chunks(case, chunk_size):
    """vmap(grad) is one step; with chunks, each chunk is a batch and a step."""
    model, x = case.model(), case.slices(4, 2)
    plain = copy.deepcopy(model)
    for chunk in x.split(chunk_size or 4):
        plain(chunk.flatten(0, 1))
    params = dict(model.named_parameters())

    def loss(params, x):
        return functional_call(model, params, (x,)).sum()

    with vmap_safe(model, mode="sync", update_running_stats=True):
        vmap(grad(loss, argnums=1), (None, 0), chunk_size=chunk_size)(params, x)
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


def test_nested_vmap_merges_both_axes():
    """Batches of batches are one batch, and one step."""
    model = nn.BatchNorm1d(3)
    x = torch.randn(2, 4, 5, 3)
    plain = copy.deepcopy(model)
    expected = plain(x.flatten(0, 2)).view_as(x)
    with vmap_safe(model, mode="sync", update_running_stats=True):
        out = vmap(vmap(model))(x)
    assert_same(out, expected, atol=1e-6)
    assert_same(model.running_var, plain.running_var, rtol=1e-6)
    assert model.num_batches_tracked == 1


def test_functional_call_writes_to_the_buffers_it_is_given():
    """It updates them as it would without vmap, and not those of the model."""
    model = nn.BatchNorm1d(3)
    before = everything(model)
    given = {name: b.clone() for name, b in model.named_buffers()}
    x = torch.randn(4, 2, 3)
    with vmap_safe(model, mode="sync", update_running_stats=True):
        vmap(lambda x: functional_call(model, given, (x,)))(x)
    assert_same_state(model, before)
    plain, _ = plain_step(model, x)
    assert_same(given, dict(plain.named_buffers()))


def test_in_the_block_but_not_in_a_vmap():
    """A plain call is a plain training-mode call, and steps if asked to."""
    model = nn.BatchNorm1d(3)
    plain = copy.deepcopy(model)
    x = torch.randn(8, 3)
    with vmap_safe(model, mode="sync"):
        assert torch.equal(model(x), plain(x))
    assert model.num_batches_tracked == 0
    with vmap_safe(model, mode="sync", update_running_stats=True):
        model(x)
    assert_same_buffers(model, plain)


class Keeps(nn.Module):
    """Keeps what it computes in an attribute or in a buffer."""

    def __init__(self, where):
        super().__init__()
        self.where, self.mix, self.norm = where, nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.register_buffer("mu", torch.zeros(4))

    def forward(self, x):
        y = self.mix(x)
        if self.where == "attribute":
            self.features = y
        elif self.where == "buffer":
            self.mu = self.mu * 0.9 + 0.1 * y.mean(0).detach()
        out = self.norm(y)
        if self.where == "attribute, afterwards":
            self.features = out
        return out


@pytest.mark.filterwarnings("ignore::vmapsafe.LeftOutWarning")
@pytest.mark.parametrize("where", ["attribute", "attribute, afterwards", "buffer"])
def test_what_a_forward_keeps_is_not_a_parameter(where):
    """It is batched as the input is, and does not keep slices apart."""
    model = Keeps(where).double()
    x = torch.randn(4, 2, 3).double()
    plain = copy.deepcopy(model)
    expected = plain.norm(plain.mix(x.flatten(0, 1))).view(4, 2, 4)
    for _ in range(2):
        with vmap_safe(model, mode="sync"):
            assert_same(vmap(model)(x), expected)
            assert_same(vmap(model)(x), expected)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(3)), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x * self.scale)


def test_members_by_plain_attributes_of_any_name():
    """A parameter that a function replaces by a tensor inside is still one."""
    model, x = Scaled().double(), torch.randn(3, 8, 3).double()
    scales = torch.tensor([1.0, 3.0, 9.0]).double()[:, None] + torch.rand(3, 3)
    plain = copy.deepcopy(model.norm)
    expected = torch.stack([plain(one * s) for one, s in zip(x, scales)])

    def member(scale, x):
        if "scale" in model._parameters:
            del model.scale
        model.scale = scale
        return model(x)

    with vmap_safe(model, mode="sync"):
        assert_same(vmap(member)(scales, x), expected)


def test_a_hook_that_keeps_activations():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    x = torch.randn(4, 2, 3).double()
    expected = copy.deepcopy(model)(x.flatten(0, 1)).view(4, 2, 4)
    for layer in model:
        layer.register_forward_hook(lambda m, _, out: setattr(m, "activation", out))
    with vmap_safe(model, mode="sync"):
        for _ in range(2):
            assert_same(vmap(model)(x), expected)


def test_layers_that_share_a_weight():
    """The one without running statistics is not taken for the one that has them."""
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    second.weight, second.bias = first.weight, first.bias
    model = nn.Sequential(first, nn.Tanh(), second).double()
    plain, x = copy.deepcopy(model), torch.randn(4, 2, 3).double()
    with vmap_safe(model, mode="sync", update_running_stats=True):
        out = vmap(model)(x)
    assert_same(out.flatten(0, 1), plain(x.flatten(0, 1)))
    assert_same_buffers(model, plain)


def test_input_that_is_not_batched():
    """Only the labels are batched, so there is nothing to merge."""
    model = nn.BatchNorm1d(3).double()
    x, y = torch.randn(8, 3).double(), torch.randn(4, 8, 3).double()
    with vmap_safe(model, mode="sync"):
        out = vmap(lambda y: model(x) * y)(y)
    assert_same(out, copy.deepcopy(model)(x) * y)


# -- Derivatives -----------------------------------------------------------------------


def small():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)
    ).double()


def plain_norm(x, layer):
    """Batch norm over all but the last dimension, written out."""
    dims = list(range(x.dim() - 1))
    centred = x - x.mean(dims)
    y = centred / (centred.square().mean(dims) + layer.eps).sqrt()
    return y * layer.weight + layer.bias


class Written(nn.Module):
    """small(), on the whole batch, with batch norm written out."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x = plain_norm(self.net[0](x), self.net[1])
        return self.net[3](torch.tanh(x))


X, T = torch.randn(4, 2, 2).double(), torch.randn(4, 2, 2).double()

OUTSIDE = {
    "grad": lambda f, x: grad(f)(x),
    "grad of grad": lambda f, x: grad(lambda x: grad(f)(x).square().sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (T,))[1],
    "hvp, forward over reverse": lambda f, x: jvp(grad(f), (x,), (T,))[1],
    "hvp, reverse over forward": lambda f, x: grad(lambda x: jvp(f, (x,), (T,))[1])(x),
    "jvp of jvp": lambda f, x: jvp(lambda x: jvp(f, (x,), (T,))[1], (x,), (T,))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(f))(x),
    "hessian": lambda f, x: hessian(f)(x),
    "third": lambda f, x: (
        jacrev(hessian(f))(x[:1, :, :])
        if False
        else grad(lambda x: jvp(grad(f), (x,), (T,))[1].square().sum())(x)
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_transforms_outside_the_vmap(name):
    """They equal those of the plain layer on the merged batch."""
    net = small()
    derive = OUTSIDE[name]

    def vmapped(x):
        return (vmap(net)(x).sin() * T).sum()

    def whole(x):
        return (Written(net)(x).sin() * T).sum()

    with vmap_safe(net, mode="sync"):
        actual = derive(vmapped, X)
    assert_same(actual, derive(whole, X))


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_by_parameters(name):
    net = small()
    written = Written(net)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def vmapped(params):
        return (vmap(lambda x: functional_call(net, params, (x,)))(X) * T).sum()

    def whole(params):
        named = {"net." + name: p for name, p in params.items()}
        return (functional_call(written, named, (X,)) * T).sum()

    transform = {"jacrev": jacrev, "jacfwd": jacfwd, "hessian": hessian}[name]
    with vmap_safe(net, mode="sync"):
        actual = transform(vmapped)(params)
    assert_same(actual, transform(whole)(params))


def test_plain_autograd_around_it():
    """backward and double backward, after the block too."""
    net = small()
    x, x2 = X.clone().requires_grad_(), X.clone().requires_grad_()
    with vmap_safe(net, mode="sync"):
        out = (vmap(net)(x).sin() * T).sum()
    out2 = (Written(net)(x2).sin() * T).sum()
    inputs, inputs2 = [x, *net.parameters()], [x2, *net.parameters()]
    g = torch.autograd.grad(out, inputs, create_graph=True)
    g2 = torch.autograd.grad(out2, inputs2, create_graph=True)
    assert_same(g, g2)
    twice = torch.autograd.grad(sum(v.square().sum() for v in g), inputs)
    twice2 = torch.autograd.grad(sum(v.square().sum() for v in g2), inputs2)
    assert_same(twice, twice2)


def test_jacobians_inside():
    """Reverse mode: sum over j of d out_j / d x_i; forward: of d out_i / d x_j."""
    net = small()

    def total(x):  # one number a slice
        return (net(x).sin() * T[0]).sum()

    def whole(x):
        return (Written(net)(x).sin() * T[0]).sum((1, 2))

    full = jacfwd(whole)(X)  # (out i, in j, ...)
    with vmap_safe(net, mode="sync"):
        reverse = vmap(jacrev(total))(X)
        forward = vmap(jacfwd(total))(X)
        tangent = vmap(lambda x, t: jvp(total, (x,), (t,))[1])(X, T)
    assert_same(reverse, full.sum(0))
    assert_same(forward, full.sum(1))
    assert_same(tangent, (full * T).sum((1, 2, 3)))


def test_derivatives_of_rows():
    """Rows can be differentiated again, outside the vmap."""
    net = small()

    def row_energy(x):
        return vmap(grad(lambda x: net(x).sin().sum()))(x).square().sum()

    def plain_energy(x):
        return grad(lambda x: Written(net)(x).sin().sum())(x).square().sum()

    with vmap_safe(net, mode="sync"):
        actual = grad(row_energy)(X)
    assert_same(actual, grad(plain_energy)(X))


@pytest.mark.parametrize("around", [False, True])
def test_rows_of_slices_that_are_vmapped_again(around):
    """Between two levels that are merged a derivative is taken: row i is by the copy
    of the parameters that group i of the slices has, whichever group the loss is of."""
    net = small()
    x = torch.randn(3, 4, 5, 2).double()
    weights = torch.randn(3, 4, 5, 2).double()

    def group_loss(params, x, w):
        return (vmap(lambda x: functional_call(net, params, x))(x) * w).sin().sum()

    def rows(x):
        params = dict(net.named_parameters())
        return vmap(grad(group_loss), (None, 0, 0))(params, x, weights)

    copies = {
        name: p.detach().expand(3, *p.shape).clone().requires_grad_()
        for name, p in net.named_parameters()
    }

    def layer(h, name):
        weight = copies[f"{name}.weight"].unsqueeze(1)
        return torch.einsum(
            "bnsi,bnoi->bnso", h, weight.expand(3, 4, *weight.shape[2:])
        )

    def bias(name):
        return copies[f"{name}.bias"][:, None, None]

    def written(x):
        h = layer(x, "0") + bias("0")
        centred = h - h.mean((0, 1, 2))
        h = centred / (centred.square().mean((0, 1, 2)) + net[1].eps).sqrt()
        h = (h * copies["1.weight"][:, None, None] + bias("1")).tanh()
        out = layer(h, "3") + bias("3")
        total = (out * weights).sin().sum()
        found = torch.autograd.grad(total, list(copies.values()), create_graph=around)
        return dict(zip(copies, found))

    def energy(rows, x):
        return sum([row.square().sum() for row in rows(x).values()])

    with vmap_safe(net, mode="sync"):
        if around:
            actual = grad(lambda x: energy(rows, x))(x)
        else:
            actual = rows(x)
    if around:
        x = x.clone().requires_grad_()
        assert_same(actual, torch.autograd.grad(energy(written, x), x)[0])
    else:
        assert_same(actual, written(x))


def test_a_jacrev_around_a_call_that_is_not_vmapped():
    """A level that only a cotangent carries is never merged."""
    net = small()
    with vmap_safe(net, mode="sync"):
        actual = jacrev(net)(X[0]), jacfwd(net)(X[0])
    expected = jacrev(Written(net))(X[0])
    assert_same(actual, (expected, expected))


@pytest.mark.parametrize("transform", [hessian, lambda f: jacrev(jacrev(f))])
def test_a_hessian_inside_is_refused(transform):
    net = small()
    with vmap_safe(net, mode="sync"):
        with pytest.raises(RuntimeError) as caught:
            vmap(transform(lambda x: net(x).sum()))(X)
    text = str(caught.value)
    assert "batch_norm of '1' (BatchNorm1d)" in text and "no agreed meaning" in text


# -- Rows ------------------------------------------------------------------------------


def jacobian_rows(net, loss_fn, x, y):
    """Sample by sample, the loss of the merged batch's row derived by all of theta."""
    rows = []
    for i in range(len(x)):
        loss = loss_fn(Written(net)(x)[i : i + 1], y[i : i + 1])
        rows.append(torch.autograd.grad(loss, list(net.parameters())))
    names = [name for name, _ in net.named_parameters()]
    return {name: torch.stack(parts) for name, parts in zip(names, zip(*rows))}


def detached_rows(net, loss_fn, x, y):
    """A frozen copy that holds the batch's statistics, sample by sample."""
    frozen = copy.deepcopy(net)
    h = net[0](x).detach()
    frozen[1].running_mean = h.mean(0)
    frozen[1].running_var = h.var(0, unbiased=False)
    frozen.eval()
    return slow.rows(frozen, loss_fn, x, y)


ROWS = {
    "contribution": slow.contributions,
    "jacobian": jacobian_rows,
    "detached": detached_rows,
}
BATCH = torch.randn(6, 2).double(), torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_rows(rows, loss_fn):
    """Each kind of row equals its own slow form."""
    net = small()
    before = everything(net)
    actual = per_sample_grads(net, loss_fn, *BATCH, mode="sync", rows=rows)
    assert_same_state(net, before)
    assert_same(actual, ROWS[rows](net, loss_fn, *BATCH))


def test_which_rows_sum_to_the_training_gradient():
    """Contributions and Jacobian rows do, detached ones do not; they all differ."""
    net = small()
    x, y = BATCH
    loss = F.cross_entropy(copy.deepcopy(net).train()(x), y, reduction="sum")
    plain = copy.deepcopy(net)
    loss = F.cross_entropy(plain(x), y, reduction="sum")
    gradient = torch.autograd.grad(loss, list(plain.parameters()))
    found = {}
    for rows in ROWS:
        all_rows = per_sample_grads(net, F.cross_entropy, x, y, mode="sync", rows=rows)
        found[rows] = all_rows["0.weight"]
        sums = [row.sum(0) for row in all_rows.values()]
        if rows != "detached":
            assert_same(sums, list(gradient))
        else:
            assert not torch.allclose(sums[0], gradient[0])
    for a, b in itertools.combinations(found.values(), 2):
        assert not torch.allclose(a, b)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_with_aux_chunks_and_named_parameters(rows):
    net = small()

    def loss_fn(out, y):
        return F.cross_entropy(out, y), out

    all_rows = per_sample_grads(net, F.cross_entropy, *BATCH, mode="sync", rows=rows)
    some, aux = per_sample_grads(
        net,
        loss_fn,
        *BATCH,
        mode="sync",
        rows=rows,
        has_aux=True,
        params=["3.bias", "0.weight"],
    )
    assert_same(some, {name: all_rows[name] for name in ("3.bias", "0.weight")})
    assert_same(aux, Written(net)(BATCH[0]).detach())
    chunked = per_sample_grads(
        net, F.cross_entropy, *BATCH, mode="sync", rows=rows, chunk_size=3
    )
    parts = [
        per_sample_grads(
            net, F.cross_entropy, *(t[i : i + 3] for t in BATCH), mode="sync", rows=rows
        )
        for i in (0, 3)
    ]
    expected = {name: torch.cat([part[name] for part in parts]) for name in chunked}
    assert_same(chunked, expected)


def test_rows_update_running_statistics_once():
    for rows in ROWS:
        net = small()
        plain = copy.deepcopy(net)
        plain(BATCH[0])
        per_sample_grads(
            net,
            F.cross_entropy,
            *BATCH,
            mode="sync",
            rows=rows,
            update_running_stats=True,
        )
        assert_same(dict(net.named_buffers()), dict(plain.named_buffers()))


def test_an_empty_batch():
    """An empty batch has no rows and does not update."""
    net = small()
    before = everything(net)
    empty = [t[:0] for t in BATCH]
    for rows in ROWS:
        found = per_sample_grads(
            net,
            F.cross_entropy,
            *empty,
            mode="sync",
            rows=rows,
            update_running_stats=True,
        )
        assert_same_state(net, before)
        for name, p in net.named_parameters():
            assert found[name].shape == (0, *p.shape)


# -- Levels ----------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("update", [True, False])
def test_ensemble_in_training_mode(affine, update):
    """Members are never mixed; each updates its own statistics."""
    members = [
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3, affine=affine)).double()
        for _ in range(3)
    ]
    for i, member in enumerate(members):
        for t in [*member.parameters(), *member.buffers()]:
            t.data += i
    params, buffers = stack_module_state(members)
    base, x = members[0], torch.randn(3, 8, 3).double()
    kept = copy.deepcopy(buffers)

    def call(params, buffers, x):
        return functional_call(base, (params, buffers), (x,))

    with vmap_safe(base, mode="sync", update_running_stats=update):
        out = vmap(call)(params, buffers, x)
        shared = vmap(call, (0, 0, None))(params, copy.deepcopy(buffers), x[0])
    plain = [copy.deepcopy(member) for member in members]
    assert_same(shared, torch.stack([copy.deepcopy(m)(x[0]) for m in members]))
    assert_same(out, torch.stack([m(x_) for m, x_ in zip(plain, x)]))
    for name, buffer in buffers.items():
        stepped = torch.stack([dict(m.named_buffers())[name] for m in plain])
        assert_same(buffer, stepped if update else kept[name])


@pytest.mark.parametrize("order", ["models of samples", "samples of models"])
def test_models_and_samples(order):
    """vmap over models and over samples, either way round, is the loop over models."""
    members = [small() for _ in range(2)]
    members[1][0].weight.data += 1
    params, buffers = stack_module_state(members)
    base, x = members[0], torch.randn(4, 3, 2).double()

    def call(params, buffers, x):
        return functional_call(base, (params, buffers), (x,))

    with vmap_safe(base, mode="sync", update_running_stats=True):
        if order == "models of samples":
            inner = vmap(call, (None, None, 0))
            out = vmap(inner, (0, 0, None))(params, buffers, x)
        else:
            inner = vmap(call, (0, 0, None))
            out = vmap(inner, (None, None, 0), out_dims=1)(params, buffers, x)
    plain = [copy.deepcopy(member) for member in members]
    expected = [m(x.flatten(0, 1)).unflatten(0, (4, 3)) for m in plain]
    assert_same(out, torch.stack(expected))
    for name, buffer in buffers.items():
        assert_same(buffer, torch.stack([dict(m.named_buffers())[name] for m in plain]))


def maml(net, params, tasks, inner_lr=0.1, inner=None):
    """Meta-gradient over tasks of (support, query), one inner step."""

    def energy(params, x):
        out = inner(params, x) if inner else functional_call(net, params, (x,))
        return out.sin().square().mean()

    def of_task(params, support, query):
        step = grad(energy)(params, support)
        adapted = {k: p - inner_lr * step[k] for k, p in params.items()}
        return energy(adapted, query)

    return lambda params: vmap(of_task, (None, 0, 0))(params, *tasks).sum()


def maml_by_loop(net, params, tasks, inner_lr=0.1):
    total = 0
    params = {"net." + k: p.detach().requires_grad_() for k, p in params.items()}
    for support, query in zip(*tasks):
        written = Written(net)
        loss = functional_call(written, params, (support,)).sin().square().mean()
        step = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        adapted = {k: p - inner_lr * g for (k, p), g in zip(params.items(), step)}
        total = (
            total + functional_call(written, adapted, (query,)).sin().square().mean()
        )
    grads = torch.autograd.grad(total, list(params.values()))
    return {k.removeprefix("net."): g for k, g in zip(params, grads)}


TASKS = torch.randn(3, 5, 2).double(), torch.randn(3, 5, 2).double()


def test_maml_with_the_statistics_of_each_task():
    """ "no_running_stats": each task is a slice."""
    net = small()
    params = {k: p.detach() for k, p in net.named_parameters()}
    with vmap_safe(net, mode="no_running_stats"):
        actual = grad(maml(net, params, TASKS))(params)
    assert_same(actual, maml_by_loop(net, params, TASKS))


def test_maml_with_sync_around_vmapped_samples():
    """ "sync" with sync_levels=1 merges the samples of a task and no tasks."""
    net = small()
    params = {k: p.detach() for k, p in net.named_parameters()}

    def inner(params, x):
        return vmap(lambda x: functional_call(net, params, (x[None],))[0])(x)

    with vmap_safe(net, mode="sync", sync_levels=1):
        actual = grad(maml(net, params, TASKS, inner=inner))(params)
    assert_same(actual, maml_by_loop(net, params, TASKS))


def test_without_sync_levels_tasks_that_share_weights_are_one_batch():
    """The first forward of MAML, as documented."""
    net = nn.BatchNorm1d(2).double()
    x = TASKS[0]
    with vmap_safe(net, mode="sync"):
        both = vmap(vmap(lambda x: net(x[None])[0]))(x)
    with vmap_safe(net, mode="sync", sync_levels=1):
        inner = vmap(vmap(lambda x: net(x[None])[0]))(x)
    plain = copy.deepcopy(net)
    assert_same(both, plain(x.flatten(0, 1)).view_as(x))
    assert_same(inner, torch.stack([plain(task) for task in x]))


def test_shared_buffers_of_members_that_are_not_merged():
    net = nn.BatchNorm1d(2).double()
    before = everything(net)
    with vmap_safe(net, mode="sync", sync_levels=1, update_running_stats=True):
        with pytest.raises(ValueError, match="slices that are not merged share its"):
            vmap(vmap(lambda x: net(x[None])[0]))(TASKS[0])
    assert_same_state(net, before)


# -- Instance norm ---------------------------------------------------------------------

INSTANCE_NORMS = [
    (nn.InstanceNorm1d, (4, 3)),
    (nn.InstanceNorm2d, (4, 3, 2)),
    (nn.InstanceNorm3d, (4, 2, 2, 2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layer,shape", INSTANCE_NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_statistics_are_bit_identical(
    layer, shape, affine, momentum, dtype, training
):
    """One training step on the merged batch; a model in eval mode is put in training,
    as for batch norm. torch's own momentum None updates nothing, and nothing counts."""
    model = layer(4, affine=affine, momentum=momentum, track_running_stats=True)
    model.to(dtype)
    x = (3 + 2 * torch.randn(5, 2, *shape)).to(dtype)
    plain, expected = plain_step(model, x)
    moved = not torch.equal(plain.running_mean, model.running_mean)
    assert moved == (momentum is not None)
    model.train(training)
    before = everything(model)
    with vmap_safe(model, mode="sync"):
        out = vmap(model)(x)
    assert_same_state(model, before)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    assert_same(out, expected, rtol=tolerance, atol=tolerance)
    with vmap_safe(model, mode="sync", update_running_stats=True):
        assert torch.equal(vmap(model)(x), out)
    assert_same_buffers(model, plain)
    assert model.training == training


INSTANCE_TRANSFORMS = {
    "vmap(grad)": lambda f, x: vmap(grad(f))(x),
    "grad(vmap)": lambda f, x: grad(lambda x: vmap(f)(x).sum())(x),
    "vmap(jvp)": lambda f, x: vmap(lambda x: jvp(f, (x,), (x,))[1])(x),
    "jvp(vmap)": lambda f, x: jvp(vmap(f), (x,), (x,))[1],
    "vmap(vmap)": lambda f, x: vmap(vmap(f))(x.unflatten(0, (2, 2))).flatten(0, 1),
    "vmap(vmap(grad))": lambda f, x: vmap(vmap(grad(f)))(
        x.unflatten(0, (2, 2))
    ).flatten(0, 1),
    "grad(grad(vmap))": lambda f, x: grad(
        lambda x: grad(lambda x: vmap(f)(x).sum())(x).square().sum()
    )(x),
    "jacrev(vmap)": lambda f, x: jacrev(vmap(f))(x),
}


@pytest.mark.parametrize("transform", INSTANCE_TRANSFORMS)
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_under_transforms(transform, affine):
    """Values are those of the formula; the running statistics step once."""
    model = nn.InstanceNorm1d(3, affine=affine, track_running_stats=True).double()
    for p in model.parameters():
        p.data = torch.randn(3).double()
    x = torch.randn(4, 2, 3, 5).double()
    plain, _ = plain_step(model, x)

    def energy(norm):
        return lambda x: (norm(x).sin().sum((1, 2)) ** 2).sum()

    derive = INSTANCE_TRANSFORMS[transform]
    with vmap_safe(model, mode="sync", update_running_stats=True):
        actual = derive(energy(model), x)
    assert_same(actual, derive(energy(ByFormulaOfSamples(model)), x))
    assert_same_buffers(model, plain)


class ByFormulaOfSamples(nn.Module):
    """Instance norm in plain operations, (N, C, L)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        centred = x - x.mean(2, keepdim=True)
        var = centred.square().mean(2, keepdim=True)
        y = centred / (var + self.layer.eps).sqrt()
        if self.layer.affine:
            y = y * self.layer.weight[:, None] + self.layer.bias[:, None]
        return y


@pytest.mark.parametrize("rows", ROWS)
def test_rows_through_instance_norm(rows):
    """Samples are independent: every kind of row is one plain backward a sample."""
    (case,) = [case for case in CASES if case.name == "instance norm 3d"]
    model, x = case.model(), case.slices(4, 1)[:, 0]
    y = torch.randn_like(copy.deepcopy(model)(x))
    plain = copy.deepcopy(model)
    plain(x)
    slow = []
    for i in range(len(x)):
        one = copy.deepcopy(model)
        loss = F.mse_loss(one(x[i : i + 1]), y[i : i + 1])
        slow.append(torch.autograd.grad(loss, list(one.parameters())))
    actual = per_sample_grads(
        model, F.mse_loss, x, y, mode="sync", rows=rows, update_running_stats=True
    )
    assert_same(list(actual.values()), [torch.stack(parts) for parts in zip(*slow)])
    assert_same_buffers(model, plain)


@pytest.mark.parametrize("update", [True, False])
def test_ensemble_with_instance_norm(update):
    """Each member updates its own statistics, with its own samples."""
    members = [
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True).double()
        for _ in range(3)
    ]
    for i, member in enumerate(members):
        for t in [*member.parameters(), *member.buffers()]:
            t.data += i
    params, buffers = stack_module_state(members)
    base, x = members[0], torch.randn(4, 2, 3, 5).double()
    kept = copy.deepcopy(buffers)

    def call(params, buffers, x):
        return functional_call(base, (params, buffers), (x,))

    with vmap_safe(base, mode="sync", update_running_stats=update):
        samples = vmap(call, (None, None, 0))
        out = vmap(samples, (0, 0, None))(params, buffers, x)
    plain = [plain_step(member, x) for member in members]
    assert_same(out, torch.stack([out for _, out in plain]))
    for name, buffer in buffers.items():
        stepped = torch.stack([dict(m.named_buffers())[name] for m, _ in plain])
        assert_same(buffer, stepped if update else kept[name])


def test_one_value_of_an_instance():
    """Nothing is written before the error."""
    model = nn.InstanceNorm1d(3, track_running_stats=True)
    before = everything(model)
    with vmap_safe(model, mode="sync", update_running_stats=True):
        with pytest.raises(ValueError, match="has one value for each channel"):
            vmap(model)(torch.randn(4, 2, 3, 1))
    assert_same_state(model, before)


# -- Errors ----------------------------------------------------------------------------


def test_one_value_in_total():
    net = small()
    with vmap_safe(net, mode="sync"):
        with pytest.raises(ValueError) as caught:
            vmap(net)(torch.randn(1, 1, 2).double())
        vmap(net)(torch.randn(2, 1, 2).double())
    assert str(caught.value) == (
        "batch_norm of '1' (BatchNorm1d): input of shape (1, 3), over all slices, has "
        "one value for each channel, which would leave only the bias. Use more slices, "
        'or mode="eval".'
    )
    layer = nn.BatchNorm1d(1)
    with vmap_safe(layer, mode="sync"):
        with pytest.raises(ValueError, match="one value for each channel"):
            vmap(layer)(torch.ones(1, 1, 1))
        with pytest.raises(ValueError, match="one value for each channel"):
            layer(torch.ones(1, 1))


ERRORS = [
    (lambda m: vmap_safe(m, mode="sync", sync_levels=0), "innermost first"),
    (lambda m: vmap_safe(m, mode="sync", sync_levels=True), "innermost first"),
    (lambda m: vmap_safe(m, update_running_stats=True), 'Use mode="sync"'),
    (lambda m: vmap_safe(m, sync_levels=1), 'Use mode="sync"'),
    (
        lambda m: per_sample_grads(m, F.cross_entropy, *BATCH, rows="jacobian"),
        'rows="jacobian" has a meaning in "sync" only',
    ),
    (
        lambda m: per_sample_grads(m, F.mse_loss, *BATCH, mode="sync", rows="x"),
        'unknown rows \'x\'. Choose one of "contribution", "jacobian", "detached"',
    ),
]


@pytest.mark.parametrize("call,text", ERRORS, ids=[text for _, text in ERRORS])
def test_errors(call, text):
    with pytest.raises(ValueError) as caught:
        call(small())
    assert text in str(caught.value)
