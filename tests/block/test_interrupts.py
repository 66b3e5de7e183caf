"""Ctrl-C anywhere: nothing of a block is left, and the next one is right.

At the first instruction of ``__exit__`` Python itself skips the rest; such a block is
closed by the next entry, which each check here begins with. ``python
tests/support/interrupts.py`` tries each line, and random times.
"""

import pytest
from interrupts import SCENARIOS, Interrupted

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("name", SCENARIOS)
def test_interrupted_at_a_line(name):
    """Interrupts at about thirty of the lines that the package runs."""
    every = 79
    found = Interrupted(name, every, first=7 * list(SCENARIOS).index(name)).start()
    assert found.tried >= 10
    assert not found.bad
