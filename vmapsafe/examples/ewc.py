"""Learning a second task without forgetting the first: EWC on a BatchNorm network.

Elastic weight consolidation (Kirkpatrick et al., https://arxiv.org/abs/1612.00796)
trains on a second task with a penalty on leaving the weights w* of the first,

    loss + λ/2 sum over weights of F (w - w*)^2,

where F is the diagonal of the Fisher matrix of the first task: the mean of the squared
gradients of log p(y | x), with labels y that are drawn from the network's own output.
With the labels of the data it would be the empirical Fisher, which is another thing
(Kunstner et al., https://arxiv.org/abs/1905.12558). ``SumOfSquares`` gives the sum over
a batch without the gradients, in ``mode="eval"``, where images are independent.

F belongs to the network with the running statistics of the first task. So its BatchNorm
layers stay in eval mode while the second task is learnt, in all runs compared here.

Run ``python -m vmapsafe.examples.ewc``.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe import per_sample
from vmapsafe import quantities as q
from vmapsafe import vmap_safe
from vmapsafe.examples import digits

FIRST, SECOND = 800, 500  # images to learn the tasks from
BATCH, EPOCHS = 50, 15
RATE, MOMENTUM = 0.005, 0.9
STRENGTH = 300.0  # λ
COMPARED = 40  # images

Weights = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def main() -> dict[str, float]:
    """Learn digits, then digits whose pixels are in another order.

    Returns:
        The largest difference of an entry of F from that of a loop, relative to the
        largest entry; the accuracy on the first task before the second is learnt; and
        those on both tasks after it, without a penalty, with one that is equal for all
        weights, and with EWC's.
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    order = torch.randperm(64)
    permuted = images.flatten(1)[:, order].view_as(images)
    end = FIRST + SECOND
    x, y = images[:FIRST], labels[:FIRST]
    second = permuted[FIRST:end], labels[FIRST:end]
    unseen = images[end:], labels[end:]
    unseen_second = permuted[end:], labels[end:]

    model = digits.network()
    digits.train(model, x, y, epochs=8)
    drawn = labels_of(model, x)
    fisher = fisher_diagonal(model, x, drawn)
    few = x[:COMPARED], drawn[:COMPARED]
    difference = against_the_loop(model, *few)
    print(
        "How much each weight matters to the first task: the Fisher diagonal, from one "
        "pass a batch.\n"
        f"Next to a loop over {COMPARED} images its largest relative difference is "
        f"{difference:.1e}."
    )

    numbers = sum(f.numel() for f in fisher.values())
    mean = float(sum(f.sum() for f in fisher.values())) / numbers
    equal = {name: torch.full_like(f, mean) for name, f in fisher.items()}
    nothing = {name: torch.zeros_like(f) for name, f in fisher.items()}
    found = {"difference": difference, "first": accuracy(model, *unseen)}
    print(
        f"The network has learnt digits: {found['first']:.1%} of {len(unseen[1])} "
        "images not seen are right. It then learns the\n"
        "same digits with the pixels in another order, with a penalty on leaving its "
        "weights:\n"
        "\n"
        "penalty           first task after it  second task"
    )
    for penalty, importance in (
        ("without a penalty", nothing),
        ("equal penalty", equal),
        ("EWC", fisher),
    ):
        torch.manual_seed(0)
        learnt = second_task(model, *second, importance)
        found[f"{penalty}, first"] = accuracy(learnt, *unseen)
        found[f"{penalty}, second"] = accuracy(learnt, *unseen_second)
        print(
            f"{penalty:18}"
            f"{found[f'{penalty}, first']:19.1%}"
            f"{found[f'{penalty}, second']:13.1%}"
        )
    return found


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    """A label for each image, drawn from the network's own output."""
    with torch.no_grad(), vmap_safe(model):
        return torch.multinomial(model(x).softmax(1), 1)[:, 0]


def fisher_diagonal(model: nn.Module, x: Tensor, drawn: Tensor) -> Weights:
    """The mean over images of the squared gradients, batch by batch."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for some in torch.split(torch.arange(len(x)), BATCH):
        squares = per_sample(
            model, F.cross_entropy, x[some], drawn[some], want=q.SumOfSquares()
        )
        total = {name: total[name] + squares[name] for name in total}
    return {name: t.detach() / len(x) for name, t in total.items()}


def second_task(
    model: nn.Module, x: Tensor, y: Tensor, importance: Weights
) -> nn.Module:
    """A copy of the network, trained on another task with a penalty."""
    start = {name: p.detach() for name, p in model.named_parameters()}
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE, momentum=MOMENTUM)
    for _ in range(EPOCHS):
        for some in torch.split(torch.randperm(len(x)), BATCH):
            loss = F.cross_entropy(model(x[some]), y[some])
            for name, p in parameters.items():
                moved = (p - start[name]).square()
                loss = loss + STRENGTH / 2 * (importance[name] * moved).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad(), vmap_safe(model):
        return digits.accuracy(model(x), y)


def against_the_loop(model: nn.Module, x: Tensor, drawn: Tensor) -> float:
    """The difference from the slow form: one image after the other, in plain torch."""
    ours = fisher_diagonal(model, x, drawn).values()
    model = copy.deepcopy(model).eval()
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(x)):
        loss = -model(x[i : i + 1]).log_softmax(1)[0, drawn[i]]
        for t, g in zip(total, torch.autograd.grad(loss, parameters)):
            t += g.square()
    expected = [t / len(x) for t in total]
    largest = max(float(t.abs().max()) for t in expected)
    return max(float((a - b).abs().max()) for a, b in zip(ours, expected)) / largest


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
