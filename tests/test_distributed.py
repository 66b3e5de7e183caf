"""SyncBatchNorm in several processes, and models wrapped for them.

Two processes run all checks, each with its own share of one batch; a check compares
what its process got with plain torch on the whole batch, in one process. Losses are
summed over processes, as SyncBatchNorm's own backward does.
"""

import copy
import json
import time
import traceback
import warnings
from datetime import timedelta

import pytest
import slow
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain import ByFormula, switched
from state import assert_same_state, everything
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from wanted import assert_exact, truth

from vmapsafe import (
    clipped_grad_sum,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
)
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe.testing import assert_same

WORLD = 2
COLLECTIVE_SECONDS, ALL_SECONDS = 20, 120
BACKENDS = {"cpu": "gloo"}
if torch.cuda.device_count() >= WORLD:
    BACKENDS["cuda"] = "nccl"

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# -- The network, its batch, and the slow form -----------------------------------------

SHARES = slice(0, 4), slice(4, 7)  # of seven slices: unequal


def batch(device, *shape):
    """The whole batch and its targets, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    size = (7, *(shape or (2, 2)))
    both = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    return tuple((1 + 2 * both).to(device))


def small(device, momentum=0.1):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(2, 3),
        nn.SyncBatchNorm(3, momentum=momentum),
        nn.Tanh(),
        nn.Linear(3, 2),
        nn.SyncBatchNorm(2, affine=False, momentum=momentum),
    )
    return net.to(device, torch.float64)


def replaced(net, make):
    """A copy of the network with something else for each SyncBatchNorm layer."""
    net = copy.deepcopy(net)
    for name, layer in list(net.named_children()):
        if isinstance(layer, nn.SyncBatchNorm):
            setattr(net, name, make(layer))
    return net


def batch_norm(layer):
    twin = nn.BatchNorm1d(
        layer.num_features, affine=layer.affine, momentum=layer.momentum
    )
    twin.to(layer.running_mean)
    twin.load_state_dict(layer.state_dict())
    return twin


def plain_step(net, x):
    """A copy with plain batch norm after one training step, and its output."""
    net = replaced(net, batch_norm)
    return net, net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def written(net):
    """The network on slices (B, N, C), batch norm by formula over B and N."""
    net = replaced(net, ByFormula)
    return lambda x: net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def summed(tensor):
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def share(rank, *tensors):
    return [t[SHARES[rank]] for t in tensors]


def scalar(f, t):
    return lambda x: (f(x).sin() * t).sum()


# -- "sync" over the slices and the processes together ---------------------------------


@check
def plain_sync_batch_norm_is_no_way_around(rank, device):
    """On a CPU, its own training forward raises in the same processes."""
    if device.type == "cpu":
        with pytest.raises(ValueError, match="expected input tensor to be on"):
            nn.SyncBatchNorm(2)(torch.randn(4, 2))


@check
def forward(rank, device):
    net, (x, _) = small(device), batch(device)
    before = everything(net)
    with vmap_safe(net, mode="sync"):
        out = vmap(net)(*share(rank, x))
        not_vmapped = net(*share(rank, x[:, 0]))
    assert_same_state(net, before)
    assert_same(out, plain_step(net, x)[1][SHARES[rank]])
    assert_same(not_vmapped, plain_step(net, x[:, :1])[1][SHARES[rank], 0])


@check
def forward_in_half_precision(rank, device):
    """Statistics in float32, the output and the buffers in the dtype they have."""
    net, (x, _) = small(device), batch(device)
    expected, out = plain_step(net, x)
    net, x = net.to(torch.bfloat16), x.to(torch.bfloat16)
    with vmap_safe(net, mode="sync", update_running_stats=True):
        actual = vmap(net)(*share(rank, x))
    assert_same(actual, out[SHARES[rank]].to(actual), rtol=0.1, atol=0.1)
    assert actual.dtype == net[1].running_var.dtype == torch.bfloat16
    for b, e in zip(net.buffers(), expected.buffers()):
        assert_same(b, e.to(b), rtol=0.02, atol=0.02)


@check
def running_statistics(rank, device):
    """One call is one training step on the whole batch, in all processes."""
    x, t = batch(device)
    for momentum in (0.1, None):
        calls = {
            "vmap": lambda net: vmap(net)(*share(rank, x)),
            "vmap(grad)": lambda net: vmap(grad(lambda x: net(x).sin().sum()))(
                *share(rank, x)
            ),
            "grad(vmap)": lambda net: grad(scalar(vmap(net), *share(rank, t)))(
                *share(rank, x)
            ),
            "no vmap": lambda net: net(share(rank, x)[0].flatten(0, 1)),
        }
        for name, call in calls.items():
            net = small(device, momentum)
            net[1].num_batches_tracked.fill_(2)
            plain, _ = plain_step(net, x)
            with vmap_safe(net, mode="sync", update_running_stats=True):
                call(net)
            for b, e in zip(net.buffers(), plain.buffers()):
                assert torch.allclose(b, e, 1e-8, 1e-8), name


@check
def plain_autograd_around_it(rank, device):
    """By the input: this share; by the parameters: parts that sum up; twice."""
    net, (x, t) = small(device), batch(device)
    mine = x[SHARES[rank]].clone().requires_grad_()
    with vmap_safe(net, mode="sync"):
        loss = scalar(vmap(net), *share(rank, t))(mine)
    inputs = [mine, *net.parameters()]
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    energy = grads[0].square().sum()
    twice = torch.autograd.grad(energy, inputs, allow_unused=True)

    x.requires_grad_()
    whole = replaced(net, ByFormula)
    loss = (whole(x.flatten(0, 1)).view_as(t).sin() * t).sum()
    inputs = [x, *whole.parameters()]
    expected = torch.autograd.grad(loss, inputs, create_graph=True)
    energy = expected[0].square().sum()
    expected_twice = torch.autograd.grad(energy, inputs, allow_unused=True)
    for found, wanted in ((grads, expected), (twice, expected_twice)):
        assert_same(found[0].detach(), wanted[0][SHARES[rank]].detach())
        for f, w in zip(found[1:], wanted[1:]):
            if w is not None:
                assert_same(summed(f), w.detach())


@check
def transforms_outside_the_vmap(rank, device):
    net, (x, t) = small(device), batch(device)
    mine, mine_t = share(rank, x, t)
    f, whole = scalar(vmap(net), mine_t), scalar(written(net), t)
    with vmap_safe(net, mode="sync"):
        once = grad(f)(mine)
        tangent = jvp(vmap(net), (mine,), (mine_t,))[1]
        twice = grad(lambda x: grad(f)(x).square().sum())(mine)
    assert_same(once, grad(whole)(x)[SHARES[rank]])
    assert_same(tangent, jvp(written(net), (x,), (t,))[1][SHARES[rank]])
    expected = grad(lambda x: grad(whole)(x).square().sum())(x)
    assert_same(twice, expected[SHARES[rank]])


@check
def transforms_inside_the_vmap(rank, device):
    """Reverse: what all losses of all processes owe to this slice. Forward: what this
    slice's output owes to all inputs."""
    net, (x, t) = small(device), batch(device)
    mine, mine_t = share(rank, x, t)
    with vmap_safe(net, mode="sync"):
        reverse = vmap(grad(lambda x: net(x).sin().sum()))(mine)
        forward = vmap(lambda x, t: jvp(net, (x,), (t,))[1])(mine, mine_t)
    assert_same(reverse, grad(lambda x: written(net)(x).sin().sum())(x)[SHARES[rank]])
    assert_same(forward, jvp(written(net), (x,), (t,))[1][SHARES[rank]])


@check
def contributions(rank, device):
    """Row i: the losses of all processes, through sample i's copy of the parameters."""
    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]

    def loss_fn(out, t):
        return (out - t).square().sum()

    expected = slow.contributions(net, loss_fn, x, t)
    for update in (False, True):
        rows = per_sample_grads(
            net,
            loss_fn,
            *share(rank, x, t),
            mode="sync",
            update_running_stats=update,
        )
        for name, wanted in expected.items():
            assert_same(rows[name], wanted[SHARES[rank]])
    plain, _ = plain_step(small(device), x[:, None])
    assert_same(dict(net.named_buffers()), dict(plain.named_buffers()))


@check
def detached_rows(rank, device):
    """Sample by sample through the whole batch's statistics, as constants."""
    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]
    frozen = replaced(net, batch_norm)
    h = x
    for layer in frozen:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean = h.mean(0).detach()
            layer.running_var = h.var(0, unbiased=False).detach()
            layer.eval()
        h = layer(h)
    rows = per_sample_grads(
        net, F.mse_loss, *share(rank, x, t), mode="sync", rows="detached"
    )
    for name, expected in slow.rows(frozen, F.mse_loss, x, t).items():
        assert_same(rows[name], expected[SHARES[rank]])


@check
def jacobian_rows_are_refused(rank, device):
    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]
    with pytest.raises(RuntimeError) as caught:
        per_sample_grads(net, F.mse_loss, x, t, mode="sync", rows="jacobian")
    assert str(caught.value) == (
        "batch_norm of '1' (SyncBatchNorm): statistics of 2 processes, where a row of "
        'rows="jacobian" would mix losses of all of them. Use rows="contribution", or '
        "one process."
    )


@check
def compiling_is_refused(rank, device):
    net, (x, _) = small(device), batch(device)
    function = torch.compile(lambda x: vmap(lambda x: net(x))(x), fullgraph=True)
    with vmap_safe(net, mode="sync"):
        with pytest.raises(Exception) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, at its first use
            function(*share(rank, x))
    assert "statistics of 2 processes, which torch.compile cannot" in str(caught.value)


@check
def an_empty_share_is_refused(rank, device):
    net, (x, t) = small(device), [v[:0, 0] for v in batch(device)]
    with pytest.raises(ValueError, match="Give every process at least one sample"):
        per_sample_grads(net, F.mse_loss, x, t, mode="sync")
    rows = per_sample_grads(
        replaced(net, batch_norm), F.mse_loss, x, t, mode="sync", rows="contribution"
    )
    assert rows["0.weight"].shape == (0, 3, 2)


@check
def one_slice_in_each_process(rank, device):
    """There is one value per channel here, but two in all."""
    net = nn.SyncBatchNorm(2).to(device, torch.float64)
    x = batch(device)[0][:2, 0]
    with vmap_safe(net, mode="sync"):
        out = vmap(net)(x[rank : rank + 1, None])
    assert_same(out[:, 0], batch_norm(net)(x)[rank : rank + 1])


class Branches(nn.Module):
    """Two layers side by side, of different sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 4)
        self.norm_a, self.norm_b = nn.SyncBatchNorm(3), nn.SyncBatchNorm(4)

    def forward(self, x):
        b = self.norm_b(self.b(x))
        return torch.cat([b, self.norm_a(self.a(x)).sin()], -1)


@check
def branches(rank, device):
    """Backward meets the layers of all processes in the same order."""
    torch.manual_seed(1)
    net, (x, _) = Branches().to(device, torch.float64), batch(device)
    with vmap_safe(net, mode="sync"):
        rows = vmap(grad(lambda x: net(x).sin().sum()))(*share(rank, x))
    whole = replaced(net, ByFormula)
    expected = grad(lambda x: whole(x.flatten(0, 1)).sin().sum())(x)
    assert_same(rows, expected[SHARES[rank]])


@check
def ensembles(rank, device):
    """Each member is merged over all processes, and members are never mixed."""
    members = [small(device) for _ in range(2)]
    members[1][0].weight.data += 1
    params, buffers = stack_module_state(members)
    base, (x, _) = members[0], batch(device)

    def call(params, buffers, x):
        return vmap(lambda x: functional_call(base, (params, buffers), (x,)))(x)

    with vmap_safe(base, mode="sync", update_running_stats=True):
        out = vmap(call, (0, 0, None))(params, buffers, *share(rank, x))
    for i, member in enumerate(members):
        plain, expected = plain_step(member, x)
        assert_same(out[i], expected[SHARES[rank]])
        for name, b in plain.named_buffers():
            assert_same(buffers[name][i], b)


# -- What stays in its process ---------------------------------------------------------


@check
def other_layers_stay_local(rank, device):
    net = nn.BatchNorm2d(4).to(device, torch.float64)
    x = share(rank, batch(device, 2, 4, 3, 3)[0])[0]
    plain = copy.deepcopy(net)
    expected = plain(x.flatten(0, 1)).view_as(x)
    if rank == 0:  # alone: a collective would wait for the other
        with vmap_safe(net, mode="sync", update_running_stats=True):
            assert_same(vmap(net)(x), expected)
        assert_same(dict(net.named_buffers()), dict(plain.named_buffers()))


@check
def other_modes_stay_local(rank, device):
    net = nn.Sequential(nn.Conv2d(2, 4, 2), nn.SyncBatchNorm(4), nn.Tanh())
    net.to(device, torch.float64)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    net[1].num_batches_tracked.add_(1)
    x, _ = batch(device, 2, 2, 4, 4)
    if rank == 1:  # alone: a collective would wait for the other
        for mode in ("eval", "no_running_stats", "group_norm"):
            plain = switched(net, mode)
            before = everything(net)
            with vmap_safe(net, mode=mode, num_groups=2):
                assert_same(vmap(net)(x), torch.stack([plain(x_) for x_ in x]))
                rows = vmap(grad(lambda x: net(x).square().sum()))(x)
            assert_same_state(net, before)
            x_ = x[2].clone().requires_grad_()
            loss = plain(x_).square().sum()
            assert_same(rows[2], torch.autograd.grad(loss, x_)[0])


@check
def frozen_layers_stay_local(rank, device):
    net, (x, _) = small(device), batch(device)
    for layer in (net[1], net[4]):
        layer.eval()
        layer.num_batches_tracked.add_(1)
    if rank == 0:
        before = everything(net)
        with vmap_safe(net, mode="sync", update_running_stats=True):
            out = vmap(net)(x)
        assert_same_state(net, before)
        assert_same(out, torch.stack([copy.deepcopy(net).eval()(x_) for x_ in x]))


@check
def a_group_of_one(rank, device):
    """The layer's own process_group counts, not the world."""
    groups = [dist.new_group([r]) for r in range(WORLD)]
    net = nn.SyncBatchNorm(2, process_group=groups[rank]).to(device, torch.float64)
    x = share(rank, batch(device)[0])[0]
    with vmap_safe(net, mode="sync"):
        out = vmap(net)(x)
    assert_same(out, batch_norm(net)(x.flatten(0, 1)).view_as(x))


# -- DistributedDataParallel -----------------------------------------------------------


@check
def wrapped_models(rank, device):
    """Accepted in every mode; the wrapper trains afterwards, gradients averaged."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)
    ).to(device, torch.float64)
    net(torch.randn(8, 2, 4, 4, device=device, dtype=torch.float64))
    plain = copy.deepcopy(net)
    ids = None if device.type == "cpu" else [device]
    wrapped = DistributedDataParallel(net, device_ids=ids)
    x = share(rank, batch(device, 2, 2, 4, 4)[0])[0]
    y = torch.arange(len(x), device=device) % 2
    before = everything(net)
    for mode in ("eval", "no_running_stats", "group_norm", "sync"):
        with vmap_safe(wrapped, mode=mode, num_groups=2):
            through = vmap(wrapped)(x)
            direct = vmap(net)(x)
        with vmap_safe(plain, mode=mode, num_groups=2):
            expected = vmap(plain)(x)
        assert_same(through, expected)
        assert_same(direct, expected)
        rows = [
            per_sample_grads(
                model, F.cross_entropy, x[:, 0], y, mode=mode, num_groups=2
            )
            for model in (wrapped, plain)
        ]
        assert_same(*rows)
    # Of torch 2.11 and 2.12, the wrapper's broadcast of buffers counts as writes.
    assert_same_state(net, before, versions=False)

    F.cross_entropy(wrapped(x[:, 0]), y).backward()
    F.cross_entropy(plain(x[:, 0]), y).backward()
    for p, own in zip(wrapped.parameters(), plain.parameters()):
        assert_same(p.grad, summed(own.grad) / WORLD)
    with vmap_safe(wrapped, mode="sync"):  # autograd around the vmap trains it too
        loss = vmap(wrapped)(x).square().sum()
    wrapped.zero_grad()
    loss.backward()
    plain.zero_grad()
    plain(x.flatten(0, 1)).square().sum().backward()
    for p, own in zip(wrapped.parameters(), plain.parameters()):
        assert_same(p.grad, summed(own.grad) / WORLD)


# -- Clipped sums ----------------------------------------------------------------------


def clip(model, x, t, **options):
    return clipped_grad_sum(model, F.mse_loss, x, t, max_grad_norm=1.0, **options)


@check
def clipped_sums_of_all_processes(rank, device):
    """They equal those of the whole batch in one process, also for the wrapper's model
    and for an empty share."""
    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]
    net = replaced(net, batch_norm)
    net(x)
    expected = clip(net, x, t)
    mine = share(rank, x, t)
    assert_same(clip(net, *mine, reduce="all"), expected)
    assert_same(clip(net, *mine, reduce="all", chunk_size=2), expected)
    ids = None if device.type == "cpu" else [device]
    wrapped = DistributedDataParallel(net, device_ids=ids)
    assert_same(clip(wrapped, *mine, reduce="all"), expected)
    all_or_none = (x, t) if rank else (x[:0], t[:0])
    assert_same(clip(net, *all_or_none, reduce="all"), expected)
    with pytest.raises(AssertionError):
        assert_same(clip(net, *mine), expected)


@check
def statistics_of_one_process_are_not_those_of_another(rank, device):
    """Training in DistributedDataParallel moves those of each process on its own."""
    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]
    net = replaced(net, batch_norm)
    mine = share(rank, x, t)
    ids = None if device.type == "cpu" else [device]
    wrapped = DistributedDataParallel(net, device_ids=ids)
    wrapped(mine[0])
    for model in (net, wrapped):
        with pytest.raises(RuntimeError, match=r"running_mean' differs from process"):
            clip(model, *mine, reduce="all")
    clip(net, *mine)  # its own
    clip(net, *mine, mode="group_norm", num_groups=1, reduce="all")
    for buffer in net.buffers():
        dist.broadcast(buffer, 0)
    assert_same(clip(wrapped, *mine, reduce="all"), clip(net, x, t))


@check
def one_that_fails_leaves_none_waiting(rank, device):
    """It raises its own error, the others raise one that says so, and all continue."""
    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]
    net = replaced(net, batch_norm)
    net(x)
    mine = share(rank, x, t)
    for what in ({"max_grad_norm": -1.0}, {"params": ["nope"]}, {"chunk_size": 0}):
        options = {"max_grad_norm": 1.0, **(what if rank else {})}
        with pytest.raises(ValueError if rank else RuntimeError) as caught:
            clipped_grad_sum(net, F.mse_loss, *mine, reduce="all", **options)
        if not rank:
            assert "1 of 2 processes failed. See their errors" in str(caught.value)
    assert_same(clip(net, *mine, reduce="all"), clip(net, x, t))


# -- Norms and sketches of all processes -----------------------------------------------

GATHERED = {
    "norms": lambda *args, **options: per_sample_grad_norms(*args, **options),
    "by parameter": lambda *args, **options: per_sample_grad_norms(
        *args, per_parameter=True, **options
    ),
    "sketches": lambda *args, **options: per_sample_sketch(*args, k=5, **options),
}


@check
def norms_and_sketches_of_all_processes(rank, device):
    """They equal those of the whole batch in one process, in order of rank, for shares
    of any size. aux is that of the process."""

    def with_aux(output, target):
        return F.mse_loss(output, target), output.detach()

    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]
    net = replaced(net, batch_norm)
    net(x)
    for name, call in GATHERED.items():
        expected = call(net, F.mse_loss, x, t)
        for mine in (share(rank, x, t), (x, t) if rank else (x[:0], t[:0])):
            for chunk_size in (None, 2):
                options = {"gather": "all", "chunk_size": chunk_size}
                assert_same(call(net, F.mse_loss, *mine, **options), expected)
            found, aux = call(net, with_aux, *mine, gather="all", has_aux=True)
            assert_same(found, expected)
            assert len(aux) == len(mine[0])
        with pytest.raises(AssertionError):
            assert_same(call(net, F.mse_loss, *share(rank, x, t)), expected)


@check
def one_without_norms_or_sketches_leaves_none_waiting(rank, device):
    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]
    net = replaced(net, batch_norm)
    net(x)
    mine = share(rank, x, t)
    for call in GATHERED.values():
        options = {"params": ["nope"]} if rank else {}
        with pytest.raises(ValueError if rank else RuntimeError) as caught:
            call(net, F.mse_loss, *mine, gather="all", **options)
        if not rank:
            assert 'gather="all": 1 of 2 processes failed' in str(caught.value)
        whole = call(net, F.mse_loss, x, t)
        assert_same(call(net, F.mse_loss, *mine, gather="all"), whole)


# -- Quantities of all processes -------------------------------------------------------


def ready(device):
    """The network with plain batch norm, and the whole batch of samples."""
    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]
    net = replaced(net, batch_norm)
    net(x)
    return net, x, t


def quantities_of(net, **gather_and_reduce):
    """Those that processes put together, and what is to be told to each."""
    gather = {"gather": gather_and_reduce.get("gather")}
    reduce = {"reduce": gather_and_reduce.get("reduce")}
    vectors = {n: torch.cos(p.detach()) for n, p in net.named_parameters()}
    several = {n: torch.stack([v, 1 - v, v * v]) for n, v in vectors.items()}
    return {
        "losses": q.Losses(**gather),
        "norms": q.Norms(**gather),
        "norms by parameter": q.Norms(per_parameter=True, **gather),
        "dots": q.Dots(vectors, **gather),
        "dots with three": q.Dots(several, **gather),
        "sketch": q.Sketch(k=5, **gather),
        "sum": q.Sum(**reduce),
        "squares": q.SumOfSquares(**reduce),
        "automatic": q.WeightedSum(lambda norms: 1 / (norms + 0.1), **reduce),
        "clipped": q.ClippedSum(0.5, **reduce),
        "clipped by groups": q.ClippedSum({"0.*": 0.5, "*": 1.0}, **reduce),
    }


ALL = {"gather": "all", "reduce": "all"}


@check
def quantities_of_all_processes(rank, device):
    """Alone, together and in chunks they are those of the whole batch, from shares of
    any size."""
    net, x, t = ready(device)
    known = truth(net, "eval", "", F.mse_loss, x, t)
    wanted = quantities_of(net, **ALL)
    for mine in (share(rank, x, t), (x, t) if rank else (x[:0], t[:0])):
        for chunk_size in (None, 2):
            options = {"chunk_size": chunk_size}
            found = per_sample(net, F.mse_loss, *mine, want=wanted, **options)
            for key, quantity in wanted.items():
                assert_exact(quantity, found[key], known)
        for quantity in wanted.values():
            found = per_sample(net, F.mse_loss, *mine, want=quantity)
            assert_exact(quantity, found, known)


@check
def weights_of_each_process(rank, device):
    """A tensor of weights has one for each sample of the process."""
    net, x, t = ready(device)
    known = truth(net, "eval", "", F.mse_loss, x, t)
    weights = torch.linspace(-1, 2, len(x), device=device)
    for mine in (share(rank, x, t, weights), [v[: rank * 7] for v in (x, t, weights)]):
        want = q.WeightedSum(mine[2], reduce="all")
        found = per_sample(net, F.mse_loss, *mine[:2], want=want)
        assert_exact(q.WeightedSum(weights), found, known)


@check
def each_quantity_has_its_own_processes(rank, device):
    """Of one call, some are of all processes and some of this one; so is aux."""

    def with_aux(output, target):
        return F.mse_loss(output, target), output.detach()

    net, x, t = ready(device)
    mine = share(rank, x, t)
    whole = truth(net, "eval", "", F.mse_loss, x, t)
    own = truth(net, "eval", "", F.mse_loss, *mine)
    here, there = quantities_of(net), quantities_of(net, **ALL)
    both = [pair for pairs in zip(here.items(), there.items()) for pair in pairs]
    wanted = {f"{i} {key}": quantity for i, (key, quantity) in enumerate(both)}
    wanted["gram"] = q.Gram()
    found, aux = per_sample(net, with_aux, *mine, want=wanted, has_aux=True)
    assert len(aux) == len(mine[0])
    for key, quantity in wanted.items():
        known = own if quantity.across()[1] is None else whole
        assert_exact(quantity, found[key], known)


@check
def contributions_of_all_processes(rank, device):
    """Quantities of "sync", whose statistics are those of both."""
    net, (x, t) = small(device), [v[:, 0] for v in batch(device)]

    def loss_fn(out, t):
        return (out - t).square().sum()

    plain = replaced(net, batch_norm)
    known = truth(plain, "sync", "contribution", loss_fn, x, t)
    wanted = quantities_of(net, **ALL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*bounds no sample's influence")
        warnings.filterwarnings("ignore", ".*gradient of the weighted loss")
        found = per_sample(net, loss_fn, *share(rank, x, t), want=wanted, mode="sync")
    for key, quantity in wanted.items():
        assert_exact(quantity, found[key], known)


@check
def one_without_quantities_leaves_none_waiting(rank, device):
    """Whatever it fails at: an argument, the shape of weights, the user's function."""
    net, x, t = ready(device)
    mine = share(rank, x, t)
    size = len(mine[0]) + rank  # one too many in the second process

    def fails(norms):
        if rank:
            raise KeyError("mine")
        return norms

    for quantity, error in (
        (q.WeightedSum(torch.ones(size, device=device), reduce="all"), ValueError),
        (q.WeightedSum(fails, reduce="all"), KeyError),
        (q.ClippedSum({"*": 1.0, **({"no": 1.0} if rank else {})}, **RED), ValueError),
        (q.Dots({} if rank else dict(net.named_parameters()), **GAT), ValueError),
    ):
        for want in (quantity, {"a": q.Norms(), "b": quantity}):
            with pytest.raises(error if rank else RuntimeError) as caught:
                per_sample(net, F.mse_loss, *mine, want=want)
            if not rank:
                assert "1 of 2 processes failed. See their" in str(caught.value)
    known = truth(net, "eval", "", F.mse_loss, x, t)
    norms = q.Norms(gather="all")
    found = per_sample(net, F.mse_loss, *mine, want=norms)
    assert_exact(norms, found, known)


@check
def another_order_is_refused(rank, device):
    """Each process would else take the other's losses for norms."""
    net, x, t = ready(device)
    mine = share(rank, x, t)
    want = {"norms": q.Norms(gather="all"), "losses": q.Losses(gather="all")}
    for other in (dict(reversed(want.items())), {**want, "sum": q.Sum(reduce="all")}):
        with pytest.raises(RuntimeError, match="ask for different things; this one fo"):
            per_sample(net, F.mse_loss, *mine, want=other if rank else want)
    found = per_sample(net, F.mse_loss, *mine, want=want)
    assert len(found["norms"]) == len(found["losses"]) == len(x)


RED, GAT = {"reduce": "all"}, {"gather": "all"}


# -- Two processes, all checks ---------------------------------------------------------


def work(rank, kind, folder):
    """One process: all checks in the same order, and what became of each."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        BACKENDS[kind],
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    found = {}
    for name, function in CHECKS.items():
        torch.manual_seed(rank)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
                function(rank, device)
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=BACKENDS)
def outcome(request, tmp_path_factory):
    """What each process found, by check; an error if one dies or does not end."""
    folder = tmp_path_factory.mktemp("processes")
    context = start_processes(
        work, (request.param, folder), nprocs=WORLD, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + ALL_SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"still at it after {ALL_SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(WORLD)]


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(outcome, name):
    """The check holds in each process."""
    for rank, found in enumerate(outcome):
        assert found[name] is None, f"process {rank}\n{found[name]}"
