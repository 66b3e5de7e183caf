"""By which parameters to differentiate, and where they stand in the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from vmapsafe._errors import VmapSafeTypeError, VmapSafeValueError, shown
from vmapsafe._torch import storage_of

T = TypeVar("T")
Params = Collection[str] | Mapping[str, Tensor] | None


class Place(NamedTuple):
    """Where a module keeps a tensor, and the tensor's name in the model."""

    tensors: dict[str, Any]
    own: str
    name: str


@dataclass(frozen=True)
class Parameters:
    """The parameters of one call.

    Attributes:
        values: the tensors to differentiate by, by name; tied ones once.
        known: all parameters of the model, by each of their names.
        places: where each of ``values`` goes, by the name it has there.
        others: where the model's other parameters are.
        constants: where the rest of a state dict goes, and the tensors.
        of_state_dict: whether the caller gave a whole state dict.
        are_models_own: whether ``values`` are the model's own tensors.
        buffers: those of the model.
    """

    values: dict[str, Tensor]
    known: dict[str, nn.Parameter]
    places: tuple[Place, ...]
    others: tuple[Place, ...]
    constants: tuple[tuple[Place, Tensor], ...]
    of_state_dict: bool
    are_models_own: bool
    buffers: list[Tensor]

    @staticmethod
    def of(called: str, net: nn.Module, params: Params) -> Parameters:
        """Choose them.

        Args:
            called: the public function, for errors.
            net: the model, out of its wrappers.
            params: names, a dict of tensors, a whole state dict, or None for all that
                require a gradient.

        Returns:
            The parameters.

        Raises:
            VmapSafeValueError: names that do not exist, are missing or mean one
                parameter twice; tensors of other shapes; nothing to differentiate by.
            VmapSafeTypeError: ``params`` is neither names nor a dict.
        """
        places, buffers = _places(net)
        _refuse_lazy(called, net, places)
        known = {place.name: place.tensors[place.own] for place in places}
        constants: dict[str, Tensor] = {}
        whole = isinstance(params, Mapping) and _is_state_dict(net, known, params)
        if whole:
            assert isinstance(params, Mapping)
            values, constants = _of_state_dict(called, net, known, params)
        else:
            values = _chosen(called, net, known, params)
        names = {known[name]: name for name in values}
        return Parameters(
            values,
            known,
            tuple(
                [
                    place._replace(name=name) if name != place.name else place
                    for place in places
                    if (name := names.get(known[place.name])) is not None
                ]
            ),
            tuple([place for place in places if known[place.name] not in names]),
            tuple(
                [
                    (place, constants[place.name])
                    for place in (*places, *buffers)
                    if place.name in constants
                ]
            ),
            whole,
            not isinstance(params, Mapping),
            [place.tensors[place.own] for place in buffers],
        )

    @property
    def originals(self) -> dict[str, Tensor]:
        """The model's own tensors for which ``values`` stand in, by the same names."""
        return {name: self.known[name] for name in self.values}

    def standing_in(
        self, values: Mapping[str, Tensor], function: Callable[..., T], *args: Any
    ) -> T:
        """Call a function while ``values`` are in the model."""
        return _while_there(
            [(place, values[place.name]) for place in self.places], function, args
        )

    def alone(
        self,
        values: Mapping[str, Tensor],
        function: Callable[..., T],
        *args: Any,
    ) -> T:
        """The same, while all other parameters are constants.

        Then ``.backward()`` changes ``.grad`` of none of the model's own.
        """
        given = [(place, values[place.name]) for place in self.places]
        rest = [(p, p.tensors[p.own].detach()) for p in self.others]
        return _while_there([*given, *rest], function, args)

    def with_constants(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function while the rest of a state dict is in the model."""
        return _while_there(self.constants, function, args)


def _while_there(
    tensors: Sequence[tuple[Place, Tensor]],
    function: Callable[..., T],
    args: tuple[Any, ...],
) -> T:
    """Call a function while tensors are at places of the model; no interrupt leaves
    them there."""
    before = [(place, place.tensors[place.own]) for place, _ in tensors]
    done = False
    try:
        try:
            for place, tensor in tensors:
                place.tensors[place.own] = tensor
            # torch.func.functional_call does this too, and takes 30 us to begin.
            return function(*args)
        finally:
            _put_back(before)
            done = True
    finally:
        if not done:  # interrupted while it put them back
            _put_back(before)


def _refuse_lazy(called: str, net: nn.Module, places: list[Place]) -> None:
    kind = UninitializedParameter
    lazy = [p.name for p in places if isinstance(p.tensors[p.own], kind)]
    if lazy:
        raise VmapSafeValueError(
            called,
            f"{lazy[0]!r} of {type(net).__name__} belongs to a lazy layer that has not "
            "seen a batch",
            "Run the model on one batch first",
        )


def _put_back(before: list[tuple[Place, Any]]) -> None:
    for place, tensor in before:
        place.tensors[place.own] = tensor


# -- Where they stand ------------------------------------------------------------------


def _places(net: nn.Module) -> tuple[list[Place], list[Place]]:
    """Of each parameter, and of each buffer, every place and name that it has."""
    parameters: list[Place] = []
    buffers: list[Place] = []
    # As net.named_modules(remove_duplicate=False), which takes five times as long.
    waiting = [("", net)]
    while waiting:
        path, module = waiting.pop()
        for own, tensor in module._parameters.items():
            if tensor is not None:
                parameters.append(Place(module._parameters, own, path + own))
        for own, buffer in module._buffers.items():
            if buffer is not None:
                buffers.append(Place(module._buffers, own, path + own))
        below = [
            (f"{path}{name}.", child)
            for name, child in module._modules.items()
            if child is not None
        ]
        waiting += reversed(below)
    return parameters, buffers


# -- A whole state dict ----------------------------------------------------------------


def _is_state_dict(
    net: nn.Module, known: Mapping[str, nn.Parameter], params: Mapping[Any, Any]
) -> bool:
    """Whether it holds buffers, or all that the model's state dict does."""
    names = {_without_wrapper(given, known) for given in params}
    buffers = {name for name, _ in net.named_buffers(remove_duplicate=False)}
    return not names.isdisjoint(buffers) or names == _state_names(net)


def _state_names(net: nn.Module) -> set[str]:
    """The keys of the model's state dict, which torch.compile of 2.11 cannot make."""
    found = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    for path, module in net.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.add(f"{path}.{name}" if path else name)
    return found


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
        elif not _are_equal(given[other], given[name]):
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


def _are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether they hold the same numbers. A state dict has a view for each name, and to
    compare numbers on a GPU would wait for it."""

    def where(tensor: Tensor) -> object:
        offset, strides = tensor.storage_offset(), tensor.stride()
        return storage_of(tensor), tensor.dtype, offset, strides

    known = storage_of(a) is not None and where(a) == where(b)
    return known or torch.equal(a, b)


# -- Names, or a dict of parameters -------------------------------------------------


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
