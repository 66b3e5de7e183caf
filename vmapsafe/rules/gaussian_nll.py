"""The Gaussian negative log likelihood, whose check of the variances vmap cannot make.

``F.gaussian_nll_loss`` raises an error if a variance is negative. Under vmap a decision
by the numbers of one slice is not possible. The rule here looks at those of all slices.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Call
from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import MODES
from vmapsafe._rule import FunctionRule, register, slice_by_slice
from vmapsafe._torch import batched_levels, below_all, innermost

_CALLED = "F.gaussian_nll_loss"


def _has_batched_variances(call: Call) -> bool:
    var = call["var"]
    if torch.compiler.is_compiling() or not isinstance(var, Tensor):
        return False
    return not innermost(var).is_meta and bool(batched_levels((var,)))


def _loss(call: Call) -> Tensor:
    x, var, eps = call["input"], call["var"], call["eps"]
    with below_all():
        if (innermost(var) < 0).any():  # in torch's words
            raise VmapSafeValueError(
                _CALLED,
                "var has negative entry/entries",
                "Make variances positive, by F.softplus or torch.exp",
            )
    if var.shape != x.shape:
        var = _along_last(x, var)
    # torch clamps the numbers, and leaves the derivative as it is.
    var = torch.where(var < eps, eps + (var - var.detach()), var)
    loss = 0.5 * (torch.log(var) + (x - call["target"]) ** 2 / var)
    if call["full"]:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return _reduced(loss, call["reduction"])


def _along_last(x: Tensor, var: Tensor) -> Tensor:
    """Variances that several numbers share, in a shape that broadcasts."""
    if x.shape[:-1] == var.shape:
        return var.unsqueeze(-1)
    if x.dim() == var.dim():
        if sum([n for m, n in zip(x.shape, var.shape) if m != n]) == 1:
            return var
    raise VmapSafeValueError(
        _CALLED,
        f"var is of incorrect size {tuple(var.shape)}",
        f"Give one variance for each number of {tuple(x.shape)}, or for each row",
    )


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise VmapSafeValueError(
            _CALLED, f"{reduction} is not valid", 'Choose "none", "mean" or "sum"'
        )
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


# -- The slow form ---------------------------------------------------------------------


def _plain(call: Call) -> Tensor:
    """The logarithm of the normal distribution's density, negated."""
    x, mean, var = call["input"], call["target"], call["var"]
    var = var if var.dim() == x.dim() else var[..., None]
    loss = -torch.log(
        torch.exp(-((x - mean) ** 2) / (2 * var)) / (2 * math.pi * var).sqrt()
    )
    if not call["full"]:
        loss = loss - 0.5 * math.log(2 * math.pi)
    return _reduced(loss, call["reduction"])


register(
    FunctionRule(
        name="gaussian_nll_loss, under transforms",
        functions=(F.gaussian_nll_loss,),
        modes=MODES,
        accepts=_has_batched_variances,
        batched=_loss,
        reference=slice_by_slice(_plain),
    )
)
