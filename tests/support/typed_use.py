"""What type checkers see of the public interface; mypy checks it, nothing runs it."""

from collections.abc import Callable, Iterator
from typing import Any, assert_type

import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vmapsafe import (
    batched,
    check,
    clipped_grad_sum,
    convert,
    covers,
    norm_layer,
    over,
    per_sample,
    per_sample_grad_norms,
    per_sample_grads,
    per_sample_sketch,
)
from vmapsafe import quantities as q
from vmapsafe import vmap_safe


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    @vmap_safe
    def step(self, x: Tensor, scale: float = 1.0) -> list[Tensor]:
        return [scale * x]

    @vmap_safe(mode="no_running_stats")
    @staticmethod
    def of(net: "Net") -> int:
        return 1


@vmap_safe
def mapped(net: Net, x: Tensor) -> Tensor:
    return x


@vmap_safe(mode="sync", update_running_stats=True)
def drawn(net: Net) -> Iterator[int]:
    yield 1


@batched
def forward(x: Tensor) -> Tensor:
    return x


@batched(in_dims={"x": 0}, randomness="different")
def losses(net: Net, x: Tensor) -> tuple[Tensor, int]:
    return x, 1


def blocks(net: Net, conv: nn.Conv2d, many: list[Net]) -> None:
    with vmap_safe(net) as same:
        assert_type(same, Net)
    with vmap_safe(net, conv, mode="group_norm", num_groups=lambda c: c // 2) as both:
        assert_type(both, tuple[nn.Module, ...])
    with vmap_safe(*many, also=(Net,)) as all_of_them:
        assert_type(all_of_them, tuple[Net, ...])
    block = vmap_safe(net, mode="eval")
    assert_type(block.run(F.relu, Tensor(), inplace=False), Tensor)
    vmap_safe(net, mode="evil")  # type: ignore[call-overload]
    vmap_safe(3)  # type: ignore[call-overload]


def decorated(net: Net, x: Tensor) -> None:
    assert_type(mapped(net, x), Tensor)
    assert_type(net.step(x, scale=2.0), list[Tensor])
    assert_type(Net.of(net), int)
    assert_type(drawn(net), Iterator[int])
    call: Callable[[Net], int] = vmap_safe(net, mode="sync")(Net.of)
    assert_type(call(net), int)
    mapped(x, net)  # type: ignore[arg-type]


def of_batches(net: Net, x: Tensor) -> None:
    assert_type(forward(x), Tensor)
    assert_type(losses(net, x=x), tuple[Tensor, int])
    assert_type(batched(losses, (None, 0), out_dims=(0, 0))(net, x)[1], int)
    forward(net)  # type: ignore[arg-type]
    batched(forward, randomness="sometimes")  # type: ignore[call-overload]


def with_aux(output: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    return F.mse_loss(output, target), [output]


def samples(net: Net, x: Tensor) -> None:
    found = per_sample_grads(net, F.mse_loss, x, x, mode="sync", rows="detached")
    assert_type(found, dict[str, Tensor])
    found, aux = per_sample_grads(net, with_aux, x, x, has_aux=True, out=found)
    assert_type(aux, list[Tensor])
    assert_type(per_sample_grad_norms(net, nn.MSELoss(), x, x), Tensor)
    by_name = per_sample_grad_norms(net, F.mse_loss, x, x, per_parameter=True)
    assert_type(by_name, dict[str, Tensor])
    pair = per_sample_grad_norms(
        net, with_aux, x, x, per_parameter=True, has_aux=True, chunk_size="auto"
    )
    assert_type(pair, tuple[dict[str, Tensor], list[Tensor]])
    total = clipped_grad_sum(net, F.mse_loss, x, x, max_grad_norm=1.0, reduce="all")
    assert_type(total, dict[str, Tensor])
    sketch = per_sample_sketch(net, with_aux, x, x, k=8, has_aux=True, gather="all")
    assert_type(sketch, tuple[Tensor, list[Tensor]])
    per_sample_grads(net, F.mse_loss, x, x, mode="evil")  # type: ignore[call-overload]
    clipped_grad_sum(net, F.mse_loss, x, x)  # type: ignore[call-overload]
    per_sample_sketch(net, F.mse_loss, x, k=8, kind="x")  # type: ignore[call-overload]


def quantities(net: Net, x: Tensor, vectors: dict[str, Tensor]) -> None:
    assert_type(per_sample(net, F.mse_loss, x, x, want=q.Norms()), Tensor)
    by_name = per_sample(net, F.mse_loss, x, x, want=q.Norms(per_parameter=True))
    assert_type(by_name, dict[str, Tensor])
    assert_type(per_sample(net, F.mse_loss, x, x, want=q.Sum()), dict[str, Tensor])
    assert_type(per_sample(net, F.mse_loss, x, x, want=q.Gram(other=(x, x))), Tensor)
    pair = per_sample(net, with_aux, x, x, want=q.Dots(vectors), has_aux=True)
    assert_type(pair, tuple[Tensor, list[Tensor]])
    several = per_sample(net, F.mse_loss, x, x, want={"a": q.Losses(), "b": q.Rows()})
    assert_type(several, dict[str, Any])
    per_sample(net, F.mse_loss, x, x)  # type: ignore[call-overload]
    per_sample(net, F.mse_loss, x, want=q.Norms)  # type: ignore[call-overload]
    q.WeightedSum(3.0)  # type: ignore[arg-type]


def norms(model: nn.Module, loss_fn: object, x: Tensor, *, k: int = 2) -> Tensor:
    return x


def rows(model: nn.Module, loss_fn: object, x: Tensor) -> dict[str, Tensor]:
    return {}


def whole_data_sets(net: Net, loader: DataLoader[Tensor]) -> None:
    for result in over(loader, norms, net, F.cross_entropy, k=3):
        assert_type(result, Tensor)
    results = over(loader, norms, net, F.cross_entropy)
    assert_type(results.save("folder"), NDArray[Any])
    named = over(loader, rows, net, F.cross_entropy, keys=("x", "y"))
    assert_type(named.save("folder", repeatable=True), dict[str, NDArray[Any]])
    over(loader, 3, net, F.cross_entropy)  # type: ignore[arg-type]


def reports(net: Net, x: Tensor) -> None:
    report = check(net, x, randomness="same", also=(Net,))
    assert_type(report.safe(report.modes[0]), bool)
    assert_type(report[0].becomes["sync"], str)
    report.safe("evil")  # type: ignore[arg-type]
    check(net, x, mode="evil")  # type: ignore[arg-type]


def conversions(net: Net) -> None:
    assert_type(convert(net, "group_norm", num_groups=lambda c: c // 2), nn.Module)
    assert_type(norm_layer("eval")(64, eps=1e-3), nn.Module)
    convert(net, "evil")  # type: ignore[arg-type]


def libraries(net: Net) -> None:
    assert_type(covers(net), bool)
    assert_type(covers(net, "eval", "group_norm"), bool)
    covers(net, "evil")  # type: ignore[arg-type]
