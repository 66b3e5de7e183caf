"""Rows and what follows from them, by a loop of plain backward passes."""

import functools
import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from plain import ModeName, joined, switched
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# {name of a parameter: (B, *shape)}
Rows = dict[str, Tensor]
Loss = Callable[..., Tensor]


def rows(
    model: nn.Module,
    loss_fn: Loss,
    *batch: Tensor,
    names: Iterable[str] | None = None,
    slices: bool = False,
) -> Rows:
    """Of the parameters that require gradients, or of those named; zeros where a loss
    does not use one. With ``slices`` x[i] is a batch, and not x[i : i + 1]."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if names is not None:
        params = {name: params[name] for name in names}
    columns = []
    for x, *rest in parts_of(batch, slices):
        loss = loss_fn(model(x), *rest).sum()
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        zeros = map(torch.zeros_like, params.values())
        columns.append([z if g is None else g for g, z in zip(grads, zeros)])
    return {name: torch.stack(column) for name, column in zip(params, zip(*columns))}


def parts_of(batch: Iterable[Tensor], slices: bool = False) -> list[tuple[Tensor, ...]]:
    """One of each sample."""
    if slices:
        return [*zip(*batch)]
    return [*zip(*[part.split(1) for part in batch])]


def rows_in(
    model: nn.Module,
    mode: ModeName,
    loss_fn: Loss,
    *batch: Tensor,
    slices: bool = False,
) -> Rows:
    """Rows in a mode without "sync", by the names that parameters have in ``model``."""
    plain = plain_in(model, mode)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    found = rows(plain, loss_fn, *batch, slices=slices)
    return dict(zip(names, found.values(), strict=True))


def losses_in(
    model: nn.Module,
    mode: ModeName,
    loss_fn: Loss,
    *batch: Tensor,
    slices: bool = False,
) -> Tensor:
    """(B,)"""
    plain = plain_in(model, mode)
    parts = parts_of(batch, slices)
    found = [loss_fn(plain(x), *rest).sum() for x, *rest in parts]
    return torch.stack(found).detach()


def plain_in(model: nn.Module, mode: ModeName) -> nn.Module:
    """A copy that does by hand what a block promises, with right gradients."""
    plain = switched(model, mode)
    for module in plain.modules():  # torch's kernel is wrong for one sample else
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(_contiguous_gradient)
    return plain


def _contiguous_gradient(module: nn.Module, args: object, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda g: g.contiguous())


def norms(rows: Rows) -> Tensor:
    """(B,)"""
    return torch.cat([_flat(row) for row in rows.values()], 1).square().sum(1).sqrt()


def _flat(row: Tensor) -> Tensor:
    return row.unsqueeze(-1).flatten(1)


def clipped(rows: Rows, most: float) -> Rows:
    """The sum of the rows, each at most ``most`` long."""
    total = {name: row.new_zeros(row.shape[1:]) for name, row in rows.items()}
    for i, norm in enumerate(norms(rows)):
        factor = 1.0 if norm <= most else float(most / norm)
        for name, row in rows.items():
            total[name] += factor * row[i]
    return total


def clipped_by_groups(rows: Rows, most: Mapping[str, float]) -> Rows:
    """The same, where each pattern of names has a norm for its own parameters."""
    groups: dict[str, Rows] = {}
    for name, row in rows.items():
        first = next(pattern for pattern in most if fnmatchcase(name, pattern))
        groups.setdefault(first, {})[name] = row
    sums: Rows = {}
    for pattern, group in groups.items():
        sums.update(clipped(group, most[pattern]))
    return {name: sums[name] for name in rows}


def summed(rows: Rows) -> Rows:
    return {n: sum(row, row.new_zeros(row.shape[1:])) for n, row in rows.items()}


def weighted(rows: Rows, weights: Tensor) -> Rows:
    """The sum of w_i times row i, over the samples whose weight is not 0."""
    total = {name: row.new_zeros(row.shape[1:]) for name, row in rows.items()}
    for i, weight in enumerate(weights.tolist()):
        for name, row in rows.items():
            if weight != 0:
                total[name] += weight * row[i]
    return total


def squares(rows: Rows) -> Rows:
    return summed({name: row * row for name, row in rows.items()})


def gram(rows: Rows, others: Rows) -> Tensor:
    """(B, B2)"""
    flat = torch.cat([_flat(row) for row in rows.values()], 1)
    other = torch.cat([_flat(others[name]) for name in rows], 1)
    return (flat.unsqueeze(1) * other).sum(2)


def dots(rows: Rows, vectors: Rows) -> Tensor:
    """(B,), or (B, K) with K vectors."""
    found = []
    for name, row in rows.items():
        vector = vectors[name].to(row.dtype)
        dims = list(range(1, row.dim()))
        if vector.dim() < row.dim():
            found.append((row * vector).sum(dims) if dims else row * vector)
            continue
        each = [row * one for one in vector]
        found.append(torch.stack([e.sum(dims) if dims else e for e in each], 1))
    return torch.stack(found).sum(0)


# -- Sketches --------------------------------------------------------------------------


def sketch(rows: Rows, k: int, kind: str = "rademacher", seed: int = 0) -> Tensor:
    """(B, k): the rows times a matrix that is drawn in one piece."""
    return torch.stack([*sketches(rows, k, kind, seed).values()]).sum(0)


def sketches(rows: Rows, k: int, kind: str = "rademacher", seed: int = 0) -> Rows:
    """The part of each parameter, {name: (B, k)}."""
    return {
        name: _flat(row) @ matrix(name, row.shape[1:], k, kind, seed) / math.sqrt(k)
        for name, row in rows.items()
    }


def matrix(
    name: str, shape: Iterable[int], k: int, kind: str = "rademacher", seed: int = 0
) -> Tensor:
    """A parameter's part of the matrix, (numbers, k), rebuilt from its recipe, by
    Python's own integers."""
    shape = [*shape]
    numbers = math.prod(shape)
    if kind == "kronecker" and len(shape) > 1:
        small = next(i for i in range(math.isqrt(k), 0, -1) if k % i == 0)
        left = _signs(f"{seed} {name}", 1, shape[0], small)
        right = _signs(f"{seed} {name}", 2, math.prod(shape[1:]), k // small)
        return torch.kron(left, right)
    if kind == "gaussian":
        places = _units(f"{seed} {name}", 0, numbers, k, 16)
        found = [[_quantiles()[place] for place in line] for line in places]
        return torch.tensor(found, dtype=torch.float64).view(numbers, k)
    return _signs(f"{seed} {name}", 0, numbers, k)


def _signs(text: str, part: int, lines: int, k: int) -> Tensor:
    found = [[1.0 - 2 * bit for bit in line] for line in _units(text, part, lines, k)]
    return torch.tensor(found, dtype=torch.float64).view(lines, k)


def _units(text: str, part: int, lines: int, k: int, bits: int = 1) -> list[list[int]]:
    """Some bits for each number, from the lowest of a line's words on."""
    digest = hashlib.sha256(text.encode()).digest()
    key = int.from_bytes(digest[8 * part :][:8], "little")
    each = math.ceil(k * bits / 64)
    found = []
    for i in range(lines):
        words = [_hashed(key, i * each + j) for j in range(each)]
        whole = sum([word << 64 * j for j, word in enumerate(words)])
        found.append([whole >> bits * j & (1 << bits) - 1 for j in range(k)])
    return found


def _hashed(key: int, counter: int) -> int:
    word = (key + counter * 0x9E3779B97F4A7C15) % 2**64
    word ^= word >> 32
    word = word * 0xBF58476D1CE4E5B9 % 2**64
    word ^= word >> 32
    word = word * 0x94D049BB133111EB % 2**64
    return word ^ word >> 32


@functools.cache
def _quantiles() -> list[float]:
    """2^16 numbers that are equally likely, of variance 1."""
    normal = statistics.NormalDist()
    found = [normal.inv_cdf((2 * i + 1) / 2**17) for i in range(2**16)]
    spread = math.sqrt(math.fsum([x * x for x in found]) / 2**16)
    return [x / spread for x in found]


# -- "sync" ----------------------------------------------------------------------------


def contributions(model: nn.Sequential, loss_fn: Loss, x: Tensor, y: Tensor) -> Rows:
    """The summed loss of all samples, derived by each sample's own copy of the
    parameters."""
    copies = {
        name: p.detach().expand(len(x), *p.shape).clone().requires_grad_()
        for name, p in model.named_parameters()
    }
    output = _by_copies(model, copies, x)
    losses = [loss_fn(output[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    grads = torch.autograd.grad(torch.stack(losses).sum(), list(copies.values()))
    return dict(zip(copies, grads))


def _by_copies(model: nn.Sequential, copies: Rows, x: Tensor) -> Tensor:
    """A Sequential on the batch with parameters (B, ...), one copy a sample, written
    out; batch norm by the statistics of all samples."""
    for index, layer in enumerate(model):
        own = {n: copies[f"{index}.{n}"] for n, _ in layer.named_parameters()}
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            one = F.linear if isinstance(layer, nn.Linear) else F.conv2d
            each = zip(x.split(1), own["weight"], own["bias"])
            x = torch.cat([one(x_, weight, bias) for x_, weight, bias in each])
        elif isinstance(layer, _BatchNorm):
            dims = [d for d in range(x.dim()) if d != 1]
            centred = x - x.mean(dims, keepdim=True)
            var = centred.square().mean(dims, keepdim=True)
            x = centred / (var + layer.eps).sqrt()
            if own:
                ones = [1] * (x.dim() - 2)
                x = x * own["weight"].view(len(x), -1, *ones)
                x = x + own["bias"].view(len(x), -1, *ones)
        else:
            x = layer(x)
    return x


def rows_in_sync(
    model: nn.Module, kind: str, loss_fn: Loss, *batch: Tensor, slices: bool = False
) -> tuple[Rows, Tensor]:
    """Rows and losses of any model, each sample with its own copy of it.

    ``kind`` is what the rows are: "contribution", "jacobian" or "detached".
    """
    parts = parts_of(batch, slices)
    models, run = joined(model, len(parts), detached=kind == "detached")
    outputs = run([part[0] for part in parts])
    losses = [loss_fn(y, *rest).sum() for y, (_, *rest) in zip(outputs, parts)]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    own = [dict(one.named_parameters()) for one in models]
    found = []
    for i in range(len(parts)):
        if kind == "jacobian":
            each = [derived(losses[i], [o[n] for n in names]) for o in own]
            found.append([sum(parts, torch.zeros(())) for parts in zip(*each)])
        else:
            total = losses[i] if kind == "detached" else torch.stack(losses).sum()
            found.append(derived(total, [own[i][n] for n in names]))
    rows = {n: torch.stack(column) for n, column in zip(names, zip(*found))}
    return rows, torch.stack(losses).detach()


def derived(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The gradient, zeros where there is none."""
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]
