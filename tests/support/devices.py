"""A GPU that is not there: models on it, what it would wait for, its memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


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


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host would wait for the device, see :class:`_NoWaiting`."""
    # On "meta" torch.tensor copies nothing, as it does elsewhere.
    waiting = _NoWaiting()  # type: ignore[no-untyped-call]
    with mock.patch.object(torch, "tensor", _of_host), waiting:
        yield


class _NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators for which the host would wait for the device: those that read
    numbers, whose result has a shape that depends on numbers, or that copy from the
    host or to it.

    The tensors of the device are to be on "meta", which has no numbers. So what ends
    without an error allocates nothing there that depends on any, and can be captured as
    a CUDA graph.
    """

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = operator(*args, **(kwargs or {}))
        given = tree_flatten((args, kwargs, found))[0]
        where = {t.device.type for t in given if isinstance(t, Tensor)}
        assert len(where) < 2, f"{operator} is called with tensors on {where}"
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        assert tags.isdisjoint(operator.tags), f"{operator} waits for the device"
        assert operator.overloadpacket not in _WAITING, f"{operator} waits"
        return found


_tensor = torch.tensor


def _of_host(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    assert device is None, "torch.tensor copies numbers from the host"
    return _tensor(*args, **kwargs)


_WAITING = (torch.ops.aten.equal, torch.ops.aten.is_nonzero, torch.ops.aten.item)


class RunsOut(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A device that is full when memory is asked for the nth time.

    Args:
        at: n, from 0.
        only: the only operator that counts; by default all that take memory do.

    Attributes:
        seen: the operators that counted.
    """

    def __init__(self, at: int, only: Any = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.only = at, only
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        counts = self.only in (None, operator.overloadpacket)
        if counts and not operator.is_view:
            self.seen.append(operator.overloadpacket)
            if len(self.seen) > self.at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return operator(*args, **(kwargs or {}))
