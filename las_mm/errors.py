"""What goes wrong by a user's hand, and the one way to say it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from las_mm.dependencies import MissingDependencyError

EXIT_CODE = 2  # of a process that a user's error ends, as argparse has it


class UserError(Exception):
    """Something the user can mend; its message is one sentence for a terminal."""


def last_line(error: BaseException) -> str:
    """What an error says in the end, its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextlib.contextmanager
def as_user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Around what raises errors of these kinds only where the user can mend them.

    Raises:
        UserError: One of them arose inside; it says the same.
    """
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def told(program: str) -> Iterator[None]:
    """Around a program: a user's errors, those of files and of packages end it in one line.

    Raises:
        SystemExit: See :func:`fail`.
    """
    try:
        yield
    except (UserError, MissingDependencyError, OSError) as error:
        fail(program, error)


def fail(program: str, message: object) -> NoReturn:
    """Say on stderr, in one line, what is wrong, and end the process.

    Raises:
        SystemExit: Always, with :data:`EXIT_CODE`.
    """
    print(f"{program}: error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    raise SystemExit(EXIT_CODE)
