"""The command line. `app` holds the commands, `options` what they make of their words."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; a mistake in what was asked is one sentence on standard error and exit code 2."""
    from fallline.cli.app import app
    from fallline.errors import FalllineError

    try:
        app()
    except FalllineError as error:
        print(f"fallline: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
