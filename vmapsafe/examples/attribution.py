"""Data attribution: which training images does a prediction come from?

TRAK (https://arxiv.org/abs/2303.14186) treats the trained network as a linear model of
its gradients. Let g(z) be the gradient of the margin log(p / (1 - p)) at image z, G the
rows g of the training images, and p_i the probability of image i's label. Up to a
ridge, the score of each training image for z is

    g(z) G^T (G G^T)^-1 diag(1 - p).

G has 3800 numbers for each image here and billions elsewhere. TRAK keeps only a random
projection of each row to k numbers, which ``per_sample_sketch`` computes without the
rows. One network and a few hundred images are not an evaluation of TRAK, which takes
the mean over many networks; and on digits, "same class" is hard to beat.
"""

import copy

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vmapsafe import over, per_sample_sketch
from vmapsafe.examples import digits

TRAINING, TEST = 300, 40  # images
K = 1024  # numbers in a sketch
RIDGE = 1.0  # as a multiple of the mean squared length of a row
RETRAININGS = 30
EPOCHS = 8


def main() -> dict[str, float]:
    """Compute scores by sketches and by exact rows, and check them by retraining.

    Returns:
        The mean correlation, over test images, of the scores by sketches with those by
        exact rows; and the linear datamodeling scores (section 2 of TRAK) of both, and
        of the rule that images of the same class score 1.
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    x, y = images[:TRAINING], labels[:TRAINING]
    test = images[TRAINING:][:TEST], labels[TRAINING:][:TEST]
    model = digits.network()
    digits.train(model, x, y, EPOCHS)

    ours = attribute(sketches(model, x, y), sketches(model, *test), model, x, y)
    exact = attribute(
        rows_by_loop(model, x, y), rows_by_loop(model, *test), model, x, y
    )
    same_class = (y == test[1][:, None]).double()
    correlation = mean_correlation(ours, exact)
    numbers = sum(p.numel() for p in model.parameters())
    print(f"{K} numbers in place of {numbers}: mean correlation of the scores with")
    print(f"those by exact rows, from a loop: {correlation:.3f}")

    halves, margins = train_again(x, y, *test)
    names = {"sketches": ours, "exact rows": exact, "same class": same_class}
    found = {
        name: mean_correlation((scores @ halves.T).argsort().argsort(), margins)
        for name, scores in names.items()
    }
    print(
        f"rank correlation with the margins of {RETRAININGS} networks, each trained on"
    )
    print(f"half of the images: {', '.join(f'{n} {v:.2f}' for n, v in found.items())}")
    return {"correlation": correlation, **found}


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """log(p / (1 - p)) of the label, summed over the batch."""
    others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    return (logits.gather(1, y[:, None])[:, 0] - others).sum()


def sketches(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The projections of all rows, (N, k), batch by batch."""
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    return torch.cat(list(over(loader, per_sample_sketch, model, margin, k=K)))


def rows_by_loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The slow form: the rows themselves, (N, P), one image after the other."""
    model = copy.deepcopy(model).eval()
    rows = []
    for i in range(len(x)):
        loss = margin(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def attribute(
    g: Tensor, g_test: Tensor, model: nn.Module, x: Tensor, y: Tensor
) -> Tensor:
    """The scores, (test images, training images), from rows or from sketches."""
    kernel = g @ g.T
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    with torch.no_grad():
        p = copy.deepcopy(model).eval()(x).softmax(1)
    weights = 1 - p[torch.arange(len(y)), y]
    influence = torch.linalg.solve(kernel + ridge, g @ g_test.T).T
    return torch.mul(influence, weights)


def train_again(
    x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor
) -> tuple[Tensor, Tensor]:
    """Train networks on random halves of the training images.

    Args:
        x: the training images.
        y: their labels.
        x_test: the test images.
        y_test: their labels.

    Returns:
        Which images each network is trained on, (networks, training images) of 0 and 1,
        and the ranks of its margins, (test images, networks).
    """
    halves = torch.zeros(RETRAININGS, len(x), dtype=x.dtype)
    margins = []
    for half in halves:
        half[torch.randperm(len(x))[: len(x) // 2]] = 1
        model = digits.network()
        digits.train(model, x[half == 1], y[half == 1], EPOCHS)
        with torch.no_grad():
            logits = model.eval()(x_test)
        each = [margin(logits[[i]], y_test[[i]]) for i in range(len(y_test))]
        margins.append(torch.stack(each))
    return halves, torch.stack(margins, 1).argsort().argsort()


def mean_correlation(a: Tensor, b: Tensor) -> float:
    """The mean, over rows, of the correlation of the rows of two matrices."""
    pairs = [torch.stack(pair).double() for pair in zip(a, b)]
    return float(torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean())


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
