"""The model, the loss and the batch of a call, checked and bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from vmapsafe._block.loop import in_turn, stacked
from vmapsafe._block.models import process_group, unwrapped
from vmapsafe._block.vmap_safe import Block
from vmapsafe._draws import Draws, check_randomness
from vmapsafe._errors import (
    VmapSafeTypeError,
    VmapSafeValueError,
    a_kind,
    shown,
)
from vmapsafe._modes import Options, check_flag
from vmapsafe._rows.copies import Copies, leaves_of
from vmapsafe._rows.layers import in_a_row, layers_in, loss_in
from vmapsafe._rows.merged import Trials, merged
from vmapsafe._rows.parameters import Parameters, Params
from vmapsafe._rows.plain import Found, by_autograd
from vmapsafe._rows.record import LEVEL, Recorded, recorded
from vmapsafe._rows.traced import LEVEL as LEVEL_OF_TRACED
from vmapsafe._rows.traced import Traced
from vmapsafe._torch import (
    autocasts,
    beyond_reverse_mode,
    current_level,
    dispatch_modes_are_on,
    innermost,
    modes_in_force,
    tree_flatten,
    tree_map,
    under,
    without_inference_mode,
)
from vmapsafe.rules.alike import DEVICES, NotAlike

Loss = Callable[..., Any]


@dataclass(frozen=True)
class Samples:
    """One call's model, loss and batch.

    Attributes:
        called: the public function, for errors.
        model: what the caller passed.
        net: the model, out of its wrappers.
        loss_fn: of the model's output and the rest of the batch.
        parameters: those to differentiate by, and where they are.
        batch: trees of tensors (B, ...). If the caller's batch is empty, it is made-up
            samples, whose results are thrown away.
        tensors: those of the batch.
        size: of the caller's batch.
        options: of the block.
        randomness: as in vmap.
        has_aux: whether the loss returns a pair.
        keep_batch_dim: whether the model sees a sample as a batch of one.
    """

    called: str
    model: nn.Module
    net: nn.Module
    loss_fn: Loss
    parameters: Parameters
    batch: tuple[Any, ...]
    tensors: list[Tensor]
    size: int
    options: Options
    randomness: str
    has_aux: bool
    keep_batch_dim: bool

    @staticmethod
    def of(
        model: nn.Module,
        loss_fn: Loss,
        batch: tuple[Any, ...],
        params: Params,
        options: Options,
        randomness: str,
        has_aux: bool,
        keep_batch_dim: bool = True,
    ) -> Samples:
        """Check the arguments of a call, and bind them.

        Args:
            model: what the caller passed, as all that follows.
            loss_fn: of the model's output and the rest of the batch.
            batch: the inputs, then what ``loss_fn`` takes after the output.
            params: by which parameters to differentiate.
            options: of the block, checked.
            randomness: as in vmap.
            has_aux: whether the loss returns a pair.
            keep_batch_dim: whether the model sees a sample as a batch of one.

        Returns:
            The samples.

        Raises:
            VmapSafeTypeError: an argument of another kind.
            VmapSafeValueError: an argument that makes no sense with the others.
        """
        called = options.called
        _check_model_and_loss(called, model, loss_fn)
        check_randomness(called, randomness)
        _check_keep_batch_dim(called, keep_batch_dim, options)
        net = unwrapped(model)
        parameters = Parameters.of(called, net, params)
        if parameters.of_state_dict and options.update_running_stats:
            raise VmapSafeValueError(
                f"{called} with update_running_stats=True",
                "params is a state dict, whose tensors are never written",
                "Leave update_running_stats out, or pass the parameters alone",
            )
        if options.update_running_stats and not options.meaning.merges:
            raise VmapSafeValueError(
                f"{called} with update_running_stats=True",
                f'in "{options.mode}" each slice would need running statistics of its '
                "own",
                'Use mode="sync", or leave update_running_stats out',
            )
        size = _batch_size(called, batch)
        if size == 0:
            _check_one_process(called, net, options)
            options = replace(options, update_running_stats=False)
            batch = _made_up(batch)
        return Samples(
            called,
            model,
            net,
            loss_fn,
            parameters,
            batch,
            _tensors(batch),
            size,
            options,
            randomness,
            has_aux,
            keep_batch_dim,
        )

    def without_updates(self) -> Samples:
        """The same, whose forward updates no running statistics."""
        if not self.options.update_running_stats:
            return self
        return replace(self, options=replace(self.options, update_running_stats=False))

    def of_other(self, batch: tuple[Any, ...]) -> Samples:
        """The samples of another batch for the same model, without updates.

        Args:
            batch: as that of the call.

        Returns:
            The samples.

        Raises:
            VmapSafeValueError: its structure is another, or its batch sizes disagree.
        """
        leaves, tree = tree_flatten(batch)
        kinds, own = ([_kind(leaf) for leaf in t] for t in (leaves, self.tensors))
        if tree != tree_flatten(self.batch)[1] or kinds != own:
            raise VmapSafeValueError(
                f"{self.called} with other=",
                f"other holds {_worded(leaves)}, and the batch {_worded(self.tensors)}",
                "Give a tuple of the same structure, such as (inputs, targets), on the "
                "same device",
            )
        size = _batch_size(f"{self.called} with other=", batch)
        if size == 0:
            _check_one_process(self.called, self.net, self.options)
            batch = _made_up(batch)
        tensors = tree_flatten(batch)[0]
        changed = replace(self, batch=batch, tensors=tensors, size=size)
        return changed.without_updates()

    @property
    def count(self) -> int:
        """How many samples run, made-up ones included."""
        return self.size or _MADE_UP

    @property
    def values(self) -> dict[str, Tensor]:
        """The tensors to differentiate by, by name."""
        return self.parameters.values

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.values.values())).device

    def part(self, start: int, stop: int) -> tuple[Any, ...]:
        """Some of the samples."""
        if start == 0 and stop >= self.count:
            return self.batch
        part: tuple[Any, ...] = tree_map(lambda t: t[start:stop], self.batch)
        return part

    def rows(self, batch: tuple[Any, ...]) -> tuple[dict[str, Tensor], Tensor, Any]:
        """The rows, losses and aux by ``vmap(grad)``; derivatives pass through."""
        derive = self._by_jacobian if self.options.rows == "jacobian" else self._by_grad
        with without_inference_mode():
            rows, (losses, aux) = self._in_block(self.options, derive, batch)
        return rows, losses, aux

    def one_by_one(
        self, batch: tuple[Any, ...], derivatives: bool
    ) -> tuple[dict[str, Tensor], Tensor, Any]:
        """The same by a loop over the samples.

        Args:
            batch: some of them.
            derivatives: whether those of the rows may be wanted.

        Returns:
            The rows, losses and aux.
        """
        watched = derivatives and (self.could_be_watched() or beyond_reverse_mode())
        if not watched:
            batch = tree_map(lambda t: t.detach(), batch)

        def one(i: int) -> Found:
            sample = tree_map(lambda t: t[i], batch)
            if current_level():
                derive = grad(self._loss_of_copies, has_aux=True)
                rows, (loss, aux) = derive(self.values, *sample)
                return rows, loss, aux
            return by_autograd(
                self.called,
                self.parameters,
                self._loss_with_aux,
                self._given,
                sample,
                watched,
                derivatives,
            )

        size = len(_tensors(batch)[0])
        recorded = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(recorded):
            batch = tree_map(lambda t: t.clone() if t.is_inference() else t, batch)
            found = self._in_block(
                self.options, in_turn, self.called, size, self.randomness, one
            )
        rows, losses, aux = stacked(self.called, found)
        return rows, losses, aux

    def _in_block(
        self, options: Options, function: Callable[..., Any], *args: Any
    ) -> Any:
        """Call a function in a block of the model, with the constants in it."""
        block: Block[object] = Block((self.model,), options)
        return self.parameters.with_constants(block.run, function, *args)

    def recordable(self) -> bool:
        """Whether nothing that can be seen from outside forbids :meth:`recorded`."""
        leaves = (*self.tensors, *self.values.values())
        return (
            not torch.compiler.is_compiling()
            and current_level() == 0
            and not beyond_reverse_mode()
            and not torch.is_inference_mode_enabled()
            and self.options.rows != "jacobian"
            and all([type(leaf) in (Tensor, nn.Parameter) for leaf in leaves])
            and not any([leaf.is_inference() or leaf.is_complex() for leaf in leaves])
        )

    def recorded(self, batch: tuple[Any, ...]) -> Recorded:
        """Run the forward, and keep what backward needs for rows.

        Args:
            batch: some of the samples.

        Returns:
            The losses, and the way to the gradients.

        Raises:
            Unrecordable: the loss does what only :meth:`rows` can follow.
        """
        size = len(_tensors(batch)[0])
        found = self._merged(batch, size)
        if found is not None:
            return found
        return recorded(
            self.called,
            self.parameters.originals,
            self._loss,
            self.values,
            batch,
            size,
            self.randomness,
            self.has_aux,
            partial(self._in_block, replace(self.options, copies_at=LEVEL)),
        )

    def traceable(self) -> bool:
        """Whether torch.compile traces :meth:`traced`, as far as this can be seen from
        outside."""
        leaves = (*self.tensors, *self.values.values())
        return (
            torch.compiler.is_compiling()
            and current_level() == 0
            and self.options.rows != "jacobian"
            and not autocasts(self.device)
            and not any([leaf.is_complex() for leaf in leaves])
        )

    def traced(self, batch: tuple[Any, ...]) -> Traced:
        """As :meth:`recorded`, while torch.compile traces."""
        options = replace(self.options, copies_at=LEVEL_OF_TRACED)
        without_updates = replace(options, update_running_stats=False)
        with without_inference_mode():
            return Traced(
                self.parameters.originals,
                self._loss,
                self.values,
                batch,
                len(tree_flatten(batch)[0][0]),
                self.randomness,
                self.has_aux,
                partial(self._in_block, options),
                partial(self._in_block, without_updates),
            )

    def _merged(self, batch: tuple[Any, ...], size: int) -> Recorded | None:
        """The same from one batch of all samples; None where that cannot be done."""
        if not self._mergeable():
            return None
        found = self._in_a_row(batch)
        if found is not None:
            return found
        trial = self.net, self.loss_fn, self.tensors
        succeeded = _trials.ended(*trial)
        if succeeded is False:
            return None
        draws = None if succeeded else Draws(self.randomness, of_host=True)
        if draws is not None and not draws.known:
            return None
        try:
            found = merged(
                (*self.parameters.known.values(), *self.parameters.buffers),
                self.parameters.originals,
                self._loss_of_batch,
                batch,
                size,
                self.has_aux,
                partial(self._in_block, self.options),
            )
        except NotAlike:
            _trials.note(*trial, succeeded=False)
            if draws is not None:
                draws.put_back()
            return None
        if not succeeded:
            _trials.note(*trial, succeeded=True)
        return found

    def _in_a_row(self, batch: tuple[Any, ...]) -> Recorded | None:
        """The same from a model of torch's own layers; None for another."""
        if self.has_aux or len(batch) != 2 or self.options.also:
            return None
        x, y = batch
        loss = loss_in(self.loss_fn)
        if loss is None or type(x) is not Tensor or type(y) is not Tensor:
            return None
        layers = layers_in(self.net)
        if not layers:
            return None
        try:
            return in_a_row(layers, loss, self.parameters.originals, x, y)
        except NotAlike:
            return None

    def _mergeable(self) -> bool:
        """Whether the samples may be tried as one batch, see ``merged``."""
        device = self.device
        return (
            self.options.fast
            and self.options.meaning.reads_running_stats
            and self.keep_batch_dim
            and self.parameters.are_models_own
            and device.type in DEVICES
            and not modes_in_force()
            and not dispatch_modes_are_on()
            and not autocasts(device)
            and all([v.dtype in _DTYPES for v in self.values.values()])
            and not any([t.requires_grad for t in self.tensors])
        )

    def _loss_of_batch(self, inputs: Any, *rest: Any) -> Any:
        """The losses of a batch, which :func:`merged` sees to."""
        return self._output_and_loss(inputs, rest)

    def could_be_watched(self) -> bool:
        """Whether plain autograd has an interest in the rows."""
        if not torch.is_grad_enabled():
            return False
        known = self.parameters.known
        chosen = {id(known[name]) for name in self.values}
        others = [p for p in known.values() if id(p) not in chosen]
        given = (*self.tensors, *self.values.values())
        watched = (*given, *others, *self.parameters.buffers)
        return any([tensor.requires_grad for tensor in watched])

    # -- One sample --------------------------------------------------------------------

    def _loss(self, values: Mapping[str, Tensor], inputs: Any, *rest: Any) -> Any:
        """Of one sample, handed to the model as a batch of one, or as it is."""
        if self.keep_batch_dim:
            inputs, rest = tree_map(lambda t: t.unsqueeze(0), (inputs, rest))
        result = self.parameters.standing_in(
            values, self._output_and_loss, inputs, rest
        )
        if not self.has_aux:
            return self._scalar(result)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise VmapSafeValueError(
                f"{self.called} with has_aux=True",
                f"loss_fn gave {shown(result)} instead of a pair",
                "Let it return (loss, aux)",
            )
        value, aux = result
        if self.keep_batch_dim:
            aux = tree_map(self._aux, aux)
        return self._scalar(value), aux

    def _output_and_loss(self, inputs: Any, rest: tuple[Any, ...]) -> Any:
        args, kwargs = _as_call(inputs)
        output = self.net(*args, **kwargs)
        return self.loss_fn(output, *rest)  # which may read parameters too

    def _loss_of_copies(self, values: Mapping[str, Tensor], *sample: Any) -> Any:
        """The same where no :class:`Recorded` sees to it that all is read of them."""
        if torch.compiler.is_compiling():
            return _with_loss(self._loss(values, *sample), self.has_aux)
        copies = Copies(self.called, self.parameters.originals)
        copies.stand_in(values)
        result = under(copies, self._loss, values, *sample)
        copies.check()
        value = result[0] if self.has_aux else result
        given = {id(leaf) for leaf in self._given()}  # the copies come from these
        leaves = leaves_of(innermost(value))
        copies.check_graph([leaf for leaf in leaves if id(leaf) not in given])
        return _with_loss(result, self.has_aux)

    def _loss_with_aux(self, values: Mapping[str, Tensor], *sample: Any) -> Any:
        loss, (_, aux) = _with_loss(self._loss(values, *sample), self.has_aux)
        return loss, aux

    def _given(self) -> list[Tensor]:
        """What plain autograd differentiates the caller's ``params`` by."""
        values = [innermost(value) for value in self.values.values()]
        watched = [value for value in values if value.requires_grad]
        return [leaf for value in watched for leaf in (value, *leaves_of(value))]

    def _by_grad(self, batch: tuple[Any, ...]) -> Any:
        return vmap(
            grad(self._loss_of_copies, has_aux=True),
            (None, *[0 for _ in batch]),
            randomness=self.randomness,
        )(self.values, *batch)

    def _by_jacobian(self, batch: tuple[Any, ...]) -> Any:
        in_dims = (None, *[0 for _ in batch])
        losses = vmap(self._loss_of_copies, in_dims, randomness=self.randomness)
        return jacrev(losses, has_aux=True)(self.values, *batch)

    def _scalar(self, loss: Any) -> Tensor:
        if isinstance(loss, Tensor):
            if loss.dim() == 0:
                return loss
            if loss.shape == (1,):  # reduction="none"
                return loss.squeeze(0)
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        slice_ = "a batch of one" if self.keep_batch_dim else "one slice"
        do = 'Let it return the mean or the sum, e.g. reduction="sum"'
        if isinstance(loss, (int, float)):
            do = "Let it return a tensor; .item() and float() cut it from the model"
        if isinstance(loss, (tuple, list)):
            do = "Let it return the loss alone, or pass has_aux=True for (loss, aux)"
        raise VmapSafeValueError(
            self.called,
            f"loss_fn gave {found} for {slice_} instead of a tensor without "
            "dimensions",
            do,
        )

    def _aux(self, leaf: Any) -> Tensor:
        """Without the batch of one, if it has dimensions."""
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.size(0) == 1):
            return leaf.squeeze(0) if leaf.dim() else leaf
        raise VmapSafeValueError(
            f"{self.called} with has_aux=True",
            f"aux holds {shown(leaf)} for one sample, which is not a tensor with a "
            "batch of one as its first dimension",
            "Let loss_fn return tensors (1, ...), as the output of the model is, "
            "or without dimensions: output and not output[0]",
        )


_DTYPES = (torch.float32, torch.float64)
_trials = Trials()
_MADE_UP = 2  # samples in the place of an empty batch


def _tensors(batch: tuple[Any, ...]) -> list[Tensor]:
    """Those of trees of tensors."""
    if all([type(part) is Tensor for part in batch]):  # for which trees are slow
        return [*batch]
    leaves: list[Tensor] = tree_flatten(batch)[0]
    return leaves


def _made_up(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    found: tuple[Any, ...]
    found = tree_map(lambda t: t.new_zeros(_MADE_UP, *t.shape[1:]), batch)
    return found


def _with_loss(result: Any, has_aux: bool) -> tuple[Tensor, tuple[Tensor, Any]]:
    """The loss, and a pair of the loss and aux as what transforms hand through."""
    loss, aux = result if has_aux else (result, ())
    return loss, (loss, aux)


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


# -- Checks ----------------------------------------------------------------------------


def _check_model_and_loss(called: str, model: Any, loss_fn: Any) -> None:
    """Raise unless they are that, and not one in the other's place."""
    write = f"Write {called.replace('...', 'model, loss_fn, x, y')}"
    found = None
    if isinstance(model, type):
        found = f"model is the class {shown(model)}, not an nn.Module made of it"
    elif not isinstance(model, nn.Module):
        found = f"model is {shown(model)}, {a_kind(model)}, not an nn.Module"
        if isinstance(model, Tensor):
            write = f"Do not call the model before. {write}"
    elif not callable(loss_fn):
        found = f"loss_fn is {shown(loss_fn)}, {a_kind(loss_fn)}"
        found += ", which cannot be called"
    elif isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        found = f"loss_fn is the class {shown(loss_fn)}"
        write = f"Pass {shown(loss_fn)}()"
    elif isinstance(loss_fn, nn.Module) and not _has_parameters(model):
        if _has_parameters(loss_fn):
            found = f"model is the nn.Module {type(model).__name__} without parameters"
            found += f", and loss_fn {a_kind(loss_fn)} that has some"
    if found is not None:
        raise VmapSafeTypeError(called, found, write)


def _check_keep_batch_dim(called: str, given: object, options: Options) -> None:
    check_flag(called, "keep_batch_dim", given)
    if not given and options.rows != "contribution":
        raise VmapSafeValueError(
            f"{called} with keep_batch_dim=False",
            f'rows="{options.rows}" is about single samples',
            'Use rows="contribution", or a batch of single samples',
        )


def _kind(leaf: Any) -> object:
    """What another batch must have in common, the batch dimension included."""
    if not isinstance(leaf, Tensor):
        return None
    return leaf.dim(), leaf.dtype, leaf.device


def _worded(leaves: Sequence[Any]) -> str:
    """The shapes, dtypes and devices of tensors, for an error."""
    said = [
        (
            f"{shown(leaf)}, {leaf.dtype}, {leaf.device}"
            if isinstance(leaf, Tensor)
            else shown(leaf)
        )
        for leaf in leaves
    ]
    return "; ".join(said)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _check_one_process(called: str, net: nn.Module, options: Options) -> None:
    groups = [process_group(module) for module in net.modules()]
    if options.meaning.merges and any([group is not None for group in groups]):
        raise VmapSafeValueError(
            called,
            "an empty batch in one of several processes, whose SyncBatchNorm "
            "statistics are taken together",
            "Give every process at least one sample",
        )


def _batch_size(called: str, batch: tuple[Any, ...]) -> int:
    """The first dimension of every tensor of the batch, which must agree."""
    shapes: list[tuple[int, tuple[int, ...]]] = []
    for i, part in enumerate(batch):
        leaves = [part] if type(part) is Tensor else tree_flatten(part)[0]
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                raise VmapSafeValueError(
                    called,
                    f"batch[{i}] holds {shown(leaf)}, {a_kind(leaf)}, "
                    "which has no batch dimension",
                    "Pass tensors (B, ...), which torch.as_tensor makes of numpy "
                    "arrays and lists; what all samples share belongs in loss_fn, "
                    "and options go by name",
                )
            shapes.append((i, tuple(leaf.shape)))
    if not shapes:
        raise VmapSafeValueError(
            called, "got no batch", "Pass the inputs, then the targets"
        )
    size = shapes[0][1][0]
    # A set of sizes would make constants of them while torch.compile traces.
    if any([shape[0] != size for _, shape in shapes]):
        found = ", ".join(f"batch[{i}] has shape {shape}" for i, shape in shapes)
        raise VmapSafeValueError(
            called,
            f"batch sizes disagree: {found}",
            "The first dimension of each is the batch; "
            "torch.stack makes one tensor of a list of samples",
        )
    return size
