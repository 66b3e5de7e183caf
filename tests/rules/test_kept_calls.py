"""What layers say that per-sample gradients keep of a call equals autograd.

Each function of the table has a call here: one sample's arguments, the input (N, ...).
Some inputs are 0, where a derivative may jump.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from measured import change_regimes, take_regimes_of_a_gpu
from torch import nn

from vmapsafe import per_sample_grad_norms
from vmapsafe._rows import looks
from vmapsafe.rules.kept_calls import KEPT_CALLS, ByFormulas
from vmapsafe.rules.through_time import products

B = 3


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def with_zeros(*shape):
    x = randn(*shape)
    x.view(-1)[::5] = 0
    return x


CALLS = {
    F.linear: lambda: [
        (with_zeros(2, 3), randn(4, 3), randn(4)),
        (with_zeros(2, 5, 3), randn(4, 3), None),
    ],
    products: lambda: [
        (with_zeros(4, 2, 3), randn(4, 3), randn(4)),
        (with_zeros(5, 1, 3), randn(4, 3), None),
    ],
    F.conv1d: lambda: [
        (with_zeros(2, 4, 9), randn(6, 2, 3), randn(6), 2, 1, 1, 2),
        (with_zeros(1, 3, 7), randn(4, 3, 3), None, 1, "same", 2),
    ],
    F.conv2d: lambda: [
        (with_zeros(2, 3, 6, 5), randn(4, 3, 3, 2), randn(4), (1, 2), (2, 0)),
        (with_zeros(1, 4, 5, 5), randn(4, 1, 3, 3), None, 1, 1, 1, 4),
    ],
    F.conv3d: lambda: [(with_zeros(1, 2, 4, 4, 4), randn(3, 2, 2, 2, 2), randn(3))],
    F.embedding: lambda: [
        (torch.tensor([[0, 2, 2], [4, 1, 0]]), randn(5, 3)),
        (torch.tensor([[0, 2, 2], [4, 1, 0]]), randn(5, 3), 2),
    ],
    F.batch_norm: lambda: [
        (with_zeros(4, 3, 5), randn(3), randn(3) ** 2, randn(3), randn(3)),
        (with_zeros(4, 3), None, None, randn(3), None, True),
    ],
    F.group_norm: lambda: [
        (with_zeros(2, 4, 5), 2, randn(4), randn(4)),
        (with_zeros(2, 4, 3, 3), 4, randn(4), None),
    ],
    F.layer_norm: lambda: [
        (with_zeros(2, 4, 5), (5,), randn(5), randn(5)),
        (with_zeros(3, 4, 5), (4, 5), randn(4, 5), None),
        (with_zeros(3, 5).mT, (3,), randn(3), randn(3), 0.1),
    ],
    F.rms_norm: lambda: [
        (with_zeros(2, 4, 5), (5,), randn(5)),
        (with_zeros(3, 4, 5), (4, 5), randn(4, 5), 0.1),
        (with_zeros(3, 5).mT, (3,), randn(3)),
    ],
}


@pytest.mark.parametrize("function", KEPT_CALLS, ids=lambda f: f.__name__)
def test_kept_calls_equal_autograd(function):
    """Output, input gradient and rows, sample by sample."""
    kept, signature = KEPT_CALLS[function]
    assert function in CALLS, f"give CALLS a call of {function.__name__}"
    for given in CALLS[function]():
        arguments = {**signature.bind(given, {})}
        name = signature.names[0]
        one = arguments[name]
        x = torch.stack([one, one.flip(0), one])  # of each sample another
        if x.is_floating_point():
            x[2] *= -0.5
        call = kept.keep(**{**arguments, name: x})
        assert call is not None
        found = call.forward(x)
        y, *saved = (found,) if isinstance(found, torch.Tensor) else found
        grad = torch.randn_like(y)
        owns = [own for own in kept.parameters if arguments[own] is not None]
        for i in range(B):
            leaves = {own: arguments[own].clone().requires_grad_() for own in owns}
            sample = x[i].clone()
            if sample.is_floating_point():
                leaves[name] = sample.requires_grad_()
            want = function(*{**arguments, name: sample, **leaves}.values())
            torch.testing.assert_close(y[i], want.detach(), rtol=1e-10, atol=1e-10)
            grads = torch.autograd.grad(want, list(leaves.values()), grad[i])
            want = dict(zip(leaves, grads))
            if isinstance(call, ByFormulas):
                rows = {o: call.formulas[o].rows(x, grad) for o in owns}
                if call.input_gradient is not None:
                    rows[name] = call.input_gradient(x, grad)
            else:
                wanted = [True, *[arguments[o] is not None for o in kept.parameters]]
                made = call.backward(grad, x, saved, wanted)
                rows = dict(zip((name, *kept.parameters), made))
            for own, expected in want.items():
                torch.testing.assert_close(
                    rows[own][i], expected, rtol=1e-9, atol=1e-9, msg=own
                )


@pytest.mark.parametrize("piece", [None, 10, 2**25])
@pytest.mark.parametrize("magnitude", [1.0, 1e-120, 1e120])
@pytest.mark.parametrize("function", KEPT_CALLS, ids=lambda f: f.__name__)
def test_quantities_without_rows_equal_those_of_rows(
    function, magnitude, piece, monkeypatch
):
    """Also where squares of the input leave the range of float64, and rows do not; as
    on a CPU, and as on a GPU with small and large pieces."""
    if piece:
        take_regimes_of_a_gpu(monkeypatch)
        change_regimes(monkeypatch, formulas={"piece": piece})
    kept, signature = KEPT_CALLS[function]
    for given in CALLS[function]():
        arguments = {**signature.bind(given, {})}
        name = signature.names[0]
        one = arguments[name]
        x = torch.stack([one, one.flip(0), one])
        if x.is_floating_point():
            x[2] *= -0.5
        call = kept.keep(**{**arguments, name: x})
        if not isinstance(call, ByFormulas):
            continue
        y = call.forward(x)
        grad = torch.randn_like(y) / magnitude
        x = x * magnitude if x.is_floating_point() else x
        grad = grad if x.is_floating_point() else grad * magnitude
        for own, formula in call.formulas.items():
            if own == "bias" and magnitude > 1:
                continue
            compare(formula, x, grad)


def compare(formula, x, grad):
    rows = formula.rows(x, grad)
    flat = rows.flatten(1)
    scale = flat.abs().max()
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    weights = torch.randn(len(x), dtype=torch.float64)
    close(formula.sum(x, grad) / scale, rows.sum(0) / scale)
    weighted = formula.weighted(x, grad, weights)
    close(weighted / scale, torch.einsum("b,b...->...", weights, rows) / scale)
    norms = torch.stack([(row / scale).norm() for row in flat])
    close(formula.norms(x, grad) / scale, norms)
    if scale > 1e-100:
        close(formula.squares(x, grad) / scale**2, (rows / scale).square().sum(0))
        several = formula.together(x, grad, {"norms", "sum", "squares"})
        close(several["norms"] / scale, norms)
        close(several["sum"] / scale, rows.sum(0) / scale)
        close(several["squares"] / scale**2, (rows / scale).square().sum(0))
        part = slice(1, 3)
        expected = (flat / scale) @ (flat[part] / scale).T
        found = formula.gram(x, grad, x[part], grad[part])
        close(found / scale**2, expected)
        found = formula.gram(x, grad, x, grad)
        close(found / scale**2, (flat / scale) @ (flat / scale).T)
    for many in (1, 3):
        vectors = torch.randn(many, *formula.shape, dtype=torch.float64)
        expected = (flat / scale) @ vectors.flatten(1).T
        close(formula.dots(x, grad, vectors) / scale, expected)


class LastStep(nn.LSTM):
    def forward(self, x):
        return super().forward(x.mT)[0][:, -1]


NETS = {
    F.linear: lambda: nn.Linear(3, 2),
    products: lambda: LastStep(3, 2, proj_size=1, batch_first=True),
    F.conv1d: lambda: nn.Conv1d(3, 2, 2),
    F.conv2d: lambda: nn.Conv2d(3, 2, 2),
    F.conv3d: lambda: nn.Conv3d(3, 2, 2),
    F.embedding: lambda: nn.Embedding(4, 3),
    F.batch_norm: lambda: nn.BatchNorm1d(3).eval(),
    F.group_norm: lambda: nn.GroupNorm(1, 3),
    F.layer_norm: lambda: nn.LayerNorm(5),
    F.rms_norm: lambda: nn.RMSNorm(5),
}
SHAPES = {F.conv2d: (3, 4, 4), F.conv3d: (3, 3, 3, 3), F.linear: (3,)}


@pytest.mark.parametrize("function", KEPT_CALLS, ids=lambda f: f.__name__)
def test_kept_calls_are_kept(function, monkeypatch):
    """Their parameters come with a formula, and not as rows."""
    streamed = []
    original = looks.Feed.streamed

    def noted(self, name, *rest):
        streamed.append(name)
        return original(self, name, *rest)

    monkeypatch.setattr(looks.Feed, "streamed", noted)
    layer = NETS[function]()
    if function is F.batch_norm:
        layer.running_mean.add_(0.5)  # or the block would warn
    shape = SHAPES.get(function, (3, 5))
    x = torch.randint(4, (2, 3)) if function is F.embedding else torch.randn(2, *shape)
    per_sample_grad_norms(layer, lambda output: output.square().sum(), x)
    assert {*streamed} == {name for name, _ in layer.named_parameters()}
