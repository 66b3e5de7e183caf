"""``check``: what it finds, that its verdicts are right, that it changes nothing."""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import random
import subprocess
import sys
import textwrap
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.lazy import LazyModuleMixin

from vmapsafe import NeverUpdatedWarning, VmapSafeError, check, vmap_safe
from vmapsafe.__main__ import COMMANDS, Command, main
from vmapsafe._check.command import add_arguments, run
from vmapsafe._check.report import Report
from vmapsafe._modes import MODES

ALL = set(MODES)


# -- Models ----------------------------------------------------------------------------


class Keeps(nn.Module):
    """A hand-made normalisation that keeps a mean, written in one way or another."""

    def __init__(self, write: str, name: str = "mu", frozen: bool = False) -> None:
        super().__init__()
        self.register_buffer(name, torch.full((4,), 0.3, dtype=torch.float64))
        if name == "running_mean":
            self.register_buffer("running_var", torch.ones(4, dtype=torch.float64))
        self.weight = nn.Parameter(torch.full((4,), 0.7, dtype=torch.float64))
        self.write, self.name, self.frozen = write, name, frozen

    def forward(self, x: Tensor) -> Tensor:
        buffer = getattr(self, self.name)
        if self.training and not self.frozen:
            mean = 0.1 * x.detach().mean(0)
            if self.write == "in place":
                buffer.mul_(0.9).add_(mean)
            elif self.write == "assigned":
                setattr(self, self.name, 0.9 * buffer + mean)
            elif self.write == "item":
                buffer[:2] = mean[:2]
            elif self.write == ".data =":
                buffer.data = 0.9 * buffer.data
            elif self.write == "parameter":
                with torch.no_grad():
                    self.weight.clamp_(max=0.5)
        return (x - getattr(self, self.name)) * self.weight


class Counts(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.data = self.num_batches_tracked.data + 1
        return super().forward(x)


class Builds(nn.Module):
    """Makes its layer in its first forward."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "layer"):
            self.layer = nn.BatchNorm1d(4, dtype=x.dtype)
        out: Tensor = self.layer(x)
        return out


class Calls(nn.Module):
    """A layer of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Twice(torch.autograd.Function):
    """A Function without a rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class NoWayBack(Twice):
    """A Function whose backward raises."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise ValueError("no way back")


class Between(nn.Module):
    """Calls a function before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(NoWayBack.apply(x))
        return out


class StochasticDepth(nn.Module):
    """Like torchvision's: known by its name, it draws in place into a new tensor."""

    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1, dtype=x.dtype).bernoulli_(1 - self.p)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cell(x[None])[0][0]
        return out


def after_a_linear(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *layers)


def frozen(model: nn.Sequential, i: int) -> nn.Sequential:
    model[i].eval()
    return model


def ctc(x: Tensor) -> Tensor:
    n = x.shape[0]
    steps = x[:, None].expand(n, 6, 4).log_softmax(-1).transpose(0, 1)
    targets = torch.ones(n, 2, dtype=torch.long)
    lengths = torch.full((n,), 6), torch.full((n,), 2)
    return F.ctc_loss(steps, targets, *lengths)


def images(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (4, 2, 2)), *layers)


class Case(NamedTuple):
    """A model of inputs (B, 4) and what is to be found: path, kind, unsafe modes.

    ``runs`` is False where torch ends the process under vmap(grad).
    """

    name: str
    build: Callable[[], nn.Module]
    found: list[tuple[str, str, set[str]]]
    runs: bool = True


SAFE: set[str] = set()
CASES = [
    Case("plain layers", lambda: after_a_linear(nn.LayerNorm(4), nn.GELU()), []),
    Case(
        "batch norm in eval",
        lambda: after_a_linear(nn.BatchNorm1d(4)).eval(),
        [
            ("1", "unsupported", {"no_running_stats"}),
            ("1", "unsupported", {"group_norm"}),
        ],
    ),
    Case("frozen batch norm", lambda: frozen(after_a_linear(nn.BatchNorm1d(4)), 1), []),
    Case(
        "batch norm in training, values for statistics",
        lambda: images(nn.BatchNorm2d(4)),
        [
            ("2", "mixes samples", SAFE),
            ("2", "writes buffers", SAFE),
        ],
    ),
    Case(
        "batch norm in training, one value a channel",
        lambda: after_a_linear(nn.BatchNorm1d(4)),
        [
            ("1", "mixes samples", SAFE),
            ("1", "writes buffers", SAFE),
            ("1", "unsupported", {"no_running_stats"}),
            ("1", "unsupported", {"group_norm"}),
        ],
    ),
    Case(
        "channels that num_groups divides",
        lambda: after_a_linear(nn.Linear(4, 64), nn.BatchNorm1d(64)),
        [
            ("2", "mixes samples", SAFE),
            ("2", "writes buffers", SAFE),
            ("2", "unsupported", {"no_running_stats"}),
        ],
    ),
    Case(
        "batch norm without running statistics",
        lambda: images(nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        [
            ("2", "mixes samples", SAFE),
        ],
    ),
    Case(
        "the same, frozen",
        lambda: frozen(images(nn.BatchNorm2d(4, track_running_stats=False)), 2),
        [
            ("2", "mixes samples", SAFE),
        ],
    ),
    Case(
        "instance norm with statistics",
        lambda: images(nn.InstanceNorm2d(4, track_running_stats=True)),
        [
            ("2", "writes buffers", SAFE),
        ],
    ),
    Case("instance norm without", lambda: images(nn.InstanceNorm2d(4)), []),
    *[
        Case(
            f"hand-made, {write}",
            lambda write=write: after_a_linear(Keeps(write)),
            [
                ("1", "writes buffers", SAFE),
            ],
        )
        for write in ("in place", "assigned", "item")
    ],
    Case(
        "hand-made, running_mean",
        lambda: after_a_linear(Keeps("in place", "running_mean")),
        [
            ("1", "writes buffers", SAFE),
        ],
    ),
    Case("hand-made, eval", lambda: after_a_linear(Keeps("in place")).eval(), []),
    Case(
        "FrozenBatchNorm",
        lambda: after_a_linear(Keeps("in place", "running_mean", True)),
        [],
    ),
    Case(
        "hand-made, .data =",
        lambda: after_a_linear(Keeps(".data =")),
        [
            ("1", "writes buffers", SAFE),
        ],
    ),
    Case(
        "batch norm that counts by .data =",
        lambda: nn.Sequential(Counts(4, track_running_stats=True)),
        [
            ("0", "mixes samples", SAFE),
            ("0", "writes buffers", SAFE),
            ("0", "unsupported", {"no_running_stats"}),
            ("0", "unsupported", {"group_norm"}),
        ],
    ),
    Case(
        "a parameter written",
        lambda: after_a_linear(Keeps("parameter")),
        [
            ("1", "writes buffers", ALL),
        ],
        runs=False,
    ),
    Case("dropout", lambda: after_a_linear(nn.Dropout(0.5)), [("1", "random", ALL)]),
    Case("dropout in eval", lambda: frozen(after_a_linear(nn.Dropout(0.5)), 1), []),
    Case("dropout of nothing", lambda: after_a_linear(nn.Dropout(0.0)), []),
    Case(
        "a random function",
        lambda: after_a_linear(Calls(lambda x: x + torch.randn_like(x))),
        [
            ("1", "random", ALL),
        ],
    ),
    Case(
        "two random functions",
        lambda: nn.Sequential(Calls(F.dropout), nn.Linear(4, 4), Calls(F.dropout)),
        [("0", "random", ALL), ("2", "random", ALL)],
    ),
    Case(
        "stochastic depth",
        lambda: after_a_linear(StochasticDepth()),
        [
            ("1", "random", ALL),
        ],
    ),
    Case(
        "an autograd.Function",
        lambda: after_a_linear(Calls(Twice.apply)),
        [
            ("1", "unsupported", ALL),
        ],
    ),
    Case(
        "an error in the backward pass",
        lambda: after_a_linear(
            nn.Sequential(nn.Linear(4, 4), Calls(NoWayBack.apply)), nn.Linear(4, 4)
        ),
        [
            ("1.1", "unsupported", ALL),
        ],
    ),
    Case(
        "an error in the backward pass, between layers",
        lambda: nn.Sequential(nn.Linear(4, 4), Between()),
        [("1", "unsupported", ALL)],
    ),
    Case(
        "the value of a tensor",
        lambda: after_a_linear(Calls(lambda x: x * x.max().item())),
        [
            ("1", "unsupported", ALL),
        ],
    ),
    Case(
        "a lazy layer",
        lambda: after_a_linear(nn.LazyLinear(3, dtype=torch.float64)),
        [
            ("1", "unsupported", ALL),
        ],
    ),
    Case("LSTM", lambda: after_a_linear(Recurrent()), []),
    Case(
        "an operation without a batching rule",
        lambda: after_a_linear(Calls(lambda x: torch._foreach_add([x], 1.0)[0])),
        [
            ("1", "unsupported", ALL),
        ],
    ),
    Case(
        "a fallback",
        lambda: after_a_linear(Calls(ctc)),
        [
            ("", "slow fallback", SAFE),
            ("1", "slow fallback", SAFE),
        ],
    ),
    Case(
        "inputs that do not fit",
        lambda: after_a_linear(nn.Linear(5, 5)),
        [
            ("1", "unsupported", ALL),
        ],
    ),
]
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def built(case: Case) -> tuple[nn.Module, Tensor]:
    """The model, with statistics of some batches, and an example for it."""
    torch.manual_seed(0)
    model = case.build().double()
    for module in model.modules():
        for name in ("running_mean", "running_var"):
            buffer = module._buffers.get(name)
            if buffer is not None and not isinstance(module, Keeps):
                buffer.uniform_(0.5, 1.5)
    return model, torch.randn(3, 4, dtype=torch.float64)


# -- What is found ---------------------------------------------------------------------


@CASE
def test_findings(case: Case) -> None:
    """Each case's findings are those written beside it: where, what, which modes."""
    model, x = built(case)
    report = check(model, x)
    found = [
        (f.path, f.kind, {mode for mode in MODES if not f.safe[mode]}) for f in report
    ]
    assert found == case.found
    for finding in report:
        module = model.get_submodule(finding.path)
        assert finding.module == type(module).__name__
        assert set(finding.becomes) == set(finding.safe) == ALL
    for mode in MODES:
        assert report.safe(mode) is all(mode not in unsafe for *_, unsafe in found)
        alone = check(model, x, mode=mode)
        assert alone.modes == (mode,)
        assert alone.safe(mode) is report.safe(mode)


@pytest.mark.parametrize("mode", MODES)
@CASE
def test_a_verdict_is_what_happens(case: Case, mode: str) -> None:
    """``safe(mode)`` exactly if vmap and vmap(grad) run in a block of that mode and
    give what a loop over the slices gives there."""
    if not case.runs:
        pytest.skip("ends the process (torch 2.13)")
    model, x = built(case)
    assert check(model, x, mode=mode).safe(mode) is _agrees_with_a_loop(model, x, mode)


def _agrees_with_a_loop(model: nn.Module, x: Tensor, mode: str) -> bool:
    if any(isinstance(m, LazyModuleMixin) for m in model.modules()):
        with pytest.raises(ValueError, match="lazy"), vmap_safe(model, mode=mode):
            pass
        return False
    params = {n: p.detach() for n, p in model.named_parameters()}

    def out(x: Tensor) -> Tensor:
        result: Tensor = model(x[None])
        return result

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x[None],)).sin().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with vmap_safe(model, mode=mode):
                outs = vmap(out)(x)
                rows = vmap(grad(loss), (None, 0))(params, x)
                if mode == "sync":  # no loop has its meaning; see test_sync
                    return True
                for i in range(len(x)):
                    torch.testing.assert_close(outs[i], out(x[i]))
                    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
                    loss(leaves, x[i]).backward()
                    for name, leaf in leaves.items():
                        expected = torch.zeros_like(leaf)
                        expected = expected if leaf.grad is None else leaf.grad
                        torch.testing.assert_close(rows[name][i], expected)
        except (RuntimeError, ValueError, AssertionError):
            return False
    return True


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_randomness_that_is_passed_makes_dropout_safe(randomness: str) -> None:
    """The finding stays, and its verdict changes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    report = check(model, torch.randn(2, 4), randomness=randomness)
    assert [finding.kind for finding in report] == ["random"]
    assert all(report.safe(mode) for mode in MODES)


def test_a_generator_of_its_own() -> None:
    """A draw that does not move torch's generators is found by the error of vmap."""
    generator = torch.Generator()

    def noise(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=generator)

    report = check(after_a_linear(Calls(noise)), torch.randn(2, 4))
    assert [(f.path, f.kind) for f in report] == [("1", "random")]


@pytest.mark.parametrize(
    "build, kinds",
    [
        (lambda: nn.Dropout(0.1), ["random"]),
        (lambda: nn.MultiheadAttention(4, 1, dropout=0.1), ["random"]),
        (lambda: nn.MultiheadAttention(4, 1), []),
        (lambda: nn.LSTM(4, 4, 2, dropout=0.1), ["random"]),
        (lambda: nn.LSTM(4, 4, 2, dropout=0.1).eval(), []),
        (StochasticDepth, ["random"]),
        (lambda: nn.SyncBatchNorm(4), ["mixes samples", "writes buffers"]),
        (lambda: nn.LazyBatchNorm1d(), ["unsupported"]),
        (lambda: Keeps("in place"), []),
    ],
)
def test_without_an_example(build: Callable[[], nn.Module], kinds: list[str]) -> None:
    """Flags are looked at without a run, and the report says that nothing was run."""
    report = check(build())
    assert [finding.kind for finding in report] == kinds
    assert not report.tried
    assert "Without an example only the layers were looked at" in str(report)
    assert not check(build(), mode="eval").tried


@pytest.mark.parametrize("num_groups, channels, unsafe", [(2, 4, False), (3, 4, True)])
def test_num_groups(num_groups: int, channels: int, unsafe: bool) -> None:
    """The report says when num_groups does not divide the channels."""
    model = nn.Sequential(nn.BatchNorm1d(channels))
    report = check(model, torch.randn(2, 4), mode="group_norm", num_groups=num_groups)
    assert report.safe("group_norm") is not unsafe
    assert ("not a multiple of num_groups" in report[0].becomes["group_norm"]) is unsafe


def test_every_mode_has_its_words() -> None:
    """Each mode has its own text about a batch norm."""
    mixes, _ = check(nn.BatchNorm2d(4))
    assert len(set(mixes.becomes.values())) == len(MODES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Nothing is found in a linear layer of any dtype."""
    assert len(check(nn.Linear(3, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype))) == 0


def test_trees_of_inputs() -> None:
    """Several inputs, keyword inputs, numbers beside tensors, outputs in a dict."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor, by: float, *, mask: Tensor) -> dict[str, Any]:
            return {"y": (x * by)[mask > 0].sum(), "by": by}

    x, mask = torch.randn(2, 3), torch.ones(2, 3)
    for report in (
        check(nn.MSELoss(), x, mask),
        check(nn.MSELoss(), (x, mask)),
        check(nn.MSELoss(), {"input": x, "target": mask}),
    ):
        assert report.tried and len(report) == 0
    (finding,) = check(Scaled(), {"x": x, "by": 2.0, "mask": mask}, mode="eval")
    assert finding.kind == "unsupported" and "data-dependent" not in finding.advice


@pytest.mark.parametrize("around", ["no_grad", "inference_mode", "vmap_safe", "meta"])
def test_what_is_around_the_call_does_not_matter(around: str) -> None:
    """The findings are the same as outside, also in a block around the same model."""
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4).eval(),
        Keeps("in place", "running_mean"),
        Calls(NoWayBack.apply),
    ).double()
    for norm in model[1:3]:
        norm.running_mean.fill_(0.2)
    x = torch.randn(2, 4, dtype=torch.float64)
    contexts: dict[str, contextlib.AbstractContextManager[Any]] = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "vmap_safe": vmap_safe(model, mode="eval"),
        "meta": torch.device("meta"),
    }
    expected = check(model, x, mode="eval")
    assert [f.path for f in expected] == ["1", "1", "3", "4"]
    with contexts[around]:
        found = check(model, x, mode="eval")
    assert list(found) == list(expected)


def test_wrapped_models() -> None:
    """Paths are those of the model inside DataParallel."""
    model = nn.DataParallel(nn.Sequential(nn.BatchNorm2d(4)))
    report = check(model, torch.randn(2, 4, 3, 3))
    assert report.model == "Sequential"
    assert {finding.path for finding in report} == {"0"}


def test_a_model_on_meta() -> None:
    """Errors show without values."""
    model = after_a_linear(Calls(Twice.apply)).to("meta")
    (finding,) = check(model, torch.randn(2, 4, device="meta"), mode="eval")
    assert (finding.path, finding.kind) == ("1", "unsupported")


def test_torchscript_is_refused_where_a_block_refuses_it() -> None:
    """In all modes but "eval"; the report names the outer module only."""
    report = check(torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    (finding,) = report
    assert finding.path == "" and "TorchScript" in finding.detail
    assert {mode for mode in MODES if finding.safe[mode]} == {"eval"}


# -- That nothing changes --------------------------------------------------------------


class Raises(nn.Module):
    """Raises in its n-th call, after a write and a draw."""

    calls = 0

    def __init__(self, error: BaseException, at: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.error, self.at = error, at

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        torch.rand(3)
        random.random()
        type(self).calls += 1
        if type(self).calls >= self.at:
            raise self.error
        return x


class Held(nn.Module):
    """Its forward is a closure, which writes to the original, not to the copy."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(4, dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
        mu, weight = self.mu, self.weight

        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                weight.mul_(0.5)
            mu.add_(1.0)
            return x * mu.sum()

        self.forward = forward  # type: ignore[method-assign]


class ItsOwnCopy(nn.BatchNorm1d):
    def __deepcopy__(self, memo: Any) -> ItsOwnCopy:
        return self


def with_a_tensor_of_a_graph() -> nn.Module:
    model = after_a_linear(nn.BatchNorm1d(4))
    model.cached = model[0].weight * 2  # type: ignore[assignment]
    return model


UNCHANGED = [
    *CASES,
    Case("a layer made in the forward", Builds, []),
    Case("an input written", lambda: Calls(lambda x: x.mul_(2.0)), []),
    Case("an original that is held", Held, []),
    Case("its own copy", lambda: ItsOwnCopy(4), []),
    Case("no copy", with_a_tensor_of_a_graph, []),
    *[
        Case(f"raises {error!r} in call {at}", lambda e=error, at=at: Raises(e, at), [])
        for error in (RuntimeError("no"), TypeError("no"), KeyboardInterrupt())
        for at in range(1, 12, 3)
    ],
]


@pytest.mark.parametrize("case", UNCHANGED, ids=lambda case: case.name)
def test_nothing_changes(case: Case) -> None:
    """What stays: values and identity of all tensors, gradients, flags, hooks and
    attributes; the example; the generators; torch's modes and warning filters."""
    Raises.calls = 0
    model, x = built(case)
    with contextlib.suppress(ValueError, TypeError):  # those that cannot be copied
        model.register_forward_hook(lambda *_: None)
    for i, parameter in enumerate(model.parameters()):
        if i % 2 == 0 and not isinstance(parameter, nn.UninitializedParameter):
            parameter.grad = torch.rand_like(parameter)
    before, x_before = _state_of(model), x.clone()
    with contextlib.suppress(KeyboardInterrupt):
        str(check(model, x))
    assert _state_of(model) == before
    assert torch.equal(x, x_before) and x._version == 0


def _state_of(model: nn.Module) -> list[Any]:
    """The state of a model and of what is around it, to compare with ==."""
    state: list[Any] = []
    for name, module in model.named_modules():
        state.append((name, id(module), type(module), sorted(vars(module))))
        for key, value in vars(module).items():
            if isinstance(value, dict):
                state.append([(k, id(v)) for k, v in value.items()])
            else:
                state.append((key, id(value)))
    tensors: list[Tensor | None] = [*model.parameters(), *model.buffers()]
    for tensor in [*tensors, *(p.grad for p in model.parameters())]:
        if isinstance(tensor, nn.UninitializedParameter) or tensor is None:
            state.append(id(tensor))
        else:
            bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            state.append((id(tensor), tensor.requires_grad, bits.tolist()))
    state += [torch.get_rng_state().tolist(), random.getstate()]
    state += [torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    state += [torch._C._len_torch_function_stack(), torch.is_grad_enabled()]
    state += [list(warnings.filters), warnings.showwarning]
    state += [len(nn.modules.module._global_forward_hooks)]
    return state


def test_the_comparison_sees_changes() -> None:
    """A forward changes the state that :func:`test_nothing_changes` compares."""
    model, x = built(Case("", lambda: after_a_linear(nn.BatchNorm1d(4)), []))
    before = _state_of(model)
    model(x)
    assert _state_of(model) != before


def test_a_tensor_in_use_is_not_touched() -> None:
    """A backward pass that the user has yet to run still works."""
    model = after_a_linear(nn.BatchNorm1d(4))
    loss = model(torch.randn(3, 4)).square().sum()
    check(model, torch.randn(3, 4))
    loss.backward()


def test_the_warning_of_a_block_still_comes() -> None:
    """A block warns once for each class; check does not use that up."""

    class Fresh(nn.Sequential):
        pass

    model = Fresh(nn.BatchNorm1d(4))
    report = check(model, torch.randn(2, 4), mode="eval")
    assert "never updated" in report[0].becomes["eval"]
    with pytest.warns(NeverUpdatedWarning):
        with vmap_safe(model):
            pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    """The findings are those on the CPU, and the GPU's generator is put back."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).cuda()
    before = torch.cuda.get_rng_state()
    report = check(model, torch.randn(2, 3, 5, 5, device="cuda"))
    kinds = ["mixes samples", "writes buffers", "random"]
    assert [finding.kind for finding in report] == kinds
    assert torch.equal(torch.cuda.get_rng_state(), before)


# -- What it says ----------------------------------------------------------------------


@CASE
def test_the_text_is_narrow(case: Case) -> None:
    """Lines have at most 100 characters and no blanks at their end."""
    model, x = built(case)
    for _ in range(6):
        model = nn.ModuleDict({"a_rather_long_name_of_a_block": model})
        model.forward = model["a_rather_long_name_of_a_block"].forward
    for report in (check(model), check(model, x)):
        for line in f"{report}\n{report.details()}".split("\n"):
            assert len(line) <= 100 and line == line.rstrip()


def test_nothing_to_report_is_one_sentence() -> None:
    """The report is one sentence, without notes and table."""
    report = check(nn.Linear(4, 4), torch.randn(2, 4))
    assert not report and report.notes == ()
    assert textwrap.dedent(str(report)).replace("\n", " ") == (
        "check(Linear): nothing to report; no layer mixes samples, writes buffers or "
        "draws random numbers, and the example ran under vmap and vmap(grad)."
    )


def test_a_report_is_a_sequence() -> None:
    """len, iteration, indices and slices work; findings are frozen and comparable."""
    report = check(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()))
    assert len(report) == 3 and len(list(report)) == 3
    assert report[-1].kind == "random" and report[:2] == tuple(report)[:2]
    assert repr(report) == "<Report of Sequential: 3 findings>"
    assert copy.deepcopy(report[0]) == report[0] != report[1]
    with pytest.raises(AttributeError):
        report[0].path = "elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize(
    "model, note",
    [
        (with_a_tensor_of_a_graph(), "could not be copied (RuntimeError: Only Tensors"),
        (ItsOwnCopy(4), "could not be copied (the copy shares modules"),
        (nn.LazyLinear(3), "The model is lazy, so nothing was run"),
        (nn.BatchNorm1d(4), ""),
    ],
)
def test_what_was_not_looked_at_is_said(model: nn.Module, note: str) -> None:
    """A model that cannot be run on a copy is not run, and the report says so."""
    report = check(model, torch.randn(2, 4))
    assert note in " ".join(str(report).split())
    assert bool(note) is not report.tried


NO_LOOP = 'fallback="loop" does not take it.'


def test_an_error_of_a_rule() -> None:
    """The finding has the parts of the error that the user will see."""
    model, x = nn.Sequential(nn.BatchNorm1d(4)), torch.randn(2, 4)
    finding = check(model, x, mode="no_running_stats")[-1]
    with pytest.raises(VmapSafeError) as caught:
        with vmap_safe(model, mode="no_running_stats"):
            vmap(lambda x: model(x[None]))(x)
    assert finding.detail == f"in slices of one, {caught.value.found}"
    assert finding.advice == f"{caught.value.do}. {NO_LOOP}"


def test_a_refusal_at_entry() -> None:
    """The finding has the parts of the error without the layer, which is its path."""
    model = nn.Sequential(nn.LazyLinear(3))
    (finding,) = check(model, mode="eval")
    with pytest.raises(VmapSafeError) as caught, vmap_safe(model, mode="eval"):
        pass
    assert caught.value.found == f"'0' (LazyLinear) {finding.detail}"
    assert f"{caught.value.do}. {NO_LOOP}" == finding.advice


@pytest.mark.parametrize(
    "function, detail, advice",
    [
        (Twice.apply, "under vmap it raises RuntimeError: ", "a vmap staticmethod"),
        (
            NoWayBack.apply,
            "under vmap(grad) it raises ValueError: no way back",
            "Take it out of the function that is mapped",
        ),
        (
            lambda x: x.no_such_method(),
            "without vmap too, it raises AttributeError: ",
            "Make sure that model(*example) runs, on a batch of one too.",
        ),
    ],
)
def test_another_error(
    function: Callable[[Tensor], Tensor], detail: str, advice: str
) -> None:
    """The finding says under what it was raised; the advice is that of a block."""
    (finding,) = check(after_a_linear(Calls(function)), torch.randn(2, 4))
    assert finding.detail.startswith(detail) and advice in finding.advice


def test_a_plain_call_that_raises_is_said() -> None:
    """A batch norm in training refuses one sample, which is safe in "eval"."""
    report = check(nn.BatchNorm1d(4), torch.randn(1, 4), mode="eval")
    assert report.safe("eval")
    assert "A plain call on the example raised (ValueError" in str(report)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: check("net"), TypeError, "'net' is a str, not an nn.Module"),
        (lambda: check(nn.ReLU(), mode="train"), ValueError, "unknown mode 'train'"),
        (lambda: check(nn.ReLU(), randomness="some"), ValueError, "'some'.*\"same\""),
        (
            lambda: check(nn.ReLU(), num_groups=0),
            ValueError,
            "num_groups=0, which is below 1",
        ),
        (lambda: check(nn.ReLU(), 3.0), ValueError, "none, have no batch in common"),
        (lambda: check(nn.ReLU(), torch.zeros(0, 2)), ValueError, r"\(0, 2\), have no"),
        (
            lambda: check(nn.ReLU(), torch.zeros(2, 3), torch.zeros(4, 3)),
            ValueError,
            r"\(2, 3\), \(4, 3\), have no batch in common.*check\(model, x\[:2\]\)",
        ),
        (
            lambda: check(nn.ReLU(), mode="eval").safe("group_norm"),
            ValueError,
            'about "eval" only. Write check',
        ),
        (lambda: check(nn.ReLU()).safe("train"), ValueError, "unknown mode 'train'"),
    ],
)
def test_bad_calls(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    """The error names what was found and what to write."""
    with pytest.raises(error, match=text):
        call()


# -- The command line ------------------------------------------------------------------

NETS = """
import torch
from torch import nn

def dropout():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout())

def norm():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

ready = nn.Linear(4, 4)
class Nets:
    linear = nn.Linear
    embedding = nn.Sequential(nn.Embedding(2, 3))
number = 3
def raises():
    raise OSError("no such weights")
"""


@pytest.mark.parametrize(
    "arguments, status",
    [
        ("ready --input 2,4", 0),
        ("ready --input 2,4 --dtype float64", 0),
        ("ready", 0),
        ("ready --input 2,5", 1),
        ("dropout --input 2,4", 1),
        ("dropout --input 2,4 --randomness different", 0),
        ("dropout", 1),
        ("norm --input 2,4", 0),
        ("norm --input 2,4 --mode eval", 0),
        ("norm --input 2,4 --mode no_running_stats", 1),
        ("Nets.embedding --input 2,3 --dtype int64", 0),
    ],
)
def test_exit_status(
    arguments: str, status: int, nets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 if the mode, "eval" by default, is safe, else 1; the report is printed."""
    assert _run(f"{nets}:{arguments}") == status
    printed = capsys.readouterr()
    assert printed.out.startswith("check(") and printed.err == ""


@pytest.mark.parametrize(
    "target, error",
    [
        ("{nets}", "is not of the form module:name."),
        ("{nets}:", "is not of the form module:name."),
        ("no_such_module:net", "ModuleNotFoundError: No module named"),
        ("{nets}:absent", "AttributeError: module"),
        ("{nets}:number", "TypeError: 'int' object is not callable"),
        ("{nets}:Nets", "gives a Nets, not an nn.Module."),
        ("{nets}:Nets.linear", "missing 2 required positional arguments"),
        ("{nets}:raises", "cannot load '{nets}:raises': OSError: no such weights."),
    ],
)
def test_bad_usage(
    target: str, error: str, nets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status is 2, and one sentence is printed."""
    assert _run(target.format(nets=nets)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("vmapsafe check: ")
    assert error.format(nets=nets) in printed.err


@pytest.mark.parametrize(
    "option, error",
    [
        ("--input 2,x", "'2,x' is not a shape, write e.g. 2,3,64,64"),
        ("--input 0,3", "'0,3' is not a shape"),
        ("--dtype nn", "'nn' is not a dtype of torch"),
        ("--mode train", "invalid choice: 'train'"),
    ],
)
def test_bad_options(
    option: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status is 2, by argparse, with our texts."""
    with pytest.raises(SystemExit) as left:
        _run(f"nets:ready {option}")
    assert left.value.code == 2
    assert error in capsys.readouterr().err


def test_it_is_a_sub_command(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m vmapsafe check`` runs it."""
    assert main(["check", f"{nets}:dropout", "--mode", "eval"]) == 1
    assert capsys.readouterr().out.startswith("check(Sequential): pass randomness=")


def _run(arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(arguments.split()))


@pytest.fixture
def nets(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory, which is not on sys.path."""
    name = f"nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("nowhere")  # whose undoing takes out what run puts in
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    return name


@pytest.mark.skipif(os.name != "posix", reason="needs a shell with pipes")
@pytest.mark.parametrize(
    "arguments,status",
    [
        ("check torch.nn:Identity --input 2,3", 0),
        ("check torch.nn:Dropout --input 2,3", 1),
        ("check torch.nn:Nope", 2),
        ("--version", 0),
        ("check --help", 0),
    ],
)
def test_into_a_pipe_that_is_closed(arguments: str, status: int) -> None:
    """As by ``| head``: without a traceback, and with the status without a pipe."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-W", "ignore", "-m", "vmapsafe", *arguments.split()]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    # argparse of Python 3.11.2 says that it could not print; later ones do not.
    by_argparse = {141} if arguments in ("--version", "check --help") else set()
    assert ended.returncode in {status} | by_argparse
    assert "Traceback" not in ended.stderr and "BrokenPipe" not in ended.stderr


def test_a_command_whose_reader_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that prints as it goes stops there, as by SIGPIPE."""

    def run(arguments: argparse.Namespace) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("os.dup2", lambda *_: None)
    command = Command("what it does", lambda parser: None, run)
    monkeypatch.setitem(COMMANDS, "greet", command)
    with open(os.devnull, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert main(["greet"]) == 141


# -- Memory ----------------------------------------------------------------------------


class RaisesInSteps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return x * float(x.sum())
        except RuntimeError as error:
            raise ValueError("in other words") from error


@pytest.mark.parametrize(
    "last",
    [nn.Identity(), nn.BatchNorm1d(4), RaisesInSteps(), nn.Dropout(), nn.Flatten(9)],
)
@pytest.mark.filterwarnings("ignore::vmapsafe.NeverUpdatedWarning")
def test_no_model_is_kept_alive(last: nn.Module) -> None:
    """Neither the model nor a copy of it: all memory is free again."""

    def alive() -> int:
        return sum(type(thing) is Marked for thing in gc.get_objects())

    def checked() -> tuple[weakref.ref[nn.Module], Report]:
        model = nn.Sequential(Marked(4, 4), nn.BatchNorm1d(4), last)
        return weakref.ref(model), check(model, torch.randn(6, 4))

    gc.collect()
    before = alive()
    found = [checked() for _ in range(2)]
    gc.collect()
    assert not any(reference() for reference, _ in found)
    assert alive() == before


class Marked(nn.Linear):
    """Tests find it by its class."""
