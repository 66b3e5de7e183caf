"""A whole data set: results equal those of calls, and files those of one run."""

import builtins
import functools
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy
import pytest
import small_data
import torch
import torch.nn.functional as F
from devices import RunsOut
from nets import small_mlp
from small_data import Stops, X, Y
from state import assert_same_state, everything
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from vmapsafe import (
    clipped_grad_sum,
    over,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
)
from vmapsafe import quantities as q
from vmapsafe._data import folder as files
from vmapsafe._data import npy
from vmapsafe.testing import assert_same

# Python 3.12 on, where anything has left a thread; tqdm does.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

PAIRS = list(zip(X.split(4), Y.split(4)))


@pytest.fixture
def mlp():
    return small_mlp()


def loader(**options):
    return DataLoader(TensorDataset(X, Y), **{"batch_size": 4, **options})


def norms_over(batches, model, **options):
    return over(batches, per_sample_grad_norms, model, F.cross_entropy, **options)


# -- One result a batch ----------------------------------------------------------------

FUNCTIONS = {
    "rows": (per_sample_grads, {}),
    "norms": (per_sample_grad_norms, {"per_parameter": True}),
    "norms in sync": (per_sample_grad_norms, {"mode": "sync"}),
    "sketches": (per_sample_sketch, {"k": 6, "chunk_size": 3}),
    "partial": (functools.partial(per_sample_sketch, k=6), {}),
    "clipped": (clipped_grad_sum, {"max_grad_norm": 1.0}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_batch_is_a_call(mlp, name):
    """The last batch is short; the loop can be repeated; the model is left alone."""
    function, options = FUNCTIONS[name]
    before = everything(mlp)
    results = over(loader(), function, mlp, F.cross_entropy, **options)
    assert len(results) == 3
    for _ in range(2):
        found = list(results)
        expected = [function(mlp, F.cross_entropy, *pair, **options) for pair in PAIRS]
        assert_same(found, expected)
    assert_same_state(mlp, before)


def energy(output):
    return output.square().sum()


Pair = namedtuple("Pair", "image label")
# What the loader gives for two tensors, and how it is taken apart.
BATCHES = {
    "tuple": (lambda x, y: (x, y), None),
    "list": (lambda x, y: [x, y], None),
    "named tuple": (Pair, None),
    "dict": (lambda x, y: {"label": y, "id": "a", "image": x}, ("image", "label")),
    "dict, a dict of inputs": (
        lambda x, y: {"label": y, "input": x},
        (("input",), "label"),
    ),
    "inputs in a list": (lambda x, y: [[x], y], None),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_are_taken_apart(mlp, name):
    kind, keys = BATCHES[name]
    found = list(norms_over([kind(*p) for p in PAIRS], mlp, keys=keys))
    assert_same(torch.cat(found), per_sample_grad_norms(mlp, F.cross_entropy, X, Y))


@pytest.mark.parametrize("keys", [None, "image"])
def test_inputs_alone(mlp, keys):
    """A batch is a tensor, or has one key, and the loss takes the output alone."""
    batches = [{"image": x} if keys else x for x, _ in PAIRS]
    found = list(over(batches, per_sample_grad_norms, mlp, energy, keys=keys))
    assert_same(torch.cat(found), per_sample_grad_norms(mlp, energy, X))


class TwoInputs(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, a, b):
        return super().forward(a - 2 * b)


def test_what_collate_makes_of_pairs_of_inputs():
    """Samples ((a, b), y) come as [[a, b], y]: two arguments of the model."""
    model = TwoInputs().double()
    samples = [((x, x.flip(0)), y) for x, y in zip(X, Y)]
    found = list(norms_over(DataLoader(samples, batch_size=4), model))
    expected = per_sample_grad_norms(model, F.cross_entropy, (X, X.flip(1)), Y)
    assert_same(torch.cat(found), expected)


def test_workers(mlp):
    found = torch.cat(list(norms_over(loader(num_workers=2), mlp)))
    assert_same(found, per_sample_grad_norms(mlp, F.cross_entropy, X, Y))


def test_no_batches_and_empty_batches(mlp):
    assert list(norms_over([], mlp)) == []
    empty = DataLoader(TensorDataset(X[:0], Y[:0]), batch_size=4)
    assert list(norms_over(empty, mlp)) == [] and len(norms_over(empty, mlp)) == 0
    pairs = [PAIRS[0], (X[:0], Y[:0]), *PAIRS[1:]]
    assert [len(norms) for norms in norms_over(pairs, mlp)] == [4, 0, 4, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moved_to_the_model(mlp):
    expected = per_sample_grad_norms(mlp, F.cross_entropy, X, Y)
    for pin_memory in (False, True):
        batches = loader(pin_memory=pin_memory)
        found = torch.cat(list(norms_over(batches, mlp.cuda())))
        assert found.device.type == "cuda"
        assert_same(found.cpu(), expected)


def test_progress(mlp, capsys):
    """The bar ends full."""
    assert len(list(norms_over(loader(), mlp, progress=True))) == 3
    assert "3/3" in capsys.readouterr().err
    assert len(list(norms_over(iter(PAIRS), mlp, progress=True))) == 3
    assert "3batch" in capsys.readouterr().err


# -- Interruptions ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "sync"])
def test_an_interruption_leaves_the_model_as_it_was(mlp, mode):
    """It is in the data, in the loss or between batches, or the loop ends early."""

    def loss(output, target):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    before, calls = everything(mlp), []
    with pytest.raises(KeyboardInterrupt):
        list(norms_over(DataLoader(Stops(5), batch_size=4), mlp, mode=mode))
    assert_same_state(mlp, before)
    with pytest.raises(KeyboardInterrupt):
        list(over(loader(), per_sample_grad_norms, mlp, loss, mode=mode))
    assert_same_state(mlp, before)
    running = iter(norms_over(loader(num_workers=1), mlp, mode=mode, progress=True))
    next(running)
    assert_same_state(mlp, before)
    running.close()
    running = iter(norms_over(loader(), mlp, mode=mode))
    next(running)
    del running
    assert_same_state(mlp, before)


# -- Files -----------------------------------------------------------------------------

SAVED = {name: FUNCTIONS[name] for name in FUNCTIONS if name != "clipped"}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def saved(folder, model, name="norms", batches=None, **options):
    function, given = SAVED[name]
    batches = loader() if batches is None else batches
    results = over(batches, function, model, F.cross_entropy, **given, **options)
    return results.save(folder, repeatable=True)


@pytest.mark.parametrize("name", SAVED)
def test_files_are_the_results(mlp, tmp_path, name):
    """All results, memory-mapped, in one file for each tensor; a second call loads."""
    function, options = SAVED[name]
    results = over(loader(), function, mlp, F.cross_entropy, **options)
    parts = list(results)
    before = everything(mlp)
    for _ in range(2):
        found = results.save(tmp_path / "new" / "folder")
        assert_same_state(mlp, before)
        if isinstance(parts[0], torch.Tensor):
            found, files = {"result": found}, ["result"]
            expected = {"result": torch.cat(parts)}
        else:
            files = list(parts[0])
            expected = {key: torch.cat([p[key] for p in parts]) for key in files}
        assert list(found) == files
        for key, array in found.items():
            assert isinstance(array, numpy.memmap) and not array.flags.writeable
            file = tmp_path / "new" / "folder" / f"{key}.npy"
            assert numpy.array_equal(array, expected[key].numpy())
            assert numpy.array_equal(numpy.load(file, mmap_mode="r"), array)
            assert array.dtype == numpy.float64


@pytest.mark.parametrize("name", ["rows", "norms"])
def test_out_of_memory_in_a_later_batch(mlp, tmp_path, name):
    """The folder has the batches before it, and a later run goes on."""
    saved(tmp_path / "whole", mlp, name)
    before = everything(mlp)
    full = RunsOut(1, torch.ops.aten._log_softmax_backward_data)
    with full, pytest.raises(torch.OutOfMemoryError) as caught:
        saved(tmp_path / "broken", mlp, name)
    assert 'Pass chunk_size="auto"' in caught.value.__notes__[0]
    assert_same_state(mlp, before)
    state = json.loads(contents(tmp_path / "broken")["state.json"])
    assert state["samples"] == 4 and not state["complete"]
    for path in (tmp_path / "broken").glob("*.npy"):
        whole = numpy.load(tmp_path / "whole" / path.name)
        assert numpy.array_equal(numpy.load(path), whole[:4])
    saved(tmp_path / "broken", mlp, name)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["rows", "norms", "norms in sync", "sketches"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_continues_where_it_stopped(mlp, tmp_path, name, error, at):
    """The files are bit-identical to those without a stop; of finished samples only the
    first batch is loaded again."""
    saved(tmp_path / "whole", mlp, name)
    data = Stops(at, error)
    before = everything(mlp)
    with pytest.raises(error):
        saved(tmp_path / "broken", mlp, name, DataLoader(data, batch_size=4))
    assert_same_state(mlp, before)
    finished = at // 4 * 4
    if finished:
        state = json.loads(contents(tmp_path / "broken")["state.json"])
        assert state["samples"] == finished and not state["complete"]
        for path in (tmp_path / "broken").glob("*.npy"):
            whole = numpy.load(tmp_path / "whole" / path.name)
            assert numpy.array_equal(numpy.load(path), whole[:finished])
    else:
        assert not (tmp_path / "broken").exists()
    data.given.clear()
    saved(tmp_path / "broken", mlp, name, DataLoader(data, batch_size=4))
    assert data.given == [*range(4), *range(max(finished, 4), 10)]
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


@pytest.mark.parametrize("batches", ["list", "iterable data", "own sampler", "workers"])
def test_continues_with_any_loader(mlp, tmp_path, batches):
    """Batches that cannot be left out are loaded; results are not computed twice."""

    class Stream(IterableDataset):
        def __iter__(self):
            return zip(X, Y)

    make = {
        "list": lambda: PAIRS,
        "iterable data": lambda: DataLoader(Stream(), batch_size=4),
        "own sampler": lambda: loader(sampler=range(9, -1, -1)),
        "workers": lambda: loader(num_workers=2, prefetch_factor=4),
    }[batches]
    calls = []

    def counted(model, loss_fn, x, y):
        if len(calls) == 2:
            calls.append("stop")
            raise KeyboardInterrupt
        calls.append(x)
        return per_sample_grad_norms(model, loss_fn, x, y)

    results = over(make(), counted, mlp, F.cross_entropy)
    with pytest.raises(KeyboardInterrupt):
        results.save(tmp_path, repeatable=True)
    found = results.save(tmp_path, repeatable=True)
    assert len(calls) == 4
    assert numpy.array_equal(found, torch.cat(list(norms_over(make(), mlp))).numpy())


def both(model, loss_fn, x, y):
    """Two files, quickly, and one without numbers."""
    return {"a/b": x * 2, "y": y, "nothing": x[:, :0]}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(mlp, tmp_path, monkeypatch):
    """Before each flush, each replacement of state.json and each batch: the files can
    be loaded and are right, and a later run completes them."""
    monkeypatch.setattr(files, "_SECONDS", 0)
    monkeypatch.setattr(files, "_TIMES", 0)  # a checkpoint a batch
    monkeypatch.setattr(os, "fsync", lambda number: None)  # takes its time
    results = over(loader(), both, mlp, F.cross_entropy)
    whole = results.save(tmp_path / "whole")
    assert numpy.array_equal(whole["a/b"], 2 * X.numpy())
    assert whole["nothing"].shape == (10, 0)
    survived = 0
    for moment in range(1000):
        folder = tmp_path / str(moment)
        child = os.fork()
        if child == 0:
            try:
                _dies_at(moment, monkeypatch)
                results.save(folder)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        for path in folder.glob("*.npy"):
            if path.stat().st_size:
                done = numpy.load(path)
                name = path.stem.replace("%2F", "/")
                assert numpy.array_equal(done, whole[name][: len(done)])
                survived += len(done)
        results.save(folder)
        assert contents(folder) == contents(tmp_path / "whole")
    assert moment > 50 and survived > moment  # it did continue with something


def _dies_at(moment, monkeypatch):
    """Let this process be killed before the step of that number."""
    left = [moment]

    def counted(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        *((os, "fsync"), (os, "replace"), (builtins, "open")),
        *((npy.Growing, "write"), (npy.Growing, "_write")),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


KILLED = """
import os, signal, sys
sys.path.append({support!r})
import torch, torch.nn.functional as F
from nets import small_mlp
from small_data import Stops
from torch.utils.data import DataLoader
from vmapsafe import over, per_sample_grads
from vmapsafe import quantities as q
from vmapsafe._data import folder as files
from vmapsafe._data import npy

class Killed(Stops):
    def __getitem__(self, i):
        if i == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)

torch.set_num_threads(1)
files._SECONDS = files._TIMES = 0
loader = DataLoader(Killed(), batch_size=4)
over(loader, per_sample_grads, small_mlp(), F.cross_entropy).save({folder!r})
"""


def test_a_process_that_is_killed(mlp, tmp_path):
    """Another process continues; the files are bit-identical."""
    folder = tmp_path / "killed"
    support = str(Path(small_data.__file__).parent)
    script = KILLED.format(support=support, folder=str(folder))
    ended = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert json.loads(contents(folder)["state.json"])["samples"] == 8
    data = Stops()
    saved(folder, mlp, "rows", DataLoader(data, batch_size=4))
    assert data.given == [0, 1, 2, 3, 8, 9]
    saved(tmp_path / "whole", mlp, "rows")
    assert contents(folder) == contents(tmp_path / "whole")


def test_half_precision_and_a_slash(tmp_path):
    """bfloat16 becomes float32; a name with a slash stays one file."""
    model = nn.Sequential()
    model.add_module("a/b", nn.Linear(4, 3))
    model = model.bfloat16()
    pairs = [(x.bfloat16(), y) for x, y in PAIRS]
    results = over(pairs, per_sample_grads, model, F.cross_entropy)
    found = results.save(tmp_path, repeatable=True)
    assert found["a/b.weight"].dtype == numpy.float32
    expected = torch.cat([rows["a/b.weight"] for rows in results]).float()
    assert numpy.array_equal(found["a/b.weight"], expected.numpy())


# -- Something else is refused ---------------------------------------------------------


def other_weights():
    model = small_mlp()
    model[0].bias.data[0] += 1e-9
    return model


def other_statistics():
    model = small_mlp()
    model[1].running_var[0] += 1e-9
    return model


def frozen():
    model = small_mlp()
    model[1].eval()
    return model


def without_a_gradient():
    model = small_mlp()
    model[0].bias.requires_grad_(False)
    return model


def shifted():
    return DataLoader(TensorDataset(X + 1e-9, Y), batch_size=4)


def another_loss(output, target):
    return F.cross_entropy(output, target)


CHANGES = {
    "k was '6' and is '7'": {"k": 7},
    "seed was '0' and is '1'": {"seed": 1},
    "kind was \"'rademacher'\" and is \"'gaussian'\"": {"kind": "gaussian"},
    "mode was \"'eval'\" and is \"'group_norm'\"": {"mode": "group_norm"},
    "params was 'None' and is ": {"params": ["0.bias"]},
    "batch_size was 4 and is 5; batches was 3 and is 2": {
        "batches": lambda: loader(batch_size=5)
    },
    "first batch: other data, or another order": {"batches": shifted},
    "parameters and buffers was ": {"model": other_weights},
    "buffers was '": {"model": other_statistics},
    "training and requires_grad was ": {"model": frozen},
    "and requires_grad was '": {"model": without_a_gradient},
    "loss_fn was 'torch.nn.functional.cross_entropy' and is 'test_over.another_loss'": {
        "loss_fn": another_loss
    },
    "function was 'vmapsafe.per_sample_sketch' and is 'vmapsafe.per_sample_grad_n": {
        "function": per_sample_grad_norms,
        "k": None,
    },
}


@pytest.mark.parametrize("text", CHANGES)
@pytest.mark.parametrize("complete", [True, False])
def test_other_arguments_are_refused(mlp, tmp_path, text, complete):
    """The error says what differs, and nothing is written."""

    def save(
        model=small_mlp,
        batches=loader,
        loss_fn=F.cross_entropy,
        function=per_sample_sketch,
        **options,
    ):
        options = {k: v for k, v in {"k": 6, **options}.items() if v is not None}
        results = over(batches(), function, model(), loss_fn, **options)
        return results.save(tmp_path)

    if complete:
        save()
    else:
        with pytest.raises(KeyboardInterrupt):
            save(batches=lambda: DataLoader(Stops(5), batch_size=4))
    before = contents(tmp_path)
    with pytest.raises(ValueError) as caught:
        save(**CHANGES[text])
    assert text in str(caught.value) and str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == before
    assert len(save(chunk_size=3)) == 10  # which changes nothing


def vectors(more=0.0):
    generator = torch.Generator().manual_seed(1)
    params = small_mlp().named_parameters()
    found = {n: torch.randn(p.shape, generator=generator).double() for n, p in params}
    found["0.weight"][3, 2] += more  # which its repr does not show
    return found


class Halves(q.PerSample):
    """Half of each norm."""

    def __init__(self, factor=0.5):
        super().__init__()
        object.__setattr__(self, "factor", factor)

    def part(self, call, start, stop):
        return HalvesPart(self.factor)


class HalvesPart(q.Part):
    def __init__(self, factor):
        self.factor, self.norms = factor, {}

    def take(self, grads):
        self.norms[grads.name] = grads.norms() * self.factor

    def finished(self):
        return torch.stack([*self.norms.values()]).square().sum(0).sqrt()


class InSlots(q.PerSample):
    """The same, with its number in a slot."""

    __slots__ = ("factor",)

    def __init__(self, factor=0.5):
        super().__init__()
        object.__setattr__(self, "factor", factor)

    def part(self, call, start, stop):
        return HalvesPart(self.factor)


WANTED = {
    "another vector": (lambda: q.Dots(vectors()), lambda: q.Dots(vectors(1e-9))),
    "another batch": (
        lambda: q.Gram(other=(X[:2], Y[:2])),
        lambda: q.Gram(other=(X[:2] + 1e-9, Y[:2])),
    ),
    "another option": (lambda: q.Sketch(6), lambda: q.Sketch(6, seed=1)),
    "one of two": (
        lambda: {"a": q.Norms(), "b": q.Sketch(6)},
        lambda: {"a": q.Norms(), "b": q.Sketch(5)},
    ),
    "one's own": (Halves, lambda: Halves(0.25)),
    "in slots": (InSlots, lambda: InSlots(0.25)),
}


@pytest.mark.parametrize("name", WANTED)
def test_what_is_wanted_counts(mlp, tmp_path, name):
    """The same quantity, made again, goes on; another one is refused."""
    make, other = WANTED[name]

    def save(wanted):
        return over(loader(), per_sample, mlp, F.cross_entropy, want=wanted).save(
            tmp_path
        )

    first, again = save(make()), save(make())
    results = [*over(loader(), per_sample, mlp, F.cross_entropy, want=make())]
    for key in ("a", "b") if name == "one of two" else (None,):
        arrays = first if key is None else first[key]
        assert numpy.array_equal(arrays, again if key is None else again[key])
        parts = [r if key is None else r[key] for r in results]
        assert numpy.array_equal(arrays, torch.cat(parts).numpy())
    with pytest.raises(ValueError, match="begun with something else: want was"):
        save(other())


def test_names_within_a_quantity(mlp, tmp_path):
    wanted = {"norms": q.Norms(), "each": q.Norms(per_parameter=True)}
    results = over(loader(), per_sample, mlp, F.cross_entropy, want=wanted)
    found = results.save(tmp_path)
    names = [f"each.{name}" for name, _ in mlp.named_parameters()]
    assert [*found] == ["norms", *names]
    expected = torch.cat([r["each"]["0.weight"] for r in results])
    assert numpy.array_equal(found["each.0.weight"], expected.numpy())


@pytest.mark.parametrize(
    "wanted,text",
    [
        (
            {"each": q.Norms(per_parameter=True), "each.0.bias": q.Losses()},
            "two results have the name 'each.0.bias'",
        ),
        ({"result": q.Norms()}, "a dict holds 'result' alone"),
    ],
)
def test_names_that_mean_something_else(mlp, tmp_path, wanted, text):
    results = over(loader(), per_sample, mlp, F.cross_entropy, want=wanted)
    with pytest.raises(ValueError, match=text):
        results.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_chunks_count_in_sync(mlp, tmp_path):
    """In "sync" the chunks are batches."""
    saved(tmp_path, mlp, "norms in sync")
    with pytest.raises(ValueError, match="chunk_size was 'None' and is '2'"):
        saved(tmp_path, mlp, "norms in sync", chunk_size=2)


def spoil_state(folder):
    (folder / "state.json").write_text("{")


def cut_rows(folder):
    os.truncate(folder / "result.npy", 128 + 7 * 8)
    state = json.loads((folder / "state.json").read_text())
    state.update(complete=False, batches=2, samples=8)
    (folder / "state.json").write_text(json.dumps(state))


def forget_state(folder):
    (folder / "state.json").unlink()


@pytest.mark.parametrize(
    "spoil,text",
    [
        (spoil_state, "holds a state.json that cannot be read. Give another path."),
        (cut_rows, "lacks rows of result.npy that state.json counts"),
        (forget_state, "is not empty and holds no state.json. Give another path."),
    ],
)
def test_spoilt_folders(mlp, tmp_path, spoil, text):
    norms_over(loader(), mlp).save(tmp_path)
    spoil(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError) as caught:
        norms_over(loader(), mlp).save(tmp_path)
    assert text in str(caught.value) and str(tmp_path) in str(caught.value)
    assert contents(tmp_path).keys() == before.keys()
    if spoil is not cut_rows:
        assert contents(tmp_path) == before


def test_nothing_to_save(mlp, tmp_path):
    empty = DataLoader(TensorDataset(X[:0], Y[:0]), batch_size=4)
    with pytest.raises(ValueError, match="gave no batch, so that the results have no"):
        norms_over(empty, mlp).save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file' is not a folder"):
        norms_over(loader(), mlp).save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# -- Errors ----------------------------------------------------------------------------


def take_one(results):
    next(iter(results))


def save_it(results):
    results.save("never-made")


class Backwards(torch.utils.data.Sampler):
    def __iter__(self):
        return iter(range(9, -1, -1))

    def __len__(self):
        return 10


MAKING = [
    ({"loader": TensorDataset(X, Y)}, TypeError, "the loader is a TensorDataset. Give"),
    ({"loader": X}, TypeError, "the loader is a Tensor"),
    ({"loader": 3}, TypeError, "over(...): the loader is an int. Give batches, e.g. "),
    (
        {"function": small_mlp()},
        TypeError,
        "function is a Sequential. Write over(loader",
    ),
    ({"loss_fn": Y}, TypeError, "loss_fn is a Tensor"),
    ({"model": F.mse_loss}, TypeError, "model is a function, not an nn.Module"),
    (
        {"nodes": 3},
        TypeError,
        "got an unexpected keyword argument 'nodes'. See its arg",
    ),
    (
        {"function": per_sample_sketch},
        TypeError,
        "over(...): vmapsafe.per_sample_sketch needs k=. Write over(..., k=...)",
    ),
]
TAKING = [
    (
        {"loader": [{"x": X, "y": Y}]},
        TypeError,
        "the loader gave a dict with the keys ['x', 'y']. Say what is what, e.g. keys=",
    ),
    (
        {"loader": [{"x": X, "y": Y}], "keys": ("x", "label")},
        ValueError,
        "keys= names 'label', and the batch has ['x', 'y']",
    ),
    ({"keys": "x"}, TypeError, "keys= for a batch that is a list. Leave keys= out."),
    ({"loader": ["xy"]}, TypeError, "the loader gave a batch that is a str. Let its"),
    (
        {"loader": [(X, "y")]},
        ValueError,
        "batch[1] holds 'y', a str, which has no batch dim",
    ),
    ({"loader": [(X, Y[:3])]}, ValueError, "batch sizes disagree"),
    ({"mode": "train"}, ValueError, "unknown mode 'train'"),
]
SAVING = [
    ({"loader": PAIRS}, ValueError, "order is not known to be the same each time"),
    (
        {"loader": loader(shuffle=True)},
        ValueError,
        "Give a DataLoader with shuffle=Fal",
    ),
    ({"loader": loader(sampler=Backwards())}, ValueError, "say repeatable=True."),
    ({"has_aux": True}, ValueError, "has_aux=True, and the files do not hold aux"),
    (
        {"update_running_stats": True, "mode": "sync"},
        ValueError,
        "update_running_stats=True, and a run that changes the model",
    ),
    ({"gather": "all"}, ValueError, "gather='all', and each process writes files"),
    (
        {"function": clipped_grad_sum, "max_grad_norm": 1.0},
        ValueError,
        "for a batch of 4 the function gave '0.weight': (6, 4). Give a function that",
    ),
    (
        {"function": lambda *args: list(args)},
        ValueError,
        "for a batch of 4 the function gave a list",
    ),
    ({"function": lambda *args: {}}, ValueError, "the function gave a dict"),
]
for _wanted, _text in {
    q.Sum(): "Sum adds up the samples of a batch, and files hold a row for each sample",
    q.ClippedSum(1.0): "ClippedSum adds up",
    q.Gram(): "Gram pairs the samples of one batch alone, and not those of all batches",
    q.Norms(gather="all"): "Norms has gather='all', and each process writes its own",
}.items():
    _given = {"function": per_sample, "want": {"x": _wanted}}
    SAVING.append((_given, ValueError, f"over(...).save(...): {_text}"))
ERRORS = [
    *((lambda results: None, *row) for row in MAKING),
    *((take_one, *row) for row in TAKING),
    *((save_it, *row) for row in SAVING),
]


@pytest.mark.parametrize("use,changed,kind,text", ERRORS, ids=[e[-1] for e in ERRORS])
def test_errors(mlp, tmp_path, monkeypatch, use, changed, kind, text):
    monkeypatch.chdir(tmp_path)
    before = everything(mlp)
    given = {
        "loader": loader(),
        "function": per_sample_grad_norms,
        "model": mlp,
        "loss_fn": F.cross_entropy,
        **changed,
    }
    with pytest.raises(kind) as caught:
        use(over(**given))
    assert text in str(caught.value)
    assert_same_state(mlp, before)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "package,call,text",
    [
        (
            "tqdm",
            lambda model: norms_over(loader(), model, progress=True),
            "over(...) with progress=True: tqdm cannot be imported here. Run pip "
            "install tqdm.",
        ),
        (
            "numpy",
            lambda model: norms_over(loader(), model).save("never-made"),
            "over(...).save(...): numpy cannot be imported here. Run pip install "
            "numpy.",
        ),
    ],
)
def test_a_missing_extra_is_named(mlp, monkeypatch, package, call, text):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        call(mlp)
    assert str(caught.value) == text
    assert len(list(norms_over(loader(), mlp))) == 3
