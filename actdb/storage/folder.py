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
import time
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from actdb.errors import DamageError, DatabaseError, SpaceError, WriteError
from actdb.schema import FORMAT_VERSION, FileRecord

MARKER = "actdb.json"
TEMPORARY = re.compile(r"\.tmp-(?P<host>[^-]+)-(?P<pid>\d+)-(?P<start>\d+)-")
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
        except (DamageError, NotADirectoryError) as exc:
            raise DatabaseError(
                f"{root} is not an actdb database (no {MARKER}); make one with `actdb harvest`"
            ) from exc
        try:
            version = int(json.loads(text)["format_version"])
        except (KeyError, TypeError, ValueError) as exc:
            raise DatabaseError(f'{root}/{MARKER} is damaged: expected {{"format_version": {FORMAT_VERSION}}}') from exc
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
        folder.publish(MARKER, json.dumps({"format_version": FORMAT_VERSION}).encode(), exclusive=True)
        return cls.open(root)

    def path(self, name: str) -> Path:
        """Return the full path of a file."""
        return self.root / name

    def inside(self, name: str) -> str:
        """Return a file's full path after checking that no symbolic link leads out of the folder."""
        real = os.path.realpath(self.root / name)
        if real != self._real and not real.startswith(self._real + os.sep):
            raise DamageError(f"{self.root / name} leads outside the database folder; refused")
        return real

    def read_bytes(self, name: str) -> bytes:
        """Return a file's content; raises `DamageError` where it is missing or leads outside."""
        try:
            with open(self.inside(name), "rb") as file:
                return file.read()
        except (FileNotFoundError, IsADirectoryError) as exc:
            raise DamageError(f"{self.root / name} is missing") from exc

    def names(self, name: str) -> list[str]:
        """Return the sorted names in a subfolder, temporary ones left out; [] where it does not exist."""
        try:
            entries = os.listdir(self.inside(name))
        except (FileNotFoundError, NotADirectoryError):
            return []
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
        try:
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
            with self.temporary(name) as path:
                with open(path, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                return self.adopt(path, name, exclusive=exclusive)
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
        """Return the size and checksum of a file on disk."""
        return file_record(self.inside(name), name)

    def check(self, record: FileRecord) -> None:
        """Raise `DamageError` unless a whole-file record fits the file on disk."""
        try:
            found = self.record(record.path)
        except FileNotFoundError as exc:
            raise DamageError(f"{self.root / record.path} is missing") from exc
        if found.stored_bytes != record.stored_bytes:
            raise DamageError(
                f"{self.root / record.path} has {found.stored_bytes} bytes instead of {record.stored_bytes}"
            )
        if found.crc32c != record.crc32c:
            raise DamageError(f"{self.root / record.path} does not match its checksum")

    def sweep(self) -> None:
        """Remove the temporary files of processes that are gone, and of other hosts after a day."""
        for parent, _, files in os.walk(self.root):
            for file in files:
                match = TEMPORARY.match(file)
                path = os.path.join(parent, file)
                if match and _abandoned(match, path):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)


def file_record(path: str | os.PathLike[str], name: str) -> FileRecord:
    """Return the size and CRC-32C of a file, read once in blocks."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc, size = google_crc32c.extend(crc, block), size + len(block)
    return FileRecord(name, size, crc)


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
    """Translate an operating-system error of a write."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(f"no space left while writing {path}; free some and run the same command again")
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WriteError(f"cannot write {path}: {os.strerror(exc.errno)}")
    return exc


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname()) or "localhost"


def _start_time(pid: int) -> int:
    """Return a process's start time in clock ticks since boot, 0 where the system does not tell, -1 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except FileNotFoundError:
        return 0 if not os.path.isdir("/proc/self") else -1


def _abandoned(match: re.Match[str], path: str) -> bool:
    try:
        age_s = time.time() - os.stat(path).st_mtime
    except FileNotFoundError:
        return False
    if match["host"] != _host():
        return age_s > STALE_S
    pid = int(match["pid"])
    if _start_time(pid) != int(match["start"]):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return age_s > STALE_S and pid != os.getpid()
