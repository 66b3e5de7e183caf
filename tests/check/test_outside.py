"""Modules that a model calls and does not register: found, named, left as they are."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import Keeps
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules import module as hooks

from vmapsafe import check, vmap_safe
from vmapsafe._modes import MODES

X = torch.randn(3, 4, 5, 5)


class Holds(nn.Module):
    """Calls what ``get`` finds in it, after a layer of its own."""

    def __init__(
        self, put: Callable[[Any], None], get: Callable[[Any], Callable[..., Any]]
    ) -> None:
        super().__init__()
        self.own = nn.Conv2d(4, 4, 1)
        self.get = get
        put(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.get(self)(self.own(x))
        return out


def body(norm: nn.Module | None = None) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), norm or nn.BatchNorm2d(4), nn.ReLU())
    if "running_mean" in net[1]._buffers and net[1].running_mean is not None:
        net[1].running_mean.fill_(0.3)
    return net


def in_vars(norm: nn.Module | None = None) -> nn.Module:
    return Holds(
        lambda self: self.__dict__.update(body=body(norm)), lambda self: self.body
    )


def in_a_list() -> nn.Module:
    return Holds(
        lambda self: setattr(self, "parts", [1, (body(),)]),
        lambda self: self.parts[1][0],
    )


def in_a_dict() -> nn.Module:
    return Holds(
        lambda self: setattr(self, "parts", {"a": body()}), lambda self: self.parts["a"]
    )


def in_an_object() -> nn.Module:
    return Holds(
        lambda self: setattr(self, "held", SimpleNamespace(net=body())),
        lambda self: self.held.net,
    )


def layer_by_layer() -> nn.Module:
    """Its own forward is never called."""

    def get(self: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for layer in self.body:
                x = layer(x)
            return x

        return run

    return Holds(lambda self: self.__dict__.update(body=body()), get)


@pytest.mark.parametrize(
    "build, code",
    [
        (in_vars, "model.body"),
        (lambda: in_vars(Keeps()), "model.body"),
        (in_a_list, "model.parts[1][0]"),
        (in_a_dict, "model.parts['a']"),
        (in_an_object, "model.held.net"),
        (layer_by_layer, "model.body"),
        (lambda: nn.Sequential(nn.Identity(), in_vars()), "model[1].body"),
    ],
)
@pytest.mark.filterwarnings("ignore::vmapsafe.LeftOutWarning")
def test_what_is_to_be_handed_over(build: Callable[[], nn.Module], code: str) -> None:
    """Without it vmap raises; with it, in each mode, vmap runs."""
    model = build()
    report = check(model, X)
    (finding,) = report
    assert finding.kind == "not registered" and finding.needs == "vmap_safe(model, ...)"
    assert finding.named == code and finding.module == "Sequential"
    assert f"vmap_safe(model, {code})" in finding.advice
    assert not any(report.safe(mode) for mode in MODES)
    assert report.to_do == f"use vmap_safe(model, {code}) for {code}."
    assert "It then runs under vmap and vmap(grad) in every mode" in str(report)
    other = eval(code, {"model": model})
    for mode in MODES:
        with pytest.raises(RuntimeError), vmap_safe(copy.deepcopy(model), mode=mode):
            vmap(lambda x: model(x[None]))(X)
        with vmap_safe(model, other, mode=mode):
            vmap(lambda x: model(x[None]))(X)


def test_one_that_no_attribute_holds() -> None:
    """It is found, and it stays as it is, though copies of the model call it itself."""
    other = body()
    model = Holds(lambda self: None, lambda self: other)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    tensors = {
        name: id(value) for name, value in other.state_dict(keep_vars=True).items()
    }
    report = check(model, X)
    assert [(f.path, f.kind, f.module) for f in report] == [
        ("", "not registered", "Sequential")
    ]
    assert "no attribute of the model holds" in report[0].detail
    assert "BatchNorm2d" in report[0].detail
    assert "in every mode" in str(report)
    now = other.state_dict(keep_vars=True)
    assert {name: id(value) for name, value in now.items()} == tensors
    for name, value in state.items():
        assert torch.equal(now[name], value), name
    assert other.training and type(other[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    "model",
    [
        in_vars(nn.BatchNorm2d(4).eval()),
        in_vars(nn.GroupNorm(2, 4)),
        in_vars(nn.InstanceNorm2d(4)),
        Holds(lambda self: None, lambda self: nn.ReLU()),
        # Held, and not called.
        Holds(lambda self: setattr(self, "parts", [body()]), lambda self: self.own),
        # Registered when it is first called.
        Holds(
            lambda self: None,
            lambda self: self._modules.setdefault("norm", nn.GroupNorm(2, 4)),
        ),
        # Held a second time.
        Holds(
            lambda self: self.__dict__.update(again=[self.own]),
            lambda self: self.again[0],
        ),
    ],
)
def test_what_need_not_be_handed_over(model: nn.Module) -> None:
    assert not [f for f in check(model, X) if f.kind == "not registered"]


def test_without_statistics() -> None:
    """Under vmap it runs uncovered; the modes that a rule computes do not reach it."""
    report = check(in_vars(nn.BatchNorm2d(4, track_running_stats=False)), X)
    (finding,) = report
    assert {m for m in MODES if not finding.safe[m]} == {"group_norm", "sync"}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_one_that_a_block_refuses() -> None:
    """It is reported, and not handed over in the runs."""
    traced = torch.jit.trace(body().eval(), X)
    model = Holds(
        lambda self: self.__dict__.update(body=traced), lambda self: self.body
    )
    report = check(model, X)
    assert "not registered" in [f.kind for f in report]


def test_other_threads_are_not_watched() -> None:
    """A module that another thread calls meanwhile is not the model's."""
    other = body()

    def get(self: Any) -> nn.Module:
        thread = threading.Thread(target=other, args=(X,))
        thread.start()
        thread.join()
        return nn.Identity()

    assert not check(Holds(lambda self: None, get), X)


def test_no_hook_is_left() -> None:
    before = len(hooks._global_forward_pre_hooks)
    check(in_vars(), X)
    assert len(hooks._global_forward_pre_hooks) == before
