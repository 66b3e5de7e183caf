"""The fastest algorithm for the weight gradients of each kind of convolution.

bench/thresholds/convolution.py measures the algorithms and proposes the rows. To add
a type of device, run it there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from vmapsafe.rules.regimes import Regimes

Interval = tuple[float, float]
ANY: Interval = (0, float("inf"))


@dataclass(frozen=True)
class Winner:
    """An algorithm for the weight gradients, and the convolutions for which it wins.

    All intervals include both ends. In a transposed convolution the input and the
    output swap roles, here as in the algorithms.

    Attributes:
        algorithm: a name in ``ALGORITHMS`` of convolution.py, or "torch".
        dims: the number of spatial dimensions.
        kernel: the number of positions of the kernel.
        groups: the number of groups, 1 if the convolution is not grouped.
        channels: the input channels of a group.
        outputs: the output channels of a group.
        positions: the output positions of all samples of a slice.
    """

    algorithm: str
    dims: Interval = ANY
    kernel: Interval = ANY
    groups: Interval = ANY
    channels: Interval = ANY
    outputs: Interval = ANY
    positions: Interval = ANY

    def holds(
        self,
        dims: int,
        kernel: int,
        groups: int,
        channels: int,
        outputs: int,
        positions: int,
    ) -> bool:
        return (
            self.dims[0] <= dims <= self.dims[1]
            and self.kernel[0] <= kernel <= self.kernel[1]
            and self.groups[0] <= groups <= self.groups[1]
            and self.channels[0] <= channels <= self.channels[1]
            and self.outputs[0] <= outputs <= self.outputs[1]
            and self.positions[0] <= positions <= self.positions[1]
        )


@dataclass(frozen=True)
class Regime:
    """The fastest algorithms on one type of device.

    Attributes:
        batch: from this many numbers in the outputs of the whole batch, another rule
            under vmap costs less than it saves.
        winners: the first of these that holds is used; if none holds, torch's own rule.
        columns: how many numbers of copied windows to keep at a time, at most, so that
            they stay in the cache.
        one_by_one: used if none of ``winners`` holds. From this many numbers in the
            rows of a batch, one call for each sample is faster than one convolution
            with the groups of all samples, which is what torch's own rule does.
    """

    batch: int
    winners: tuple[Winner, ...]
    columns: int
    one_by_one: int


ONE, MANY = (1, 1), float("inf")
DEPTHWISE = {"groups": (2, MANY), "channels": ONE, "outputs": ONE}

REGIMES = Regimes(
    # An x86 server core, float32, torch 2.13.
    cpu=Regime(
        batch=2**13,
        winners=(
            Winner("products", kernel=ONE, groups=ONE, channels=(12, MANY)),
            # Few input channels, as in the first layer of a network.
            Winner(
                "turned products",
                kernel=(2, 20),
                groups=ONE,
                channels=(1, 8),
                outputs=(8, 90),
            ),
            Winner(
                "turned products",
                dims=(1, 2),
                groups=ONE,
                channels=(1, 4),
                outputs=(8, 128),
                positions=(200, MANY),
            ),
            # The last layers: the fewer the positions, the fewer channels are enough.
            *[
                Winner(
                    "products",
                    dims=(1, 2),
                    groups=ONE,
                    channels=(channels, MANY),
                    outputs=(outputs, MANY),
                    positions=(1, positions),
                )
                for channels, outputs, positions in (
                    *((24, 48, 16), (48, 96, 64), (96, 48, 64)),
                    *((96, 96, 256), (48, 192, 256)),
                )
            ],
            # Long kernels in one dimension.
            Winner(
                "products", dims=ONE, kernel=(11, MANY), groups=ONE, channels=(12, MANY)
            ),
            # Depthwise convolutions for which torch does not have a fast kernel.
            Winner("products", positions=ONE, **DEPTHWISE),
            Winner(
                "sums",
                dims=(2, 2),
                positions=(2, 4),
                **{**DEPTHWISE, "groups": (128, MANY)},
            ),
            Winner("products", dims=ONE, kernel=(15, MANY), **DEPTHWISE),
            Winner(
                "products",
                dims=(2, 2),
                kernel=(20, MANY),
                positions=(150, MANY),
                **DEPTHWISE,
            ),
            # Almost depthwise: few input or few output channels in each group.
            *[
                Winner(
                    "products",
                    dims=(2, 2),
                    groups=(2, MANY),
                    channels=channels,
                    outputs=outputs,
                    positions=(150, MANY),
                )
                for channels, outputs in (((2, 5), (2, 90)), ((2, 90), (2, 5)))
            ],
        ),
        columns=2**19,
        one_by_one=2**23,
    ),
    # Not measured: a product of matrices that needs no copies, or one convolution.
    cuda=Regime(
        batch=0,
        winners=(Winner("products", kernel=ONE, groups=ONE),),
        columns=sys.maxsize,
        one_by_one=sys.maxsize,
    ),
)
