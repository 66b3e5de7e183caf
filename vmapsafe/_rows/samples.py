"""What per-sample gradients are asked of: a loss of one sample, checked and bound."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from vmapsafe._block.models import process_group, unwrapped
from vmapsafe._block.vmap_safe import Block
from vmapsafe._draws import Draws, check_randomness
from vmapsafe._errors import (
    VmapSafeRuntimeError,
    VmapSafeTypeError,
    VmapSafeValueError,
    a_kind,
    shown,
)
from vmapsafe._modes import Options
from vmapsafe._rows.chunks import ChunkSize, in_chunks
from vmapsafe._rows.copies import Copies, leaves_of
from vmapsafe._rows.record import LEVEL, Collector, Recorded, Unrecordable
from vmapsafe._torch import (
    beyond_reverse_mode,
    current_level,
    innermost,
    tree_flatten,
    tree_map,
    under,
)

Loss = Callable[..., Any]
Params = Collection[str] | Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Samples:
    """One call's model, loss and batch.

    Attributes:
        called: the public function, for errors.
        values: the parameters to differentiate by, by name; tied ones once.
        known: the model's parameters, by all their names.
        places: where in the model each of ``values`` goes, by its name: a module's
            parameters, and the name there.
        constants: what else of a state dict stands in the model meanwhile, and where.
        batch: trees of tensors (size, ...), or, where the caller's batch is empty, of
            made-up samples, whose results are thrown away.
        leaves: the tensors in it.
        size: of the caller's batch.
    """

    called: str
    model: nn.Module
    net: nn.Module
    loss_fn: Loss
    values: dict[str, Tensor]
    known: dict[str, nn.Parameter]
    places: list[tuple[dict[str, Any], str, str]]
    constants: list[tuple[dict[str, Any], str, Tensor]]
    batch: tuple[Any, ...]
    leaves: list[Tensor]
    size: int
    options: Options
    randomness: str
    has_aux: bool

    @staticmethod
    def of(
        called: str,
        model: nn.Module,
        loss_fn: Loss,
        batch: tuple[Any, ...],
        params: Params,
        options: Options,
        randomness: str,
        has_aux: bool,
    ) -> Samples:
        """All of it checked.

        Raises:
            TypeError, ValueError: say what is wrong.
        """
        _check_model_and_loss(called, model, loss_fn)
        check_randomness(called, randomness)
        net = unwrapped(model)
        places = _places(net)
        known = {name: parameters[own] for parameters, own, name in places}
        constants: dict[str, Tensor] = {}
        if isinstance(params, Mapping) and _is_state_dict(net, known, params):
            values, constants = _of_state_dict(called, net, known, params)
            _refuse_updates(called, options)
        else:
            values = _chosen(called, net, known, params)
        names = {known[name]: name for name in values}
        size = _batch_size(called, batch)
        if size == 0:
            _check_one_process(called, net, options)
            options = replace(options, update_running_stats=False)
            batch = tree_map(lambda t: t.new_zeros(2, *t.shape[1:]), batch)
        return Samples(
            called,
            model,
            net,
            loss_fn,
            values,
            known,
            [
                (parameters, own, names[known[name]])
                for parameters, own, name in places
                if known[name] in names
            ],
            [
                (tensors, own, constants[name])
                for tensors, own, name in (*places, *_places_of_buffers(net))
                if name in constants
            ],
            batch,
            tree_flatten(batch)[0],
            size,
            options,
            randomness,
            has_aux,
        )

    @property
    def count(self) -> int:
        """Of samples to run, made-up ones included."""
        return self.size or 2

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.values.values())).device

    def rows(self, batch: tuple[Any, ...]) -> tuple[dict[str, Tensor], Any]:
        """The rows, and aux, by ``vmap(grad)``; derivatives of them pass through."""
        derive = self._by_jacobian if self.options.rows == "jacobian" else self._by_grad
        found = Block((self.model,), self.options).run(derive, batch)
        return found if self.has_aux else (found, ())

    def recordable(self) -> bool:
        """Whether nothing that can be seen from outside forbids :meth:`recorded`."""
        leaves = (*self.leaves, *self.values.values())
        return (
            current_level() == 0
            and not beyond_reverse_mode()
            and not torch.is_inference_mode_enabled()
            and self.options.rows != "jacobian"
            and all([type(leaf) in (Tensor, nn.Parameter) for leaf in leaves])
            and not any([leaf.is_inference() or leaf.is_complex() for leaf in leaves])
        )

    def watched(self) -> bool:
        """Whether plain autograd has an interest in the rows."""
        if not torch.is_grad_enabled():
            return False
        chosen = {id(self.known[name]) for name in self.values}
        others = [p for p in self.known.values() if id(p) not in chosen]
        given = (*self.leaves, *self.values.values())
        watched = (*given, *others, *self.net.buffers())
        return any([tensor.requires_grad for tensor in watched])

    def recorded(self, batch: tuple[Any, ...]) -> Recorded:
        """The forward, with what backward needs for rows or what becomes of them.

        Raises:
            Unrecordable: the loss does what only :meth:`rows` can follow.
        """
        return Recorded(
            self.called,
            {name: self.known[name] for name in self.values},
            self._loss,
            self.values,
            batch,
            _length(batch),
            self.randomness,
            self.has_aux,
            Block((self.model,), replace(self.options, copies_at=LEVEL)),
        )

    def collect(
        self, batch: tuple[Any, ...], into: Collector, derivatives: bool = False
    ) -> Any:
        """Hand what becomes of the rows to ``into``; returns aux.

        Raises:
            Unrecordable: with ``derivatives``, that somebody wants some of the rows, or
                that the loss cannot be followed.
        """
        if self.recordable():
            draws = Draws(self.randomness)
            try:
                recorded = self.recorded(batch)
                if derivatives and recorded.watched():
                    raise Unrecordable("a tensor that requires a gradient")
            except Unrecordable as error:
                if derivatives:
                    raise
                if self.options.update_running_stats:  # they have been
                    raise VmapSafeRuntimeError(
                        self.called,
                        f"the loss calls {error}, and a second forward would "
                        "update the running statistics twice",
                        "Use torch.func.grad there, or per_sample_grads without "
                        "out=",
                    ) from None
                draws.put_back()
            else:
                recorded.backward(into)
                return recorded.aux
        rows, aux = self.rows(batch)
        for name, row in rows.items():
            into.whole(name, row)
        return aux

    def by_chunk(
        self, chunk_size: ChunkSize, function: Callable[[tuple[Any, ...]], Any]
    ) -> list[Any]:
        """What ``function`` makes of each chunk of the batch."""
        parts: list[Any] = []

        def run(start: int, stop: int) -> None:
            parts.append(function(part_of(self.batch, start, stop)))

        self.in_chunks(chunk_size, run)
        return parts

    def in_chunks(self, chunk_size: ChunkSize, run: Callable[[int, int], None]) -> None:
        """Call ``run(start, stop)`` for one chunk after the other."""
        in_chunks(self.count, chunk_size, self.device, self.randomness, run)

    def _loss(self, values: Mapping[str, Tensor], inputs: Any, *rest: Any) -> Any:
        """Of one sample, handed to the model as a batch of one."""
        inputs, rest = tree_map(lambda t: t.unsqueeze(0), (inputs, rest))
        args, kwargs = _as_call(inputs)
        where = (*self.places, *self.constants)
        before = [(tensors, own, tensors[own]) for tensors, own, _ in where]
        done = False
        try:
            try:
                for parameters, own, name in self.places:
                    parameters[own] = values[name]
                for tensors, own, tensor in self.constants:
                    tensors[own] = tensor
                # What torch.func.functional_call does, which takes 30 us to begin.
                output = self.net(*args, **kwargs)
                result = self.loss_fn(output, *rest)  # which may read parameters too
            finally:
                _put_back(before)
                done = True
        finally:
            if not done:  # interrupted while it put them back
                _put_back(before)
        if not self.has_aux:
            return self._scalar(result)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise VmapSafeValueError(
                f"{self.called} with has_aux=True",
                f"loss_fn gave {shown(result)} instead of a pair",
                "Let it return (loss, aux)",
            )
        value, aux = result
        return self._scalar(value), tree_map(self._aux, aux)

    def _loss_of_copies(self, values: Mapping[str, Tensor], *sample: Any) -> Any:
        """The same where no :class:`Recorded` sees to it that all is read of them."""
        if torch.compiler.is_compiling():
            return self._loss(values, *sample)
        copies = Copies(self.called, {name: self.known[name] for name in values})
        copies.stand_in(values)
        result = under(copies, self._loss, values, *sample)
        copies.check()
        value = result[0] if self.has_aux else result
        given = {id(leaf) for leaf in self._given()}  # the copies come from these
        leaves = leaves_of(innermost(value))
        copies.check_graph([leaf for leaf in leaves if id(leaf) not in given])
        return result

    def _given(self) -> list[Tensor]:
        """What plain autograd differentiates the caller's ``params`` by."""
        values = [innermost(value) for value in self.values.values()]
        watched = [value for value in values if value.requires_grad]
        return [leaf for value in watched for leaf in (value, *leaves_of(value))]

    def _by_grad(self, batch: tuple[Any, ...]) -> Any:
        return vmap(
            grad(self._loss_of_copies, has_aux=self.has_aux),
            (None, *[0 for _ in batch]),
            randomness=self.randomness,
        )(self.values, *batch)

    def _by_jacobian(self, batch: tuple[Any, ...]) -> Any:
        in_dims = (None, *[0 for _ in batch])
        losses = vmap(self._loss_of_copies, in_dims, randomness=self.randomness)
        return jacrev(losses, has_aux=self.has_aux)(self.values, *batch)

    def _scalar(self, loss: Any) -> Tensor:
        if isinstance(loss, Tensor):
            if loss.dim() == 0:
                return loss
            if loss.shape == (1,):  # reduction="none"
                return loss.squeeze(0)
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        do = 'Let it return the mean or the sum, e.g. reduction="sum"'
        if isinstance(loss, (tuple, list)):
            do = "Let it return the loss alone, or pass has_aux=True for (loss, aux)"
        raise VmapSafeValueError(
            self.called,
            f"loss_fn gave {found} for a batch of one instead of a tensor without "
            "dimensions",
            do,
        )

    def _aux(self, leaf: Any) -> Tensor:
        """Without the batch of one, if it has dimensions."""
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.size(0) == 1):
            return leaf.squeeze(0) if leaf.dim() else leaf
        raise VmapSafeValueError(
            f"{self.called} with has_aux=True",
            f"aux holds {shown(leaf)} for one sample, which is no tensor with a "
            "batch of one as its first dimension",
            "Let loss_fn return tensors (1, ...), as the output of the model is, "
            "or without dimensions: output and not output[0]",
        )


def _put_back(before: list[tuple[dict[str, Any], str, Any]]) -> None:
    for tensors, own, tensor in before:
        tensors[own] = tensor


def part_of(batch: Any, start: int, stop: int) -> Any:
    """Some of the samples."""
    if start == 0 and stop >= _length(batch):
        return batch
    return tree_map(lambda t: t[start:stop], batch)


def _length(batch: Any) -> int:
    return len(tree_flatten(batch)[0][0])


def _check_model_and_loss(called: str, model: Any, loss_fn: Any) -> None:
    """Raise a TypeError unless they are that, and not one in the other's place."""
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


def _is_state_dict(
    net: nn.Module, known: Mapping[str, nn.Parameter], params: Mapping[Any, Any]
) -> bool:
    """Whether it holds buffers, or all that the model's state dict does."""
    names = {_without_wrapper(given, known) for given in params}
    buffers = {name for name, _ in net.named_buffers(remove_duplicate=False)}
    return not names.isdisjoint(buffers) or names == _state_names(net)


def _state_names(net: nn.Module) -> set[str]:
    return {name for name in net.state_dict() if not name.endswith("_extra_state")}


def _of_state_dict(
    called: str,
    net: nn.Module,
    known: Mapping[str, nn.Parameter],
    params: Mapping[Any, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors to differentiate by, and the rest: frozen parameters, buffers."""
    given = {_without_wrapper(name, known): params[name] for name in params}
    own = net.state_dict(keep_vars=True)
    names = _state_names(net)
    missing, unknown = sorted(names - set(given)), sorted(set(given) - names)
    if missing or unknown:
        found = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r} besides"
        raise VmapSafeValueError(
            called,
            f"params has buffers of {type(net).__name__} in it, as a state dict, "
            f"but {found}",
            "Pass parameters alone, or all that model.state_dict() holds",
        )
    values: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    first: dict[int, str] = {}  # names of tied tensors
    for name in names:
        value, model = given[name], own[name]
        if not isinstance(value, Tensor) or value.shape != model.shape:
            raise VmapSafeValueError(
                called,
                f"params[{name!r}] is {shown(value)}, and the model has "
                f"{shown(model)}",
                "Pass a state dict of this model",
            )
    for name in own:
        if name not in names:
            continue
        other = first.setdefault(id(own[name]), name)
        if not own[name].requires_grad:
            constants[name] = given[name]
        elif other == name:
            values[name] = given[name]
        elif given[other] is not given[name] and not torch.equal(
            given[other], given[name]
        ):
            raise VmapSafeValueError(
                called,
                f"params has different values for {other!r} and {name!r}, which "
                f"are one parameter of {type(net).__name__}",
                "Pass the same tensor for both",
            )
    if not values:
        raise VmapSafeValueError(
            called,
            f"no parameter of {type(net).__name__} requires a gradient",
            "Unfreeze some, or name the ones you want with params=",
        )
    return values, constants


def _refuse_updates(called: str, options: Options) -> None:
    if options.update_running_stats:
        raise VmapSafeValueError(
            f"{called} with update_running_stats=True",
            "params is a state dict, whose tensors are never written",
            "Leave update_running_stats out, or pass the parameters alone",
        )


def _places_of_buffers(net: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    return [
        (module._buffers, own, f"{path}.{own}".lstrip("."))
        for path, module in net.named_modules(remove_duplicate=False)
        for own, buffer in module._buffers.items()
        if buffer is not None
    ]


def _chosen(
    called: str, net: nn.Module, known: Mapping[str, nn.Parameter], params: Params
) -> dict[str, Tensor]:
    """The tensors to differentiate by, by name; tied ones once."""
    if params is None:
        first: dict[nn.Parameter, str] = {}
        for name, p in known.items():
            first.setdefault(p, name)
        chosen = {n: p.detach() for p, n in first.items() if p.requires_grad}
        if not chosen:
            raise VmapSafeValueError(
                called,
                f"no parameter of {type(net).__name__} requires a gradient",
                "Unfreeze some, or name the ones you want with params=",
            )
        return chosen
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise VmapSafeTypeError(
            called,
            f"params is {shown(params)}",
            "Pass names, or a dict from names to tensors",
        )
    names: dict[str, Any] = {}  # as the model has them: as they are given
    for given in [params] if isinstance(params, str) else params:
        name = _without_wrapper(given, known)
        if name not in known:
            raise VmapSafeValueError(
                called,
                f"{type(net).__name__} has no parameter {shown(given)}",
                "Names are those of model.named_parameters()",
            )
        if names.setdefault(name, given) != given:
            raise VmapSafeValueError(
                called,
                f"params names {given!r} and {names[name]!r}, which are one",
                "Name one of them",
            )
    if not names:
        raise VmapSafeValueError(
            called, "params is empty", "Name at least one, or leave params out"
        )
    tied: dict[nn.Parameter, str] = {}
    for name in names:
        other = tied.setdefault(known[name], name)
        if other != name:
            raise VmapSafeValueError(
                called,
                f"params names {other!r} and {name!r}, which are one parameter of "
                f"{type(net).__name__} with one gradient",
                "Name one of them",
            )
    if not isinstance(params, Mapping):
        return {name: known[name].detach() for name in names}
    chosen = {name: params[given] for name, given in names.items()}
    for name, value in chosen.items():
        if not isinstance(value, Tensor) or value.shape != known[name].shape:
            raise VmapSafeValueError(
                called,
                f"params[{names[name]!r}] is {shown(value)}, and the parameter is "
                f"{shown(known[name])}",
                "Pass tensors of the parameters' shapes",
            )
    return chosen  # outer derivatives pass through


_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel, torch.compile


def _without_wrapper(name: Any, known: Collection[str]) -> Any:
    """The name in the model itself, of one in its wrapper."""
    if not isinstance(name, str):
        return None
    while name not in known and name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _places(net: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """Where the parameters are, and their names; one of several names several times."""
    return [
        (module._parameters, own, f"{path}.{own}".lstrip("."))
        for path, module in net.named_modules(remove_duplicate=False)
        for own, parameter in module._parameters.items()
        if parameter is not None
    ]


def _batch_size(called: str, batch: tuple[Any, ...]) -> int:
    """The first dimension of every tensor of the batch, which must agree."""
    shapes = []
    for i, part in enumerate(batch):
        leaves, _ = tree_flatten(part)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                raise VmapSafeValueError(
                    called,
                    f"batch[{i}] holds {shown(leaf)}, {a_kind(leaf)}, "
                    "which has no batch dimension",
                    "Pass tensors (B, ...), which torch.as_tensor makes of numpy "
                    "arrays and lists; what all samples share belongs into loss_fn",
                )
            shapes.append((i, tuple(leaf.shape)))
    if not shapes:
        raise VmapSafeValueError(
            called, "got no batch", "Pass the inputs, then the targets"
        )
    if len({shape[0] for _, shape in shapes}) > 1:
        found = ", ".join(f"batch[{i}] has shape {shape}" for i, shape in shapes)
        raise VmapSafeValueError(
            called,
            f"batch sizes disagree: {found}",
            "The first dimension is the batch, and each has one row a sample; "
            "torch.stack makes one tensor of a list of samples",
        )
    return int(shapes[0][1][0])


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
