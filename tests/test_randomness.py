"""Random numbers: one draw for all samples with "same", one a sample with "different",
however a call is cut into chunks."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from vmapsafe import (
    VmapSafeRuntimeError,
    batched,
    clipped_grad_sum,
    over,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
)
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe._rows import chunks

N = 6
X = torch.ones(N, 100, dtype=torch.float64)


class Dropped(nn.Module):
    """The gradient of the sum by ``w`` is the mask."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(100, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x * self.w)


def total(output):
    return output.sum()


def total_by_torch(output):
    """A loss with a derivative in it, which only vmap(grad) can differentiate."""
    return output.sum() + 0 * torch.autograd.grad(output.sum(), output)[0].sum()


def with_aux(output):
    return output.sum(), output


def rows(model, loss=total, x=X, **options):
    return per_sample_grads(model, loss, x, **options)["w"]


def norms(model, **options):
    return per_sample_grad_norms(model, total, X, **options).unsqueeze(1)


def clipped(model, **options):
    """A sum of equal masks has the values 0 and N x the mask's."""
    found = clipped_grad_sum(model, total, X, max_grad_norm=1e9, **options)["w"]
    return (found / found.max()).round(decimals=9).unique().unsqueeze(0) - 1


def sketch(model, **options):
    return per_sample_sketch(model, total, X, k=5, **options)


def into(model, **options):
    given = {"w": torch.empty(N, 100, dtype=torch.float64)}
    return per_sample_grads(model, total, X, out=given, **options)["w"]


def aux(model, **options):
    return per_sample_grads(model, with_aux, X, has_aux=True, **options)[1]


def aux_of_norms(model, **options):
    return per_sample_grad_norms(model, with_aux, X, has_aux=True, **options)[1]


def by_batched(model, randomness, chunk_size, **options):
    if chunk_size == "auto":
        chunk_size = 4
    with vmap_safe(model):
        return batched(model, randomness=randomness, chunk_size=chunk_size)(X)


def inside_grad(model, **options):
    """A call under a transform, whose levels the generators do not know."""
    found = []

    def scaled(scale):
        found.append(rows(model, x=X * scale, **options))
        return found[0].sum()

    grad(scaled)(torch.ones((), dtype=torch.float64))
    with torch.no_grad():
        return vmap(lambda x: rows(model, x=x, **options), randomness="same")(X[None])[
            0
        ]


PATHS = {
    "rows": rows,
    "rows by vmap": lambda m, **o: rows(m, fast=False, **o),
    "rows of a loss with a derivative": lambda m, **o: rows(m, total_by_torch, **o),
    "rows with outer derivatives": lambda m, **o: rows(
        m, x=X.clone().requires_grad_(), **o
    ).detach(),
    "rows into memory": into,
    "rows in sync": lambda m, **o: rows(m, mode="sync", **o),
    "jacobian rows": lambda m, **o: rows(m, mode="sync", rows="jacobian", **o),
    "detached rows": lambda m, **o: rows(m, mode="sync", rows="detached", **o),
    "inside grad and vmap": inside_grad,
    "norms": norms,
    "clipped": clipped,
    "sketch": sketch,
    "aux": aux,
    "aux of norms": aux_of_norms,
    "batched": by_batched,
}
CHUNKS = [None, 1, 2, 4, 6, "auto"]
IN_SYNC = ("rows in sync", "jacobian rows", "detached rows")  # "auto" is refused there
CASES = [
    (path, chunk)
    for path in PATHS
    for chunk in CHUNKS
    if chunk != "auto" or path not in IN_SYNC
]


@pytest.fixture
def model():
    return Dropped().train()


def distinct(found):
    return len(torch.unique(found, dim=0))


@pytest.mark.parametrize("path,chunk_size", CASES, ids=str)
def test_same(model, path, chunk_size):
    """One mask, the same as without chunks; the next call draws another."""
    torch.manual_seed(1)
    whole = PATHS[path](model, randomness="same", chunk_size=None)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = PATHS[path](model, randomness="same", chunk_size=chunk_size)
    assert distinct(found) == 1 and torch.equal(found, whole)
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(after, before)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "clipped"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4])
def test_different(model, path, chunk_size):
    """A mask a sample; the same ones from the same seed, others in the next call."""
    if path == "inside grad and vmap":
        pytest.skip("one vmap of two would have to say so too")
    torch.manual_seed(1)
    first = PATHS[path](model, randomness="different", chunk_size=chunk_size)
    second = PATHS[path](model, randomness="different", chunk_size=chunk_size)
    torch.manual_seed(1)
    again = PATHS[path](model, randomness="different", chunk_size=chunk_size)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert distinct(first) >= N - 2  # of norms, some agree by chance
    if path not in ("norms", "sketch"):
        assert distinct(torch.cat([first, second])) == 2 * N


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_all_paths_draw_the_same(model, randomness, chunk_size):
    """With one seed, norms, rows and a loss that is run again use the same draws."""
    found = {}
    for path in ("rows", "rows by vmap", "rows of a loss with a derivative", "norms"):
        torch.manual_seed(1)
        found[path] = PATHS[path](model, randomness=randomness, chunk_size=chunk_size)
    expected = found.pop("norms").squeeze(1)
    for got in found.values():
        assert torch.equal(got, found["rows"])
        assert torch.allclose(got.norm(dim=1), expected)
    torch.manual_seed(1)
    got = per_sample_grad_norms(
        model, total_by_torch, X, randomness=randomness, chunk_size=chunk_size
    )
    assert torch.allclose(got, expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("function", [rows, norms])
def test_a_chunk_that_runs_out_of_memory_draws_again(monkeypatch, randomness, function):
    """The one that did not fit leaves no trace in the generator."""
    model = Dropped().train()
    sizes = []

    def fails_first(module, args, output):
        sizes.append(len(sizes))
        if len(sizes) in fail:
            raise torch.OutOfMemoryError("injected")

    model.drop.register_forward_hook(fails_first)
    monkeypatch.setattr(chunks, "_free", lambda device: 2**40)
    monkeypatch.setattr(chunks, "_used", lambda device: (0, 0))
    fail = {1}  # of 4 samples, then 2 and so on
    torch.manual_seed(1)
    found = function(model, randomness=randomness, chunk_size="auto")
    fail, sizes[:] = {}, []
    torch.manual_seed(1)
    expected = function(model, randomness=randomness, chunk_size=2)
    assert torch.equal(found, expected)


def test_over_draws_for_each_batch(model):
    """A call for each batch, and chunks of it draw the same."""
    batches = [X, X, X[:2]]
    torch.manual_seed(1)
    found = list(
        over(batches, per_sample_grads, model, total, randomness="same", chunk_size=2)
    )
    assert [distinct(one["w"]) for one in found] == [1, 1, 1]
    assert distinct(torch.stack([one["w"][0] for one in found])) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("path,chunk_size", CASES, ids=str)
def test_same_on_a_gpu(model, monkeypatch, path, chunk_size):
    monkeypatch.setitem(globals(), "X", X.cuda())
    if path == "rows into memory":
        pytest.skip("makes its memory on the CPU")
    assert (
        distinct(PATHS[path](model.cuda(), randomness="same", chunk_size=chunk_size))
        == 1
    )


# -- While a CUDA graph is captured ----------------------------------------------------


@pytest.fixture
def captured(monkeypatch):
    """There torch does not give the state of CUDA's generator (read in torch 2.13)."""

    def refused(*args):
        raise RuntimeError("cannot get the state during capture")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", refused)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", refused)


@pytest.mark.parametrize("path", ["rows", "norms", "clipped", "sketch", "batched"])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_captured(path, randomness, model, captured):
    """All samples at once draw once, for which no state is needed."""
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(PATHS[path](model, randomness=randomness, chunk_size=None))
    assert torch.equal(*found)


def test_captured_without_draws(model, captured):
    """In chunks and with two looks."""
    model.eval()
    want = q.WeightedSum(lambda norms: 1 / norms)
    per_sample(model, total, X, want=want, chunk_size=2)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: norms(model, randomness="same", chunk_size=2),
        lambda model: rows(model, total_by_torch, randomness="different"),
        lambda model: per_sample(
            model,
            total,
            X,
            want=q.WeightedSum(lambda norms: 1 / norms),
            randomness="different",
            chunk_size=2,
        ),
    ],
    ids=["the same in chunks", "as before an attempt", "two looks at chunks"],
)
def test_captured_draws_cannot_be_made_again(call, model, captured):
    with pytest.raises(VmapSafeRuntimeError, match="a CUDA graph is captured"):
        call(model)
