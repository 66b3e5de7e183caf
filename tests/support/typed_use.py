"""What type checkers see of the public interface; mypy checks it, nothing runs it."""

from collections.abc import Callable, Iterator
from typing import assert_type

import torch.nn.functional as F
from torch import Tensor, nn

from vmapsafe import batched, vmap_safe


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
