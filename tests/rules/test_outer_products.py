"""Outer products are never left to bmm, which CUDA makes out of bounds."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from devices import on_fake_cuda
from operator_rules import rows, tensors
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from vmapsafe import per_sample_grads, per_sample_sketch, vmap_safe
from vmapsafe._block import operators
from vmapsafe._rows import record
from vmapsafe._rule import operator_rules
from vmapsafe.rules import outer_products
from vmapsafe.rules.convolution_regimes import REGIMES, Winner
from vmapsafe.testing import assert_same

aten = torch.ops.aten


class Products(TorchDispatchMode):
    """Notes how long the sums of each bmm are."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in (aten.bmm.default, aten.baddbmm.default):
            self.lengths.append(args[-1].size(1))
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def on_every_device(monkeypatch):
    """The rules hold on the CPU too, where their numbers can be compared."""
    table = {
        operator: tuple([replace(rule, devices=None) for rule in rules])
        for operator, rules in operator_rules().items()
        if operator in (aten.mm.default, aten.bmm.default)
    }
    monkeypatch.setattr(operators, "operator_rules", lambda: table)
    found = [rule for rules in table.values() for rule in rules]
    monkeypatch.setattr(operators, "corrections", lambda: found)


class Nets:
    """Networks whose weight gradients, or forwards, are outer products."""

    class Explicit(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return torch.bmm(x.unsqueeze(2), (x @ self.weight).unsqueeze(1))

    linear = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))
    narrow = nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 2))
    explicit = Explicit()


INPUTS = {"(1, C)": torch.randn(5, 1, 4), "(1, 1, C)": torch.randn(5, 1, 1, 4)}
CALLS = [
    *[(net, x) for net in (Nets.linear, Nets.narrow) for x in INPUTS.values()],
    (Nets.explicit, torch.randn(5, 1, 4)),
]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("net, x", CALLS)
def test_within_a_users_own_vmap(net, x, fast, on_every_device):
    """They are right, and without the rules bmm would make them."""
    net, x = net.double(), x.double()
    params = tensors(net)
    expected = []
    for one in x:
        leaves = [p.clone().requires_grad_() for p in params.values()]
        given = dict(zip(params, leaves))
        loss = torch.func.functional_call(net, given, (one,)).square().sum()
        expected.append(torch.autograd.grad(loss, leaves))
    with Products() as seen:
        rows(net, params, x)
    assert 1 in seen.lengths
    with Products() as seen, vmap_safe(net, fast=fast):
        found, _ = rows(net, params, x)
    assert 1 not in seen.lengths
    for row, column in zip(found.values(), zip(*expected)):
        assert_same(row, torch.stack(column))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast(dtype, on_every_device):
    """Autocast multiplies in its dtype, but not float64; so do the rules."""
    net, x = nn.Linear(4, 3).to(dtype), torch.randn(5, 1, 4, dtype=dtype)
    exact, _ = rows(net.double(), tensors(net), x.double())
    net.to(dtype)
    found = []
    for block in (nullcontext(), vmap_safe(net)):
        with torch.autocast("cpu", torch.bfloat16), Products() as seen, block:
            found.append(rows(net, tensors(net), x)[0]["weight"])
    assert 1 not in seen.lengths
    assert_same(found[1], found[0])
    assert found[1].dtype == dtype
    rounded = found[1].bfloat16().to(dtype)
    assert torch.equal(found[1], rounded) == (dtype == torch.float32)
    assert torch.allclose(found[1].double(), exact["weight"], rtol=0.1, atol=0.1)


def test_a_product_that_autocast_casts(on_every_device):
    """The rules cast as torch's own rule does."""
    net, a, b = nn.Linear(2, 2), torch.randn(3, 4, 1), torch.randn(3, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = vmap(torch.mm)(a, b)
        with vmap_safe(net), Products() as seen:
            found = vmap(torch.mm)(a, b)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected) and not seen.lengths


def test_other_dtypes_are_left_to_torch(on_every_device):
    """It raises for two dtypes, where elementwise products would not."""
    net = nn.Linear(2, 2)
    a, b = torch.randn(3, 4, 1), torch.randn(3, 1, 4, dtype=torch.float64)
    with vmap_safe(net), pytest.raises(RuntimeError, match="Float but found Double"):
        vmap(torch.mm)(a, b)


def test_sizes_that_bmm_gets_wrong():
    """On a fake GPU: more numbers than 32 bits count."""
    with FakeTensorMode():
        net = on_fake_cuda(nn.Linear(2, 2))
        x = torch.empty(2**16, 256, 1, device="cuda")
        with vmap_safe(net), Products() as seen:
            found = vmap(lambda x: torch.mm(x, x.mT))(x)
    assert found.numel() == 2**32 and found.device.type == "cuda"
    assert not seen.lengths


def test_rules_hold_on_cuda_only():
    """Elsewhere torch's own rule runs."""
    for operator in (aten.mm.default, aten.bmm.default):
        (rule,) = operator_rules()[operator]
        assert rule.holds_on("cuda") and not rule.holds_on("cpu")


@pytest.mark.parametrize("algorithm", ["products", "turned products"])
@pytest.mark.parametrize("watched", [False, True])
def test_rows_of_the_library(watched, algorithm, monkeypatch):
    """Of linear layers and of convolutions that see one position, also where autograd
    watches them."""
    regime = replace(REGIMES["cuda"], winners=(Winner(algorithm),))
    monkeypatch.setitem(REGIMES, "cuda", regime)
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 2, 1), nn.Flatten())
        net.append(nn.Linear(2, 3))
        x, y = torch.empty(5, 4, 1, 1), torch.empty(5, dtype=torch.long)
    x.requires_grad_(watched)
    with Products() as seen:
        rows = per_sample_grads(net, F.cross_entropy, x, y)
        per_sample_sketch(net, F.cross_entropy, x, y, k=4, kind="kronecker")
    assert rows["0.weight"].shape == (5, 3, 4, 1, 1)
    assert rows["0.weight"].requires_grad == watched
    of_linear = [1] if watched else []  # by vmap(grad), and "meta" is not CUDA
    assert [n for n in seen.lengths if n == 1] == of_linear


def test_batched_product():
    """Sums of every length, into given memory and without."""
    for length in (0, 1, 2):
        a, b = torch.randn(3, 2, length), torch.randn(3, length, 4)
        expected = torch.einsum("bik,bkj->bij", a, b)
        assert_same(outer_products.batched_product(a, b), expected)
        out = torch.empty(3, 2, 4)
        assert outer_products.batched_product(a, b, out) is out
        assert_same(out, expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_autocast_leaves_other_dtypes_alone(dtype, on_every_device):
    """As torch's own does: only real floating-point numbers are cast."""
    a = torch.randint(9, (3, 4, 1)).to(dtype) * 1000
    b = torch.randint(9, (3, 1, 5)).to(dtype) + 1
    with torch.autocast("cpu", torch.bfloat16), vmap_safe(nn.Linear(2, 2)):
        found = vmap(torch.mm)(a, b)
    assert found.dtype == dtype
    assert torch.equal(found, a * b)


class TimesItsWeight(nn.Module):
    """A weight in a product that is not a layer's: autograd makes its rows."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        return self.last(x @ self.weight)


@pytest.mark.parametrize("size", [2**5, 2**7])
def test_rows_that_autograd_would_make_out_of_bounds(size, monkeypatch):
    """They come from vmap(grad), where the rule holds."""
    monkeypatch.setattr(outer_products, "DEVICES", ("meta",))
    by_vmap = []
    monkeypatch.setattr(
        record.Recorded, "backward", lambda *args: by_vmap.append(False)
    )
    with torch.device("meta"):
        net, x = TimesItsWeight(2**12), torch.empty(size, 2**12)
        y = torch.empty(size, dtype=torch.long)
    try:
        rows = per_sample_grads(net, F.cross_entropy, x, y)
        by_vmap.append(rows["weight"].shape == (size, 2**12, 2**12))
    except KeyError:  # nothing was handed on
        pass
    assert by_vmap == [size == 2**7]
