"""chunk_size="auto" takes what fits, and halves it if it does not."""

import pytest
import torch
import torch.nn.functional as F
from devices import RunsOut
from state import assert_same_state, everything
from torch import nn

from vmapsafe import (
    clipped_grad_sum,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
    quantities,
)
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
    "norms": lambda model, size, **o: per_sample_grad_norms(
        model, F.cross_entropy, X, Y, chunk_size=size, **o
    ),
    "clipped sum": lambda model, size, **o: clipped_grad_sum(
        model, F.cross_entropy, X, Y, chunk_size=size, **o, max_grad_norm=0.4
    ),
    "rows": lambda model, size, **o: per_sample_grads(
        model, F.cross_entropy, X, Y, chunk_size=size, **o
    ),
    "rows by vmap": lambda model, size, **o: per_sample_grads(
        model, F.cross_entropy, X, Y, chunk_size=size, **o, fast=False
    ),
    "rows into memory": lambda model, size, **o: per_sample_grads(
        model,
        F.cross_entropy,
        X,
        Y,
        chunk_size=size,
        **o,
        out={
            n: X.new_empty(37, *p.shape)
            for n, p in model.named_parameters()
            if p.requires_grad
        },
    ),
    "with aux": lambda model, size, **o: per_sample_grad_norms(
        model, lambda o, y: (o.sum(), o), X, Y, chunk_size=size, **o, has_aux=True
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


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()),
        *(nn.Dropout(0.0), nn.Linear(4, 2)),
    )
    model(torch.randn(7, 3))
    model[0].bias.requires_grad_(False)
    model[3].eval()
    return model.double()


@pytest.mark.filterwarnings("ignore:clipped_grad_sum.* in mode:UserWarning")
@pytest.mark.parametrize("mode", ["eval", "no_running_stats", "group_norm", "sync"])
@pytest.mark.parametrize("name", CALLS)
def test_out_of_memory_at_any_moment(name, mode):
    """In forward and backward: the model is as before, the error is torch's own and
    says what to do, and the next call is right."""
    model, options = network(), {"mode": mode, "num_groups": 2}
    if mode == "no_running_stats":
        model[1] = nn.Identity()  # a batch of one has none

    def call():
        return CALLS[name](model, None, **options)

    expected, before = call(), everything(model)
    with RunsOut(10**6) as counted:
        call()
    assert torch.ops.aten._log_softmax_backward_data in counted.seen or "aux" in name
    first = len(expected) if name == "rows into memory" else 0  # which the test makes
    for at in range(first, len(counted.seen), 5):
        with RunsOut(at), pytest.raises(torch.OutOfMemoryError) as caught:
            call()
        assert str(caught.value).startswith("CUDA out of memory. Tried to allocate")
        (note,) = caught.value.__notes__
        assert 'chunk_size="auto"' in note
        assert ("is refused: pass an int" in note) == (mode == "sync")
        of_rows = name in ("rows", "rows by vmap")
        assert ("The rows of all samples take" in note) == of_rows
        assert_same_state(model, before)
    assert_same(call(), expected)


def test_out_of_memory_in_a_second_look_and_for_one_sample(monkeypatch):
    """Notes of chunks: of a number of samples, and of as many as fit."""
    want, model = quantities.WeightedSum(lambda norms: 1 / norms), network()

    def call():
        per_sample(model, F.cross_entropy, X, Y, want=want, chunk_size=20)

    with RunsOut(10**6) as counted:
        call()
    for at in range(0, len(counted.seen), 20):
        with RunsOut(at), pytest.raises(torch.OutOfMemoryError) as caught:
            call()
        (note,) = caught.value.__notes__
        assert note.endswith('"auto" to run as many samples at a time as fit.')
    model = Hungry(Memory(monkeypatch, 0)).double()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        CALLS["norms"](model, "auto")
    (note,) = caught.value.__notes__
    assert "one sample does not fit: choose fewer parameters with params=" in note


@pytest.mark.parametrize(
    "said",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried",
        "DefaultCPUAllocator: not enough memory: you tried",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_runs_out_in_other_words(said, monkeypatch):
    """These errors are a RuntimeError."""
    memory = Memory(monkeypatch, 100)
    memory.take = lambda count: (_ for _ in ()).throw(RuntimeError(said))
    with pytest.raises(RuntimeError, match=said.split(":")[0]) as caught:
        CALLS["norms"](Hungry(memory).double(), None)
    assert 'Pass chunk_size="auto"' in caught.value.__notes__[-1]


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
