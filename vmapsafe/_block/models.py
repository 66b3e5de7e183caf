"""How a block finds the layers of its models, switches them and puts them back.

:func:`find` looks at each model once: which of its modules are normalisation layers,
which flags the mode wants these to show, and which of them their owner has frozen.
:func:`switch` gives its modules the classes of ``switched``; :func:`put_back` takes
them back.

:func:`put_back` also restores weights that hooks compute before each forward, as those
of weight_norm, spectral_norm and pruning do: a forward under a transform leaves tensors
behind that cannot be used after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vmapsafe._block.code import may_assign, normalises_itself
from vmapsafe._block.covered import Layer
from vmapsafe._block.covered import Model as Model
from vmapsafe._block.open_blocks import Open
from vmapsafe._block.switched import (
    InEval,
    InTraining,
    PutsBack,
    PutsBackAroundCalls,
    ShowsFlags,
    give_class,
    kept_buffers,
    of_torch,
    own_class,
    owners_flags,
    owners_training,
    put_buffers_back,
)
from vmapsafe._errors import VmapSafeError, VmapSafeTypeError, VmapSafeValueError
from vmapsafe._modes import Flags, Mode, Options
from vmapsafe._torch import BatchNormBase, LazyModuleMixin, NormBase, is_wrapped

_compiling = torch.compiler.is_compiling
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")
_TRACED = ("TracedModule", "TopLevelTracedModule")


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
    """The device of the first parameter, else of the first buffer, else the CPU."""
    # Each block asks: this is faster than model.parameters() and model.buffers().
    for tensors in ("_parameters", "_buffers"):
        for module in model.modules():
            for tensor in getattr(module, tensors).values():
                if tensor is not None:
                    return tensor.device  # type: ignore[no-any-return]
    return torch.device("cpu")


def is_frozen(module: nn.Module, root: nn.Module) -> bool:
    """Whether a module is in eval mode in a model that is in training mode."""
    return _is_frozen(owners_flags(module), owners_training(root))


def _is_frozen(flags: Flags, root_trains: bool) -> bool:
    return root_trains and not flags.training


def is_lazy(module: nn.Module) -> bool:
    """Whether a module is a lazy layer that has not seen a batch."""
    return isinstance(module, LazyModuleMixin) and bool(
        module.has_uninitialized_params()
    )


def has_running_stats(module: nn.Module) -> bool:
    """Whether a module owns buffers named running_mean and running_var."""
    buffers = module._buffers
    return (
        "running_mean" in buffers
        and "running_var" in buffers
        and buffers["running_mean"] is not None
        and buffers["running_var"] is not None
    )


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of a model's normalisation layers, by name."""
    return {
        f"{path}.{name}" if path else name: layer.get_buffer(name)
        for path, layer in unwrapped(model).named_modules()
        if has_running_stats(layer)
        for name in ("running_mean", "running_var")
    }


def never_updated(layer: nn.Module) -> bool:
    """Whether the running statistics of a layer are as they were initialised."""
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
    """Whether a module has a forward of torch's own, other than SyncBatchNorm's."""
    if "forward" in vars(module) or isinstance(module, nn.SyncBatchNorm):
        return False
    homes = [kind for kind in own_class(module).__mro__ if "forward" in vars(kind)]
    return of_torch(homes[0])


def is_hand_made_write(module: nn.Module, name: str) -> bool:
    """Whether a write to this buffer in a forward looks like an update of statistics.

    Such a write comes from a layer in training that is not torch's own. Counters,
    observers and the vectors of a spectral norm are not statistics.
    """
    kind, buffer = own_class(module), module._buffers.get(name)
    if buffer is None or not buffer.is_floating_point() or not module.training:
        return False
    if of_torch(kind) or any([b.__module__.startswith("torch.ao") for b in kind.mro()]):
        return False
    hooks = module._forward_pre_hooks.values()
    return not any(
        [of_torch(type(h)) and name.startswith(getattr(h, "name", "?")) for h in hooks]
    )


def process_group(module: nn.Module) -> dist.ProcessGroup | None:
    """The processes over which a SyncBatchNorm layer takes its statistics in training.

    None for every other layer, and if there is one process.
    """
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
    mode, also, compiling = options.meaning, options.also, _compiling()
    paths: dict[nn.Module, str] = {}
    model = Model(root, paths)
    buffered = model.buffered
    root_trains = owners_training(root)
    seen = {root}
    waiting = [(root, "")]
    while waiting:
        module, path = waiting.pop()
        paths[module] = path
        children = module._modules
        for name, child in reversed([*children.items()]) if children else ():
            if type(child).__name__ == "OptimizedModule":
                # A wrapper that torch.compile would trace as two modules.
                child = unwrapped(child)  # type: ignore[arg-type]
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append((child, f"{path}.{name}" if path else name))
        # torch.compile would guard every class that was ever met.
        if compiling or type(module) not in _plain:
            if compiling or type(module) not in _harmless:
                _raise(refusal(module, mode), module, model, mode)
            if isinstance(module, torch.jit.ScriptModule):
                if is_normalisation(module) and mode.reads_running_stats:
                    if not _is_frozen(owners_flags(module), root_trains):
                        model.scripted[module] = module.training
                continue
        if module._forward_pre_hooks and not compiling:
            tensors = {n: t for n, t in vars(module).items() if isinstance(t, Tensor)}
            model.computed[module] = tensors
        if module._parameters:
            model.names[module] = tuple(module._parameters)
        if module._buffers:
            buffered.append(module)
        named = isinstance(module, also) if also else False
        if named or (module._buffers and is_normalisation(module)):
            flags = owners_flags(module)
            frozen = _is_frozen(flags, root_trains)
            if named and not frozen:
                _raise(refusal_of_named(mode), module, model, mode)
            if mode.merges and isinstance(module, BatchNormBase):
                # Without running statistics it uses the batch's in eval mode too.
                frozen = frozen and has_running_stats(module)
            if compiling and not frozen:
                _raise(_refusal_of_updates(module, options), module, model, mode)
            shown = flags if frozen else _shown(module, flags, options)
            model.layers[module] = Layer(shown, frozen, flags)
    parts = model.parts
    if not compiling:
        for module in paths:
            if module in model.layers or module._modules or module._buffers:
                needed = _parts(module, model, bool(buffered), also)
                if needed:
                    parts[module] = needed
                    model.given[module] = vars(module)
        model.device = _type_of_device(model)
    else:
        model.kept = kept_buffers(root)
    return model


def _type_of_device(model: Model) -> str:
    for module in model.names:  # those with parameters
        for parameter in module._parameters.values():
            if parameter is not None:
                return parameter.device.type
    return device_of(model.root).type


def _parts(
    module: nn.Module, model: Model, has_buffers: bool, also: tuple[type, ...]
) -> tuple[type, ...]:
    """The classes of ours that the module's class gets in front."""
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
            parts.append(ShowsFlags)
        else:
            parts.append(InTraining if layer.shown.training else InEval)
    return tuple(parts)


def _shown(module: nn.Module, owners: Flags, options: Options) -> Flags:
    """The flags with which a layer's own forward comes closest to what a mode says.

    Rules do the rest. A layer that a rule recognises by its buffers shows eval mode, in
    which it passes them on and does not count; so does one of torch's own that a rule
    updates. A layer that uses its buffers in a forward of its own shows training mode.
    SyncBatchNorm shows eval mode: in training mode it would call its process group
    before a rule sees it (read in torch 2.13).
    """
    mode = options.meaning
    if isinstance(module, nn.SyncBatchNorm):
        return Flags(training=False)
    if not isinstance(module, BatchNormBase):
        return owners if mode.others is None else mode.others
    if mode.by_rule and normalises_itself(module):
        return Flags(training=True)
    if options.update_running_stats and has_torchs_forward(module):
        return mode.batch_norm._replace(training=False)
    return mode.batch_norm


def switch(models: Sequence[Model]) -> None:
    """Give the modules their classes; the caller holds the lock.

    While torch.compile traces, a class cannot be changed. The flags themselves are set,
    which no other thread sees.
    """
    if _compiling():
        for model in models:
            for module, layer in model.layers.items():
                if not layer.frozen:
                    _set_flags(module, layer.shown)
        return
    for model in models:
        for module, parts in model.parts.items():
            give_class(module, parts)
        for module, training in model.scripted.items():
            _scripted.setdefault(module, training)
            module.training = False


def put_back(models: Sequence[Model], others: Sequence[Open]) -> None:
    """Undo :func:`switch`, and switch to what other blocks want; the caller holds the
    lock.

    Args:
        models: the models of the block that closes.
        others: the blocks that stay open, those that count first in front.
    """
    if _compiling():
        put_back_flags(models)
        return
    for model in reversed(models):
        for module in model.parts:
            give_class(module, _wanted_by(others, module))
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


def _wanted_by(blocks: Sequence[Open], module: nn.Module) -> tuple[type, ...]:
    for block in blocks:
        for model in block.models:
            if module in model.parts:
                return model.parts[module]
    return ()


_scripted: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


# Classes whose modules are never refused, and those of torch's own among them that are
# not TorchScript. A weak set takes longer to ask.
_harmless: weakref.WeakSet[type] = weakref.WeakSet()
_plain: set[type] = set()


class Refusal(NamedTuple):
    """Why a block cannot cover a module in a mode.

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
        if of_torch(type(module)):
            _plain.add(type(module))
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


def _refusal_of_updates(module: nn.Module, options: Options) -> Refusal | None:
    """Why a block that torch.compile traces cannot update a layer, if it cannot.

    There, a layer is known by the tensors that it passes. A forward of its own may pass
    none.
    """
    if (
        not options.update_running_stats
        or options.meaning.by_rule
        or not isinstance(module, BatchNormBase)
        or module.weight is not None
        or has_torchs_forward(module)
        or not has_running_stats(module)
    ):
        return None
    return Refusal(
        VmapSafeValueError,
        "has a forward of its own and no weight, so that torch.compile cannot see "
        "whose running statistics to update",
        "Put the block around the compiled function",
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
    """Undo what :func:`switch` does while compiling, and what forwards assigned."""
    for model in reversed(models):
        for module, layer in model.layers.items():
            _set_flags(module, layer.owners)
        for module, before in model.kept:
            put_buffers_back(module, before)


def _set_flags(module: Any, flags: Flags) -> None:
    module.training = flags.training
    if flags.track_running_stats is not None:
        module.track_running_stats = flags.track_running_stats
