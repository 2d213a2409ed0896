"""SA-1B's tars: `NAME.jpg` beside `NAME.json`, masks as COCO RLE."""

import glob
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from .dataset import FileDataset, check_limit
from .samples import SampleError, SkipReason, SkipReport


IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp"))


class Sa1bDataset(FileDataset):
    """The images of SA-1B tars, in the order of the sorted tars and of each tar's members.

    The headers of all tars are read once; afterwards an image costs two reads at known places of the file. Members
    may lie in any order within a tar. The sample's id is the member's name without its suffix.

    Args:
        paths_or_glob: a tar, a folder of tars, a pattern (`*`, `?`, `**`), or a sequence of these. Not compressed.
        limit: only the first so many images, without those skipped while indexing.

    Raises:
        ValueError: where no tar is found, for one that is damaged, cut short or compressed, and where no image has
            its JSON.
    """

    def __init__(self, paths_or_glob: str | os.PathLike | Sequence[str | os.PathLike], limit: int | None = None):
        check_limit(limit)
        self.paths = find_tars(paths_or_glob)
        self.index_report = SkipReport()
        names, places, seen = [], [], set()
        for archive, path in enumerate(self.paths):
            for name, images, jsons in _pairs(path):
                for _ in range(max(len(images), len(jsons)) - (name not in seen)):
                    self.index_report.add_image(SkipReason.DUPLICATE_IMAGE, f"{path.name}/{name}")
                if name in seen:
                    continue
                seen.add(name)
                if not images:
                    self.index_report.add_image(SkipReason.MISSING_IMAGE, f"{path.name}/{name}")
                elif not jsons:
                    self.index_report.add_image(SkipReason.MISSING_JSON, f"{path.name}/{name}")
                else:
                    names.append(name)
                    places.append((archive, *images[0], *jsons[0]))
                if len(names) == limit:
                    break
            if len(names) == limit:
                break
        # Arrays, because worker processes would copy millions of small objects page by page as they touch them.
        self._names = np.array(names, dtype=str)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 5)
        self._check_not_empty(str(paths_or_glob))

    def __len__(self) -> int:
        return len(self._names)

    def files(self) -> set:
        return {path.resolve() for path in self.paths}

    def sample_id(self, index: int) -> str:
        return str(self._names[index])

    def image_bytes(self, index: int) -> bytes:
        archive, offset, size = self._places[index, :3]
        return self._read(archive, offset, size)

    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        archive, offset, size = self._places[index, [0, 3, 4]]
        return parse_json(self._read(archive, offset, size))

    def _read(self, archive: int, offset: int, size: int) -> bytes:
        # Opened for each read: no handle that forks and threads would share, and no limit on the number of tars.
        with open(self.paths[archive], "rb") as file:
            file.seek(offset)
            return file.read(size)


def parse_json(content: bytes) -> tuple[list, tuple[int, int] | None]:
    """The annotations in one of SA-1B's JSON files, and (width, height) of its image if it is said.

    Raises:
        SampleError: for what is no such file.
    """
    try:
        content = json.loads(content)
        annotations, image = content["annotations"], content.get("image") or {}
        width, height = image.get("width"), image.get("height")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SampleError(SkipReason.MALFORMED_JSON) from error
    if not isinstance(annotations, list):
        raise SampleError(SkipReason.MALFORMED_JSON)
    return annotations, (width, height) if isinstance(width, int) and isinstance(height, int) else None


def add_sample(tar: tarfile.TarFile, name: str, suffix: str, image: bytes, width: int, height: int, annotations: list):
    """Adds an image's file, of `width` x `height` pixels, and its annotations to a tar that `Sa1bDataset` reads."""
    entry = {"file_name": name + suffix, "width": width, "height": height}
    document = json.dumps({"image": entry, "annotations": annotations}).encode()
    for member_name, content in ((name + suffix, image), (f"{name}.json", document)):
        member = tarfile.TarInfo(member_name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def find_tars(paths_or_glob: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """The tars that a path, a folder, a pattern or a sequence of these names, each once, sorted within each.

    Raises:
        ValueError: where one of them names no tar.
    """
    if isinstance(paths_or_glob, (str, os.PathLike)):
        paths_or_glob = [paths_or_glob]
    found: dict[Path, Path] = {}
    for path in map(Path, paths_or_glob):
        if path.is_file():
            tars = [path]
        elif path.is_dir():
            tars = sorted(path.glob("*.tar"))
        else:
            tars = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
        if not tars:
            raise ValueError(f"{path}: no tar file here. Give a tar, a folder of *.tar files or a pattern.")
        for tar in tars:
            found.setdefault(tar.resolve(), tar)
    if not found:
        raise ValueError("No tar file was given.")
    return list(found.values())


def _pairs(path: Path) -> Iterator[tuple[str, list[tuple[int, int]], list[tuple[int, int]]]]:
    """(name, places of its images, places of its JSONs) by first appearance; a place is (offset, size) in bytes."""
    members: dict[str, tuple[list, list]] = {}
    for member in tar_members(path):
        name = PurePosixPath(member.name)
        is_json = name.suffix.lower() == ".json"
        if name.name.startswith("._") or not (is_json or name.suffix.lower() in IMAGE_SUFFIXES):
            continue  # macOS writes ._NAME.jpg beside NAME.jpg: attributes, no image
        places = members.setdefault(str(name.with_suffix("")), ([], []))
        places[is_json].append((member.offset_data, member.size))
    for name, (images, jsons) in members.items():
        yield name, images, jsons


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar. Raises ValueError for one that cannot be read to its end."""
    damaged = ValueError(f"{path}: the tar is damaged or cut short. Copy or download it again.")
    num_members = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for num_members, member in enumerate(tar, start=1):  # noqa: B007  counts for the handler below
                if member.isreg() and not member.issparse():
                    yield member
            # tarfile takes a header that it cannot read for the end. The end that tar writes is a block of zeros.
            tar.fileobj.seek(tar.offset)
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
    except tarfile.ReadError as error:
        if num_members:
            raise damaged from error
        raise ValueError(f"{path}: no tar, or a compressed one, which has no random access: unpack it.") from error
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise damaged
