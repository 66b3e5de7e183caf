"""Work in other threads, whose errors are raised here."""

import faulthandler
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def together(*works: Callable[[], object], timeout: float = 60) -> None:
    """Run them in threads that start at once; raise the first error."""
    barrier = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            barrier.wait(timeout)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(w,), daemon=True) for w in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback()
        raise AssertionError("a thread hangs")
    if errors:
        raise errors[0]


def in_a_thread(work: Callable[[], Result]) -> Result:
    found: list[Result] = []
    together(lambda: found.append(work()))
    return found[0]
