"""The command line of `samlight_hf.commands`, for `python -m samlight_hf.cli` and for scripts."""

import sys

from .commands.cli import main


__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
