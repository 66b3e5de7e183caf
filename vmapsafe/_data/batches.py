"""What a batch holds: the inputs of the model, then what the loss takes after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, a_kind
from vmapsafe._torch import tree_flatten, tree_map

Places = Sequence[str | Sequence[str]]
Keys = str | Places


def parts_of(batch: object, keys: Places | None) -> tuple[object, ...]:
    """Take a batch apart.

    Args:
        batch: a tensor, a tuple or list, or a dict.
        keys: those of a dict, the inputs first.

    Returns:
        The inputs and the rest.

    Raises:
        VmapSafeTypeError: a batch of another kind, or one that does not go with
            ``keys``.
        VmapSafeValueError: a dict lacks a key.
    """
    if isinstance(batch, Mapping):
        parts = _by_keys(batch, keys)
    elif keys is not None:
        raise VmapSafeTypeError(
            "over(...)",
            f"keys= for a batch that is {a_kind(batch)}",
            "Leave keys= out",
        )
    elif isinstance(batch, Tensor):
        parts = (batch,)
    elif isinstance(batch, (tuple, list)):
        parts = tuple(batch)
    else:
        raise VmapSafeTypeError(
            "over(...)",
            f"the loader gave a batch that is {a_kind(batch)}",
            "Let its collate_fn make a tensor, a tuple (inputs, targets, ...) or a "
            "dict",
        )
    if parts and isinstance(parts[0], list):  # what collate makes of tuples
        parts = (tuple(parts[0]), *parts[1:])
    return parts


def moved(parts: tuple[object, ...], device: torch.device) -> tuple[object, ...]:
    """The parts of a batch with their tensors on a device."""

    def to_device(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf

    return tuple(tree_map(to_device, parts))


def size_of(parts: tuple[object, ...]) -> int:
    """The number of samples."""
    return len(tree_flatten(parts)[0][0])


def several(keys: Keys) -> Places:
    """One key as a list of keys."""
    return [keys] if isinstance(keys, str) else keys


def _by_keys(batch: Mapping[str, object], keys: Places | None) -> tuple[object, ...]:
    if keys is None:
        raise VmapSafeTypeError(
            "over(...)",
            f"the loader gave a dict with the keys {list(batch)}",
            'Say what is what, e.g. keys=("image", "label")',
        )
    for key in [key for place in keys for key in several(place)]:
        if key not in batch:
            raise VmapSafeValueError(
                "over(...)",
                f"keys= names {key!r}, and the batch has {list(batch)}",
                "Name those of the inputs and the targets",
            )
    return tuple(
        batch[place] if isinstance(place, str) else {key: batch[key] for key in place}
        for place in keys
    )
