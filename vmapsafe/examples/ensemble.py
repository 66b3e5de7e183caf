"""An ensemble of BatchNorm networks, trained in one vmap.

``stack_module_state`` puts the members' weights and running statistics side by side.
Each member has its own initial weights and its own order of the images. In
``mode="sync"`` with ``update_running_stats=True`` a training step of all members does
what each member's own training step would do, running statistics included. Members are
never mixed, as the layers' weights differ along the mapped dimension.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from vmapsafe import vmap_safe
from vmapsafe.examples import digits

MEMBERS, TRAINING, BATCH, EPOCHS = 5, 400, 50, 6
RATE, MOMENTUM = 0.1, 0.9

State = dict[str, Tensor]


def main() -> dict[str, float]:
    """Train the members together and one by one.

    Returns:
        The largest difference of a weight and of a running statistic, and two
        accuracies on images not seen: that of the mean of the members' predictions, and
        the mean of the members' own.
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    x, y = images[:TRAINING], labels[:TRAINING]
    members: list[nn.Module] = [digits.network() for _ in range(MEMBERS)]
    orders = [
        torch.stack([torch.randperm(TRAINING) for _ in members]) for _ in range(EPOCHS)
    ]
    batches = [b for order in orders for b in torch.split(order, BATCH, 1)]

    base = copy.deepcopy(members[0]).to("meta")  # the computation without the numbers
    parameters, buffers = stack_module_state(members)
    train_together(base, parameters, buffers, x, y, batches)
    for index, member in enumerate(members):
        train_alone(member, x, y, [some[index] for some in batches])

    expected, statistics = stack_module_state(members)
    of_weights = largest_difference(parameters, expected)
    of_statistics = largest_difference(buffers, statistics)
    print(
        f"{MEMBERS} networks, trained in one vmap for {len(batches)} steps. Next to "
        "training them one by one, the largest\n"
        f"difference of a weight is {of_weights:.1e}, and of a running statistic "
        f"{of_statistics:.1e}."
    )

    logits = predictions(base, parameters, buffers, images[TRAINING:])
    unseen = labels[TRAINING:]
    together = digits.accuracy(logits.softmax(-1).mean(0), unseen)
    single = digits.accuracy(logits, unseen)
    print(
        f"Of {len(unseen)} images not seen, the mean of their predictions gets "
        f"{together:.1%} right, a single network {single:.1%}."
    )
    return {
        "difference of weights": of_weights,
        "difference of statistics": of_statistics,
        "accuracy": together,
        "accuracy of one": single,
    }


def train_together(
    base: nn.Module,
    parameters: State,
    buffers: State,
    x: Tensor,
    y: Tensor,
    batches: list[Tensor],
) -> None:
    """Train parameters and buffers, (MEMBERS, ...), in place."""

    def loss(parameters: State, buffers: State, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(base, (parameters, buffers), (x,)), y)

    optimizer = torch.optim.SGD(parameters.values(), lr=RATE, momentum=MOMENTUM)
    with vmap_safe(base, mode="sync", update_running_stats=True):
        for some in batches:
            grads = vmap(grad(loss))(parameters, buffers, x[some], y[some])
            for name, parameter in parameters.items():
                parameter.grad = grads[name].detach()
            optimizer.step()


def predictions(
    base: nn.Module, parameters: State, buffers: State, x: Tensor
) -> Tensor:
    """The logits, (MEMBERS, N, 10), with each member's running statistics."""

    def logits(parameters: State, buffers: State) -> Tensor:
        found: Tensor = functional_call(base, (parameters, buffers), (x,))
        return found

    with torch.no_grad(), vmap_safe(base):
        found: Tensor = vmap(logits)(parameters, buffers)
    return found


def train_alone(model: nn.Module, x: Tensor, y: Tensor, batches: list[Tensor]) -> None:
    """The slow form: an ordinary training loop of one member."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for some in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()  # type: ignore
        optimizer.step()


def largest_difference(a: State, b: State) -> float:
    return max(float((a[name] - b[name]).detach().abs().max()) for name in b)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
