"""Which algorithm for the weight gradients of a convolution wins where.

Made by bench/thresholds/convolution.py, which proposes the rows; another type of device
is added by running it there. Without an entry torch's own rule runs.
"""

from __future__ import annotations

from dataclasses import dataclass

Interval = tuple[float, float]
ANY: Interval = (0, float("inf"))


@dataclass(frozen=True)
class Winner:
    """An algorithm for the weight gradients of a convolution, and where it wins.

    All intervals have both their ends. In a transposed convolution the roles of its
    input and of what it gives are exchanged, here as in the algorithms.

    Attributes:
        algorithm: a name in ``ALGORITHMS`` of convolution.py, or "torch".
        dims: spatial dimensions.
        kernel: positions of the kernel.
        groups: 1 unless the convolution is a grouped one.
        channels: input channels of a group.
        outputs: output channels of a group.
        positions: output positions of a slice, those of all its samples.
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
    """What wins on one type of device.

    Attributes:
        winners: the first row that holds counts; where none does, torch's own.
        columns: how many numbers of copied windows to hold at a time, at most; they
            are to stay in the cache.
        one_by_one: where no row of ``winners`` holds: numbers in the rows of a batch
            from which on a call a sample wins over one convolution with the groups of
            all samples, as torch's own rule has it.
    """

    winners: tuple[Winner, ...]
    columns: int
    one_by_one: int


ONE, MANY = (1, 1), float("inf")
DEPTHWISE = {"groups": (2, MANY), "channels": ONE, "outputs": ONE}

REGIMES = {
    # An x86 server core, float32, torch 2.13.
    "cpu": Regime(
        winners=(
            Winner("products", kernel=ONE, groups=ONE, channels=(12, MANY)),
            # The first layer of a network.
            Winner(
                "turned products",
                dims=(1, 2),
                groups=ONE,
                channels=(1, 4),
                outputs=(8, 128),
                positions=(200, MANY),
            ),
            # Its last ones: the fewer positions, the fewer channels it takes.
            *[
                Winner(
                    "products",
                    dims=(1, 2),
                    groups=ONE,
                    channels=(channels, MANY),
                    outputs=(outputs, MANY),
                    positions=(2, positions),
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
            # Depthwise, where torch has no fast kernel.
            Winner("products", dims=ONE, kernel=(15, MANY), **DEPTHWISE),
            Winner(
                "products",
                dims=(2, 2),
                kernel=(20, MANY),
                positions=(150, MANY),
                **DEPTHWISE,
            ),
            # Groups that are almost so.
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
}
