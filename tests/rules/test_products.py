"""Products by oneDNN equal those in float64, in every layout that it takes."""

import functools

import pytest
import torch
import torch.nn.functional as F
from measured import change_regimes
from torch.func import grad, vmap

from vmapsafe._block import operators
from vmapsafe._rule import operator_rules
from vmapsafe.rules import products
from vmapsafe.rules.kept_calls import KEPT_CALLS

SHAPES = [(3, 5, 7), (5, 3, 7), (4, 4, 1), (1, 6, 9)]


@pytest.fixture
def calls(monkeypatch):
    """It takes products of every size; counts its calls."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    regime = products.Regime(least=0, longest=2**18, turned=2**18)
    monkeypatch.setattr(products, "_regime", lambda: regime)
    made, original = [], products._onednn

    def noted(*args):
        made.append(args)
        return original(*args)

    monkeypatch.setattr(products, "_onednn", noted)
    return made


TURNED = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("turned", TURNED)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(calls, shape, turned):
    rows, others, length = shape
    a, b = torch.randn(rows, length), torch.randn(others, length)
    a, b = (t.mT.contiguous().mT if turn else t for t, turn in zip((a, b), turned))
    expected = (a.double() @ b.double().T).float()
    torch.testing.assert_close(products.product(a, b), expected)
    ((first, *_),) = calls
    assert first.is_contiguous() or not (a.is_contiguous() or b.is_contiguous())
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


def test_input_gradient_of_a_linear_layer(calls):
    """It multiplies with the weight as it lies."""
    x, weight = torch.randn(3, 2, 4, 7), torch.randn(5, 7)
    grad = torch.randn(3, 2, 4, 5)
    kept = KEPT_CALLS[F.linear][0].keep(x, weight)
    expected = grad.double() @ weight.double()
    torch.testing.assert_close(kept.input_gradient(x, grad), expected.float())
    ((_, other, _),) = calls
    assert other.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("factor", [1, 2])
def test_addmm_under_vmap(calls, factor, monkeypatch):
    """It multiplies and adds the bias, unless that has a factor or is watched."""
    change_regimes(monkeypatch, linear=0)
    x, weight, bias = torch.randn(3, 4, 7), torch.randn(5, 7), torch.randn(5)
    expected = factor * bias.double() + x.double() @ weight.double().T

    def run(bias):
        added = functools.partial(torch.addmm, bias, beta=factor)
        return vmap(lambda x: added(x, weight.T))(x)

    (rule,) = operator_rules()[torch.ops.aten.addmm.default]
    with operators.only(rule):
        torch.testing.assert_close(run(bias), expected.float())
        assert len(calls) == (factor == 1)
        biases = torch.stack([bias, -bias])
        found = vmap(run)(biases)
        torch.testing.assert_close(found[0], expected.float())
        gradient = grad(lambda bias: run(bias).sum())(bias)
        torch.testing.assert_close(gradient, torch.full((5,), 12.0 * factor))
        leaf = bias.clone().requires_grad_()
        run(leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, gradient)
    assert len(calls) == (factor == 1)


@pytest.mark.parametrize(
    "lines, regime",
    [
        ("vendor_id : AuthenticAMD\ncpu family : 25\n\n", "AuthenticAMD 25"),
        ("vendor_id : AuthenticAMD\ncpu family : 26\n\n", "AuthenticAMD"),
        ("vendor_id : AuthenticAMD\n", "AuthenticAMD"),
        ("vendor_id : GenuineIntel\ncpu family : 25\n", None),
        ("CPU part : 0xd0c\n", None),
    ],
)
def test_regime_of_a_processor(lines, regime, monkeypatch):
    """By its vendor, and by its family if that has one of its own."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products.Path, "read_text", lambda path: lines)
    assert products._regime.__wrapped__() == products.ONEDNN.get(regime)


def test_what_onednn_does_not_take(calls, monkeypatch):
    """Tensors that something watches, in other layouts, and long sums."""
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    products.product(a.clone().requires_grad_(), b)
    products.product(torch.randn(3, 8)[:, ::2], b)
    torch.func.vmap(products.product, (0, None))(a.unsqueeze(0), b)
    products.product(torch.randn(1, 2**18 + 1), torch.randn(1, 2**18 + 1))
    products.linear(torch.randn(4, 3).mT, b, None)
    assert not calls
    regime = products.Regime(least=0, longest=2**18, turned=3)
    monkeypatch.setattr(products, "_regime", lambda: regime)
    products.product(torch.randn(4, 3).mT, torch.randn(4, 5).mT)
    assert not calls
    products.product(torch.randn(3, 3).mT, torch.randn(3, 5).mT)
    assert len(calls) == 1
