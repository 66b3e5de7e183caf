"""The page that ``print(check(...))`` shows, its table of details, and its JSON."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Keeps
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from vmapsafe import FallbackWarning, batched, check, per_sample_grad_norms, vmap_safe
from vmapsafe.__main__ import main
from vmapsafe._modes import MODES


class Calls(nn.Module):
    """A layer of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.max().item()


def seen(model: nn.Module) -> nn.Module:
    """The model, with statistics of some batches."""
    for module in model.modules():
        if "running_mean" in module._buffers:
            module.running_mean.fill_(0.2)
    return model


def images(*layers: nn.Module) -> nn.Module:
    return seen(nn.Sequential(nn.Conv2d(4, 4, 3), *layers))


X = torch.randn(2, 4, 5, 5)

PAGE = """\
check(Sequential): use vmap_safe(model) for 2 BatchNorm2d layers; pass randomness= to vmap for
Dropout.
It then runs under vmap and vmap(grad) in every mode.

mode              batch norm normalises                   use it for
----------------  --------------------------------------  ------------------------------------------
eval              with the running statistics             per-sample gradients, Jacobians, inference
no_running_stats  with the statistics of the slice        MAML, and other slices that are batches
group_norm        over groups of channels of each sample  training by clipped per-sample gradients
sync              with the statistics of all slices       what a training step computes; ensembles

layers                           what was found                    what to do
-------------------------------  --------------------------------  ---------------------------------
Dropout: 3                       random                            Pass randomness= to vmap,
                                                                   "different" or "same".
2 BatchNorm2d: 1 and 1 more      mixes samples, writes buffers     Use vmap_safe(model).

All layers, and what each mode makes of them: report.details(), or --all.
"""  # noqa: E501

DETAILS = """\
check(Sequential): use vmap_safe(model) for 1 BatchNorm2d layer; pass randomness= to vmap for
Dropout.
It then runs under vmap and vmap(grad) in "eval".

path        class        under vmap              in vmap_safe               what to do
----------  -----------  ----------------------  -------------------------  ------------------------
1           BatchNorm2d  mixes samples: in       eval: with the running     Use vmap_safe(model).
                         training it normalises    statistics
                         with the statistics of
                         the slice

(as above)               writes buffers:         eval: nothing is written   Use vmap_safe(model).
                         updates the running
                         statistics and the
                         counter in place,
                         which torch refuses
                         under vmap and grad

2           Dropout      random: drops with      eval: not safe, raises     Pass randomness= to
                         probability 0.5           unless vmap is given     vmap, "different" or
                                                   randomness=              "same".
"""  # noqa: E501


def test_the_page() -> None:
    model = images(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Dropout())
    assert str(check(model, X)) == PAGE.strip("\n")


def test_the_details() -> None:
    report = check(images(nn.BatchNorm2d(4), nn.Dropout()), X, mode="eval")
    assert report.details() == DETAILS.strip("\n")


class Holder(nn.Sequential):
    """Calls what it does not register."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 1))
        self.__dict__["body"] = seen(nn.Sequential(nn.BatchNorm2d(4)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.body(x))


def twice(x: Tensor) -> Tensor:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    out: Tensor = Twice.apply(x)
    return out


def of_users(x: Tensor) -> Tensor:
    if torch._C._functorch.maybe_current_level():
        raise RuntimeError("I looked for x.item() in vain")
    return x


class Slow(nn.Module):
    """An operation that vmap runs slice by slice."""

    def forward(self, x: Tensor) -> Tensor:
        steps = x.flatten(2).log_softmax(1).permute(2, 0, 1)
        n = x.shape[0]
        lengths = torch.full((n,), len(steps)), torch.full((n,), 2)
        targets = torch.ones(n, 2, dtype=torch.long)
        return nn.functional.ctc_loss(steps, targets, *lengths)


EVERY = "It then runs under vmap and vmap(grad) in every mode."
NOT_SYNC = (
    'It then runs in "eval", "no_running_stats" and "group_norm", but not in "sync".'
)


@pytest.mark.parametrize(
    "model, first, second",
    [
        (
            images(nn.BatchNorm2d(4)),
            "use vmap_safe(model) for 1 BatchNorm2d layer.",
            EVERY,
        ),
        (
            images(nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)),
            "use vmap_safe(model) for 1 BatchNorm2d and 1 InstanceNorm2d layers.",
            EVERY,
        ),
        (images(nn.Dropout()), "pass randomness= to vmap for Dropout.", EVERY),
        (
            images(Keeps(), nn.BatchNorm2d(4)),
            "use vmap_safe(model, also=(Keeps,)) for 1 Keeps and 1 BatchNorm2d layers.",
            f'{EVERY[:-1]}, where also= is for "eval" alone.',
        ),
        (
            Holder(),
            "use vmap_safe(model, model.body) for model.body.",
            EVERY,
        ),
        (
            images(nn.BatchNorm2d(4), Item()),
            "use vmap_safe(model) for 1 BatchNorm2d layer; "
            'pass fallback="loop" for Item.',
            NOT_SYNC,
        ),
        (
            images(nn.BatchNorm2d(4), Calls(of_users)),
            "change Calls, see below; use vmap_safe(model) for 1 BatchNorm2d layer.",
            'As it is, it does not run in "eval", "no_running_stats", "group_norm" and '
            '"sync".',
        ),
        (
            images(nn.BatchNorm2d(4, affine=False).eval(), Slow()),
            'nothing to do in mode "eval".',
            "It runs under vmap and vmap(grad) in every mode.",
        ),
        (
            nn.Sequential(nn.LazyConv2d(4, 3)),
            "change LazyConv2d, see below.",
            'It cannot run in "eval", "no_running_stats", "group_norm" and "sync".',
        ),
    ],
)
def test_what_to_do_first(model: nn.Module, first: str, second: str) -> None:
    """The first line says what to do, and the second where the model then runs."""
    report = check(model, X)
    assert report.to_do == first
    start = " ".join(str(report).split("\n\n")[0].split())
    assert start.startswith(f"check({type(model).__name__}): {first} {second}")


def test_the_mode_that_is_asked_for() -> None:
    """It is what the first line recommends; the loop is none of "sync"."""
    report = check(images(nn.BatchNorm2d(4), nn.Dropout()), X, mode="sync")
    assert report.to_do.startswith('use vmap_safe(model, mode="sync") for')
    report = check(images(Item()), X, mode="sync")
    assert report.to_do == "change Item, see below."


def test_the_mode_that_runs() -> None:
    """A mode in which the model runs is recommended before one in which it does not."""

    class NotInEval(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            if not self.track_running_stats or not self.training:
                return super().forward(x * x.max().item())
            return super().forward(x)

    layer = NotInEval(4)
    report = check(images(layer), X)
    assert not report.safe("eval")
    runs = [mode for mode in MODES if report.safe(mode)]
    if runs:
        assert f'mode="{runs[0]}"' in report.to_do


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_randomness_that_is_passed(randomness: Any) -> None:
    report = check(images(nn.Dropout()), X, randomness=randomness)
    assert report.to_do == f'pass randomness="{randomness}" to vmap for Dropout.'


def test_a_safe_model_does_not_alarm() -> None:
    """Nothing of the page or its details says that something is wrong."""
    report = check(images(nn.BatchNorm2d(4)), X)
    assert all(report.safe(mode) for mode in MODES)
    alarm = re.compile(r"unsafe|not safe|raises|cannot|not in|error", re.IGNORECASE)
    assert not alarm.search(f"{report}{report.details()}") and not report.notes


# -- How long it is --------------------------------------------------------------------


def wild(count: int) -> nn.Module:
    """Layers of many classes, each with findings of its own."""
    layers: list[nn.Module] = []
    for i in range(count):
        kind = type(f"NormWithALongName{i}", (nn.BatchNorm2d,), {})
        layers += [kind(4), type(f"Drop{i}", (nn.Dropout,), {})()]
        named = type(f"Keeps{i}", (Keeps,), {})()
        layers.append(nn.ModuleDict({f"a_path_that_is_rather_long_{i}": named}))
        layers[-1].forward = named.forward
    return images(*layers)


@pytest.mark.parametrize(
    "build",
    [
        lambda: images(*[nn.BatchNorm2d(4) for _ in range(200)]),
        lambda: wild(2),
        lambda: wild(30),
        lambda: images(Calls(of_users), nn.BatchNorm2d(4)),
        lambda: images(*[Holder() for _ in range(12)], Item()),
    ],
)
def test_the_page_is_one_page(build: Callable[[], nn.Module]) -> None:
    """It has at most 30 lines of 100 characters, and what is left out is counted."""
    report = check(build(), X)
    assert len(report) > 1
    page = str(report).split("\n\nNote: ")[0].split("\n")
    assert len(page) <= 30
    everything = f"{report}\n{report.details()}".split("\n")
    assert max(len(line) for line in everything) <= 100


def test_rows_that_are_left_out_are_counted() -> None:
    """The rows that are shown and the number of those that are not add up."""
    model = images(*[type(f"Drop{i}", (nn.Dropout,), {})() for i in range(40)])
    page = str(check(model, X))
    shown = len(re.findall(r"^Drop\d+: ", page, re.MULTILINE))
    left_out = re.search(r"^and (\d+) more rows$", page, re.MULTILINE)
    assert left_out and shown + int(left_out[1]) == 40 and shown > 5
    assert "\nDrop39: " not in page and "Drop39" in check(model, X).details()


def test_what_stops_the_model_comes_first() -> None:
    """Then what it needs, and then what a block mends."""
    model = images(nn.BatchNorm2d(4), nn.Dropout(), Calls(of_users))
    page = str(check(model, X))
    rows = [page.index(name) for name in ("\nCalls: ", "\nDropout: ", "\nBatchNorm2d")]
    assert rows == sorted(rows)


def test_details_have_all_paths() -> None:
    report = check(images(*[nn.BatchNorm2d(4) for _ in range(20)]))
    assert "20 BatchNorm2d: 1 and 19 more" in str(report)
    lines = report.details().split("\n")
    assert all(
        any(line.split()[:1] == [str(i)] for line in lines) for i in range(1, 21)
    )
    assert report.details().count("mixes samples") == 1


# -- The loop --------------------------------------------------------------------------


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(5, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x[:, 0], torch.tensor([5]), batch_first=True)
        out: Tensor = self.cell(packed)[1]
        return out[0]


@pytest.mark.parametrize(
    "model, taken",
    [
        (images(Item()), True),
        (images(Calls(lambda x: x[x > 0].sum()[None])), True),
        (images(Calls(lambda x: x if x.sum() > 0 else -x)), True),
        (images(Calls(twice)), True),
        (images(Calls(lambda x: checkpoint(torch.sin, x, use_reentrant=True))), True),
        (images(Calls(lambda x: checkpoint(torch.sin, x, use_reentrant=False))), True),
        (images(Calls(of_users)), False),
        (images(Calls(lambda x: x.no_such_method())), False),
        (images(Calls(lambda x: x.reshape(7))), False),
        # Without vmap around it, too.
        (images(Calls(vmap(lambda row: row * row.max().item()))), False),
        (seen(nn.Sequential(nn.Flatten(), nn.LazyLinear(2))), False),
        (seen(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(100))), False),
    ],
)
def test_whether_the_loop_takes_it(model: nn.Module, taken: bool) -> None:
    """Each unsupported finding says so, for programs and for people."""
    report = check(model, X)
    found = [f for f in report if f.kind == "unsupported"]
    assert found
    for finding in found:
        assert finding.needs == ('fallback="loop"' if taken else "")
        said = 'fallback="loop" does not take it.' in finding.advice
        assert said is not taken and finding.advice.count('fallback="loop"') == 1
        assert 'fallback="loop"' not in finding.becomes["sync"]
        if taken:
            assert finding.becomes["eval"] == 'raises, and runs with fallback="loop"'
    mode = [mode for mode in MODES if not report.safe(mode)][0]
    runs = batched(lambda x: model(x), fallback="loop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        if taken:
            with vmap_safe(model, mode=mode):
                assert len(runs(X)) == 2
        else:
            with pytest.raises((RuntimeError, ValueError, AttributeError)):
                with vmap_safe(model, mode=mode):
                    runs(X)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_runs_in_per_sample(reentrant: bool) -> None:
    """The advice says so, and it does."""
    model = images(Calls(lambda x: checkpoint(torch.sin, x, use_reentrant=reentrant)))
    (finding,) = check(model, X, mode="eval")
    assert finding.advice.startswith("Call per_sample or its short forms")
    per_sample_grad_norms(model, lambda out, y: out.square().sum(), X, X)


def test_what_comes_after_an_error_is_not_known() -> None:
    """A layer that a run did not reach is not said to run."""
    model = seen(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Item()))
    report = check(model, torch.randn(2, 4))
    item = [f for f in report if f.module == "Item"][0]
    assert item.becomes["eval"].startswith("raises")
    for mode in ("no_running_stats", "group_norm"):
        assert item.becomes[mode] == "not known, as another error came first"
    norm = [f for f in report if f.path == "1" and f.kind == "unsupported"][0]
    assert norm.becomes["eval"] == norm.becomes["sync"] == "runs"


# -- Notes -----------------------------------------------------------------------------


def test_a_batch_of_one_is_said() -> None:
    """The report says why two samples are better."""
    model = images(nn.BatchNorm2d(4))
    assert check(model, X).notes == ()
    (note,) = check(model, X[:1]).notes
    assert note.startswith("The example is a batch of one. Pass two samples")


@pytest.mark.parametrize("mode, said", [("eval", True), ("sync", False)])
def test_statistics_that_no_batch_has_updated(mode: Any, said: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    notes = check(model, X, mode=mode).notes
    assert any("2 layers have running statistics" in note for note in notes) is said


# -- For programs ----------------------------------------------------------------------


def test_as_json() -> None:
    """All that a report says survives, under the keys that its docstring lists."""
    report = check(images(nn.BatchNorm2d(4), Item()), X[:1])
    read = json.loads(json.dumps(report.as_dict()))
    assert [*read] == ["model", "to_do", "tried", "safe", "findings", "notes"]
    assert read["model"] == "Sequential" and read["to_do"] == report.to_do
    assert read["tried"] is True and read["notes"] == list(report.notes)
    assert read["safe"] == {mode: report.safe(mode) for mode in MODES}
    for one, finding in zip(read["findings"], report, strict=True):
        assert one == {**vars(finding)}
        assert set(one) == {
            *("path", "module", "kind", "detail", "becomes", "safe", "advice"),
            *("needs", "named"),
        }


@pytest.mark.parametrize("options, status", [("", 1), ("--randomness same", 0)])
def test_the_command_prints_json(
    options: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One object, and the status that there is without --json."""
    given = ["check", "torch.nn:Dropout", "--input", "2,3", *options.split()]
    assert main([*given, "--json"]) == main(given) == status
    read = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    assert read["safe"]["eval"] is (status == 0)
    assert read["findings"][0]["kind"] == "random"


def test_the_command_prints_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "torch.nn:Dropout", "--all"]) == 1
    assert capsys.readouterr().out == f"{check(nn.Dropout()).details()}\n"


def test_json_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", "torch.nn:Dropout", "--all", "--json"])
    assert left.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_inputs_that_disagree(capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence and status 2, as nothing is known of the model."""
    given = ["check", "torch.nn:Identity", "--input", "2,3", "--input", "3,3", "--json"]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "have no batch in common" in err
