"""Files of a report: their names, plain JSON, and digests of the data."""

import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np

from ..data import CocoDataset, ImageDataset, MaskFolderDataset, Sa1bDataset


def is_missing(value) -> bool:
    return value is None or (isinstance(value, float | np.floating) and not math.isfinite(value))


def plain(value):
    """Convert a value to plain JSON: numpy's numbers to Python's, NaN to null, keys and other objects to text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    if is_missing(value):
        return None
    return value if isinstance(value, str | int | float) else str(value)


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name.replace("/", "--")).strip("_.-") or "_"


def content_digest(path: str | Path) -> str:
    """Return a digest that distinguishes files of one name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def dataset_digest(dataset: ImageDataset, path: str | Path) -> str:
    """Return a digest that distinguishes datasets.

    It is the digest of a JSON's content, or of the names, sizes and times of tars and mask files.
    """
    if isinstance(dataset, CocoDataset):
        return content_digest(path)
    files = dataset.paths if isinstance(dataset, Sa1bDataset) else cast(MaskFolderDataset, dataset).mask_files()
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def write_records(path: Path, records: Iterable[Mapping]):
    # Without a name and a time in the header, equal records are equal files.
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        for record in records:
            file.write(json.dumps(plain(record), allow_nan=False).encode() + b"\n")
