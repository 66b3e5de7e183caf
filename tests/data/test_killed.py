"""Processes that fill a folder together, killed at random moments."""

import builtins
import os
import random
import signal

import numpy
import pytest
import slow
import torch
import torch.nn.functional as F
from folders import contents, counted
from forked import Forked
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from vmapsafe import over, per_sample_grads
from vmapsafe._data import folder as files
from vmapsafe._data import journal, npy

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # Python 3.12 on, where anything has left a thread; tqdm does.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

# More: VMAPSAFE_KILLS=200 pytest tests/data/test_killed.py -s
KILLS = int(os.environ.get("VMAPSAFE_KILLS", 15))
STRIDE = 1 if KILLS > 15 else 7
N, SIZE = 63, 2
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(N) % 3
FEW = TensorDataset(X[:7], Y[:7])


class Loaded(Dataset):
    """A data set that does not seem to be in memory."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], Y[i]


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())
    model = model.append(nn.Linear(6, 3)).double()
    model(X)
    return model.eval()


def save(folder, data=None):
    loader = DataLoader(data or Loaded(), batch_size=SIZE)
    return over(loader, per_sample_grads, make(), F.cross_entropy).save(folder)


def rows_at(folder, name, whole, batches):
    """The rows of some batches, whatever the header says."""
    file = numpy.memmap(folder / f"{name}.npy", mode="r")
    one = whole[0].nbytes
    for batch in batches:
        part = whole[batch * SIZE : (batch + 1) * SIZE]
        start = 128 + batch * SIZE * one
        yield bytes(file[start : start + part.nbytes]), part.tobytes()


def test_killed_at_random_moments(tmp_path):
    """What is counted is right after each kill; another number of processes goes on,
    and the folder becomes the one of one process, to the byte."""
    alone = tmp_path / "alone"
    whole = {name: numpy.array(rows) for name, rows in save(alone).items()}
    for name, rows in slow.rows(make(), F.cross_entropy, X, Y).items():
        numpy.testing.assert_allclose(whole[name], rows, rtol=1e-10, atol=1e-13)
    seed = int(os.environ.get("VMAPSAFE_SEED", 0))
    draw = random.Random(seed)
    kills = runs = finished = continued = 0
    folder = tmp_path / "0"
    while kills < KILLS or not continued or not finished:
        before = counted(folder)
        continued += bool(before)
        world, runs = draw.randint(1, 3), runs + 1
        pace, data = draw.choice([0, 0.02]), draw.choice([None, TensorDataset(X, Y)])

        def work(rank):
            files._SECONDS = files._TIMES = pace
            save(folder, data)

        forked = Forked(world, tmp_path / f"run {runs}", work)
        victims = draw.sample(range(world), draw.randint(1, world))
        kill = kills < KILLS or not continued
        if kill and not forked.wait(draw.uniform(0.02, 0.3)):
            forked.kill(victims)
            forked.wait(draw.choice([0, 0.1]))
            forked.kill(range(world))
        assert forked.wait()
        kills += sum(code == -9 for code in forked.codes.values())
        now = counted(folder)
        assert {*before} <= {*now} and len(now) == len({*now})
        for name, rows in whole.items() if now else ():
            for found, expected in rows_at(folder, name, rows, {*now}):
                assert found == expected
        if not any(forked.codes.values()):
            assert contents(folder) == contents(alone)
            finished += 1
            folder = tmp_path / str(runs)
    print(f"{kills} kills, {runs} runs, {continued} continued, {finished} finished")


def dies_at(step, patch):
    """Let this process be killed before the step of that number."""
    left = [step]

    def counted(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        *((os, "fsync"), (os, "replace"), (os, "open"), (os, "unlink")),
        *((builtins, "open"), (npy.Growing, "_write"), (journal.Journal, "flush")),
    ):
        patch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_before_each_step(tmp_path, victim):
    """One of two processes ends before each time that it writes, opens, flushes or
    removes a file, those with which a folder becomes complete included."""
    save(tmp_path / "alone", FEW)
    expected = contents(tmp_path / "alone")
    step = killed = 0
    while True:
        folder = tmp_path / str(step)

        def work(rank):
            files._SECONDS = files._TIMES = 0
            if rank == victim:
                dies_at(step, pytest.MonkeyPatch())
            save(folder, FEW)

        forked = Forked(2, tmp_path / f"run {step}", work)
        assert forked.wait()
        killed += forked.codes[victim] == -9
        if forked.codes[victim] == 0:
            break
        save(folder, FEW)
        assert contents(folder) == expected, step
        step += STRIDE
    assert contents(folder) == expected
    assert killed > 40 / STRIDE
