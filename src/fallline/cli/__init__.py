"""The command line. `app` holds the commands, `options` what they make of their words."""

from __future__ import annotations

import contextlib
import os
import sys


def main() -> None:
    """Runs the command line; a mistake in what was asked is one sentence on standard error and exit code 2."""
    from fallline.errors import FalllineError

    code: object = 0
    try:
        try:
            from fallline.cli.app import app  # inside: Ctrl-C may come while it is imported

            app()
        except SystemExit as leaving:
            code = leaving.code
        sys.stdout.flush()
    except FalllineError as error:
        code = _refuse(str(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        code = 1
        _discard_output()
    except OSError as error:  # a full disk, a file that may not be written
        where = f": {error.filename}" if error.filename else ""
        code = _refuse(f"{error.strerror or error}{where}.")
        _discard_output()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)  # type: ignore[arg-type]


def _refuse(sentence: str) -> int:
    print(f"fallline: {sentence}", file=sys.stderr)  # noqa: T201
    return 2


def _discard_output() -> None:
    """What is still buffered goes nowhere, so that the interpreter does not stumble over it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
