"""Where results go: tried before the work, written whole; in place where nothing can be moved there."""

import errno
import os
import re
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from atman_kernels.errors import InputError

MOST_LINKS = 40  # that are followed, as Linux does

FilePath = str | os.PathLike[str]


def check_destination(path: FilePath, name: str = "path") -> None:
    """Raises InputError if nothing can be written to a path, as far as that shows without changing what is there.

    Args:
        path: a new or existing file, a pipe, a device, or a name of an open descriptor such as /dev/stdout.
        name: of the argument, for the message.
    """
    try:
        _try(path)
    except InputError as error:
        raise InputError(f"{name} {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise InputError(f"{name} {os.fspath(path)!r} cannot be written: {_reason(error)}") from error


def write_whole(path: FilePath, data: bytes) -> None:
    """Writes a file so that nobody ever finds a part of it: beside the file, then moved into its place.

    An existing file keeps its permissions and its owner, and a link keeps pointing at its file. Where there is nothing
    to move into place, the data is written in place: into pipes, devices and open descriptors (/dev/stdout), into
    files with several names, and where the file may be written but its folder may not.

    Raises:
        InputError: path is a folder or lies in a folder that does not exist.
        OSError: the system refuses; its message names the path that was given.
    """
    try:
        _write(path, data)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"path {error}") from error
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
        raise OSError(number, _reason(error), os.fspath(path)) from error


def is_descriptor(path: FilePath, number: int) -> bool:
    """Whether a path is a name of that open descriptor of this process, like /dev/stdout of 1."""
    return _descriptor(path) == number


def same_file(one: FilePath, other: FilePath) -> bool:
    """Whether two paths lead to the same file, be it there already or not."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)


def _write(path: FilePath, data: bytes) -> None:
    descriptor = _descriptor(path)
    if descriptor is not None:
        # a copy of it, so that what was written there before stays and what comes after follows
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            stream.write(data)
        return
    file = _file(path)
    before = os.stat(file) if os.path.exists(file) else None
    if before is not None and (not stat.S_ISREG(before.st_mode) or before.st_nlink > 1):
        file.write_bytes(data)
        return
    try:
        unfinished, stream_number = _beside(file, before)
    except PermissionError:
        if before is None:
            raise
        file.write_bytes(data)
        return
    try:
        with os.fdopen(stream_number, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _try(path: FilePath) -> None:
    descriptor = _descriptor(path)
    if descriptor is not None:
        import fcntl  # where there are names of descriptors

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "it is open for reading only")
        return
    file = _file(path)
    if os.path.lexists(file):
        if not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if stat.S_ISSOCK(os.stat(file).st_mode):
            raise OSError(errno.ENXIO, "it is a socket")
        return
    unfinished, stream_number = _beside(file, None)
    os.close(stream_number)
    unfinished.unlink()


def _file(path: FilePath) -> Path:
    """What a path leads to; links on the way are followed, so that they stay.

    Raises:
        InputError: a folder, or in no folder.
    """
    given = os.fspath(path)
    file = Path(os.path.realpath(given))
    names_folder = given.endswith(("/", os.sep)) or not given
    if names_folder or file.is_dir() or not file.parent.is_dir():
        raise InputError(f"must be a file in an existing folder, got {given!r}")
    if file.is_symlink():  # one that leads to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return file


def _beside(file: Path, before: os.stat_result | None) -> tuple[Path, int]:
    """A new file in the same folder and its open descriptor; with the permissions and owner of the one `before`."""
    unfinished = file.with_name(f".{uuid.uuid4().hex}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(unfinished, flags, 0o666 if before is None else 0o600)  # a new one as the umask has it
    try:
        if before is not None:
            _take_over(descriptor, before)
    except BaseException:
        os.close(descriptor)
        unfinished.unlink(missing_ok=True)
        raise
    return unfinished, descriptor


def _take_over(descriptor: int, before: os.stat_result) -> None:
    """Owner first: changing it takes bits away. PermissionError where the file is somebody else's."""
    if not hasattr(os, "fchmod"):  # Windows, where folders decide
        return
    now = os.fstat(descriptor)
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def _descriptor(path: FilePath) -> int | None:
    """The open descriptor of this process that a path names, directly (/dev/fd/63) or through links (/dev/stdout)."""
    here = os.fspath(path)
    for _ in range(MOST_LINKS):
        found = re.fullmatch(rf"/(?:dev|proc/(?:self|thread-self|{os.getpid()}))/fd/(\d{{1,9}})", os.path.abspath(here))
        if found:
            return int(found[1])
        target = ""
        with suppress(OSError, ValueError):
            target = os.readlink(here)
        if not target:
            return None
        here = os.path.join(os.path.dirname(here), target)
    return None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
