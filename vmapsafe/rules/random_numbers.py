"""Random numbers: memory that every slice can draw into, and calls without a draw.

Under vmap with ``randomness="different"`` torch refuses to fill an unbatched tensor
with random numbers in place, as torchvision's stochastic depth does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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


# -- Without draws ---------------------------------------------------------------------

_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.feature_dropout),
)
_INTO = (
    *("bernoulli", "cauchy", "exponential", "geometric", "log_normal"),
    *("normal", "random", "uniform"),
)
_LIKE = torch.rand_like, torch.randn_like, torch.bernoulli, Tensor.bernoulli
# What stands in for the result of a function that draws: its first argument, or memory
# like that, or memory of a size. torch.compile cannot trace a set of functions.
_DRAWING: dict[Function, str] = {
    **dict.fromkeys(_DROPOUTS, "same"),
    **{getattr(Tensor, f"{name}_"): "same" for name in _INTO},
    **dict.fromkeys(_LIKE, "like"),
    **dict.fromkeys((torch.rand, torch.randn), "new"),
    F.scaled_dot_product_attention: "attention",
}


def without_draws(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make a call for the shape of its result, without a draw of random numbers."""
    kind = _DRAWING.get(function)
    if kind == "same":
        return args[0] if args else kwargs["input"]
    if kind == "like":
        return torch.empty_like(args[0] if args else kwargs["input"])
    if kind == "new":
        kwargs = {name: v for name, v in kwargs.items() if name != "generator"}
        return torch.empty(*args, **kwargs)
    if kind == "attention":
        if len(args) > 4:
            return function(*args[:4], 0.0, *args[5:], **kwargs)
        return function(*args, **{**kwargs, "dropout_p": 0.0})
    return function(*args, **kwargs)
