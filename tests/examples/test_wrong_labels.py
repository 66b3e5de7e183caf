"""The demo and the command line: what they print is true, and errors are clear."""

import struct
import sys

import pytest
import torch

from vmapsafe import __main__, __version__
from vmapsafe.__main__ import main
from vmapsafe.examples import wrong_labels

LABELS = torch.arange(200) % 10


# ---------------------------------------------------------------- making labels wrong


@pytest.mark.parametrize(
    "share, expected", [(0.0, 0), (0.03, 6), (0.5, 100), (1.0, 200)]
)
def test_spoil_changes_that_many_labels_each_to_another_class(share, expected):
    spoilt, is_wrong = wrong_labels.spoil(LABELS, share, seed=0)
    assert int((spoilt != LABELS).sum()) == expected
    assert torch.equal(is_wrong, spoilt != LABELS)
    assert 0 <= int(spoilt.min()) and int(spoilt.max()) <= 9


def test_spoil_reaches_every_other_class():
    spoilt, _ = wrong_labels.spoil(LABELS, 1.0, seed=0)
    assert set(((spoilt - LABELS) % 10).tolist()) == set(range(1, 10))


def test_spoil_depends_on_its_seed_alone():
    first = wrong_labels.spoil(LABELS, 0.1, seed=1)[0]
    torch.rand(3)
    assert torch.equal(first, wrong_labels.spoil(LABELS, 0.1, seed=1)[0])
    assert not torch.equal(first, wrong_labels.spoil(LABELS, 0.1, seed=2)[0])


def test_spoil_leaves_its_argument_alone():
    labels = LABELS.clone()
    wrong_labels.spoil(labels, 0.5, seed=0)
    assert torch.equal(labels, LABELS)


# ---------------------------------------------------------------------------- ranking

# Ten samples; the ranking by size is 3, 7, 0, 9, … and 3, 0, 5 have wrong labels.
SIZES = torch.tensor([8.0, 1.0, 2.0, 10.0, 3.0, 4.0, 5.0, 9.0, 6.0, 7.0])
IS_WRONG = torch.zeros(10, dtype=torch.bool)
IS_WRONG[[3, 0, 5]] = True


@pytest.mark.parametrize(
    "share, found", [(0.1, 1), (0.2, 1), (0.3, 2), (0.7, 3), (1, 3)]
)
def test_found_among_first_counts_from_the_largest(share, found):
    assert wrong_labels.found_among_first(SIZES, IS_WRONG, share) == (
        found,
        round(10 * share),
    )


def test_area_under_roc_is_the_share_of_pairs_in_the_right_order():
    # 3 beats all seven right labels, 0 all but 7, 5 only 1, 2 and 4: 7 + 6 + 3 of 21.
    assert wrong_labels.area_under_roc(SIZES, IS_WRONG) == pytest.approx(16 / 21)


def test_the_three_ways_to_the_norms_agree():
    """The norms of this package, of torch and of a loop."""
    torch.manual_seed(0)
    model = wrong_labels.build().double()
    x, y = torch.rand(5, 1, 8, 8).double(), torch.arange(5)
    model(x)
    loop = wrong_labels.norms_by_loop(model, x, y)
    assert loop.shape == (5,)
    for norms in (wrong_labels.norms, wrong_labels.norms_by_torch):
        torch.testing.assert_close(norms(model, x, y), loop)


# ---------------------------------------------------------------------- the whole run


def test_quick_run_finds_draws_checks_and_times(tmp_path, capsys):
    picture = tmp_path / "suspects.png"
    assert main(["--quick", "--epochs=1", "--device=cpu", f"--picture={picture}"]) == 0

    data = picture.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert 600 < width < 2000 and 600 < height < 2000 and len(data) > 20_000

    printed = capsys.readouterr().out
    assert "300 handwritten digits, 9 of their labels made wrong" in printed
    assert str(picture) in printed
    assert "they are equal" in printed
    assert "by chance" in printed and "by the loss" in printed
    last = [line.split() for line in printed.splitlines()[-6:-2]]
    assert [words[0] for words in last] == ["one", "norms,", "norms,", "norms,"]
    assert all(float(words[-2]) > 0 and float(words[-1]) > 0 for words in last)


def test_norms_that_differ_from_the_loop_s_end_in_status_1(
    tmp_path, capsys, monkeypatch
):
    right = wrong_labels.norms
    monkeypatch.setattr(wrong_labels, "norms", lambda *args: right(*args) * (1 + 1e-6))
    assert main(["--quick", "--epochs=1", f"--picture={tmp_path / 's.png'}"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_switched_by_hand_puts_the_layers_back_after_an_exception():
    model = wrong_labels.build()
    with pytest.raises(KeyboardInterrupt), wrong_labels.switched_by_hand(model):
        assert sum(not module.training for module in model.modules()) == 3
        raise KeyboardInterrupt
    assert all(module.training for module in model.modules())


# --------------------------------------------------------------------- the command line


@pytest.mark.parametrize("package", ["matplotlib", "sklearn", "tqdm"])
def test_a_missing_extra_is_one_sentence_and_status_2(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert package in err and "pip install matplotlib scikit-learn tqdm" in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device=nonsense"], "'nonsense' cannot be used"),
        (["--picture=/no/such/folder/s.png"], "'/no/such/folder/s.png' cannot be"),
        (["--picture=."], "'.' cannot be written"),
        (["--epochs=0"], "'0' is not a whole number of at least 1"),
        (["--epochs=few"], "'few' is not a whole number of at least 1"),
    ],
)
def test_bad_options_are_told_before_anything_runs(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


@pytest.mark.parametrize(
    "arguments, said", [(["--help"], "--picture"), (["--version"], __version__)]
)
def test_help_and_version_need_torch_only(arguments, said, capsys, monkeypatch):
    for package in ("matplotlib", "sklearn", "tqdm"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert said in capsys.readouterr().out


def test_a_command_is_one_entry_of_the_table(capsys, monkeypatch):
    def add_arguments(parser):
        parser.add_argument("--device", default="its own")

    def run(options):
        print(f"ran with {options.device}")
        return 3

    command = __main__.Command("what it does", add_arguments, run)
    monkeypatch.setitem(__main__.COMMANDS, "greet", command)
    assert main(["greet"]) == 3
    assert capsys.readouterr().out == "ran with its own\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "what it does" in capsys.readouterr().out
