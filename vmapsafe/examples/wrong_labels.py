"""The main job on real data: find wrong labels by the size of each sample's gradient.

It is an example to read from top to bottom, and to copy. In the library only the
command line imports it. Beyond torch it needs the extra ``[demo]``.
"""

import argparse
import copy
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from vmapsafe import per_sample, per_sample_grad_norms
from vmapsafe import quantities as q

WRONG_SHARE = 0.03
CLASSES = 10
WIDTH = 16
QUICK_SAMPLES = 300
# In float64 the two ways agree to about 1e-15; anything above this is a mistake.
TOLERANCE = 1e-9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` takes to a parser."""
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: %(default)s)",
    )
    parser.add_argument(
        "--picture",
        type=_picture,
        default="suspects.png",
        metavar="PATH",
        help="the PNG of the top suspects to write (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--epochs", type=_epochs, default=6, help="default: %(default)s"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SAMPLES} digits and one timing round",
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo: train on spoilt labels, rank, draw, check, time.

    Args:
        options: what a parser with :func:`add_arguments` has read.

    Returns:
        The exit status: 0, or 1 if the norms differ from those of a Python loop, or 2
        if the extra is not installed.
    """
    for package in ("matplotlib", "sklearn", "tqdm"):
        try:
            importlib.import_module(package)
        except ImportError:
            print(
                f"python -m vmapsafe: the demo needs {package}, which cannot be "
                "imported here. Run pip install matplotlib scikit-learn tqdm.",
                file=sys.stderr,
            )
            return 2

    torch.manual_seed(options.seed)
    images, true_labels = load(QUICK_SAMPLES if options.quick else None)
    labels, is_wrong = spoil(true_labels, WRONG_SHARE, options.seed)
    print(
        f"{len(images)} handwritten digits, {int(is_wrong.sum())} of their labels made "
        "wrong on purpose.\n"
        "A BatchNorm network is trained on them, and does not know which."
    )

    x, y = images.to(options.device), labels.to(options.device)
    model = build().to(options.device)
    train(model, x, y, options.epochs)

    sizes = norms(model, x, y).cpu()
    numbers = sum(p.numel() for p in model.parameters())
    print(
        "\n"
        "The idea: a wrong label pulls hard at the weights. So look at the digits with "
        "the largest\n"
        f"gradients, of {numbers} numbers each, whose norms take one call of "
        "per_sample_grad_norms:"
    )

    report(sizes, losses(model, x, y).cpu(), is_wrong)
    draw(sizes, images, labels, true_labels, options.picture)
    print(f"A picture of the first 24: {options.picture}")

    if not check(model, x, y):
        return 1
    compare_times(model, x, y, rounds=1 if options.quick else 3)
    return 0


# -- The data --------------------------------------------------------------------------


def load(first: int | None = None) -> tuple[Tensor, Tensor]:
    """The digits of scikit-learn: (N, 1, 8, 8) float32 in 0..1, (N,) int64 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[:first], torch.tensor(digits.target)[:first]


def spoil(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Make a share of the labels wrong: give each a class that is not the true one.

    Args:
        labels: (N,), int64, in 0..9.
        share: the share of the N labels, rounded to a whole number of them.
        seed: the same seed spoils the same labels in the same way.

    Returns:
        The labels, (N,) int64, and which of them are wrong, (N,) bool.
    """
    generator = torch.Generator().manual_seed(seed)
    which = torch.randperm(len(labels), generator=generator)
    which = which[: round(share * len(labels))]
    shift = torch.randint(1, CLASSES, which.shape, generator=generator)
    spoilt = labels.clone()
    spoilt[which] = (labels[which] + shift) % CLASSES
    return spoilt, spoilt != labels


# -- The network -----------------------------------------------------------------------


def build() -> nn.Module:
    """A small convolution net with BatchNorm, (N, 1, 8, 8) -> (N, 10)."""

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.SiLU(),
        ]

    return nn.Sequential(
        *block(1, WIDTH),
        *block(WIDTH, WIDTH),
        nn.AvgPool2d(2),
        *block(WIDTH, 2 * WIDTH),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * WIDTH * 2 * 2, CLASSES),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train for few epochs: a net that has learnt the wrong labels hides them."""
    from tqdm import tqdm

    steps = [s for _ in range(epochs) for s in torch.split(torch.randperm(len(x)), 64)]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=len(steps)
    )
    for sample in tqdm(steps, desc="training", unit="step"):
        loss = F.cross_entropy(model(x[sample]), y[sample])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


# -- Per-sample gradients --------------------------------------------------------------


def norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The Euclidean norm of each sample's own gradient, (N,).

    The model is in training mode, as the training loop has left it. torch alone refuses
    to vmap it, because BatchNorm would update its statistics.
    """
    found: Tensor = per_sample_grad_norms(model, F.cross_entropy, x, y)
    return found


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each sample's own loss, (N,): a simple way to rank them."""
    return per_sample(model, F.cross_entropy, x, y, want=q.Losses())


# -- Ranking ---------------------------------------------------------------------------


def found_among_first(sizes: Tensor, is_wrong: Tensor, share: float) -> tuple[int, int]:
    """How many wrong labels are in the first share of the ranking, and its length."""
    length = round(share * len(sizes))
    first = sizes.argsort(descending=True)[:length]
    return int(is_wrong[first].sum()), length


def area_under_roc(sizes: Tensor, is_wrong: Tensor) -> float:
    """How often a wrong label outranks a right one: 1 is always, 0.5 is chance."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(is_wrong.numpy(), sizes.numpy()))


def report(sizes: Tensor, losses: Tensor, is_wrong: Tensor) -> None:
    """Print how well norms and losses, (N,), point at the wrong labels, (N,) bool."""
    total = int(is_wrong.sum())
    for share in (0.03, 0.10):
        found, length = found_among_first(sizes, is_wrong, share)
        by_loss, _ = found_among_first(losses, is_wrong, share)
        print(
            f"  the first {length:3} digits have {found:2} of the {total} wrong labels "
            f"(by chance {share * total:.0f}, by the loss {by_loss})"
        )
    print(
        "A wrong label is ahead of a right one in "
        f"{area_under_roc(sizes, is_wrong):.2%} of all pairs (by chance 50%).\n"
        "To find wrong labels the loss is enough, and cheaper. Gradients say more: "
        "which images\n"
        "a wrong prediction comes from (python -m vmapsafe.examples.attribution), and "
        "which did harm\n"
        "(tracin)."
    )


def draw(
    sizes: Tensor, images: Tensor, labels: Tensor, true_labels: Tensor, path: Path
) -> None:
    """Write the 24 top-ranked digits as a PNG; red titles are labels made wrong."""
    # Not pyplot: a Figure by itself draws with Agg and never opens a window.
    from matplotlib.figure import Figure

    first = sizes.argsort(descending=True)[:24].tolist()
    wrong = sum(bool(labels[i] != true_labels[i]) for i in first)
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    figure.suptitle(
        f"The {len(first)} digits with the largest gradients\n"
        f"red: label made wrong on purpose ({wrong} of {len(first)})",
        fontsize=14,
    )
    for axes, i in zip(figure.subplots(4, 6).flat, first):
        given, true = int(labels[i]), int(true_labels[i])
        title, colour = f"labelled {given}", "black"
        if given != true:
            title, colour = f"labelled {given}, is {true}", "crimson"
        axes.imshow(images[i, 0].numpy(), cmap="gray_r", interpolation="bicubic")
        axes.set_title(title, color=colour, fontsize=12)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=2 if given != true else 0.8)
    figure.savefig(path, format="png", dpi=110)


# -- Check and times -------------------------------------------------------------------


@contextmanager
def switched_by_hand(model: nn.Module) -> Iterator[None]:
    """The way without this library: put BatchNorm layers in eval mode, and back."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


def norms_by_loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same norms, (N,), one sample after the other."""
    parameters = tuple(model.parameters())
    found = []
    with switched_by_hand(model):
        for i in range(len(x)):
            loss = F.cross_entropy(model(x[i, None]), y[i, None])
            grads = torch.autograd.grad(loss, parameters)
            found.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(found)


def norms_by_torch(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same norms, (N,), of full gradients by ``vmap(grad)`` in torch alone."""

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, parameters, image.unsqueeze(0))
        return F.cross_entropy(logits, label.unsqueeze(0))

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with switched_by_hand(model):
        rows = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    squares = [row.flatten(1).square().sum(1) for row in rows.values()]
    return torch.stack(squares).sum(0).sqrt()


def summed_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The yardstick: one forward and one backward pass for the whole batch."""
    with switched_by_hand(model):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        return torch.autograd.grad(loss, tuple(model.parameters()))


def check(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Print how far the norms are from the loop's; return whether they are equal.

    The comparison is in float64, on a copy, so that it shows errors and not rounding,
    on a GPU's tensor cores too.
    """
    model, x = copy.deepcopy(model).double(), x.double()
    loop = norms_by_loop(model, x, y)
    difference = norms(model, x, y) - loop
    relative = float(difference.norm() / loop.norm())
    equal = relative < TOLERANCE
    print(
        "\n"
        "Are the norms right? Next to a Python loop over the digits, in float64, they "
        f"are {'equal' if equal else 'NOT EQUAL'}\n"
        f"(relative difference {relative:.1e})."
    )
    return equal


def compare_times(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> None:
    """Print the medians of interleaved rounds as a table."""
    contenders: dict[str, Callable[[nn.Module, Tensor, Tensor], object]] = {
        "one gradient, of the summed loss": summed_gradient,
        "norms, by a Python loop": norms_by_loop,
        "norms, by torch.func's vmap(grad)": norms_by_torch,
        "norms, by vmapsafe": norms,
    }
    medians = time_in_rounds(
        {name: partial(f, model, x, y) for name, f in contenders.items()},
        rounds,
        x.device,
    )
    plain = next(iter(medians.values()))
    title = f"How long does it take? ({len(x)} digits, {x.device})"
    print(f"\n{title:48}{'ms':>8}{'times':>8}")
    for name, milliseconds in medians.items():
        print(f"{name:48}{milliseconds:8.1f}{milliseconds / plain:8.1f}")
    print(
        f"Medians of {rounds} rounds. The first line is one forward and backward pass, "
        "as in training. torch.func\n"
        "needs BatchNorm to be switched by hand, and makes all gradients to take their "
        "norms."
    )


def time_in_rounds(
    contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds by name, from rounds in which all meet the same noise."""
    from tqdm import trange

    times: dict[str, list[float]] = {name: [] for name in contenders}
    # The first round is not counted, as it pays first-time costs.
    for counted in trange(rounds + 1, desc="timing", unit="round"):
        # In alternating order: a contender does not always run after the same one.
        for name in list(contenders)[:: 1 if counted % 2 else -1]:
            started = _now(device)
            contenders[name]()
            if counted:
                times[name].append(1e3 * (_now(device) - started))
    return {name: statistics.median(values) for name, values in times.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- Types of options ------------------------------------------------------------------


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}")
    return device


def _picture(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: it must be a file in a folder that exists"
        )
    return path


def _epochs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of at least 1"
        )
    return int(text)
