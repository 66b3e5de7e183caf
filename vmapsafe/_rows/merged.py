"""One forward of all samples as one batch, where every call treats samples alike.

The vmap of ``record`` costs 10 to 30 us for each call of torch, which is most of the
time that a small network takes. Most models need none: their functions compute each
sample of a batch by itself. So the model gets the batch as it is, and a mode looks at
each call of torch. A call that ``rules/alike`` knows is made for all samples at once;
a call with parameters is recorded as in ``record``. Anything else ends the trial:

* a function that is not in the table, or arguments that mix samples;
* a tensor of which it is not known where it comes from, for example from code that
  torch does not show to modes, such as TorchScript or an autograd.Function;
* an error of a kind that torch raises, which vmap may word for one sample.

Then the forward runs again, under vmap. The code of the model and the loss sees batches
of one in both: shapes have a 1 where the batch is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vmapsafe._errors import BlockError
from vmapsafe._rows.record import Recorded, Uses, no_hooks
from vmapsafe._torch import (
    TorchFunctionMode,
    autocasts,
    current_level,
    run_while_compiling,
    tree_flatten,
    tree_map,
    under,
    unseen_by_modes,
)
from vmapsafe.rules.alike import ALIKE, NUMBERS, Found, NotAlike
from vmapsafe.rules.kept_calls import KEPT_CALLS

# What torch raises. Other errors are the code's own, and may come once only.
TORCHS = (RuntimeError, TypeError, ValueError, IndexError, AssertionError)


def merged(
    shared: Iterable[Tensor],
    originals: Mapping[str, Tensor],
    loss: Callable[..., Any],
    batch: tuple[Any, ...],
    size: int,
    has_aux: bool,
    in_block: Callable[..., Any],
) -> Recorded:
    """Run a forward on the whole batch, and record it.

    Args:
        shared: the parameters and buffers of the model.
        originals: the parameters to differentiate by, by name.
        loss: of a batch of one.
        batch: trees of tensors (B, ...), none of which requires a gradient.
        size: B.
        has_aux: whether ``loss`` returns a pair.
        in_block: calls the loss in a block of the model.

    Returns:
        The losses, and the way to the gradients.

    Raises:
        NotAlike: it is not known that all calls treat samples alike.
    """
    uses = Uses(originals, size)
    mode = Merged(shared, originals, uses)
    # Other objects than the caller's, which the model may hold as its own.
    if all([type(part) is Tensor for part in batch]):  # for which trees are slow
        batch = tuple([part.detach() for part in batch])
        mode.begin(batch)
    else:
        batch = tree_map(lambda t: t.detach(), batch)
        mode.begin(tree_flatten(batch)[0])
    try:
        with torch.enable_grad(), no_hooks():
            result = in_block(under, mode, loss, *batch)
    except BlockError:
        raise
    except Exception as error:
        if mode.ended or isinstance(error, TORCHS):
            raise NotAlike from error
        raise
    if has_aux and (not isinstance(result, (tuple, list)) or len(result) != 2):
        raise NotAlike
    losses, aux = result if has_aux else (result, ())
    mode.check(losses, aux)
    aux = tree_map(lambda t: t.detach(), aux) if has_aux else aux
    found = Recorded(uses, losses, aux)
    if found.is_watched():
        raise NotAlike
    return found


class Trials:
    """How the last trial of each model ended, so that none fails twice in a row.

    All that a trial usually depends on is compared: what a call gives, to the last bit,
    is not to hang on the calls before it.
    """

    def __init__(self) -> None:
        self._last: weakref.WeakKeyDictionary[nn.Module, tuple[object, bool]]
        self._last = weakref.WeakKeyDictionary()

    def ended(
        self, net: nn.Module, loss: Callable[..., Any], tensors: Sequence[Tensor]
    ) -> bool | None:
        """Whether a trial like this succeeded; None if the last one was another."""
        known = self._last.get(net)
        if known is None or known[0] != _like(net, loss, tensors):
            return None
        return known[1]

    def note(
        self,
        net: nn.Module,
        loss: Callable[..., Any],
        tensors: Sequence[Tensor],
        succeeded: bool,
    ) -> None:
        """Remember one."""
        self._last[net] = _like(net, loss, tensors), succeeded


def _like(
    net: nn.Module, loss: Callable[..., Any], tensors: Sequence[Tensor]
) -> tuple[object, ...]:
    """What a trial usually depends on."""
    return (
        getattr(loss, "__code__", type(loss)),
        [(t.shape[1:], t.dtype) for t in tensors],
        [module.training for module in net.modules()],
    )


class Merged(TorchFunctionMode):
    """The mode under which the forward runs; a :class:`vmapsafe.rules.alike.Batch`.

    Args:
        shared: the parameters and buffers of the model.
        originals: the parameters to differentiate by, by name.
        uses: records those of the parameters.

    Attributes:
        ended: whether a call may not treat samples alike.
    """

    def __init__(
        self, shared: Iterable[Tensor], originals: Mapping[str, Tensor], uses: Uses
    ) -> None:
        super().__init__()
        self.size = uses.size
        self.copied = False
        self._uses = uses
        self._name_of = {id(p): name for name, p in originals.items()}
        self._shared = {id(t): t for t in shared if type(t) in (Tensor, nn.Parameter)}
        self._device = uses.anchor.device
        # Of the tensors that live: the place, and how often it had been written.
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self.ended = False

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Begin with the tensors of the batch."""
        for tensor in tensors:
            self._know(tensor, 0)

    def check(self, losses: Any, aux: Any) -> None:
        """Check what the loss returned.

        Args:
            losses: of all samples.
            aux: a tree of what it returned besides.

        Raises:
            NotAlike: they are not known to be of the samples.
        """
        if self._uses.written():
            raise NotAlike
        if self.ended or not isinstance(losses, Tensor) or losses.dim() != 1:
            raise NotAlike
        for leaf in (losses, *(tree_flatten(aux)[0] if aux != () else ())):
            if not isinstance(leaf, Tensor) or self.place(leaf) not in (0, NUMBERS):
                raise NotAlike

    @run_while_compiling
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        try:
            if (
                current_level()
                or not torch.is_grad_enabled()
                or autocasts(self._device)
            ):
                raise NotAlike
            with unseen_by_modes():
                handler = ALIKE.get(func)
                given = func, args, kwargs or {}
                found, place = handler(self, *given) if handler else self._kept(*given)
                if place is None:
                    return found
                if isinstance(found, Tensor):
                    self._know(found, place)
                else:
                    for tensor in found:
                        self._know(tensor, place)
                return found
        except BaseException:
            self.ended = True  # also if the code of the model goes on
            raise

    def _kept(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Found:
        """A call with parameters."""
        if func not in KEPT_CALLS:
            raise NotAlike
        kept, signature = KEPT_CALLS[func]
        bound = {**signature.bind(args, kwargs)}
        x = bound["input"]
        if not isinstance(x, Tensor) or self.place(x) != 0:
            raise NotAlike
        if bound.get("training") or bound.get("max_norm") is not None:
            raise NotAlike  # it may use the statistics of the batch, or write
        names = {own: self._name_of.get(id(bound[own])) for own in kept.parameters}
        for own, value in bound.items():
            if own != "input" and names.get(own) is None and isinstance(value, Tensor):
                if self.place(value) is not None or value.requires_grad:
                    raise NotAlike
        y = self._uses.recorded(func, kept, bound, self._name_of)
        if y is None:
            raise NotAlike
        return y, 0

    def _know(self, tensor: Tensor, place: int) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), place, tensor._version

    # -- What entries of the table ask -------------------------------------------------

    def place(self, value: Any) -> int | None:
        """Where a tensor of the batch has B; None for what all samples share. Raises
        :class:`NotAlike` if it is not known where the tensor comes from."""
        found = self._known.get(id(value))
        if found is not None:
            ref, place, version = found
            written = value._version
            if ref() is value:
                if written != version:
                    raise NotAlike  # it was written where nobody saw it
                return place
        if id(value) not in self._shared:
            raise NotAlike
        return None

    def is_own(self, value: Any) -> bool:
        """Whether each sample has its own copy of a tensor, as of a parameter."""
        return id(value) in self._name_of

    def copies(self, value: Tensor) -> Tensor:
        """These copies, (B, *shape)."""
        name = self._name_of[id(value)]
        found = self._uses.copies_of(name)
        self._uses.fresh.discard(name)
        return found
