"""What a block has to know of a model, looked at once at entry.

A :class:`Model` is one module handed to a block: its normalisation layers, the flags
the mode wants them to show, and which of them their owner has frozen. :func:`switch`
gives its modules the classes of ``_switched``, and takes them back.

Put back as well are weights that hooks compute before each forward, as those of
weight_norm, spectral_norm and pruning do: a forward under a transform leaves tensors
behind that are dead after it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vmapsafe._block.switched import (
    InEval,
    InTraining,
)
from vmapsafe._block.switched import Layer as SwitchedLayer
from vmapsafe._block.switched import (
    PutsBack,
    PutsBackAroundCalls,
    kept_buffers,
    may_assign,
    normalises_itself,
    of_torch,
    own_class,
    owners_flags,
    put_buffers_back,
)
from vmapsafe._block.switched import switch as _switch
from vmapsafe._errors import (
    VmapSafeError,
    VmapSafeTypeError,
    VmapSafeValueError,
    a_kind,
)
from vmapsafe._modes import Flags, Mode, Options
from vmapsafe._torch import BatchNormBase, LazyModuleMixin, NormBase, is_wrapped

_compiling = torch.compiler.is_compiling
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")
_TRACED = ("TracedModule", "TopLevelTracedModule")


class Layer(NamedTuple):
    """One normalisation layer of a model, and the flags it shows in the block; those of
    its owner where he has frozen it."""

    shown: Flags
    frozen: bool
    owners: Flags


@dataclass(frozen=True)
class Model:
    """One module handed to a block, as it was found at entry.

    Attributes:
        root: the module, taken out of its wrappers.
        paths: the name in the model of every module in it, the root first.
        layers: the normalisation layers among them.
        buffered: the modules that own buffers.
        parts: of each module, what of ours its class is to have.
        scripted: the flags of layers that are TorchScript, which has no classes.
        computed: of modules with hooks before their forward, the tensors among the
            attributes.
        names: of modules with parameters, what these are called.
        kept: while torch.compile traces, the buffers.
    """

    root: nn.Module
    paths: dict[nn.Module, str]
    layers: dict[nn.Module, Layer] = field(default_factory=dict)
    buffered: tuple[nn.Module, ...] = ()
    parts: dict[nn.Module, tuple[type, ...]] = field(default_factory=dict)
    scripted: dict[nn.Module, bool] = field(default_factory=dict)
    computed: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)
    names: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)
    kept: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)

    @property
    def modules(self) -> Collection[nn.Module]:
        """Every module in it, the root first."""
        return self.paths.keys()

    def path(self, module: nn.Module) -> str:
        """The module's name in the model, "" for the root."""
        if module in self.paths:
            return self.paths[module]
        return f"<{a_kind(module)} that was not part of the model>"

    def label(self, module: nn.Module) -> str:
        """``'layer1.0.bn1' (BatchNorm2d)``, for errors."""
        name = self.path(module) or "the model itself"
        return f"'{name}' ({type(module).__name__})"


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        # By name, as naming the class would import the whole compiler (torch 2.13).
        if type(module).__name__ == "OptimizedModule":
            module = module.get_submodule("_orig_mod")
        elif isinstance(module, _WRAPPERS):
            module = module.module
        else:
            return module


def device_of(model: nn.Module) -> torch.device:
    """The device of its first parameter, else of its first buffer, else the CPU."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def is_frozen(module: nn.Module, root: nn.Module) -> bool:
    """Whether its owner has put a module in eval mode in a model in training mode."""
    return owners_flags(root).training and not owners_flags(module).training


def is_lazy(module: nn.Module) -> bool:
    """Whether it is a lazy layer that has not seen a batch."""
    return isinstance(module, LazyModuleMixin) and bool(
        module.has_uninitialized_params()
    )


def has_running_stats(module: nn.Module) -> bool:
    """Whether it owns buffers named running_mean and running_var."""
    buffers = module._buffers
    return (
        "running_mean" in buffers
        and "running_var" in buffers
        and buffers["running_mean"] is not None
        and buffers["running_var"] is not None
    )


def never_updated(layer: nn.Module) -> bool:
    """Whether its running statistics are as they were initialised."""
    count, mean, var = (
        getattr(layer, name, None)
        for name in ("num_batches_tracked", "running_mean", "running_var")
    )
    if count is None or mean is None or var is None or mean.is_meta:
        return False
    return bool((count == 0).all() and (mean == 0).all() and (var == 1).all())


def is_normalisation(module: nn.Module) -> bool:
    """Whether a block covers this layer.

    Batch norm with and without running statistics, instance norm with them, subclasses
    of both, and every module that owns buffers ``running_mean`` and ``running_var``.
    """
    return isinstance(module, BatchNormBase) or has_running_stats(module)


def has_torchs_forward(module: nn.Module) -> bool:
    """Whether its forward is one of torch's own, other than SyncBatchNorm's."""
    if "forward" in vars(module) or isinstance(module, nn.SyncBatchNorm):
        return False
    homes = [kind for kind in own_class(module).__mro__ if "forward" in vars(kind)]
    return of_torch(homes[0])


def is_hand_made_write(module: nn.Module, name: str) -> bool:
    """Whether a write to this buffer in a forward is one that "eval" would be expected
    to leave out: an update of statistics by a layer in training that is not torch's
    own, and not a counter, an observer, or the vectors of a spectral norm."""
    kind, buffer = own_class(module), module._buffers.get(name)
    if buffer is None or not buffer.is_floating_point() or not module.training:
        return False
    if of_torch(kind) or any([b.__module__.startswith("torch.ao") for b in kind.mro()]):
        return False
    hooks = module._forward_pre_hooks.values()
    return not any(
        [of_torch(type(h)) and name.startswith(getattr(h, "name", "?")) for h in hooks]
    )


def process_group(module: nn.Module) -> Any:
    """The group of several processes over which a SyncBatchNorm layer takes its
    statistics in training; None for every other layer, and in one process."""
    if not isinstance(module, nn.SyncBatchNorm):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def find(roots: Sequence[nn.Module], options: Options) -> tuple[Model, ...]:
    """Look at the modules handed to a block, without changing anything.

    A root inside another root belongs to the outer one.

    Args:
        roots: the modules, in their wrappers.
        options: the options of the block.

    Returns:
        One model for each root that is not inside another one.

    Raises:
        VmapSafeValueError: a lazy layer has not seen a batch, or the mode is not "eval"
            and a layer is of a class in ``also``.
        VmapSafeTypeError: a block cannot switch a module of this kind.
    """
    roots = [unwrapped(root) for root in roots]
    if len(roots) > 1:
        inner = {m for root in roots for m in root.modules() if m is not root}
        roots = [root for root in dict.fromkeys(roots) if root not in inner]
    return tuple([_look_at(root, options) for root in roots])


def _look_at(root: nn.Module, options: Options) -> Model:
    mode, also = options.meaning, options.also
    paths: dict[nn.Module, str] = {}
    model = Model(root, paths)
    buffered: list[nn.Module] = []
    can_freeze = owners_flags(root).training
    seen = {root}
    waiting = [(root, "")]
    while waiting:
        module, path = waiting.pop()
        paths[module] = path
        for name, child in reversed(list(module._modules.items())):
            if type(child).__name__ == "OptimizedModule":
                # A wrapper that torch.compile would trace as two modules.
                child = unwrapped(child)  # type: ignore[arg-type]
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append((child, f"{path}.{name}" if path else name))
        # torch.compile would guard every class that was ever met.
        if _compiling() or type(module) not in _harmless:
            _raise(refusal(module, mode), module, model, mode)
        if module._forward_pre_hooks and not _compiling():
            tensors = {n: t for n, t in vars(module).items() if isinstance(t, Tensor)}
            model.computed[module] = tensors
        if isinstance(module, torch.jit.ScriptModule):
            if is_normalisation(module) and mode.reads_running_stats:
                if not can_freeze or module.training:
                    model.scripted[module] = module.training
            continue
        if module._parameters:
            model.names[module] = tuple(module._parameters)
        if module._buffers:
            buffered.append(module)
        named = isinstance(module, also) if also else False
        if named or (module._buffers and is_normalisation(module)):
            flags = owners_flags(module)
            frozen = can_freeze and not flags.training
            if named and not frozen:
                _raise(refusal_of_named(mode), module, model, mode)
            if mode.merges and isinstance(module, BatchNormBase):
                # Without running statistics it uses the batch's in eval mode too.
                frozen = frozen and has_running_stats(module)
            shown = flags if frozen else _shown(module, flags, mode)
            model.layers[module] = Layer(shown, frozen, flags)
    parts = model.parts
    if not _compiling():
        for module in paths:
            needed = _parts(module, model, bool(buffered), also)
            if needed:
                parts[module] = needed
    return Model(
        root,
        paths,
        model.layers,
        tuple(buffered),
        parts,
        model.scripted,
        model.computed,
        model.names,
        kept_buffers(root) if _compiling() else [],
    )


def _parts(
    module: nn.Module, model: Model, has_buffers: bool, also: tuple[type, ...]
) -> tuple[type, ...]:
    """What of ours the module's class is to have in front."""
    if isinstance(module, torch.jit.ScriptModule):
        return ()
    parts: list[type] = []
    if has_buffers and (module._modules or module._buffers) and may_assign(module):
        seen = "forward" in vars(module) or module._forward_hooks
        parts.append(PutsBackAroundCalls if seen else PutsBack)
    layer = model.layers.get(module)
    if layer is not None:
        by_rule = isinstance(module, NormBase) and not isinstance(module, also)
        if by_rule and has_torchs_forward(module):
            parts.append(SwitchedLayer)
        else:
            parts.append(InTraining if layer.shown.training else InEval)
    return tuple(parts)


def _shown(module: nn.Module, owners: Flags, mode: Mode) -> Flags:
    """The flags with which the layer's own forward does what ``mode`` says, or comes
    closest; the rules do the rest.

    A layer that a rule knows by its buffers shows eval mode, in which it passes them on
    and does not count. One that has a forward of its own may use them itself, so it
    shows training mode. SyncBatchNorm in training mode would leave for its process
    group before a rule sees it (read in torch 2.13).
    """
    if isinstance(module, nn.SyncBatchNorm):
        return Flags(training=False)
    if not isinstance(module, BatchNormBase):
        return owners if mode.others is None else mode.others
    if mode.by_rule and normalises_itself(module):
        return Flags(training=True)
    return mode.batch_norm


def switch(models: Sequence[Model]) -> None:
    """Give the modules their classes; with the lock held.

    What torch.compile traces cannot change a class: its flags are set, as no other
    thread sees them.
    """
    if _compiling():
        for model in models:
            for module, layer in model.layers.items():
                if not layer.frozen:
                    _set_flags(module, layer.shown)
        return
    for model in models:
        for module, parts in model.parts.items():
            _switch(module, parts)
        for module, training in model.scripted.items():
            _scripted.setdefault(module, training)
            module.training = False


def put_back(models: Sequence[Model], others: Iterable[Any]) -> None:
    """Undo :func:`switch`, but for what the blocks ``others`` want, the last of them
    first; with the lock held."""
    if _compiling():
        put_back_flags(models)
        return
    for model in reversed(models):
        for module in model.parts:
            _switch(module, _wanted_by(others, module))
        for module in model.scripted:
            held = any([module in m.scripted for b in others for m in b.models])
            if not held and module in _scripted:
                training = _scripted.pop(module)
                module.training = module.training or training
        for module, tensors in model.computed.items():
            for name, tensor in tensors.items():
                now = module.__dict__.get(name)
                if isinstance(now, Tensor) and is_wrapped(now):
                    module.__dict__[name] = tensor


def _wanted_by(blocks: Iterable[Any], module: nn.Module) -> tuple[type, ...]:
    for block in blocks:
        for model in block.models:
            if module in model.parts:
                parts: tuple[type, ...] = model.parts[module]
                return parts
    return ()


_scripted: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


# Classes of which no module is refused.
_harmless: weakref.WeakSet[type] = weakref.WeakSet()


class Refusal(NamedTuple):
    """Why no block of a mode can cover a module.

    Attributes:
        error: the class of the error that the block raises.
        found: what is wrong with the module, without its name.
        do: what to do.
    """

    error: type[VmapSafeError]
    found: str
    do: str


def refusal(module: nn.Module, mode: Mode) -> Refusal | None:
    """Why a block cannot cover the module, if it cannot; remember harmless classes."""
    if is_lazy(module):
        return Refusal(
            VmapSafeValueError,
            "is lazy and has not seen a batch",
            "Run the model on one batch first",
        )
    if any(base.__name__ in _SHARDED for base in type(module).__mro__):
        return Refusal(
            VmapSafeTypeError,
            "is sharded by FSDP, whose flat parameters torch.func cannot map over",
            "Use the module before it is sharded, or DistributedDataParallel",
        )
    if type(module).__name__ in _TRACED and _has_batch_norm(module):
        return Refusal(
            VmapSafeTypeError,
            "was traced by torch.jit.trace, which leaves the flags of its layers out",
            "Use the module before it was traced",
        )
    if not mode.reads_running_stats and isinstance(module, torch.jit.ScriptModule):
        return Refusal(
            VmapSafeTypeError,
            "is TorchScript, and a block can switch only its training flag",
            'Use mode="eval", or the module before it was scripted',
        )
    if _compiling():
        return None
    if not isinstance(module, (LazyModuleMixin, torch.jit.ScriptModule)):
        _harmless.add(type(module))
    return None


def refusal_of_named(mode: Mode) -> Refusal | None:
    """Why a block cannot cover a layer of ``also``, if the mode does not tell how."""
    if mode.reads_running_stats:
        return None
    return Refusal(
        VmapSafeValueError,
        'is named by also=, which has a meaning in mode "eval" only',
        'Use mode="eval", or leave the class out of also',
    )


def _raise(
    refusal: Refusal | None, module: nn.Module, model: Model, mode: Mode
) -> None:
    if refusal is not None:
        raise refusal.error(
            f'vmap_safe({type(model.root).__name__}, mode="{mode.name}")',
            f"{model.label(module)} {refusal.found}",
            refusal.do,
        )


def _has_batch_norm(module: nn.Module) -> bool:
    return any(
        [n.rpartition(".")[2] == "running_mean" for n, _ in module.named_buffers()]
    )


# -- While torch.compile traces a block ------------------------------------------------


def put_back_flags(models: Sequence[Model]) -> None:
    """Undo what :func:`switch` does there, and what forwards assigned."""
    for model in reversed(models):
        for module, layer in model.layers.items():
            _set_flags(module, layer.owners)
        for module, before in model.kept:
            put_buffers_back(module, before)


def _set_flags(module: Any, flags: Flags) -> None:
    module.training = flags.training
    if flags.track_running_stats is not None:
        module.track_running_stats = flags.track_running_stats
