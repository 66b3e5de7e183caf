"""What wins where: the thresholds of the speed rules, by type of device.

Read off the benchmarks in bench/, which propose what may stand here; a further device
is added by running them on it. On a type of device without an entry nothing has won
yet: torch's own rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Interval = tuple[float, float]
ANY: Interval = (0, float("inf"))


@dataclass(frozen=True)
class Convolution:
    """An algorithm for the weight gradients of a convolution, and where it wins.

    All intervals have both their ends. In a transposed convolution the roles of its
    input and of what it gives are exchanged, here as in the algorithms.

    Attributes:
        algorithm: a name in ``ALGORITHMS`` of rules/convolution.py, or "torch".
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
class Regimes:
    """What wins on one type of device.

    Attributes:
        convolutions: the first row that holds counts; where none does, torch's own.
        columns: how many numbers of copied windows to hold at a time, at most; they
            are to stay in the cache.
        one_convolution: where no row of ``convolutions`` holds: numbers in the rows of
            a batch from which on a call a sample wins over one convolution with the
            groups of all samples, as torch's own rule has it.
        batch_norm: values per sample and channel from which on the fused backward by
            running statistics wins over plain operations.
        group_norm: values per sample and channel from which on it wins to take it apart
            into layer norm and batch norm.
        layer_norm: numbers in the whole batch from which on ours wins.
        layer_norm_slice: numbers in a slice from which on a call of torch's kernel a
            slice wins: it needs no memory for what it sums up.
        linear: numbers in the output of the whole batch from which on one fused
            product and sum wins.
    """

    convolutions: tuple[Convolution, ...] = ()
    columns: int = 2**24
    one_convolution: float = float("inf")
    batch_norm: float = float("inf")
    group_norm: float = float("inf")
    layer_norm: float = float("inf")
    layer_norm_slice: float = float("inf")
    linear: float = float("inf")


def regimes(device: torch.device) -> Regimes:
    """Those of its type."""
    return REGIMES.get(device.type, _UNKNOWN)


_UNKNOWN = Regimes()
ONE, MANY = (1, 1), float("inf")
DEPTHWISE = {"groups": (2, MANY), "channels": ONE, "outputs": ONE}

REGIMES = {
    # An x86 server core, float32, torch 2.13.
    "cpu": Regimes(
        convolutions=(
            Convolution("products", kernel=ONE, groups=ONE, channels=(12, MANY)),
            # The first layer of a network.
            Convolution(
                "turned products",
                dims=(1, 2),
                groups=ONE,
                channels=(1, 4),
                outputs=(8, 128),
                positions=(200, MANY),
            ),
            # Its last ones: the fewer positions, the fewer channels it takes.
            *[
                Convolution(
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
            Convolution(
                "products", dims=ONE, kernel=(11, MANY), groups=ONE, channels=(12, MANY)
            ),
            # Depthwise, where torch has no fast kernel.
            Convolution("products", dims=ONE, kernel=(15, MANY), **DEPTHWISE),
            Convolution(
                "products",
                dims=(2, 2),
                kernel=(20, MANY),
                positions=(150, MANY),
                **DEPTHWISE,
            ),
            # Groups that are almost so.
            *[
                Convolution(
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
        one_convolution=2**23,
        batch_norm=128,
        group_norm=256,
        layer_norm=2**17,
        layer_norm_slice=2**13,
        linear=2**17,
    ),
}
