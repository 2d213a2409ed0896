"""The folder that `samlight segment` writes to: where each result lies, and a note of its content.

The note, `.samlight.json`, has a line of JSON with the settings, a line with the folders of images and where their
results lie, and a line for each result: its name and the identity of its image. A result that is planned, or that was
made with other settings, has the image's path alone. A later run then does not take it for finished, and does not give
its name to another image.
"""

import argparse
import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from ..images.reading import NOTE_NAME
from ..utils.atomic_files import atomic_write, fit_name


RULE = (
    "results lie in --out as their images lie in the folder asked for (of several paths: in the deepest folder that "
    "holds them all); another folder's results go to a subfolder of its name, and only results of the same images are "
    "replaced"
)


@dataclass(frozen=True)
class Place:
    """An image, its name in results (its path within the folder of images), and the path of its result."""

    image: Path
    name: str
    output: Path


class ResultFolder:
    """A folder of results with its note. `finish` may be called by several threads.

    Attributes:
        folder: the folder of results.
        note: the path of the note.
        settings: those of the previous run, None where there is no note.
        num_finished: how many results have been noted as complete.

    Args:
        folder: the folder of results.
        temporary: a folder of images that will be gone. Its results lie at the top, and it is not noted.
    """

    def __init__(self, folder: Path, temporary: Path | None = None):
        self.folder, self.note = folder, folder / NOTE_NAME
        self._temporary = None if temporary is None else _resolved(temporary)
        self._lock = threading.Lock()
        self.settings: dict | None = None
        self.num_finished = 0
        self._folders: dict[str, str] = {}
        self._results: dict[str, list] = {}
        self._read()
        self._names = {name.casefold(): name for name in self._results}

    def check_settings(self, settings: dict):
        """Raise ArgumentTypeError where the existing results were made with other settings."""
        if not self.note.is_file():
            return
        if self.settings is None:
            raise argparse.ArgumentTypeError(f"--resume: {self.note} cannot be read. Run without --resume.")
        pairs = [(name, self.settings.get(name), settings.get(name)) for name in {**settings, **self.settings}]
        changed = [f"{name} was {_told(before)} and is {_told(now)}" for name, before, now in pairs if before != now]
        if changed:
            raise argparse.ArgumentTypeError(
                f"--resume: {self.folder} holds results of another run: {', '.join(changed)}. Give the same options, "
                "or another --out."
            )

    def places(self, images: Sequence[Path], root: Path | None, ending: str) -> list[Place]:
        """Choose where the results of `images` go, by `RULE`; `ending` follows the image's name.

        Images of one folder whose names differ in suffix or case alone have folder and suffix in the result's name. A
        name that a file of unknown origin or another image's result has is followed by -2, -3 and so on.

        Args:
            images: below `root`, or anywhere where that is None.
            root: the folder of images, absolute; see `samlight_hf.images.reading.common_folder`.
            ending: such as "_masks.png".

        Returns:
            A place for each image, in the same order.

        Raises:
            ArgumentTypeError: where a result would replace one of the images.
        """
        within = [_path_within(image, root) for image in images]
        prefix = self._prefix(root)
        stems = Counter(_without_suffix(path) for path in within)
        taken = {parent.as_posix().casefold() for path in within for parent in (prefix / path).parents}
        taken.add(NOTE_NAME.casefold())
        inputs = set(map(_real, images))
        places = []
        for image, path in zip(images, within):
            stem = path.stem
            if stems[_without_suffix(path)] > 1:
                stem = "_".join(filter(None, (_real(image).parent.name, path.stem, path.suffix[1:])))
            parent, number = prefix / path.parent, 2
            name = parent / fit_name(stem, ending, self.folder)
            while self._is_taken(name, str(_real(image)), taken, inputs):
                name, number = parent / fit_name(f"{stem}-{number}", ending, self.folder), number + 1
            taken.add(name.as_posix().casefold())
            places.append(Place(image, (prefix / path).as_posix(), self.folder / name))
        return places

    def file_of_all(self, name: str, image_paths: Sequence[str], places: Sequence[Place] = ()) -> Path:
        """Return the path for one file of all these paths, such as a contact sheet: it replaces only that of the same.

        Args:
            name: that it has if there is no other file of this name.
            image_paths: as the user gave them.
            places: results whose names it must not have.
        """
        owner = json.dumps([os.path.realpath(path) for path in image_paths])
        taken = {self._key(place).casefold() for place in places}
        (stem, ending), number = os.path.splitext(name), 2
        while self._is_taken(PurePosixPath(name), owner, taken, set()):
            name, number = f"{stem}-{number}{ending}", number + 1
        self._results[name] = [owner]
        return self.folder / name

    def is_done(self, place: Place) -> bool:
        """Return whether there is a finished result of this image, which has not changed since."""
        return place.output.exists() and self._results.get(self._key(place)) == identity_of(place.image) is not None

    def is_replaced(self, place: Place) -> bool:
        """Return whether there is an earlier result of this image, which a new one replaces."""
        return self._key(place) in self._results and place.output.exists()

    def begin(self, settings: dict, root: Path | None, places: Sequence[Place]):
        """Write the note of a run: the results that stay, and those that `places` will hold."""
        prefix = self._prefix(root)
        if _resolved(root) != self._temporary:
            self._folders.setdefault(_resolved(root), prefix.as_posix() if prefix.parts else "")
        if self.settings != settings:  # results of another run cannot be resumed, and keep their names
            self._results = {name: identity[:1] for name, identity in self._results.items()}
        self._results |= {self._key(place): [str(_real(place.image))] for place in places}
        self.settings = settings
        lines: list[dict | list] = [settings, {"folders": self._folders}]
        lines += [[name, *identity] for name, identity in sorted(self._results.items())]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        atomic_write(self.note, lambda aside: aside.write_text(text, encoding="utf-8"))

    def finish(self, place: Place):
        """Note that the result of an image is complete."""
        line = json.dumps([self._key(place), *(identity_of(place.image) or [str(place.image)])])
        with self._lock, self.note.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            self.num_finished += 1

    def _read(self):
        try:
            first, *lines = self.note.read_text(encoding="utf-8").splitlines()
            settings = json.loads(first)
        except (OSError, ValueError):
            return
        self.settings = settings if isinstance(settings, dict) else None
        for line in lines:
            with suppress(ValueError, TypeError):  # a line that was cut off
                entry = json.loads(line)
                if isinstance(entry, dict):
                    self._folders.update(entry.get("folders", {}))
                else:
                    name, *identity = entry
                    self._results[name] = identity

    def _prefix(self, root: Path | None) -> PurePosixPath:
        """Return where the results of `root` lie within this folder: at the top for the first root, else below it."""
        if not self._folders or _resolved(root) == self._temporary:
            return PurePosixPath()
        if _resolved(root) in self._folders:
            return PurePosixPath(self._folders[_resolved(root)])
        parts = () if root is None else Path(_resolved(root)).parts
        for length in range(len(parts) - 1, 0, -1):  # the nearest parent that has results here
            above = str(Path(*parts[:length]))
            if above in self._folders:
                return PurePosixPath(self._folders[above], *parts[length:])
        used = {prefix.casefold() for prefix in self._folders.values()}
        candidates = ["/".join(parts[-length:]) for length in range(1, len(parts))] or ["all"]
        candidates += [f"{candidates[-1]}-{number}" for number in range(2, len(used) + 3)]
        free = (name for name in candidates if name.casefold() not in used and not (self.folder / name).exists())
        return PurePosixPath(next(free, f"{candidates[-1]}-{os.getpid()}"))

    def _is_taken(self, name: PurePosixPath, owner: str, taken: set[str], inputs: set[Path]) -> bool:
        key = name.as_posix().casefold()
        if key in taken:
            return True
        if key in self._names:
            return self._results[self._names[key]][:1] != [owner]
        path = self.folder / name
        if not os.path.lexists(path):
            return False
        if _real(path) in inputs:
            raise argparse.ArgumentTypeError(f"--out {self.folder} would replace {path}. Choose another one.")
        return True

    def _key(self, place: Place) -> str:
        return place.output.relative_to(self.folder).as_posix()


def _told(value) -> str:
    return "not given" if value in (None, []) else str(value)


def _path_within(image: Path, root: Path | None) -> PurePosixPath:
    path = Path(os.path.abspath(image))
    if root is None:  # on several drives
        return PurePosixPath(path.drive.replace(":", "").strip("\\/"), *path.parts[1:])
    return PurePosixPath(path.relative_to(root).as_posix())


def _without_suffix(path: PurePosixPath) -> str:
    return f"{path.parent}/{path.stem}".casefold()


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for links that form a circle


def _resolved(root: Path | None) -> str:
    return "" if root is None else str(_real(root))


def identity_of(path: Path) -> list | None:
    """Return path, size in bytes and time of change in ns, which change with the file; None if there is no file.

    Of a mosaic (VRT) they are the sums over the file and its sources.
    """
    try:
        stats = [path.stat(), *(source.stat() for source in _sources(path) if source.is_file())]
    except OSError:
        return None
    return [str(_real(path)), sum(stat.st_size for stat in stats), sum(stat.st_mtime_ns for stat in stats)]


def _sources(path: Path) -> list[Path]:
    """Return the files that a mosaic is made of; none for other files."""
    if path.suffix.lower() != ".vrt":
        return []
    try:
        elements = ElementTree.parse(path).iter("SourceFilename")
        return [path.parent / (element.text or "") for element in elements]  # an absolute name stays as it is
    except ElementTree.ParseError:
        return []
