"""check_quantity: right quantities pass, and each kind of mistake is found."""

import pytest
import torch

from vmapsafe import quantities as q
from vmapsafe.testing import check_quantity


def flat(rows):
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


def length_of_sum(rows, losses):
    return flat(rows).sum(0).norm()


def cosines(rows, losses):
    total = flat(rows).sum(0)
    return flat(rows) @ total / (flat(rows).norm(dim=1) * total.norm())


class Cosines(q.Quantity):
    """The cosine of each gradient and the sum of all, (B,): made of three others."""

    def looks(self, call):
        total = yield q.Sum()
        found = yield {"dots": q.Dots(total), "norms": q.Norms()}
        length = torch.cat([t.flatten() for t in total.values()]).norm()
        return found["dots"] / (found["norms"] * length)


class L1Norms(q.PerSample):
    """The sum of absolute values of each gradient, (B,): from rows."""

    def part(self, call, start, stop):
        return L1Part()


class L1Part(q.Part):
    def __init__(self):
        self.norms = 0

    def take(self, grads):
        few = [rows.abs().flatten(1).sum(1) for rows in grads.few()]
        self.norms = self.norms + torch.cat(few)

    def finished(self):
        return self.norms


class LengthOfSum(q.Collected):
    """The norm of the summed gradient, ()."""

    def part(self, call, start, stop):
        return SumPart()

    def joined(self, call, parts):
        if call.made_up:
            return 0 * parts[0].norm()
        return sum(parts[1:], parts[0]).norm()


class SumPart(q.Part):
    def __init__(self):
        self.sums = {}

    def take(self, grads):
        self.sums[grads.name] = grads.sum().flatten()

    def finished(self):
        return torch.cat([self.sums[name] for name in sorted(self.sums)])


def test_right_ones():
    assert check_quantity(Cosines(), cosines) > 100
    assert check_quantity(L1Norms(), lambda rows, losses: flat(rows).abs().sum(1))
    assert check_quantity(LengthOfSum(), length_of_sum)
    check_quantity(
        lambda params, size: q.Dots({n: torch.ones_like(p) for n, p in params.items()}),
        lambda rows, losses: flat(rows).sum(1),
    )


class NoCrossTerms(LengthOfSum):
    """Takes the square of a sum for the sum of squares."""

    def part(self, call, start, stop):
        return NoCrossPart()

    def joined(self, call, parts):
        return 0 * parts[0] if call.made_up else sum(parts).sqrt()


class NoCrossPart(L1Part):
    def take(self, grads):
        self.norms = self.norms + grads.norms().square().sum()


class ChunksJoinedWrongly(LengthOfSum):
    """Adds up norms of sums, where it should take the norm of the sum."""

    def joined(self, call, parts):
        if call.made_up:
            return 0 * parts[0].norm()
        return sum([part.norm() for part in parts])


class ChunksReversed(L1Norms):
    def joined(self, call, parts):
        return super().joined(call, parts[::-1])


class DtypeOff(L1Norms):
    def joined(self, call, parts):
        return super().joined(call, parts).double()


class KeepsState(L1Norms):
    """Goes on from the call before."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "kept", L1Part())

    def part(self, call, start, stop):
        return self.kept


class NothingOfAnEmptyBatch(L1Norms):
    """Gives the samples that were made up for it."""

    def joined(self, call, parts):
        return torch.cat(parts)


class AllButOne(L1Norms):
    """Leaves out a parameter: one whose rows are summed over two uses."""

    def part(self, call, start, stop):
        return AllButOnePart()


class AllButOnePart(L1Part):
    def take(self, grads):
        if grads.name != "twice.weight":
            super().take(grads)


def l1(rows, losses):
    return flat(rows).abs().sum(1)


@pytest.mark.parametrize(
    "wrong, expected, said",
    [
        (NoCrossTerms, length_of_sum, "linear layers and norms, torch.float64, 5"),
        (ChunksJoinedWrongly, length_of_sum, "chunk_size=1"),
        (ChunksReversed, l1, "chunk_size=1"),
        (DtypeOff, l1, "float32"),
        (KeepsState, l1, "chunk_size="),
        (NothingOfAnEmptyBatch, l1, "0 samples"),
        (AllButOne, l1, "a layer used twice"),
        (Cosines, l1, "linear layers and norms"),
    ],
)
def test_mistakes_are_found(wrong, expected, said):
    with pytest.raises(AssertionError, match=said):
        check_quantity(wrong(), expected)


def spread(norms):
    return (norms - norms.mean()).square().mean()


class SpreadOfNorms(q.Quantity):
    """The variance of the norms over samples, (): NaN where there are none."""

    def looks(self, call):
        norms = yield q.Norms()
        return spread(norms)


def test_a_quantity_that_an_empty_batch_does_not_have():
    def expected(rows, losses):
        return spread(flat(rows).norm(dim=1))

    assert check_quantity(SpreadOfNorms(), expected)
    with pytest.raises(AssertionError, match="linear layers and norms"):
        check_quantity(SpreadOfNorms(), lambda rows, losses: expected(rows, losses) + 1)


class AddsToWhatItGets(q.Quantity):
    """Writes to the sum that it looked at, which is its own."""

    def looks(self, call):
        total = yield q.Sum()
        for value in total.values():
            value.mul_(2)
        again = yield q.Sum()
        return {name: total[name] + again[name] for name in total}


def test_each_quantity_has_memory_of_its_own():
    def expected(rows, losses):
        return {name: 3 * row.sum(0) for name, row in rows.items()}

    assert check_quantity(AddsToWhatItGets(), expected)


class FirstFew(q.Summed):
    """Forgets all but the last of a few samples at a time."""

    def part(self, call, start, stop):
        return FirstFewPart()


class FirstFewPart(q.Part):
    def __init__(self):
        self.found = {}

    def take(self, grads):
        for rows in grads.few():
            self.found[grads.name] = rows.abs().sum(0)

    def finished(self):
        return self.found


def test_a_few_rows_at_a_time_count():
    def expected(rows, losses):
        return {name: row.abs().sum(0) for name, row in rows.items()}

    with pytest.raises(AssertionError, match="a large layer"):
        check_quantity(FirstFew(), expected)


def test_a_class_is_refused():
    with pytest.raises(TypeError, match="write SpreadOfNorms"):
        check_quantity(SpreadOfNorms, lambda rows, losses: losses)
