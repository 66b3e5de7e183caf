"""In-place writes to the model's buffers, which a forward inside a block leaves out.

Hand-made normalisation layers update buffers of their own. Under vmap torch refuses
such a write, or one slice would see another's; under grad it refuses it too. What
reads the buffer afterwards sees the old value.
"""

from __future__ import annotations

from torch import Tensor

from vmapsafe._call import Call
from vmapsafe._rule import MODES, Rule, register

_NOT_WRITES = {"requires_grad_", "detach_", "share_memory_", "rename_"}
_BY_OPERATOR = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)

IN_PLACE = tuple(
    getattr(Tensor, name)
    for name in (
        *(n for n in dir(Tensor) if n[-1] == "_" != n[-2] and n not in _NOT_WRITES),
        *(f"__i{operator}__" for operator in _BY_OPERATOR),
        "__setitem__",
    )
    if name[0] != "_" or name.startswith("__")
)


def _target(call: Call) -> Tensor:
    target = call.arguments.get("self", call.arguments.get("0"))
    assert isinstance(target, Tensor)
    return target


def _target_is_a_buffer(call: Call) -> bool:
    return call.site is not None and call.site.holds(_target(call))


register(
    Rule(
        name="in-place write to a buffer, left out",
        functions=IN_PLACE,
        modes=MODES,
        accepts=_target_is_a_buffer,
        batched=_target,
        reference=_target,
    )
)
