"""The ``dynwire`` command: one module per sub-command, imported when it is used.

Exit codes: 0 done, 1 the operation failed (typed error on stderr), 2 wrong usage or settings, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (``sys.argv`` by default) and exit the process."""
    try:
        import click  # noqa: F401  the group below needs it; libraries that only import dynwire do not
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print("dynwire: the command line needs the package 'click': pip install dynwire[cli]", file=sys.stderr)
        sys.exit(2)
    try:
        from ._group import run

        code = run(arguments)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
