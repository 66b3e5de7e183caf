"""Speed rules: the numbers are the same with and without them, under every transform,
and the rules do not run outside a block."""

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import slow
import torch
import torch.nn.functional as F
from measured import change_regimes, take_regimes_of_a_gpu
from operator_rules import TRANSFORMS, X, rows, tensors, watch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from vmapsafe import per_sample, per_sample_grads
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe._block import operators
from vmapsafe._rule import operator_rules
from vmapsafe.rules import convolution
from vmapsafe.rules.convolution_regimes import Winner
from vmapsafe.testing import assert_same

MEASURED = convolution.REGIMES["cpu"]
(RULE,) = operator_rules()[convolution._backward]

# what torch does for padding="same" on one side, which is tested here
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def force(monkeypatch, algorithm):
    """Use one algorithm for all shapes, and copy windows in several parts."""
    one = {"batch": 0, "winners": (Winner(algorithm),), "columns": 100}
    change_regimes(monkeypatch, convolution=one)


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Let the rule take small calls too."""
    force(monkeypatch, "products")


@pytest.fixture
def taken(monkeypatch):
    """The calls that the rule took while a block was open."""
    calls = []
    watch(monkeypatch, [RULE], lambda rule, call: calls.append(call))
    return calls


@pytest.fixture
def net():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Conv2d(3, 2, 1, stride=2),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Conv1d(2, 2, 2, stride=2, bias=False),
        nn.Flatten(),
    ).double()
    net(torch.randn(6, 2, 4, 4, dtype=torch.float64))
    return net


@pytest.fixture
def kinds():
    """Every kind of convolution there is in two dimensions."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, (2, 3), padding="same"),  # more on one side than on the other
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2, dilation=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2, stride=2, output_padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(2, 2, 3, groups=2, padding=1, bias=False),
        nn.Flatten(),
    ).double()
    net(torch.randn(6, 2, 4, 4, dtype=torch.float64))
    return net


UNUSED = {"vmap(jacfwd)"}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_same_as_torchs_own(name, net, taken):
    """fast=True and fast=False give the same in float64, and the rule was there."""
    with vmap_safe(net, fast=False):
        expected = TRANSFORMS[name](net, tensors(net), X)
    assert not taken
    with vmap_safe(net, fast=True):
        actual = TRANSFORMS[name](net, tensors(net), X)
    assert_same(actual, expected)
    assert bool(taken) == (name not in UNUSED)


@pytest.mark.parametrize("algorithm", ["products", "sums"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_kind_under_every_transform(name, algorithm, kinds, taken, monkeypatch):
    """Groups, dilation, transposed and padding on one side are no exceptions."""
    force(monkeypatch, algorithm)
    test_same_as_torchs_own(name, kinds, taken)


@pytest.mark.parametrize("algorithm", ["torch", *convolution.ALGORITHMS])
def test_quantities_by_every_algorithm(algorithm, kinds, monkeypatch):
    """Rows, norms and weighted sums in one pass equal those of a loop."""
    force(monkeypatch, algorithm)
    x, y = torch.randn(5, 2, 4, 4).double(), torch.randint(3, (5,))
    expected = slow.rows_in(kinds, "eval", F.cross_entropy, x, y)
    weights = torch.randn(5).double()
    wanted = {"rows": q.Rows(), "norms": q.Norms(), "sum": q.WeightedSum(weights)}
    found = per_sample(kinds, F.cross_entropy, x, y, want=wanted)
    assert_same(found["rows"], expected)
    assert_same(found["norms"], slow.norms(expected))
    assert_same(found["sum"], slow.weighted(expected, weights))
    memory = {name: torch.empty_like(rows) for name, rows in expected.items()}
    per_sample_grads(kinds, F.cross_entropy, x, y, out=memory)
    assert_same(memory, expected)


def test_without_recording(net, monkeypatch):
    """Under no_grad parameters that require gradients cost no more than others."""
    plain, calls = convolution._plain_products, []
    monkeypatch.setattr(
        convolution, "_plain_products", lambda *given: calls.append(1) or plain(*given)
    )
    params = dict(net.named_parameters())
    with vmap_safe(net, fast=True):
        rows(net, params, X)
        assert not calls
        with torch.no_grad():
            actual = rows(net, params, X)
    assert len(calls) == 3
    assert_same(actual, rows(net.eval(), tensors(net), X))


@pytest.mark.parametrize("channels_last", [False, True])
def test_dual_numbers_around(net, taken, channels_last):
    """Tangents made by hand, not by torch.func, pass through."""
    x = X.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else X

    def tangents(fast):
        with vmap_safe(net, fast=fast), forward_ad.dual_level():
            found = rows(net, tensors(net), forward_ad.make_dual(x, x.cos()))[0]
            return {n: forward_ad.unpack_dual(t).tangent for n, t in found.items()}

    expected = tangents(False)
    assert not taken
    assert_same(tangents(True), expected)
    assert taken


@pytest.mark.parametrize("name", ["vmap(grad)", "grad(vmap(grad))"])
def test_compiled(name, net, taken):
    """torch.compile gives the same numbers, and its graph contains the rule."""
    torch._dynamo.reset()

    def function(params, x):
        return TRANSFORMS[name](net, params, x)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with vmap_safe(net, fast=False):
        expected = function(tensors(net), X)
    with vmap_safe(net, fast=True):
        assert_same(compiled(tensors(net), X), expected)
    assert taken


def test_compiled_around_the_block(net):
    """In a block inside a compiled function torch's own rules give the same numbers."""
    torch._dynamo.reset()

    def function(params, x):
        with vmap_safe(net, fast=True):
            return rows(net, params, x)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled(tensors(net), X), function(tensors(net), X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(net, taken, dtype):
    """Inside autocast the dtypes of the rows are those without the rule."""
    net = net.float()
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with vmap_safe(net, fast=False):
            expected = rows(net, tensors(net), x)
        with vmap_safe(net, fast=True):
            actual = rows(net, tensors(net), x)
    assert taken
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert_same(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_backward_inside_autocast_is_not_rounded(taken):
    """A convolution in float32 stays float32 if its backward runs under autocast:
    torch's own rule takes it."""
    w, x = torch.randn(3, 2, 1, 1), torch.randn(4, 1, 2, 6, 6)

    def loss(w, x):
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, w).tanh().sum()

    with vmap_safe(nn.ReLU(), fast=True), torch.autocast("cpu", torch.bfloat16):
        actual = vmap(grad(loss), (None, 0))(w, x)
    expected = vmap(grad(loss), (None, 0))(w, x)
    assert not taken
    assert_same(actual, expected, rtol=1e-5, atol=1e-5)


# -- What the rule does not take ------------------------------------------------------


class Convolutions(TorchDispatchMode):
    """The groups of the weight gradients that torch computes below vmap."""

    def __init__(self):
        super().__init__()
        self.groups = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is convolution._backward and args[-1][1]:
            self.groups.append(args[-2])
        return function(*args, **(kwargs or {}))


LAYERS = {
    "images": nn.Conv2d(2, 4, 3),
    "one position": nn.Conv2d(2, 4, 1),
    "groups": nn.Conv2d(2, 4, 3, groups=2),
    "depthwise": nn.Conv2d(2, 2, 3, groups=2),
    "dilation": nn.Conv2d(2, 4, 2, dilation=2),
    "transposed": nn.ConvTranspose2d(2, 3, 3),
    "three dimensions": nn.Conv3d(2, 3, 2),
    "padding around one position": nn.Conv2d(2, 3, 1, padding=1),
}


@pytest.mark.parametrize("algorithm", ["torch", *convolution.ALGORITHMS])
@pytest.mark.parametrize("name", LAYERS)
def test_who_computes(name, algorithm, taken, monkeypatch):
    """If the table selects torch's own rule, torch computes one convolution with groups
    for each slice. Otherwise torch does not compute a weight gradient."""
    force(monkeypatch, algorithm)
    layer = LAYERS[name].double()
    x = torch.randn(3, 2, 2, 5, 5, 5, dtype=torch.float64)
    if not isinstance(layer, nn.Conv3d):
        x = x[..., 0]
    expected = rows(layer, tensors(layer), x)
    with vmap_safe(layer, fast=True), Convolutions() as seen:
        actual = rows(layer, tensors(layer), x)
    assert_same(actual, expected)
    assert bool(taken) == (algorithm != "torch")
    assert seen.groups == ([] if taken else [3 * layer.groups])


ENTRIES = {
    "depthwise": (nn.Conv2d(64, 64, 3, groups=64), 8, "torch"),
    "depthwise, large": (nn.Conv2d(8, 8, 5, groups=8), 20, "products"),
    "depthwise, one position": (nn.Conv2d(32, 32, 3, 1, 1, groups=32), 1, "products"),
    "depthwise, few positions": (nn.Conv2d(128, 128, 3, 1, 1, groups=128), 2, "sums"),
    "few channels a group": (nn.Conv2d(32, 32, 3, groups=8), 20, "products"),
    "many channels a group": (nn.Conv2d(32, 32, 3, groups=2), 20, "torch"),
    "many positions": (nn.Conv2d(64, 64, 3), 40, "torch"),
    "few positions": (nn.Conv2d(64, 128, 3), 6, "products"),
    "one position": (nn.Conv2d(32, 64, 2), 2, "products"),
    "a kernel of one position": (nn.Conv2d(16, 8, 1), 8, "products"),
    "few channels": (nn.Conv2d(3, 16, 3), 5, "turned products"),
    "a first layer": (nn.Conv2d(3, 32, 3), 32, "turned products"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_table_of_a_cpu(name, taken, monkeypatch):
    """The table itself, with one shape for each of its parts."""
    every = replace(MEASURED, batch=0)
    monkeypatch.setitem(convolution.REGIMES, "cpu", every)
    layer, size, algorithm = ENTRIES[name]
    x = torch.randn(2, 1, layer.in_channels, size, size)
    with vmap_safe(layer, fast=True):
        rows(layer, tensors(layer), x)
    assert [convolution.algorithm(call) for call in taken] == (
        [] if algorithm == "torch" else [algorithm]
    )


def test_no_algorithm_without_a_winner(net, taken, monkeypatch):
    change_regimes(monkeypatch, convolution={"winners": ()})
    with vmap_safe(net, fast=True):
        rows(net, tensors(net), X)
    assert not taken


def test_other_precisions_are_left_alone(net, taken, monkeypatch):
    """Matrix products that may be rounded."""
    net = net.float()
    torch.set_float32_matmul_precision("medium")
    try:
        with vmap_safe(net, fast=True):
            rows(net, tensors(net), X.float())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not taken


def test_regimes_of_a_gpu(taken, monkeypatch):
    """Only a kernel of one position is a product: it needs no copy of the input."""
    take_regimes_of_a_gpu(monkeypatch)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 1)).double()
    with vmap_safe(net, fast=False):
        expected = rows(net, tensors(net), X)
    with vmap_safe(net):
        assert_same(rows(net, tensors(net), X), expected)
    assert [call["weight"].shape[2:].numel() for call in taken] == [1]


# -- When rules apply -----------------------------------------------------------------


def test_nothing_outside_a_block(net, taken):
    """Before the first block and after the last one torch's own rules run."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    rows(net, tensors(net), X)
    with vmap_safe(net, fast=True), vmap_safe(net, fast=True):
        pass
    rows(net, tensors(net), X)
    assert not taken


def test_an_inner_block_does_not_end_an_outer_one(net, taken):
    with vmap_safe(net, fast=True):
        with vmap_safe(net, fast=True):
            pass
        rows(net, tensors(net), X)
    assert taken


def test_a_slow_block_inside_a_fast_one(net, taken):
    """fast=False wins while it is open, and no longer."""
    with vmap_safe(net, fast=True):
        with vmap_safe(net, fast=False), vmap_safe(net, fast=True):
            rows(net, tensors(net), X)
        assert not taken
        rows(net, tensors(net), X)
    assert taken


def test_an_entry_that_fails_counts_for_nothing(taken):
    """After a block that was refused, its rules do not apply."""
    with pytest.raises(ValueError), vmap_safe(nn.LazyBatchNorm1d(), fast=True):
        pass
    assert not operators._in_force(torch.ops.aten.addmm.default)


def test_other_threads_get_the_rules_too(net, taken):
    """A block is open in this thread, the other one computes."""
    w, x = torch.randn(3, 2, 3, 3), torch.randn(4, 1, 2, 6, 6)
    found = []

    def compute():
        loss = lambda w, x: F.conv2d(x, w).tanh().sum()  # noqa: E731
        found.append(vmap(grad(loss), (None, 0))(w, x))

    with vmap_safe(net, fast=True):
        rows(net, tensors(net), X)
        taken.clear()
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    assert taken and found
    compute()
    assert_same(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_blocks_come_and_go_while_another_thread_computes():
    """No error, no wrong number: the kernels stay where they are."""
    w, x = torch.randn(3, 2, 3, 3), torch.randn(4, 1, 2, 6, 6)
    derive = vmap(grad(lambda w, x: F.conv2d(x, w).tanh().sum()), (None, 0))
    model = nn.ReLU()
    done, wrong = threading.Event(), []

    def compute():
        while not done.is_set():
            if not torch.allclose(derive(w, x), expected, atol=1e-5):
                wrong.append(True)

    thread = threading.Thread(target=compute)
    with vmap_safe(model, fast=True):
        expected = derive(w, x)
        thread.start()
    for _ in range(2000):
        with vmap_safe(model, fast=True):
            pass
    assert operators._libraries
    done.set()
    thread.join()
    assert not wrong


def run(program):
    """A program in a process of its own, with one thread. A warning is an error."""
    begin = """
import threading
from dataclasses import replace
import warnings
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from vmapsafe import batched, per_sample_grads, vmap_safe
from vmapsafe._rule import operator_rules

# The operators whose kernel for vmap is not torch's own, as the dispatcher says.
def replaced():
    names = [operator.name() for operator in operator_rules()]
    dump = torch._C._dispatch_dump
    return {n for n in names if "FuncTorchBatched (inactive)" in dump(n)}

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten())
net.append(nn.Linear(16 * 36, 4))
x = torch.randn(64, 3, 8, 8)
net(x)
params = dict(net.named_parameters())
def rows(net):
    one = lambda p, x: functional_call(net, p, (x[None],)).square().sum()
    return vmap(grad(one), (None, 0))(params, x)
assert not replaced()
"""
    command = [sys.executable, "-W", "error", "-c", begin + program]
    subprocess.run(command, check=True)


def test_no_warning_and_no_filter_left():
    """The first block of a process does not warn and does not change the filters."""
    run("""
rows(net.eval())  # torch changes them here
filters = list(warnings.filters)
with vmap_safe(net):
    rows(net)
    assert replaced()
assert warnings.filters == filters
""")


def test_kernels_wait_for_a_call_that_leads_to_them():
    run("""
with vmap_safe(net):
    assert not replaced()
    net(x), net[0](x)  # of no vmap
    assert not replaced()
    vmap(net[0])(x)
    assert replaced() == {"aten::convolution_backward"}
    rows(net)
    assert {"aten::native_batch_norm", "aten::native_batch_norm_backward"} < replaced()
    assert "aten::native_layer_norm" not in replaced()
with vmap_safe(net, fast=False):
    rows(net)
    assert not replaced()
""")


def test_small_calls_do_without():
    run("""
net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4))
net(torch.randn(8, 4))
with vmap_safe(net):
    vmap(batched(net))(torch.randn(3, 2, 4))
    assert not replaced()
""")


def test_calls_that_torch_refuses():
    """The error is torch's own, however the arguments are given."""
    run("""
def error(function):
    try:
        return vmap(function)(x).shape
    except (TypeError, RuntimeError) as found:
        return str(found)
calls = [
    lambda x: F.linear(x), lambda x: F.linear(x, weight=x), lambda x: F.linear(x, 3),
    lambda x: F.linear(x.sum(), x), lambda x: F.conv2d(x), lambda x: F.conv2d(x, None),
    lambda x: F.batch_norm(x), lambda x: F.batch_norm(x, None, None, eps=1),
    lambda x: F.embedding(x, x),
]
expected = [error(call) for call in calls]
with vmap_safe(net):
    assert [error(call) for call in calls] == expected
""")


def test_no_kernel_stays_after_the_last_block():
    run("""
def check(*inside):
    before = rows(net.eval())
    net.train()
    with vmap_safe(net), vmap_safe(nn.ReLU()):
        found = rows(net)
        assert replaced()
    assert not replaced()
    for name in before:
        assert torch.allclose(found[name], before[name], atol=1e-4)
for _ in range(3):
    check()
outer = vmap_safe(nn.ReLU())
outer.__enter__()
with vmap_safe(net):
    rows(net)
assert replaced()  # a block is open
outer.__exit__(None, None, None)
assert not replaced()
try:
    with vmap_safe(net):
        rows(net)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
assert not replaced()
vmap_safe(net)(rows)(net)
assert not replaced()
""")


def test_kernels_stay_while_another_thread_runs():
    """They go when a block closes and there is no other thread."""
    run("""
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
with vmap_safe(net):
    rows(net)
assert replaced()
with vmap_safe(nn.ReLU()):
    pass
assert replaced()
stop.set()
thread.join()
with vmap_safe(nn.ReLU()):
    pass
assert not replaced()
""")


def test_a_block_that_closes_inside_a_kernel():
    """A mode sees what a kernel calls, and opens a block of its own there."""
    run("""
from torch.utils._python_dispatch import TorchDispatchMode
seen = []
class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm.default and not seen:
            seen.append(func)
            block.__exit__(None, None, None)
            assert "aten::native_batch_norm" in replaced()
        return func(*args, **(kwargs or {}))
block = vmap_safe(net)
block.__enter__()
with Mode():
    vmap(batched(net[:2]))(x[:, None])
assert seen
with vmap_safe(nn.ReLU()):
    pass
assert not replaced()
""")


def test_per_sample_grads(net, taken):
    """per_sample_grads passes the option on if it uses vmap(grad), as it does for an
    input that requires a gradient. An empty batch has no rows."""

    def loss(out, y):
        return (out - y).square().sum()

    y = torch.randn(2, 4, dtype=torch.float64)
    expected = per_sample_grads(net, loss, X[0], y, fast=False)
    assert not taken
    x = X[0].clone().requires_grad_()
    assert_same(per_sample_grads(net, loss, x, y, fast=True), expected)
    assert taken
    assert_same(per_sample_grads(net, loss, X[0], y, fast=True), expected)
    empty = per_sample_grads(net, loss, X[0][:0], y[:0], fast=True)
    assert empty["0.weight"].shape == (0, 3, 2, 3, 3)


def test_slices_without_samples(net, taken):
    """A slice without samples has no gradient, as in torch."""
    with vmap_safe(net, fast=True):
        actual = rows(net, tensors(net), X[:, :0])[0]
    assert not taken
    assert_same(actual, {n: t.new_zeros(3, *t.shape) for n, t in tensors(net).items()})


def test_in_force_unless_switched_off(net, taken):
    """The user's own vmap(grad) uses the rule without a change."""
    with vmap_safe(net):
        rows(net, tensors(net), X)
    assert taken
