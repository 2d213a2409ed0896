"""Files of a report: names and plain JSON."""

import gzip
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np


def is_missing(value) -> bool:
    return value is None or (isinstance(value, float | np.floating) and not math.isfinite(value))


def plain(value):
    """As JSON can hold it: numpy's numbers as Python's, NaN as null, keys and whatever else as text."""
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


def write_records(path: Path, records: Iterable[Mapping]):
    # Without a name and a time in the header, equal records are equal files.
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        for record in records:
            file.write(json.dumps(plain(record), allow_nan=False).encode() + b"\n")
