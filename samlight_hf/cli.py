"""The command line, for `python -m samlight_hf.cli` and for scripts; it is in `samlight_hf.commands`."""

import sys

from .commands.cli import main


__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
