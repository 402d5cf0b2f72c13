"""Atomic writes: no reader and no crash ever finds a part of a file."""

import errno
import os
import tempfile
from pathlib import Path
from uuid import uuid4


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file by rename; the content is on the disk when this function returns.

    A process that is killed meanwhile leaves the old content, and a file `.NAME.*.tmp` next to it.
    Raises OSError, and leaves nothing, where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:  # CIFS before Linux 4.17 and others cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(directory)


def check_writable(folder: Path) -> None:
    """Create the folder; raises OSError if no file can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
