"""Fetching one archive into the cache; addresses and check sums are torchvision's own."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

from tasks.datasets._about import Progress
from tasks.errors import DataError
from tasks.source import DataSource

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without an answer


def fetch(source: DataSource, addresses: Iterable[str], md5: str, name: str, progress: Progress) -> Path:
    """Fetch the first of `addresses` that answers with the right bytes to `name` in the cache; raises `DataError`."""
    failures = []
    for address in addresses:
        try:
            _fetch(source, address, md5, name, progress)
            return source.cache / name
        except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
            failures.append(f"  {address}: {error}")
    raise DataError(
        f"cannot fetch {Path(name).name}:\n" + "\n".join(failures) + "\nIs there a network? Without one, copy the "
        f"file from another machine to FOLDER/{name} and pass --data-dir FOLDER, or set HAWTHORN_DATA to FOLDER."
    )


def _fetch(source: DataSource, address: str, md5: str, name: str, progress: Progress) -> None:
    request = urllib.request.Request(address, headers={"User-Agent": "hawthorn"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, source.store(name) as file:
        total = int(answer.headers.get("Content-Length") or 0)
        done, checksum = 0, hashlib.md5(usedforsecurity=False)
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            checksum.update(chunk)
            done += len(chunk)
            progress(Path(name).name, done, max(total, done))
        if checksum.hexdigest() != md5:
            raise ValueError(f"came with md5 {checksum.hexdigest()}, wanted {md5}")
