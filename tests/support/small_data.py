"""Ten samples, and a data set of them that stops."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(10) % 3


class Stops(Dataset[tuple[Tensor, Tensor]]):
    """Raises, once, when asked for a sample; counts those it has given."""

    def __init__(
        self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt
    ) -> None:
        self.at, self.error = at, error
        self.given: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == self.at:
            self.at = None
            raise self.error
        self.given.append(i)
        return X[i], Y[i]
