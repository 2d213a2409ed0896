"""JSON files, read with errors that name the file."""

import json
import os
from pathlib import Path
from typing import Any

from .messages import one_line


_KINDS = {dict: "object", list: "list"}


def read_json(path: str | os.PathLike, kind: type[dict] | type[list] | None = None) -> Any:
    """Return the content of a JSON file.

    Args:
        path: a file in UTF-8.
        kind: `dict` or `list`, if the content must be one.

    Raises:
        ValueError: if the file cannot be read, is not JSON, or holds another kind; its path is in the message.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: not JSON, or cut short ({one_line(error, 200)}).") from error
    if kind is not None and not isinstance(content, kind):
        raise ValueError(f"{path}: holds no JSON {_KINDS[kind]}.")
    return content
