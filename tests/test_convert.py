"""Permanent conversions: what the copy computes, what it keeps, what is refused.

The references are formulas written out on tensors, one slice at a time: no norm layer,
no vmap, nothing of the package. All numbers are float64 and activations are smooth.
"""

import copy
import io
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from blocks import EACH_ALONE
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from vmapsafe._convert import convert, norm_layer
from vmapsafe._modes import groups_for

CHANNELS, EPS, GROUPS = 6, 1e-2, 3
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def without_bias(layer):
    """As built with bias=False, which torch 2.11 does not have."""
    layer.bias = None
    return layer


class TanhNorm(nn.BatchNorm2d):
    """A subclass with a forward and a child of its own, in the manner of timm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x)).tanh()


class NamedOnly(nn.BatchNorm2d):
    """A subclass that computes what its base computes."""


class HandMade(nn.Module):
    """A norm layer that is not torch's and does not have a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(CHANNELS))
        self.register_buffer("running_var", torch.ones(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.mul_(0.9).add_(x.mean((0, 2, 3)).detach(), alpha=0.1)
        return x - self.running_mean[:, None, None]


class Steered(nn.Module):
    """Not a subclass of torch's, but it reaches F.batch_norm through the same flags."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.track_running_stats = True
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        use_slice = self.training or not self.track_running_stats
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, training=use_slice, eps=EPS)


class TinyResNet(nn.Module):
    """Takes ``norm_layer`` as torchvision's nets do."""

    def __init__(self, norm_layer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = norm_layer(4)
        self.conv2 = nn.Conv2d(4, 64, 3, padding=1, bias=False)
        self.bn2 = norm_layer(64, eps=1e-3, momentum=0.01)
        self.fc = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.conv1(x)))
        return self.fc(torch.tanh(self.bn2(self.conv2(x))).mean((2, 3)))


def randomised(model: nn.Module) -> nn.Module:
    """Fill all parameters and statistics with values that are not their defaults."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        tensor.data.normal_(generator=generator)
    for name, tensor in model.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_(generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        else:
            tensor.fill_(7)
    return model


def net(norm: nn.Module, dims: int = 2) -> nn.Sequential:
    return randomised(
        nn.Sequential(CONV[dims](2, CHANNELS, 2), norm, nn.Tanh(), nn.Flatten())
    ).double()


def slices(dims: int = 2) -> Tensor:
    """Three slices of two samples: (3, 2, 2, 4, ...)."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, 2) + (4,) * dims
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def written_out(model: nn.Sequential, mode: str, params, x: Tensor) -> Tensor:
    """The converted net on one slice, from the unconverted layer's numbers."""
    dims = x.dim() - 2
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    h = convolve(x, params["0.weight"], params["0.bias"])
    column = (-1,) + (1,) * dims
    if mode == "eval":
        mean = model[1].running_mean.reshape(column)
        var = model[1].running_var.reshape(column)
    else:
        if mode == "group_norm":
            parts, over = h.reshape(len(h), GROUPS, CHANNELS // GROUPS, -1), (2, 3)
        elif mode == "per instance":
            parts, over = h.reshape(len(h), CHANNELS, 1, -1), (2, 3)
        else:
            parts, over = h.reshape(len(h), CHANNELS, 1, -1), (0, 2, 3)
        mean = parts.mean(over, keepdim=True)
        var = (parts - mean).square().mean(over, keepdim=True)
        mean = mean.expand_as(parts).reshape(h.shape)
        var = var.expand_as(parts).reshape(h.shape)
    h = (h - mean) / torch.sqrt(var + EPS)
    if "1.weight" in params:
        h = h * params["1.weight"].reshape(column)
    if "1.bias" in params:
        h = h + params["1.bias"].reshape(column)
    return h.tanh().flatten(1)


def assert_computes(converted: nn.Module, model: nn.Sequential, mode: str, x: Tensor):
    """Values and per-slice gradients under vmap equal those of the written-out net."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    for name, parameter in converted.named_parameters():
        assert torch.equal(parameter, params[name])
    weight = torch.linspace(-1, 1, written_out(model, mode, params, x[0])[0].numel())
    weight = weight.double()

    def loss(params, xi):
        return (functional_call(converted, params, (xi,)) * weight).square().sum()

    outs = vmap(converted)(x)
    rows = vmap(grad(loss), (None, 0))(params, x)
    assert rows.keys() == params.keys()
    for i, xi in enumerate(x):
        own = {name: p.clone().requires_grad_() for name, p in params.items()}
        out = written_out(model, mode, own, xi)
        row = torch.autograd.grad((out * weight).square().sum(), list(own.values()))
        torch.testing.assert_close(outs[i], out.detach(), rtol=1e-10, atol=1e-10)
        for name, expected in zip(own, row):
            found = rows[name][i]
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def snapshot(model: nn.Module):
    """What must not change, by identity where there is one."""
    return (
        [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        [(sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()],
        [
            (name, id(t), t._version)
            for name, t in model.state_dict(keep_vars=True).items()
        ],
        {name: t.clone() for name, t in model.state_dict().items()},
    )


def assert_untouched(before, model: nn.Module) -> None:
    after = snapshot(model)
    assert after[:3] == before[:3]
    assert all(torch.equal(after[3][name], before[3][name]) for name in before[3])


# What the copy computes.


@pytest.mark.parametrize("then", ["train", "eval"])
@pytest.mark.parametrize("affine", ["affine", "no bias", "not affine"])
@pytest.mark.parametrize("dims", BATCH_NORM)
@pytest.mark.parametrize("mode", EACH_ALONE)
def test_batch_norm_computes_the_formula_after_train_and_eval(mode, dims, affine, then):
    layer = BATCH_NORM[dims](CHANNELS, eps=EPS, affine=affine != "not affine")
    model = net(without_bias(layer) if affine == "no bias" else layer, dims)
    before = snapshot(model)
    converted = getattr(convert(model, mode, num_groups=GROUPS), then)()
    assert_computes(converted, model, mode, slices(dims))
    assert_untouched(before, model)


@pytest.mark.parametrize("then", ["train", "eval"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", INSTANCE_NORM)
@pytest.mark.parametrize("mode", ["eval", "no_running_stats"])
def test_instance_norm_with_statistics_computes_the_formula(mode, dims, affine, then):
    layer = INSTANCE_NORM[dims](CHANNELS, EPS, affine=affine, track_running_stats=True)
    model = net(layer, dims)
    converted = getattr(convert(model, mode), then)()
    meaning = "eval" if mode == "eval" else "per instance"
    assert_computes(converted, model, meaning, slices(dims))


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_sync_batch_norm_is_a_batch_norm(mode):
    model = net(nn.SyncBatchNorm(CHANNELS, eps=EPS))
    assert_computes(convert(model, mode, num_groups=GROUPS), model, mode, slices())


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_a_model_that_is_the_layer_itself(mode):
    layer = net(nn.BatchNorm2d(CHANNELS, eps=EPS))[1]
    converted = convert(layer, mode, num_groups=GROUPS)
    wrapped = net(layer)
    wrapped_converted = convert(wrapped, mode, num_groups=GROUPS)
    x = torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64)
    converted.load_state_dict(wrapped_converted[1].state_dict())
    assert type(converted) is type(wrapped_converted[1])
    torch.testing.assert_close(converted(x), wrapped_converted[1](x))


@pytest.mark.parametrize("mode", ["eval", "no_running_stats"])
def test_a_subclass_keeps_class_forward_and_its_own_dropout(mode):
    model = net(TanhNorm(CHANNELS))
    converted = convert(model, mode).train()
    assert isinstance(converted[1], TanhNorm)
    assert converted[1].drop.training
    assert not converted.eval()[1].drop.training
    converted.train()[1].drop.p = 0.0
    plain = copy.deepcopy(model)
    plain[1] = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.Tanh()).double()
    plain[1][0].load_state_dict(model[1].state_dict())
    plain[1][0].train(mode != "eval")
    for xi, out in zip(slices(), vmap(converted)(slices())):
        torch.testing.assert_close(out, plain(xi))


def test_group_norm_takes_a_subclass_without_a_forward_of_its_own():
    model = net(NamedOnly(CHANNELS, eps=EPS))
    converted = convert(model, "group_norm", num_groups=GROUPS)
    assert_computes(converted, model, "group_norm", slices())


def test_a_group_norm_copy_looks_like_one_that_was_built():
    layer = convert(without_bias(nn.BatchNorm2d(64, eps=EPS)), "group_norm")
    built = without_bias(nn.GroupNorm(32, 64, eps=EPS))
    assert type(layer) is nn.GroupNorm
    assert repr(layer) == repr(built)
    assert vars(layer).keys() == vars(built).keys()
    assert layer.state_dict().keys() == built.state_dict().keys()


def test_group_norm_leaves_instance_norm_alone():
    model = net(nn.InstanceNorm2d(CHANNELS, track_running_stats=True))
    converted = convert(model, "group_norm")
    assert type(converted[1]) is nn.InstanceNorm2d
    assert converted.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "layer",
    [
        partial(nn.BatchNorm2d, CHANNELS, track_running_stats=False),
        partial(nn.InstanceNorm2d, CHANNELS),
        partial(nn.GroupNorm, 1, CHANNELS),
    ],
)
def test_eval_leaves_layers_without_running_statistics_alone(layer):
    """torch uses the slice's own statistics with both flags."""
    model = net(layer())
    converted = convert(model, "eval")
    assert type(converted[1]) is type(model[1])
    assert converted[1].training
    assert torch.equal(converted(slices()[0]), model(slices()[0]))


def test_eval_freezes_a_hand_made_owner_of_the_statistics_and_the_others_leave_it():
    model = net(HandMade())
    frozen = convert(model, "eval").train()
    before = frozen[1].running_mean.clone()
    vmap(frozen)(slices())
    assert torch.equal(frozen[1].running_mean, before)
    for mode in ("no_running_stats", "group_norm"):
        assert type(convert(model, mode)[1]) is HandMade
        assert convert(model, mode).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("mode", ["eval", "no_running_stats"])
def test_a_layer_of_no_torch_class_is_steered_by_its_flags(mode):
    model = net(Steered(CHANNELS))
    assert_computes(convert(model, mode).train(), model, mode, slices())


# Layers frozen by their owner.


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_a_layer_frozen_in_a_training_model_stays_frozen_for_good(mode):
    model = nn.Sequential(TanhNorm(CHANNELS), nn.BatchNorm2d(CHANNELS))
    randomised(model)[0].eval()
    model[0].drop.p = 0.0
    converted = convert(model, mode, num_groups=GROUPS).train()
    assert not converted[0].training
    assert converted[0].state_dict().keys() == model[0].state_dict().keys()
    x = torch.randn(3, CHANNELS, 4, 4)
    assert torch.equal(converted[0](x), model[0](x))
    assert ("1.running_mean" in converted.state_dict()) == (mode == "eval")


@pytest.mark.parametrize("mode", ["no_running_stats", "group_norm"])
def test_in_a_model_in_eval_mode_all_layers_are_converted(mode):
    model = net(nn.BatchNorm2d(CHANNELS, eps=EPS)).eval()
    for already in (model, convert(model, "eval")):
        converted = convert(already, mode, num_groups=GROUPS)
        assert not any(layer.training for layer in converted.modules())
        assert not list(converted.buffers())
        assert_computes(converted, model, mode, slices())


# What the copy keeps.


def test_eval_keeps_statistics_through_training_steps():
    """Nothing is written, neither the statistics nor the counter."""
    model = net(nn.BatchNorm2d(CHANNELS, momentum=None))
    converted = convert(model, "eval").train()
    assert converted.state_dict().keys() == model.state_dict().keys()
    converted(slices()[0]).sum().backward()
    for name, buffer in converted.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name))
    converted.load_state_dict(model.state_dict())


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": through_torch_save,
    **{
        f"pickle {protocol}": lambda m, p=protocol: pickle.loads(pickle.dumps(m, p))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, TanhNorm, nn.SyncBatchNorm])
@pytest.mark.parametrize("mode", EACH_ALONE)
def test_a_copy_of_the_copy_is_the_same(mode, norm, how):
    if (mode, norm) == ("group_norm", TanhNorm):
        norm = NamedOnly
    converted = convert(net(norm(CHANNELS)), mode)
    again = COPIES[how](converted)
    assert type(again[1]) is type(converted[1])
    for flag in (True, False):
        converted.train(flag), again.train(flag)
        assert again[1].training == converted[1].training
        torch.manual_seed(0)
        expected = converted(slices()[0])
        torch.manual_seed(0)
        assert torch.equal(again(slices()[0]), expected)
    state = again.state_dict()
    assert state.keys() == converted.state_dict().keys()


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_tied_weights_shared_layers_and_other_references_stay_shared(mode):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    model.append(model[0])
    model.norms = [model[0]]
    before = snapshot(model)
    converted = convert(model, mode)
    assert converted[3] is converted[0] and converted.norms[0] is converted[0]
    assert converted[1].weight is converted[0].weight
    assert len(list(converted.parameters())) == len(list(model.parameters())) == 5
    ours = {id(t) for t in (*model.parameters(), *model.buffers(), *model.modules())}
    theirs = (*converted.parameters(), *converted.buffers(), *converted.modules())
    assert ours.isdisjoint(map(id, theirs))
    assert_untouched(before, model)


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_hooks_dtypes_devices_and_flags_are_kept(mode):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Dropout())
    model[1] = nn.BatchNorm2d(4, device="meta", dtype=torch.bfloat16)
    model[2].eval()
    model[0].weight.requires_grad_(False)
    calls = []
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    converted = convert(model, mode)
    converted[0](torch.rand(2, 4, 3, 3))
    assert calls == ["before", "after"]
    assert converted.training and not converted[2].training
    assert not converted[0].weight.requires_grad and converted[0].bias.requires_grad
    for name, parameter in converted.named_parameters():
        original = model.get_parameter(name)
        assert parameter.dtype is original.dtype
        assert parameter.device == original.device


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_a_pruned_layer_keeps_its_mask(mode):
    """Pruning computes the weight in a hook, which reads the layer's own names."""
    model = net(nn.BatchNorm2d(CHANNELS, eps=EPS))
    prune.l1_unstructured(model[1], "weight", amount=3)
    with torch.no_grad():
        # torch copies no pruned layer whose weight still has its graph.
        model(slices()[0])
    converted = convert(model, mode, num_groups=GROUPS)
    x = slices()[0]
    params = dict(net(nn.BatchNorm2d(CHANNELS)).named_parameters())
    params["1.weight"] = model[1].weight_orig * model[1].weight_mask
    params["1.bias"] = model[1].bias
    params["0.weight"], params["0.bias"] = model[0].weight, model[0].bias
    torch.testing.assert_close(converted(x), written_out(model, mode, params, x))


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_a_compiled_model_is_converted_and_its_original_is_not(mode):
    model = net(nn.BatchNorm2d(CHANNELS, eps=EPS))
    compiled = torch.compile(model, backend="eager")
    compiled(slices()[0])
    before = snapshot(model)
    converted = convert(compiled, mode, num_groups=GROUPS)
    params = dict(model.named_parameters())
    expected = [written_out(model, mode, params, x) for x in slices()]
    for x, out in zip(slices(), expected):
        torch.testing.assert_close(converted(x), out)
    assert_untouched(before, model)


def test_a_compiled_layer_is_not_taken_for_the_layer_inside():
    compiled = torch.compile(nn.BatchNorm2d(4), backend="eager")
    assert type(next(convert(compiled, "group_norm").children())) is nn.GroupNorm


@pytest.mark.parametrize("mode", ["eval", "no_running_stats"])
def test_a_parametrized_layer_stays_parametrized(mode):
    model = net(nn.BatchNorm2d(CHANNELS))
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    assert parametrize.is_parametrized(convert(model, mode)[1], "weight")
    plain = copy.deepcopy(model)
    plain[1].train(mode != "eval")
    assert torch.equal(convert(model, mode)(slices()[0]), plain(slices()[0]))


def test_a_lazy_layer_is_converted_after_its_first_batch():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyConv2d(2, 1))
    model(torch.rand(2, 4, 3, 3))
    assert repr(convert(model, "group_norm")[0]).startswith("GroupNorm(4, 4")


def test_lazy_layers_that_are_not_norm_layers_may_wait():
    converted = convert(nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4)), "eval")
    assert converted(torch.rand(2, 3)).shape == (2, 4)


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_converting_twice_changes_nothing_more(mode):
    once = convert(net(TanhNorm(4) if mode == "eval" else nn.BatchNorm2d(4)), mode)
    twice = convert(once, mode)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert twice.state_dict().keys() == once.state_dict().keys()


# Builders.


@pytest.mark.parametrize("mode", EACH_ALONE)
def test_norm_layer_builds_what_convert_makes(mode):
    maker = pickle.loads(pickle.dumps(norm_layer(mode, num_groups=32)))
    built = TinyResNet(maker)
    plain = randomised(TinyResNet(nn.BatchNorm2d))
    converted = convert(plain, mode, num_groups=32)
    assert repr(built) == repr(converted)
    assert [type(m) for m in built.modules()] == [type(m) for m in converted.modules()]
    built.load_state_dict(converted.state_dict())
    x = torch.rand(5, 2, 3, 4, 4)
    assert torch.equal(vmap(built.train())(x), vmap(converted.train())(x))


@pytest.mark.parametrize(
    "mode, text",
    [
        ("eval", "EvalBatchNorm2d(64, eps=0.001, momentum=0.2, affine=True, "),
        ("no_running_stats", "BatchNorm2d(64, eps=0.001, momentum=0.2, affine=True, "),
        ("group_norm", "GroupNorm(16, 64, eps=0.001, affine=True"),
    ],
)
def test_norm_layer_passes_keywords_on(mode, text):
    layer = norm_layer(mode, num_groups=16)(64, eps=1e-3, momentum=0.2)
    assert repr(layer).startswith(text)
    assert norm_layer(mode)(64, dtype=torch.float64).weight.dtype is torch.float64
    assert list(norm_layer(mode)(64, affine=False).parameters()) == []


@pytest.mark.parametrize(
    "channels, num_groups, expected",
    [
        (64, 32, 32),
        (32, 32, 32),
        (48, 32, 48),
        (6, 32, 6),
        (6, 1, 1),
        (64, lambda c: c // 16, 4),
        (6, lambda c: 4, 6),
    ],
)
def test_groups_fall_back_to_one_a_channel(channels, num_groups, expected):
    assert groups_for(channels, num_groups) == expected


# Refusals.


def own_forward_on_the_instance():
    layer = nn.BatchNorm2d(4)
    layer.forward = torch.tanh
    return layer


def parametrized():
    layer = nn.BatchNorm2d(4)
    return parametrize.register_parametrization(layer, "weight", nn.Softplus())


def in_a_net(layer):
    return nn.Sequential(nn.Identity(), nn.Sequential(layer))


def lazy_with_loaded_weights():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model.load_state_dict(nn.Sequential(nn.BatchNorm2d(4)).state_dict())
    return model


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.script(nn.BatchNorm2d(4)))


MODE_LIST = 'Choose one of "eval", "no_running_stats", "group_norm".'
COUNT = "Pass an int of at least 1, or a callable from C to one."
LOSES = (
    ", which does more than nn.BatchNorm (a forward of its own, or a parametrization), "
    "and an nn.GroupNorm would lose that. Use vmap_safe(model, "
    'mode="group_norm"), or replace this layer by hand.'
)
UNSEEN = (
    " that has not seen a batch. Run the model on one batch first, then convert it."
)
SYNC = (
    '(...), mode="sync": the mode holds only while a block is open, as it needs '
    'statistics across the vmapped axis. Use vmap_safe(model, mode="sync").'
)
IN_NET = "convert(model, mode=\"group_norm\"): layer '1.0' is a "
REFUSED = [
    (
        lambda: convert(3, "eval"),
        TypeError,
        "convert(model, ...): model is 3, an int, not an nn.Module. Pass the model "
        "itself.",
    ),
    (
        lambda: convert(nn.ReLU(), "evall"),
        ValueError,
        f"convert(model, ...): unknown mode 'evall'. {MODE_LIST}",
    ),
    (
        lambda: norm_layer(["eval"]),
        ValueError,
        f"norm_layer(...): unknown mode ['eval']. {MODE_LIST}",
    ),
    (
        lambda: convert(nn.ReLU(), "sync"),
        ValueError,
        "convert" + SYNC.replace("...", "model, ..."),
    ),
    (lambda: norm_layer("sync"), ValueError, f"norm_layer{SYNC}"),
    (
        lambda: convert(nn.ReLU(), "eval", num_groups=0),
        ValueError,
        f"convert(model, ...): num_groups=0, which is below 1. {COUNT}",
    ),
    (
        lambda: norm_layer("eval", num_groups=-2),
        ValueError,
        f"norm_layer(...): num_groups=-2, which is below 1. {COUNT}",
    ),
    (
        lambda: norm_layer("eval", num_groups=True),
        TypeError,
        f"norm_layer(...): num_groups=True, which is not an int. {COUNT}",
    ),
    (
        lambda: norm_layer("eval", num_groups=2.0),
        TypeError,
        f"norm_layer(...): num_groups=2.0, which is not an int. {COUNT}",
    ),
    (
        lambda: convert(nn.BatchNorm1d(8), "group_norm", num_groups=lambda c: c // 16),
        ValueError,
        f"num_groups(8): it returned 0, which is below 1. {COUNT}",
    ),
    (
        lambda: groups_for(8, lambda c: c / 2),
        TypeError,
        f"num_groups(8): it returned 4.0, which is not an int. {COUNT}",
    ),
    (
        lambda: convert(in_a_net(TanhNorm(4)), "group_norm"),
        TypeError,
        f"{IN_NET}TanhNorm{LOSES}",
    ),
    (
        lambda: convert(TanhNorm(4), "group_norm"),
        TypeError,
        IN_NET.replace("layer '1.0'", "the model itself") + "TanhNorm" + LOSES,
    ),
    (
        lambda: convert(in_a_net(Steered(4)), "group_norm"),
        TypeError,
        f"{IN_NET}Steered{LOSES}",
    ),
    (
        lambda: convert(in_a_net(own_forward_on_the_instance()), "group_norm"),
        TypeError,
        f"{IN_NET}BatchNorm2d{LOSES}",
    ),
    (
        lambda: convert(in_a_net(parametrized()), "group_norm"),
        TypeError,
        f"{IN_NET}ParametrizedBatchNorm2d{LOSES}",
    ),
    (
        lambda: convert(in_a_net(nn.LazyBatchNorm1d()), "eval"),
        ValueError,
        f"convert(model, ...): layer '1.0' is a LazyBatchNorm1d{UNSEEN}",
    ),
    (
        lambda: convert(nn.LazyInstanceNorm2d(), "group_norm"),
        ValueError,
        f"convert(model, ...): the model itself is a LazyInstanceNorm2d{UNSEEN}",
    ),
    (
        lambda: convert(lazy_with_loaded_weights(), "no_running_stats"),
        ValueError,
        f"convert(model, ...): layer '0' is a LazyBatchNorm2d{UNSEEN}",
    ),
    (
        lambda: convert(scripted(), "eval"),
        TypeError,
        "convert(model, ...): layer '0' is TorchScript, which cannot be changed. "
        "Convert the model first, then script it.",
    ),
]


@pytest.mark.parametrize("call, error, text", REFUSED)
def test_each_refusal_says_what_was_found_and_what_to_do(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        call()
