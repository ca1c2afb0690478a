"""Writing files atomically, and never through a symbolic link.

Whatever is made has the permissions and the group that the umask and its folder give it, setgid bit and default ACL included:
files are opened with mode 0666 and folders made with 0777. What tempfile makes is private, and a later chmod loses these.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

from liftdist.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
_UNLOCKABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)  # a file system without locks
_LINK = "symbolic links inside a run directory are not followed"


def shipped(name: str) -> Path:
    """A file or folder of the repository: beside the package in a checkout, inside it when installed. Raises ``UserError``."""
    for folder in (_PACKAGE, _PACKAGE.parent):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{name} is missing beside {_PACKAGE}: install liftdist again")


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
    temporary = name_beside(path)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def name_beside(path: Path) -> Path:
    """A hidden name in the same folder that nothing has."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def open_to_append(path: Path, create: bool = True) -> TextIOWrapper:
    """Open a file at its end. Raises ``OSError`` for a symbolic link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags)  # where others may write, Linux opens no file of theirs with O_CREAT
    except FileNotFoundError:
        if not create:
            raise
        descriptor = os.open(path, flags | os.O_CREAT, 0o666)
    return os.fdopen(descriptor, "a", encoding="utf-8")


def folder_beside(target: Path, permissions: int = 0o777) -> Path:
    """A new folder beside ``target``, under a name of its own, to be filled and then :func:`publish`-ed."""
    folder = name_beside(target)
    folder.mkdir(permissions)
    return folder


def remove_left_over(target: Path) -> None:
    """Remove the folders of :func:`folder_beside` a target that processes have left which were killed.

    Those whose maker lives are :func:`locked`; where the file system has no locks, nothing is removed.
    """
    name = re.compile(rf"\.{re.escape(target.name)}-[0-9a-f]{{8}}")
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                with contextlib.suppress(UserError), locked(path) as has_locks:
                    if has_locks:
                        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """A block in which no other process that asks has this folder; yields whether its file system has locks.

    Raises:
        UserError: another process has it, or has replaced it meanwhile; it cannot be read.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    try:
        is_mine = has_locks = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_mine = False
        except OSError as error:
            if error.errno not in _UNLOCKABLE:
                raise
            has_locks = False
        if not is_mine or not (folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())):
            raise UserError(f"{folder}: another process is changing it; try again when that one has ended")
        yield has_locks
    finally:
        os.close(descriptor)


def publish(folder: Path, target: Path, exchange: Callable[[Path, Path], None] | None = None) -> None:
    """Give a filled folder its name, in one step, once all that is in it is on the disk.

    Args:
        exchange: exchanges the names of two folders, where ``target`` is to be replaced.

    Raises:
        OSError: ``target`` exists and is not empty, or the disk is full.
    """
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            sync_folder(path)
        elif path.is_file() and not path.is_symlink():
            sync_file(path)
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


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path``, where there is room for what is as large; removed at the end.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder = folder_beside(path.resolve())
    except OSError as error:
        raise UserError(f"{path}: what is needed for a while cannot be written beside it: {reason(error)}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def copy(source: Path, target: Path) -> None:
    """Copy the contents of a file or a folder; links inside a folder stay links. Permissions are those of something new."""
    if not source.is_dir():
        shutil.copyfile(source, target)
        return
    target.mkdir()
    for path in source.iterdir():
        if path.is_symlink():
            (target / path.name).symlink_to(path.readlink())
        else:
            copy(path, target / path.name)


def belong_like(path: Path, before: Path) -> None:
    """Give ``path`` owner, group, permissions and ACL of ``before``, as far as this user may."""
    status = before.stat()
    for owner in (status.st_uid, -1):
        try:
            os.chown(path, owner, status.st_gid)
            break
        except PermissionError:  # only root gives files away
            continue
    path.chmod(stat.S_IMODE(status.st_mode))
    with contextlib.suppress(OSError):  # not every file system has them
        for name in os.listxattr(before):
            if name.startswith("system.posix_acl"):
                os.setxattr(path, name, os.getxattr(before, name))


def not_writable(paths: Iterable[Path]) -> str | None:
    """Why this user cannot replace, or write to, one of ``paths`` and what they hold; None if nothing is in the way."""
    for path in paths:
        status = path.stat()
        whose = f"belongs to {_name_of(status.st_uid)}"
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            return None  # a write will tell
        if not os.access(path, os.W_OK | (os.X_OK if stat.S_ISDIR(status.st_mode) else 0)):
            return f"{path} {whose}, and its permissions ({stat.filemode(status.st_mode)}) do not let you write"
        foreign = os.geteuid() not in (0, status.st_uid)
        if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX and foreign:
            return f"{path} {whose}, and its sticky bit keeps you from replacing what others wrote"
    return None


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def check_page(path: Path, beginning: str, made_by: str, flag: str) -> None:
    """Raises ``UserError`` if a page cannot be written there, or would replace something else.

    Args:
        beginning: of every page that ``made_by`` writes.
        flag: that names the file.
    """
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: folder {path.absolute().parent} does not exist; create it first")
    try:
        with path.open("rb") as file:
            found = file.read(len(beginning.encode())).decode("utf-8", "replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be replaced: {error.strerror}; give another {flag}") from None
    if found != beginning:
        raise UserError(f"{path}: exists already, and is no page of {made_by}; give another {flag}")


def write_page(path: Path, text: str, flag: str) -> None:
    """Write a page. Raises ``UserError``."""
    try:
        write(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; give another {flag}") from None


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Raises errors of the file system as ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {reason(error)}") from None


def reason(error: OSError) -> str:
    """What went wrong with which file, in one line."""
    problem = f"is a symbolic link; {_LINK}" if error.errno == errno.ELOOP else error.strerror
    return f"{error.filename}: {problem}" if error.filename else str(error)
