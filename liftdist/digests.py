"""Cached digests of files: a large file is hashed once, and again only after it has changed.

CACHE_DIR/digests/KEY        KEY: sha256 over path, size, times and inode of the files
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from liftdist import files


class CachedDigest:
    """The cache entry of one kind of digest of ``paths``. Raises ``OSError`` if a file is missing."""

    def __init__(self, kind: str, paths: Sequence[Path], cache_dir: Path) -> None:
        stats = [
            (str(path.resolve()), (s := path.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path in paths
        ]
        key = hashlib.sha256(json.dumps([kind, stats]).encode()).hexdigest()[:24]
        self._path = cache_dir.expanduser() / "digests" / key

    def read(self) -> str | None:
        """The digest, 64 hexadecimal digits; None if it is not cached."""
        with contextlib.suppress(OSError, ValueError):
            text = self._path.read_text()
            return text if len(text) == 64 else None
        return None

    def write(self, digest: str) -> None:
        with contextlib.suppress(OSError):  # the cache is optional
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write(self._path, digest)


def of_file(path: Path, cache_dir: Path, beat: Callable[[], None] = lambda: None) -> str:
    """sha256 of a file's contents, 64 hexadecimal digits, cached in ``cache_dir``. Raises ``OSError``.

    Args:
        beat: called before each MiB that is read.
    """
    cached = CachedDigest("contents", [path], cache_dir)
    if (known := cached.read()) is not None:
        return known
    with path.open("rb") as stream:
        hashed, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
        while size := stream.readinto(buffer):
            beat()
            hashed.update(buffer[:size])
    cached.write(hashed.hexdigest())
    return hashed.hexdigest()


def of_parts(parts: Sequence[object]) -> str:
    """sha256 of several digests and names, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def of_bytes(contents: bytes) -> str:
    """sha256 of some bytes, 64 hexadecimal digits."""
    return hashlib.sha256(contents).hexdigest()
