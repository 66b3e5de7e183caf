"""What of a model a block touches: two flags a layer. Found, switched, put back.

A :class:`Model` is one module handed to a block, looked at once at entry: its
normalisation layers with the flags they had, the flags the mode wants, and which of
them their owner had frozen. :func:`switch` and :func:`put_back` change the flags and
change them back. Flags belong to the process, so a layer that several blocks hold is
entered in ``_held`` under a lock: the first entry keeps the original, the last exit
puts it back.

Put back as well are weights that hooks compute before each forward, as those of
weight_norm, spectral_norm and pruning do: a forward under a transform leaves tensors
behind that are dead after it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from vmapsafe._call import is_wrapped
from vmapsafe._errors import BlockError, worded

_compiling = torch.compiler.is_compiling
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


class Flags(NamedTuple):
    """The two flags through which a layer chooses its statistics.

    ``track_running_stats`` is None for a layer that has no such flag.
    """

    training: bool
    track_running_stats: bool | None


class Layer(NamedTuple):
    """One normalisation layer of a model: its flags outside all blocks, as this block
    found them, and as it wants them. A frozen layer keeps its own."""

    module: nn.Module
    original: Flags
    before: Flags
    wanted: Flags
    frozen: bool

    def enforce(self) -> None:
        """Set the wanted flags again, should somebody have changed them."""
        set_flags(self.module, self.wanted)


@dataclass(frozen=True)
class Model:
    """One module handed to a block, as it was found at entry.

    Attributes:
        root: the module, taken out of its wrappers.
        modules: every module in it, the root first.
        layers: the normalisation layers among them.
        buffered: the modules that own buffers.
        computed: of modules with hooks before their forward, the tensors among the
            attributes.
    """

    root: nn.Module
    modules: tuple[nn.Module, ...]
    layers: dict[nn.Module, Layer] = field(default_factory=dict)
    buffered: tuple[nn.Module, ...] = ()
    computed: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)

    def path(self, module: nn.Module) -> str:
        """The module's name in the model, "" for the root."""
        name: str
        for name, candidate in self.root.named_modules():
            if candidate is module:
                return name
        return f"<a {type(module).__name__} that is no longer part of the model>"

    def label(self, module: nn.Module) -> str:
        """``'layer1.0.bn1' (BatchNorm2d)``, for errors."""
        name = self.path(module) or "the model itself"
        return f"'{name}' ({type(module).__name__})"


def find(
    roots: Sequence[nn.Module], mode: str, enclosing: Iterable[Model]
) -> tuple[Model, ...]:
    """Look at the modules handed to a block; changes nothing.

    A root inside another root belongs to the outer one. ``enclosing`` are the models
    of the blocks around this one, whose layers show switched flags.

    Raises:
        ValueError: a lazy layer has not seen a batch.
        TypeError: a kind of module that cannot be switched.
    """
    known = {m: layer for model in enclosing for m, layer in model.layers.items()}
    roots = [unwrapped(root) for root in roots]
    if len(roots) > 1:
        inner = {m for root in roots for m in root.modules() if m is not root}
        roots = [root for root in dict.fromkeys(roots) if root not in inner]
    return tuple([_look_at(root, mode, known) for root in roots])


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        # By name, as naming the class would import all of torch._dynamo (2.13).
        if type(module).__name__ == "OptimizedModule":
            module = module.get_submodule("_orig_mod")
        elif isinstance(module, _WRAPPERS):
            module = module.module
        else:
            return module


def has_running_stats(module: nn.Module) -> bool:
    """Whether it owns buffers named running_mean and running_var."""
    buffers = module._buffers
    return (
        "running_mean" in buffers
        and "running_var" in buffers
        and buffers["running_mean"] is not None
        and buffers["running_var"] is not None
    )


def is_normalisation(module: nn.Module) -> bool:
    """Whether a block covers this layer.

    Batch norm with and without running statistics, instance norm with them, subclasses
    of both, and every module that owns buffers ``running_mean`` and ``running_var``.
    """
    return isinstance(module, _BatchNorm) or has_running_stats(module)


def process_group(module: nn.Module) -> Any:
    """The group of several processes over which a SyncBatchNorm layer takes its
    statistics in training; None for every other layer, and in one process."""
    if not isinstance(module, SyncBatchNorm):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def set_flags(module: nn.Module, flags: Flags) -> None:
    """Write the flags that differ.

    Past ``nn.Module.__setattr__``, whose look for parameters costs more than all the
    rest of a block, unless a class has its own or torch.compile traces.
    """
    plain = type(module).__setattr__ is nn.Module.__setattr__
    write = object.__setattr__ if plain and not _compiling() else setattr
    if module.training != flags.training:
        write(module, "training", flags.training)
    track = flags.track_running_stats
    if track is not None and module.track_running_stats != track:
        write(module, "track_running_stats", track)


def switch(models: Sequence[Model], options: Any) -> None:
    """Give every layer the flags its block wants, all of them or none.

    Raises:
        BlockError: another thread holds one of the layers with other options.
    """
    if _compiling():  # a lock and a table cannot be traced
        for model in models:
            for layer in model.layers.values():
                layer.enforce()
        return
    done: list[Layer] = []
    with _lock:
        try:
            for model in models:
                for layer in model.layers.values():
                    held = _held.get(layer.module)
                    if held is not None:
                        _refuse_other_options(held, model, layer, options)
                    done.append(layer)
                    _claim(layer, options)
                    layer.enforce()
        except BaseException:
            for layer in reversed(done):
                _release(layer)
            raise


def put_back(models: Sequence[Model]) -> None:
    """Undo :func:`switch`: as before for the last holder, else as the others want."""
    if _compiling():
        for model in reversed(models):
            for layer in model.layers.values():
                set_flags(layer.module, layer.before)
        return
    with _lock:
        for model in models:
            for layer in model.layers.values():
                _release(layer)
    for model in models:
        for module, tensors in model.computed.items():
            for name, tensor in tensors.items():
                now = module.__dict__.get(name)
                if isinstance(now, Tensor) and is_wrapped(now):
                    module.__dict__[name] = tensor


def _look_at(root: nn.Module, mode: str, known: Mapping[nn.Module, Layer]) -> Model:
    modules: list[nn.Module] = []
    layers: dict[nn.Module, Layer] = {}
    buffered: list[nn.Module] = []
    computed: dict[nn.Module, dict[str, Tensor]] = {}
    can_freeze = _original(root, known).training
    seen = {root}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        modules.append(module)
        for child in reversed(list(module._modules.values())):
            if type(child).__name__ == "OptimizedModule":
                # A wrapper that torch.compile would trace as two modules.
                child = unwrapped(child)  # type: ignore[arg-type]
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
        if type(module) not in _harmless:
            _refuse(module, mode, root)
        if module._forward_pre_hooks and not _compiling():
            tensors = {n: t for n, t in vars(module).items() if isinstance(t, Tensor)}
            computed[module] = tensors
        if not module._buffers:
            continue
        if isinstance(module._buffers, dict):  # TorchScript keeps its own
            buffered.append(module)
        if is_normalisation(module):
            original = _original(module, known)
            frozen = can_freeze and not original.training
            layers[module] = Layer(
                module=module,
                original=original,
                before=_flags(module),
                wanted=original if frozen else _wanted(module, original, mode),
                frozen=frozen,
            )
    return Model(root, tuple(modules), layers, tuple(buffered), computed)


def _wanted(module: nn.Module, original: Flags, mode: str) -> Flags:
    """The flags with which the layer's own forward does what ``mode`` says, or comes
    closest; the rules do the rest.

    A batch norm layer in training that does not track uses the slice's statistics and
    neither counts nor writes. SyncBatchNorm in training would leave for its process
    group before any rule sees it, in eval it calls ``F.batch_norm`` (read in 2.13).
    """
    training, track = original
    if mode == "eval":
        return Flags(False, track)
    if isinstance(module, SyncBatchNorm):
        return Flags(False, track)
    if isinstance(module, _BatchNorm):
        return Flags(True, False)
    if mode == "group_norm":
        return original
    return Flags(True, track)


def _flags(module: nn.Module) -> Flags:
    return Flags(module.training, getattr(module, "track_running_stats", None))


def _original(module: nn.Module, known: Mapping[nn.Module, Layer]) -> Flags:
    """The flags outside all blocks: of an enclosing one, another thread's, or bare."""
    layer = known.get(module)
    if layer is not None:
        return layer.original
    if not _compiling():
        held = _held.get(module)
        if held is not None:
            return held.original
    return _flags(module)


_harmless: set[type] = set()


def _refuse(module: nn.Module, mode: str, root: nn.Module) -> None:
    """Raise for a module that no block can cover; remember harmless classes."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(
            worded(
                f'vmap_safe({type(root).__name__}, mode="{mode}")',
                f"{Model(root, ()).label(module)} is lazy and has not seen a batch",
                "Run the model on one batch first",
            )
        )
    if any(base.__name__ in _SHARDED for base in type(module).__mro__):
        raise TypeError(
            worded(
                f'vmap_safe({type(root).__name__}, mode="{mode}")',
                f"{Model(root, ()).label(module)} is sharded by FSDP, whose flat "
                "parameters torch.func cannot map over",
                "Use the module before it is sharded, or DistributedDataParallel",
            )
        )
    if mode != "eval" and isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            worded(
                f'vmap_safe({type(root).__name__}, mode="{mode}")',
                f"{Model(root, ()).label(module)} is TorchScript, of which only the "
                "training flag can be switched",
                'Use mode="eval", or the module before it was scripted',
            )
        )
    if not isinstance(module, (LazyModuleMixin, torch.jit.ScriptModule)):
        _harmless.add(type(module))


class _Claim(NamedTuple):
    layer: Layer
    options: Any
    thread: int


class _Held(NamedTuple):
    original: Flags
    claims: list[_Claim]


_lock = threading.RLock()
_held: dict[nn.Module, _Held] = {}


def _claim(layer: Layer, options: Any) -> None:
    held = _held.get(layer.module)
    if held is None:
        held = _held[layer.module] = _Held(layer.original, [])
    held.claims.append(_Claim(layer, options, threading.get_ident()))


def _release(layer: Layer) -> None:
    held = _held.get(layer.module)
    if held is None:
        return
    held.claims[:] = [claim for claim in held.claims if claim.layer is not layer]
    if held.claims:
        held.claims[-1].layer.enforce()
    else:
        set_flags(layer.module, held.original)
        del _held[layer.module]


def _refuse_other_options(
    held: _Held, model: Model, layer: Layer, options: Any
) -> None:
    here = threading.get_ident()
    for claim in held.claims:
        if claim.thread != here and claim.options != options:
            raise BlockError(
                worded(
                    f"vmap_safe({type(model.root).__name__}, {options})",
                    f"another thread holds {model.label(layer.module)} with "
                    f"{claim.options}, and a layer's flags belong to all threads",
                    "Use the same options in both threads, or a copy of the model",
                )
            )
