"""The first cases of the fuzzer; ``python tests/support/fuzz.py`` runs more."""

import fuzz
import pytest

EACH = 100


@pytest.mark.parametrize("first", range(0, 2500, EACH))
def test_cases(first):
    mismatches = []
    for seed in range(first, first + EACH):
        try:
            fuzz.run(seed)
        except fuzz.Mismatch as error:
            mismatches.append(f"python tests/support/fuzz.py --seed {seed}: {error}")
    assert not mismatches, "\n".join(mismatches)
