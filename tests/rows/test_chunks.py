"""chunk_size="auto" takes what fits, and halves it if it does not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmapsafe import clipped_grad_sum, per_sample_grad_norms, per_sample_grads
from vmapsafe._rows import chunks
from vmapsafe.quantities import rows
from vmapsafe.testing import assert_same


class Memory:
    """A device that takes ``samples`` at a time, and says what it wants to."""

    def __init__(self, monkeypatch, samples, free=2**40, cost=1, told=True):
        self.samples, self.free, self.cost, self.told = samples, free, cost, told
        self.peak, self.ran, self.failed = 0, [], 0
        monkeypatch.setattr(chunks, "_free", lambda device: self.free)
        monkeypatch.setattr(chunks, "_used", lambda device: (0, self.peak))

    def take(self, count):
        self.ran.append(count)
        if count > self.samples:
            self.failed += 1
            raise torch.OutOfMemoryError("injected")
        self.peak = max(self.peak, self.cost * count)


class Hungry(nn.Module):
    """Runs out of memory as its device says, with the last layer still to come."""

    def __init__(self, memory):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.memory = [memory]

    def forward(self, x):
        x = Ask.apply(self.a(x), self.memory[0])
        return self.b(torch.tanh(x))


class Ask(torch.autograd.Function):
    """Sees whole batches, and takes memory for them."""

    @staticmethod
    def forward(x, memory):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None

    @staticmethod
    def vmap(info, in_dims, x, memory):
        memory.take(info.batch_size)
        return Ask.apply(x, memory), in_dims[0]


X = torch.randn(37, 3, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(37) % 2

CALLS = {
    "norms": lambda model, size: per_sample_grad_norms(
        model, F.cross_entropy, X, Y, chunk_size=size
    ),
    "clipped sum": lambda model, size: clipped_grad_sum(
        model, F.cross_entropy, X, Y, chunk_size=size, max_grad_norm=0.4
    ),
    "rows": lambda model, size: per_sample_grads(
        model, F.cross_entropy, X, Y, chunk_size=size
    ),
    "rows by vmap": lambda model, size: per_sample_grads(
        model, F.cross_entropy, X, Y, chunk_size=size, fast=False
    ),
    "rows into memory": lambda model, size: per_sample_grads(
        model,
        F.cross_entropy,
        X,
        Y,
        chunk_size=size,
        out={n: X.new_empty(37, *p.shape) for n, p in model.named_parameters()},
    ),
    "with aux": lambda model, size: per_sample_grad_norms(
        model, lambda o, y: (o.sum(), o), X, Y, chunk_size=size, has_aux=True
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("samples", [1, 2, 5, 100])
def test_halves_where_it_does_not_fit(monkeypatch, name, samples):
    """The result is the same, and finished chunks are not run again."""
    memory = Memory(monkeypatch, 100)
    model = Hungry(memory).double()
    expected = CALLS[name](model, None)
    memory.samples, memory.ran, memory.peak = samples, [], 0
    assert_same(CALLS[name](model, "auto"), expected)
    done = [count for count in memory.ran if count <= samples]
    assert sum(done) == 37
    assert memory.failed == (0 if samples == 100 else memory.failed)
    assert max(done) >= min(samples, 4) // 2 or samples == 1
    if samples == 100:  # a first few, then all that is left
        assert memory.ran == [4, 33]


def test_one_sample_that_does_not_fit_raises(monkeypatch):
    model = Hungry(Memory(monkeypatch, 0)).double()
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        CALLS["norms"](model, "auto")


def test_other_errors_are_not_taken_for_it(monkeypatch):
    memory = Memory(monkeypatch, 100)
    memory.take = lambda count: (_ for _ in ()).throw(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        CALLS["norms"](Hungry(memory).double(), "auto")


def test_as_many_as_fit_into_half(monkeypatch):
    """10 bytes a sample, 200 free: ten at a time after the first four."""
    memory = Memory(monkeypatch, 100, free=200, cost=10)
    CALLS["norms"](Hungry(memory).double(), "auto")
    assert memory.ran == [4, 10, 10, 10, 3]


def test_an_earlier_peak_hides_what_a_chunk_took(monkeypatch):
    """Then the chunk grows by doubling, while that is safe."""
    memory = Memory(monkeypatch, 100, free=2000, cost=10)
    memory.peak = 390
    CALLS["norms"](Hungry(memory).double(), "auto")
    assert memory.ran == [4, 10, 23]


@pytest.mark.parametrize("chunk_size,first", [("auto", "memory"), (None, "forward")])
def test_when_rows_get_their_memory(monkeypatch, chunk_size, first):
    """Rows get memory in backward, or before the first chunk if it is measured."""
    events = []
    memory = Memory(monkeypatch, 100)
    monkeypatch.setattr(memory, "take", lambda count: events.append("forward"))
    made = {
        "memory": (rows._RowsOfCall, "_fresh"),
        "rows": (rows._RowsPart, "take"),
    }
    for event, (kind, name) in made.items():
        original = getattr(kind, name)

        def noted(self, *args, event=event, original=original):
            events.append(event)
            return original(self, *args)

        monkeypatch.setattr(kind, name, noted)
    CALLS["rows"](Hungry(memory).double(), chunk_size)
    assert events.count("memory") == (4 if chunk_size else 0)
    assert events[0] == first and "rows" in events


def test_the_system_tells():
    """The numbers are sensible if there is /proc, and there is always an answer."""
    device = torch.device("cpu")
    used, peak = chunks._used(device)
    assert 0 <= used <= peak
    assert 2**20 < chunks._free(device) < 2**50
    assert chunks._lines("/nowhere") == {}


def test_the_cpu_allocator_says_so_in_words(monkeypatch):
    memory = Memory(monkeypatch, 100)
    model, real = Hungry(memory).double(), memory.take

    def take(count):
        if count > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        real(count)

    expected = CALLS["norms"](model, None)
    memory.take = take
    assert_same(CALLS["norms"](model, "auto"), expected)
    assert max(memory.ran[1:]) == 2
