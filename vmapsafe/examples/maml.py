"""MAML with BatchNorm: a network that learns to tell new digits apart in a few steps.

A task is three classes with five images each to learn from. The inner loop takes some
gradient steps on them, from weights that all tasks share. The outer gradient is that of
the loss after those steps, on other images of the task, with respect to the shared
weights (https://arxiv.org/abs/1703.03400, second order). All tasks run in one ``vmap``.

In ``mode="no_running_stats"`` each task is normalised by its own images: a task is a
batch of its own. Running statistics, which the tasks would overwrite for each other,
are neither read nor written.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from vmapsafe import vmap_safe
from vmapsafe.examples import digits

WAYS, SHOTS, QUERIES = 3, 5, 10
TASKS, STEPS = 8, 60  # tasks in a step, and steps
INNER_STEPS, INNER_RATE = 3, 0.2
SEEN, NEW = range(7), range(7, 10)  # classes

FIRST = WAYS * SHOTS  # images of a task to learn from

Tasks = tuple[Tensor, Tensor]  # (tasks, FIRST and more, 1, 8, 8), (tasks, as many)
Weights = dict[str, Tensor]


def main() -> dict[str, float]:
    """Learn to learn from digits 0 to 6, then try 7, 8 and 9.

    Returns:
        The largest difference of the outer gradient from that of a loop over tasks,
        relative to its largest entry; and the accuracy on new classes after the inner
        steps, from the weights before and after training.
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    pools = [images[labels == c] for c in range(digits.CLASSES)]
    model = digits.network(WAYS)
    difference = against_the_loop(model, sample_tasks(pools, SEEN, TASKS))
    print(
        f"The outer gradient of {TASKS} tasks in one vmap, next to a loop over the "
        "tasks in plain torch:\n"
        f"largest relative difference {difference:.1e}."
    )

    new = sample_tasks(pools, NEW, 40)
    before = accuracy_after_adapting(model, new)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        outer_loss(model, sample_tasks(pools, SEEN, TASKS)).backward()  # type: ignore
        optimizer.step()
    after = accuracy_after_adapting(model, new)
    print(
        f"Digits 7, 8 and 9, which training has not shown, after {INNER_STEPS} steps "
        f"on {SHOTS} images each:\n"
        f"{before:.1%} right from weights at random, {after:.1%} from those that MAML "
        "has learnt on digits 0 to 6."
    )
    return {"difference": difference, "before": before, "after": after}


def sample_tasks(pools: list[Tensor], classes: range, count: int) -> Tasks:
    """Draw tasks of three classes each; the images to learn from come first."""
    tasks = []
    for _ in range(count):
        chosen = torch.randperm(len(classes))[:WAYS]
        each = [
            pool[torch.randperm(len(pool))[: SHOTS + QUERIES]]
            for pool in [pools[classes[int(c)]] for c in chosen]
        ]
        tasks.append(torch.stack(each, 1).flatten(0, 1))
    labels = torch.arange(WAYS).repeat(count, SHOTS + QUERIES)
    return torch.stack(tasks), labels


def loss(model: nn.Module, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(model, weights, (x,)), y)


def adapted(model: nn.Module, weights: Weights, x: Tensor, y: Tensor) -> Weights:
    """The weights after the inner steps on one task's images to learn from."""
    for _ in range(INNER_STEPS):
        grads = grad(lambda w: loss(model, w, x, y))(weights)
        weights = {name: w - INNER_RATE * grads[name] for name, w in weights.items()}
    return weights


def outer_loss(model: nn.Module, tasks: Tasks) -> Tensor:
    """The mean over tasks of the loss on a task's other images, after adapting."""

    def of_one(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        weights = adapted(model, weights, x[:FIRST], y[:FIRST])
        return loss(model, weights, x[FIRST:], y[FIRST:])

    with vmap_safe(model, mode="no_running_stats"):
        losses: Tensor = vmap(of_one, (None, 0, 0))(
            dict(model.named_parameters()), *tasks
        )
    return losses.mean()


def accuracy_after_adapting(model: nn.Module, tasks: Tasks) -> float:
    """The accuracy over all tasks, each with weights of its own."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def logits(x: Tensor, y: Tensor) -> Tensor:
        own = adapted(model, weights, x[:FIRST], y[:FIRST])
        found: Tensor = functional_call(model, own, (x[FIRST:],))
        return found

    with vmap_safe(model, mode="no_running_stats"):
        return digits.accuracy(vmap(logits)(*tasks), tasks[1][:, FIRST:])


def against_the_loop(model: nn.Module, tasks: Tasks) -> float:
    """The difference from the slow form: task after task, in plain autograd, with
    BatchNorm layers without running statistics."""
    names, parameters = zip(*model.named_parameters())
    ours = torch.autograd.grad(outer_loss(model, tasks), parameters)

    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    start = tuple(p.detach().clone().requires_grad_() for p in parameters)
    total = torch.zeros(())
    for x, y in zip(*tasks):
        weights = start
        for _ in range(INNER_STEPS):
            inner = loss(plain, dict(zip(names, weights)), x[:FIRST], y[:FIRST])
            grads = torch.autograd.grad(inner, weights, create_graph=True)
            weights = tuple(w - INNER_RATE * g for w, g in zip(weights, grads))
        total = total + loss(plain, dict(zip(names, weights)), x[FIRST:], y[FIRST:])
    expected = torch.autograd.grad(total / len(tasks[0]), start)
    largest = max(float(g.abs().max()) for g in expected)
    return max(float((a - b).abs().max()) for a, b in zip(ours, expected)) / largest


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
