"""Training with clipped per-sample gradients.

Each step clips the gradient of each sample to a norm and adds them up, so that a single
sample cannot move the weights by more than that. In ``mode="group_norm"`` the BatchNorm
layers normalise each image by itself. An image's gradient then depends on that image
alone, and running statistics are neither needed nor written.

This is the step of DP-SGD (https://arxiv.org/abs/1607.00133) without its noise and
without its sampling of batches: it is not differentially private by itself.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe import clipped_grad_sum, vmap_safe
from vmapsafe.examples import digits

TRAINING, BATCH, EPOCHS = 600, 60, 5
MOST = 10.0  # the norm to which gradients are clipped
GROUPS = 4
RATE = 0.15
COMPARED = 3  # steps that are also taken by hand


def main() -> dict[str, float]:
    """Train, and take the first steps by hand too.

    Returns:
        The largest difference of a weight after those steps, the share of gradients
        that were clipped in them, and the accuracy on images not seen.
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    x, y = images[:TRAINING], labels[:TRAINING]
    model = digits.network()
    by_hand = with_group_norm(model)

    orders = [torch.randperm(TRAINING) for _ in range(EPOCHS)]
    steps = [some for order in orders for some in torch.split(order, BATCH)]
    train(model, [(x[some], y[some]) for some in steps[:COMPARED]])
    clipped = train_by_hand(by_hand, [(x[s], y[s]) for s in steps[:COMPARED]])
    pairs = zip(model.parameters(), by_hand.parameters())
    difference = max(float((p - q).detach().abs().max()) for p, q in pairs)
    print(
        f"Each image's gradient is clipped to norm {MOST:.0f}: {clipped:.0%} of them "
        f"were longer in the first {COMPARED} steps.\n"
        "Weights after these steps, next to a loop over the images in plain torch: "
        f"largest difference {difference:.1e}"
    )

    train(model, [(x[some], y[some]) for some in steps[COMPARED:]])
    with torch.no_grad(), vmap_safe(model, mode="group_norm", num_groups=GROUPS):
        right = digits.accuracy(model(images[TRAINING:]), labels[TRAINING:])
    print(
        f"After {EPOCHS} epochs {right:.1%} of {len(images) - TRAINING} images not "
        "seen are right.\n"
        "This is not differentially private by itself: nothing random was added."
    )
    return {"difference": difference, "accuracy": right, "clipped": clipped}


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """The training loop: the optimizer uses the clipped sum as a gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y in batches:
        total = clipped_grad_sum(
            model,
            F.cross_entropy,
            *(x, y),
            max_grad_norm=MOST,
            mode="group_norm",
            num_groups=GROUPS,
        )
        for name, parameter in model.named_parameters():
            parameter.grad = total[name] / len(x)
        optimizer.step()


# -- The slow form, in plain torch -----------------------------------------------------


def with_group_norm(model: nn.Module) -> nn.Module:
    """A copy with GroupNorm layers in place of BatchNorm, and the same weights."""
    model = copy.deepcopy(model)
    for name, layer in model.named_children():
        if isinstance(layer, nn.BatchNorm2d):
            norm = nn.GroupNorm(GROUPS, layer.num_features, layer.eps).double()
            norm.weight, norm.bias = layer.weight, layer.bias
            setattr(model, name, norm)
    return model


def train_by_hand(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Take one sample after the other; return the share of clipped gradients."""
    parameters = list(model.parameters())
    norms = []
    for x, y in batches:
        total = [torch.zeros_like(p) for p in parameters]
        for i in range(len(x)):
            loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            grads = torch.autograd.grad(loss, parameters)
            norm = torch.cat([g.flatten() for g in grads]).norm()
            norms.append(norm)
            for t, g in zip(total, grads):
                t += g * min(1.0, MOST / float(norm))
        for p, t in zip(parameters, total):
            p.data -= RATE * t / len(x)
    return float((torch.stack(norms) > MOST).double().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
