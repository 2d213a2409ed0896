"""Files that are whole or not there, and files that people write."""

import os
from collections.abc import Callable
from pathlib import Path

import yaml

from .messages import one_line


def write_aside(path: Path, write: Callable[[Path], object]):
    """Has `write` make a file beside `path`, and moves it there: whoever is killed on the way leaves what was there before."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_yaml(path: str | os.PathLike):
    """What a YAML file holds. Raises ValueError, with the path, for one that cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: not YAML ({one_line(error)}).") from error
