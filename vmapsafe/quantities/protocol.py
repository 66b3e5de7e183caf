"""What a quantity is: something that follows from every sample's gradient.

Backward meets the parameters one by one. For each it hands over the gradients of the
samples as :class:`Grads`, from which rows could be made. Few quantities need the rows,
and none needs those of two parameters at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from vmapsafe._errors import VmapSafeValueError, shown
from vmapsafe._modes import Mode, RowsName
from vmapsafe._processes import gathered, summed
from vmapsafe._torch import constant_while_compiling, is_plain, tree_flatten, tree_map
from vmapsafe.rules.formulas import Formula, Made, Small, can_look, masked
from vmapsafe.rules.precision import HALVES

T = TypeVar("T", covariant=True)
All = Literal["all"] | None


@dataclass(frozen=True)
class CallShape:
    """The samples of one call, as much as a quantity needs to know.

    Attributes:
        called: the public function, for errors.
        parameters: the tensors at which gradients are taken, by name.
        count: how many samples run.
        in_chunks: whether they run a few at a time.
        mode: of the block.
        rows: in "sync", what the gradient of a sample is.
        made_up: whether the caller's batch is empty. Then the library runs samples that
            it made up, to find the shapes and dtypes of the result.
    """

    called: str
    parameters: Mapping[str, Tensor]
    count: int
    in_chunks: bool
    mode: Mode
    rows: RowsName
    made_up: bool


class Grads:
    """The gradients of some samples by one parameter, as layers give them.

    They are the rows (n, *shape) of n samples. Only :meth:`rows` makes all of them. The
    other methods make none, or a few at a time, where the layer allows it. Do not write
    to what a method returns, except :meth:`new_rows`.

    >>> import torch
    >>> from vmapsafe.quantities import Grads
    >>> grads = Grads.of_rows("weight", torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    >>> grads.norms()
    tensor([5., 2.])
    >>> grads.sum()
    tensor([3., 6.])
    >>> grads.gram()
    tensor([[25.,  8.],
            [ 8.,  4.]])

    Args:
        name: of the parameter.
        formula: how rows follow from the layer's input and output gradient.
        x: the input, (n, ...).
        grad: the output gradient, (n, ...).
        asked: how often each of "norms", "sum" and "squares" will be asked for. One
            call of the formula gives them together, each time in memory of its own.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
    """

    def __init__(
        self,
        name: str,
        formula: Formula,
        x: Tensor,
        grad: Tensor,
        asked: Mapping[str, int] | None = None,
    ) -> None:
        self.name, self.shape = name, formula.shape
        self._formula, self._x, self._grad = formula, x, grad
        self._asked = dict(asked or {})
        self._known: dict[str, Tensor] = {}

    @staticmethod
    def of_rows(
        name: str,
        rows: Tensor,
        asked: Mapping[str, int] | None = None,
        own: bool = False,
    ) -> Grads:
        """Of rows (n, *shape) that are made already.

        If ``own``, they are contiguous, and nothing else uses their memory.
        """
        return Grads(name, Made(rows.shape[1:], own), rows, rows, asked)

    def __len__(self) -> int:
        return len(self._grad)

    @property
    def device(self) -> torch.device:
        return self._grad.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self._grad.dtype

    @property
    def dtype_of_norms(self) -> torch.dtype:
        """That of the rows; float32 for half precision, and real."""
        return _dtype_of_norms(self.dtype)

    def rows(self) -> Tensor:
        """(n, *shape), in the dtype of the parameter."""
        return self._formula.rows(self._x, self._grad)

    def few(self) -> Iterator[Tensor]:
        """The rows (some, *shape) of a few samples at a time."""
        for part in self._formula.few(self._x, self._grad):
            yield self._formula.rows(*part)

    def contiguous_rows(self) -> Tensor:
        """(n, *shape), contiguous."""
        made = isinstance(self._formula, Made) or torch.compiler.is_compiling()
        if made or not (is_plain(self._x) and is_plain(self._grad)):
            return self.rows().contiguous()
        return self.new_rows()

    def new_rows(self) -> Tensor:
        """(n, *shape), contiguous, in memory of their own, which may be written."""
        return self._formula.new_rows(self._x, self._grad)

    def write_rows(self, out: Tensor) -> None:
        """Write the rows into contiguous memory (n, *shape)."""
        self._formula.write_rows(self._x, self._grad, out)

    def norms(self) -> Tensor:
        """(n,): the Euclidean norm of each row; float32 for half precision."""
        return self._one("norms")

    def unrounded_norms(self) -> Tensor:
        """The same in a wider dtype, if they were computed in one."""
        if can_look(self._grad) or sum(self._asked.values()) > 1:
            return self.norms()
        return self._formula.unrounded_norms(self._x, self._grad)

    def are_small(self) -> bool:
        """Whether rows are few real numbers, which a formula does not make faster."""
        few = isinstance(self._formula, Small) and self.shape.numel() <= 2**14
        return few and not self._grad.is_complex()

    def sum(self) -> Tensor:
        """(*shape): the sum of the rows, in the dtype of the parameter."""
        return self._one("sum")

    def sum_of_squares(self) -> Tensor:
        """(*shape): of the rows' entries; float32 for half precision."""
        return self._one("squares")

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """(*shape): the sum of the rows, each times its factor (n,).

        A factor of exactly 0 leaves the row out, even if it is not finite.
        """
        if can_look(factors) and can_look(self._grad):
            left = factors != 0
            if bool(left.all()):
                return self._formula.weighted(self._x, self._grad, factors)
            x, grad = self._x[left], self._grad[left]
            if not len(grad):
                return grad.new_zeros(self.shape)
            return self._formula.weighted(x, grad, factors[left])
        left_out = factors == 0
        if torch.compiler.is_compiling() or not is_plain(factors):
            # A factor of 0 may have a derivative.
            left_out = left_out & ~(_finite(self._x) & _finite(self._grad))
        x = masked(self._x, left_out)
        grad = x if self._grad is self._x else masked(self._grad, left_out)
        return self._formula.weighted(x, grad, factors)

    def scaled_sum(self, factors: Tensor) -> Tensor:
        """The same for finite gradients, or factors that are not 0."""
        return self._formula.weighted(self._x, self._grad, factors)

    def dots(self, vectors: Tensor) -> Tensor:
        """(n, K): products with vectors (K, *shape); float32 for half precision."""
        return self._formula.dots(self._x, self._grad, vectors)

    def gram(self, other: Grads | None = None) -> Tensor:
        """(n, m): products with the rows of ``other``, by the same parameter, or with
        the same rows; float32 for half precision."""
        other = self if other is None else other
        formula, one = self._formula, other._formula
        same = type(formula) is type(one) and formula.options() == one.options()
        if not same:
            return Grads.of_rows(self.name, self.rows()).gram(
                Grads.of_rows(self.name, other.rows())
            )
        return formula.gram(self._x, self._grad, other._x, other._grad)

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        """(n, k_left * k_right): the entries of left^T M right, M being each row as a
        matrix (shape[0], rest), from left (shape[0], k_left) and right (rest, k_right).
        """
        return self._formula.projected(self._x, self._grad, left, right)

    def samples(self, which: slice) -> Grads:
        """Some of the samples."""
        x, grad = self._x[which], self._grad[which]
        return Grads(self.name, self._formula, x, grad, self._asked)

    def again(self, asked: Mapping[str, int]) -> Grads:
        """The same, for others who will ask."""
        return Grads(self.name, self._formula, self._x, self._grad, asked)

    def shared(self) -> Grads:
        """The same for several: nobody may write the memory of rows that are made."""
        if not isinstance(self._formula, Made) or not self._formula.own:
            return self
        return Grads.of_rows(self.name, self._x, self._asked)

    def held(self) -> Grads:
        """The same, in as little memory as may be, to be kept for later."""
        rows = self.shape.numel() * len(self)
        if isinstance(self._formula, Made) or rows > (
            self._x.numel() + self._grad.numel()
        ):
            return self
        return Grads.of_rows(self.name, self.rows(), self._asked)

    def _one(self, name: str) -> Tensor:
        left = self._asked.get(name, 0)
        if not left:
            return self._formula.together(self._x, self._grad, (name,))[name]
        if name not in self._known:
            asked = [other for other, count in self._asked.items() if count]
            found = self._formula.together(self._x, self._grad, asked)
            self._known.update(found)
        self._asked[name] = left - 1
        return self._known[name].clone() if left > 1 else self._known.pop(name)


@constant_while_compiling
def _dtype_of_norms(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype.to_real()


def _finite(x: Tensor) -> Tensor:
    """(n,): whether all numbers of a sample are."""
    return x.isfinite().unsqueeze(-1).flatten(1).all(1)


class Part(ABC):
    """Collects a quantity of some samples.

    This one collects the largest entry of each gradient:

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> class LargestPart(q.Part):
    ...     def __init__(self):
    ...         self.found = []
    ...     def take(self, grads):  # by one parameter: rows (some, *shape) at a time
    ...         rows = [rows.abs().flatten(1).amax(1) for rows in grads.few()]
    ...         self.found.append(torch.cat(rows))  # (n,)
    ...     def finished(self):
    ...         return torch.stack(self.found).amax(0)
    >>> class Largest(q.PerSample):
    ...     def part(self, call, start, stop):
    ...         return LargestPart()
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> per_sample(net, nn.MSELoss(), x, y, want=Largest(), chunk_size=2).shape
    torch.Size([5])

    Attributes:
        derivatives: whether outer derivatives are to pass through what it takes.
    """

    derivatives = False

    @abstractmethod
    def take(self, grads: Grads) -> None:
        """Take these samples' gradients by one parameter.

        Each parameter comes once, in any order; one that the loss does not use has rows
        of zeros. ``grads`` may be kept until :meth:`finished`, at the price of its
        memory; ``grads.held()`` is the smallest form.
        """

    def take_losses(self, losses: Tensor) -> None:
        """Take these samples' losses (n,), before the gradients."""

    @abstractmethod
    def finished(self) -> Any:
        """What these samples give; all parameters have been met."""


class Quantity(ABC, Generic[T]):
    """Something that follows from every sample's gradient.

    A quantity of one's own is a subclass of one of these:

    * :class:`PerSample`: numbers for each sample. It has a method ``part``, which
      returns a :class:`Part`, and the parts of chunks are put one after another.
    * :class:`Summed`: a sum over samples. It has a method ``part`` too, and the parts
      of chunks are added up.
    * :class:`Collected`: it has methods ``part`` and ``joined``.
    * :class:`Paired`: it has a method ``block``, for numbers of all pairs of samples.
    * :class:`Quantity`: it has a method ``looks``, and is made of other quantities.

    This one is the cosine between each gradient and the mean of all:

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import per_sample, quantities as q
    >>> class Cosines(q.Quantity):
    ...     def looks(self, call):
    ...         total = yield q.Sum()
    ...         found = yield {"dots": q.Dots(total), "norms": q.Norms()}
    ...         length = torch.cat([t.flatten() for t in total.values()]).norm()
    ...         return found["dots"] / (found["norms"] * length)
    >>> net, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    >>> per_sample(net, nn.MSELoss(), x, y, want=Cosines()).shape
    torch.Size([5])

    An object may be used in many calls, so what belongs to a call is kept in its parts.
    The code also runs under vmap and in torch.compile, so it cannot look at numbers, as
    ``.item()`` and ``if`` do. :func:`vmapsafe.testing.check_quantity` compares a
    quantity with the rows.
    """

    def begin(self, call: CallShape) -> Quantity[T]:
        """Begin a call.

        Args:
            call: its samples.

        Returns:
            This quantity, or one that belongs to the call alone.

        Raises:
            VmapSafeValueError: the quantity does not fit the call.
        """
        return self

    @abstractmethod
    def looks(self, call: CallShape) -> Looks[T]:
        """Look at the gradients of all samples, once or more often.

        A ``yield`` of a quantity, or of a dict of them, gives their values; ``return``
        gives the result. After the first look the gradients are at hand still if the
        samples ran at once. Chunks run again for each look.

        Args:
            call: the samples.

        Returns:
            A generator.
        """

    def across(self) -> tuple[str, str | None]:
        """The name and the value of the option that asks for all processes."""
        return "", None

    def of_all_processes(self, found: Any) -> T:
        """The result of all processes of torch.distributed's default group."""
        own: T = found
        return own


Looks = Generator[Quantity[Any] | Mapping[str, Quantity[Any]], Any, T]


class Block(ABC):
    """Collects a quantity of the pairs of some samples with some others."""

    @abstractmethod
    def take(self, grads: Grads, others: Grads) -> None:
        """Take the gradients by one parameter of both; each parameter comes once."""

    @abstractmethod
    def finished(self) -> Tensor:
        """(n, m, ...): what n samples and m others give."""


class OneLook(Quantity[T]):
    """A quantity that looks once, at what :meth:`begin` gives."""

    def looks(self, call: CallShape) -> Looks[T]:
        found: T = yield self.begin(call)
        return found


class Paired(OneLook[Tensor]):
    """A quantity of all pairs of samples, put together from blocks of some by some.

    The number of a pair must not depend on which of the two is the first.

    Attributes:
        other: a batch (inputs, targets, ...) whose samples are the second of each pair;
            None for the call's own.
    """

    other: tuple[Any, ...] | None = None

    @abstractmethod
    def block(self, call: CallShape) -> Block:
        """A collector for some pairs."""


class Collected(OneLook[T]):
    """A quantity whose parts come from some of the samples each.

    Attributes:
        asks: which of "norms", "sum" and "squares" a part asks of every
            :class:`Grads`. It only makes a call with several quantities faster.
    """

    asks: Collection[str] = ()

    @abstractmethod
    def part(self, call: CallShape, start: int, stop: int) -> Part:
        """A collector for the samples from ``start`` to ``stop``."""

    @abstractmethod
    def joined(self, call: CallShape, parts: Sequence[Any]) -> T:
        """The result, from what the parts gave, in the order of the samples."""

    def folded(self, call: CallShape, parts: list[Any]) -> list[Any]:
        """What the parts so far gave, in less memory if :meth:`joined` allows it."""
        return parts


# -- How parts, and processes, are put together ----------------------------------------


@dataclass(frozen=True, eq=False)
class Gathers(Quantity[T]):
    """A quantity of numbers for each sample, as processes put it together.

    Attributes:
        gather: "all" gives those of all processes of torch.distributed's default group,
            those of rank 0 first; their batches may differ in size. Every process has
            to make the call; if one fails, all raise.
    """

    gather: All = field(default=None, kw_only=True)

    def across(self) -> tuple[str, str | None]:
        return "gather", self.gather

    def of_all_processes(self, found: Any) -> T:
        together: T = tree_map(gathered, found)
        return together


@dataclass(frozen=True, eq=False)
class Reduces(Quantity[dict[str, Tensor]]):
    """A sum over samples, as processes put it together.

    Attributes:
        reduce: "all" adds up the sums of all processes of torch.distributed's default
            group, each with its own samples. Every process has to make the call, with a
            model of the same parameters; if one fails, all raise.
    """

    reduce: All = field(default=None, kw_only=True)

    def across(self) -> tuple[str, str | None]:
        return "reduce", self.reduce

    def of_all_processes(self, found: Any) -> dict[str, Tensor]:
        return summed(found)


@dataclass(frozen=True, eq=False)
class PerSample(Gathers[T], Collected[T]):
    """A quantity with a number, or several, for each sample: a tree of (B, ...).

    A subclass has a method ``part``. The parts of chunks are put one after another.

    Attributes:
        gather: None, or "all" for the samples of all processes.
    """

    def joined(self, call: CallShape, parts: Sequence[Any]) -> T:
        found: T = joined(call, parts)
        count = 0 if call.made_up else call.count
        for leaf in tree_flatten(found)[0]:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != count:
                raise VmapSafeValueError(
                    f"{call.called} with {type(self).__name__}",
                    f"its parts gave {shown(leaf)} for {count} samples",
                    "Return (n, ...) from finished, of the n samples of the part",
                )
        return found


@dataclass(frozen=True, eq=False)
class Summed(Reduces, Collected[dict[str, Tensor]]):
    """A quantity that is a sum over the samples: {name: shape}.

    A subclass has a method ``part``. The parts of chunks are added up.

    Attributes:
        reduce: None, or "all" for the sum over all processes.
    """

    def folded(self, call: CallShape, parts: list[Any]) -> list[Any]:
        if type(self).joined is not Summed.joined:
            return parts
        first, *rest = parts
        return [{n: sum([p[n] for p in rest], first[n]) for n in call.parameters}]

    def joined(self, call: CallShape, parts: Sequence[Any]) -> dict[str, Tensor]:
        first, *rest = parts
        found = {n: sum([p[n] for p in rest], first[n]) for n in call.parameters}
        if call.made_up:
            return {name: torch.zeros_like(total) for name, total in found.items()}
        return found


def joined(call: CallShape, parts: Sequence[Any]) -> Any:
    """Trees of tensors (samples, ...) as one tree, of the caller's samples."""
    if call.made_up:
        return tree_map(lambda t: t[:0], parts[0])
    if len(parts) == 1:
        return parts[0]
    return tree_map(lambda *chunks: torch.cat(chunks), *parts)
