"""``check``: what in a model is unsafe under vmap, before it goes wrong.

It looks twice. First at the layers and their flags. Then, if there is an example, at
runs of a copy of the model on it, in every mode: errors, hand-made layers that write to
their buffers, and random functions show in a run only.
"""

from __future__ import annotations

from torch import nn

from vmapsafe._block.models import unwrapped
from vmapsafe._check.layers import findings_of_layers, note_on_statistics
from vmapsafe._check.outcomes import findings_of_trial
from vmapsafe._check.question import Question
from vmapsafe._check.report import Report
from vmapsafe._check.trial import example_of, tried
from vmapsafe._draws import Randomness, check_randomness
from vmapsafe._errors import VmapSafeTypeError, a_kind, shown
from vmapsafe._modes import MODES, ModeName, NumGroups, Options


def check(
    model: nn.Module,
    *example: object,
    mode: ModeName | None = None,
    randomness: Randomness = "error",
    num_groups: NumGroups = 32,
    also: tuple[type[nn.Module], ...] = (),
) -> Report:
    """Report what is unsafe in a model under vmap, and what each mode makes of it.

    >>> import torch
    >>> from torch import nn
    >>> from vmapsafe import check
    >>> class Centred(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_buffer("mu", torch.zeros(3))
    ...     def forward(self, x):
    ...         self.mu.lerp_(x.detach().mean((0, 2, 3)), 0.1)
    ...         return x - self.mu.view(-1, 1, 1)
    >>> model = nn.Sequential(Centred(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> report = check(model, torch.randn(2, 3, 8, 8))
    >>> for finding in report:
    ...     print(finding.path, finding.module, "|", finding.kind)
    0 Centred | writes buffers
    2 BatchNorm2d | mixes samples
    2 BatchNorm2d | writes buffers
    >>> report.safe("eval"), len(report)
    (True, 3)

    ``print(report)`` shows a page: what to do first, what each mode is for, and what
    was found, in one row for all layers of which the same is to be said. The kinds of
    findings:

    ================  ===============================================================
    "mixes samples"   batch norm with batch statistics, under vmap those of the slice
    "writes buffers"  running statistics, counters, a hand-made layer's own updates
    "random"          dropout and the like: vmap needs its ``randomness`` option
    "not registered"  a module that the model calls, out of the reach of a block
    "unsupported"     what vmap or vmap_safe raises, with the layer's path
    "slow fallback"   what torch's vmap runs slice by slice, which is right but slow
    ================  ===============================================================

    Args:
        model: the model; torch.compile, DataParallel and DistributedDataParallel are
            unwrapped.
        *example: a small batch of the model's inputs, e.g. ``x[:2]``; tensors
            (B, ...). One tuple is all positional inputs, one dict keyword inputs, as
            in :func:`per_sample_grads`. Without an example nothing is run.
        mode: the only mode to look at; by default all are.
        randomness: what you will pass to vmap; with "different" or "same" random
            layers are safe.
        num_groups: what you will pass to :func:`vmap_safe`: the number of groups in
            "group_norm", or a callable from the number of channels to it.
        also: what you will pass to :func:`vmap_safe`: classes of hand-made layers to
            put in eval mode. A finding names a class that would help.

    Returns:
        A report: a sequence of findings with ``path``, ``module``, ``kind``,
        ``detail``, ``becomes`` and ``safe`` by mode, ``advice``, ``needs`` and
        ``named``. Its ``safe(mode)`` says whether nothing unsafe was found in a mode;
        ``to_do`` is the first sentence of the page; ``details()`` is the page with all
        layers; and ``as_dict()`` is for JSON.

    Raises:
        VmapSafeValueError: an unknown mode or randomness; an example without tensors,
            or with batches that disagree.
        VmapSafeTypeError: ``model`` is not a module, ``num_groups`` is not an int or a
            function, or ``also`` is not a tuple of classes.

    ``check`` runs a copy of the model, under vmap and vmap(grad), on at most two slices
    of one sample. The model, its ``.grad`` and the random generators of torch and
    Python stay as they are. An error stops a run; what comes after the layer that
    raised it shows once you have mended that layer. What the model's code does
    elsewhere, to lists, files or NumPy's generator, it does here too. ``check`` does
    not compare numbers with those of a loop.
    """
    if not isinstance(model, nn.Module):
        raise VmapSafeTypeError(
            "check(...)",
            f"{shown(model)} is {a_kind(model)}, not an nn.Module",
            "Write check(model, x[:2])",
        )
    options = Options(
        called="check(...)",
        mode="eval" if mode is None else mode,
        num_groups=num_groups,
        also=also,
    )
    check_randomness("check(...)", randomness)
    net = unwrapped(model)
    question = Question(
        net=net,
        modules=dict(net.named_modules()),
        modes=tuple([m.name for m in MODES.values() if mode in (None, m.name)]),
        randomness=randomness,
        options=options,
    )
    inputs = example_of(example)
    findings = list(findings_of_layers(question))
    trial = tried(question, inputs, findings)
    findings += findings_of_trial(question, trial, list(findings))
    notes = [*trial.notes, note_on_statistics(question)]
    order = {path: i for i, path in enumerate(question.modules)}
    findings.sort(key=lambda finding: order.get(finding.path, len(order)))
    return Report(
        type(net).__name__,
        question.modes,
        findings,
        tried=bool(trial.in_mode),
        notes=[note for note in notes if note],
    )
