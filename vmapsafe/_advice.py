"""Notes for errors that torch's vmap raises: which layer, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from vmapsafe._state import Model

# (what torch 2.11 to 2.13 say, what to do); the first that fits.
_ADVICE = (
    (
        "random operation while in randomness error mode",
        'Pass randomness="different" (a draw of its own for each slice) or "same" to '
        "vmap, batched or per_sample_grads; or put the layer in eval mode before the "
        "block.",
    ),
    (
        "does not have vmap support",
        "The layer is an autograd.Function without a rule for vmap. Give the Function "
        "a vmap staticmethod (or generate_vmap_rule=True), or use the plain torch "
        "layer in its place.",
    ),
    (
        "inplace arithmetic",
        "Write the operation out of place. Buffers of the model are left alone inside "
        "vmap_safe, so this is another tensor, created outside vmap.",
    ),
    (
        "data-dependent control flow",
        "The layer asks for the value of a tensor, which differs from slice to slice. "
        "Use torch.where, or take the question out of the forward.",
    ),
    (
        ".item()",
        "The layer asks for the value of a tensor, which differs from slice to slice. "
        "Keep it a tensor.",
    ),
    (
        "different inplace randomness on an unbatched tensor",
        "The draw fills a tensor that vmap does not batch. Draw out of place "
        "(torch.bernoulli), or into torch.empty_like of the layer's input.",
    ),
    (
        "operators that can output dynamic shape",
        "The shape of the result depends on the values of the slice. Use torch.where "
        "or a mask.",
    ),
    (
        "Batching rule not implemented",
        "torch's vmap does not know this operation, as those of nn.LSTM, nn.GRU and "
        "nn.RNN. Write it with others, or loop over the slices.",
    ),
    (
        "running_mean or running_var, which will be updated in place",
        "The block does not cover this layer. Hand its model to vmap_safe as well.",
    ),
)


def advise(error: BaseException, models: Iterable[Model]) -> None:
    """Add a note to an error of torch's vmap; other errors, and its type, stay."""
    if not isinstance(error, (RuntimeError, ValueError)):
        return
    text = str(error)
    for said, advice in _ADVICE:
        if said in text:
            error.add_note(f"vmapsafe: raised in {_where(error, models)}. {advice}")
            return


def _where(error: BaseException, models: Iterable[Model]) -> str:
    """The innermost module of the models in the traceback."""
    found = "the code inside the block, outside its models"
    traceback = error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            for model in models:
                if module in model.modules:
                    found = model.label(module)
        traceback = traceback.tb_next
    return found
