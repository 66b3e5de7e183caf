"""A whole data set: one result for each batch of a DataLoader, or files of all.

``over(loader, function, model, loss_fn)`` reads like ``map(function, loader)``. It
takes any function of the form ``function(model, loss_fn, *batch, **options)``: rows,
norms, sketches, clipped sums, or a user's own. A method ``per_sample_grads.over`` would
have to exist once for each of them. What ``over`` returns is not a list: it can be
iterated over as often as one likes, as a loader can, so that ``for``, ``zip``,
``enumerate`` and ``break`` do what they do with the loader. No block is open between
two results: whoever stops half-way has the model as it was.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from torch import Tensor, nn
from torch.utils.data import Dataset, DistributedSampler

from vmapsafe._block.models import device_of, process_group
from vmapsafe._data.batches import Keys, moved, parts_of, several, size_of
from vmapsafe._data.fingerprint import fingerprint, number_of, with_defaults
from vmapsafe._data.npy import Array
from vmapsafe._data.rest import Batch, in_order
from vmapsafe._data.saving import Job, save_alone, save_together
from vmapsafe._draws import Draws, begin_draws
from vmapsafe._errors import (
    MissingExtraError,
    VmapSafeTypeError,
    VmapSafeValueError,
    a_kind,
)
from vmapsafe._modes import MODES
from vmapsafe._processes import Process, agreed, this_process
from vmapsafe.quantities.protocol import Paired, Quantity, Reduces

Result = TypeVar("Result", covariant=True)


def over(
    loader: Iterable[object],
    function: Callable[..., Result],
    model: nn.Module,
    loss_fn: Callable[..., object],
    *,
    keys: Keys | None = None,
    progress: bool = False,
    **options: object,
) -> Over[Result]:
    """Call ``function(model, loss_fn, *batch, **options)`` for every batch of a loader.

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
        loader: a DataLoader, or another iterable of batches.
        function: :func:`per_sample`, :func:`per_sample_grads`,
            :func:`per_sample_grad_norms`, :func:`per_sample_sketch`, or another
            function that takes the same.
        model: the network, any module; the first argument of ``function``.
        loss_fn: ``loss_fn(output, ...)`` with what a batch holds after the inputs; the
            second argument of ``function``.
        keys: how a batch that is a dict is taken apart: the key of the inputs, then
            those of what ``loss_fn`` takes after the output. Several keys in one place,
            ``keys=(("input_ids", "attention_mask"), "labels")``, make a dict, which the
            model takes as keyword arguments.
        progress: whether to show a bar by tqdm, which the extra ``[progress]`` brings.
        **options: the options of ``function``.

    Returns:
        An iterable that gives one result for each batch in every ``for`` loop, on the
        device of the model. Its ``len`` is the loader's. Its method ``save`` writes all
        results to files.

    Raises:
        VmapSafeTypeError: ``loader``, ``function``, ``loss_fn`` or ``model`` is
            something else, or ``function`` has no such option; in the loop, a batch
            cannot be taken apart.
        VmapSafeValueError: in the loop, a batch lacks one of the keys.
        MissingExtraError: ``progress=True`` without tqdm.

    A batch is a tensor, the inputs alone; or a tuple or list, the inputs and what
    ``loss_fn`` takes after the output, where a list of inputs is positional arguments
    of the model; or a dict, with ``keys``. Its tensors are moved to the device of the
    model's first parameter. Each batch is a call of its own, so that in "sync" it has
    statistics of its own. In a loop nothing is gathered from other processes: each goes
    over its own loader. With ``gather="all"`` among the options all loaders must have
    the same number of batches. ``save`` is for all processes together.
    """
    return Over(loader, function, model, loss_fn, keys, progress, options)


class Over(Generic[Result]):
    """What :func:`over` returns: the results, one for each batch."""

    def __init__(
        self,
        loader: Iterable[object],
        function: Callable[..., Result],
        model: nn.Module,
        loss_fn: Callable[..., object],
        keys: Keys | None,
        progress: bool,
        options: Mapping[str, object],
    ) -> None:
        self._loader, self._function, self._model = loader, function, model
        self._loss_fn, self._options = loss_fn, dict(options)
        self._keys = None if keys is None else several(keys)
        _check_arguments(loader, function, model, loss_fn)
        self._asked = with_defaults(function, (model, loss_fn), self._options)
        self._bar = _tqdm() if progress else None

    def __len__(self) -> int:
        """The number of batches, if the loader knows it."""
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Result]:
        """Begin the loader anew."""
        with self._progress(0, Process()) as show:
            for finished, batch in enumerate(self._loader, 1):
                result = self._result(self._moved(parts_of(batch, self._keys)))
                show(finished)
                yield result

    @overload
    def save(
        self: Over[Tensor],
        path: str | os.PathLike[str],
        *,
        repeatable: bool = False,
        seed: int | None = None,
    ) -> Array: ...

    @overload
    def save(
        self: Over[Mapping[str, Tensor]],
        path: str | os.PathLike[str],
        *,
        repeatable: bool = False,
        seed: int | None = None,
    ) -> dict[str, Array]: ...

    @overload
    def save(
        self,
        path: str | os.PathLike[str],
        *,
        repeatable: bool = False,
        seed: int | None = None,
    ) -> Array | dict[str, Array]: ...

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        repeatable: bool = False,
        seed: int | None = None,
    ) -> Array | dict[str, Array]:
        """Write all results as ``.npy`` files to a folder; continue an interrupted run.

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
            path: the path of a folder, which is created if missing. With the folder of
                a run that was interrupted, ``save`` continues after the last batch in
                it; with a complete one, it only loads the files.
            repeatable: whether you promise that ``loader`` gives the same batches in
                the same order each time. Without a promise that is only known of a
                DataLoader without shuffling and without a sampler of your own.
            seed: a number from which each batch draws its random numbers, whichever
                process computes it; the generators of torch, Python and numpy are then
                put back. What ``loader`` draws does not follow from it.

        Returns:
            A memory-mapped numpy array (N, ...), read-only, where N is the number of
            samples, if a result is a tensor; a dict of such arrays by name, one file
            each, if a result is a dict of tensors, as rows are.

        Raises:
            VmapSafeValueError: results that are not one row a sample; a loader without
                batches, or of no known order; options whose results cannot be
                continued; a folder that holds something else, or results of something
                else. The error says what differs. With several processes also: random
                draws without ``seed``.
            VmapSafeTypeError: ``seed`` is not an int.
            VmapSafeRuntimeError: another process failed.
            OSError: the disk is full, or fails. The folder stays right.
            MissingExtraError: numpy is missing, which the extra ``[disk]`` brings.

        ``state.json`` in the folder holds what was asked: the function and the loss by
        name and, if they are the user's own, by their code and the numbers, tensors,
        arrays and tuples that they hold; the options, the layers' settings, the number
        and size of batches, and digests of the model's parameters, buffers and flags
        and of the first batch. Finished batches are loaded again and compared if that
        costs little: if they come from tensors or lists, or if the loader is not a
        DataLoader. ``save`` does not compare other batches but the first, what a
        function calls, reads of its module or keeps in a list or dict, and
        ``chunk_size``, which changes nothing outside "sync". It reads finished rows
        again; their checksum must be what it was. Every second or so the files on the
        disk are valid ``.npy`` files of what is finished, and a run that is killed
        loses what came after that. A continued run gives bit-identical files, unless
        the data draw random numbers, or the model or the loss without ``seed``.
        bfloat16 is written as float32.

        If torch.distributed has a process group of several processes, all of them call
        ``save`` with the same arguments, and each with the loader of the whole data
        set. Each computes the next batch that nobody has taken, and none waits for
        another one before the end. They write to one folder, on a disk that they share.
        It becomes the folder that one process would write, to the byte, if each process
        has as many threads as that one. Any of them may be killed; a later run with any
        number of processes continues. Until it is complete the ``.npy`` files show only
        what was finished without a gap before. A loader that has no indices of samples,
        as one of an IterableDataset, is read in full by each process. Processes whose
        loaders give another number, order or first one of batches, or whose models
        differ, are refused.
        """
        _check_numpy()
        process = this_process()

        def prepare() -> Job:
            self._check_saved(repeatable, seed, process)
            asked = fingerprint(
                self._loader,
                self._function,
                self._model,
                self._loss_fn,
                self._keys,
                self._asked,
            )
            if seed is not None:
                asked["draws from"] = seed
            return Job(
                _SAVE,
                Path(path),
                asked,
                self._loader,
                self._keys,
                lambda batch: self._rows(batch, seed, process),
                lambda finished: self._progress(finished, process),
            )

        if process.world == 1:
            arrays = save_alone(prepare())
        else:
            device = device_of(self._model)
            job = agreed(_SAVE, device, prepare)
            arrays = save_together(job, process, device)
        return arrays[_ALONE] if list(arrays) == [_ALONE] else arrays

    def _rows(
        self, batch: Batch, seed: int | None, process: Process
    ) -> Mapping[str, Tensor]:
        """The rows of a batch by name, from draws that do not depend on others."""
        parts = self._moved(batch.parts)
        if seed is None and process.world == 1:
            return _rows_of(self._result(parts), size_of(parts))
        draws = Draws("different", of_host=True)
        if seed is None:
            rows = _rows_of(self._result(parts), size_of(parts))
            if draws.moved():
                raise VmapSafeValueError(
                    _SAVE,
                    f"the function draws random numbers, and {process.world} "
                    "processes would draw other ones than one process",
                    "Write save(..., seed=0), from which each batch draws its own",
                )
            return rows
        try:
            begin_draws(f"{seed} {batch.number}")
            return _rows_of(self._result(parts), size_of(parts))
        finally:
            draws.put_back()

    def _result(self, batch: tuple[object, ...]) -> Result:
        return self._function(self._model, self._loss_fn, *batch, **self._options)

    def _moved(self, parts: tuple[object, ...]) -> tuple[object, ...]:
        return moved(parts, device_of(self._model))

    @contextlib.contextmanager
    def _progress(
        self, finished: int, process: Process
    ) -> Iterator[Callable[[int], object]]:
        """A bar around a loop, if there is to be one; gives what to call with the
        number of batches finished. Of several processes the first one shows it."""
        if self._bar is None or process.rank:
            yield lambda finished: None
            return
        total = number_of(self._loader)
        with self._bar(total=total, initial=finished, unit="batch") as bar:
            yield lambda finished: bar.update(finished - bar.n)

    def _check_saved(self, repeatable: bool, seed: object, process: Process) -> None:
        if seed is not None and not isinstance(seed, int):
            raise VmapSafeTypeError(
                _SAVE, f"seed is {a_kind(seed)}", "Give an int, or leave seed out"
            )
        for option, value, why in (
            ("has_aux", True, "the files do not hold aux"),
            (
                "update_running_stats",
                True,
                "a run that changes the model could not be continued",
            ),
            ("gather", "all", "each process writes files of its own"),
        ):
            if self._options.get(option) == value:
                raise VmapSafeValueError(
                    _SAVE, f"{option}={value!r}, and {why}", f"Leave {option} out"
                )
        want = self._options.get("want")
        for one in want.values() if isinstance(want, Mapping) else [want]:
            _check_quantity(one)
        if process.world > 1:
            self._check_shared(process)
        if not repeatable and not in_order(self._loader):
            raise VmapSafeValueError(
                _SAVE,
                "the loader's order is not known to be the same each time, so that an "
                "interrupted run could not be continued",
                "Give a DataLoader with shuffle=False, or say repeatable=True",
            )

    def _check_shared(self, process: Process) -> None:
        """Raise where the processes that deal the batches would wait for another or
        leave batches out."""
        loader: Any = self._loader
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            raise VmapSafeValueError(
                _SAVE,
                "the loader has a DistributedSampler, and save deals the batches of "
                f"the whole data set to the {process.world} processes itself",
                "Give a loader without a sampler",
            )
        mode = MODES.get(str(self._asked.get("mode")))
        if mode is None or not mode.merges:
            return
        for path, module in self._model.named_modules():
            if process_group(module) is not None:
                raise VmapSafeValueError(
                    _SAVE,
                    f"in mode {mode.name!r} {path!r}, a SyncBatchNorm, takes "
                    "statistics of a batch of each process, and here each has "
                    "batches of its own",
                    "Make it a BatchNorm, or give it a process_group of one process",
                )


_OVER, _SAVE = "over(...)", "over(...).save(...)"
_ALONE = "result"  # the name of a result that is a tensor


def _check_quantity(wanted: object) -> None:
    """Raise where a quantity of a batch is not one of each sample."""
    if isinstance(wanted, Reduces):
        found = "adds up the samples of a batch, and files hold a row for each sample"
        do = "Add the results up in a loop over the batches, for found in over(...)"
    elif isinstance(wanted, Paired) and wanted.other is None:
        found = "pairs the samples of one batch alone, and not those of all batches"
        do = "Give the others, other=(x, y), or save sketches and multiply those"
    elif isinstance(wanted, Quantity) and wanted.across()[1] == "all":
        found = f"has {wanted.across()[0]}='all', and each process writes its own files"
        do = "Leave it out"
    else:
        return
    raise VmapSafeValueError(_SAVE, f"{type(wanted).__name__} {found}", do)


def _rows_of(result: object, size: int) -> Mapping[str, Tensor]:
    """The result for a batch of that size by name, checked to be one row a sample."""
    rows: object = {_ALONE: result} if isinstance(result, Tensor) else result
    if isinstance(rows, Mapping):  # of several quantities, some with names of their own
        named = [
            (f"{key}.{name}" if name else key, row)
            for key, value in rows.items()
            for name, row in (
                value.items() if isinstance(value, Mapping) else [("", value)]
            )
        ]
        if not isinstance(result, Tensor):
            _check_names([name for name, _ in named])
        rows = dict(named)
    if not isinstance(rows, Mapping) or not rows:
        found = a_kind(result)
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
        "Give a function that returns a tensor, or a dict of tensors, of one row a "
        "sample",
    )


def _check_names(names: list[str]) -> None:
    """Raise unless each result in a dict has a file of its own."""
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        found = f"two results have the name {twice!r}"
    elif names == [_ALONE]:
        found = f"a dict holds {_ALONE!r} alone, the name of a result that is a tensor"
    else:
        return
    raise VmapSafeValueError(_SAVE, found, "Give it another name")


def _check_arguments(
    loader: object, function: object, model: object, loss_fn: object
) -> None:
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


def _tqdm() -> Callable[..., Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        raise MissingExtraError(
            f"{_OVER} with progress=True",
            "tqdm cannot be imported here",
            "Run pip install tqdm",
        ) from None
    return tqdm  # type: ignore[no-any-return]


def _check_numpy() -> None:
    try:
        import numpy.random  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            _SAVE,
            "numpy cannot be imported here",
            "Run pip install numpy",
        ) from None
