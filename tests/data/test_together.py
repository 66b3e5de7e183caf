"""A folder that several processes fill together: the one that one process fills."""

import errno
import json
import os
import random
import re
import time

import numpy
import pytest
import slow
import torch
import torch.nn.functional as F
from folders import contents, counted
from forked import Forked, together
from nets import small_mlp
from small_data import Stops, X, Y
from state import assert_same_state, everything
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from vmapsafe import over, per_sample, per_sample_grad_norms, per_sample_grads
from vmapsafe import quantities as q
from vmapsafe._data import folder as files
from vmapsafe._data import npy

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # Python 3.12 on, where anything has left a thread; tqdm does.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

WORLDS = [2, 3]
DATA = TensorDataset(X, Y)


def loader(data=DATA, **options):
    return DataLoader(data, **{"batch_size": 2, **options})


def save(folder, batches=None, function=per_sample_grads, model=None, **options):
    """``over(...).save``; its own options are repeatable and seed."""
    saving = {"repeatable": True, "seed": options.pop("seed", None)}
    batches = loader() if batches is None else batches
    results = over(batches, function, model or small_mlp(), F.cross_entropy, **options)
    return results.save(folder, **saving)


def assert_right(folder):
    """Against a loop of plain backward passes."""
    expected = slow.rows(small_mlp().eval(), F.cross_entropy, X, Y)
    for name, rows in expected.items():
        found = numpy.load(folder / f"{name}.npy")
        numpy.testing.assert_allclose(found, rows, rtol=1e-10, atol=1e-13)


# -- The same folder -------------------------------------------------------------------

WANTED = {"a/b": q.Sketch(6), "norms": q.Norms(), "each": q.Norms(per_parameter=True)}
FUNCTIONS = {
    "rows": {},
    "norms": {"function": per_sample_grad_norms},
    "in sync": {"function": per_sample_grad_norms, "mode": "sync"},
    "several": {"function": per_sample, "want": WANTED},
    "bfloat16": {
        "model": small_mlp().bfloat16(),
        "batches": [(x.bfloat16(), y) for x, y in zip(X.split(3), Y.split(3))],
    },
    "nothing": {"function": lambda model, loss_fn, x, y: {"x": x[:, :0], "y": y}},
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_bytes(tmp_path, name, world):
    """Rows, state and names of files; each process returns all rows, and leaves the
    model as it was."""
    alone = save(tmp_path / "alone", **FUNCTIONS[name])
    alone = alone if isinstance(alone, dict) else {"result": alone}

    def work(rank):
        model = FUNCTIONS[name].get("model") or small_mlp()
        before = everything(model)
        found = save(tmp_path / "both", **{**FUNCTIONS[name], "model": model})
        assert_same_state(model, before)
        found = found if isinstance(found, dict) else {"result": found}
        assert [*found] == [*alone]
        for key, rows in found.items():
            assert numpy.array_equal(rows, alone[key])
            assert not rows.flags.writeable

    together(world, tmp_path / "run", work)
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
    if name == "rows":
        assert_right(tmp_path / "both")


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2), (3, 2)])
def test_names_in_any_order(tmp_path, before, after):
    """Those of a function whose dicts have another order now and then."""

    def both(model, loss_fn, x, y):
        if len(computed) == stop[0]:
            raise KeyboardInterrupt
        computed.append(1)
        found = {"x": x, "y": y}
        return found if y[0] != order[0] else dict(reversed(found.items()))

    def work(rank):
        computed.clear()
        save(folder, loader(batch_size=1), both)

    computed, stop, order = [], [-1], [-1]
    folder = tmp_path / "alone"
    work(0)
    folder, stop[0], order[0] = tmp_path / "both", 3, 0
    together(before, tmp_path / "before", work, fails=True)
    stop[0], order[0] = -1, 1
    together(after, tmp_path / "after", work)
    for name, truth in (("x", X), ("y", Y)):
        assert numpy.array_equal(numpy.load(folder / f"{name}.npy"), truth)
    one, two = [
        json.loads((tmp_path / f / "state.json").read_text()) for f in ("alone", "both")
    ]
    assert one == two


class Stream(IterableDataset):
    def __init__(self, x=X):
        self.x = x

    def __iter__(self):
        return zip(self.x, Y)


LOADERS = {
    "tensors": lambda: loader(),
    "last one left out": lambda: loader(batch_size=3, drop_last=True),
    "one batch": lambda: loader(batch_size=10),
    "data set": lambda: loader(Stops()),
    "part": lambda: loader(Subset(DATA, range(9, 0, -2))),
    "workers": lambda: loader(Stops(), num_workers=2),
    "own sampler": lambda: loader(sampler=range(9, -1, -1)),
    "own batches": lambda: DataLoader(DATA, batch_sampler=[[3], [1, 2], [0, 9, 7]]),
    "stream": lambda: loader(Stream()),
    "list": lambda: [*zip(X.split(3), Y.split(3))],
}


@pytest.mark.parametrize("name", LOADERS)
def test_any_loader(tmp_path, name):
    """A folder of no process, one or three is completed by one, two or three, and no
    batch is computed twice."""

    def numbers(model, loss_fn, x, y):
        if len(computed) == stop[0]:
            raise KeyboardInterrupt
        computed.append(len(x))
        return {"x": x + 1, "y": y}

    def work(rank):
        computed.clear()
        save(folder, LOADERS[name](), numbers)
        return len(computed)

    computed, stop = [], [-1]
    folder = tmp_path / "alone"
    batches = work(0)
    whole = contents(folder)
    for i, (before, after) in enumerate([(0, 2), (1, 2), (3, 1), (3, 3)]):
        folder, stop[0] = tmp_path / f"{i}", 1
        if before and batches > before:
            together(before, tmp_path / f"before {i}", work, fails=True)
            assert len(counted(folder)) in range(1, before + 1)
        stop[0], left = -1, batches - len(counted(folder))
        assert sum(together(after, tmp_path / f"run {i}", work)) == left
        assert contents(folder) == whole


def test_none_waits(tmp_path):
    """While one process is slow, the others compute all other batches."""

    def slowly(model, loss_fn, x, y):
        if slow_one:
            time.sleep(1)
        computed.append(1)
        return x

    slow_one, computed = [], []

    def work(rank):
        slow_one[:] = [1] * (rank == 1)
        save(tmp_path / "both", loader(batch_size=1), slowly)
        return len(computed)

    assert together(2, tmp_path / "run", work) == [9, 1]
    assert numpy.array_equal(numpy.load(tmp_path / "both" / "result.npy"), X)


def takes_time(model, loss_fn, x, y):
    time.sleep(0.15)  # so that each process computes some
    return x


def test_progress(tmp_path, capfd):
    """One bar, of all batches; one of a resumed run begins where it is."""

    def work(rank):
        save(tmp_path / "both", per_batch(), takes_time, progress=True)

    def per_batch():
        return loader(Stops(stop, OSError), batch_size=1)

    stop = 3
    together(2, tmp_path / "first", work, fails=True)
    capfd.readouterr()
    begun, stop = len(counted(tmp_path / "both")), None
    assert begun
    together(2, tmp_path / "second", work)
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1 and "10/10" in shown and f" {begun}/10 " in shown
    counts = {int(number) for number in re.findall(r" (\d+)/10 ", shown)}
    assert len(counts) > 3 and max(counts - {10}) > 7  # not this process's alone


# -- Random draws ----------------------------------------------------------------------


class Draws(nn.Module):
    """The network with dropout, and a layer left out by Python's or numpy's draws."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = small_mlp(), kind
        self.drop = nn.Dropout()

    def forward(self, x):
        if self.kind == "torch":
            x = self.drop(x)
        if self.kind == "python":
            x = x * random.random()
        if self.kind == "numpy":
            x = x * float(numpy.random.rand())
        return self.net(x)


@pytest.mark.parametrize("kind", ["torch", "python", "numpy"])
def test_draws(tmp_path, kind):
    """They are refused without a seed. With one they are those of one process, also of
    one that is interrupted, and the generators are put back."""

    model = Draws(kind).double()

    def drawn(folder, seed, batches=None):
        return save(
            tmp_path / folder,
            batches,
            per_sample_grad_norms,
            model,
            randomness="different",
            seed=seed,
        )

    def states():
        numpy_ = [*map(repr, numpy.random.get_state(legacy=True))]
        return torch.get_rng_state().tolist(), repr(random.getstate()), numpy_

    def work(rank):
        found = []
        for use in (lambda: [*loader()], lambda: drawn("both", seed=3)):
            random.seed(rank)
            torch.manual_seed(rank)
            numpy.random.seed(rank)
            use()
            found.append(states())
        assert found[0] == found[1]  # but for the one number that loaders draw

    whole = drawn("alone", seed=3)
    assert len({*drawn("other", seed=4)} & {*whole}) == 0
    same = loader(TensorDataset(X[[0, 1] * 5], Y[[0, 1] * 5]))
    assert len({*drawn("same", 3, same)[::2]}) > 1  # each batch draws its own
    stops = loader(Stops(5, OSError))
    with pytest.raises(OSError):
        drawn("again", 3, stops)
    drawn("again", 3, stops)
    together(2, tmp_path / "run", work)
    for folder in ("both", "again"):
        assert contents(tmp_path / folder) == contents(tmp_path / "alone")
    with pytest.raises(ValueError, match="draws from was 3 and is 4. Ask for the same"):
        drawn("both", seed=4)
    for rank, said in enumerate(
        together(2, tmp_path / "none", lambda rank: drawn("no", None), fails=True)
    ):
        assert rank or "draws random numbers, and 2 processes would draw other" in said
    assert counted(tmp_path / "no") == []


# -- What one process does wrong -------------------------------------------------------


def refused(world, tmp_path, work, *texts):
    """All fail; each process with the text at its place, or because another failed."""
    said = together(world, tmp_path / f"run {time.monotonic_ns()}", work, fails=True)
    for rank, one in enumerate(said):
        own = texts[rank] if rank < len(texts) else None
        assert (own or "processes failed. See their errors") in one, one


@pytest.mark.parametrize("world", WORLDS)
def test_shuffled(tmp_path, world):
    """A DataLoader with shuffle=True is refused; with a promise that does not hold, the
    first batch tells."""

    def work(rank):
        model, batches = small_mlp(), loader(shuffle=True)
        torch.manual_seed(rank)
        results = over(batches, per_sample_grads, model, F.cross_entropy)
        results.save(tmp_path / "both", repeatable=promised)

    promised = False
    refused(world, tmp_path, work, *["say repeatable=True"] * world)
    promised = True
    text = f"of the {world} processes the loader of the whole data set, not shuffled"
    refused(world, tmp_path, work, None, *[text] * (world - 1))
    assert counted(tmp_path / "both") == []


class ByRank(IterableDataset):
    """Other data in each process, after the first batch."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        x = X.clone()
        x[2:] += self.rank
        return zip(x, Y)


OTHER_ORDERS = {
    "indices": lambda rank: loader(sampler=[0, 1, *torch.randperm(8).add(2).tolist()]),
    "data": lambda rank: loader(ByRank(rank)),
}


@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_another_order_after_the_first_batch(tmp_path, name):
    """The folder never becomes complete, also not by a run with a right loader."""

    def work(rank):
        torch.manual_seed(rank)
        save(tmp_path / "both", OTHER_ORDERS[name](rank), takes_time)

    said = together(2, tmp_path / "run", work, fails=True)
    assert "the loader gives another order of these" in "".join(said)
    assert len(counted(tmp_path / "both")) == 5
    for _ in range(2):
        torch.manual_seed(0)
        with pytest.raises(ValueError, match="the loader gives another order of these"):
            save(tmp_path / "both", OTHER_ORDERS[name](0), takes_time)
    assert not json.loads((tmp_path / "both" / "state.json").read_text())["complete"]


def test_other_numbers_of_batches(tmp_path):
    """A loader that ends earlier in one process."""

    def work(rank):
        # Without a length, so that the first look cannot tell.
        save(tmp_path / "both", loader(Stream(X[: 10 - 4 * (rank == first)])))

    for first in range(2):
        together(2, tmp_path / f"run {first}", work, fails=True)
        assert not json.loads((tmp_path / "both" / "state.json").read_text())[
            "complete"
        ]


def test_another_order_is_not_counted(tmp_path):
    """By a run that computes the batch before it, and then stops."""

    def work(rank):
        order = [0, 1, 2, 3, 4, 5] if rank == 0 else [0, 1, 4, 5, 2, 3]
        save(tmp_path / "both", loader(Stops(), sampler=order), fails)

    def fails(model, loss_fn, x, y):
        if x[0, 0] == X[0, 0] and failing:
            time.sleep(0.5)  # so that the other process computes all others
            raise FloatingPointError
        return x

    failing = [1]
    together(2, tmp_path / "run", work, fails=True)
    assert sorted(counted(tmp_path / "both")) == [1, 2]
    failing.clear()
    for _ in range(2):
        with pytest.raises(ValueError, match="the loader gives another order of these"):
            work(0)


class Waits(IterableDataset):
    """Three samples, or two, that come late, in process 1."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        yield X[0], Y[0]
        time.sleep(0.3 * self.rank)
        yield X[1], Y[1]
        if self.rank == 0:
            time.sleep(0.6)
            yield X[2], Y[2]


def test_dealt_to_a_process_whose_loader_lacks_it(tmp_path):
    def work(rank):
        save(tmp_path / "both", loader(Waits(rank), batch_size=1))

    refused(
        2, tmp_path, work, "has 2 of 3 batches, and batch 2 is missing. Give all pr"
    )
    assert counted(tmp_path / "both") == [0, 1]


def test_distributed_sampler(tmp_path):
    def work(rank):
        sampler = DistributedSampler(DATA, shuffle=False)
        save(tmp_path / "both", loader(sampler=sampler))

    text = "has a DistributedSampler, and save deals the batches of the whole data set"
    refused(2, tmp_path, work, text, text)
    assert not (tmp_path / "both").exists()


def test_sync_batch_norm(tmp_path):
    """It would wait for batches that the other process does not have."""
    net = nn.Sequential(nn.Linear(4, 3), nn.SyncBatchNorm(3)).double()

    def work(rank):
        save(tmp_path / "both", model=net, mode="sync")

    text = "in mode 'sync' '1', a SyncBatchNorm, takes statistics of a batch of each"
    refused(2, tmp_path, work, text, text)
    assert not (tmp_path / "both").exists()


def test_another_model_or_path_in_one_process(tmp_path):
    def another_model(rank):
        torch.manual_seed(rank)
        save(tmp_path / "one", model=nn.Linear(4, 3).double())

    def another_path(rank):
        save(tmp_path / f"of {rank}")

    def not_a_folder(rank):
        save(tmp_path / ("file" if rank == 0 else "three"))

    (tmp_path / "file").write_text("mine")
    refused(2, tmp_path, another_model, None, "begun with something else: parameters")
    text = "is not the folder that process 0 sees; this is process 1 of 2. Give all"
    refused(2, tmp_path, another_path, None, text)
    refused(2, tmp_path, not_a_folder, "is not a folder. Pass the path of a folder")
    assert not (tmp_path / "three").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_no_batch(tmp_path):
    def work(rank):
        save(tmp_path / "both", loader(TensorDataset(X[:0], Y[:0])))

    refused(2, tmp_path, work, "the loader gave no batch, so that the results have no")
    assert not (tmp_path / "both").exists()


def test_one_that_fails(tmp_path):
    """The others stop after their batch and raise too, and any later run goes on."""

    def fails(model, loss_fn, x, y):
        if x[0, 0] == X[2, 0] and broken[0]:
            raise FloatingPointError("mine")
        time.sleep(0.2)
        computed.append(1)
        return x

    def work(rank):
        computed.clear()
        save(tmp_path / "both", loader(batch_size=1), fails)
        return len(computed)

    computed, broken = [], [True]
    said = together(3, tmp_path / "run", work, fails=True)
    failed = ["FloatingPointError: mine" in one for one in said]
    assert sum(failed) == 1
    text = "over(...).save(...): another process failed. See its error."
    assert all([text in one for one, own in zip(said, failed) if not own])
    found = counted(tmp_path / "both")
    assert len(found) in (2, 3, 4) and 2 not in found
    broken[0] = False
    assert work(0) == 10 - len(found)
    assert numpy.array_equal(numpy.load(tmp_path / "both" / "result.npy"), X)


def test_one_that_ends(tmp_path):
    """The other one says so, and any later run goes on."""

    def work(rank):
        files._SECONDS = files._TIMES = 0
        save(tmp_path / "both", function=ends)

    def ends(model, loss_fn, x, y):
        if ending:
            os._exit(0) if x[0, 0] == X[0, 0] else time.sleep(0.1)
        return x

    ending = [1]
    forked = Forked(2, tmp_path / "run", work)
    assert forked.wait()
    assert forked.codes == {0: 0, 1: 1}
    text = "over(...).save(...): another process has ended, or does not answer. See it"
    assert text in forked.returned(1)
    assert counted(tmp_path / "both")
    ending.clear()
    work(0)
    assert numpy.array_equal(numpy.load(tmp_path / "both" / "result.npy"), X)


def test_own_error_where_another_one_ends(tmp_path):
    def ends(model, loss_fn, x, y):
        if x[0, 0] == X[0, 0]:
            os._exit(0)
        time.sleep(0.3)
        raise FloatingPointError("mine")

    forked = Forked(2, tmp_path / "run", lambda rank: save(tmp_path / "a", None, ends))
    assert forked.wait()
    assert forked.codes == {0: 0, 1: 1}
    assert forked.returned(1).endswith("FloatingPointError: mine\n")


def test_arguments_of_one_process(tmp_path):
    def work(rank):
        save(tmp_path / "both", seed="mine" if rank else None)

    refused(2, tmp_path, work, None, "over(...).save(...): seed is a str. Give an int")
    assert not (tmp_path / "both").exists()


# -- A full disk, and damages ----------------------------------------------------------


def full_after(size, patch):
    """Let the disk have room for so many bytes of rows and notes."""

    def write(self, place, data):
        part = data[: max(0, size - sum(used))]
        used.append(len(part))
        whole(self, place, part)
        if len(part) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    used, whole = [], npy.Growing._write
    patch.setattr(npy.Growing, "_write", write)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("size", [0, 500, 1000, 2500])
def test_full_disk(tmp_path, world, size):
    """The error says what it means; a run with more room goes on."""

    def work(rank):
        files._SECONDS = files._TIMES = 0
        if size >= 0:
            full_after(size, pytest.MonkeyPatch())
        save(tmp_path / "both")

    save(tmp_path / "alone")
    said = together(world, tmp_path / "run", work, fails=True)
    said = "".join(said)
    assert "OSError: [Errno 28] No space left on device\n" in said
    text = "what is finished stays there. Call save again when there is room: it conti"
    assert text in said
    size = -1
    together(2, tmp_path / "again", work)
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


def test_a_disk_that_mixes_writes(tmp_path):
    """Such as a network disk that writes whole pages: it shows before the end."""

    def more(self, place, data):
        whole(self, place, bytes(data) + bytes(8) * (place > 0))

    def first_is_slow(model, loss_fn, x, y):
        time.sleep(0.3 * bool(x[0, 0] == X[0, 0]))
        return x

    def work(rank):
        if rank == 0:
            pytest.MonkeyPatch().setattr(npy.Growing, "_write", more)
        save(tmp_path / "both", function=first_is_slow)

    whole = npy.Growing._write
    text = "lacks rows of result.npy that a journal counts, or they have changed."
    for _ in range(2):
        said = together(2, tmp_path / f"run {time.monotonic_ns()}", work, fails=True)
        assert text in "".join(said)
    assert not json.loads((tmp_path / "both" / "state.json").read_text())["complete"]


@pytest.fixture
def part(tmp_path):
    """A folder that two processes have begun, and one of its two journals."""

    def work(rank):
        save(tmp_path / "both", loader(Stops(7, OSError), batch_size=1))

    together(2, tmp_path / "run", work, fails=True)
    found = [p for p in (tmp_path / "both").glob("*.jsonl") if p.stat().st_size]
    assert found
    return tmp_path / "both", found[0]


def half_a_line(path):
    path.write_text(path.read_text()[:-20])


def without_lines(path):
    path.unlink()


def garbage(path):
    path.write_text("garbage\n" + path.read_text())


def a_list(path):
    path.write_text("[1, 2]\n" * 3)


def other_kinds(path):
    path.write_text(path.read_text().replace("float64", "float32", 1))


def a_number_less(path):
    path.write_text(path.read_text().replace('"order"', '"other"', 1))


def negative(path):
    path.write_text(path.read_text().replace('"start": ', '"start": -1', 1))


def rows_changed(path):
    with open(path.parent / "0.weight.npy", "r+b") as file:
        file.seek(200)
        file.write(b"changed")


def longer(path):
    with open(path.parent / "0.weight.npy", "ab") as file:
        file.write(bytes(10**6))


def samples_changed(path):
    path.write_text(re.sub(r'"samples": \d', '"samples": 0', path.read_text(), 1))


def rows_cut(path):
    os.truncate(path.parent / "0.weight.npy", 300)


DAMAGES = {
    half_a_line: None,
    without_lines: None,
    longer: None,
    samples_changed: "lacks rows of 0.weight.npy that a journal counts, or they have",
    garbage: "jsonl that cannot be read. Give another path.",
    a_list: "jsonl that cannot be read. Give another path.",
    other_kinds: "'0.weight': 'float32 (6, 4)'",
    a_number_less: "jsonl that cannot be read. Give another path.",
    negative: "jsonl that cannot be read. Give another path.",
    rows_changed: "lacks rows of 0.weight.npy that a journal counts, or they have chan",
    rows_cut: "lacks rows of 0.weight.npy that a journal counts, or they have changed",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_damages(tmp_path, part, damage, world):
    """What is not counted is computed again; anything else is refused, untouched."""
    folder, path = part
    damage(path)
    before = contents(folder)

    def work(rank):
        save(folder, loader(Stops(), batch_size=1))

    said = together(world, tmp_path / "again", work, fails=DAMAGES[damage] is not None)
    if DAMAGES[damage] is not None:
        assert DAMAGES[damage] in "".join(said)
        now = contents(folder)
        assert {name: now[name] for name in before} == before
        return
    save(tmp_path / "alone", loader(Stops(), batch_size=1))
    assert contents(folder) == contents(tmp_path / "alone")


def test_samples_that_do_not_add_up(tmp_path):
    """Of a damaged journal, where rows of no numbers cannot tell."""

    def work(rank):
        batches = loader(Stops(stop, OSError), batch_size=1)
        save(folder, batches, lambda model, loss_fn, x, y: x[:, :0])

    folder, stop = tmp_path / "both", 7
    together(2, tmp_path / "run", work, fails=True)
    stop = None
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"samples": 1', '"samples": 2'))
    said = together(1, tmp_path / "again", work, fails=True)
    assert "has batch 1 after 1 samples, and there are 2 before it" in said[0]


def test_other_data_in_a_batch_ahead(tmp_path):
    """Data in memory are compared, also those of batches after a gap."""

    def stops(model, loss_fn, x, y):
        if x[0, 0] == X[0, 0] and missing[0]:
            time.sleep(0.5)  # so that the other process computes all others
            raise FloatingPointError
        return x

    def work(rank):
        save(tmp_path / "both", loader(TensorDataset(x, Y), batch_size=1), stops)

    x, missing = X, [True]
    together(2, tmp_path / "run", work, fails=True)
    assert sorted(counted(tmp_path / "both")) == [*range(1, 10)]
    x, missing[0] = X.clone(), False
    x[5] += 1
    for world in (1, 2):
        text = "and the loader gives other data in these. Give the same loader"
        refused(world, tmp_path, work, *[text] * world)
    x = X
    together(1, tmp_path / "right", work)
    assert numpy.array_equal(numpy.load(tmp_path / "both" / "result.npy"), X)


def test_journals_left_by_a_complete_run(tmp_path):
    """One that was killed before it removed them."""
    save(tmp_path / "both")
    before = contents(tmp_path / "both")
    (tmp_path / "both" / "finished-1-0.jsonl").write_text("{}\n")
    together(2, tmp_path / "run", lambda rank: save(tmp_path / "both") and None)
    assert contents(tmp_path / "both") == before
