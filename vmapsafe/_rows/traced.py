"""Every sample's gradient of a parameter while torch.compile traces, from one backward.

:mod:`vmapsafe._rows.record` asks autograd inside a forward, which torch.compile does
not trace. What it traces is ``torch.func.grad`` of a function of tensors. So each call
that a layer says how to keep (``rules/kept_calls``) gets a *tap*: a tensor of zeros
that is added to its output. The gradient by the tap is the output gradient, and the
formulas need it and the layer's input alone.

The taps must be there before the forward, in the shapes of the outputs. A first forward
finds them. Nothing uses what it computes, so the compiler leaves it out of the code. It
makes no random draws and updates no statistics. But Python code of a model runs in it:
a counter in a forward counts twice when it is traced.

As in ``record``, a sample sees its own copies of the parameters. Calls with a tap get
the parameters themselves. A parameter that is also used otherwise is differentiated by
its copies. Where the first forward shows that a copy is used unseen, ``vmap(grad)``
follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from vmapsafe._rows.record import Collector, Unrecordable
from vmapsafe._torch import (
    TorchFunctionMode,
    current_level,
    tree_map,
    without_autocast,
)
from vmapsafe.rules.buffers import IN_PLACE
from vmapsafe.rules.embedding import renormalises
from vmapsafe.rules.formulas import Formula
from vmapsafe.rules.kept_calls import KEPT_CALLS, KeptCalls, OnASlice, on_a_slice
from vmapsafe.rules.opaque import opaque
from vmapsafe.rules.random_numbers import without_draws

LEVEL = 2  # of the vmap, inside the derivative by the taps

# A dict, as torch.compile cannot trace a set of functions.
_WRITES = dict.fromkeys(IN_PLACE, True)


class Traced:
    """The losses of all samples, and the gradients from which rows are made.

    Args:
        originals: the model's parameters, by name.
        loss: of the parameters by name, and a sample.
        values: what stands for ``originals``, by the same names.
        batch: trees of tensors (B, ...).
        size: B.
        randomness: as in vmap.
        has_aux: whether ``loss`` returns a pair.
        in_block: calls the loss in a block of the model.
        without_updates: calls it in one that does not update running statistics.

    Attributes:
        losses: (B,).
        aux: what the loss returned besides, with ``has_aux``.

    Raises:
        Unrecordable: the loss uses what only ``vmap(grad)`` can follow.
    """

    def __init__(
        self,
        originals: Mapping[str, Tensor],
        loss: Callable[..., Any],
        values: Mapping[str, Tensor],
        batch: Sequence[Any],
        size: int,
        randomness: str,
        has_aux: bool,
        in_block: Callable[..., Any],
        without_updates: Callable[..., Any],
    ) -> None:
        plain = {name: value.detach() for name, value in values.items()}
        copies = {name: p.expand(size, *p.shape) for name, p in plain.items()}
        self._plain = plain
        first = _First()
        watched = False

        def dead(copies: Mapping[str, Tensor]) -> Tensor:
            nonlocal watched

            def one(copies: Mapping[str, Tensor], *sample: Any) -> Tensor:
                first.begin(originals, plain, copies)
                with first:
                    found = without_updates(loss, copies, *sample)
                value: Tensor = found[0] if has_aux else found
                return value

            losses = vmap(one, randomness=randomness)(copies, *batch)
            watched = losses.requires_grad
            return losses.sum()

        vjp(dead, copies)
        if watched or first.strayed:
            raise Unrecordable("a parameter unseen")
        self._uses = uses = first.uses
        device = next(iter(plain.values())).device
        taps = [
            torch.zeros(size, *use.shape, dtype=use.dtype, device=device)
            for use in uses
        ]
        rest = {name: copies[name] for name in copies if name in first.others}
        fixed = {name: copy for name, copy in copies.items() if name not in rest}
        second = _Second(uses, [*rest])

        def losses_of(given: tuple[list[Tensor], Mapping[str, Tensor]]) -> Any:
            taps, rest = given

            def one(
                taps: list[Tensor],
                rest: Mapping[str, Tensor],
                fixed: Mapping[str, Tensor],
                *sample: Any,
            ) -> Any:
                own = {**fixed, **rest}
                second.begin(originals, plain, own, taps)
                with second:
                    found = in_block(loss, own, *sample)
                value, aux = found if has_aux else (found, ())
                return value, second.inputs, aux

            losses, inputs, aux = vmap(one, randomness=randomness)(
                taps, rest, fixed, *batch
            )
            return losses.sum(), (losses, inputs, aux)

        (gradients, self._of_copies), (self.losses, self._inputs, aux) = grad(
            losses_of, has_aux=True
        )((taps, rest))
        if second.strayed or len(self._inputs) != len(uses):
            raise Unrecordable("a forward that does something else each time")
        self._gradients = gradients
        self.aux = tree_map(lambda t: t.detach(), aux)

    def is_watched(self) -> bool:
        """Whether plain autograd would differentiate the losses by other tensors."""
        return bool(self.losses.requires_grad)

    def backward(self, into: Collector) -> None:
        """Hand the gradients of all parameters to ``into``."""
        into.losses(self.losses.detach())
        count: dict[str, int] = {}
        for use in self._uses:
            for name in use.formulas:
                count[name] = count.get(name, 0) + 1
        sums = {name: copy.detach() for name, copy in self._of_copies.items()}
        with without_autocast(self.losses.device):
            for use, x, grad_ in zip(self._uses, self._inputs, self._gradients):
                x, grad_ = x.detach(), grad_.detach()
                for name, formula in use.formulas.items():
                    dtype = self._plain[name].dtype
                    given = x.to(dtype) if x.is_floating_point() else x
                    formula = opaque(formula, grad_)
                    if count[name] == 1 and name not in sums:
                        into.streamed(name, formula, given, grad_.to(dtype))
                        continue
                    rows = formula.rows(given, grad_.to(dtype))
                    sums[name] = sums[name] + rows if name in sums else rows
            for name, p in self._plain.items():
                if name in sums:
                    into.whole(name, sums[name])
                elif name not in count:
                    size = len(self.losses)
                    into.whole(name, p.new_zeros(()).expand(size, *p.shape))


@dataclass
class _Use:
    """A call with a tap.

    Attributes:
        function: what is called.
        formulas: of the parameters, by their names in the model.
        shape: of a slice of the output.
        dtype: of the output.
    """

    function: Callable[..., Any]
    formulas: dict[str, Formula]
    shape: torch.Size
    dtype: torch.dtype


class _Mode(TorchFunctionMode):
    """A mode that sees all calls of a forward, and which parameters they are given.

    Attributes:
        strayed: whether it met what it cannot follow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strayed = False

    def _stand_in(
        self,
        originals: Mapping[str, Tensor],
        plain: Mapping[str, Tensor],
        copies: Mapping[str, Tensor],
    ) -> None:
        self._plain, self._copies = plain, copies
        self._name_of = {p: name for name, p in originals.items()}
        for name, copy in copies.items():
            self._name_of[copy] = name

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _WRITES.get(func) or kwargs.get("out") is not None:
            target: set[str] = set()
            self._instead(kwargs.get("out", args[0] if args else None), target)
            if target:  # which raises
                return func(*args, **kwargs)
        if renormalises(func, args, kwargs):
            self.strayed = True
        kept = KEPT_CALLS.get(func)
        if kept is not None and current_level() == LEVEL and not self.strayed:
            y = self._kept(func, kept[0], {**kept[1].bind(args, kwargs)})
            if y is not None:
                return y
        found: set[str] = set()
        args = tuple([self._instead(arg, found) for arg in args])
        kwargs = {key: self._instead(arg, found) for key, arg in kwargs.items()}
        return self.other(func, args, kwargs, found)

    def _kept(
        self,
        func: Callable[..., Any],
        kept: KeptCalls,
        arguments: dict[str, Any],
    ) -> Tensor | None:
        """The output of a call that gets a tap; None for another call."""
        names: dict[str, str] = {}
        for own in kept.parameters:
            parameter = arguments[own]
            if parameter is not None and parameter in self._name_of:
                names[own] = self._name_of[parameter]
                arguments[own] = self._plain[names[own]]
        if not names:
            return None
        call = on_a_slice(func, kept, arguments)
        if call is None:
            return None
        formulas = {name: call.formulas[own] for own, name in names.items()}
        if len(formulas) < len(names):  # one parameter as weight and bias
            return None
        return self.tap(func, formulas, call)

    def _instead(self, value: Any, found: set[str]) -> Any:
        """What a call is given for a parameter or its copy, also in a list."""
        if isinstance(value, Tensor):
            if value in self._name_of:
                name = self._name_of[value]
                found.add(name)
                return self.instead(name)
            return value
        if type(value) in (list, tuple):
            return type(value)([self._instead(one, found) for one in value])
        return value

    def tap(
        self, func: Callable[..., Any], formulas: dict[str, Formula], call: OnASlice
    ) -> Tensor | None:
        """The output of a call that gets a tap."""
        raise NotImplementedError

    def instead(self, name: str) -> Tensor:
        """What any other call is given for a parameter."""
        raise NotImplementedError

    def other(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: set[str],
    ) -> Any:
        """Make any other call, which is given the parameters that were found."""
        raise NotImplementedError


class _First(_Mode):
    """The mode of the first forward, which finds the calls.

    Other calls are given the parameters too: what then depends on a copy does so
    unseen.

    Attributes:
        uses: the calls with a tap.
        others: the parameters that other calls are given.
    """

    def begin(
        self,
        originals: Mapping[str, Tensor],
        plain: Mapping[str, Tensor],
        copies: Mapping[str, Tensor],
    ) -> None:
        """Begin the forward with these copies."""
        self._stand_in(originals, plain, copies)
        self.uses: list[_Use] = []
        self.others: set[str] = set()

    def tap(
        self, func: Callable[..., Any], formulas: dict[str, Formula], call: OnASlice
    ) -> Tensor | None:
        _, y = call.run()
        self.uses.append(_Use(func, formulas, y.shape, y.dtype))
        return y

    def instead(self, name: str) -> Tensor:
        return self._plain[name]

    def other(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: set[str],
    ) -> Any:
        self.others |= found
        return without_draws(func, args, kwargs)


class _Second(_Mode):
    """The mode of the forward that counts.

    Args:
        uses: the calls with a tap.
        others: the parameters that other calls may be given.

    Attributes:
        inputs: what the rows of each call with a tap are made of.
    """

    def __init__(self, uses: Sequence[_Use], others: Sequence[str]) -> None:
        super().__init__()
        self._uses, self._others = uses, others

    def begin(
        self,
        originals: Mapping[str, Tensor],
        plain: Mapping[str, Tensor],
        copies: Mapping[str, Tensor],
        taps: Sequence[Tensor],
    ) -> None:
        """Begin the forward with these copies."""
        self._stand_in(originals, plain, copies)
        self._taps = taps
        self.inputs: list[Tensor] = []

    def tap(
        self, func: Callable[..., Any], formulas: dict[str, Formula], call: OnASlice
    ) -> Tensor | None:
        i = len(self.inputs)
        use = self._uses[i] if i < len(self._uses) else None
        if use is None or func is not use.function or [*formulas] != [*use.formulas]:
            self.strayed = True
            return None
        x, y = call.run()
        if y.shape != use.shape or y.dtype != use.dtype:
            self.strayed = True
            return None
        self.inputs.append(x)
        return y + self._taps[i]

    def instead(self, name: str) -> Tensor:
        return self._copies[name]

    def other(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: set[str],
    ) -> Any:
        if not all([name in self._others for name in found]):
            self.strayed = True
        return func(*args, **kwargs)
