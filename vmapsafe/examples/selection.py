"""Data selection: a few images whose mean gradient is near that of all.

Training on k images of a pool does about what training on the pool does if the mean of
their gradients is near the pool's, as CRAIG (Mirzasoleiman et al.,
https://arxiv.org/abs/1906.01827) and GRAD-MATCH (Killamsetty et al.,
https://arxiv.org/abs/2103.00123) put it. Here images are taken one by one. Each time it
is the one that brings the mean nearest:

    the smallest |1/n sum over chosen i of g_i - 1/N sum over all j of g_j|^2.

This needs the products <g_i, g_j> alone, the matrix (N, N) that ``Gram`` gives without
the gradients. The gradients are those of a network after one epoch. Note that this
looks at all labels of the pool: it saves training, not labelling.

Run ``python -m vmapsafe.examples.selection``.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe import per_sample
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe.examples import digits

POOL, CHOSEN = 600, 30  # images
TRIES = 5  # networks to train for each way to choose
STEPS = 60  # of training on the chosen images


def main() -> dict[str, float]:
    """Choose images, and compare them with images at random.

    Returns:
        The largest difference of a product from that of a loop, relative to the largest
        product; the distance of the chosen images' mean gradient from the pool's,
        relative to its length, that of images at random, and that of as many random
        images of each class; and the accuracies of networks trained on them.
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    x, y = images[:POOL], labels[:POOL]
    unseen = images[POOL:], labels[POOL:]
    model = digits.network()
    digits.train(model, x, y, epochs=1)

    gram = per_sample(model, F.cross_entropy, x, y, want=q.Gram())
    rows = rows_by_loop(model, x, y)
    expected = rows @ rows.T
    difference = float((gram - expected).abs().max() / expected.max())
    print(
        f"{POOL} x {POOL} products of gradients, from one pass. Next to a loop their "
        f"largest relative difference is {difference:.1e}."
    )

    ways = {
        "chosen": [choose(gram, CHOSEN)] * TRIES,
        "random": [torch.randperm(POOL)[:CHOSEN] for _ in range(TRIES)],
        "balanced": [of_each_class(y, CHOSEN) for _ in range(TRIES)],
    }
    words = {
        "chosen": "chosen by their gradients",
        "random": "at random",
        "balanced": "at random, as many of each class",
    }
    print(
        f"{CHOSEN} images of {POOL}: how far their mean gradient is from that of all,"
    )
    print(
        "as a share of its length; and the accuracy of networks trained on them alone"
    )
    found = {"difference": difference}
    for way, subsets in ways.items():
        distances = [distance(rows, some) for some in subsets]
        right = [
            accuracy_of(seed, x[some], y[some], unseen)
            for seed, some in enumerate(subsets)
        ]
        found[f"{way}, distance"] = sum(distances) / TRIES
        found[f"{way}, accuracy"] = sum(right) / TRIES
        print(
            f"{words[way]:33} {found[f'{way}, distance']:.2f} "
            f"{found[f'{way}, accuracy']:6.1%}"
        )
    return found


def choose(gram: Tensor, count: int) -> Tensor:
    """The samples to take, (count,), in the order in which they are taken.

    Args:
        gram: the products of all pairs of gradients, (N, N).
        count: how many, at most N.

    Returns:
        Their indices.
    """
    squares, with_mean = gram.diagonal(), gram.mean(1)
    with_chosen = torch.zeros_like(squares)  # each sample's product with their sum
    chosen: list[int] = []
    for n in range(1, count + 1):
        # |(chosen + g) / n - mean|^2 without what is the same for all samples
        left = (squares + 2 * with_chosen) / n**2 - 2 * with_mean / n
        left[chosen] = torch.inf
        chosen.append(int(left.argmin()))
        with_chosen = with_chosen + gram[chosen[-1]]
    return torch.tensor(chosen)


def of_each_class(y: Tensor, count: int) -> Tensor:
    """As many random images of each class, (count,)."""
    each = count // digits.CLASSES
    order = torch.randperm(len(y))
    return torch.cat([order[y[order] == c][:each] for c in range(digits.CLASSES)])


def accuracy_of(
    seed: int, x: Tensor, y: Tensor, unseen: tuple[Tensor, Tensor]
) -> float:
    """Of a network that is trained on these images alone."""
    torch.manual_seed(seed)
    model = digits.network()
    digits.train(model, x, y, epochs=STEPS)  # a batch holds them all
    with torch.no_grad(), vmap_safe(model):
        return digits.accuracy(model(unseen[0]), unseen[1])


# -- The slow form, in plain torch -----------------------------------------------------


def rows_by_loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Every image's gradient, (N, P), one image after the other."""
    model = copy.deepcopy(model).eval()
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def distance(rows: Tensor, some: Tensor) -> float:
    """Of the mean of some rows from that of all, as a share of the latter's length."""
    mean = rows.mean(0)
    return float((rows[some].mean(0) - mean).norm() / mean.norm())


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
