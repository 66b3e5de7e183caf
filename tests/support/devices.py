"""Models on a GPU that is not there."""

import torch
from torch import nn


def on_fake_cuda(model: nn.Module) -> nn.Module:
    """The model with tensors without numbers on CUDA; call it under FakeTensorMode.

    They do not require a gradient: autograd would ask for the device (torch 2.13).
    """
    for module in model.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, b in [*module._buffers.items()]:
            if b is not None:
                empty = torch.empty(b.shape, dtype=b.dtype, device="cuda")
                module._buffers[name] = empty
    return model
