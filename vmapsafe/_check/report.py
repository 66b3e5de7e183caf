"""What ``check`` returns: findings for programs, a page for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, overload

from vmapsafe._check.details import details
from vmapsafe._check.finding import Finding
from vmapsafe._check.summary import summary, what_to_do
from vmapsafe._errors import VmapSafeValueError
from vmapsafe._modes import ModeName, check_mode


class Report(Sequence[Finding]):
    """The findings of one model, in the order of its modules; prints as one page.

    Args:
        model: the name of the model's class.
        modes: the modes that were looked at.
        findings: the items of the report; the other arguments are attributes, too.
        tried: whether the model was run on an example.
        notes: sentences about what was not looked at.
    """

    def __init__(
        self,
        model: str,
        modes: Iterable[ModeName],
        findings: Iterable[Finding],
        *,
        tried: bool,
        notes: Iterable[str] = (),
    ) -> None:
        self.model = model
        self.modes = tuple(modes)
        self.tried = tried
        self.notes = tuple(notes)
        self._findings = tuple(findings)

    def safe(self, mode: ModeName) -> bool:
        """Whether nothing unsafe was found in a mode.

        Args:
            mode: one of the modes that were looked at.

        Returns:
            True if each finding is safe in that mode.

        Raises:
            VmapSafeValueError: an unknown mode, or one that was not looked at.
        """
        check_mode("report.safe(...)", mode)
        if mode not in self.modes:
            listed = ", ".join(f'"{mode}"' for mode in self.modes)
            raise VmapSafeValueError(
                f"report.safe({mode!r})",
                f"the report is about {listed} only",
                f"Write check(model, x, mode={mode!r})",
            )
        return all(finding.safe[mode] for finding in self._findings)

    @property
    def to_do(self) -> str:
        """What to do first, in one sentence."""
        return what_to_do(self.modes, self._findings, self.tried)

    def details(self) -> str:
        """The page with every finding: each layer, and what each mode makes of it."""
        return details(self.model, self.modes, self, self.tried, self.notes)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it, which ``python -m vmapsafe check --json`` prints.

        >>> import torch
        >>> from vmapsafe import check
        >>> report = check(torch.nn.Dropout(), mode="eval")
        >>> [*report.as_dict()]
        ['model', 'to_do', 'tried', 'safe', 'findings', 'notes']
        >>> [*report.as_dict()["findings"][0]]  # doctest: +NORMALIZE_WHITESPACE
        ['path', 'module', 'kind', 'detail', 'becomes', 'safe', 'advice', 'needs',
        'named']

        Keys are added in later versions, but not renamed or taken away. Texts may
        change, those of ``kind`` and ``needs`` and the names of modes aside.

        Returns:
            ``model`` is the name of a class; ``to_do`` and ``tried`` are the
            attributes; ``safe`` is a dict, mode -> bool; ``findings`` are dicts of the
            attributes of each finding; and ``notes`` is a list of sentences.
        """
        return {
            "model": self.model,
            "to_do": self.to_do,
            "tried": self.tried,
            "safe": {mode: self.safe(mode) for mode in self.modes},
            "findings": [dataclasses.asdict(finding) for finding in self],
            "notes": list(self.notes),
        }

    @overload
    def __getitem__(self, index: int) -> Finding: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...

    def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
        return self._findings[index]

    def __len__(self) -> int:
        return len(self._findings)

    def __repr__(self) -> str:
        count = f"{len(self)} finding{'' if len(self) == 1 else 's'}"
        return f"<Report of {self.model}: {count}>"

    def __str__(self) -> str:
        return summary(self.model, self.modes, self, self.tried, self.notes)
