"""Losses of each sample of a batch, see ``alike``."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vmapsafe._call import Function, Signature
from vmapsafe.rules.alike import (
    NUMBERS,
    Batch,
    Found,
    NotAlike,
    bound,
    place_of,
    treat_alike,
)


def _reduced(each: Tensor, reduction: Any) -> Found:
    """A loss of each sample, from the losses (B, ...) of its numbers."""
    if reduction == "none":
        return each, 0
    if reduction not in ("mean", "sum"):
        raise NotAlike
    if each.dim() > 1:
        each = each.flatten(1)
        each = each.mean(1) if reduction == "mean" else each.sum(1)
    return each, NUMBERS


_LEGACY = ("size_average", "reduce")


def _by_class(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    names = ("input", "target", "weight", *_LEGACY[:1], "ignore_index", *_LEGACY[1:])
    given = bound((*names, "reduction", "label_smoothing"), args, kwargs)
    x, target = given["input"], given["target"]
    if place_of(batch, x) or place_of(batch, target) or x.dim() < 2:
        raise NotAlike
    if any([given.get(name) is not None for name in ("weight", *_LEGACY)]):
        raise NotAlike
    reduction = given.get("reduction", "mean")
    rest = {}
    if func is F.cross_entropy:
        rest["label_smoothing"] = given.get("label_smoothing", 0.0)
    if target.is_floating_point():  # probabilities of the classes
        if func is not F.cross_entropy or target.shape != x.shape:
            raise NotAlike
        return _reduced(func(x, target, reduction="none", **rest), reduction)
    ignored = given.get("ignore_index", -100)
    if target.shape != (len(x), *x.shape[2:]) or _holds(target, ignored):
        raise NotAlike  # a mean is over those that are not ignored
    return _reduced(func(x, target, reduction="none", **rest), reduction)


def _holds(target: Tensor, number: int) -> bool:
    if target.numel() <= 2**8:
        flat = target if target.dim() == 1 else target.flatten()
        return number in flat.tolist()
    return bool((target == number).any())


treat_alike(_by_class, F.cross_entropy, F.nll_loss)


def _by_number(
    batch: Batch, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Found:
    given = bound(_NAMES[func], args, kwargs)
    x, target = given.pop("input"), given.pop("target")
    if place_of(batch, x) or place_of(batch, target) or x.shape != target.shape:
        raise NotAlike
    if any([isinstance(value, Tensor) for value in given.values()]):
        raise NotAlike
    if any([given.get(name) is not None for name in _LEGACY]):
        raise NotAlike
    reduction = given.get("reduction", "mean")
    given["reduction"] = "none"
    return _reduced(func(x, target, **given), reduction)


_NAMES: dict[Function, tuple[str, ...]] = {}
for _function in (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    *(F.binary_cross_entropy_with_logits, F.binary_cross_entropy),
):
    treat_alike(_by_number, _function)
    _NAMES[_function] = Signature.of(_function).names
