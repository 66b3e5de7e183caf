"""How a failure is worded: what was called, what was found, what to do."""


class BlockError(RuntimeError):
    """A block was opened or closed where it cannot be, e.g. in the wrong order."""

    __module__ = "vmapsafe"


class NeverUpdatedWarning(UserWarning):
    """Running statistics that no batch has updated are used in mode "eval"."""

    __module__ = "vmapsafe"


def worded(called: str, found: str, do: str) -> str:
    """One text for every failure of the package.

    >>> worded("vmap_safe(...)", "got no model", "Write vmap_safe(model)")
    'vmap_safe(...): got no model. Write vmap_safe(model).'
    """
    return f"{called}: {found}. {do}."
