"""Every sample's gradient of a parameter from one backward pass for the activations.

Under ``vmap(grad)`` the weight gradients of all samples are made, B x P numbers, before
anybody can ask for their norms. Here autograd is *around* the vmap: the losses of all
samples come from one vmapped forward, and one backward pass of their sum follows. Each
parameter is handed over as a batch of copies, ``p.expand(B, ...)``, which takes no
memory: sample i's own copy, whose gradient is row i, whatever is done with it.

Autograd would need B x P numbers for that too. So a :class:`Recorder`, a mode below the
block's, knows some functions (``F.linear``, convolutions, ``F.embedding``) by heart: it
calls them on the whole batch with the plain parameter, without a derivative by it, and
keeps the input; backward hands in the output gradient. From the two come rows, their
norms or a weighted sum (``_formulas``). Normalisation layers, whose rows are small, are
called on the copies of all samples in one kernel.

A parameter with one recorded use and no other is *streamed*: nothing of size B x P is
made. Else its row is the sum of the rows of its recorded uses and what autograd has for
its copies, cross terms included; whether there is such a rest, autograd's graph tells.

This is the "book-keeping" of Bu et al., https://arxiv.org/abs/2210.00038, with vmap's
meaning of what a sample is in the place of hooks on layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import vmap

from vmapsafe._call import Call
from vmapsafe._rows.copies import Copies, leaves_of
from vmapsafe._rows.formulas import (
    Bias,
    Convolution,
    Embedding,
    Formula,
    Linear,
    Made,
    Memory,
)
from vmapsafe._torch import (
    batch_behind,
    below_innermost,
    current_level,
    is_wrapped,
    slices_of,
    tree_map,
    under,
    without_autocast,
)
from vmapsafe.rules.batch_norm import by_running_statistics, has_several_layouts
from vmapsafe.rules.native_batch_norm import (
    affine,
    affine_backward,
    normalised,
    normalised_backward,
)

LEVEL = 1  # of the one vmap


class Unrecordable(Exception):
    """What is named; only ``vmap(grad)`` can follow it in the loss."""


class Collector(Protocol):
    """What becomes of the gradients, parameter by parameter as backward meets them."""

    def storage(self, name: str) -> Memory | None:
        """What gives memory (B, *shape) for the parameter's rows, if they need some."""

    def streamed(self, name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
        """The one use of a parameter."""

    def whole(self, name: str, rows: Tensor) -> None:
        """The rows (B, *shape) of a parameter."""


class Recorded:
    """The losses of all samples, and what was kept of the way to them.

    Attributes:
        losses: (B,), with autograd's graph.
        aux: what the loss returned besides, with ``has_aux``.
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
        block: Any,
    ) -> None:
        """Run ``loss(values, *batch)`` on every sample, inside ``block``; ``values``
        stand for ``originals`` of the same names."""
        self._recorder = recorder = Recorder(called, originals, values, size)

        def one(*sample: Any) -> Any:
            copies = recorder.begin()
            found = under(recorder, block.run, loss, copies, *sample)
            recorder.check()
            return found

        with torch.enable_grad(), _no_hooks():
            result = vmap(one, randomness=randomness)(*batch)
        self.losses, aux = result if has_aux else (result, ())
        self.aux = tree_map(lambda t: t.detach(), aux)
        leaves = leaves_of(self.losses)
        recorder.check_graph(leaves)
        self._reached = {id(leaf) for leaf in leaves}

    def watched(self) -> bool:
        """Whether tensors of the caller's require a gradient of the losses."""
        if self._recorder.leaves_out:
            return True
        leaves = *self._recorder.leaves.values(), self._recorder.anchor
        return not self._reached <= {id(leaf) for leaf in leaves}

    def backward(self, into: Collector) -> None:
        """Hand the gradients of all parameters to ``into``; only once."""
        recorder, reached = self._recorder, self._reached
        # ``receive`` knows these and not the recorder: a cycle of references would keep
        # the rows alive until Python's garbage collector comes by.
        leaves, uses = recorder.leaves, recorder.uses
        rest = {name: leaf for name, leaf in leaves.items() if id(leaf) in reached}
        sums: dict[str, Tensor] = {}

        def add(name: str, rows: Tensor) -> None:
            sums[name] = sums[name] + rows if name in sums else rows

        def receive(name: str, formula: Formula, x: Tensor, grad: Tensor) -> None:
            dtype = leaves[name].dtype
            x, grad = x.to(dtype) if x.is_floating_point() else x, grad.to(dtype)
            if name in rest or uses[name] > 1:
                storage = None if name in sums else into.storage(name)
                add(name, formula.rows(x, grad, storage))
            else:
                into.streamed(name, formula, x, grad)
            received.add(name)

        received: set[str] = set()
        recorder.receive = receive
        inputs = list(rest.values())
        if id(recorder.anchor) in reached:
            inputs.append(recorder.anchor)
        # Under autocast backward runs in the dtypes of forward, and our sums in those
        # of the parameters.
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

    Attributes:
        leaves: the copies of each parameter, (B, *shape), by name.
        uses: how many recorded uses each has.
        leaves_out: whether there is a tensor that requires a gradient and gets none.
        anchor: what all recorded outputs depend on, for autograd to reach them.
        receive: what takes a use and its output gradient in backward.
    """

    def __init__(
        self,
        called: str,
        originals: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        size: int,
    ) -> None:
        super().__init__(called, originals)
        self._plain = {name: value.detach() for name, value in values.items()}
        self.leaves = {
            name: value.expand(size, *value.shape).requires_grad_()
            for name, value in self._plain.items()
        }
        self._size = size
        self.uses = {name: 0 for name in values}
        self.leaves_out = False
        self.anchor = torch.zeros((), requires_grad=True)
        self.receive: Callable[[str, Formula, Tensor, Tensor], None]

    def begin(self) -> Mapping[str, Tensor]:
        """Forward begins, and sees this slice of the copies; known by identity."""
        copies = {name: slices_of(leaf, LEVEL) for name, leaf in self.leaves.items()}
        self.stand_in(copies)
        self._names = {id(copy): name for name, copy in copies.items()}
        return copies

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        known = _KNOWN.get(func)
        if known is not None and current_level() == LEVEL:
            result = known(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    # -- For the functions below ------------------------------------------------------

    def name(self, tensor: Tensor | None) -> str | None:
        """Of which parameter it is the copy, if of one."""
        return None if tensor is None else self._names.get(id(tensor))

    def used(self, tensor: Tensor | None) -> str | None:
        """The same, noting that there is a recorded use."""
        name = self.name(tensor)
        if name is not None:
            self.uses[name] += 1
        return name

    def takes(self, *parameters: Tensor | None) -> bool:
        """Whether one is a copy, and the others are plain tensors."""
        given = [p for p in parameters if p is not None]
        others = [p for p in given if self.name(p) is None]
        if len(others) == len(given) or any([is_wrapped(p) for p in others]):
            return False
        self.leaves_out = self.leaves_out or any([p.requires_grad for p in others])
        return True

    def batch(self, slice_: Tensor) -> Tensor | None:
        """(B, ...), if no transform but ours knows the slice."""
        return batch_behind(slice_, LEVEL, self._size)

    def plain(self, parameter: Tensor | None) -> Any:
        """The parameter without the samples' copies, and without a derivative."""
        name = self.name(parameter)
        return parameter if name is None else self._plain[name]

    def copies(self, parameter: Tensor) -> Tensor:
        """(B, *shape): the samples' copies."""
        name = self.name(parameter)
        if name is not None:
            return self.leaves[name]
        batch = self.batch(parameter)
        assert batch is not None
        return batch

    def known(
        self,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor, Tensor], Tensor] | None,
        uses: Sequence[tuple[Tensor | None, Callable[[torch.Size], Formula]]],
    ) -> Tensor:
        """``function(x)`` (B, ...), whose gradient by ``x`` is ``backward(x, grad)``,
        with the copies among ``uses``."""
        found = []
        for parameter, formula in uses:
            name = self.used(parameter)
            if name is not None:
                found.append((name, formula(self._plain[name].shape)))
        y: Tensor = _Known.apply(self.anchor, x, self, function, backward, found)
        return slices_of(y, LEVEL)


class _Known(Function):
    """A function of the input alone, whose backward hands the input and the output
    gradient on to the formulas of the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        recorder: Recorder,
        function: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor, Tensor], Tensor],
        uses: list[tuple[str, Formula]],
    ) -> Tensor:
        ctx.recorder, ctx.uses, ctx.by_input = recorder, uses, backward
        ctx.save_for_backward(x)  # says so where it was written over since
        return _no_view(function(x))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x = ctx.saved_tensors[0].detach()  # kept, perhaps, until after backward
        for name, formula in ctx.uses:
            ctx.recorder.receive(name, formula, x, grads[0])
        of_input = None
        if ctx.needs_input_grad[1]:
            # Autocast computes in the dtype of the output and goes back.
            of_input = ctx.by_input(x.to(grads[0].dtype), grads[0]).to(x.dtype)
        return None, of_input, None, None, None, None


def _no_view(y: Tensor) -> Tensor:
    """The same memory, of which autograd does not know that it is a view: what follows
    may write into it without a price."""
    shown: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return shown


def _no_hooks() -> Any:
    """As in vmap(grad): what is computed again in backward would be past the vmap."""
    return disable_saved_tensors_hooks(
        "per-sample gradients don't support saved tensor hooks, as "
        "torch.utils.checkpoint uses them"
    )


# -- The functions known by heart ------------------------------------------------------
#
# Each has torch's own signature after the recorder. NotImplemented: torch's own, on the
# copies.


def _linear(
    recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    if not recorder.takes(weight, bias) or weight.dim() != 2:
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[:1]:  # it broadcasts
        y = _linear(recorder, input, weight) if recorder.takes(weight) else None
        y = F.linear(input, weight) if y is None or y is NotImplemented else y
        return y + bias.expand(y.shape)
    with below_innermost():
        x = recorder.batch(input)
        if x is None or x.dim() < 2:
            return NotImplemented
        w, b = recorder.plain(weight), recorder.plain(bias)
        return recorder.known(
            x,
            lambda x: F.linear(x, w, b),
            lambda x, grad: grad @ w.to(grad.dtype),
            ((weight, Linear), (bias, lambda shape: Bias(shape, -1))),
        )


def _convolution(
    recorder: Recorder,
    function: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not recorder.takes(weight, bias) or input.dim() != dims + 2:
        return NotImplemented
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    if padding == "same":
        widths = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        if any([width % 2 for width in widths]):
            return NotImplemented
        padding = [width // 2 for width in widths]
    padding = _each(0 if padding == "valid" else padding, dims)
    with below_innermost():
        x = recorder.batch(input)
        if x is None:
            return NotImplemented
        w, b = recorder.plain(weight), recorder.plain(bias)
        options = (stride, padding, dilation, groups)
        formula = Convolution(w.shape, w, *options)

        def forward(x: Tensor) -> Tensor:
            merged = function(x.flatten(0, 1), w, b, *options)
            return merged.view(*x.shape[:2], *merged.shape[1:])

        uses = ((weight, lambda shape: formula), (bias, lambda shape: Bias(shape, 2)))
        return recorder.known(x, forward, formula.input_gradient, uses)


def _of(function: Callable[..., Tensor], dims: int) -> Callable[..., Any]:
    return lambda recorder, *args, **kwargs: _convolution(
        recorder, function, dims, *args, **kwargs
    )


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _embedding(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    if not recorder.takes(weight):
        return NotImplemented
    with below_innermost():
        x = recorder.batch(input)
        if x is None:
            return NotImplemented
        w = recorder.plain(weight)
        return recorder.known(
            x,
            lambda x: F.embedding(x, w, padding_idx),
            None,
            [(weight, lambda shape: Embedding(shape, padding_idx))],
        )


def _batch_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    def by_torch() -> Any:
        if not has_several_layouts(input):
            return NotImplemented
        statistics = running_mean, running_var, weight, bias, training, momentum, eps
        return F.batch_norm(input.flatten(2), *statistics).view(input.shape)

    if not recorder.takes(weight, bias):
        return by_torch()
    statistics = [] if training else [running_mean, running_var]
    if any([s is None or is_wrapped(s) for s in statistics]):
        return by_torch()
    with below_innermost():
        x = recorder.batch(input)
        given = [recorder.plain(p) for p in (weight, bias)] + statistics
        if x is not None and x.numel() and _all_like(x, given):
            names = recorder.used(weight), recorder.used(bias)
            y = _Normed.apply(recorder.anchor, x, recorder, names, given, eps)
            return slices_of(y, LEVEL)
    if training:
        return by_torch()
    arguments = {
        "input": input,
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
        "eps": eps,
    }
    return by_running_statistics(Call(F.batch_norm, arguments))


def _all_like(x: Tensor, given: Sequence[Tensor | None]) -> bool:
    """Whether all are numbers (C,), of one dtype with x."""
    return all([t is None or t.dtype == x.dtype and t.dim() == 1 for t in given])


def _instance_norm(recorder: Recorder, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """With one layout: torch makes it batch norm of a batch of one."""
    if input.dim() <= 3:
        return NotImplemented
    return F.instance_norm(input.flatten(2), *args, **kwargs).view(input.shape)


class _Normed(Function):
    """Batch norm, whose backward hands the rows of weight and bias on."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        recorder: Recorder,
        names: Sequence[str | None],
        given: Sequence[Tensor | None],
        eps: float,
    ) -> Tensor:
        weight, bias, *statistics = given
        ctx.own = not statistics
        mean, var = statistics or (None, None)
        ctx.recorder, ctx.names = recorder, names
        call = Call(
            torch.ops.aten.native_batch_norm.default,
            {
                "input": x,
                "weight": weight,
                "bias": bias,
                "running_mean": mean,
                "running_var": var,
                "training": ctx.own,
                "momentum": 0.0,
                "eps": eps,
            },
            in_dims={"input": 0},
        )
        y, *saved = (normalised if ctx.own else affine)(call)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, var, *saved)
        return _no_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean, var, *saved = ctx.saved_tensors
        wanted = [name is not None for name in ctx.names]
        call = Call(
            torch.ops.aten.native_batch_norm_backward.default,
            {
                "grad_out": grads[0],
                "input": x,
                "weight": weight,
                "running_mean": mean,
                "running_var": var,
                "save_mean": saved[0],
                "save_invstd": saved[1],
                "train": ctx.own,
                "eps": ctx.eps,
                "output_mask": [ctx.needs_input_grad[1], *wanted],
            },
            in_dims={"grad_out": 0, "input": 0, "save_mean": 0, "save_invstd": 0},
        )
        backward = normalised_backward if ctx.own else affine_backward
        of_input, *rows = backward(call)
        for name, made in zip(ctx.names, rows):
            if name is not None and made is not None:
                ctx.recorder.receive(name, Made(made.shape[1:]), made, made)
        return None, of_input, None, None, None, None


def _group_norm(
    recorder: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """A norm of one sample with B x N x C channels, each with a weight of its own: the
    kernel's gradient by the weights is the rows."""
    if not recorder.takes(weight, bias):
        return NotImplemented
    with below_innermost():
        x = recorder.batch(input)
        if x is None or x.dim() < 3:
            return NotImplemented
        shape = x.shape[:3]  # B, N, C

        def wide(parameter: Tensor | None) -> Tensor | None:
            if parameter is None:
                return None
            return recorder.copies(parameter).unsqueeze(1).expand(shape).reshape(-1)

        merged = x.reshape(1, shape.numel(), *x.shape[3:])
        groups = num_groups * shape[0] * shape[1]
        y = F.group_norm(merged, groups, wide(weight), wide(bias), eps)
        return slices_of(_Viewed.apply(y, x.shape), LEVEL)


class _Viewed(Function):
    """A view that may be written into."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = y.shape
        return _no_view(y.contiguous().view(shape))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].contiguous().view(ctx.shape), None


def _layer_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not recorder.takes(weight, bias):
        return NotImplemented
    with below_innermost():
        x = recorder.batch(input)
        if x is None:
            return NotImplemented
        y = F.layer_norm(x, normalized_shape, None, None, eps)
        for parameter, apply in ((weight, torch.mul), (bias, torch.add)):
            if parameter is not None:
                copies = recorder.copies(parameter)
                ones = [1 for _ in range(x.dim() - copies.dim())]
                y = apply(y, copies.view(len(x), *ones, *parameter.shape))
        return slices_of(y, LEVEL)


def _refused(name: str) -> Callable[..., Any]:
    def refuse(recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
        raise Unrecordable(name)

    return refuse


def _requires_grad(recorder: Recorder, tensor: Tensor) -> Any:
    """As in vmap(grad), where a slice shows it."""
    if recorder.name(tensor) is not None:
        return True
    if not is_wrapped(tensor):
        return NotImplemented
    with below_innermost():
        batch = recorder.batch(tensor)
        return NotImplemented if batch is None else batch.requires_grad


_KNOWN: Mapping[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.conv1d: _of(F.conv1d, 1),
    F.conv2d: _of(F.conv2d, 2),
    F.conv3d: _of(F.conv3d, 3),
    F.embedding: _embedding,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    torch.autograd.grad: _refused("torch.autograd.grad"),
    Tensor.backward: _refused("Tensor.backward"),
    Tensor.requires_grad.__get__: _requires_grad,  # type: ignore[attr-defined]
    # Asked for by what watches backward, as torch's FlopCounterMode does.
    Tensor.grad_fn.__get__: _refused("Tensor.grad_fn"),  # type: ignore[union-attr]
    Tensor.register_hook: _refused("Tensor.register_hook"),
}
