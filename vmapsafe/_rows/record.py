"""Every sample's gradient of a parameter from one backward pass for the activations.

``vmap(grad)`` makes the weight gradients of all samples, B x P numbers, before anybody
can ask for their norms. Here autograd is *around* the vmap: one vmapped forward gives
the losses of all samples, and one backward pass of their sum follows. The forward gets
each parameter as a batch of copies, ``p.expand(B, ...)``, which takes no memory. Copy i
belongs to sample i, and its gradient is row i, whatever the forward does with it.

Autograd would need B x P numbers for that too. So a :class:`Recorder`, a mode below the
block's, asks for each call whether a layer says how to keep it (``rules/kept_calls``).
It makes such a call on the whole batch with the plain parameter, without a derivative
by it, and keeps the input. Backward hands it the output gradient. Rows, their norms or
a weighted sum follow from the two (``rules/formulas``).

A parameter with one recorded use and no other is *streamed*: nothing of size B x P is
made. Otherwise its row is a sum: of the rows of its recorded uses, and of what autograd
finds for its copies. Autograd's graph tells whether it will find something.

This is the "book-keeping" of Bu et al., https://arxiv.org/abs/2210.00038. There hooks
on layers decide what a sample is; here vmap does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import vmap

from vmapsafe._rows.copies import Copies, leaves_of
from vmapsafe._torch import (
    batch_behind,
    below_innermost,
    current_level,
    is_wrapped,
    slices_of,
    tree_map,
    under,
    without_autocast,
    without_view,
)
from vmapsafe.rules.formulas import Formula, Made
from vmapsafe.rules.kept_calls import (
    KEPT_CALLS,
    ByFormulas,
    KeptCall,
    KeptCalls,
)
from vmapsafe.rules.outer_products import may_overflow

LEVEL = 1  # of the one vmap


class Unrecordable(Exception):
    """The loss uses what the text names, which only ``vmap(grad)`` can follow."""


class Collector(ABC):
    """Takes the gradients, parameter by parameter, as backward meets them.

    Each parameter comes once, in any order. What a method gets may be kept until
    backward has ended, and must not be written.
    """

    @abstractmethod
    def losses(self, losses: Tensor) -> None:
        """Take the losses (B,), before the gradients."""

    @abstractmethod
    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        """Take the only use of a parameter: the layer's input and output gradient."""

    @abstractmethod
    def whole(self, name: str, rows: Tensor) -> None:
        """Take the rows (B, *shape) of a parameter."""


class Recorded:
    """The losses of all samples, and what backward needs.

    Args:
        called: the public function, for errors.
        originals: the model's parameters, by name.
        loss: of the parameters by name, and a sample.
        values: what stands for ``originals``, by the same names.
        batch: trees of tensors (B, ...).
        size: B.
        randomness: as in vmap.
        has_aux: whether ``loss`` returns a pair.
        in_block: calls the loss in a block of the model.

    Attributes:
        losses: (B,), with autograd's graph.
        aux: what the loss returned besides, with ``has_aux``.

    Raises:
        Unrecordable: torch would make wrong rows of so many numbers.
    """

    def __init__(
        self,
        called: str,
        originals: Mapping[str, Tensor],
        loss: Callable[..., Any],
        values: Mapping[str, Tensor],
        batch: Sequence[Any],
        size: int,
        randomness: str,
        has_aux: bool,
        in_block: Callable[..., Any],
    ) -> None:
        self._recorder = recorder = Recorder(called, originals, values, size)

        def one(*sample: Any) -> Any:
            copies = recorder.begin()
            found = under(recorder, in_block, loss, copies, *sample)
            recorder.check()
            return found

        with torch.enable_grad(), _no_hooks():
            result = vmap(one, randomness=randomness)(*batch)
        self.losses, aux = result if has_aux else (result, ())
        self.aux = tree_map(lambda t: t.detach(), aux)
        leaves = leaves_of(self.losses)
        recorder.check_graph(leaves)
        self._reached = {id(leaf) for leaf in leaves}
        for name, copies in recorder.copies.items():
            if id(copies) in self._reached and may_overflow(copies):
                raise Unrecordable(f"gradients by {name!r} of 2**31 numbers or more")

    def is_watched(self) -> bool:
        """Whether plain autograd would differentiate the losses by other tensors."""
        if self._recorder.lacks_a_gradient:
            return True
        leaves = *self._recorder.copies.values(), self._recorder.anchor
        return not self._reached <= {id(leaf) for leaf in leaves}

    def backward(self, into: Collector) -> None:
        """Hand the gradients of all parameters to ``into``. It can be called once."""
        into.losses(self.losses)
        recorder, reached = self._recorder, self._reached
        # ``receive`` knows these and not the recorder: a cycle of references would keep
        # the rows alive until Python's garbage collector comes by.
        leaves, uses = recorder.copies, recorder.uses
        rest = {name: leaf for name, leaf in leaves.items() if id(leaf) in reached}
        sums: dict[str, Tensor] = {}

        def add(name: str, rows: Tensor) -> None:
            sums[name] = sums[name] + rows if name in sums else rows

        def receive(name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
            dtype = leaves[name].dtype
            x, grad = x.to(dtype) if x.is_floating_point() else x, grad.to(dtype)
            if name in rest or uses[name] > 1:
                add(name, formula.rows(x, grad))
            else:
                into.streamed(name, formula, x, grad)
            received.add(name)

        received: set[str] = set()
        recorder.receive = receive
        inputs = list(rest.values())
        if id(recorder.anchor) in reached:
            inputs.append(recorder.anchor)
        # Under autocast, backward runs in the dtypes of forward; sums here are in the
        # dtypes of the parameters.
        with without_autocast(self.losses.device):
            grads: Sequence[Tensor | None] = ()
            if inputs:
                ones = torch.ones_like(self.losses)
                grads = torch.autograd.grad(
                    self.losses, inputs, ones, allow_unused=True
                )
            for name, grad in zip(rest, grads):
                if grad is not None:
                    add(name, grad)
            for name, leaf in leaves.items():
                if name in sums:
                    into.whole(name, sums.pop(name))
                elif name not in received:
                    into.whole(name, leaf.new_zeros(()).expand(leaf.shape))


class Recorder(Copies):
    """The mode under which forward runs.

    Args:
        called: the public function, for errors.
        originals: the model's parameters, by name.
        values: what stands for them.
        size: B.

    Attributes:
        copies: the copies of each parameter, (B, *shape), by name.
        uses: how many recorded uses each has.
        lacks_a_gradient: whether a tensor requires a gradient that is not computed.
        anchor: all recorded outputs depend on it, so that autograd reaches them.
        receive: takes a use and its output gradient in backward.
    """

    def __init__(
        self,
        called: str,
        originals: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        size: int,
    ) -> None:
        super().__init__(called, originals)
        self._plain = {n: _one_by_one(value.detach()) for n, value in values.items()}
        self.copies = {
            name: value.expand(size, *value.shape).requires_grad_()
            for name, value in self._plain.items()
        }
        self._size = size
        self.uses = {name: 0 for name in values}
        self.lacks_a_gradient = False
        first = next(iter(values.values()))
        self.anchor = first.new_empty((), requires_grad=True)  # nobody reads its number
        self.receive: Callable[[str, Formula, Tensor, Tensor], None]

    def begin(self) -> Mapping[str, Tensor]:
        """Begin a forward; returns the slices of the copies that it sees."""
        copies = {name: slices_of(leaf, LEVEL) for name, leaf in self.copies.items()}
        self.stand_in(copies)
        self._name_of_copy = {id(copy): name for name, copy in copies.items()}
        return copies

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        found = KEPT_CALLS.get(func)
        if (found is None and func not in _ASKED) or current_level() != LEVEL:
            return func(*args, **kwargs)
        if func in _REFUSED:
            raise Unrecordable(_REFUSED[func])
        if found is None:
            return self._requires_grad(*args)
        kept, signature = found
        y = self._kept(kept, {**signature.bind(args, kwargs)})
        return (kept.otherwise or func)(*args, **kwargs) if y is None else y

    def _kept(self, kept: KeptCalls, arguments: dict[str, Any]) -> Tensor | None:
        """The output of a call that is kept; None for another call."""
        names: dict[str, str | None] = {}
        others = []
        for own in kept.parameters:
            parameter = arguments[own]
            name = names[own] = self._name_of_copy.get(id(parameter))
            if name is not None:  # without the samples' copies, and a derivative
                arguments[own] = self._plain[name]
            elif parameter is not None:
                others.append(parameter)
        if not any(names.values()) or any([is_wrapped(p) for p in others]):
            return None
        self.lacks_a_gradient = self.lacks_a_gradient or any(
            [p.requires_grad for p in others]
        )
        with below_innermost():
            x = batch_behind(arguments["input"], LEVEL, self._size)
            if x is None:
                return None
            arguments["input"] = x
            call = kept.keep(**arguments)
            if call is None:
                return None
            for name in names.values():
                if name is not None:
                    self.uses[name] += 1
            y: Tensor = _KeptCall.apply(self.anchor, x, self, call, names)
            return slices_of(y, LEVEL)

    def _requires_grad(self, tensor: Tensor) -> bool:
        """What vmap(grad) would show of a slice."""
        if id(tensor) in self._name_of_copy:
            return True
        if is_wrapped(tensor):
            with below_innermost():
                batch = batch_behind(tensor, LEVEL, self._size)
                if batch is not None:
                    return batch.requires_grad
        return tensor.requires_grad


class _KeptCall(Function):
    """A function of the input. Its backward hands on what rows are made of."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        recorder: Recorder,
        call: KeptCall,
        names: Mapping[str, str | None],
    ) -> Tensor:
        ctx.recorder, ctx.call, ctx.names = recorder, call, names
        found = call.forward(x)
        y, *saved = (found,) if isinstance(found, Tensor) else found
        ctx.save_for_backward(x, *saved)  # says so where x was written over since
        return without_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, *saved = ctx.saved_tensors
        x = x.detach()  # kept, perhaps, until after backward
        names, call = ctx.names, ctx.call
        by_input, of_input = ctx.needs_input_grad[1], None
        if isinstance(call, ByFormulas):
            for own, formula in call.formulas.items():
                if names[own] is not None:
                    ctx.recorder.receive(names[own], formula, x, grad)
            if by_input and call.input_gradient is not None:
                # Autocast computes in the dtype of the output and goes back.
                of_input = call.input_gradient(x.to(grad.dtype), grad).to(x.dtype)
        else:
            wanted = [by_input, *[name is not None for name in names.values()]]
            of_input, *made = call.backward(grad, x, saved, wanted)
            for name, rows in zip(names.values(), made):
                if name is not None and rows is not None:
                    made = Made(rows.shape[1:], own=rows.is_contiguous())
                    ctx.recorder.receive(name, made, rows, rows)
        return None, of_input, None, None, None


def _one_by_one(value: Tensor) -> Tensor:
    """A vector without gaps in memory, which torch's batch norm does not expect in
    backward on the CPU."""
    return value.contiguous() if value.dim() == 1 else value


def _no_hooks() -> Any:
    """Refuse them, as vmap(grad) does: backward would compute outside the vmap."""
    return disable_saved_tensors_hooks(
        "per-sample gradients don't support saved tensor hooks, as "
        "torch.utils.checkpoint uses them"
    )


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
# Functions of autograd that only vmap(grad) can follow. What watches backward asks for
# Tensor.grad_fn, as torch's FlopCounterMode does.
_REFUSED: Mapping[Any, str] = {
    torch.autograd.grad: "torch.autograd.grad",
    Tensor.backward: "Tensor.backward",
    Tensor.grad_fn.__get__: "Tensor.grad_fn",  # type: ignore[union-attr]
    Tensor.register_hook: "Tensor.register_hook",
}
_ASKED = {*_REFUSED, _REQUIRES_GRAD}
