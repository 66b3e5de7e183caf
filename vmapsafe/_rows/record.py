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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, disable_saved_tensors_hooks
from torch.func import vmap

from vmapsafe._rows.copies import Copies, leaves_of
from vmapsafe._torch import (
    base_of,
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
from vmapsafe.rules.convolution import FUNCTIONS
from vmapsafe.rules.formulas import Formula, Made
from vmapsafe.rules.kept_calls import (
    KEPT_CALLS,
    ByFormulas,
    ByKernel,
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
    def whole(self, name: str, rows: Tensor, own: bool = False) -> None:
        """Take the rows (B, *shape) of a parameter.

        If ``own``, they are contiguous, and nothing else uses their memory.
        """


class Uses:
    """The uses of parameters that a forward records, for backward.

    Args:
        values: what stands for the parameters, by name.
        size: B.

    Attributes:
        plain: the values without a derivative.
        copies: the samples' copies of those that need some, (B, *shape), by name.
        counts: how many recorded uses each has.
        lacks_a_gradient: whether a tensor requires a gradient that is not computed.
        fresh: names of copies whose gradient autograd makes in memory of its own.
        calls: those that were caught.
        starts: the leaves of autograd's graph that come from such calls.
        anchor: all recorded outputs depend on it, so that autograd reaches them.
        receive: takes a use and its output gradient in backward.
    """

    def __init__(self, values: Mapping[str, Tensor], size: int) -> None:
        self.plain = {n: _one_by_one(value.detach()) for n, value in values.items()}
        self.size = size
        self.copies: dict[str, Tensor] = {}
        self.counts = {name: 0 for name in values}
        self.lacks_a_gradient = False
        first = next(iter(values.values()))
        self.fresh: set[str] = set()
        self.calls: list[Caught] = []
        self.inputs: list[tuple[Tensor, int]] = []  # of other calls, and versions
        self.starts: list[Tensor] = []
        self.anchor = first.new_empty((), requires_grad=True)  # nobody reads its number
        self.receive: Callable[[str, Formula, Tensor, Tensor], None]

    def copies_of(self, name: str) -> Tensor:
        """The samples' copies of a parameter."""
        found = self.copies.get(name)
        if found is None:
            value = self.plain[name]
            found = value.expand(self.size, *value.shape).requires_grad_()
            self.copies[name] = found
        return found

    def recorded(
        self,
        func: Callable[..., Tensor],
        kept: KeptCalls,
        arguments: dict[str, Any],
        ids: Mapping[int, str],
    ) -> Tensor | None:
        """Make a call on the whole batch, and record it, in the way that is fastest.

        Args:
            func: the function.
            kept: how its calls are kept.
            arguments: of the call, by name, in order; the input is (B, ...), of slices
                (1, ...).
            ids: the names of parameters by the ids of the model's own.

        Returns:
            The output; None for a call that cannot be recorded.
        """
        x = arguments["input"]
        if x.dim() < 2 and func is not F.embedding:
            return None  # a slice is one vector, and not a batch of one
        if func in FUNCTIONS and x.dim() != arguments["weight"].dim():
            return None  # the same
        names = {own: ids.get(id(arguments[own])) for own in kept.parameters}
        if not x.requires_grad and not any(names.values()):
            return func(*arguments.values())
        if self.size == 1 and func in _AS_IT_IS:
            return self.plainly(kept.otherwise or func, arguments, names)
        if x.numel() <= SMALL:
            y = self.caught(func, kept, dict(arguments), names)
            if y is not None:
                return y
        return self.kept(kept, arguments, names, by_slices=False)

    def kept(
        self,
        kept: KeptCalls,
        arguments: dict[str, Any],
        names: Mapping[str, str | None],
        by_slices: bool = True,
    ) -> Tensor | None:
        """Make a call on the whole batch, and keep it for backward.

        Args:
            kept: how the function's calls are kept.
            arguments: of the call, by name, with the whole batch.
            names: the name in the model of each argument that may be a parameter.
            by_slices: whether the input is (B, N, ...); else it is (B, ...), of slices
                (1, ...).

        Returns:
            The output, as the input is; None for a call that cannot be kept.
        """
        x = arguments["input"]
        for own, name in names.items():
            if name is not None:  # without the samples' copies, and a derivative
                arguments[own] = self.plain[name]
        if not by_slices:
            arguments["input"] = x.unsqueeze(1)
        call = kept.keep(**arguments)
        if call is None:
            return None
        for name in names.values():
            if name is not None:
                self.counts[name] += 1
        if not by_slices:
            self.inputs.append((x.detach(), x._version))
        y: Tensor = KeptOutput.apply(self.anchor, x, self, call, names, by_slices)
        return y

    def plainly(
        self,
        func: Callable[..., Tensor],
        arguments: dict[str, Any],
        names: Mapping[str, str | None],
    ) -> Tensor:
        """Make a call on one sample, whose rows autograd finds."""
        for own, name in names.items():
            if name is not None:
                if name not in self.copies:
                    self.fresh.add(name)
                copy = self.copies_of(name)
                arguments[own] = copy.view(copy.shape[1:])
        return func(*arguments.values())

    def caught(
        self,
        func: Callable[..., Tensor],
        kept: KeptCalls,
        arguments: dict[str, Any],
        names: Mapping[str, str | None],
    ) -> Tensor | None:
        """Make a call as :meth:`kept` does, of an input (B, ...), and let autograd find
        the gradients of its input and output.

        This takes a third of the time, and the memory of all output gradients at once.
        """
        x = arguments["input"]
        for own, name in names.items():
            if name is not None:
                arguments[own] = self.plain[name]
        call = kept.keep(**{**arguments, "input": x.unsqueeze(1)})
        if call is None or isinstance(call, ByKernel) and call.rows is None:
            return None
        y = (kept.otherwise or func)(*arguments.values())
        if not y.requires_grad:
            y.requires_grad_()
            self.starts.append(y)
            y = y.clone()  # which may be written
        elif base_of(y) is not None:
            y = without_view(y)  # to write a view changes the graph behind it
        for name in names.values():
            if name is not None:
                self.counts[name] += 1
        assert y.grad_fn is not None
        edge = GradientEdge(y.grad_fn, y.output_nr)
        self.calls.append(Caught(edge, x.detach(), x._version, call, names))
        return y

    def written(self) -> bool:
        """Whether an input of a recorded call has been written since."""
        inputs = [*self.inputs, *[(one.x, one.version) for one in self.calls]]
        return any([x._version != version for x, version in inputs])


# Of functions with right derivatives by parameters; of one sample, these are the rows.
_AS_IT_IS = (F.linear, F.batch_norm, *FUNCTIONS)
# Calls with fewer numbers are caught.
SMALL = 2**17


class Caught(NamedTuple):
    """A call whose output gradient autograd finds."""

    edge: GradientEdge
    x: Tensor
    version: int
    call: KeptCall
    names: Mapping[str, str | None]


class Recorded:
    """The losses of all samples, and what backward needs.

    Args:
        uses: of parameters, by the forward.
        losses: (B,), with autograd's graph.
        aux: what the loss returned besides.

    Attributes:
        losses: the same.
        aux: the same.
        leaves: those of the losses' graph.

    Raises:
        Unrecordable: torch would make wrong rows of so many numbers.
    """

    def __init__(self, uses: Uses, losses: Tensor, aux: Any) -> None:
        self._uses, self.losses, self.aux = uses, losses, aux
        self.leaves = leaves_of(losses)
        self._reached = {id(leaf) for leaf in self.leaves}
        for name, copies in uses.copies.items():
            if id(copies) in self._reached and may_overflow(copies):
                raise Unrecordable(f"gradients by {name!r} of 2**31 numbers or more")

    def is_watched(self) -> bool:
        """Whether plain autograd would differentiate the losses by other tensors."""
        if self._uses.lacks_a_gradient:
            return True
        uses = self._uses
        leaves = *uses.copies.values(), *uses.starts, uses.anchor
        return not self._reached <= {id(leaf) for leaf in leaves}

    def backward(self, into: Collector) -> None:
        """Hand the gradients of all parameters to ``into``. It can be called once."""
        into.losses(self.losses)
        uses, reached = self._uses, self._reached
        # ``receive`` knows these and not ``uses``: a cycle of references would keep the
        # rows alive until Python's garbage collector comes by.
        plain, counts = uses.plain, uses.counts
        rest = {n: leaf for n, leaf in uses.copies.items() if id(leaf) in reached}
        sums: dict[str, Tensor] = {}

        def add(name: str, rows: Tensor) -> None:
            sums[name] = sums[name] + rows if name in sums else rows

        def receive(name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
            dtype = plain[name].dtype
            if x.dtype != dtype and x.is_floating_point():
                x = x.to(dtype)
            grad = grad if grad.dtype == dtype else grad.to(dtype)
            if name in rest or counts[name] > 1:
                add(name, formula.rows(x, grad))
            else:
                into.streamed(name, formula, x, grad)
            received.add(name)

        def hand_on(
            call: KeptCall, names: Mapping[str, str | None], x: Tensor, grad: Tensor
        ) -> None:
            if isinstance(call, ByFormulas):
                for own, formula in call.formulas.items():
                    name = names[own]
                    if name is not None:
                        receive(name, formula, x, grad)
                return
            assert call.rows is not None
            wanted = [name is not None for name in names.values()]
            for name, rows in zip(names.values(), call.rows(grad, x, wanted)):
                if name is not None and rows is not None:
                    receive(name, _made(rows), rows, rows)

        received: set[str] = set()
        uses.receive = receive
        inputs: list[Any] = list(rest.values())
        if id(uses.anchor) in reached:
            inputs.append(uses.anchor)
        calls, uses.calls = uses.calls, []
        inputs += [one.edge for one in calls]
        # Under autocast, backward runs in the dtypes of forward; sums here are in the
        # dtypes of the parameters.
        with without_autocast(self.losses.device):
            grads: Sequence[Tensor | None] = ()
            if inputs and self.losses.requires_grad:
                ones = torch.ones_like(self.losses)
                grads = torch.autograd.grad(
                    self.losses, inputs, ones, allow_unused=True
                )
            for name, grad in zip(rest, grads):
                if grad is not None:
                    add(name, grad)
            for one, grad in zip(calls, grads[len(inputs) - len(calls) :]):
                if grad is not None:
                    hand_on(one.call, one.names, one.x.unsqueeze(1), grad.unsqueeze(1))
            for name, value in plain.items():
                if name in sums:
                    rows = sums.pop(name)
                    into.whole(name, rows, name in uses.fresh and rows.is_contiguous())
                elif name not in received:
                    shape = uses.size, *value.shape
                    into.whole(name, value.new_zeros(()).expand(shape))


def recorded(
    called: str,
    originals: Mapping[str, Tensor],
    loss: Callable[..., Any],
    values: Mapping[str, Tensor],
    batch: Sequence[Any],
    size: int,
    randomness: str,
    has_aux: bool,
    in_block: Callable[..., Any],
) -> Recorded:
    """Run a forward under vmap, and record it.

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

    Returns:
        The losses, and the way to the gradients.

    Raises:
        Unrecordable: the loss does what only ``vmap(grad)`` can follow.
    """
    uses = Uses(values, size)
    for name in values:
        uses.copies_of(name)
    recorder = Recorder(called, originals, uses)

    def one(*sample: Any) -> Any:
        copies = recorder.begin()
        found = under(recorder, in_block, loss, copies, *sample)
        recorder.check()
        return found

    with torch.enable_grad(), no_hooks():
        result = vmap(one, randomness=randomness)(*batch)
    losses, aux = result if has_aux else (result, ())
    found = Recorded(uses, losses, tree_map(lambda t: t.detach(), aux))
    recorder.check_graph(found.leaves)
    return found


class Recorder(Copies):
    """The mode under which forward runs.

    Args:
        called: the public function, for errors.
        originals: the model's parameters, by name.
        uses: records those of the parameters.
    """

    def __init__(
        self, called: str, originals: Mapping[str, Tensor], uses: Uses
    ) -> None:
        super().__init__(called, originals)
        self._uses, self._size = uses, uses.size

    def begin(self) -> Mapping[str, Tensor]:
        """Begin a forward; returns the slices of the copies that it sees."""
        leaves = self._uses.copies
        copies = {name: slices_of(leaf, LEVEL) for name, leaf in leaves.items()}
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
            if name is None and parameter is not None:
                others.append(parameter)
        if not any(names.values()) or any([is_wrapped(p) for p in others]):
            return None
        if any([p.requires_grad for p in others]):
            self._uses.lacks_a_gradient = True
        with below_innermost():
            x = batch_behind(arguments["input"], LEVEL, self._size)
            if x is None:
                return None
            y = self._uses.kept(kept, {**arguments, "input": x}, names)
            return None if y is None else slices_of(y, LEVEL)

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


class KeptOutput(Function):
    """A function of the input. Its backward hands on what rows are made of."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        uses: Uses,
        call: KeptCall,
        names: Mapping[str, str | None],
        by_slices: bool,
    ) -> Tensor:
        ctx.uses, ctx.call, ctx.names, ctx.by_slices = uses, call, names, by_slices
        found = call.forward(x if by_slices else x.unsqueeze(1))
        y, *saved = (found,) if isinstance(found, Tensor) else found
        ctx.save_for_backward(x, *saved)  # says so where x was written over since
        return without_view(y if by_slices else y.squeeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, *saved = ctx.saved_tensors
        x = x.detach()  # kept, perhaps, until after backward
        if not ctx.by_slices:
            x, grad = x.unsqueeze(1), grad.unsqueeze(1)
        names, call = ctx.names, ctx.call
        by_input, of_input = ctx.needs_input_grad[1], None
        if isinstance(call, ByFormulas):
            for own, formula in call.formulas.items():
                if names[own] is not None:
                    ctx.uses.receive(names[own], formula, x, grad)
            if by_input and call.input_gradient is not None:
                # Autocast computes in the dtype of the output and goes back.
                of_input = call.input_gradient(x.to(grad.dtype), grad).to(x.dtype)
        else:
            wanted = [by_input, *[name is not None for name in names.values()]]
            of_input, *made = call.backward(grad, x, saved, wanted)
            for name, rows in zip(names.values(), made):
                if name is not None and rows is not None:
                    ctx.uses.receive(name, _made(rows), rows, rows)
        if of_input is not None and not ctx.by_slices:
            of_input = of_input.squeeze(1)
        return None, of_input, None, None, None, None


def _made(rows: Tensor) -> Made:
    return Made(rows.shape[1:], own=rows.is_contiguous())


def _one_by_one(value: Tensor) -> Tensor:
    """A vector without gaps in memory, which torch's batch norm does not expect in
    backward on the CPU."""
    return value.contiguous() if value.dim() == 1 else value


def no_hooks() -> Any:
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
