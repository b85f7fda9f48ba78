"""The entry point of `octet`. Ctrl-C ends it without a traceback, even while it is loading."""

from __future__ import annotations

import sys

from .exit_codes import INTERRUPTED


def main() -> None:
    """Run the command that the command line names."""
    try:
        from .main import app
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    app()


if __name__ == "__main__":
    main()
