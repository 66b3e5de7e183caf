"""Devices other than the one that regimes were measured on.

The "meta" device computes only shapes and refuses tensors of other devices. It has
neither autocast nor measured regimes. So a test that runs there shows, on any machine,
that nothing is made on the CPU by mistake.
"""

import pytest
import torch
import torch.nn.functional as F
from blocks import MODES
from devices import no_waiting, on_fake_cuda
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from vmapsafe import (
    batched,
    clipped_grad_sum,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
)
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe.quantities.sketch import KINDS


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4), nn.ReLU()),
        *(nn.Conv2d(4, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.Flatten()),
        nn.Linear(8 * 4 * 4, 3),
    )


class Words(nn.Module):
    """Embeddings, attention, layer norm, and batch norm over the words."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 8), nn.Linear(8, 24)
        self.norm, self.batch_norm = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        split = self.mix(self.norm(self.embed(x))).unflatten(-1, (3, 2, 4))
        y = F.scaled_dot_product_attention(*split.permute(2, 0, 3, 1, 4))
        y = y.transpose(1, 2).flatten(2)
        return self.out(self.batch_norm(y.mT).mean(2))


NETS = {
    "convolutions": (convolutions, lambda n: torch.empty(n, 3, 6, 6)),
    "words": (Words, lambda n: torch.zeros(n, 5, dtype=torch.long)),
}


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs a torch that was built for CUDA"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_block", [True, False])
def test_channels_last_on_cuda(in_block, mode):
    """There torch's own batch norm asks vmap for the layout, which it refuses."""
    with FakeTensorMode():
        layer = on_fake_cuda(nn.BatchNorm2d(4))
        x = torch.empty(5, 2, 6, 6, 4, device="cuda").movedim(-1, 2)
        if in_block:
            with vmap_safe(layer, mode=mode, num_groups=2):
                assert torch.func.vmap(layer)(x).shape == x.shape
        else:
            with pytest.raises(RuntimeError, match="querying is_contiguous"):
                torch.func.vmap(layer.eval())(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings(r"ignore:clipped_grad_sum.* in mode \"sync\":UserWarning")
@pytest.mark.parametrize("samples", [4, 6000])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", NETS)
def test_nothing_is_made_on_another_device(net, mode, samples):
    """For few samples, whose rows vmap(grad) makes, and for many."""
    make, inputs = NETS[net]
    with torch.device("meta"):
        model, x = make(), inputs(samples)
        y = torch.zeros(samples, dtype=torch.long)
    options = {"mode": mode, "num_groups": 2}
    with vmap_safe(model, **options):
        outputs = torch.func.vmap(lambda x: model(x[None]))(x)
    rows = per_sample_grads(model, F.cross_entropy, x, y, **options)
    norms = per_sample_grad_norms(model, F.cross_entropy, x, y, **options)
    total = clipped_grad_sum(model, F.cross_entropy, x, y, max_grad_norm=1.0, **options)
    sketch = per_sample_sketch(model, F.cross_entropy, x, y, k=5, **options)
    for name, parameter in model.named_parameters():
        assert rows[name].shape == (samples, *parameter.shape)
        assert total[name].shape == parameter.shape
        assert rows[name].is_meta and total[name].is_meta
    assert norms.shape == (samples,) and norms.is_meta
    assert sketch.shape == (samples, 5) and sketch.is_meta
    assert outputs.shape == (samples, 1, 3) and outputs.is_meta


# -- What a GPU would have to wait for -------------------------------------------------


def quantities(samples, parameters, other):
    """Every kind of quantity, with tensors as their options where they take some."""

    def like(count):
        return {n: torch.empty(*count, *p.shape) for n, p in parameters.items()}

    weights, most = torch.empty(samples), torch.empty(())
    return {
        "losses": q.Losses(),
        "norms": q.Norms(),
        "each norm": q.Norms(per_parameter=True),
        "sum": q.Sum(),
        "squares": q.SumOfSquares(),
        "weighted": q.WeightedSum(weights),
        "by norms": q.WeightedSum(lambda norms: 1 / (norms + 1)),
        "clipped": q.ClippedSum(1.0),
        "clipped by a tensor": q.ClippedSum({"*weight": most, "*": 1.0}),
        "gram": q.Gram(),
        "gram with others": q.Gram(other=other),
        "dots": q.Dots(like(())),
        "several dots": q.Dots(like((3,))),
        "rows": q.Rows(),
        "rows into memory": q.Rows(out=like((samples,))),
        **{kind: q.Sketch(8, kind) for kind in KINDS},
        "sketch": q.Sketch(8, per_layer=True),
    }


@pytest.fixture
def on_meta():
    """A network with random draws, a batch and another one of a kind."""

    def made(net, samples=4):
        make, inputs = NETS[net]
        with torch.device("meta"):
            model = nn.Sequential(make(), nn.Dropout(0.5), nn.Linear(3, 3))
            batch, other = [
                (inputs(n), torch.zeros(n, dtype=torch.long)) for n in (samples, 3)
            ]
        return model, batch, other

    return made


WAYS = {
    "at once": {},
    "in chunks": {"chunk_size": 2},
    "one draw": {"randomness": "same"},
    "no fast rules": {"fast": False},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        *[{"mode": mode} for mode in MODES],
        *[{"mode": "sync", "rows": rows} for rows in ("jacobian", "detached")],
        {"mode": "sync", "update_running_stats": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("net", NETS)
def test_nothing_waits_for_the_device(net, options, way, on_meta):
    """In a call of any quantity; the first call of a model may look at its statistics.

    Nothing is copied from the host either, and no shape depends on a number.
    """
    model, batch, other = on_meta(net)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    options = {"num_groups": 2, "randomness": "different", **WAYS[way], **options}
    with torch.device("meta"):
        wanted = quantities(4, dict(model.named_parameters()), other)
    with no_waiting():
        found = per_sample(model, F.cross_entropy, *batch, want=wanted, **options)
    assert found.keys() == wanted.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("randomness", ["error", "different"])
@pytest.mark.parametrize("mode", MODES)
def test_a_users_own_vmap_waits_for_nothing(mode, randomness, on_meta):
    model, batch, _ = on_meta("convolutions")
    if randomness == "error":
        model[1].p = 0.0
        model[1].eval()
    params = dict(model.named_parameters())

    def loss(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x[None],)), y[None])

    rows = vmap(grad(loss), (None, 0, 0), randomness=randomness)
    with no_waiting(), vmap_safe(model, mode=mode, num_groups=2):
        found = rows(params, *batch)
        outputs = batched(model, randomness=randomness)(batch[0])
    assert outputs.shape == (4, 3)
    assert found["2.weight"].shape == (4, 3, 3)


def test_a_tied_state_dict_waits_for_nothing(on_meta):
    """The two tensors of one parameter are known to be equal by where they are."""
    model, batch, _ = on_meta("convolutions")
    model.append(nn.Linear(3, 3, device="meta"))
    model[3].weight = model[2].weight
    with no_waiting():
        norms = per_sample_grad_norms(
            model,
            F.cross_entropy,
            *batch,
            params=model.state_dict(),
            randomness="different",
        )
    assert norms.shape == (4,)


def test_waiting_is_noticed():
    """What would wait is refused."""
    x = torch.empty(3, device="meta")
    for wait in (
        lambda: x.tolist(),
        lambda: bool(x[0] > 0),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        lambda: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda: torch.tensor([1.0, 2.0], device="meta"),
        lambda: x[[0, 1]],
        lambda: x.cpu(),
    ):
        with pytest.raises((AssertionError, RuntimeError)), no_waiting():
            wait()


# -- TF32 ------------------------------------------------------------------------------

# What a user does, and whether the rows of a convolution may then be matrix products:
# not if these are less precise than convolutions.
SWITCHES = {
    "as torch begins": (lambda b: None, True),
    "older": (lambda b: setattr(b.cuda.matmul, "allow_tf32", True), True),
    "older, convolutions exact": (
        lambda b: (
            setattr(b.cuda.matmul, "allow_tf32", True),
            setattr(b.cudnn, "allow_tf32", False),
        ),
        False,
    ),
    "all exact": (lambda b: setattr(b.cudnn, "allow_tf32", False), True),
    "newer": (lambda b: setattr(b.cuda.matmul, "fp32_precision", "tf32"), True),
    "newer, convolutions exact": (
        lambda b: (
            setattr(b.cuda.matmul, "fp32_precision", "tf32"),
            setattr(b.cudnn.conv, "fp32_precision", "ieee"),
        ),
        False,
    ),
    "newer for all": (lambda b: setattr(b, "fp32_precision", "tf32"), True),
    "by a function, convolutions exact": (
        lambda b: (
            torch.set_float32_matmul_precision("high"),
            setattr(b.cudnn.conv, "fp32_precision", "ieee"),
        ),
        False,
    ),
}


@pytest.fixture
def backends():
    """torch's switches, which are put back."""
    found = torch.backends
    places = [found, found.cuda.matmul, found.cudnn, found.cudnn.conv, found.cudnn.rnn]
    before = [place.fp32_precision for place in places]
    # torch.testing._internal, which other tests import, forbids it.
    with getattr(found, "__allow_nonbracketed_mutation")():
        yield found
        torch.set_float32_matmul_precision("highest")
        found.cudnn.allow_tf32 = True
        for place, value in zip(places, before):
            place.fp32_precision = value


@pytest.mark.parametrize("way", ["rows", "vmap"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_rows_of_convolutions_are_as_precise_as_convolutions(switch, way, backends):
    """On "meta", which has the precision of CUDA, by torch's older and newer switch."""
    flip, products = SWITCHES[switch]
    with torch.device("meta"):
        model, x = nn.Conv2d(3, 4, 1), torch.empty(5, 3, 6, 6)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.add(operator.overloadpacket)
            return operator(*args, **(kwargs or {}))

    flip(backends)
    fresh = torch.empty(5, 4, 3, 1, 1, device="meta")
    with Watch():
        if way == "rows":
            out = {"weight": fresh, "bias": fresh[:, :, 0, 0, 0].clone()}
            per_sample_grads(model, lambda o: o.square().sum(), x, out=out)
        else:
            params = dict(model.named_parameters())
            with vmap_safe(model):
                vmap(
                    grad(lambda p, x: functional_call(model, p, (x,)).sum()), (None, 0)
                )(params, x[:, None])
    assert (torch.ops.aten.bmm in seen) == products
    assert (torch.ops.aten.convolution_backward in seen) != products


# -- Autocast --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_device_without_autocast(mode, on_meta):
    """Autocast of another device is on around the call."""
    model, (x, y), _ = on_meta("convolutions")
    with torch.autocast("cpu", torch.bfloat16):
        rows = per_sample_grads(
            model,
            F.cross_entropy,
            *(x, y),
            mode=mode,
            num_groups=2,
            randomness="different",
        )
    assert {row.dtype for row in rows.values()} == {torch.float32}
