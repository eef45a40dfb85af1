"""The command line: arguments, files, devices and printing. What it does stands in the other rooms."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from .._version import __version__
from ..errors import NadhooksError
from . import files, learning, live, models
from .printing import as_options, err, one_line, showing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for what a user can mend, 2 for bad usage, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = showing(warnings.showwarning)
            options.run(options)
    except (NadhooksError, OSError, ImportError) as error:
        if options.debug:
            raise
        err.print(f"nadhooks: error: {as_options(one_line(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        err.print("nadhooks: stopped")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nadhooks",
        description="Which part of a trained vision network does what: learn which units each class needs, "
        "and see them as an information-flow graph.",
        epilog="New here? Run `nadhooks demo`. Every command explains itself: nadhooks learn --help.",
    )
    parser.add_argument("--version", action="version", version=f"nadhooks {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        sub.set_defaults(run=run)
        return sub

    learning.add_commands(command)
    models.add_commands(command)
    live.add_commands(command)
    files.add_commands(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
