"""One sample's gradient by plain autograd, which runs what vmap refuses.

Forward and backward run with a copy of each parameter in the model. Backward may run a
forward again, as torch.utils.checkpoint does, and that has to see the copies too. So
they stay where they are, and the modes in force, until backward has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vmapsafe._block.refusals import is_of_reentrant_checkpoint
from vmapsafe._errors import VmapSafeRuntimeError
from vmapsafe._rows.copies import Copies, leaves_of
from vmapsafe._rows.parameters import Parameters
from vmapsafe._torch import run_backward, tree_map, under, without_autocast

Found = tuple[dict[str, Tensor], Tensor, Any]  # gradients, loss, aux


def by_autograd(
    called: str,
    parameters: Parameters,
    loss: Callable[..., tuple[Tensor, Any]],
    given: Callable[[], list[Tensor]],
    sample: tuple[Any, ...],
    watched: bool,
    derivatives: bool,
) -> Found:
    """The gradient of one sample.

    Args:
        called: the public function, for errors.
        parameters: those to differentiate by.
        loss: of the parameters by name, and a sample; with aux.
        given: the leaves of what the caller passed for the parameters.
        sample: trees of tensors.
        watched: whether plain autograd has an interest in what was passed.
        derivatives: whether those of the gradient are wanted.

    Returns:
        The gradient by each parameter, the loss, and aux.

    Raises:
        VmapSafeRuntimeError: a checkpoint of the reentrant kind would have to give
            derivatives of the gradient.
    """
    values = {name: _copy(value, watched) for name, value in parameters.values.items()}
    copies = Copies(called, parameters.originals)
    copies.stand_in(values)
    stand_in = parameters.standing_in if watched else parameters.alone

    def derived() -> Found:
        found, aux = loss(values, *sample)
        copies.check()
        leaves = leaves_of(found)
        ours = {id(leaf) for leaf in given()} if watched else set()
        copies.check_graph([leaf for leaf in leaves if id(leaf) not in ours])
        try:
            rows = _gradients(found, leaves, values, derivatives)
        except RuntimeError as error:
            if not is_of_reentrant_checkpoint(error):
                raise
            raise VmapSafeRuntimeError(
                called,
                "plain autograd could differentiate the rows, by parameters that were "
                "not chosen or by the batch, but a checkpoint with use_reentrant=True "
                "does not allow that",
                "Make the call under torch.no_grad(), or pass use_reentrant=False to "
                "the checkpoint",
            ) from error
        if not watched:
            aux = tree_map(_without_graph, aux)
        return rows, found.detach(), aux

    with torch.enable_grad():
        found: Found = under(copies, stand_in, values, derived)
    return found


def _copy(value: Tensor, watched: bool) -> Tensor:
    """A tensor of its own to differentiate by; if watched, derivatives pass through."""
    copy = value.view_as(value) if watched else value.detach()
    return copy if copy.requires_grad else copy.requires_grad_()


def _gradients(
    loss: Tensor, leaves: list[Tensor], values: Mapping[str, Tensor], derivatives: bool
) -> dict[str, Tensor]:
    own = {id(value) for value in values.values()}
    # Checkpoints of the reentrant kind run only where backward reaches all leaves.
    alone = all([id(leaf) in own for leaf in leaves])
    found: tuple[Tensor | None, ...] = tuple([None for _ in values])
    if loss.requires_grad:
        with without_autocast(loss.device):
            found = run_backward(
                loss,
                [*values.values()],
                accumulate=alone,
                create_graph=derivatives and not alone,
            )
    return {
        name: torch.zeros_like(value) if grad is None else _dense(grad)
        for (name, value), grad in zip(values.items(), found)
    }


def _without_graph(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _dense(grad: Tensor) -> Tensor:
    """A gradient that takes all memory, also of an embedding with ``sparse=True``."""
    return grad.to_dense() if grad.is_sparse else grad
