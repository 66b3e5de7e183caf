"""Which model is looked at, and how it will be called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from vmapsafe._block.models import is_frozen
from vmapsafe._check.finding import LOOP, Finding, Kind
from vmapsafe._draws import Randomness
from vmapsafe._modes import ModeName, Options

USE_A_BLOCK = "Use vmap_safe(model)."
NO_LOOP = f" {LOOP} does not take it."


@dataclass(frozen=True)
class Question:
    """What was asked of ``check``.

    Attributes:
        net: the model, without wrappers.
        modules: its modules by path.
        modes: the modes to look at.
        randomness: what vmap will be given.
        options: the other options of a block.
    """

    net: nn.Module
    modules: Mapping[str, nn.Module]
    modes: tuple[ModeName, ...]
    randomness: Randomness
    options: Options

    def named(self, module: nn.Module) -> bool:
        """Whether ``also`` names the module's class, and it is not frozen."""
        also = self.options.also
        return isinstance(module, also) and not is_frozen(module, self.net)

    def finding(
        self,
        path: str,
        kind: Kind,
        detail: str,
        becomes: Mapping[ModeName, str] | str,
        advice: str,
        unsafe: Collection[str] = (),
        needs: str = "",
        named: str = "",
    ) -> Finding:
        """Make a finding.

        Args:
            path: of the module.
            kind: of the finding.
            detail: what the module does under vmap.
            becomes: mode -> what becomes of it there; a text holds in every mode.
            advice: what to do.
            unsafe: the modes in which it is unsafe.
            needs: what to write, where that is enough.
            named: a class or module to write there.

        Returns:
            The finding, with what holds in the modes that are looked at.
        """
        if isinstance(becomes, str):
            becomes = dict.fromkeys(self.modes, becomes)
        return Finding(
            path=path,
            module=type(self.modules[path]).__name__,
            kind=kind,
            detail=detail,
            becomes={mode: becomes[mode] for mode in self.modes},
            safe={mode: mode not in unsafe for mode in self.modes},
            advice=advice,
            needs=needs,
            named=named,
        )
