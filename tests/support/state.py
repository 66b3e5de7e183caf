"""What a block must leave as it was."""

from typing import Any

import torch
from torch import nn

# Flags, hooks and tensors of each module or tensor, by name.
State = tuple[dict[str, Any], dict[str, list[int]], dict[str, Any]]


def everything(model: nn.Module) -> State:
    """All that a block must leave as it was, by value and by identity."""
    flags = {
        name: (m.training, getattr(m, "track_running_stats", None), sorted(vars(m)))
        for name, m in model.named_modules()
    }
    hooks = {
        name: [len(v) for k, v in vars(m).items() if k.endswith("_hooks")]
        for name, m in model.named_modules()
    }
    tensors = {
        name: (id(t), t._version, t.detach().clone(), t.requires_grad, t.grad)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    return flags, hooks, tensors


def assert_same_state(
    model: nn.Module, before: State, *, versions: bool = True
) -> None:
    flags, hooks, tensors = everything(model)
    assert flags == before[0]
    assert hooks == before[1]
    assert tensors.keys() == before[2].keys()
    for name, (identity, version, value, requires_grad, grad) in before[2].items():
        now = tensors[name]
        assert now[0] == identity, f"{name} is another tensor"
        assert now[1] == version or not versions, f"{name} was written"
        assert torch.equal(now[2], value), name
        assert now[3] == requires_grad and now[4] is grad, name
