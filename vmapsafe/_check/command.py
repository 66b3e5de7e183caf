"""``python -m vmapsafe check``: the report of :func:`vmapsafe.check` for a shell."""

from __future__ import annotations

import argparse
import importlib
import json
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vmapsafe._check.check import check
from vmapsafe._check.finding import one_line
from vmapsafe._draws import RANDOMNESS
from vmapsafe._errors import VmapSafeError, a_kind
from vmapsafe._modes import MODES

HELP = (
    "say what in a model is unsafe under vmap, and what to do. The exit status is 0 if "
    'the mode, "eval" by default, is safe; 1 if it is not; and 2 if the model cannot '
    "be looked at"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m vmapsafe check`` to a parser."""
    parser.add_argument(
        "model",
        metavar="MODULE:NAME",
        help="an nn.Module, or a callable that returns one without arguments, e.g. "
        "torchvision.models:resnet18; modules in the current directory are found",
    )
    parser.add_argument(
        "--input",
        metavar="SHAPE",
        type=_shape,
        action="append",
        default=[],
        help="the shape of an input, batch first, e.g. 2,3,64,64; once for each input. "
        "A batch of 2 or more shows more than one of 1. Without it nothing is run",
    )
    parser.add_argument(
        "--dtype",
        type=_dtype,
        default=torch.float32,
        help="the dtype of the inputs and, if it is a floating one, of the model "
        "(default: float32)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="look at this mode only; by default at all of them, and the exit status "
        'is that of "eval"',
    )
    parser.add_argument(
        "--randomness",
        choices=RANDOMNESS,
        default="error",
        help="what you will pass to vmap (default: error)",
    )
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument(
        "--all",
        action="store_true",
        help="print all findings, and what each mode makes of them",
    )
    printed.add_argument(
        "--json",
        action="store_true",
        help="print JSON, for programs: model, to_do, tried, safe (by mode), findings "
        "(path, module, kind, detail, becomes and safe by mode, advice, needs, named) "
        "and notes",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the report: a page, everything, or JSON.

    Args:
        arguments: what a parser with :func:`add_arguments` has read.

    Returns:
        The exit status: 0 if the mode is safe, 1 if it is not, 2 if the model cannot be
        looked at, after one sentence on stderr.
    """
    dtype: torch.dtype = arguments.dtype
    try:
        model = _loaded(arguments.model)
        if dtype.is_floating_point or dtype.is_complex:
            model.to(dtype)
        generator = torch.Generator().manual_seed(0)
        example = [_made_up(shape, dtype, generator) for shape in arguments.input]
        report = check(
            model, *example, mode=arguments.mode, randomness=arguments.randomness
        )
    except (_BadUsage, VmapSafeError) as error:
        print(f"vmapsafe check: {error}", file=sys.stderr)
        return 2
    with reader_may_leave():
        if arguments.json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            print(report.details() if arguments.all else report)
    return 0 if report.safe(arguments.mode or "eval") else 1


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Stop printing without an error when the reader of a pipe leaves (``| head``)."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # At exit, Python still writes what is in its buffer.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _BadUsage(Exception):
    """A sentence for the user of the command line."""


def _loaded(target: str) -> nn.Module:
    """The model that ``module:name`` stands for."""
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise _BadUsage(f"{target!r} is not of the form module:name.")
    if not {"", os.getcwd()} & set(sys.path):  # as in python -m
        sys.path.insert(0, os.getcwd())
    try:
        found = operator.attrgetter(name)(importlib.import_module(module))
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        raise _BadUsage(f"cannot load {target!r}: {one_line(error)}.") from error
    if not isinstance(model, nn.Module):
        raise _BadUsage(f"{target!r} gives {a_kind(model)}, not an nn.Module.")
    return model


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape, write e.g. 2,3,64,64"
        )
    return shape


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is not a dtype of torch")
    return dtype


def _made_up(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)
