"""Every error text: what was called, what was found, what to do."""

import dataclasses
import re

import pytest
import slow
import torch
import torch.nn.functional as F
from state import assert_same_state, everything
from torch import nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from vmapsafe import (
    BlockError,
    NeverUpdatedWarning,
    batched,
    clipped_grad_sum,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
)
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe._rule import register, registered
from vmapsafe.testing import assert_same


def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4)))
    net(torch.randn(5, 3))
    return net


async def coroutine(model):
    pass


async def asynchronous_generator(model):
    yield 1


class FullyShardedDataParallel(nn.Module):
    """Replaces torch's: a wrapper is refused by the name of its class."""


def scripted():
    return torch.jit.script(net())


ENTRY = {
    "unknown mode": (
        lambda: vmap_safe(net(), mode="train"),
        ValueError,
        "vmap_safe(...): unknown mode 'train'. Choose one of \"eval\", "
        '"no_running_stats", "group_norm", "sync".',
    ),
    "no module": (
        lambda: vmap_safe(net(), 3),
        TypeError,
        "vmap_safe(...): got an int, not an nn.Module. Write " "vmap_safe(model).",
    ),
    "num_groups below 1": (
        lambda: vmap_safe(net(), num_groups=0),
        ValueError,
        "num_groups=0, which is below 1. Pass an int of at least 1, or a callable from "
        "C",
    ),
    "no model in a with": (
        lambda: vmap_safe(mode="eval").__enter__(),
        TypeError,
        'with vmap_safe(mode="eval"): got no model. ' "Write vmap_safe(model).",
    ),
    "no model among the arguments": (
        lambda: vmap_safe(lambda x, y: x)(1, [2]),
        TypeError,
        '<lambda>(...) under @vmap_safe(mode="eval"): there is no nn.Module '
        "among its arguments, or in a tuple, list or dict there. Pass the model, or "
        "write @vmap_safe(model).",
    ),
    "async def": (
        lambda: vmap_safe(coroutine),
        TypeError,
        '@vmap_safe(mode="eval"): coroutine is async, and a block left '
        "open across an await would be seen by other tasks. Use `with "
        "vmap_safe(model):` around the synchronous part.",
    ),
    "async generator": (
        lambda: vmap_safe(asynchronous_generator),
        TypeError,
        "asynchronous_generator is async",
    ),
    "class": (
        lambda: vmap_safe(nn.Linear),
        TypeError,
        '@vmap_safe(mode="eval"): Linear is a class, and the block would '
        "cover only the creation of its objects. Decorate its methods, or write "
        "vmap_safe(Linear(...)).",
    ),
    "not a function": (
        lambda: vmap_safe(mode="eval")(3),
        TypeError,
        '@vmap_safe(mode="eval"): 3 is not a function. Decorate a ' "function.",
    ),
    "lazy": (
        lambda: vmap_safe(nn.Sequential(nn.LazyBatchNorm1d())).__enter__(),
        ValueError,
        "vmap_safe(Sequential, mode=\"eval\"): '0' (LazyBatchNorm1d) is lazy and has "
        "not seen a batch. Run the model on one batch first.",
    ),
    "FSDP": (
        lambda: vmap_safe(nn.Sequential(FullyShardedDataParallel())).__enter__(),
        TypeError,
        "vmap_safe(Sequential, mode=\"eval\"): '0' (FullyShardedDataParallel) is "
        "sharded by FSDP, whose flat parameters torch.func cannot map over. Use the "
        "module before it is sharded, or DistributedDataParallel.",
    ),
    "TorchScript": (
        lambda: vmap_safe(scripted(), mode="group_norm").__enter__(),
        TypeError,
        "vmap_safe(RecursiveScriptModule, mode=\"group_norm\"): 'the model itself' "
        "(RecursiveScriptModule) is TorchScript, and a block can switch only its "
        'training flag. Use mode="eval", or the module before it was scripted.',
    ),
    "left twice": (
        lambda: vmap_safe(net()).__exit__(None, None, None),
        BlockError,
        'leaving vmap_safe(Sequential, mode="eval"): it is not open in '
        "this thread. Leave a block once for each time it was entered, in the thread "
        "that entered it.",
    ),
}


@pytest.mark.parametrize("name", ENTRY)
def test_entry(name):
    call, kind, text = ENTRY[name]
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value)


# -- In the forward --------------------------------------------------------------------


def in_block(model, x, mode, **options):
    with vmap_safe(model, mode=mode, **options):
        vmap(model)(x)


FORWARD = {
    "one value a channel": (
        lambda: net(),
        torch.randn(3, 1, 3),
        {"mode": "no_running_stats"},
        "batch_norm of '1.0' (BatchNorm1d): input of shape (1, 4) has one value for "
        "each channel, which would leave only the bias. Use larger slices, or "
        'mode="eval" where there are running statistics.',
    ),
    "one value a group": (
        lambda: net(),
        torch.randn(3, 2, 3),
        {"mode": "group_norm"},
        "batch_norm of '1.0' (BatchNorm1d): input of shape (2, 4) has one value for "
        "each of 4 groups of 4 channels, which would leave only the bias. Pass a "
        "num_groups that divides the channels into fewer groups (where it does not "
        'divide them, each channel is a group), or use mode="eval".',
    ),
    "the model is the layer": (
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        torch.randn(3, 1, 3),
        {"mode": "eval"},
        "batch_norm of 'the model itself' (BatchNorm1d): input of shape (1, 3) has one",
    ),
    "instance norm of one value": (
        lambda: nn.InstanceNorm1d(3, track_running_stats=True),
        torch.randn(3, 2, 3, 1),
        {"mode": "no_running_stats"},
        "instance_norm of 'the model itself' (InstanceNorm1d): input of shape "
        "(2, 3, 1) has one value for each channel, which would leave only the bias. "
        'Use larger samples, or mode="eval".',
    ),
    "num_groups that gives 0": (
        lambda: nn.BatchNorm1d(3),
        torch.randn(3, 2, 3, 2),
        {"mode": "group_norm", "num_groups": lambda channels: 0},
        "num_groups(3): it returned 0, which is below 1",
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    make, x, options, text = FORWARD[name]
    model = make()
    before = everything(model)
    with pytest.raises(ValueError) as caught:
        in_block(model, x, **options)
    assert text in str(caught.value)
    assert_same_state(model, before)


# -- Notes on errors of torch's vmap --------------------------------------------------


class NoRule(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


class OldForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class Asks(nn.Module):
    """A layer whose forward is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def in_place(x):
    torch.zeros(x.shape)[0] = x[0]
    return x


NOTES = {
    "random": (F.dropout, 'randomness="different"'),
    "own autograd.Function": (NoRule.apply, "vmap staticmethod"),
    "data-dependent": (lambda x: x if x.sum() > 0 else -x, "torch.where"),
    "item": (lambda x: x * x.sum().item(), "Keep it a tensor"),
    "in-place": (in_place, "Write the operation out of place"),
    "no batching rule": (
        lambda x: torch._foreach_add([x], 1.0)[0],
        "loop over the slices",
    ),
    "boolean mask": (lambda x: x[x > 0], "Use torch.where(mask, a, b)"),
    "boolean mask, assigned": (
        lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
        "or x[mask] = 0. Use torch.where(mask, a, b)",
    ),
    "numpy": (lambda x: torch.from_numpy(x.numpy()), ".numpy() and .tolist() do that"),
    "list": (lambda x: torch.tensor(x.tolist()), ".numpy() and .tolist() do that"),
    "old autograd.Function": (OldForm.apply, "of the old form, forward(ctx, ...)"),
    "checkpoint": (
        lambda x: checkpoint(torch.sin, x, use_reentrant=True),
        "as in torch.utils.checkpoint with use_reentrant=True",
    ),
    "checkpoint of the other kind, in a gradient": (
        torch.func.grad(lambda x: checkpoint(torch.sin, x, use_reentrant=False).sum()),
        "what torch.utils.checkpoint and save_on_cpu set",
    ),
    "a tensor from outside, in a gradient": (
        torch.func.grad(lambda x, held=torch.zeros(3): held.copy_(x[0]).sum()),
        "DistributedDataParallel's broadcast of them, call the module inside it",
    ),
    "in-place draw": (
        lambda x: torch.zeros(3).bernoulli_(0.5) * x,
        "Draw out of place",
    ),
    "dynamic shape": (torch.nonzero, "Use torch.where(mask, a, b)"),
    "a layer of another model": (
        lambda x, other=nn.BatchNorm1d(3): other(x),
        "Hand its model to vmap_safe as well",
    ),
}


@pytest.mark.parametrize("name", NOTES)
@pytest.mark.parametrize("decorated", [False, True])
def test_notes(name, decorated):
    """The error keeps its type and text, and gains the layer's path and a way out."""
    function, advice = NOTES[name]
    model = nn.Sequential(nn.Identity(), nn.Sequential(Asks(function)))
    x = torch.randn(3, 2, 3)
    mapped = vmap(model, randomness="different" if name == "in-place draw" else "error")
    with pytest.raises(Exception) as bare:
        mapped(x)
    with pytest.raises(type(bare.value)) as caught:
        if decorated:
            vmap_safe(lambda model: mapped(x))(model)
        else:
            with vmap_safe(model):
                mapped(x)
    assert str(caught.value) == str(bare.value)
    (note,) = caught.value.__notes__
    assert note.startswith("vmapsafe: raised in '1.0' (Asks). ")
    assert advice in note


@pytest.mark.parametrize(
    "model,x",
    [
        (nn.Linear(3, 4), torch.randn(2, 5)),
        (nn.BatchNorm2d(3, track_running_stats=False), torch.randn(3, 8, 8)),
        (nn.Conv2d(3, 4, 3), torch.randn(8, 8)),
    ],
)
def test_errors_that_are_not_vmaps_get_no_note(model, x):
    model = nn.Sequential(model)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        with vmap_safe(model):
            model(x)
    assert not hasattr(caught.value, "__notes__")


# -- Slices without a batch dimension --------------------------------------------------

TOO_FEW = {
    "batch norm 1d": (nn.BatchNorm1d(3), (3,)),
    "batch norm 2d": (nn.BatchNorm2d(3), (3, 8, 8)),
    "batch norm 3d": (nn.BatchNorm3d(3), (3, 4, 4, 4)),
    "instance norm": (nn.InstanceNorm2d(3), (3, 8)),
    "group norm": (nn.GroupNorm(3, 3), (3,)),
    "convolution 1d": (nn.Conv1d(3, 3, 3), (8,)),
    "convolution 2d": (nn.Conv2d(3, 3, 3), (8, 8)),
    "convolution 3d": (nn.Conv3d(3, 3, 3), (4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(3, 3, 3), (8, 8)),
    "max pool 1d": (nn.MaxPool1d(2), (8,)),
    "max pool 2d": (nn.MaxPool2d(2), (8,)),
    "mean pool": (nn.AvgPool2d(2), (8,)),
    "adaptive pool": (nn.AdaptiveAvgPool2d(1), (8,)),
    "adaptive max pool": (nn.AdaptiveMaxPool2d(1), (8,)),
    "flatten": (nn.Flatten(), (8,)),
    "flatten and linear": (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2)),
    "attention": (nn.TransformerEncoderLayer(4, 1, dropout=0.0), (4,)),
    "upsampling": (nn.Upsample(scale_factor=2), (8,)),
    "pixel shuffle": (nn.PixelShuffle(2), (4, 8)),
    "local response norm": (nn.LocalResponseNorm(2), (8,)),
}


@pytest.mark.filterwarnings("ignore::vmapsafe.NeverUpdatedWarning")
@pytest.mark.parametrize("name", TOO_FEW)
@pytest.mark.parametrize("outside", [False, True])
def test_slices_without_a_batch_dimension(name, outside):
    """The error says what to write."""
    layer, shape = TOO_FEW[name]
    model = nn.Sequential(layer)
    x = torch.randn(5, *shape)
    with pytest.raises(Exception) as caught:
        if outside:  # the vmap around the block
            vmap(vmap_safe(model)(lambda x: model(x)))(x)
        else:
            with vmap_safe(model):
                vmap(model)(x)
    (note,) = caught.value.__notes__
    assert note.startswith("vmapsafe: raised in '0")
    assert "write @batched in place of vmap, or model(x[None])" in note


def test_an_input_of_per_sample_gradients_with_a_dimension_too_few():
    """An error of a call with a batch of one does not advise @batched."""
    model, x = net_of_images(), torch.randn(5, 8, 8)
    for call in (
        lambda: per_sample_grads(model, lambda o: o.sum(), x),
        lambda: per_sample_grads(model, lambda o: o.sum(), x, fast=False),
        lambda: vmap_safe(model)(lambda: batched(model)(x))(),
    ):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            call()
        (note,) = caught.value.__notes__
        assert "raised in '1' (BatchNorm2d)" in note
        assert "called with a batch of one" in note and "@batched" not in note


def test_a_batch_on_another_device():
    with pytest.raises(RuntimeError) as caught:
        per_sample_grads(
            nn.Linear(2, 2), F.mse_loss, *torch.zeros(2, 4, 2, device="meta")
        )
    (note,) = caught.value.__notes__
    assert "Move the batch, or what you passed as params=" in note


def test_a_buffer_on_another_device():
    """The batch is right; the note names tensors of the model."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net[1].running_mean = net[1].running_mean.to("meta")
    with pytest.raises(RuntimeError) as caught:
        per_sample_grads(net, F.mse_loss, torch.zeros(4, 2), torch.zeros(4, 3))
    (note,) = caught.value.__notes__
    assert "'0.weight' is on cpu and '1.running_mean' is on meta" in note


def test_a_bound_on_another_device():
    bound = torch.ones((), device="meta")
    with pytest.raises(ValueError, match="max_grad_norm is on meta"):
        clipped_grad_sum(
            nn.Linear(2, 2), F.mse_loss, *torch.zeros(2, 4, 2), max_grad_norm=bound
        )


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Conv1d(4, 3, 1)])
def test_a_batch_of_another_dtype(layer, fast):
    x = torch.zeros(5, 4, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError) as caught:
        per_sample_grads(layer, lambda o: o.sum(), x, fast=fast)
    (note,) = caught.value.__notes__
    assert note.startswith("vmapsafe: raised in 'the model itself'")
    assert "a batch mostly has the dtype and the device" in note


def test_layers_of_two_dtypes():
    """The note names the layer that gets the other dtype; cast in forward, it works."""

    class Mixed(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).to(self.between)).float()

    model = Mixed(nn.Linear(3, 4), nn.Linear(4, 2).bfloat16())
    model.between = torch.float32
    call = model, F.mse_loss, torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(RuntimeError) as caught:
        per_sample_grads(*call)
    assert "raised in '1' (Linear). Two dtypes" in caught.value.__notes__[0]
    model.between = torch.bfloat16
    rows = per_sample_grads(*call)
    assert [r.dtype for r in rows.values()] == [p.dtype for p in model.parameters()]
    norms = slow.norms({name: row.double() for name, row in rows.items()})
    found = per_sample_grad_norms(*call)
    assert_same(found.double(), norms, rtol=0.02)


class OnTwoDevices(nn.Module):
    """The loss uses the parameters on one of them."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2, device="meta"), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


def test_a_model_on_several_devices():
    """A quantity of each parameter is on its device; one of all raises."""
    model = OnTwoDevices()
    x, y = torch.empty(5, 3, device="meta"), torch.empty(5, 2, device="meta")
    for want in (q.Rows(), q.Norms(per_parameter=True), q.Sum(), q.Losses()):
        found = per_sample(model, F.mse_loss, x, y, want=want)
        if isinstance(found, dict):
            devices = {n: p.device for n, p in model.named_parameters()}
            assert {n: t.device for n, t in found.items()} == devices
    for want in (q.Norms(), q.ClippedSum(1.0), q.Gram(), q.Sketch(4)):
        with pytest.raises(RuntimeError) as caught:
            per_sample(model, F.mse_loss, x, y, want=want)
        (note,) = caught.value.__notes__
        assert "the parameters are on cpu and meta. A quantity that puts" in note
        assert "params=" in note
    names = ["used.weight", "used.bias"]
    assert per_sample_grad_norms(model, F.mse_loss, x, y, params=names).is_meta


def net_of_images():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    model(torch.randn(4, 1, 8, 8))
    return model


# -- Where -----------------------------------------------------------------------------


class Trained(nn.Sequential):
    """A model with steps and losses of its own, as Lightning has."""

    def step(self, x):
        return per_sample_grads(self, self.dropped_loss, x)

    @vmap_safe
    def mapped_step(self, x):
        return vmap(lambda x: self.dropped_loss(self(x)))(x)

    def dropped_loss(self, output):
        return F.dropout(output).sum()


def test_an_error_of_the_loss_names_no_layer():
    model = Trained(nn.Linear(3, 3))
    x = torch.randn(4, 2, 3)
    for call in (
        lambda: per_sample_grads(model, lambda o: F.dropout(o).sum(), x),
        lambda: per_sample_grads(model, lambda o: F.dropout(o).sum(), x, fast=False),
        lambda: per_sample_grads(model, nn.Sequential(nn.Dropout(), Sum()), x),
        lambda: per_sample_grad_norms(model, lambda o: (o > 0).sum().item() * o, x),
        lambda: model.step(x),
        lambda: model.mapped_step(x),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        (note,) = caught.value.__notes__
        assert "raised in the code inside the block, outside its models. " in note
        assert "The layer" not in note


class Sum(nn.Module):
    def forward(self, x):
        return x.sum()


# -- Rules -----------------------------------------------------------------------------


def test_registering():
    """A name that is taken and an unknown mode are refused; nothing is registered."""
    first = registered()[0]
    before = registered()
    with pytest.raises(ValueError, match=re.escape(f"a rule named {first.name!r}")):
        register(first)
    odd = dataclasses.replace(first, name="odd", modes=("nope",))
    with pytest.raises(ValueError, match=r"register\(...\): unknown mode 'nope'"):
        register(odd)
    assert registered() == before


def test_the_warning():
    class Untrained(nn.Sequential):
        pass

    with pytest.warns(NeverUpdatedWarning) as caught:
        with vmap_safe(Untrained(nn.BatchNorm1d(3))):
            pass
    assert str(caught[0].message) == (
        'vmap_safe(Untrained, mode="eval"): the running statistics of '
        "'0' (BatchNorm1d) were never updated, so it normalises by mean 0 and variance "
        "1. Train the model first, or use another mode."
    )
    assert caught[0].filename == __file__
