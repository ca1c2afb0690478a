"""Writing files atomically, and never through a symbolic link.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

from liftdist.errors import UserError

_LINK = "symbolic links inside a run directory are not followed"


def real_folder(path: Path) -> Path:
    """Create a folder if need be. Raises ``UserError`` if something else has its name."""
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    check_real_folder(path)
    return path


def check_real_folder(path: Path) -> None:
    """Raises ``UserError`` if ``path`` exists and is a symbolic link or a file."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise UserError(f"{path}: is not a folder; {_LINK}")


def write(path: Path, text: str) -> None:
    """Write a file anew, as a whole or not at all."""
    with written_beside(path, text) as temporary:
        temporary.replace(path)


def create(path: Path, text: str) -> None:
    """Write a file that must not exist; it appears complete. Raises ``FileExistsError``."""
    with written_beside(path, text) as temporary:
        os.link(temporary, path)  # unlike a rename, fails if the name is taken
    sync_folder(path.parent)


@contextlib.contextmanager
def written_beside(path: Path, text: str = "") -> Iterator[Path]:
    """A new file beside ``path``, under a name of its own, on the disk; removed at the end if it still has that name."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode(0o666))
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def open_to_append(path: Path, create: bool = True) -> TextIOWrapper:
    """Open a file at its end. Raises ``OSError`` for a symbolic link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    return os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8")


def folder_beside(target: Path) -> Path:
    """A new folder beside ``target``, under a name of its own, to be filled and then :func:`publish`-ed."""
    return Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))


def publish(
    folder: Path, target: Path, permissions: int = 0o777, exchange: Callable[[Path, Path], None] | None = None
) -> None:
    """Give a filled folder its name, in one step, once all that is in it is on the disk.

    Args:
        permissions: of the folder, less what the umask takes away.
        exchange: exchanges the names of two folders, where ``target`` is to be replaced.

    Raises:
        OSError: ``target`` exists and is not empty, or the disk is full.
    """
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            sync_folder(path)
        elif path.is_file() and not path.is_symlink():
            sync_file(path)
    folder.chmod(permissions if exchange else mode(permissions))
    sync_folder(folder)
    (exchange or Path.rename)(folder, target)
    sync_folder(target.parent)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which appears as ``target`` when the block ends, whole, or not at all. Raises ``OSError``."""
    temporary = folder_beside(target)
    try:
        yield temporary
        publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(path: Path) -> str:
    """The text of a file. Raises ``OSError`` for a symbolic link, ``ValueError`` if it is not text."""
    with open(path, encoding="utf-8", opener=_no_link) as file:
        return file.read()


def open_to_read(path: Path) -> BinaryIO:
    """Open a file for its bytes. Raises ``OSError`` for a symbolic link."""
    return open(path, "rb", opener=_no_link)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the contents of a file survive a crash of the machine."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def mode(permissions: int) -> int:
    """``permissions`` of something new, less what the user's umask takes away."""
    status = Path("/proc/self/status").read_text()
    umask = next(line.split()[1] for line in status.splitlines() if line.startswith("Umask:"))
    return permissions & ~int(umask, 8)


def reason(error: OSError) -> str:
    """What went wrong with which file, in one line."""
    problem = f"is a symbolic link; {_LINK}" if error.errno == errno.ELOOP else error.strerror
    return f"{error.filename}: {problem}" if error.filename else str(error)
