"""Small files that outlive a run: measurements of this machine, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from onnxcop._base.documents import json_table
from onnxcop._base.files import write_atomically

log = logging.getLogger("onnxcop")

FOLDER = "ONNXCOP_CACHE"


def cache_folder() -> Path:
    """The folder named by the environment variable ONNXCOP_CACHE, or the user's cache folder."""
    given = os.environ.get(FOLDER)
    if given:
        return Path(given)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("onnxcop", appauthor=False))


def remembered(kind: str, key: Any) -> Any:
    """The data stored for a key, None if there are none or they cannot be read.

    Args:
        kind: Kind of the data, the start of the file's name.
        key: Everything that the data depend on, as plain data.
    """
    document = json_table(_file(kind, key)) or {}
    return document.get("value") if document.get("key") == _plain(key) else None


def remember(kind: str, key: Any, value: Any) -> None:
    """Store plain data for a key; a folder that is not writable is not an error."""
    path = _file(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"key": _plain(key), "value": value}).encode())
    except Exception as error:
        log.debug("nothing is kept in %s: %s", path.parent, error)


def _file(kind: str, key: Any) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"{kind}-{digest}.json"


def _plain(key: Any) -> Any:
    return json.loads(json.dumps(key, sort_keys=True))
