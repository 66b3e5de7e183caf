"""How many groups a group norm makes of C channels."""

from __future__ import annotations

from collections.abc import Callable


def check_num_groups(num_groups: int | Callable[[int], int]) -> None:
    if not callable(num_groups) and (
        isinstance(num_groups, bool)
        or not isinstance(num_groups, int)
        or num_groups < 1
    ):
        raise ValueError(f"num_groups must be at least 1, got {num_groups!r}.")


def groups_for(num_channels: int, num_groups: int | Callable[[int], int]) -> int:
    groups = num_groups(num_channels) if callable(num_groups) else num_groups
    return groups if num_channels % groups == 0 else num_channels
