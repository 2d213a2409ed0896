"""Files and folders that are written whole or not at all, names that file systems accept, and YAML files."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from .messages import one_line


_USUAL_LIMIT = 255  # bytes of a name on nearly every file system


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and move it to `path`; an interruption leaves the earlier file as it was.

    Args:
        path: where the file goes.
        write: called with the temporary path, beside `path`, to write the file there.

    Raises:
        OSError: if the file cannot be written or moved; the message does not name the temporary file where the folder
            is missing or a folder is in the file's place.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    aside = beside(path)
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_new_folder(option: str, folder: Path) -> None:
    """Raise ValueError for an option's value that is neither a new nor an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{option} {folder} is not empty. Choose another folder.")


def check_replaceable(path: Path) -> None:
    """Raise ValueError where `replace_folder` could not put a folder, before the work for it is done.

    Args:
        path: where the folder is to go.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        # Without it a shell would stand in a folder that is gone. A mount point cannot be moved.
        kind = "the working directory, or holds it," if Path.cwd().is_relative_to(real) else ""
        kind = kind or ("a mount point," if real.is_mount() else "")
        if kind:
            raise ValueError(f"{path} is {kind} and cannot be replaced. Choose a folder in it, such as {path / 'new'}.")
    parent = next(parent for parent in real.parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise ValueError(f"{path} cannot be made: {parent} is a file. Choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be made: {parent} cannot be written to. Choose another folder.")


def replace_folder(path: Path, write: Callable[[Path], object], *, fsync: bool = False) -> None:
    """Write a folder under a temporary name and move it to `path`; an error leaves the earlier folder as it was.

    Args:
        path: where the folder goes. What is there is removed once the new folder is in its place.
        write: called with the temporary path, beside `path`, to make the folder there.
        fsync: as in `move_folder`.

    Raises:
        OSError: if the folder cannot be written or moved.
    """
    aside = beside(path)
    _remove(aside)
    try:
        write(aside)
        move_folder(aside, path, fsync=fsync)
    finally:
        _remove(aside)


def move_folder(source: Path, destination: Path, *, fsync: bool = False) -> None:
    """Move a finished folder to `destination`, and then remove what was there.

    A folder cannot be moved onto one that is not empty, so the earlier one is first moved to a hidden name beside it.
    It is put back if the move fails. A process that is killed between the two moves leaves both whole, the earlier one
    under its hidden name.

    Args:
        source: a folder on the file system of `destination`.
        destination: where it goes.
        fsync: flush everything to the disk before and after the move, so that a power cut leaves no incomplete folder.

    Raises:
        OSError: if the folder cannot be moved.
    """
    if fsync:
        for path in [*source.rglob("*"), source]:
            _flush(path)
    earlier = beside(destination, f".{os.getpid()}.old")
    _remove(earlier)
    is_replaced = os.path.lexists(destination)
    if is_replaced:
        os.replace(destination, earlier)
    try:
        os.replace(source, destination)
    except BaseException:
        if is_replaced:
            os.replace(earlier, destination)
        raise
    if fsync:
        _flush(destination.parent)
    _remove(earlier)


def beside(path: Path, ending: str | None = None) -> Path:
    """Return a hidden name beside `path`, short enough for its folder.

    Args:
        path: the file or folder that is to be written.
        ending: the end of the name; by default one that no other process uses.
    """
    return path.with_name(fit_name(f".{path.name}", f".{os.getpid()}.part" if ending is None else ending, path.parent))


def fit_name(stem: str, ending: str, folder: Path = Path()) -> str:
    """Join a stem and an ending to a file name that is not too long for `folder`.

    A stem that is too long is cut, and a hash of it keeps the names of different stems apart.
    """
    limit = _name_limit(folder)
    if len(os.fsencode(stem + ending)) <= limit:
        return stem + ending
    suffix = f"~{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}{ending}"
    return os.fsencode(stem)[: limit - len(os.fsencode(suffix))].decode("utf-8", "ignore") + suffix


class _UniqueKeyLoader(yaml.SafeLoader):
    """A loader that refuses a mapping with a key twice. PyYAML takes the last value, and forgets the others."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if repeated := [key for key in keys if isinstance(key, str) and keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated[0]} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike):
    """Return the content of a YAML file.

    Raises:
        ValueError: if it cannot be read, or has a key twice, with its path in the message.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    except yaml.constructor.ConstructorError as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: not YAML ({one_line(error)}).") from error


def _flush(path: Path) -> None:
    """Write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, where there is one, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _name_limit(folder: Path) -> int:
    """Return how many bytes a name in this folder may have: fewer than usual where names are encrypted."""
    try:
        return min(_USUAL_LIMIT, os.pathconf(folder, "PC_NAME_MAX"))
    except (AttributeError, OSError, ValueError):  # Windows, or a folder that does not exist yet
        return _USUAL_LIMIT
