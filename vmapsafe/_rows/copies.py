"""A sample's own copy of each parameter, wherever a forward or a loss reads it.

The copies take the parameters' places in the model's modules. A forward can also hand a
parameter itself to torch: from a list, a closure, an attribute of another module. Its
row would silently lack that use, so each call of torch sees the copy instead.

Copies lie in the memory of the parameter, so a write on one is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vmapsafe._errors import VmapSafeRuntimeError
from vmapsafe._torch import TorchFunctionMode, storage_of
from vmapsafe.rules.buffers import IN_PLACE
from vmapsafe.rules.embedding import on_renormalised, renormalises

_WRITES = frozenset(IN_PLACE)


class Copies(TorchFunctionMode):
    """The mode under which a forward and its loss run.

    Args:
        called: the public function, for errors.
        originals: the model's parameters, by name.
    """

    def __init__(self, called: str, originals: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._called, self._originals = called, originals

    def stand_in(self, copies: Mapping[str, Tensor]) -> None:
        """Begin a forward with these copies, by name."""
        self._copies = copies
        self._name_of = {id(copy): name for name, copy in copies.items()}
        self._name_of.update({id(p): name for name, p in self._originals.items()})
        self._read: set[str] = set()
        self._renormalised: set[str] = set()

    def check(self) -> None:
        """End the forward.

        Raises:
            VmapSafeRuntimeError: something else uses a weight that an embedding
                renormalises.
        """
        for name in self._renormalised & self._read:
            raise VmapSafeRuntimeError(
                self._called,
                f"an embedding with max_norm renormalises {name!r}, which is used "
                "by something else too: what that sees would depend on the order",
                "Renormalise it outside, under torch.no_grad(), and leave max_norm "
                "out",
            )

    def check_graph(self, leaves: Sequence[Tensor]) -> None:
        """Check that the loss depends on copies, and not on the parameters themselves.

        Args:
            leaves: those of the loss's graph.

        Raises:
            VmapSafeRuntimeError: a leaf is a parameter for which a copy stands in.
        """
        found = {id(leaf) for leaf in leaves}
        for name, parameter in self._originals.items():
            if id(parameter) in found:
                raise VmapSafeRuntimeError(
                    self._called,
                    f"the loss depends on {name!r} by a way past the model's "
                    "modules, as a view made in advance is, so that its row would "
                    "be wrong",
                    "Read it from its module, in the forward or in the loss",
                )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        named = self._name_of
        for value in (*args, *kwargs.values()):
            if id(value) in named or type(value) in (list, tuple):
                found: set[str] = set()
                args = tuple([self._copy(arg, found) for arg in args])
                kwargs = {k: self._copy(arg, found) for k, arg in kwargs.items()}
                if renormalises(func, args, kwargs):
                    self._renormalised |= found
                elif func.__name__ != "__get__":
                    self._read |= found
                break
        if func in _WRITES or kwargs.get("out") is not None:
            self._refuse_writing(func, args, kwargs)
        if renormalises(func, args, kwargs):
            return on_renormalised(self.call, func, args, kwargs)
        return self.call(func, args, kwargs)

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a call in which copies stand in."""
        return func(*args, **kwargs)

    def _copy(self, value: Any, found: set[str]) -> Any:
        name = self._name_of.get(id(value))
        if name is not None:
            found.add(name)
            return self._copies[name]
        if type(value) in (list, tuple):
            return type(value)([self._copy(one, found) for one in value])
        return value

    def _refuse_writing(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = kwargs.get("out", args[0] if args else None)
        for target in given if isinstance(given, (list, tuple)) else (given,):
            if not isinstance(target, Tensor):
                continue
            storage = storage_of(target)
            for name, copy in self._copies.items():
                if storage is not None and storage_of(copy) == storage:
                    raise VmapSafeRuntimeError(
                        f"{self._called}, {func.__name__}",
                        "the forward or the loss writes on the parameter "
                        f"{name!r}, which all samples share",
                        "Compute a new tensor there, or write outside, under "
                        "torch.no_grad()",
                    )


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves in autograd's graph of ``tensor``."""
    nodes = [] if tensor.grad_fn is None else [tensor.grad_fn]
    seen = {*nodes}
    found = []
    for node in nodes:  # while it grows
        behind = node.next_functions
        for following, _ in behind:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
        leaf = None if behind else getattr(node, "variable", None)
        if isinstance(leaf, Tensor):  # of the nodes that accumulate
            found.append(leaf)
    return found
