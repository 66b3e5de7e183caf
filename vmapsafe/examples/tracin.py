"""Which training images helped, and which did harm? TracIn over checkpoints.

TracIn (Pruthi et al., https://arxiv.org/abs/2002.08484) adds up how far the training
steps on an image z lowered the loss at another image z'. With w_t the checkpoints of
the training, η_t their learning rates, and g the gradient of the loss,

    TracIn(z, z') = sum over t of η_t <g(w_t, z), g(w_t, z')>.

Above 0, z helped to predict z'; below 0, it did harm. ``per_sample`` takes a whole
state dict as ``params``: the gradients are those at the checkpoint, with the running
statistics of that checkpoint, and the model itself is not touched. ``Gram(other=...)``
gives the products with each test image. ``Dots`` gives those with the summed gradient
of all validation images, whose loss shows which training images did harm. Neither makes
a gradient of each image.

Run ``python -m vmapsafe.examples.tracin``.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe import per_sample
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe.examples import digits

TRAINING, VALIDATION, TEST = 400, 300, 100  # images
WRONG = 40  # of the training images have a wrong label
BATCH, EPOCHS, EVERY = 50, 8, 2  # a checkpoint every two epochs
RATE = 0.1
TOP = 5  # images to show for each test image
RETRAININGS = 10
COMPARED = 20  # images

State = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def main() -> dict[str, float]:
    """Spoil labels, train, find the spoilt images, and train again without them.

    Returns:
        The largest difference of a score from that of a loop, relative to the largest
        score; the share of wrong labels among the images that did most harm; how many
        of the most helpful images have the class of the test image; and the accuracy of
        networks trained on all images, without the most harmful and without some at
        random.
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    x, y = images[:TRAINING], labels[:TRAINING].clone()
    wrong = torch.randperm(TRAINING)[:WRONG]
    y[wrong] = (y[wrong] + torch.randint(1, digits.CLASSES, (WRONG,))) % digits.CLASSES
    rest = images[TRAINING:], labels[TRAINING:]
    validation = rest[0][:VALIDATION], rest[1][:VALIDATION]
    unseen = rest[0][VALIDATION:], rest[1][VALIDATION:]
    test = unseen[0][:TEST], unseen[1][:TEST]

    model = digits.network()
    checkpoints = train(model, x, y)
    of_loss, of_pairs = tracin(model, checkpoints, (x, y), validation, test)
    few = (x[:COMPARED], y[:COMPARED])
    difference = against_the_loop(model, checkpoints, few, validation, test)
    print(
        f"{WRONG} of {TRAINING} training labels are made wrong. Scores say how much "
        "each image has helped or harmed. Next to\n"
        f"a loop over {COMPARED} images their largest relative difference is "
        f"{difference:.1e}."
    )

    harmful = of_loss.argsort()[:WRONG]
    spoilt = torch.isin(harmful, wrong).double().mean().item()
    print(
        f"Of the {WRONG} images that did most harm to the validation loss, "
        f"{spoilt:.0%} have a wrong label ({WRONG / TRAINING:.0%} by chance)."
    )
    helpful = of_pairs.topk(TOP, 0).indices  # (TOP, TEST)
    same = (y[helpful] == test[1]).double().mean().item()
    print(
        f"Of the {TOP} that helped most with a test image, {same:.0%} have its class "
        "(10% by chance)."
    )

    none = torch.tensor([], dtype=torch.long)
    random = torch.randperm(TRAINING)[:WRONG]
    found = {
        "with all images": accuracy_without(none, x, y, unseen),
        "without these": accuracy_without(harmful, x, y, unseen),
        "without others": accuracy_without(random, x, y, unseen),
    }
    print(
        f"Right of {len(unseen[1])} images not seen, the mean of {RETRAININGS} "
        "trainings:"
    )
    print(
        f"  {found['with all images']:.1%} after training on all images\n"
        f"  {found['without these']:.1%} without the {WRONG} most harmful\n"
        f"  {found['without others']:.1%} without {WRONG} at random"
    )
    return {"difference": difference, "spoilt": spoilt, "same class": same, **found}


def train(model: nn.Module, x: Tensor, y: Tensor) -> list[State]:
    """Train by plain SGD; return the checkpoints, running statistics included."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    checkpoints = []
    for epoch in range(1, EPOCHS + 1):
        for some in torch.split(torch.randperm(len(x)), BATCH):
            loss = F.cross_entropy(model(x[some]), y[some])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if epoch % EVERY == 0:
            checkpoints.append(copy.deepcopy(model.state_dict()))
    return checkpoints


def tracin(
    model: nn.Module,
    checkpoints: list[State],
    training: Batch,
    validation: Batch,
    test: Batch,
) -> tuple[Tensor, Tensor]:
    """The scores of the training images.

    Args:
        model: the network, whose own weights and statistics do not matter.
        checkpoints: whole state dicts.
        training: images and labels.
        validation: images and labels.
        test: images and labels.

    Returns:
        (training images,): for the summed loss of the validation images; and (training
        images, test images).
    """
    of_loss = torch.zeros(len(training[1]))
    of_pairs = torch.zeros(len(training[1]), len(test[1]))
    for state in checkpoints:
        total = per_sample(
            model, F.cross_entropy, *validation, want=q.Sum(), params=state
        )
        found = per_sample(
            model,
            F.cross_entropy,
            *training,
            want={"loss": q.Dots(total), "pairs": q.Gram(other=test)},
            params=state,
        )
        of_loss = of_loss + RATE * found["loss"]
        of_pairs = of_pairs + RATE * found["pairs"]
    return of_loss, of_pairs


def accuracy_without(left_out: Tensor, x: Tensor, y: Tensor, unseen: Batch) -> float:
    """The mean accuracy of some networks, trained without the images left out."""
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[left_out] = False
    found = []
    for seed in range(RETRAININGS):
        torch.manual_seed(seed)
        model = digits.network()
        train(model, x[keep], y[keep])
        with torch.no_grad(), vmap_safe(model):
            found.append(digits.accuracy(model(unseen[0]), unseen[1]))
    return sum(found) / len(found)


# -- The slow form, in plain torch -----------------------------------------------------


def against_the_loop(
    model: nn.Module,
    checkpoints: list[State],
    training: Batch,
    validation: Batch,
    test: Batch,
) -> float:
    """The difference from the slow form: each checkpoint loaded into a copy of the
    network, and one image after the other."""
    of_loss, of_pairs = tracin(model, checkpoints, training, validation, test)
    slow_loss, slow_pairs = torch.zeros_like(of_loss), torch.zeros_like(of_pairs)
    for state in checkpoints:
        at = copy.deepcopy(model).eval()
        at.load_state_dict(state)
        rows = rows_by_loop(at, *training)
        slow_loss += RATE * rows @ rows_by_loop(at, *validation).sum(0)
        slow_pairs += RATE * rows @ rows_by_loop(at, *test).T
    pairs = ((of_loss, slow_loss), (of_pairs, slow_pairs))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def rows_by_loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Every image's gradient, (N, P), of a network in eval mode."""
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
