"""Layers that vmap refuses, each for a reason of its own."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from nets import net
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint


class OldForm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


class WithoutRule(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


def assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = 0.5
    return y


def as_list(x: Tensor) -> Tensor:
    return x * torch.tensor(x.detach().flatten().tolist(), dtype=x.dtype).mean()


def written(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=x.dtype)
    y[0] = x[0]
    return x + y


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * x.mean().item(),
    "condition": lambda x: x if x.amax() > 0.8 else -2 * x,
    "mask": lambda x: x * x[x > 0].sum(),
    "mask, assigned": assigned,
    "list": as_list,
    "data": lambda x: x * x.data.mean(),
    "written": written,
    "old autograd.Function": OldForm.apply,
    "autograd.Function without a rule": WithoutRule.apply,
    "operation without a rule": lambda x: torch._foreach_add([x], 1.0)[0],
}


class Refused(nn.Module):
    """A function of the input times a weight, (N, 4, H, W) to the same."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.weight)


class Packed(nn.Module):
    """A recurrent layer over the positions, of which it leaves out the last."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.flatten(2).transpose(1, 2)
        size = steps.size(1)
        lengths = torch.full((len(x),), size - 1)
        packed = pack_padded_sequence(steps, lengths, batch_first=True)
        found, _ = self.rnn(packed)
        y, _ = pad_packed_sequence(found, batch_first=True, total_length=size)
        return y.transpose(1, 2).reshape(x.shape)


class Checkpointed(nn.Module):
    """A convolution in a checkpoint, if there is to be one."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.reentrant, self.is_on = reentrant, True

    def run(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_on:
            return self.run(x)
        y: Tensor = checkpoint(self.run, x, use_reentrant=self.reentrant)
        return y


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: functools.partial(Refused, f) for name, f in FUNCTIONS.items()},
    "packed": Packed,
}
CHECKPOINTS: dict[str, Callable[[], nn.Module]] = {
    "checkpoint": lambda: Checkpointed(False),
    "checkpoint, reentrant": lambda: Checkpointed(True),
}


def around(layer: nn.Module) -> nn.Sequential:
    """A network of images (N, 2, 5, 5) with a layer in it, in float64, that has seen a
    batch."""
    torch.manual_seed(1)
    first = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4)
    model = net(*first, layer, nn.Flatten(), nn.Linear(64, 3)).double()
    model(torch.randn(9, 2, 5, 5, dtype=torch.float64))
    return model


def refusing(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return around({**LAYERS, **CHECKPOINTS}[name]())


def unchecked(model: nn.Module) -> nn.Module:
    """A copy that does not have checkpoints."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Checkpointed):
            module.is_on = False
    return model


def numbers(*shape: int, seed: int = 5) -> Tensor:
    """Random ones, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
