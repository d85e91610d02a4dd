"""`dus`, and `python -m dus_cli`."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """The entry point. The import is inside, so that Ctrl-C during it is one line, not a
    traceback.
    """
    try:
        from dus_cli.cli import main as run
    except KeyboardInterrupt:
        print("error: ended by SIGINT; nothing was left behind", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
