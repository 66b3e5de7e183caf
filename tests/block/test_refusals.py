"""Which errors of vmap a loop over the slices avoids, told from all others."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from vmapsafe import vmap_safe
from vmapsafe._block.refusals import avoided_by_a_loop, is_of_checkpoint


@pytest.fixture(autouse=True)
def no_frames_are_left():
    """In torch 2.12 a checkpoint that has raised leaves its hooks in force for as long
    as its frames are there."""
    yield
    gc.collect()


class OldForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class WithoutRule(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def assigned(x):
    x = x.clone()
    x[x > 0] = 0
    return x


def written(x):
    y = torch.zeros(3)
    y[0] = x[0]
    return y


def packed(x, net=nn.LSTM(1, 2, batch_first=True)):
    return net(pack_padded_sequence(x[None, :, None], torch.tensor([2]), True))[0].data


AVOIDED = {
    "item": lambda x: x * x.sum().item(),
    "number": lambda x: x * float(x.sum()),
    "condition": lambda x: x if x.sum() > 0 else -x,
    "list": lambda x: torch.tensor(x.tolist()),
    "numpy": lambda x: torch.from_numpy(x.numpy()) + 1,
    "mask": lambda x: x[x > 0].sum(),
    "masked select": lambda x: torch.masked_select(x, x > 0).sum(),
    "mask, assigned": assigned,
    "nonzero": lambda x: x.nonzero().sum(),
    "comparison": lambda x: x if torch.equal(x, x) else -x,
    "comparison, not exact": lambda x: x if torch.allclose(x, x) else -x,
    "old autograd.Function": OldForm.apply,
    "autograd.Function without a rule": WithoutRule.apply,
    "checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=True),
    "checkpoint of the other kind": grad(
        lambda x: checkpoint(torch.sin, x, use_reentrant=False).sum()
    ),
    "written": written,
    "operation without a rule": lambda x: torch._foreach_add([x], 1.0)[0],
    "packed": packed,
    "data": lambda x: x * x.data.sum(),
    "storage": lambda x: x * x.untyped_storage().nbytes(),
}


def raised(function, x, **options):
    with pytest.raises(Exception) as caught:
        vmap(function, **options)(x)
    return caught.value


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch
@pytest.mark.parametrize("name", AVOIDED)
def test_refusals_of_vmap_are_avoided(name):
    error = raised(AVOIDED[name], torch.ones(4, 3))
    found = avoided_by_a_loop(error)
    assert found is not None and found.why and found.do
    assert is_of_checkpoint(error) == name.startswith("checkpoint")


def test_packed_sequences_in_a_block():
    with vmap_safe(nn.Linear(2, 2)):
        error = raised(packed, torch.ones(4, 3))
    found = avoided_by_a_loop(error)
    assert found is not None and "packed" in found.why
    assert 'fallback="loop"' in str(error)


def reraised(x):
    try:
        return x * x.sum().item()
    except RuntimeError as error:
        raise RuntimeError(str(error)) from error


def with_text(text, kind=RuntimeError):
    def function(x):
        raise kind(text)

    return function


STANDING = {
    "random": (lambda x: x + torch.rand(3)),
    "shape": (lambda x: F.linear(x, torch.ones(2, 4))),
    "shape of a sum": (lambda x: x + torch.ones(2)),
    "dtype": (lambda x: F.linear(x, torch.ones(2, 3, dtype=torch.float64))),
    "device": (lambda x: x + torch.ones(3, device="meta")),
    "statistics": (lambda x: nn.BatchNorm1d(3)(x[None].expand(2, 3))),
    "what is returned": (lambda x: 3),
    "of the user": with_text("vmap: data-dependent control flow"),
    "of the user, in torch's words": reraised,
    "of another kind": with_text("calling .item() on a Tensor", KeyError),
}


@pytest.mark.parametrize("name", STANDING)
def test_other_errors_stand(name):
    assert avoided_by_a_loop(raised(STANDING[name], torch.ones(4, 3))) is None


def test_an_error_that_passes_through_the_users_code():
    """It is still vmap's, though a ``raise`` of the user's hands it on."""

    def function(x):
        try:
            return x * x.sum().item()
        except RuntimeError as error:
            error.add_note("seen")
            raise

    assert avoided_by_a_loop(raised(function, torch.ones(4, 3))) is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpointed_function_does_is_not_the_checkpoint(reentrant):
    function = grad(lambda x: checkpoint(torch.sin, x, use_reentrant=reentrant).sum())
    assert is_of_checkpoint(raised(function, torch.ones(4, 3)))
    if not reentrant:

        def function(x):
            return checkpoint(AVOIDED["item"], x, use_reentrant=False)

        error = raised(function, torch.ones(4, 3))
        assert is_of_checkpoint(error) == ("_NoopSaveInputs" in str(error))  # 2.11
