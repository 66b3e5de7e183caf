"""Products by oneDNN equal those in float64, in every layout that it takes."""

import pytest
import torch

from vmapsafe.rules import products

SHAPES = [(3, 5, 7), (5, 3, 7), (4, 4, 1), (1, 6, 9)]


@pytest.fixture
def calls(monkeypatch):
    """It takes products of every size; counts its calls."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    regime = products.Regime(least=0, longest=2**18)
    monkeypatch.setattr(products, "_regime", lambda: regime)
    made, original = [], products._onednn

    def noted(*args):
        made.append(args)
        return original(*args)

    monkeypatch.setattr(products, "_onednn", noted)
    return made


@pytest.mark.parametrize("turned", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(calls, shape, turned):
    rows, others, length = shape
    a, b = torch.randn(rows, length), torch.randn(others, length)
    a, b = (t.mT.contiguous().mT if turn else t for t, turn in zip((a, b), turned))
    expected = (a.double() @ b.double().T).float()
    torch.testing.assert_close(products.product(a, b), expected)
    assert len(calls) == 1
    doubles = products.product(a.double(), b.double())
    torch.testing.assert_close(doubles, a.double() @ b.double().T)
    assert len(calls) == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [(), (3,), (3, 2)])
def test_linear(calls, dims, bias):
    x, weight = torch.randn(*dims, 4, 7), torch.randn(5, 7)
    added = torch.randn(5) if bias else None
    expected = x.double() @ weight.double().T + (added.double() if bias else 0)
    torch.testing.assert_close(products.linear(x, weight, added), expected.float())
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight, added).dtype == torch.bfloat16
    assert len(calls) == 1


def test_what_onednn_does_not_take(calls):
    """Tensors that something watches, in other layouts, and very long sums."""
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    products.product(a.clone().requires_grad_(), b)
    products.product(torch.randn(3, 8)[:, ::2], b)
    torch.func.vmap(products.product, (0, None))(a.unsqueeze(0), b)
    products.product(torch.randn(1, 2**18 + 1), torch.randn(1, 2**18 + 1))
    assert not calls
