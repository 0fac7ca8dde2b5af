"""The command `vitzoo`: parses, calls, prints; nothing else.

Standard output holds the result, a table or with `--json` one JSON document; progress and messages go to
standard error. Exit codes: 0 done, 1 an error that the message explains, 2 a command line that makes no
sense.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import vitzoo
from vitzoo.cli import bench, export, listing, quantize, report, validate  # noqa: F401  (each registers its commands)
from vitzoo.cli.common import app

__all__ = ["app", "main"]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(vitzoo.__version__ + "\n")
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    app()
