"""A registry in an object store, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, copied into a folder.

The copy is a registry, too: a record gets into it only after the files of its current model.
"""

import hashlib
import os
import re
import textwrap
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mnist import disk
from mnist.registry import INFO, Info, Record, RegistryError, parse, record

if TYPE_CHECKING:
    from filelock import FileLock
    from obstore import GetResult

URL = re.compile(r"(s3|gs)://[\w.-]+(/[\w./=+-]*)?")
OBSTORE = "obstore==0.12.1"  # not in requirements-serve.txt: most servers read a folder
CLIENT_OPTIONS = {
    "allow_http": True,  # where the endpoint is one of http://, which only a person can set
    "connect_timeout": "3s",
    "read_timeout": "10s",  # for the next bytes
    "timeout": "30min",  # for a whole file
}
RETRIES = 2
RETRY_S = 5  # after which a request is not sent again
CHUNK_BYTES = 4_000_000


class StoreError(RegistryError):
    """The store cannot be reached or has no registry, or the copy cannot be written."""


def check_url(url: str) -> None:
    """Raise RegistryError if the URL is malformed, or something to read it is missing."""
    if not URL.fullmatch(url):
        raise RegistryError("an object store is s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    if find_spec("obstore") is None:
        raise RegistryError(f"object stores need `pip install {OBSTORE}`")
    _cache()  # raises where the home folder is unknown


def _cache() -> Path:
    """The folder of all copies, by the XDG base directory specification."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mnist-models"
    except RuntimeError as error:
        raise RegistryError("the home folder is unknown; set XDG_CACHE_HOME") from error


class Mirror:
    """The copy, in `folder`, of the registry at a URL; its methods run in one thread at a time.

    Files of the kinds in `unused` are not copied. Processes may share the folder.
    """

    def __init__(self, url: str, unused: Collection[str] = ()) -> None:
        self.url, self._unused = url.rstrip("/"), unused
        self.folder = _cache() / quote(self.url, safe="")
        self._store: Any = None
        self._etag: str | None = None  # of the copied record

    def update(self, *names: str) -> None:
        """Copy the record if it has changed, after the files of its current model and of `names`.

        Raises StoreError; another RegistryError where the record or a file of the current model is
        unusable. The copy then keeps its record. A file of `names` may be missing until fetch().
        """
        with self._errors(INFO):
            result = self._get(INFO, self._etag)
            if result is None:
                return
            etag, content = result.meta["e_tag"], bytes(result.bytes())
        info = parse(content, f"{self.url}/{INFO}")
        with self._lock():
            if info["current"] is not None:
                self._copy_files(info["models"][info["current"]])
            for name in info["models"].keys() & set(names):
                with suppress(RegistryError):
                    self._copy_files(info["models"][name])
            disk.replace_file(self.folder / INFO, content)
            self._remove_unlisted(info)
        self._etag = etag

    def fetch(self, name: str) -> None:
        """Copy the files of a model in the copied record. Raises RegistryError, as update()."""
        model = record(self.folder, name)[1]
        with self._lock():
            self._copy_files(model)

    def _copy_files(self, model: Record) -> None:
        for kind, entry in model["files"].items():
            path = self.folder / Path(entry["file"]).name
            if kind not in self._unused and not _has_digest(path, entry["sha256"]):
                self._download(path, entry["sha256"])

    def _download(self, path: Path, sha256: str) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        digest, size = hashlib.sha256(), 0
        try:
            with temporary.open("wb") as stream:
                for chunk in self._read(path.name):
                    stream.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            if digest.hexdigest() != sha256:
                raise RegistryError(
                    f"{self.url}/{path.name} was altered: it has {size} bytes with the SHA-256 "
                    f"{digest.hexdigest()}, the record says {sha256}; upload it again"
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _remove_unlisted(self, info: Info) -> None:
        """Delete files of removed models and of interrupted downloads."""
        files = [file for model in info["models"].values() for file in model["files"].values()]
        listed = {INFO, ".lock", *(Path(file["file"]).name for file in files)}
        for path in self.folder.iterdir():
            if path.name not in listed:
                path.unlink()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Make the folder, and keep other processes from changing it; raises StoreError."""
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            with _file_lock(self.folder):
                yield
        except OSError as error:
            remedy = "set XDG_CACHE_HOME to a folder with space that can be written to"
            raise StoreError(f"{self.folder}: {error.strerror}; {remedy}") from error

    # --- the store ---

    def _get(self, name: str, etag: str | None = None) -> "GetResult | None":
        """The file in the store; None if it still has this ETag."""
        import obstore
        from obstore.exceptions import NotModifiedError
        from obstore.store import from_url

        if self._store is None:
            retries: Any = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)}
            options: Any = CLIENT_OPTIONS
            self._store = from_url(self.url, client_options=options, retry_config=retries)
        try:
            return obstore.get(self._store, name, options={"if_none_match": etag} if etag else {})
        except NotModifiedError:
            return None

    def _read(self, name: str) -> Iterator[bytes]:
        with self._errors(name):
            result = self._get(name)
            assert result is not None
            for chunk in result.stream(CHUNK_BYTES):
                yield bytes(chunk)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Raise the store's errors as RegistryErrors of one line."""
        from obstore import exceptions

        url = f"{self.url}/{name}"
        try:
            yield
        except FileNotFoundError as error:
            code = next(iter(re.findall(r"<Code>(\w+)</Code>", str(error))), "not found")
            kind = StoreError if name == INFO else RegistryError
            raise kind(f"{url}: {code}; upload it, or correct the URL") from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            code = next(iter(re.findall(r"<Code>(\w+)</Code>", str(error))), "access denied")
            raise StoreError(f"{url}: {code}; check the credentials and their rights") from error
        except (exceptions.BaseError, ValueError, OSError) as error:
            reason = textwrap.shorten(str(error).partition("\n")[0], 200)
            raise StoreError(f"{url} cannot be read: {reason}") from error


def _has_digest(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except OSError:
        return False


def _file_lock(folder: Path) -> "FileLock":
    from filelock import FileLock  # imported late, as obstore: most servers read a folder

    return FileLock(folder / ".lock")
