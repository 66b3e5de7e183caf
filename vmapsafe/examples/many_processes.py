"""Data attribution in several processes, which fill one folder together.

    torchrun --nproc-per-node=2 -m vmapsafe.examples.many_processes

starts two processes on this machine. On two machines with a disk that they share, start
this on each, with the name of the first one in place of HOST:

    torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d \
        --rdzv-endpoint=HOST:29500 -m vmapsafe.examples.many_processes FOLDER

Without torchrun it is one process. All processes run this whole file, and all call
``over(...).save(folder)`` with the same arguments. ``save`` deals the batches: each
process takes the next one that nobody has taken. The folder has the rows in the order
of the data set. Kill any of the processes, start again with another number of them, and
``save`` computes what is missing.

The rows are projected gradients of the training images (sketches). With G the matrix of
them, and g(z) the sketch of another image z, the influence of each training image on
the loss at z is about

    g(z) (G^T G + ridge)^-1 G^T.

On a GPU, use the backend "nccl" and move the model to ``cuda:LOCAL_RANK``.
"""

import contextlib
import copy
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vmapsafe import over, per_sample_sketch
from vmapsafe.examples import digits

TRAINING, TEST = 600, 100  # images
BATCH = 25
K = 512  # numbers in a sketch
EPOCHS = 8
RIDGE = 1.0  # as a multiple of the mean squared length of a sketch
TOP = 5  # images to show for each test image

Loss = Callable[[Tensor, Tensor], Tensor]


def main(folder: str | None = None) -> dict[str, float]:
    """Fill a folder together, compare it with that of one process, and use it.

    Args:
        folder: where the sketches go; None for one that is removed at the end.

    Returns:
        How many batches all processes computed; the largest difference of the folder
        from that of one process; the mean correlation of the influences with those by
        exact gradients, from a loop; and how many of the training images with the
        largest influence have the class of the test image. Of process 0 alone.
    """
    torch.manual_seed(0)  # all processes train the same network; else load a checkpoint
    images, labels = digits.load()
    x, y = images[:TRAINING], labels[:TRAINING]
    x_test, y_test = images[TRAINING:][:TEST], labels[TRAINING:][:TEST]
    model = digits.network()
    digits.train(model, x, y, EPOCHS)
    computed: list[int] = []

    def sketch(model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor) -> Tensor:
        computed.append(len(x))
        return per_sample_sketch(model, loss_fn, x, y, k=K)

    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    results = over(loader, sketch, model, F.cross_entropy)
    with processes() as (rank, world), shared(folder, rank, world) as path:
        rows = torch.tensor(results.save(path))
        counts = of_all(len(computed), world)
    if rank > 0:
        return {}

    print(f"{TRAINING} training images in {len(loader)} batches, {K} numbers an image")
    for number, count in enumerate(counts):
        print(f"process {number} of {world} computed {count} batches")
    alone = torch.cat([*results])  # a loop over all batches, in this process
    difference = float((rows - alone).abs().max())
    print(f"largest difference from the sketches of one process: {difference}")

    of_test = per_sample_sketch(model, F.cross_entropy, x_test, y_test, k=K)
    found = influences(rows, of_test)
    by_loop = influences(rows_by_loop(model, x, y), rows_by_loop(model, x_test, y_test))
    pairs = [torch.stack(pair) for pair in zip(found, by_loop)]
    correlation = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean()
    print(
        "mean correlation of the influences with those by exact gradients, from a "
        f"loop: {correlation:.3f}"
    )
    same = float((y[found.topk(TOP).indices] == y_test[:, None]).double().mean())
    print(
        f"of the {TOP} training images with the largest influence on a test image, "
        f"{same:.0%} have its class (10% by chance)"
    )
    return {
        "batches": sum(counts),
        "difference": difference,
        "correlation": float(correlation),
        "same class": same,
    }


# -- Processes -------------------------------------------------------------------------


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """The group that torchrun asks for; gives (the number of this process, of all)."""
    if "RANK" not in os.environ:  # started without torchrun
        yield 0, 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def shared(folder: str | None, rank: int, world: int) -> Iterator[str]:
    """The folder, the same in all processes: a temporary one if none is given."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        paths = [temporary]
        if world > 1:
            dist.broadcast_object_list(paths)
        yield paths[0]
        of_all(0, world)  # process 0 removes it when all have read it


def of_all(number: int, world: int) -> list[int]:
    """A number of each process."""
    numbers = [number] * world
    if world > 1:
        dist.all_gather_object(numbers, number)
    return numbers


# -- Influences ------------------------------------------------------------------------


def influences(g: Tensor, g_test: Tensor) -> Tensor:
    """Of training images on the loss at test images, (test images, training images).

    With as many unknowns as there are training images: the formula above equals
    g(z) G^T (G G^T + ridge)^-1.
    """
    kernel = g @ g.T
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    found: Tensor = torch.linalg.solve(kernel + ridge, g @ g_test.T).T
    return found


def rows_by_loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The slow form: every image's gradient, (N, P), one image after the other."""
    model = copy.deepcopy(model).eval()
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main(*sys.argv[1:2])
