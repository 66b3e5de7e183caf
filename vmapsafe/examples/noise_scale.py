"""The gradient noise scale, logged by the training steps themselves.

How large a batch is of use? With G the mean of the samples' gradients and Σ their
covariance, the simple noise scale of McCandlish et al.
(https://arxiv.org/abs/1812.06162, section 2.2) is

    B_simple = tr(Σ) / |G|^2.

In a batch much smaller than that, noise is most of the gradient; a batch much larger
hardly gives a better one. The norms of the samples' gradients and of their mean give
unbiased estimates of tr(Σ) and |G|^2 (appendix A.1), if the samples are independent.

Each training step is one call of ``per_sample`` in ``mode="sync"``. It gives the
losses, the norms, and the sum, which divided by B is the ordinary training gradient.
With ``update_running_stats=True`` it also updates the running statistics as a training
step does. There is not a second pass. The norms are not free: on one CPU thread a step
takes about three times as long as a plain one in this small network, and one and a half
times as long in one with 128 channels.

In "sync" the gradient of a sample is its contribution: that of all losses of the batch,
through this sample's copy of the weights. Contributions add up to the training gradient
but are not independent, because the samples share their statistics. For example, the
sum is orthogonal to the weights of a convolution before BatchNorm (but for eps), and a
single contribution is not. So the logged tr(Σ) says how contributions differ within a
batch. Here it is larger than the noise of the training gradient; |G|^2 comes out too
small, and the noise scale too large. The last table says by how much: it compares the
estimates with how the gradients of many batches really differ. In "eval" samples are
independent and the estimates are unbiased. But they are of the network with fixed
statistics, whose gradient is another one.

Run ``python -m vmapsafe.examples.noise_scale``.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe import per_sample
from vmapsafe import quantities as q
from vmapsafe.examples import digits

TRAINING, BATCH, EPOCHS = 1500, 100, 4
RATE = 0.02
MEASURED = 200  # batches

WANTED = {"losses": q.Losses(), "norms": q.Norms(), "sum": q.Sum()}

Batch = tuple[Tensor, Tensor]
Mode = Literal["sync", "eval"]
MODES: tuple[Mode, ...] = ("sync", "eval")


def main() -> dict[str, float]:
    """Train with a log of the noise scale, and check the log.

    Returns:
        The largest difference of a weight and of a running statistic from those of a
        plain training loop; the largest difference of a norm from that of a
        contribution by hand, relative to the largest norm; the noise scale in the
        first and in the last epoch; and how many times too large the estimate of tr(Σ)
        is in "sync" and in "eval".
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    x, y = images[:TRAINING], labels[:TRAINING]
    model = digits.network()
    plain = copy.deepcopy(model)
    orders = [torch.randperm(TRAINING) for _ in range(EPOCHS)]
    batches = [(x[some], y[some]) for o in orders for some in torch.split(o, BATCH)]
    of_norms = against_copies(model, *batches[0])

    log = train(model, batches).view(EPOCHS, -1, 3).mean(1)
    train_plainly(plain, batches)
    of_weights = largest_difference(model.parameters(), plain.parameters())
    of_statistics = largest_difference(model.buffers(), plain.buffers())
    print(
        f"The training steps log the noise of their gradients. After {len(batches)} "
        "steps the weights differ by\n"
        f"{of_weights:.1e} from those of a plain training loop, the statistics by "
        f"{of_statistics:.1e}, and the first norms\n"
        f"by {of_norms:.1e} from those by hand, relative.\n"
        "In batches much smaller than the noise scale, most of the gradient is noise:"
    )
    for epoch, (loss, trace, square) in enumerate(log.tolist(), 1):
        print(
            f"epoch {epoch}: loss {loss:.2f}, tr(Σ) {trace:5.1f}, |G|² {square:.2f}, "
            f"noise scale {trace / square:3.0f}"
        )

    drawn = [torch.randint(TRAINING, (BATCH,)) for _ in range(MEASURED)]
    samples = [(x[some], y[some]) for some in drawn]
    print(
        "Can the log be trusted? Next to how the gradients of batches really differ:\n"
        f"means over {MEASURED} batches                  tr(Σ)  |G|²  noise scale"
    )
    too_large = {}
    for mode in MODES:
        measured, estimated = measure(model, samples, mode)
        too_large[mode] = float(estimated[0] / measured[0])
        for source, pair in (
            ("estimated from norms     ", estimated),
            ("truth: how batches differ", measured),
        ):
            trace, square = pair.tolist()
            numbers = f"{trace:9.1f}  {square:4.2f}  {trace / square:11.0f}"
            print(f'"{mode}", {source} {numbers}')
    print(
        'In "sync", where samples share their statistics, tr(Σ) comes out '
        f'{too_large["sync"]:.1f} times too large; in "eval"\n{too_large["eval"]:.1f} '
        "times."
    )
    scales = log[:, 1] / log[:, 2]
    return {
        "difference of weights": of_weights,
        "difference of statistics": of_statistics,
        "difference of norms": of_norms,
        "first scale": float(scales[0]),
        "last scale": float(scales[-1]),
        "too large in sync": too_large["sync"],
        "too large in eval": too_large["eval"],
    }


def train(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Train; return the loss, tr(Σ) and |G|² of each step, (steps, 3)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    log = []
    for x, y in batches:
        found = per_sample(
            model,
            F.cross_entropy,
            *(x, y),
            want=WANTED,
            mode="sync",
            update_running_stats=True,
        )
        for name, parameter in model.named_parameters():
            parameter.grad = found["sum"][name] / len(x)
        optimizer.step()
        log.append(torch.stack([found["losses"].mean(), *estimates(found)]))
    return torch.stack(log)


def estimates(found: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """tr(Σ) and |G|², from the norms of B rows and from their sum.

    The estimate of |G|² may be below 0. Divide means over many steps, as the mean of
    quotients is biased.
    """
    norms = found["norms"]
    count = len(norms)
    of_one = norms.square().mean()
    of_all = sum((total / count).square().sum() for total in found["sum"].values())
    trace = (of_one - of_all) / (1 - 1 / count)
    return trace, (count * of_all - of_one) / (count - 1)


def measure(
    model: nn.Module, batches: list[Batch], mode: Mode
) -> tuple[Tensor, Tensor]:
    """tr(Σ) and |G|², from how the gradients of batches differ, and as estimated.

    Args:
        model: the network, which is not changed.
        batches: of independent samples.
        mode: "sync" or "eval".

    Returns:
        Two tensors (2,): B times the variance of a batch's gradient, and the square of
        its mean; and the means over batches of what ``estimates`` gives.
    """
    gradients, estimated = [], []
    for x, y in batches:
        found = per_sample(model, F.cross_entropy, x, y, want=WANTED, mode=mode)
        total = torch.cat([t.flatten() for t in found["sum"].values()])
        gradients.append(total / len(x))
        estimated.append(torch.stack(estimates(found)))
    stacked = torch.stack(gradients)
    variance = stacked.var(0).sum()
    square = stacked.mean(0).square().sum() - variance / len(batches)
    return torch.stack([BATCH * variance, square]), torch.stack(estimated).mean(0)


# -- The slow forms, in plain torch ----------------------------------------------------


def train_plainly(model: nn.Module, batches: list[Batch]) -> None:
    """The ordinary training loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def against_copies(model: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """The difference of the norms from those by hand: each sample runs through a copy
    of the network of its own, and only the statistics are those of the batch."""
    copies = [copy.deepcopy(model) for _ in x]
    h = x
    for layers in zip(*copies):
        if isinstance(layers[0], nn.BatchNorm2d):
            h = F.batch_norm(h, None, None, training=True, eps=layers[0].eps)
            pairs = [(c.weight[:, None, None], c.bias[:, None, None]) for c in layers]
            h = torch.stack([one * w + b for one, (w, b) in zip(h, pairs)])
        else:
            h = torch.cat([c(h[i : i + 1]) for i, c in enumerate(layers)])
    F.cross_entropy(h, y, reduction="sum").backward()  # type: ignore
    rows = [[p.grad.flatten() for p in c.parameters()] for c in copies]  # type: ignore
    expected = torch.stack([torch.cat(row).norm() for row in rows])
    norms = per_sample(model, F.cross_entropy, x, y, want=q.Norms(), mode="sync")
    return float((norms - expected).abs().max() / expected.max())


def largest_difference(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return max(float((one - other).detach().abs().max()) for one, other in zip(a, b))


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
