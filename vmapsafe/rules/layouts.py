"""Memory formats that vmap cannot make or query.

Inside vmap torch (2.13) refuses to make a slice channels last, or to say whether it is:
"NYI: querying is_contiguous inside of vmap", "required rank 4 tensor". These rules make
the format by moving the slice's channels, and answer the query from one slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmapsafe._call import Call
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, register
from vmapsafe._torch import batched_levels, first_slice

_LAST = {torch.channels_last: 4, torch.channels_last_3d: 5}
_LIKE = ("empty", "zeros", "ones", "full", "rand", "randn", "randint")


def _order(call: Call) -> torch.memory_format | None:
    """The memory format of the call if it is one of channels last, else None."""
    given = [v for v in call.arguments.values() if isinstance(v, torch.memory_format)]
    return given[0] if given and given[0] in _LAST else None


def _target(call: Call) -> Tensor:
    target: Tensor = next(v for v in call.arguments.values() if isinstance(v, Tensor))
    return target


def _is_asked_under_vmap(call: Call) -> bool:
    order = _order(call)
    if order is None:
        return False
    x = _target(call)
    return x.dim() == _LAST[order] and bool(batched_levels((x,)))


def _with_channels_last(call: Call) -> Tensor:
    given = {
        name: torch.contiguous_format if isinstance(v, torch.memory_format) else v
        for name, v in call.arguments.items()
    }
    positional = [given.pop(name) for name in [*given] if name.isdecimal()]
    y: Tensor = call.function(*positional, **given)
    return y.movedim(1, -1).contiguous().movedim(-1, 1)


def _is_contiguous(call: Call) -> bool:
    order = _order(call)
    assert order is not None
    return first_slice(_target(call)).is_contiguous(memory_format=order)


def _as_given(call: Call) -> Any:
    """The same values: the memory format is not a part of them."""
    return _target(call).clone()


register(
    FunctionRule(
        name="copy in another order, under vmap",
        functions=(
            *(Tensor.contiguous, Tensor.clone, Tensor.to, torch.clone),
            *(Tensor.double, Tensor.float, Tensor.half, Tensor.bfloat16),
            *(Tensor.cpu, Tensor.cuda),
            *(getattr(torch, f"{name}_like") for name in _LIKE),
        ),
        modes=MODES,
        accepts=_is_asked_under_vmap,
        batched=_with_channels_last,
        reference=_as_given,
    )
)
register(
    FunctionRule(
        name="is_contiguous in another order, under vmap",
        functions=(Tensor.is_contiguous,),
        modes=MODES,
        accepts=_is_asked_under_vmap,
        batched=_is_contiguous,
        reference=_as_given,
    )
)
