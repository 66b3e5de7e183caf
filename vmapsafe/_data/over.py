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
from torch.utils.data import Dataset

from vmapsafe._block.models import device_of
from vmapsafe._data.batches import Keys, moved, parts_of, several, size_of
from vmapsafe._data.fingerprint import digest, fingerprint, number_of, with_defaults
from vmapsafe._data.folder import Array, Folder
from vmapsafe._data.rest import Rest, in_order, summed
from vmapsafe._errors import (
    MissingExtraError,
    VmapSafeTypeError,
    VmapSafeValueError,
    a_kind,
)
from vmapsafe._torch import tree_flatten
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
    statistics of its own. Nothing is gathered from other processes: each goes over its
    own loader. With ``gather="all"`` among the options all loaders must have the same
    number of batches.
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
        with self._progress(0) as done:
            for batch in self._loader:
                result = self._result(self._moved(parts_of(batch, self._keys)))
                done()
                yield result

    @overload
    def save(
        self: Over[Tensor], path: str | os.PathLike[str], *, repeatable: bool = False
    ) -> Array: ...

    @overload
    def save(
        self: Over[Mapping[str, Tensor]],
        path: str | os.PathLike[str],
        *,
        repeatable: bool = False,
    ) -> dict[str, Array]: ...

    @overload
    def save(
        self, path: str | os.PathLike[str], *, repeatable: bool = False
    ) -> Array | dict[str, Array]: ...

    def save(
        self, path: str | os.PathLike[str], *, repeatable: bool = False
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

        Returns:
            A memory-mapped numpy array (N, ...), read-only, where N is the number of
            samples, if a result is a tensor; a dict of such arrays by name, one file
            each, if a result is a dict of tensors, as rows are.

        Raises:
            VmapSafeValueError: results that are not one row a sample; a loader without
                batches, or of no known order; options whose results cannot be
                continued; a folder that holds something else, or results of something
                else. The error says what differs.
            MissingExtraError: numpy is missing, which the extra ``[disk]`` brings.

        ``state.json`` in the folder holds what was asked: the function and the loss by
        name and, if they are the user's own, by their code and the numbers and tensors
        they hold; the options, the layers' settings, the number and size of batches,
        and digests of the model's parameters, buffers and flags and of the first batch.
        Finished batches are loaded again and compared if that costs little: if they
        come from tensors or lists, or if the loader is not a DataLoader. ``save`` does
        not compare other batches but the first, what a function calls, and
        ``chunk_size``, which changes nothing outside "sync". It reads finished rows
        again; their checksum must be what it was. Every second or so the files on the
        disk are valid ``.npy`` files of what is finished, and a run that is killed
        loses what came after that. A continued run gives bit-identical files, unless
        the loss or the data draw random numbers. bfloat16 is written as float32.
        """
        _check_numpy()
        self._check_saved(repeatable)
        asked = fingerprint(
            self._loader,
            self._function,
            self._model,
            self._loss_fn,
            self._keys,
            self._asked,
        )
        with Folder(_SAVE, Path(path), asked) as folder:
            begun = folder.done
            batches = Rest(self._loader, begun.batches, folder.complete)
            with self._progress(begun.batches) as done:
                for index, batch in batches:
                    parts = parts_of(batch, self._keys)
                    leaves = tree_flatten(parts)[0]
                    if index == 0:
                        folder.check_data(digest(leaves))
                    if index < begun.batches:
                        batches.passed(leaves)
                        continue
                    if index == begun.batches:
                        batches.check(folder)
                    rows = _rows_of(self._result(self._moved(parts)), size_of(parts))
                    folder.append(rows, summed(leaves, folder.done.data))
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

    def _result(self, batch: tuple[object, ...]) -> Result:
        return self._function(self._model, self._loss_fn, *batch, **self._options)

    def _moved(self, parts: tuple[object, ...]) -> tuple[object, ...]:
        return moved(parts, device_of(self._model))

    @contextlib.contextmanager
    def _progress(self, finished: int) -> Iterator[Callable[[], object]]:
        """A bar around a loop, if there is to be one; gives what to call a batch."""
        if self._bar is None:
            yield lambda: None
            return
        total = number_of(self._loader)
        with self._bar(total=total, initial=finished, unit="batch") as bar:
            yield bar.update

    def _check_saved(self, repeatable: bool) -> None:
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
        if not repeatable and not in_order(self._loader):
            raise VmapSafeValueError(
                _SAVE,
                "the loader's order is not known to be the same each time, so that an "
                "interrupted run could not be continued",
                "Give a DataLoader with shuffle=False, or say repeatable=True",
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
        rows = {
            f"{key}.{name}" if name else key: row
            for key, value in rows.items()
            for name, row in (
                value.items() if isinstance(value, Mapping) else [("", value)]
            )
        }
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
            'pip install "vmapsafe[progress]"',
        ) from None
    return tqdm  # type: ignore[no-any-return]


def _check_numpy() -> None:
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            _SAVE,
            "numpy cannot be imported here",
            'pip install "vmapsafe[disk]"',
        ) from None
