"""``vmap_safe``: a block as users write it, in ``with`` and as a decorator."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Generic, Never, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from vmapsafe._block.advice import advise
from vmapsafe._block.models import never_updated
from vmapsafe._block.scope import Scope, entered_by, opened, sweep_traced
from vmapsafe._block.switched import own_class
from vmapsafe._errors import (
    BlockError,
    NeverUpdatedWarning,
    VmapSafeTypeError,
    a_kind,
    shown,
    warn_user,
    worded,
)
from vmapsafe._modes import Also, ModeName, NumGroups, Options
from vmapsafe._torch import dispatch_modes_are_on

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)
# What ``as`` gives.
As = TypeVar("As", covariant=True)


# A module is callable too, hence the overlaps.
@overload
def vmap_safe(  # type: ignore[overload-overlap]
    model: M,
    /,
    *,
    mode: ModeName = "eval",
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: Also = (),
    fast: bool = True,
) -> Block[M]: ...


@overload
def vmap_safe(
    first: M,
    second: M,
    /,
    *others: M,
    mode: ModeName = "eval",
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: Also = (),
    fast: bool = True,
) -> Block[tuple[M, ...]]: ...


@overload
def vmap_safe(
    *,
    mode: ModeName = "eval",
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: Also = (),
    fast: bool = True,
) -> Block[Never]: ...


@overload
def vmap_safe(function: Callable[P, R], /) -> Callable[P, R]: ...


def vmap_safe(
    *models: Any,
    mode: ModeName = "eval",
    num_groups: NumGroups = 32,
    update_running_stats: bool = False,
    sync_levels: int | None = None,
    also: Also = (),
    fast: bool = True,
) -> object:
    """Make batch norm networks work under ``torch.func`` for the length of a block.

    A context manager and a decorator. Inside, the normalisation layers of ``models`` do
    what ``mode`` says, and the models' forwards do not write to their buffers. On exit,
    also after an error, the models are as they were.

    >>> import torch
    >>> from torch import nn
    >>> from torch.func import vmap
    >>> from vmapsafe import vmap_safe
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> _ = model(torch.randn(4, 3, 8, 8))
    >>> x = torch.randn(5, 2, 3, 8, 8)  # five slices of two samples
    >>> with vmap_safe(model):
    ...     vmap(model)(x).shape
    torch.Size([5, 2, 8, 6, 6])
    >>> model[1].training
    True

    As a decorator it covers every ``nn.Module`` among the call's arguments, ``self``
    included, or the ``models`` given:

    >>> @vmap_safe(mode="no_running_stats")
    ... def features(model, x):
    ...     return vmap(model)(x)
    >>> features(model, x).shape
    torch.Size([5, 2, 8, 6, 6])

    ==================  ==========================================  ===================
    mode                batch norm normalises a slice with          running statistics
    ==================  ==========================================  ===================
    "eval"              the running statistics                      read
    "no_running_stats"  the statistics of the slice                 kept, or written by
                                                                    update_running_stats
    "group_norm"        the statistics of groups of channels of     kept
                        each sample, with its own weight, bias, eps
    "sync"              the statistics of all slices together, as   kept, or written by
                        the un-vmapped ``model(x)`` in training     update_running_stats
                        mode does
    ==================  ==========================================  ===================

    In a model in training mode, a layer that you have put in eval mode before stays in
    eval mode. ``model.train()`` and ``model.eval()`` inside the block do not change
    what its layers compute; they say how the model leaves the block. Dropout and
    everything else keep the mode they have.

    The block holds in the thread that opened it, where its layers show the flags that
    the mode needs, and does not cross ``await``. Other threads see the model as it was.
    Backward may run after the block, unless it runs a forward again.

    Args:
        *models: the modules to cover; torch.compile, DataParallel and
            DistributedDataParallel are unwrapped. A decorator without models covers the
            modules among the arguments of each call.
        mode: "eval", "no_running_stats", "group_norm" or "sync".
        num_groups: for "group_norm", the number of groups, or a function of the
            number of channels. If it does not divide the channels, each channel is a
            group.
        update_running_stats: whether a call updates the running statistics and their
            counter as one training step of ``model(x)`` would, under every transform.
            In "sync" the slices that are merged are one step. In "no_running_stats"
            each slice is a step of its own, and so each needs buffers of its own, which
            ``functional_call`` hands in, stacked.
        sync_levels: in "sync", how many nested vmaps are merged, counted from the
            innermost; None for all. A vmap is merged if it batches a layer's input but
            none of the model's parameters or buffers.
        also: classes of hand-made layers, subclasses included, that "eval" switches as
            it switches torch's own. The other modes refuse a model with such a layer,
            unless its owner has frozen it. A layer that owns
            buffers ``running_mean`` and ``running_var`` need not be named. Other
            hand-made layers normalise as they do in training mode.
        fast: whether faster batching rules replace torch's own for some operators, in
            all threads, while the block is open. They give the same numbers up to
            rounding. False leaves speed to torch, also in blocks around this one and in
            other threads. Rules that correct wrong numbers of torch stay (batches of
            one, second derivatives of normalisation layers, layouts that vmap cannot
            query).

    Returns:
        A block for ``with`` (``as`` gives the model, or a tuple of models), which is
        also a decorator. For a function: the decorated function, with the same types.

    Raises:
        VmapSafeValueError: the mode is unknown, ``num_groups`` is below 1, or, on use,
            a lazy layer has not seen a batch; in a call, slices that are not merged
            would update the same buffers.
        VmapSafeTypeError: an argument is not a module, or, on use, the block cannot
            switch a layer, or there is no model in the ``with`` or among the arguments.
        BlockError: on use, another thread holds the model with other options; after the
            block, backward would run a forward of the model again.

    Warns:
        NeverUpdatedWarning: "eval" reads running statistics that no batch has updated.
        LeftOutWarning: the forward of a hand-made layer writes a buffer. That write
            does not happen inside the block.

    It does not copy the model. It does not cover a copy made inside the block, which
    has the flags that the model has outside: open a block for the copy as well, or, if
    a library makes copies, give it a module whose ``forward`` opens the block, since
    its copies do so too. It does not make clipped per-sample
    gradients differentially private by itself.
    """
    options = Options(
        mode=mode,
        num_groups=num_groups,
        update_running_stats=update_running_stats,
        sync_levels=sync_levels,
        also=also,
        fast=fast,
    )
    if len(models) == 1 and _is_function(models[0]):
        return Block((), options)(models[0])
    for model in models:
        if not isinstance(model, nn.Module):
            do = "Write vmap_safe(model)"
            if isinstance(model, str):
                do = f"Pass options by name, as vmap_safe(model, mode={model!r})"
            elif isinstance(model, (list, tuple)):
                do = "Write vmap_safe(*models)"
            raise VmapSafeTypeError(
                "vmap_safe(...)", f"got {a_kind(model)}, not an nn.Module", do
            )
    return Block(models, options)


class Block(Generic[As]):
    """What ``vmap_safe(...)`` returns: a context manager and a decorator.

    It is reusable and re-entrant, as it only stores what it was given.
    """

    def __init__(self, models: tuple[nn.Module, ...], options: Options) -> None:
        self._models = models
        self._options = options

    def __repr__(self) -> str:
        models = "".join(f"{type(model).__name__}, " for model in self._models)
        return f"vmap_safe({models}{self._options})"

    def __enter__(self) -> As:
        if not self._models:
            raise VmapSafeTypeError(
                f"with {self}", "got no model", "Write vmap_safe(model)"
            )
        _enter(self, self._models, self)
        models = self._models
        return cast(As, models[0] if len(models) == 1 else models)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope = entered_by(self)
        if scope is None:
            sweep_traced()
            if isinstance(error, BlockError):
                return  # which says why
            raise BlockError(
                f"leaving {self}",
                "it is not open in this thread",
                "Leave a block once for each time it was entered, in the thread "
                "that entered it",
            )
        _leave(scope, error)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in the block. An interrupt does not leave the block open."""
        return _called_in(self, self._models, function, args, kwargs)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        decorated: Callable[P, R] = _decorated(function, self)
        return decorated


# -- Blocks ---------------------------------------------------------------------------


def _enter(block: Block[object], models: tuple[nn.Module, ...], owner: object) -> Scope:
    """Open a block, which ``owner`` will close."""
    scope = opened(models, block._options, owner)
    if block._options.meaning.reads_running_stats and not torch.compiler.is_compiling():
        done = False
        try:
            _warn_if_never_updated(scope)  # a warning may be an error
            done = True
        finally:
            if not done:
                scope.close()
    return scope


def _leave(scope: Scope, error: BaseException | None) -> None:
    """Close a block and put its models back, even where this raises.

    Args:
        scope: the block.
        error: the error with which its body ended, if it did.

    Raises:
        BlockError: blocks opened later are still open, or another thread opened this
            one.
    """
    found = ""
    try:
        if error is not None and not torch.compiler.is_compiling():
            advise(error, scope.models, not scope.mode.merges)
    finally:
        try:
            found = scope.close()
        finally:
            if not found:  # interrupted
                scope.close()
    if found == "nowhere" and scope.thread is not threading.current_thread():
        found = "open in another thread"
    # Otherwise the user is told of the error, or of an interrupt in this function.
    if found not in ("top", "nowhere") and error is None:
        raise BlockError(
            str(scope),
            f"closed while it was {found}. Its models are put back",
            "Close blocks in the reverse order, in the thread that opened them",
        )


# The running variance that was found updated, by layer.
_updated: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tensor]]
_updated = weakref.WeakKeyDictionary()
_warned_of_statistics: weakref.WeakSet[type] = weakref.WeakSet()


def was_updated(layer: nn.Module) -> bool:
    """Whether the running statistics have been updated, which is remembered."""
    var = layer._buffers.get("running_var")
    known = _updated.get(layer)
    if var is not None and (known is None or known() is not var):
        if never_updated(layer):
            return False
        _updated[layer] = weakref.ref(var)
    return True


def _warn_if_never_updated(scope: Scope) -> None:
    """Warn, once for each class of model, if statistics are as they were initialised.

    Statistics found updated are remembered: on a GPU, each look waits for the device.
    """
    if dispatch_modes_are_on():  # values may not be there, as under FakeTensorMode
        return
    for model in scope.models:
        kind = own_class(model.root)
        if kind in _warned_of_statistics:
            continue
        for layer in model.layers:
            if was_updated(layer):
                continue
            _warned_of_statistics.add(kind)
            warn_user(
                worded(
                    f"vmap_safe({kind.__name__}, {scope.options})",
                    f"the running statistics of {model.label(layer)} were never "
                    "updated, so it normalises by mean 0 and variance 1",
                    "Train the model first, or use another mode",
                ),
                NeverUpdatedWarning,
            )
            break


# -- Decorated functions --------------------------------------------------------------


def _is_function(candidate: object) -> bool:
    if isinstance(candidate, (classmethod, staticmethod, property)):
        return True
    return callable(candidate) and not isinstance(candidate, nn.Module)


def _decorated(function: Any, block: Block[object]) -> Any:
    """``function``, each call of which runs in a block of its own."""
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(_decorated(function.__func__, block))
    if isinstance(function, property):
        parts = (function.fget, function.fset, function.fdel)
        return property(*(f and _decorated(f, block) for f in parts))
    if not _is_function(function):
        raise VmapSafeTypeError(
            f"@{block}", f"{shown(function)} is not a function", "Decorate a function"
        )
    if inspect.isclass(function):
        raise VmapSafeTypeError(
            f"@{block}",
            f"{function.__name__} is a class, and the block would cover only the "
            "creation of its objects",
            f"Decorate its methods, or write vmap_safe({function.__name__}(...))",
        )
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise VmapSafeTypeError(
            f"@{block}",
            f"{function.__name__} is async, and a block left open across an await "
            "would be seen by other tasks",
            "Use `with vmap_safe(model):` around the synchronous part",
        )
    if inspect.isgeneratorfunction(function):
        return _resumed_in(function, block)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        models = _models_of(block, function, args, kwargs)
        return _called_in(block, models, function, args, kwargs)

    return wrapper


def _resumed_in(function: Any, block: Block[object]) -> Any:
    """A generator function whose body runs in a block, but whose caller does not."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        models = _models_of(block, function, args, kwargs)
        generator = function(*args, **kwargs)

        def resume(step: Callable[..., R], *given: object) -> R:
            return _called_in(block, models, step, given, {})

        try:
            item = resume(next, generator)
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    resume(generator.close)
                    raise
                except BaseException as error:
                    item = resume(generator.throw, error)
                else:
                    item = resume(generator.send, sent)
        except StopIteration as stop:
            return stop.value

    return wrapper


def _called_in(
    block: Block[object],
    models: tuple[nn.Module, ...],
    function: Callable[..., R],
    args: tuple[object, ...],
    kwargs: dict[str, Any],
) -> R:
    """Call ``function`` in a block of its own.

    ``with`` alone would leave the block open after an interrupt at the first step of
    ``__exit__``.
    """
    entry = _Entry(block, models)
    if torch.compiler.is_compiling():
        with entry:
            return function(*args, **kwargs)
    try:
        with entry:
            return function(*args, **kwargs)
    finally:
        left_open = entered_by(entry)
        if left_open is not None:
            left_open.close()


class _Entry:
    """One use of a block."""

    def __init__(self, block: Block[object], models: tuple[nn.Module, ...]) -> None:
        self.block = block
        self.models = models

    def __enter__(self) -> None:
        self.scope = _enter(self.block, self.models, self)

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: object
    ) -> None:
        _leave(self.scope, error)


def _models_of(
    block: Block[object], function: object, args: object, kwargs: object
) -> tuple[nn.Module, ...]:
    """The models of the block, or the modules among the arguments of a call."""
    models = block._models or tuple([*_modules_among(args), *_modules_among(kwargs)])
    if not models:
        raise VmapSafeTypeError(
            f"{getattr(function, '__name__', 'function')}(...) under @{block}",
            "there is no nn.Module among its arguments, or in a tuple, list or dict "
            "there",
            "Pass the model, or write @vmap_safe(model)",
        )
    return models


def _modules_among(value: object) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return []
    return [module for item in value for module in _modules_among(item)]
