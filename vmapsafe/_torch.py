"""Every private name of torch that the package uses, and what each one does.

Each name has the version of torch in which it was read. When torch moves a name, this
is the file to change. Other files import these functions and classes. Of private names
they use only attributes of modules (``_parameters``, ``_buffers``, ``_modules``, hooks)
and names of operators, which rules are for.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import pyfunctorch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._ops import _compute_keyset
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction as BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin as LazyModuleMixin
from torch.overrides import TorchFunctionMode as TorchFunctionMode
from torch.overrides import _pop_mode, _push_mode
from torch.overrides import handle_torch_function as handle_torch_function
from torch.overrides import has_torch_function as has_torch_function

# The trees torch.func itself uses, and how it spreads in_dims over them (torch 2.13).
from torch.utils._pytree import _broadcast_to_and_flatten
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

# The base classes of torch's layers. Only their subclasses have public names.
BatchNormBase = _BatchNorm
DropoutBase = _DropoutNd
InstanceNormBase = _InstanceNorm
NormBase = _NormBase

# The code that calls a module's hooks and its forward.
CODE_OF_CALLS = torch.nn.Module._call_impl.__code__
# The module whose frames show that vmap is running.
HOME_OF_VMAP = "torch._functorch.vmap"

C = TypeVar("C", bound=Callable[..., Any])


# torch.compile cannot trace functions that look at transforms, nor the vmap rule of an
# autograd.Function: it would silently leave the rule out. Both are kept whole. Read in
# torch 2.13: this attribute marks a function that is run while tracing and whose result
# is a constant. torch.compiler's own decorators would import all of torch._dynamo.


def constant_while_compiling(function: C) -> C:
    """A decorator for functions of constants: torch.compile runs them, untraced."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def run_while_compiling(function: C) -> C:
    """A decorator for functions whose frames torch.compile does not compile.

    It runs them, and all that they call, as they are.
    """
    compiler = torch._C._dynamo.eval_frame
    skip = compiler._FrameAction.SKIP
    strategy = compiler._FrameExecStrategy(skip, skip)
    compiler.set_code_exec_strategy(function.__code__, strategy)
    return function


# torch.compile of 2.11 takes vars(module)["x"] for module.x, and cannot list them.
LISTS_VARS_WHILE_COMPILING = torch.__version__ >= "2.12"

_whole: list[Callable[..., object]] = []


def whole_while_compiling(function: C) -> C:
    """A decorator for functions of tensors and for classes of autograd.Function.

    torch.compile leaves them, with their transforms, for the backend to trace.
    """
    _whole.append(function)
    return function


@constant_while_compiling
def prepare_compiling() -> None:
    """Tell torch.compile which functions it leaves whole.

    Code that it traces must call this before it calls one of them.
    """
    for function in _whole:
        torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]


_any_global_hook: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of a module runs other code than its class's forward."""
    # Read in torch 2.13.
    given = module.__dict__
    return bool(
        given["_forward_hooks"]
        or given["_forward_pre_hooks"]
        or given["_backward_hooks"]
        or given["_backward_pre_hooks"]
        or "forward" in given
        or given.get("_compiled_call_impl")
        or _any_global_hook()
    )


def modes_in_force() -> list[TorchFunctionMode]:
    """This thread's stack, the innermost last."""
    # Read in torch 2.13: the public function makes a new list in each call.
    size = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(size)]


def innermost_mode() -> TorchFunctionMode | None:
    """The last mode of this thread's stack. torch.compile traces this."""
    size = torch._C._len_torch_function_stack()
    return torch._C._get_function_stack_at(size - 1) if size else None


# Put a mode on this thread's stack; take the innermost one off.
put_on: Callable[[TorchFunctionMode], None] = _push_mode
take_off_innermost: Callable[[], TorchFunctionMode] = _pop_mode


def take_off(mode: TorchFunctionMode) -> str:
    """Take a mode off this thread's stack, wherever it is.

    Args:
        mode: the mode.

    Returns:
        Where it was: "top", "not the innermost block" or "nowhere".
    """
    stack = modes_in_force()
    if mode not in stack:
        return "nowhere"
    where = "top" if stack[-1] is mode else "not the innermost block"
    above: list[TorchFunctionMode] = []
    try:
        while mode in stack:  # twice, after an interrupt in torch's own code
            one = stack.pop()
            take_off_innermost()
            if one is not mode:
                above.append(one)
    finally:
        for one in reversed(above):
            put_on(one)
    return where


_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
)


def is_torchs_own(function: object) -> bool:
    """Whether a function that a mode sees is one of torch's that calls no other code,
    such as a function that is passed to it."""
    if isinstance(function, _BUILT_IN):
        return True
    home = getattr(function, "__module__", None)
    return home == "torch.nn.functional" and function not in _CALLING


# F.triplet_margin_with_distance_loss is passed a function.
_CALLING = (F.triplet_margin_with_distance_loss,)


def dispatch_modes_are_on() -> bool:
    """Whether a mode that sees all operators is on, such as FakeTensorMode."""
    return torch._C._len_torch_dispatch_stack() > 0


def under(mode: TorchFunctionMode, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function with a mode in force. An interrupt does not leave it in force."""
    done = False
    try:
        try:
            put_on(mode)
            return function(*args)
        finally:
            take_off(mode)
            done = True
    finally:
        if not done:
            take_off(mode)


# Of autograd, read in torch 2.13: the node whose backward this thread is running, or
# None; the number that the next node made in this thread will have.
running_node = torch._C._current_autograd_node
next_sequence_number = torch._C._autograd._get_sequence_nr


def sequence_number(node: Node) -> int:
    """The number of a node of autograd; a later node has a larger one."""
    return int(node._sequence_nr())


# Of saved tensors: the innermost pair of hooks, or None; whether they may be used.
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_autograd: Any = torch._C._autograd
hooks_are_enabled: Callable[[], bool] = _autograd._saved_tensors_hooks_is_enabled


def run_backward(
    loss: Tensor, inputs: Sequence[Tensor], accumulate: bool, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Run backward with this thread's modes in force, which torch.autograd takes off.

    Args:
        loss: a tensor without dimensions.
        inputs: what to differentiate by.
        accumulate: whether to add to ``.grad`` of all leaves, as ``loss.backward()``
            does, and take those of ``inputs``.
        create_graph: whether derivatives of the gradients will be wanted.

    Returns:
        The gradients; None where there is none.
    """
    run = torch.autograd.graph._engine_run_backward  # read in torch 2.13
    ones = (torch.ones_like(loss),)
    into = () if accumulate else tuple(inputs)
    found = run(
        (loss,),
        ones,
        create_graph,
        create_graph,
        into,
        True,
        accumulate_grad=accumulate,
    )
    return tuple([leaf.grad for leaf in inputs]) if accumulate else found


def below_modes(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a higher-order operator as it calls itself below all modes."""
    keys = _compute_keyset(  # type: ignore[no-untyped-call]
        args, kwargs, operator.non_fallthrough_keys
    )
    return operator.dispatch(keys.highestPriorityTypeId(), *args, **kwargs)


# The functions below ``F.batch_norm``.
NATIVE_BATCH_NORMS = frozenset(
    [
        torch.native_batch_norm,
        torch.cudnn_batch_norm,
        torch.miopen_batch_norm,
        torch._native_batch_norm_legit,
    ]
)


# What ``nn.utils.rnn.pack_padded_sequence`` calls.
PACK_SEQUENCES = torch._pack_padded_sequence


def list_weights_again(modules: Iterable[torch.nn.Module]) -> None:
    """Let recurrent layers list the weights that they have now.

    A forward under ``functional_call`` lists those handed in. torch.compile cannot keep
    them after the transform that they belong to (torch 2.13).
    """
    for module in modules:
        if isinstance(module, torch.nn.RNNBase):
            module._update_flat_weights()


# The transforms around a call. Read in torch 2.13: they are a stack, or None if there
# are none; their levels begin at 1.


def _transforms() -> Any:
    return torch._C._functorch.get_interpreter_stack() or ()


@constant_while_compiling
def current_level() -> int:
    """The level of the innermost transform, 0 outside all."""
    return torch._C._functorch.maybe_current_level() or 0


@constant_while_compiling
def derivatives_inside(level: int) -> int:
    """How many derivatives are taken inside the transform of ``level``."""
    return sum(one.key().name in ("Grad", "Jvp") for one in _transforms()[level:])


@constant_while_compiling
def vmap_size(level: int) -> int:
    """The batch size of the vmap of ``level``."""
    one = _transforms()[level - 1]
    return int(torch._C._functorch.CVmapInterpreterPtr(one).batchSize())


def batched_levels(tensors: Sequence[Tensor]) -> frozenset[int]:
    """The levels of the vmaps that batch any of ``tensors``."""
    if not torch.compiler.is_compiling():
        return frozenset(_levels(tensors))
    prepare_compiling()
    bits = int(_levels_as_bits(tensors))
    return frozenset([level for level in range(_BITS) if bits >> level & 1])


def _levels(tensors: Sequence[Tensor]) -> set[int]:
    functorch = torch._C._functorch
    levels = set()
    for tensor in tensors:
        while is_wrapped(tensor):
            if functorch.is_batchedtensor(tensor):
                levels.add(functorch.maybe_get_level(tensor))
            tensor = functorch.get_unwrapped(tensor)
    return levels


_BITS = 53


@whole_while_compiling
def _levels_as_bits(tensors: Sequence[Tensor]) -> float:
    """In a float, the one kind of number that torch.compile takes from a function of
    tensors as a constant."""
    return float(sum(1 << level for level in _levels(tensors)))


def shares_memory(tensor: Tensor, others: Sequence[Tensor]) -> int | None:
    """The index in ``others`` of a tensor that shares memory with ``tensor``."""
    if torch.compiler.is_compiling():
        prepare_compiling()
    found = int(_sharing(tensor, others))
    return None if found < 0 else found


@whole_while_compiling
def _sharing(tensor: Tensor, others: Sequence[Tensor]) -> float:
    """In a float, as :func:`_levels_as_bits`; -1 for none."""
    storage = storage_of(tensor)
    if storage is not None:
        for i, other in enumerate(others):
            if storage_of(other) == storage:
                return float(i)
    return -1.0


def only_vmaps() -> bool:
    """Whether every transform around the call is a vmap."""
    return all([one.key().name == "Vmap" for one in _transforms()])


def slices_draw_their_own() -> bool:
    """Whether a vmap around this call has ``randomness="different"``."""
    functorch = torch._C._functorch
    return any(
        one.key().name == "Vmap"
        and functorch.CVmapInterpreterPtr(one).randomness().name == "Different"
        for one in _transforms()
    )


def beyond_reverse_mode(*tensors: Tensor | None) -> bool:
    """Whether the call sees a derivative other than one reverse mode: a jvp, a grad
    inside a grad, or a grad inside plain autograd, which is recording what is computed
    from one of ``tensors``. True while compiling."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    keys = [one.key().name for one in _transforms()]
    if "Jvp" in keys or keys.count("Grad") > 1:
        return True
    return "Grad" in keys and any(
        [innermost(t).requires_grad for t in tensors if t is not None]
    )


def autograd_records(*tensors: Tensor | None) -> bool:
    """Whether plain autograd records what is computed from ``tensors``, none of them
    empty, and no transform takes derivatives inside it."""
    if not torch.is_grad_enabled():
        return False
    if not only_vmaps():
        return False
    inside = [innermost(t) for t in tensors if t is not None]
    return all([t.numel() > 0 for t in inside]) and any(
        [t.requires_grad for t in inside]
    )


def innermost(tensor: Tensor) -> Tensor:
    """The tensor inside all wrappers of the transforms around it."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def first_slice(tensor: Tensor) -> Tensor:
    """The first of the slices that the vmaps around the call show as ``tensor``."""
    if not is_wrapped(tensor):
        return tensor
    functorch = torch._C._functorch
    inside = first_slice(functorch.get_unwrapped(tensor))
    if functorch.is_batchedtensor(tensor):
        inside = inside.select(functorch.maybe_get_bdim(tensor), 0)
    return inside


# The key of one vmap, below which a batching rule computes. Read in torch 2.13
# (custom_function_call_vmap_helper).
_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def whole_batches(
    arguments: Mapping[str, Any], level: int
) -> tuple[dict[str, Any], dict[str, int | None]]:
    """The arguments without the vmap of ``level``, and the batch dimensions of the
    tensors among them."""
    values: dict[str, Any] = {}
    in_dims: dict[str, int | None] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value, in_dims[name] = torch._C._functorch._unwrap_batched(value, level)
        values[name] = value
    return values, in_dims


# A context for kernels: modes would see each step of a kernel, at 5 us each.
unseen_by_modes = torch._C.DisableTorchFunction


def below_vmap() -> AbstractContextManager[object]:
    """A context in which operations compute on whole batches."""
    return torch._C._ExcludeDispatchKeyGuard(_BATCHED)


# The key that hands each operation of a kernel to the transforms outside the vmap, and
# to autograd. Read in torch 2.13 (dynamicLayerBackFallback).
_TAKEN_ON = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerBackMode)


def unwatched() -> AbstractContextManager[object]:
    """A context for plain tensors in a kernel, see :func:`is_plain`.

    Operations in it go straight to the device, which saves about 10 us each.
    """
    if dispatch_modes_are_on():  # torch 2.11 and 2.12 end in an internal error
        return nullcontext()
    return torch._C._ExcludeDispatchKeyGuard(_TAKEN_ON)


def would_be_cast(tensors: Sequence[Tensor]) -> bool:
    """Whether autocast would change the dtype of what a kernel computes from these.

    Switching it off inside a kernel has no effect: below vmap each operation gets back
    the state in which the call was made (torch 2.13).
    """
    device = tensors[0].device
    return autocasts(device) and any(
        [t.dtype != torch.get_autocast_dtype(device.type) for t in tensors]
    )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; some types of device, as "meta", know none."""
    return (
        torch._C._is_any_autocast_enabled()  # which is cheap to ask
        and torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
    )


_CAST = (torch.float16, torch.bfloat16, torch.float32)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies a tensor; None where it does not cast."""
    if tensor.dtype not in _CAST or not autocasts(tensor.device):
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which it is off."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


_DERIVES_IN_INFERENCE_MODE = torch.__version__ >= "2.12"


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """A context for derivatives, which are zeros in inference mode in torch 2.11."""
    # torch.compile of 2.11 cannot ask whether it is on, and so leaves it in any case.
    may_be_on = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    if _DERIVES_IN_INFERENCE_MODE or not may_be_on:
        yield
        return
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recorded):
        yield


@constant_while_compiling
def multiplies_exactly(device: torch.device) -> bool:
    """Whether products of float32 matrices there have the precision of float32."""
    return _precision(device, "matmul") in ("none", "ieee")


@constant_while_compiling
def multiplies_as_it_convolves(device: torch.device) -> bool:
    """Whether float32 matrices are multiplied there at least as precisely as float32
    convolutions are computed; on CUDA these are not exact unless told so."""
    same = _precision(device, "matmul") == _precision(device, "conv")
    return same or multiplies_exactly(device)


def _precision(device: torch.device, of: str) -> str:
    """The result of all switches, older and newer. torch's public function raises if
    both were used (torch 2.13)."""
    backend = "mkldnn" if device.type == "cpu" else "cuda"
    found: str = torch._C._get_fp32_precision_getter(backend, of)
    return found


def wrapped_again(
    outputs: tuple[Tensor | None, ...], level: int
) -> tuple[Tensor | None, ...]:
    """Batches, batch dimension first, as the vmap of ``level`` shows them."""
    return tuple(
        [
            None if out is None else torch._C._functorch._add_batch_dim(out, 0, level)
            for out in outputs
        ]
    )


# Contexts without all transforms, and without the innermost one (torch 2.13).
below_all = pyfunctorch.temporarily_clear_interpreter_stack
below_innermost = pyfunctorch.temporarily_pop_interpreter_stack


def batch_behind(slice_: Tensor, level: int, size: int) -> Tensor | None:
    """The batch whose slices the vmap of ``level`` shows; call it below that vmap.

    Args:
        slice_: what the vmap shows; if it is not batched, all slices are the same.
        level: the level of the vmap.
        size: the batch size of the vmap.

    Returns:
        The batch (size, ...), or None if another transform wraps it.
    """
    if not is_wrapped(slice_):
        return slice_.expand(size, *slice_.shape)
    batch, dim = torch._C._functorch._unwrap_batched(slice_, level)
    return None if dim is None or is_wrapped(batch) else batch.movedim(dim, 0)


def merging(
    merged: Callable[[int, Sequence[int | None], Sequence[Tensor | None]], Tensor],
    plain: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
) -> Tensor:
    """``plain(*tensors)`` below all vmaps, the only transforms there are. For each
    that batches any of ``tensors``, ``merged`` is asked instead, with its size, their
    batch dimensions and the batches, and gives a batch, batch dimension first."""
    level = current_level()
    if not level:
        return plain(*tensors)
    functorch = torch._C._functorch
    size = vmap_size(level)
    with below_innermost():
        pairs = [
            (t, None) if t is None else functorch._unwrap_batched(t, level)
            for t in tensors
        ]
        batches, dims = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if all([dim is None for dim in dims]):
            return merging(merged, plain, batches)
        batch = merged(size, dims, batches)
    return slices_of(batch, level)


def slices_of(batch: Tensor, level: int) -> Tensor:
    """(B, ...) as the vmap of ``level`` shows it."""
    shown: Tensor = torch._C._functorch._add_batch_dim(batch, 0, level)
    return shown


def is_plain(tensor: Tensor) -> bool:
    """Whether no transform, autograd or tracing watches what is computed from a tensor.

    Results may then be written in place.
    """
    recorded = tensor.requires_grad and torch.is_grad_enabled()
    watched = recorded or forward_ad._current_level >= 0 or is_wrapped(tensor)
    return type(tensor) in (Tensor, torch.nn.Parameter) and not watched


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a derivative may be taken of what is computed from it."""
    if forward_ad._current_level >= 0:
        return True
    functorch = torch._C._functorch
    while is_wrapped(tensor):
        if functorch.is_gradtrackingtensor(tensor):  # of torch.func's grad and jvp
            return True
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def storage_of(tensor: Tensor) -> int | None:
    """The memory of a tensor, which views and ``.data`` share; None if it has none.

    Inside a transform, views are wrapped, even views of tensors that are not. The
    tensor inside the wrappers counts.
    """
    try:
        return int(innermost(tensor).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass without
        return None


def lies_alone(tensor: Tensor, base: Tensor | None) -> bool:
    """Whether a tensor, and the one that it is a view of, share memory with no other.

    False if this is not known. It is cheap.
    """
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        # The wrapper's and ``tensor``; ``.data`` is a second wrapper of one tensor.
        if tensor._use_count() > 2:  # type: ignore[attr-defined]
            return False
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    # The tensor's own and ``storage``. Read in torch 2.13.
    known = 2 if base is None else 3
    return bool(torch._C._storage_Use_Count(storage._cdata) <= known)


def without_autograd(tensor: Tensor) -> Tensor:
    """The tensor without derivatives for plain autograd; transforms keep theirs."""
    return tensor if current_level() else tensor.detach()


def schema_of(operator: Any) -> Any:
    """What an operator takes, writes and returns."""
    return operator._schema


def base_of(view: Tensor) -> Tensor | None:
    """The tensor that a view shows a part of; None for other tensors."""
    return view._base


def forward_class_of(node: Any) -> type:
    """The autograd.Function of a node that runs its backward."""
    found: type = node._forward_cls
    return found


def without_view(tensor: Tensor) -> Tensor:
    """The same memory, as a tensor that is not a view for autograd. What follows can
    then write into it in place."""
    shown: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return shown


def added_up(name: str, number: int) -> int:
    """Add to a number that all processes of the default group share; return the sum.

    Args:
        name: of the number, which is 0 at first.
        number: what to add.

    Returns:
        The sum, in one step: no two processes that add 1 get the same.
    """
    # Read in torch 2.13: the group keeps such numbers where its processes met. Two
    # calls that add do not wait for one another longer than that takes.
    c10d: Any = torch.distributed.distributed_c10d
    return int(c10d._get_default_store().add(name, number))


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it belongs to a transform of torch.func, and cannot be used after it."""
    # Read in torch 2.13.
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def broadcast_to_leaves(spec: Any, tree: Any) -> list[int | None] | None:
    """A dimension out of ``spec`` for each leaf of ``tree``.

    None if ``spec`` does not fit the structure of ``tree``.
    """
    spread: list[int | None] | None = _broadcast_to_and_flatten(spec, tree)
    return spread
