"""A whole data set: one result for each batch of a DataLoader, or files of all.

``over(loader, function, model, loss_fn)`` reads as ``map(function, loader)`` does, and
takes any function of the form ``function(model, loss_fn, *batch, **options)``: rows,
norms, sketches, clipped sums, one's own. A method ``per_sample_grads.over`` would have
to be there once for each of them. What it gives is no list but, as a loader is,
something to iterate over as often as one likes, so that ``for``, ``zip``, ``enumerate``
and a ``break`` do what they do with the loader. Between two results nothing of a block
is open: whoever stops half-way has the model as it was.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from vmapsafe._block.models import device_of, unwrapped
from vmapsafe._data.folder import Folder
from vmapsafe._errors import (
    MissingExtraError,
    VmapSafeTypeError,
    VmapSafeValueError,
    a_kind,
)
from vmapsafe._modes import MODES
from vmapsafe._torch import tree_flatten, tree_map

Keys = str | Sequence[str | Sequence[str]]


def over(
    loader: Iterable[Any],
    function: Callable[..., Any],
    model: nn.Module,
    loss_fn: Callable[..., Any],
    *,
    keys: Keys | None = None,
    progress: bool = False,
    **options: Any,
) -> Over:
    """``function(model, loss_fn, *batch, **options)`` for every batch of ``loader``.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from vmapsafe import over, per_sample_grad_norms
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    >>> _ = model(torch.randn(16, 4))
    >>> data = TensorDataset(torch.randn(10, 4), torch.randint(3, (10,)))
    >>> loader = DataLoader(data, batch_size=4)
    >>> for norms in over(loader, per_sample_grad_norms, model, F.cross_entropy):
    ...     print(norms.shape)
    torch.Size([4])
    torch.Size([4])
    torch.Size([2])

    Args:
        loader: a DataLoader, or what else can be iterated over for batches.
        function: :func:`per_sample_grads`, :func:`per_sample_grad_norms`,
            :func:`per_sample_sketch`, or another that takes the same.
        model: as there.
        loss_fn: as there.
        keys: how a batch that is a dict is taken apart: the key of the inputs, then
            those of what ``loss_fn`` takes after the output. Several keys in one place,
            ``keys=(("input_ids", "attention_mask"), "labels")``, are a dict, which the
            model takes as keyword arguments.
        progress: a bar, of tqdm, which the extra ``[progress]`` brings.
        **options: of ``function``.

    Returns:
        What gives a result a batch in each ``for`` loop, on the device of the model.
        It has the loader's ``len``, and ``save``, which writes all results to files.

    Raises:
        TypeError: what is given is no loader, function or model, or ``function`` has no
            such option; in the loop, a batch that cannot be taken apart.
        ModuleNotFoundError: ``progress`` without tqdm.

    A batch is a tensor, the inputs alone; a tuple or list, the inputs and what
    ``loss_fn`` takes after the output, where the inputs may be a list too, which is
    positional arguments of the model; or a dict, with ``keys``. Its tensors are moved
    to the device of the model's first parameter. Each batch is a call of its own, so in
    "sync" it has statistics of its own. Nothing is gathered from other processes:
    each goes over its own loader. With ``gather="all"`` among the options all loaders
    must have the same number of batches.
    """
    return Over(loader, function, model, loss_fn, keys, progress, options)


class Over:
    """What :func:`over` returns."""

    def __init__(
        self,
        loader: Iterable[Any],
        function: Callable[..., Any],
        model: nn.Module,
        loss_fn: Callable[..., Any],
        keys: Keys | None,
        progress: bool,
        options: Mapping[str, Any],
    ) -> None:
        self._loader, self._function, self._model = loader, function, model
        self._loss_fn, self._options = loss_fn, dict(options)
        self._keys = None if keys is None else _several(keys)
        _check_arguments(loader, function, model, loss_fn)
        self._asked = _with_defaults(function, model, loss_fn, self._options)
        self._bar = _tqdm() if progress else None

    def __len__(self) -> int:
        """The loader's."""
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Begins the loader anew."""
        with _Progress(self._bar, self._length(), 0) as done:
            for batch in self._loader:
                result = self._result(self._moved(self._parts(batch)))
                done()
                yield result

    def save(self, path: str | os.PathLike[str], *, repeatable: bool = False) -> Any:
        """All results as ``.npy`` files in a folder; goes on after an interruption.

        >>> import tempfile, torch
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from vmapsafe import over, per_sample_grad_norms
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        >>> _ = model(torch.randn(16, 4))
        >>> data = TensorDataset(torch.randn(10, 4), torch.randint(3, (10,)))
        >>> loader = DataLoader(data, batch_size=4)
        >>> norms = over(loader, per_sample_grad_norms, model, F.cross_entropy)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     norms.save(folder).shape  # folder/result.npy
        (10,)

        Args:
            path: of a folder, which is made. Called again with the folder of a run that
                was interrupted, it goes on after the last batch that is there; with one
                that is complete, it only loads.
            repeatable: says that ``loader`` gives the same batches in the same order
                each time, where that cannot be seen: with a sampler of one's own, or
                none. What is seen is a DataLoader that does not shuffle.

        Returns:
            A memory-mapped numpy array (N, ...), read-only, where a result is a tensor,
            N being the number of samples; a dict of such by name where it is a dict of
            tensors, as rows are: one file a parameter.

        Raises:
            ValueError: results that are not one row a sample, a loader without batches
                or of no known order; options whose results cannot go on; a folder that
                holds something else, or results of something else: what differs is
                said.
            ModuleNotFoundError: without numpy, which the extra ``[disk]`` brings.

        ``state.json`` in the folder holds what was asked: the function and the loss by
        name and, if they are the caller's own, by their code and the numbers and
        tensors they hold; the options, the layers' settings, digests of the model's
        parameters, buffers and flags and of the first batch, the number and size of
        batches. Batches that are finished are loaded again and compared where that
        costs little: of tensors or lists, and of what is no DataLoader. Not compared
        are other batches but the first, what a function calls, and ``chunk_size``,
        which changes nothing outside "sync". Rows that are finished are read again, and
        must have the checksum they had. Every second or so the files are on the
        disk and valid ``.npy`` files of what is finished; a run that is killed loses
        what came after that. A run that was interrupted gives the files, to the bit,
        that one without a stop gives, unless the loss or the data draw random numbers.
        bfloat16 is written as float32.
        """
        _check_numpy()
        self._check_saved(repeatable)
        with Folder(_SAVE, Path(path), self._description()) as folder:
            begun = folder.done
            batches = _Rest(self._loader, begun.batches, folder.complete)
            with _Progress(self._bar, self._length(), begun.batches) as done:
                for index, batch in batches:
                    parts = self._parts(batch)
                    leaves = tree_flatten(parts)[0]
                    if index == 0:
                        folder.check_data(_digest(leaves))
                    if index < begun.batches:
                        batches.passed(leaves)
                        continue
                    if index == begun.batches:
                        batches.check(folder)
                    taken = self._moved(parts)
                    rows = _rows_of(self._result(taken), taken)
                    folder.append(rows, _summed(leaves, folder.done.data))
                    done()
            if not batches.total and not begun.batches:
                raise VmapSafeValueError(
                    _SAVE,
                    "the loader gave no batch, so that the results have no shape",
                    "Give a loader with at least one",
                )
            if folder.done == begun:
                batches.check(folder)
            folder.complete = True
        arrays = folder.arrays()
        return arrays[_ALONE] if list(arrays) == [_ALONE] else arrays

    # -- A batch -----------------------------------------------------------------------

    def _parts(self, batch: Any) -> tuple[Any, ...]:
        """The inputs and the rest."""
        if isinstance(batch, Mapping):
            parts = self._by_keys(batch)
        elif self._keys is not None:
            raise VmapSafeTypeError(
                _OVER, f"keys= for a batch {_kind(batch)}", "Leave keys= out"
            )
        elif isinstance(batch, Tensor):
            parts = (batch,)
        elif isinstance(batch, (tuple, list)):
            parts = tuple(batch)
        else:
            raise VmapSafeTypeError(
                _OVER,
                f"the loader gave a batch {_kind(batch)}",
                "Let its collate_fn make a tensor, a tuple (inputs, targets, ...) "
                "or a dict",
            )
        if parts and isinstance(parts[0], list):  # what collate makes of tuples
            parts = (tuple(parts[0]), *parts[1:])
        return parts

    def _moved(self, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        """To where the model is."""
        device = device_of(self._model)

        def moved(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.to(device, non_blocking=True)
            return leaf

        return tuple(tree_map(moved, parts))

    def _by_keys(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        if self._keys is None:
            raise VmapSafeTypeError(
                _OVER,
                f"the loader gave a dict with the keys {list(batch)}",
                'Say what is what, e.g. keys=("image", "label")',
            )
        for key in [k for one in self._keys for k in _several(one)]:
            if key not in batch:
                raise VmapSafeValueError(
                    _OVER,
                    f"keys= names {key!r}, and the batch has {list(batch)}",
                    "Name those of the inputs and the targets",
                )
        return tuple(
            batch[key] if isinstance(key, str) else {k: batch[k] for k in key}
            for key in self._keys
        )

    def _result(self, batch: tuple[Any, ...]) -> Any:
        return self._function(self._model, self._loss_fn, *batch, **self._options)

    # -- For files ---------------------------------------------------------------------

    def _length(self) -> int | None:
        try:
            return len(self)
        except TypeError:
            return None

    def _check_saved(self, repeatable: bool) -> None:
        for option, value, why in (
            ("has_aux", True, "aux has no place in the files"),
            ("update_running_stats", True, "a model that changes cannot go on"),
            ("gather", "all", "a file of its own for each process is to be written"),
        ):
            if self._options.get(option) == value:
                raise VmapSafeValueError(
                    _SAVE, f"{option}={value!r}, and {why}", f"Leave {option} out"
                )
        if not repeatable and not _in_order(self._loader):
            raise VmapSafeValueError(
                _SAVE,
                "the loader's order is not known to be the same each time, and a "
                "run that was interrupted could not go on",
                "Give a DataLoader with shuffle=False, or say repeatable=True",
            )

    def _description(self) -> dict[str, Any]:
        """What is asked, for people and for comparison."""
        net = unwrapped(self._model)
        tensors = [*net.named_parameters(), *net.named_buffers()]
        written = self._function, self._loss_fn, *self._asked.values()
        flags = [(n, m.training) for n, m in net.named_modules()]
        flags += [(n, p.requires_grad) for n, p in net.named_parameters()]
        asked = {
            "function": _described(self._function),
            "loss_fn": _described(self._loss_fn),
            "model": type(net).__qualname__,
            "layers": _digest_of_text(_settings(net)),
            "parameters and buffers": _digest([part for nt in tensors for part in nt]),
            "training and requires_grad": _digest_of_text(repr(flags)),
            "precision": _precision(device_of(net)),
            "keys": None if self._keys is None else repr(self._keys),
            "batches": self._length(),
            "batch_size": getattr(self._loader, "batch_size", None),
            "samples": _number(getattr(self._loader, "dataset", None)),
            "code": _digest_of_text(repr([_written(value) for value in written])),
        }
        ignored = {"out"}
        mode = MODES.get(str(self._asked.get("mode")))
        if mode is None or not mode.merges:
            ignored.add("chunk_size")
        for name, value in self._asked.items():
            if name not in ignored:
                asked[name] = _described(value)
        return asked


_OVER, _SAVE = "over(...)", "over(...).save(...)"
_ALONE = "result"  # the name of a result that is a tensor


class _Progress:
    """A bar around a loop, or none."""

    def __init__(self, bar: Any, total: int | None, done: int) -> None:
        self._bar = bar and bar(total=total, initial=done, unit="batch")

    def __enter__(self) -> Callable[[], Any]:
        return self._bar.update if self._bar is not None else lambda: None

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _rows_of(result: Any, batch: Any) -> Mapping[str, Tensor]:
    """By name; checked to be one row a sample."""
    rows = {_ALONE: result} if isinstance(result, Tensor) else result
    size = _size(batch)
    if not isinstance(rows, Mapping) or not rows:
        found = f"{a_kind(result)}"
    elif wrong := [
        f"{name!r}: {tuple(row.shape) if isinstance(row, Tensor) else type(row)}"
        for name, row in rows.items()
        if not isinstance(row, Tensor) or row.dim() == 0 or len(row) != size
    ]:
        found = wrong[0]
    else:
        return rows
    raise VmapSafeValueError(
        _SAVE,
        f"for a batch of {size} the function gave {found}",
        "What can be saved is a tensor, or a dict of tensors, of one row a sample",
    )


def _size(batch: Any) -> int:
    return len(tree_flatten(batch)[0][0])


# -- Loaders ---------------------------------------------------------------------------


def _in_order(loader: Iterable[Any]) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.sampler, SequentialSampler)
        and (loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler)
    )


def _can_skip(loader: Iterable[Any]) -> bool:
    """Whether batches can be left out, and loading them costs something."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and not _in_memory(loader.dataset)
        and loader.batch_sampler is not None
    )


def _in_memory(data: Any) -> bool:
    if isinstance(data, Subset):
        return _in_memory(data.dataset)
    return isinstance(data, (TensorDataset, list, tuple))


class _Rest:
    """(index, batch) of a loader: the first and, unless the folder is complete, those
    that are not finished; others too where nothing is won by leaving them out.

    Attributes:
        total: the number of batches so far.
    """

    def __init__(self, loader: Any, finished: int, complete: bool) -> None:
        self._loader, self._finished, self._complete = loader, finished, complete
        self._skips = finished > 0 and _can_skip(loader)
        self._samples, self._data, self.total = 0, 0, 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        if self._skips:
            for i, batch in enumerate(_with(self._loader, _Indices(self._wanted))):
                yield (0 if i == 0 else self._finished + i - 1), batch
        else:
            for i, batch in enumerate(self._loader):
                self.total = i + 1
                yield i, batch

    def _wanted(self) -> Iterator[list[int]]:
        """The indices of the samples of each batch that is to be loaded."""
        for i, indices in enumerate(self._loader.batch_sampler):
            self.total = i + 1
            if i == 0 or (i >= self._finished and not self._complete):
                yield indices
            elif i < self._finished:
                self._samples += len(indices)

    def passed(self, leaves: list[Any]) -> None:
        """A batch that is finished was loaded."""
        self._samples += len(leaves[0])
        self._data = _summed(leaves, self._data)

    def check(self, folder: Folder) -> None:
        """Raise unless the finished batches are those of the folder."""
        done = folder.done
        if self.total < done.batches:
            found = f"{self.total} batches"
        elif self.total > done.batches and folder.complete:
            found = "more"
        elif self._samples != done.samples:
            found = f"{self._samples} samples in these"
        elif self._data != done.data and not self._skips:
            found = "other data in these"
        else:
            return
        folder.refuse(
            f"holds {done.samples} samples in {done.batches} batches, and the loader "
            f"gives {found}",
            "Give the same loader, or another path",
        )


class _Indices:
    """Begins anew at each iteration, as a sampler does."""

    def __init__(self, begin: Callable[[], Iterator[list[int]]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[list[int]]:
        return self._begin()


def _with(loader: Any, batches: Iterable[list[int]]) -> Iterable[Any]:
    """A loader of other batches."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


def _summed(leaves: Iterable[Any], before: int) -> int:
    """A checksum of a batch after others: of some of the numbers, if it is large."""
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat = leaf.detach().reshape(-1)
            some = flat[:: 1 + len(flat) // _MANY].cpu().contiguous()
            before = zlib.crc32(some.view(torch.uint8).numpy().data, before)
    return before


_MANY = 2**16


def _number(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


# -- What was asked --------------------------------------------------------------------


def _with_defaults(function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """The options with those not given, by name."""
    *positional, options = args
    try:
        signature = inspect.signature(function)
    except ValueError:
        return dict(options)
    try:
        bound = signature.bind_partial(*positional, **options)
    except TypeError as error:
        raise VmapSafeTypeError(
            _OVER, f"{_described(function)}: {error}", "See its arguments"
        ) from None
    bound.apply_defaults()
    found = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            if name not in bound.arguments:
                raise VmapSafeTypeError(
                    _OVER,
                    f"{_described(function)} needs {name}=",
                    f"Write over(..., {name}=...)",
                )
            found[name] = bound.arguments[name]
        elif parameter.kind is parameter.VAR_KEYWORD:
            found.update(bound.arguments.get(name, {}))
    return found


def _described(value: Any) -> str:
    """In words that are the same in another process."""
    if isinstance(value, functools.partial):
        given = [*value.args, *sorted(value.keywords.items())]
        return f"{_described(value.func)} with {[_described(v) for v in given]}"
    if isinstance(value, nn.Module):
        tensors = _digest([*value.state_dict().values()])
        return (
            f"{type(value).__qualname__} {_digest_of_text(_settings(value))} {tensors}"
        )
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{_public_home(value)}.{name}"
    if isinstance(value, Tensor):
        return _digest([value])
    if isinstance(value, Mapping):
        return repr({str(k): _described(v) for k, v in sorted(value.items())})
    if isinstance(value, Collection) and not isinstance(value, str):
        return repr(sorted([_described(v) for v in value]))
    return repr(value)


def _public_home(value: Any) -> str:
    """The module that a user imports it from."""
    module = str(getattr(value, "__module__", ""))
    return "vmapsafe" if module.startswith("vmapsafe._") else module


def _written(value: Any) -> str:
    """What a function of the user's does, as far as its own code and what it holds
    says; those of a library are known by their name."""
    if isinstance(value, functools.partial):
        return _written(value.func)
    if inspect.ismethod(value):
        return _written(value.__func__) + _written(value.__self__)
    module = str(getattr(value, "__module__", ""))
    if module.partition(".")[0] in ("torch", "vmapsafe", "builtins"):
        return ""
    if inspect.isfunction(value):
        cells = zip(value.__code__.co_freevars, value.__closure__ or ())
        held = {name: _contents(cell) for name, cell in cells}
        given = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        held |= {f"default {i}": default for i, default in enumerate(given)}
        return f"{_code(value.__code__)}{_plain(held)}"
    if callable(value) and not isinstance(value, (type, nn.Module)):
        call = getattr(type(value), "__call__")  # noqa: B004
        return _written(call) + _plain(getattr(value, "__dict__", {}))
    return ""


def _code(code: Any) -> list[Any]:
    constants = [_code(c) if hasattr(c, "co_code") else c for c in code.co_consts]
    # Of ``x in {...}``, which has no order.
    constants = [
        sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in constants
    ]
    return [code.co_code.hex(), code.co_names, constants]


def _plain(values: Mapping[str, Any]) -> str:
    """Those that are numbers, texts and the like, or functions and tensors."""
    kinds = (bool, int, float, complex, str, bytes, type(None), torch.dtype, Tensor)
    found = {
        name: _described(value) + _written(value)
        for name, value in sorted(values.items())
        if isinstance(value, kinds) or inspect.isfunction(value)
    }
    return f" {found}" if found else ""


def _settings(net: nn.Module) -> str:
    """What a network is but for its tensors, flags and code."""
    said = [
        f"{path} {type(module).__qualname__} {module.extra_repr()} "
        + _plain({k: v for k, v in vars(module).items() if k != "training"})
        for path, module in net.named_modules(remove_duplicate=False)
    ]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(said))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _precision(device: torch.device) -> str:
    """The dtypes that operations compute in by themselves."""
    said = str(torch.get_default_dtype())
    if torch.is_autocast_enabled(device.type):
        said += f", autocast to {torch.get_autocast_dtype(device.type)}"
    return said


def _digest(values: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for value in values:
        if not isinstance(value, Tensor):
            found.update(repr(value).encode())
        elif not is_lazy(value):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- Checks ----------------------------------------------------------------------------


def _check_arguments(loader: Any, function: Any, model: Any, loss_fn: Any) -> None:
    if isinstance(loader, (Dataset, Tensor)) or not isinstance(loader, Iterable):
        raise VmapSafeTypeError(
            _OVER,
            f"the loader is {a_kind(loader)}",
            "Give batches, e.g. DataLoader(dataset, batch_size=64)",
        )
    for what, given in (("function", function), ("loss_fn", loss_fn)):
        if not callable(given) or (what == "function" and isinstance(given, nn.Module)):
            raise VmapSafeTypeError(
                _OVER,
                f"{what} is {a_kind(given)}",
                "Write over(loader, per_sample_grads, model, loss_fn)",
            )
    if not isinstance(model, nn.Module):
        raise VmapSafeTypeError(
            _OVER,
            f"model is {a_kind(model)}, not an nn.Module",
            "Write over(loader, per_sample_grads, model, loss_fn)",
        )


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise MissingExtraError(
            f"{_OVER} with progress=True",
            "tqdm cannot be imported here",
            'pip install "vmapsafe[progress]"',
        ) from None
    return tqdm


def _check_numpy() -> None:
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            _SAVE,
            "numpy cannot be imported here",
            'pip install "vmapsafe[disk]"',
        ) from None


def _several(key: str | Sequence[Any]) -> Sequence[Any]:
    return [key] if isinstance(key, str) else key


def _kind(batch: Any) -> str:
    return f"that is {a_kind(batch)}"
