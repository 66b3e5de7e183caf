"""How many groups a GroupNorm gets that takes the place of a BatchNorm.

A file of its own because the permanent conversion and the reversible mode must agree.
"""

from collections.abc import Callable

NumGroups = int | Callable[[int], int]


def groups_for(num_channels: int, num_groups: NumGroups) -> int:
    """Return the number of groups for a layer of ``num_channels`` channels.

    Example:
        >>> groups_for(64, 32)
        32
        >>> groups_for(48, 32)
        48
        >>> groups_for(48, lambda channels: channels // 16)
        3

    Args:
        num_channels: C, the number of channels of the layer.
        num_groups: the number of groups, or a callable that takes C and returns it.

    Returns:
        That number where it divides C, else C (one group a channel).

    Raises:
        TypeError: ``num_groups`` or what it returned is not an int.
        ValueError: it is below 1.

    It does not look for the nearest divisor: a C that is not a multiple of the number
    asked for, so any C below it, is normalised channel by channel. Source of the
    fall-back: https://docs.pytorch.org/docs/stable/func.batch_norm.html, option 1.
    """
    check_num_groups(num_groups)
    if callable(num_groups):
        groups = num_groups(num_channels)
        _check_count(groups, f"num_groups({num_channels}) returned {groups!r}")
    else:
        groups = num_groups
    return groups if num_channels % groups == 0 else num_channels


def check_num_groups(num_groups: NumGroups) -> None:
    """Raise unless ``num_groups`` is an int of at least 1 or a callable.

    Example:
        >>> check_num_groups(0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: num_groups=0, which is below 1; write an int >= 1 or a callable ...

    Args:
        num_groups: what the user wrote.

    Raises:
        TypeError: it is neither an int (bool does not count) nor a callable.
        ValueError: it is an int below 1.

    It does not call a callable; :func:`groups_for` checks what comes out of it.
    """
    if not callable(num_groups):
        _check_count(num_groups, f"num_groups={num_groups!r}")


def _check_count(groups: object, found: str) -> None:
    advice = "write an int >= 1 or a callable C -> int"
    # bool is an int to Python, but True groups is a slip of the pen.
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"{found}, which is no int; {advice}")
    if groups < 1:
        raise ValueError(f"{found}, which is below 1; {advice}")
