"""The tangent kernel of a BatchNorm network, and regression with it.

J(x), (10, P), is the Jacobian of the network's outputs with respect to its weights at
an image. The kernel of two images is the mean over outputs of J(x) J(x')^T: how much a
step on one image moves the outputs at the other (https://arxiv.org/abs/1806.07572).
With an output in the place of a loss, ``Gram`` gives its products for all pairs of
images, and Jacobians, 10 * P numbers for each image, are never made. (Where they are
wanted themselves, ``vmap(jacrev(...))`` inside ``vmap_safe(model)`` gives them.) In
``mode="eval"`` an image's Jacobian depends on that image alone.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe import per_sample
from vmapsafe import quantities as q
from vmapsafe.examples import digits

TRAINING, TEST = 250, 150  # images
RIDGE = 1e-3  # as a multiple of the kernel's mean diagonal
EPOCHS = 8
COMPARED = 12  # images


def main() -> dict[str, float]:
    """Compute kernels before and after training, compare with a loop, and use them.

    Returns:
        The largest difference from the loop's kernel, relative to its largest entry;
        the smallest eigenvalue, relative to the largest; the alignment with the labels
        before and after training; the accuracy, on images not seen, of regression with
        the kernel before training, and of ridge regression on pixels.
    """
    torch.manual_seed(0)
    images, labels = digits.load()
    x, x_test = images[:TRAINING], images[TRAINING:][:TEST]
    y, y_test = labels[:TRAINING], labels[TRAINING:][:TEST]
    model = digits.network()
    for _ in range(20):
        model(x)  # statistics, without which "eval" has no meaning

    kernel = kernel_of(model, torch.cat([x, x_test]))
    difference = against_the_loop(model, x[:COMPARED], kernel)
    eigenvalues = torch.linalg.eigvalsh(kernel)
    smallest = float(eigenvalues[0] / eigenvalues[-1])
    print(
        f"The kernel of {len(kernel)} images, next to a loop over {COMPARED} of them: "
        f"largest relative difference {difference:.1e}.\n"
        f"It is positive: smallest eigenvalue {smallest:.1e}, relative to the largest."
    )

    of_kernel = digits.accuracy(regression(kernel, y), y_test)
    pixels = torch.cat([x, x_test]).flatten(1)
    of_pixels = digits.accuracy(regression(pixels @ pixels.T, y), y_test)
    print(
        f"Regression on {TRAINING} images, and {TEST} to be read: {of_kernel:.1%} "
        "right with the kernel of the untrained\n"
        f"network, {of_pixels:.1%} with that of the pixels."
    )

    before = alignment(kernel[:TRAINING, :TRAINING], y)
    digits.train(model, x, y, EPOCHS)
    after = alignment(kernel_of(model, x), y)
    print(
        "Training turns the kernel towards the labels: alignment with them (at most 1) "
        f"{before:.2f}, and {after:.2f} after it."
    )
    return {
        "difference": difference,
        "smallest eigenvalue": smallest,
        "alignment before": before,
        "alignment after": after,
        "accuracy": of_kernel,
        "accuracy of pixels": of_pixels,
    }


def kernel_of(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel of all pairs of images, (N, N)."""
    products = [
        per_sample(model, lambda logits, o=o: logits[0, o], x, want=q.Gram())
        for o in range(digits.CLASSES)
    ]
    return torch.stack(products).mean(0)


def regression(kernel: Tensor, y: Tensor) -> Tensor:
    """The outputs for the images after the first len(y), (N - len(y), 10)."""
    n = len(y)
    ridge = RIDGE * kernel.diagonal()[:n].mean() * torch.eye(n, dtype=kernel.dtype)
    targets = F.one_hot(y, digits.CLASSES).to(kernel.dtype) - 1 / digits.CLASSES
    coefficients = torch.linalg.solve(kernel[:n, :n] + ridge, targets)
    return torch.mm(kernel[n:, :n], coefficients)


def alignment(kernel: Tensor, y: Tensor) -> float:
    """The cosine between the centred kernel and the centred matrix of which images have
    the same class (Cortes et al., https://arxiv.org/abs/1203.0550, definition 4)."""
    same = (y == y[:, None]).to(kernel.dtype)
    pair = [k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in (kernel, same)]
    ours, wanted = [k.flatten() / k.norm() for k in pair]
    return float(ours @ wanted)


def against_the_loop(model: nn.Module, x: Tensor, kernel: Tensor) -> float:
    """The difference from the slow form: a backward pass for each output and image."""
    model = copy.deepcopy(model).eval()
    parameters = list(model.parameters())
    rows = []
    for i in range(len(x)):
        for logit in model(x[i : i + 1])[0]:
            grads = torch.autograd.grad(logit, parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    jacobians = torch.stack(rows).view(len(x), digits.CLASSES, -1)
    expected = torch.einsum("iop,jop->ij", jacobians, jacobians) / jacobians.size(1)
    found = kernel[: len(x), : len(x)]
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower at this size
    main()
