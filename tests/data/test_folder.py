"""Folders of ``over(...).save``: after any damage a folder is right or refused."""

import json
import os
import sys

import numpy
import pytest
import slow
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from vmapsafe import over, per_sample_grads
from vmapsafe._data import folder as files

# Python 3.12 on, where anything has left a thread; tqdm does.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

N = 22
X = torch.randn(N, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(N) % 3


def make(activation=nn.Tanh, eps=1e-5, **settings):
    """Rows of 28 kB for each batch, more than Python keeps in a buffer."""
    torch.manual_seed(0)
    layers = nn.Linear(30, 28), nn.LayerNorm(28, eps=eps), activation()
    model = nn.Sequential(*layers, nn.Linear(28, 3)).double()
    for name, value in settings.items():
        setattr(model, name, value)
    return model


def expected(model=None):
    """A loop of plain backward passes."""
    model = model or make()
    rows = slow.rows(model, F.cross_entropy, X, Y)
    return {name: row.numpy() for name, row in rows.items()}


class Loaded(Dataset):
    """A data set that does not seem to be in memory."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Stream(IterableDataset):
    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __iter__(self):
        return zip(self.x, self.y)


LOADERS = {
    "tensors": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=4),
    "data set": lambda x, y: DataLoader(Loaded(x, y), batch_size=4),
    "part": lambda x, y: DataLoader(
        Subset(TensorDataset(x, y), range(len(x))), batch_size=4
    ),
    "samples": lambda x, y: DataLoader(list(zip(x, y)), batch_size=4),
    "stream": lambda x, y: DataLoader(Stream(x, y), batch_size=4),
    "batches": lambda x, y: list(zip(x.split(4), y.split(4))),
}


class Stops(Exception):
    pass


def saved(folder, loader=None, model=None, loss=F.cross_entropy, stop=None, end=None):
    """A function that calls ``end`` in batch number ``stop``, or raises."""
    calls = []

    def function(model, loss_fn, *batch):
        if len(calls) == stop:
            end() if end else None
            raise Stops
        calls.append(1)
        return per_sample_grads(model, loss_fn, *batch)

    function.__module__ = "vmapsafe"  # a function of a library, known by its name
    loader = LOADERS["data set"](X, Y) if loader is None else loader
    results = over(loader, function, model or make(), loss)
    return results.save(folder, repeatable=True)


def begun(folder, complete, **options):
    if complete:
        saved(folder, **options)
    else:
        with pytest.raises(Stops):
            saved(folder, **options, stop=3)


def assert_right(found):
    want = expected()
    assert found.keys() == want.keys()
    for name, rows in want.items():
        assert found[name].shape == rows.shape
        numpy.testing.assert_allclose(found[name], rows, rtol=1e-9, atol=1e-12)


def refused(folder, *words, **options):
    """The error is ours, and the folder is not touched."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError) as caught:
        saved(folder, **options)
    assert all(word in str(caught.value) for word in (str(folder), *words))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# -- Ends ------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seconds,batches", [(0, "data set"), (1, "tensors")])
def test_killed_several_times(tmp_path, monkeypatch, seconds, batches):
    """Rows that a killed run wrote after its last checkpoint are not kept. A checkpoint
    comes after each batch, or only after the first."""
    monkeypatch.setattr(files, "_SECONDS", seconds)
    for stop in (5, 2, 1, 3, 0, 1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                end = lambda: os._exit(9)  # noqa: E731
                saved(tmp_path, LOADERS[batches](X, Y), stop=stop, end=end)
                code = 0
            finally:
                os._exit(code)
        assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) in (0, 9)
    assert_right(saved(tmp_path, LOADERS[batches](X, Y)))


class Interrupt(KeyboardInterrupt):
    pass


def interrupted(function, at, file):
    """Call it with an interrupt at a line of ``file``; return whether there was one."""
    left = at

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != file:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_at_any_line(tmp_path, monkeypatch):
    """Batches and samples are counted together."""
    monkeypatch.setattr(files, "_SECONDS", 0)
    monkeypatch.setattr(files, "_TIMES", 0)
    monkeypatch.setattr(os, "fsync", lambda number: None)  # slow
    results = over(LOADERS["data set"](X, Y), quick, make(), F.cross_entropy)
    at = 0
    while True:
        at += 11
        folder = tmp_path / str(at)
        if not interrupted(lambda: results.save(folder), at, files.__file__):
            break
        found = results.save(folder)
        assert numpy.array_equal(found["x"], X.numpy()), at
        assert numpy.array_equal(found["y"], Y.numpy()), at
    assert at > 300


def quick(model, loss_fn, x, y):
    return {"x": x, "y": y}


# -- Damages ---------------------------------------------------------------------------


def change(file, place, data):
    with open(file, "r+b") as opened:
        opened.seek(place)
        opened.write(data)


def without_a_key(file):
    state = json.loads(file.read_text())
    del state["files"]
    file.write_text(json.dumps(state))


def of_other_types(file):
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "batches": "3"}))


ROWS, STATE = "0.weight.npy", "state.json"
DAMAGES = {
    "no rows": (ROWS, os.remove),
    "empty": (ROWS, lambda file: os.truncate(file, 0)),
    "only a header": (ROWS, lambda file: os.truncate(file, 128)),
    "a row cut off": (ROWS, lambda file: os.truncate(file, 128 + 11 * 28 * 30 * 8)),
    "another file": (ROWS, lambda file: file.write_bytes(b"garbage" * 99999)),
    "a changed number": (ROWS, lambda file: change(file, 999, b"\xff\x00\xfe")),
    "another dtype": (ROWS, lambda file: change(file, 21, b"<i8")),
    "another magic": (ROWS, lambda file: change(file, 1, b"PMUNY")),
    "fewer rows": (
        ROWS,
        lambda file: numpy.save(file, numpy.load(file)[:-9]),
    ),
    "no state": (STATE, os.remove),
    "an empty state": (STATE, lambda file: os.truncate(file, 0)),
    "half a state": (STATE, lambda file: os.truncate(file, 300)),
    "a list as state": (STATE, lambda file: file.write_text("[1, 2]")),
    "no text as state": (STATE, lambda file: file.write_bytes(b"\xff\xfe\x00" * 99)),
    "a key less": (STATE, without_a_key),
    "other types": (STATE, of_other_types),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("complete", [False, True])
def test_damages(tmp_path, name, complete):
    begun(tmp_path, complete)
    file, damage = DAMAGES[name]
    damage(tmp_path / file)
    refused(tmp_path, file)


# -- Other arguments -------------------------------------------------------------------


@pytest.mark.parametrize("batches", LOADERS)
@pytest.mark.parametrize("complete", [False, True])
def test_other_data(tmp_path, batches, complete):
    """Data of another size are refused, and so are other numbers after the first batch
    if they are loaded or cost nothing to load."""
    begun(tmp_path, complete, loader=LOADERS[batches](X, Y))
    fewer, more = slice(0, N - 1), [*range(N), 0]
    for part in (fewer, more):
        if complete or batches not in ("stream", "batches"):
            refused(tmp_path, loader=LOADERS[batches](X[part], Y[part]))
    other = X.clone()
    other[9] += 1
    if batches != "data set":
        refused(tmp_path, loader=LOADERS[batches](other, Y))
    refused(tmp_path, loader=LOADERS[batches](X.float(), Y))
    refused(tmp_path, loader=LOADERS[batches](X[:4], Y[:4]))
    assert_right(saved(tmp_path, LOADERS[batches](X, Y)))


class Batches:
    """Indices of samples, of which nobody knows how many there are."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __iter__(self):
        samples = iter(range(N))
        return iter([[next(samples) for _ in range(size)] for size in self.sizes])


@pytest.mark.parametrize("complete", [False, True])
def test_other_numbers(tmp_path, complete):
    """Of batches, and of samples in them, where data are not loaded again."""

    def loader(*sizes):
        return DataLoader(Loaded(), batch_sampler=Batches(*sizes))

    begun(tmp_path, complete, loader=loader(4, 4, 4, 4))
    text = f"{15 if complete else 11} samples in these"
    refused(tmp_path, text, loader=loader(4, 3, 4, 4))
    refused(tmp_path, "the loader gives 2 batches", loader=loader(4, 4))
    if complete:
        refused(tmp_path, "the loader gives more", loader=loader(4, 4, 4, 4, 1))
    assert len(saved(tmp_path, loader(4, 4, 4, 4))["3.bias"]) == 16


def scaled(scale):
    return lambda output, target: scale * F.cross_entropy(output, target)


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, output, target):
        return self.scale * F.cross_entropy(output, target)

    def loss(self, output, target):
        return self(output, target)


LOSSES = {
    "what it holds": (scaled(1.0), scaled(2.0)),
    "its code": (lambda o, y: F.cross_entropy(o, y), lambda o, y: F.nll_loss(o, y)),
    "a default": (
        lambda o, y, scale=1: scale * F.cross_entropy(o, y),
        lambda o, y, scale=2: scale * F.cross_entropy(o, y),
    ),
    "an object": (Scaled(1), Scaled(2)),
    "a method": (Scaled(1).loss, Scaled(2).loss),
    "a module": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "a module's tensor": (
        nn.CrossEntropyLoss(torch.ones(3).double()),
        nn.CrossEntropyLoss(torch.arange(3.0).double()),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("complete", [False, True])
def test_another_loss(tmp_path, name, complete):
    one, other = LOSSES[name]
    begun(tmp_path, complete, loss=one)
    refused(tmp_path, "was begun with something else", loss=other)
    assert len(saved(tmp_path, loss=one)["3.bias"]) == N


MODELS = {
    "activation": {"activation": nn.ReLU},
    "eps": {"eps": 1e-3},
    "attribute": {"temperature": 2.0},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("complete", [False, True])
def test_another_model_with_the_same_parameters(tmp_path, name, complete):
    begun(tmp_path, complete, model=make(temperature=1.0))
    settings = {"temperature": 1.0, **MODELS[name]}
    refused(tmp_path, "layers was", model=make(**settings))


def test_another_precision(tmp_path):
    begun(tmp_path, True)
    with torch.autocast("cpu", torch.bfloat16):
        refused(tmp_path, "precision was 'torch.float32' and is 'torch.float32, autoc")
