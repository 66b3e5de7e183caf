"""In-place writes to the model's buffers, which a forward inside a block leaves out.

Hand-made normalisation layers update buffers of their own. Under vmap torch refuses
such a write, because one slice would see another's. Under grad torch refuses it too.
Inside a block the write does not happen: code that reads the buffer afterwards sees the
old value.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe._call import Call
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, register

_NOT_WRITES = {"requires_grad_", "detach_", "share_memory_", "rename_"}
_BY_OPERATOR = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)


def _in_place(names: Iterable[str]) -> list[str]:
    """The names that end in one underscore, torch's sign for writing in place."""
    return [n for n in names if n[-1] == "_" != n[0] and n not in _NOT_WRITES]


IN_PLACE = (
    *(getattr(Tensor, name) for name in _in_place(dir(Tensor)) if name[-2] != "_"),
    *(getattr(Tensor, f"__i{operator}__") for operator in _BY_OPERATOR),
    Tensor.__setitem__,
    Tensor.data.__set__,  # type: ignore[attr-defined]
    *(getattr(torch, name) for name in _in_place(dir(torch))),
    *(getattr(F, name) for name in _in_place(dir(F))),
    *(getattr(nn.init, name) for name in _in_place(dir(nn.init))),
)


def _target(call: Call) -> Tensor:
    target = next(iter(call.arguments.values()))
    assert isinstance(target, Tensor)
    return target


def _is_left_out(call: Call) -> bool:
    return call.site is not None and call.site.leaves_out(_target(call))


register(
    FunctionRule(
        name="in-place write to a buffer, left out",
        functions=IN_PLACE,
        modes=MODES,
        accepts=_is_left_out,
        batched=_target,
        reference=_target,
    )
)
