"""The first cases of the fuzzer; ``python tests/fuzz.py`` runs as many as wanted."""

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
            mismatches.append(f"python tests/fuzz.py --seed {seed}: {error}")
    assert not mismatches, "\n".join(mismatches)
