"""What the four modes are, and the options of a block.

A rule says what a mode means to a layer (``rules/``), a field of :class:`Mode` what it
means elsewhere, and ``_convert`` which modes have a permanent form. :class:`Options`
checks itself when it is made, so an object of it makes sense.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn

from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, a_kind, shown

ModeName = Literal["eval", "no_running_stats", "group_norm", "sync"]
RowsName = Literal["contribution", "jacobian", "detached"]
NumGroups = int | Callable[[int], int]
Also = tuple[type[nn.Module], ...]


class Flags(NamedTuple):
    """The two flags through which a normalisation layer chooses its statistics.

    ``track_running_stats`` is None for a layer that has no such flag, and for a mode
    that leaves it to the owner.
    """

    training: bool
    track_running_stats: bool | None = None


@dataclass(frozen=True)
class Mode:
    """One of the meanings that a block can give to normalisation layers.

    Attributes:
        name: what users write.
        batch_norm: the flags that a layer of torch's batch norm shows in the block.
        others: the flags that other layers with running statistics show, those of
            instance norm among them; None for the flags of their owner.
        becomes: what batch norm normalises with, for reports.
        fits: what the mode is for, for reports.
        reads_running_stats: whether layers normalise with their running statistics, so
            that a layer that the block does not reach can be put in eval mode by hand.
        merges: whether slices share their statistics, as one batch.
        can_update: whether layers use statistics that can update the running ones.
        by_rule: whether a rule computes the mode. The layer shows eval mode, so that it
            passes its buffers to ``F.batch_norm``, where the rule finds them.
    """

    name: ModeName
    batch_norm: Flags
    others: Flags | None
    becomes: str
    fits: str
    reads_running_stats: bool = False
    merges: bool = False
    can_update: bool = False
    by_rule: bool = False


# Name -> mode, in the order in which users meet them.
MODES: Mapping[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            "eval",
            batch_norm=Flags(training=False),
            others=Flags(training=False),
            becomes="with the running statistics",
            fits="per-sample gradients, Jacobians, inference",
            reads_running_stats=True,
        ),
        # In training, and without tracking, torch's batch norm uses the statistics of
        # the slice, and neither counts nor writes.
        Mode(
            "no_running_stats",
            batch_norm=Flags(training=True, track_running_stats=False),
            others=Flags(training=True),
            becomes="with the statistics of the slice",
            fits="MAML, and other slices that are batches",
            can_update=True,
        ),
        Mode(
            "group_norm",
            batch_norm=Flags(training=False),
            others=None,
            becomes="over groups of channels of each sample",
            fits="training by clipped per-sample gradients",
            by_rule=True,
        ),
        Mode(
            "sync",
            batch_norm=Flags(training=False),
            others=Flags(training=True),
            becomes="with the statistics of all slices",
            fits="what a training step computes; ensembles",
            merges=True,
            can_update=True,
            by_rule=True,
        ),
    )
}
ROWS: tuple[RowsName, ...] = ("contribution", "jacobian", "detached")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a block was asked to do. Options that make no sense cannot be created.

    Attributes:
        called: the public function, for errors.
        rows: what the rows of per-sample gradients are in a mode that merges.
        copies_at: the vmap level whose slices have copies of the parameters, one each,
            for per-sample gradients; None elsewhere.

    The other attributes are those of :func:`vmapsafe.vmap_safe`.

    Raises:
        VmapSafeValueError: an option has a value that it may not have.
        VmapSafeTypeError: an option has a type that it may not have.
    """

    called: str = field(default="vmap_safe(...)", compare=False)
    mode: ModeName = "eval"
    num_groups: NumGroups = 32
    update_running_stats: bool = False
    sync_levels: int | None = None
    also: Also = ()
    fast: bool = True
    rows: RowsName = "contribution"
    copies_at: int | None = None

    def __post_init__(self) -> None:
        check_mode(self.called, self.mode)
        check_num_groups(self.called, self.num_groups)
        _check_also(self.called, self.also)
        check_flag(self.called, "update_running_stats", self.update_running_stats)
        check_flag(self.called, "fast", self.fast)
        self._check_rows()
        self._check_updates()

    def __str__(self) -> str:
        given = [f'mode="{self.mode}"']
        if self.mode == "group_norm":
            given.append(f"num_groups={self.num_groups}")
        if self.update_running_stats:
            given.append("update_running_stats=True")
        if self.sync_levels is not None:
            given.append(f"sync_levels={self.sync_levels}")
        if self.also:
            names = ", ".join([kind.__name__ for kind in self.also])
            given.append(f"also=({names},)")
        if not self.fast:
            given.append("fast=False")
        return ", ".join(given)

    @property
    def meaning(self) -> Mode:
        """The mode that ``mode`` names."""
        return MODES[self.mode]

    def agree(self, other: Options) -> bool:
        """Whether two threads may hold one model, one with each of these options."""
        return _shared(self) == _shared(other)

    def _check_rows(self) -> None:
        if self.rows not in ROWS:
            listed = ", ".join([f'"{rows}"' for rows in ROWS])
            raise VmapSafeValueError(
                self.called,
                f"unknown rows {shown(self.rows)}",
                f"Choose one of {listed}",
            )
        if self.rows != "contribution" and not self.meaning.merges:
            raise VmapSafeValueError(
                self.called,
                f'rows="{self.rows}" has a meaning in "sync" only, and mode is '
                f'"{self.mode}", where samples are independent and all rows are the '
                "same",
                "Leave rows out",
            )

    def _check_updates(self) -> None:
        levels = self.sync_levels
        if levels is None and not self.update_running_stats:
            return
        called = self.called.replace("...", str(self))
        if levels is not None and (type(levels) is not int or levels < 1):
            raise VmapSafeValueError(
                called,
                f"sync_levels is {shown(levels)}, not the number of vmaps to merge, "
                "innermost first",
                "Pass an int of at least 1, or None for all",
            )
        if levels is not None and not self.meaning.merges:
            raise VmapSafeValueError(
                called,
                'sync_levels has a meaning in "sync" only, where slices are one batch',
                'Use mode="sync", or leave sync_levels out',
            )
        if self.update_running_stats and not self.meaning.can_update:
            raise VmapSafeValueError(
                called,
                f'"{self.mode}" has no statistics to update the running ones with',
                'Use mode="sync" (or, in a block, "no_running_stats" with stacked '
                "buffers), or leave update_running_stats out",
            )


def _shared(options: Options) -> tuple[object, ...]:
    """The options whose effect on a model is seen by other threads."""
    return (
        options.mode,
        options.num_groups,
        options.update_running_stats,
        options.sync_levels,
        options.also,
    )


def check_mode(
    called: str, mode: object, among: Collection[str] = tuple(MODES)
) -> None:
    """Raise unless ``mode`` is the name of a mode.

    Args:
        called: the public function, for the error.
        mode: what the user wrote.
        among: the modes that the function takes.

    Raises:
        VmapSafeValueError: it is another value; the text lists the modes.
    """
    if mode not in tuple(among):  # a value that is not a string may not be hashable
        listed = ", ".join([f'"{name}"' for name in among])
        raise VmapSafeValueError(
            called, f"unknown mode {shown(mode)}", f"Choose one of {listed}"
        )


def check_flag(called: str, name: str, value: object) -> None:
    """Raise unless an option that is on or off is a bool.

    Args:
        called: the public function, for the error.
        name: of the option.
        value: what the user wrote.

    Raises:
        VmapSafeTypeError: it is not one.
    """
    if not isinstance(value, bool):
        raise VmapSafeTypeError(
            called, f"{name} is {shown(value)}, {a_kind(value)}", "Pass True or False"
        )


def _check_also(called: str, also: object) -> None:
    if also == ():
        return
    kinds = also if isinstance(also, (tuple, list)) else (also,)
    if not all([isinstance(k, type) and issubclass(k, nn.Module) for k in kinds]):
        do = "Write also=(MyNorm,), with classes of modules"
    elif not isinstance(also, tuple):
        names = ", ".join([kind.__name__ for kind in kinds])
        do = f"Write also=({names},)" if len(kinds) == 1 else f"Write also=({names})"
    else:
        return
    found = f"also is {shown(also)}, not a tuple of classes of modules"
    raise VmapSafeTypeError(called, found, do)


# -- Groups of channels ----------------------------------------------------------------


def groups_for(num_channels: int, num_groups: NumGroups) -> int:
    """Return how many groups a group norm makes of a layer's channels.

    The mode "group_norm" and the permanent conversion both ask here.

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
        The number of groups if it divides C, else C: each channel is a group.

    Raises:
        VmapSafeTypeError: ``num_groups``, or what it returned, is not an int.
        VmapSafeValueError: it is below 1.

    It does not look for the nearest divisor. If the number of groups does not divide C,
    as for every smaller C, each channel is normalised by itself, as
    https://docs.pytorch.org/docs/stable/func.batch_norm.html, option 1, says.
    """
    if callable(num_groups):
        groups = num_groups(num_channels)
        _check_count(f"num_groups({num_channels})", groups, f"it returned {groups!r}")
    else:
        groups = num_groups
    return groups if num_channels % groups == 0 else num_channels


def check_num_groups(called: str, num_groups: object) -> None:
    """Raise unless ``num_groups`` is an int of at least 1 or a callable.

    A callable is not called; :func:`groups_for` checks what it returns.

    Args:
        called: the public function, for the error.
        num_groups: what the user wrote.

    Raises:
        VmapSafeTypeError: it is neither an int (a bool is not one) nor a callable.
        VmapSafeValueError: it is an int below 1.
    """
    if not callable(num_groups):
        _check_count(called, num_groups, f"num_groups={num_groups!r}")


def _check_count(called: str, groups: object, found: str) -> None:
    do = "Pass an int of at least 1, or a callable from C to one"
    # bool is an int in Python, but num_groups=True is a mistake.
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise VmapSafeTypeError(called, f"{found}, which is not an int", do)
    if groups < 1:
        raise VmapSafeValueError(called, f"{found}, which is below 1", do)
