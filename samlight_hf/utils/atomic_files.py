"""Files that are whole or not there, names that file systems take, and files that people write."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import yaml

from .messages import one_line


_USUAL_LIMIT = 255  # bytes of a name on nearly every file system


def atomic_write(path: Path, write: Callable[[Path], object]):
    """Has `write` make a file beside `path`, and moves it there: whoever is killed on the way leaves what was there before."""
    aside = beside(path)
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def beside(path: Path, ending: str | None = None) -> Path:
    """Return a hidden name beside `path` that no other process takes (or with another `ending`), short enough for its folder."""
    return path.with_name(fit_name(f".{path.name}", f".{os.getpid()}.part" if ending is None else ending, path.parent))


def fit_name(stem: str, ending: str, folder: Path = Path()) -> str:
    """Join the stem and the ending to a name of a file in `folder`; a stem that is too long is cut, and told apart by a hash."""
    limit = _name_limit(folder)
    if len(os.fsencode(stem + ending)) <= limit:
        return stem + ending
    mark = f"~{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}{ending}"
    return os.fsencode(stem)[: limit - len(os.fsencode(mark))].decode("utf-8", "ignore") + mark


def read_yaml(path: str | os.PathLike):
    """What a YAML file holds. Raises ValueError, with the path, for one that cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: not YAML ({one_line(error)}).") from error


def _name_limit(folder: Path) -> int:
    """Bytes that a name in this folder may have: fewer than usual where names are encrypted."""
    try:
        return min(_USUAL_LIMIT, os.pathconf(folder, "PC_NAME_MAX"))
    except (AttributeError, OSError, ValueError):  # Windows, or a folder that is not there yet
        return _USUAL_LIMIT
