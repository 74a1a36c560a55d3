"""A database folder: where each file lives, and how files appear in it whole or not at all.

Nothing is ever written under its final name. A file is written under a temporary name that carries host, process and
process start time, synced, and renamed; files that claim something (the database itself, a run, a commit) are linked
instead, which fails where the name exists. What a killed process leaves is removed once that process is gone, or after
a day where it ran on another host.
"""

import contextlib
import errno
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from crc32c import crc32c

from actdb.errors import ActdbError, DamageError, DatabaseError, SpaceError, WriteError
from actdb.schema import FORMAT_VERSION, FileRecord

MARKER = "actdb.json"
MARKER_CONTENT = json.dumps({"format_version": FORMAT_VERSION}).encode()
TEMPORARY = re.compile(r"\.tmp-(?P<host>[^-]+)-(?P<pid>[0-9]{1,9})-(?P<start>[0-9]+)-")
STALE_S = 24 * 3600.0


class Folder:
    """Paths and file operations of one database; no file is kept open.

    Paths given to the methods are relative to the folder, with forward slashes.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._real = os.path.realpath(self.root)

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> "Folder":
        """Open an existing database; raises `DatabaseError` where there is none, or one of a newer format."""
        folder = cls(root)
        try:
            text = folder.read_bytes(MARKER)
        except DamageError as exc:
            if isinstance(exc.__cause__, PermissionError):
                raise DatabaseError(f"{root} cannot be read: permission denied") from exc
            raise DatabaseError(
                f"{root} is not an actdb database (no {MARKER}); make one with `actdb harvest`"
            ) from exc
        try:
            version = json.loads(text)["format_version"]
            if type(version) is not int or version < 1:
                raise ValueError(f"format version {version!r}")
        except (KeyError, TypeError, ValueError, RecursionError) as exc:
            raise DatabaseError(f"{root}/{MARKER} is damaged: expected {MARKER_CONTENT.decode()}") from exc
        if version > FORMAT_VERSION:
            raise DatabaseError(
                f"{root} has format version {version}; this actdb reads up to {FORMAT_VERSION}: upgrade actdb"
            )
        return folder

    @classmethod
    def create(cls, root: str | os.PathLike[str]) -> "Folder":
        """Open a database, or create it; raises `DatabaseError` where a folder that is no database is in the way."""
        folder = cls(root)
        if os.path.lexists(folder.root / MARKER):
            return cls.open(root)
        try:
            folder.root.mkdir(parents=True, exist_ok=True)
            occupied = [name for name in os.listdir(folder.root) if not TEMPORARY.match(name)]
        except (FileExistsError, NotADirectoryError) as exc:
            raise DatabaseError(f"{root} is a file, not a folder; choose another -o") from exc
        except PermissionError as exc:
            raise WriteError(f"cannot write {root}: permission denied; choose another -o") from exc
        except OSError as exc:
            raise write_error(exc, str(root)) from exc
        if occupied and MARKER not in occupied:
            raise DatabaseError(f"{root} holds other files and is not an actdb database; choose another -o")
        folder._real = os.path.realpath(folder.root)
        folder.publish(MARKER, MARKER_CONTENT, exclusive=True)
        return cls.open(root)

    def path(self, name: str) -> Path:
        """Return the full path of a file."""
        return self.root / name

    def inside(self, name: str) -> str:
        """Return a file's full path after checking that no symbolic link leads out of the folder."""
        plain = self._plain(name)
        if plain is not None:
            return plain
        try:
            real = os.path.realpath(self.root / name)
        except ValueError as exc:  # a null byte, a lone surrogate
            raise DamageError(f"{name!r} in {self.root} is no file name; refused") from exc
        if real != self._real and not real.startswith(self._real + os.sep):
            raise DamageError(f"{self.root / name} leads outside the database folder; refused")
        return real

    def _plain(self, name: str) -> str | None:
        """Return the full path where no part of it is a link or leads upwards: there is nothing to resolve.

        A fifth of the cost of resolving, which counts where hundreds of runs are opened.
        """
        parts = name.split("/")
        if not {"", os.curdir, os.pardir}.isdisjoint(parts):
            return None
        path = self._real
        try:
            for part in parts:
                path = f"{path}/{part}"
                if stat.S_ISLNK(os.lstat(path).st_mode):
                    return None
        except (FileNotFoundError, NotADirectoryError):
            pass  # nor can anything below it be a link
        except (OSError, ValueError):
            return None
        return f"{self._real}/{name}"

    def read_bytes(self, name: str) -> bytes:
        """Return a file's content; raises `DamageError` where it is missing, cannot be read or leads outside."""
        path = self.inside(name)
        try:
            with open(path, "rb", opener=_open_regular) as file:
                return file.read()
        except OSError as exc:
            raise self._unreadable(name, exc) from exc

    def names(self, name: str) -> list[str]:
        """Return the sorted names in a subfolder, temporary ones left out; [] where it does not exist."""
        path = self.inside(name)
        try:
            entries = os.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as exc:
            raise self._unreadable(name, exc) from exc
        return sorted(entry for entry in entries if not TEMPORARY.match(entry))

    def exists(self, name: str) -> bool:
        """Whether a file or folder exists."""
        return (self.root / name).exists()

    def writable(self) -> bool:
        """Whether files can be made in the folder (a read-only disk is seen too)."""
        try:
            with self.temporary("probe") as path:
                path.touch()
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        """Yield a temporary path beside `name`, removed at the end unless it was published."""
        path = temporary_path(self.root / name)
        try:
            yield path
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def publish(self, name: str, content: bytes, *, exclusive: bool = False) -> bool:
        """Write a small file whole; with `exclusive`, only where the name is free. Returns whether it was written."""
        self.make_parent(name)
        try:
            with self.temporary(name) as path:
                with open(path, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                return self.adopt(path, name, exclusive=exclusive)
        except OSError as exc:
            raise write_error(exc, str(self.path(name))) from exc

    def make_parent(self, name: str) -> None:
        """Create the folder that a file will lie in; raises `DamageError` where a link leads it outside."""
        parent = self.inside(os.path.dirname(name))
        try:
            os.makedirs(parent, exist_ok=True)
        except OSError as exc:
            raise write_error(exc, str(self.path(name))) from exc

    def adopt(self, path: Path, name: str, *, exclusive: bool = False) -> bool:
        """Give a synced temporary file its final name; returns False where `exclusive` and the name was taken."""
        final = self.path(name)
        if exclusive:
            try:
                os.link(path, final)
            except FileExistsError:
                return False
        else:
            os.replace(path, final)
        sync_folder(final.parent)
        return True

    def record(self, name: str) -> FileRecord:
        """Return the size and checksum of a file on disk; raises `DamageError` where it cannot be read."""
        path = self.inside(name)
        try:
            return file_record(path, name)
        except OSError as exc:
            raise self._unreadable(name, exc) from exc

    def check(self, record: FileRecord) -> None:
        """Raise `DamageError` unless a whole-file record fits the file on disk."""
        found = self.record(record.path)
        if found.stored_bytes != record.stored_bytes:
            raise DamageError(
                f"{self.root / record.path} has {found.stored_bytes} bytes instead of {record.stored_bytes}"
            )
        if found.crc32c != record.crc32c:
            raise DamageError(f"{self.root / record.path} does not match its checksum")

    def sweep(self, *names: str) -> None:
        """Remove the temporary files of processes that are gone, and of other hosts after a day.

        Looks through the whole database, or only through the subfolders `names`, at the files beside them and on top.
        """
        for name in names or ("",):
            for parent, _, files in os.walk(self.inside(name)):
                _remove_abandoned(parent, files)
        for parent in {self._real, *(self.inside(os.path.dirname(name)) for name in names)}:
            if os.path.isdir(parent):
                _remove_abandoned(parent, os.listdir(parent))

    def _unreadable(self, name: str, exc: OSError) -> DamageError:
        if isinstance(exc, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return DamageError(f"{self.root / name} is missing")
        return DamageError(f"{self.root / name} cannot be read: {exc.strerror}")


def file_record(path: str | os.PathLike[str], name: str) -> FileRecord:
    """Return the size and CRC-32C of a file, read once in blocks."""
    crc, size = 0, 0
    with open(path, "rb", opener=_open_regular) as file:
        while block := file.read(1 << 20):
            crc, size = crc32c(block, crc), size + len(block)
    return FileRecord(name, size, crc)


def _open_regular(path: str, flags: int) -> int:
    """Open a file for reading, unless it is a pipe or a device: those could block a reader for ever."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", path)


def temporary_path(final: Path) -> Path:
    """Return the temporary path that this process uses for a file."""
    return final.with_name(f".tmp-{_host()}-{os.getpid()}-{_start_time(os.getpid())}-{final.name}")


def sync_folder(path: Path) -> None:
    """Make a rename in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:  # some network file systems cannot sync folders
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def readable_bytes(size: float) -> str:
    """Return a number of bytes as people read it: powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def write_error(exc: OSError, path: str) -> Exception:
    """Translate an operating-system error of a write; one that is translated already is returned as it is."""
    if isinstance(exc, ActdbError):
        return exc
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SpaceError(f"no space left while writing {path}; free some and run the same command again")
    return WriteError(f"cannot write {path}: {exc.strerror or exc}")


def _host() -> str:
    """Return where this process's number is unique: its host, and there its namespace (containers may share a name)."""
    host = re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname()) or "localhost"
    try:
        return f"{host}.{re.sub('[^0-9]', '', os.readlink('/proc/self/ns/pid'))}"
    except OSError:
        return host


def _start_time(pid: int) -> int:
    """Return a process's start time in clock ticks since boot, 0 where the system does not tell, -1 for a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def _remove_abandoned(parent: str, files: Iterable[str]) -> None:
    for file in files:
        match = TEMPORARY.match(file)
        if match is None:
            continue
        path = os.path.join(parent, file)
        if _abandoned(match, path):
            with contextlib.suppress(OSError):
                os.unlink(path)


def _abandoned(match: re.Match[str], path: str) -> bool:
    try:
        age_s = time.time() - os.stat(path).st_mtime
    except FileNotFoundError:
        return False
    if match["host"] != _host():
        return age_s > STALE_S
    pid = int(match["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's process
        pass
    if _start_time(pid) not in (0, int(match["start"])):
        return True  # its number was given to another process
    return age_s > STALE_S and pid != os.getpid()
