"""Shared by recognition and detection: errors, files, flags, devices, images, the training loop.

A program that imports this package ends quietly on Ctrl-C, also while it is still importing: torch takes seconds. It
has to be imported first."""

import sys
from types import TracebackType


def _end_quietly(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """`sys.excepthook`: one line for a KeyboardInterrupt, in place of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _end_quietly
