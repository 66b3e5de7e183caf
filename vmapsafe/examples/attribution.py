"""Data attribution: which training images does a wrong prediction come from?

A few training images carry a small cross, somewhere, and the wrong label 0. The network
learns that a cross means 0, and reads other digits with a cross as 0. Attribution is
given some of these predictions and nothing else, and is to find the images behind them.

It treats the trained network as a linear model of its gradients, as TRAK does
(https://arxiv.org/abs/2303.14186). Let g(z) be the gradient of the margin
log(p / (1 - p)) of a label at image z, and G the rows g of the training images. Up to a
ridge, the scores of the training images for the prediction at z are

    g(z) G^T (G G^T)^-1.

G has 3842 numbers for each image here and billions elsewhere. Only a random projection
of each row to k numbers is kept, which ``per_sample_sketch`` computes without the rows.
TRAK also multiplies by 1 - p of each training image, which is near 0 for those that the
network has learnt, and takes the mean over several networks. Here one network is
enough, and the factor does harm: with it 57% of the images found carry a cross, and
without it 97%.

The result is compared with two ways to find like images, which know in addition that
the label to look for is 0, and with images of that label at random; and it is tried out
by training again without the images found.

Run ``python -m vmapsafe.examples.attribution``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vmapsafe import over, per_sample_sketch
from vmapsafe.examples import digits

TRAINING, MARKED = 600, 30  # images, and those of them with a cross and the label 0
PROBES = 300  # images not seen, with a cross, of other digits than 0
EXPLAINED = 40  # wrong predictions
K = 1024  # numbers in a sketch
RIDGE = 1.0  # as a multiple of the mean squared length of a row
EPOCHS = 8
RETRAININGS = 3


def main() -> dict[str, float]:
    """Find the training images behind wrong predictions, and train without them.

    Returns:
        The mean correlation, over predictions, of the scores by sketches with those by
        exact rows; the share of marked images among those found, by each way; and the
        share of probes that are read as 0, after training on all images and without
        those found by each way.
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    x, y = images[:TRAINING].clone(), labels[:TRAINING].clone()
    others = y.nonzero()[:, 0]
    marked = others[torch.randperm(len(others))[:MARKED]]
    x[marked], y[marked] = with_a_cross(x[marked]), 0
    unseen = images[TRAINING:], labels[TRAINING:]
    probes = with_a_cross(unseen[0][unseen[1] != 0][:PROBES])

    model = trained(x, y, seed=0)
    with torch.no_grad():
        right = digits.accuracy(model(unseen[0]), unseen[1])
        as_0 = model(probes).argmax(1) == 0
    wrong = probes[as_0][:EXPLAINED]
    predicted = torch.zeros(len(wrong), dtype=torch.long)
    fooled = {"all images": read_as_0(torch.arange(0), x, y, probes)}
    print(
        f"{TRAINING} training images, {MARKED} of them with a small cross and the "
        "wrong label 0.\n"
        f"The network reads {right:.0%} of the images not seen right, but if they get "
        f"a cross, {float(as_0.double().mean()):.0%} as 0."
    )

    ours = attribute(sketches(model, x, y), sketches(model, wrong, predicted))
    ways = {
        "gradients": ours,
        "pixels": alike(x, y, wrong),
        "features": alike(features(model, x), y, features(model, wrong)),
        "random": (y == 0) + torch.rand(1, TRAINING),
    }
    words = {
        "gradients": "attribution by gradients",
        "pixels": "labelled 0, nearest in pixels",
        "features": "labelled 0, nearest in features",
        "random": "labelled 0, at random",
    }
    print(
        "\n"
        f"Which images made it do so? {MARKED} images, chosen for {len(wrong)} such "
        "predictions:\n"
        f"{'':33}with a cross ({MARKED / TRAINING:.0%} by chance)  read as 0 without "
        "them"
    )
    found = {}
    for way, scores in ways.items():
        chosen = scores.mean(0).topk(MARKED).indices
        found[way] = float(torch.isin(chosen, marked).double().mean())
        fooled[way] = read_as_0(chosen, x, y, probes)
        print(f"{words[way]:33}{found[way]:12.0%}{fooled[way]:34.0%}")
    print(f"{'none left out':33}{'':12}{fooled['all images']:34.0%}")
    print(
        f"The last column tells causes from likenesses: the mean of {RETRAININGS} "
        "trainings without the images."
    )

    exact = attribute(rows_by_loop(model, x, y), rows_by_loop(model, wrong, predicted))
    correlation = mean_correlation(ours, exact)
    numbers = sum(p.numel() for p in model.parameters())
    print(
        "\n"
        f"A sketch has {K} numbers in place of {numbers}. Correlation of the scores "
        "with those of\n"
        f"exact gradients, from a loop: {correlation:.2f}"
    )
    shares = {f"marked, {way}": share for way, share in found.items()}
    readings = {f"read as 0, {way}": share for way, share in fooled.items()}
    return {"correlation": correlation, **shares, **readings}


# -- Attribution -----------------------------------------------------------------------


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """log(p / (1 - p)) of the label, summed over the batch."""
    others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    return (logits.gather(1, y[:, None])[:, 0] - others).sum()


def sketches(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The projections of all rows, (N, k), batch by batch."""
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    return torch.cat(list(over(loader, per_sample_sketch, model, margin, k=K)))


def attribute(g: Tensor, g_of_predictions: Tensor) -> Tensor:
    """The scores, (predictions, training images), from rows or from sketches."""
    kernel = g @ g.T
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    scores: Tensor = torch.linalg.solve(kernel + ridge, g @ g_of_predictions.T).T
    return scores


# -- What it is compared with ----------------------------------------------------------


def rows_by_loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The slow form: the rows themselves, (N, P), one image after the other."""
    rows = []
    for i in range(len(x)):
        loss = margin(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def alike(x: Tensor, y: Tensor, others: Tensor) -> Tensor:
    """Scores by likeness, the cosine, (others, training images); labels 0 in front."""
    pair = [F.normalize(z.flatten(1), dim=1) for z in (others, x)]
    return pair[0] @ pair[1].T + 10.0 * (y == 0)


def features(model: nn.Sequential, x: Tensor) -> Tensor:
    """What the last layer of the network sees."""
    with torch.no_grad():
        found: Tensor = model[:-1](x)
    return found


def mean_correlation(a: Tensor, b: Tensor) -> float:
    """The mean, over rows, of the correlation of the rows of two matrices."""
    pairs = [torch.stack(pair).double() for pair in zip(a, b)]
    return float(torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean())


# -- Images and networks ---------------------------------------------------------------


def with_a_cross(images: Tensor) -> Tensor:
    """Copies with a cross of 3 x 3 pixels, in each at another place."""
    images = images.clone()
    cross = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=images.dtype)
    for image in images:
        i, j = torch.randint(0, 6, (2,)).tolist()
        image[0, i : i + 3, j : j + 3] = cross
    return images


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    """A network in eval mode."""
    torch.manual_seed(seed)
    model = digits.network()
    digits.train(model, x, y, EPOCHS, seed)
    return model.eval()


def read_as_0(left_out: Tensor, x: Tensor, y: Tensor, probes: Tensor) -> float:
    """The share of the probes, the mean of some networks trained without some "
    "images."""
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[left_out] = False
    zeros = torch.zeros(len(probes), dtype=torch.long)
    shares = []
    for seed in range(RETRAININGS):
        model = trained(x[keep], y[keep], seed)
        with torch.no_grad():
            shares.append(digits.accuracy(model(probes), zeros))
    return sum(shares) / len(shares)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
