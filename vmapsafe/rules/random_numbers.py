"""Memory for random numbers, so that every slice can draw its own into it.

Under vmap with ``randomness="different"`` torch refuses to fill an unbatched tensor
with random numbers in place, as torchvision's stochastic depth does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmapsafe._call import Call, Function
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, register
from vmapsafe._torch import slices_draw_their_own

_OPTIONS = {"size", "dtype", "device", "requires_grad"}


def _may_take_random_numbers(call: Call) -> bool:
    if torch.compiler.is_compiling() or not slices_draw_their_own():
        return False
    dtype = call.arguments.get("dtype") or torch.get_default_dtype()
    options = {name for name in call.arguments if not name.isdigit()}
    return options <= _OPTIONS and bool(dtype.is_floating_point)


def _one_a_slice(call: Call) -> Tensor:
    """Memory for each slice: torch.rand makes that, torch.empty one for all slices."""
    return _by(torch.rand, call)


def _memory(call: Call) -> Tensor:
    """Memory whose shape, dtype and device count; its values do not."""
    return _by(torch.empty, call)


def _by(function: Function, call: Call) -> Tensor:
    """The result of ``function`` for the arguments of ``call``."""
    sizes = [value for name, value in call.arguments.items() if name.isdigit()]
    options = {n: v for n, v in call.arguments.items() if not n.isdigit()}
    made: Tensor = function(*sizes, **options)
    return made


register(
    FunctionRule(
        name="memory of its own for each slice",
        functions=(torch.empty,),
        modes=MODES,
        accepts=_may_take_random_numbers,
        batched=_one_a_slice,
        reference=_memory,
    )
)
