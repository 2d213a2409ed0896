"""Read the tars of SA-1B: `NAME.jpg` beside `NAME.json`, with masks as COCO RLE."""

import glob
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from .dataset import FileDataset, check_limit
from .samples import SampleError, SkipReason, SkipReport


IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp"))


class Sa1bDataset(FileDataset):
    """Reader of SA-1B tars, without unpacking them.

    Each tar has pairs of members `NAME.jpg` and `NAME.json`, in any order. Indexing reads the headers of all tars once;
    then each image takes two reads at known offsets. Images are in the order of the sorted tars and of their members.
    The id of a sample is the name of the member without its suffix.

    Args:
        paths_or_glob: an uncompressed tar, a folder of tars, a pattern (`*`, `?`, `**`), or a sequence of these.
        limit: read the first `limit` images only, not counting those skipped while indexing; by default all.

    Raises:
        ValueError: if no tar is found, if one is damaged, truncated or compressed, or if no image has a JSON.

    Example:
        >>> dataset = Sa1bDataset("sa1b/*.tar", limit=1000)
        >>> sample = dataset[0]
        >>> sample.image, sample.masks()  # RGB image, bool (num_instances, height, width)
    """

    def __init__(self, paths_or_glob: str | os.PathLike | Sequence[str | os.PathLike], limit: int | None = None):
        check_limit(limit)
        self.paths = find_tars(paths_or_glob)
        self.index_report = SkipReport()
        names: list[str] = []
        places: list[tuple[int, ...]] = []
        seen: set[str] = set()
        for archive, path in enumerate(self.paths):
            for name, images, jsons in _pairs(path):
                for _ in range(max(len(images), len(jsons)) - (name not in seen)):
                    self.index_report.add_image(SkipReason.DUPLICATE_IMAGE, f"{path.name}/{name}")
                if name in seen:
                    continue
                seen.add(name)
                if not images:
                    self.index_report.add_image(SkipReason.JSON_ALONE, f"{path.name}/{name}")
                elif not jsons:
                    self.index_report.add_image(SkipReason.MISSING_JSON, f"{path.name}/{name}")
                else:
                    names.append(name)
                    places.append((archive, *images[0], *jsons[0]))
                if len(names) == limit:
                    break
            if len(names) == limit:
                break
        # Arrays: forked workers copy the memory pages of Python objects when they count references.
        self._names = np.array(names, dtype=str)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 5)
        self._check_not_empty(str(paths_or_glob))

    def __len__(self) -> int:
        return len(self._names)

    def files(self) -> set:
        return {path.resolve() for path in self.paths}

    def sample_id(self, index: int) -> str:
        return str(self._names[index])

    def where(self, index: int) -> str:
        return f"{self.paths[self._places[index, 0]].name}/{self.sample_id(index)}"

    def image_bytes(self, index: int) -> bytes:
        archive, offset, size = self._places[index, :3]
        return self._read(archive, offset, size)

    def _annotations(self, index: int) -> tuple[list, tuple[int, int] | None]:
        archive, offset, size = self._places[index, [0, 3, 4]]
        return parse_json(self._read(archive, offset, size))

    def _read(self, archive: int, offset: int, size: int) -> bytes:
        # Open for each read: processes and threads share no file handle, and there may be more tars than open files.
        with open(self.paths[archive], "rb") as file:
            file.seek(offset)
            return file.read(size)


def parse_json(content: bytes) -> tuple[list, tuple[int, int] | None]:
    """Parse a JSON file of SA-1B.

    Args:
        content: the bytes of the file.

    Returns:
        The annotations as JSON has them, and (width, height) of the image in pixels, or None if the file has no size.

    Raises:
        SampleError: if it is malformed.
    """
    try:
        document = json.loads(content)
        annotations, image = document["annotations"], document.get("image") or {}
        width, height = image.get("width"), image.get("height")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SampleError(SkipReason.MALFORMED_JSON) from error
    if not isinstance(annotations, list):
        raise SampleError(SkipReason.MALFORMED_JSON)
    return annotations, (width, height) if isinstance(width, int) and isinstance(height, int) else None


def add_sample(tar: tarfile.TarFile, name: str, suffix: str, image: bytes, width: int, height: int, annotations: list):
    """Add an image and its annotations to a tar, as `Sa1bDataset` reads it.

    Args:
        tar: the tar, open for writing.
        name: name of the sample.
        suffix: suffix of the image file, with the dot.
        image: bytes of the image file.
        width, height: size of the image in pixels.
        annotations: annotations as for JSON.
    """
    entry = {"file_name": name + suffix, "width": width, "height": height}
    document = json.dumps({"image": entry, "annotations": annotations}).encode()
    for member_name, content in ((name + suffix, image), (f"{name}.json", document)):
        member = tarfile.TarInfo(member_name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def find_tars(paths_or_glob: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """List the tars of a path, a folder, a pattern or a sequence of these, each once, sorted within each of them.

    Raises:
        ValueError: if one of them has no tar.
    """
    if isinstance(paths_or_glob, (str, os.PathLike)):
        paths_or_glob = [paths_or_glob]
    tars_by_file: dict[Path, Path] = {}
    for path in map(Path, paths_or_glob):
        if path.is_file():
            tars = [path]
        elif path.is_dir():
            tars = sorted(path.glob("*.tar"))
        else:
            tars = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
        if not tars and not path.exists() and not glob.has_magic(str(path)):
            raise ValueError(f"{path}: no such file or folder. Check the name.")
        if not tars:
            raise ValueError(f"{path}: no tar file here. Give a tar, a folder of *.tar files or a pattern.")
        for tar in tars:
            tars_by_file.setdefault(tar.resolve(), tar)
    if not tars_by_file:
        raise ValueError("No tar file was given.")
    return list(tars_by_file.values())


def _pairs(path: Path) -> Iterator[tuple[str, list[tuple[int, int]], list[tuple[int, int]]]]:
    """Yield (name, places of its images, places of its JSONs), by first appearance; a place is (offset, size)."""
    members: dict[str, tuple[list, list]] = {}
    for member in tar_members(path):
        name = PurePosixPath(member.name)
        is_json = name.suffix.lower() == ".json"
        if name.name.startswith("._") or not (is_json or name.suffix.lower() in IMAGE_SUFFIXES):
            continue  # ._NAME.jpg has the attributes that macOS stores beside NAME.jpg
        places = members.setdefault(str(name.with_suffix("")), ([], []))
        places[is_json].append((member.offset_data, member.size))
    for sample_name, (images, jsons) in members.items():
        yield sample_name, images, jsons


def check_tar(path: Path):
    """Raise ValueError for a file that is no tar, or a tar that has lost its end. Reads its first and last block.

    A tar is accepted that is compressed, or cut within zeros at a multiple of 512 bytes: those who read it to its end
    find that it is damaged.
    """
    try:
        tarfile.open(path, "r:*").close()
    except (tarfile.ReadError, EOFError, zlib.error) as error:  # the last two: a gzip file without its end, or damaged
        raise ValueError(f"{path}: no tar, or one that is damaged. Copy or download it again.") from error
    with open(path, "rb") as file:
        is_plain = file.read(tarfile.BLOCKSIZE)[257:262] == b"ustar"
        size = file.seek(0, os.SEEK_END)
        file.seek(-min(tarfile.BLOCKSIZE, size), os.SEEK_END)
        # A tar is a sequence of blocks, of which the last ones are zeros: two of them, but some tools write only one.
        if is_plain and (size % tarfile.BLOCKSIZE or any(file.read())):
            raise _damaged(path)


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path}: the tar is damaged or cut short. Copy or download it again.")


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Iterate over the regular files of a tar. Raises ValueError if it cannot be read to its end."""
    damaged = _damaged(path)
    num_members = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for num_members, member in enumerate(tar, start=1):  # noqa: B007  counts for the handler below
                if member.isreg() and not member.issparse():
                    yield member
            # tarfile stops at an unreadable header without an error. A complete tar ends with a block of zeros.
            tar.fileobj.seek(tar.offset)
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
    except tarfile.ReadError as error:
        if num_members:
            raise damaged from error
        raise ValueError(f"{path}: no tar, or a compressed one, which has no random access: unpack it.") from error
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise damaged
