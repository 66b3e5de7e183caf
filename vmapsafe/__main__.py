"""The command line, ``python -m vmapsafe``: the demo, or one of the sub-commands."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmapsafe import __version__
from vmapsafe._check import command as check
from vmapsafe.examples import wrong_labels


class Command(NamedTuple):
    """A sub-command: its line of help, the options it adds, and what it does."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


# Name -> command; a new one is one line.
COMMANDS: dict[str, Command] = {
    "check": Command(check.HELP, check.add_arguments, check.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name, by default those of the process.

    Returns:
        The exit status. Wrong arguments, ``--help`` and ``--version`` raise
        ``SystemExit``, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vmapsafe",
        description=(
            "Without a command: a demo that finds wrong labels among handwritten "
            "digits by the size of each one's gradient through a BatchNorm net "
            "(needs matplotlib, scikit-learn and tqdm)."
        ),
    )
    parser.add_argument(
        "--version", action="version", version=f"vmapsafe {__version__}"
    )
    wrong_labels.add_arguments(parser)
    parser.set_defaults(run=wrong_labels.run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        child = commands.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(child)
        child.set_defaults(run=command.run)

    status = _READER_LEFT  # unless the command returns its own
    with check.reader_may_leave():
        options = parser.parse_args(argv)
        status = int(options.run(options))
    return status


_READER_LEFT = 128 + 13  # what a shell gives for a program that SIGPIPE has ended


if __name__ == "__main__":
    sys.exit(main())
