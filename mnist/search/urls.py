"""URLs of a study's database: how they are read, and how they are shown without their secrets."""

import re
from pathlib import Path
from urllib.parse import unquote, unquote_plus, urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from mnist.masking import MASK, mask_parameter
from mnist.shell import expand_home


class StudyError(RuntimeError):
    """A study that this command cannot open or continue."""


class _Malformed(ValueError):
    """Why a URL names no database, without any part of the URL, as that may be a secret."""


def normalise(storage: str) -> str:
    """The URL as SQLAlchemy reads it: `postgres:` is `postgresql:`, ~ is the home folder."""
    storage = re.sub(r"^postgres(?=[+:])", "postgresql", storage)
    scheme, slashes, path = storage.partition(":///")
    if scheme.startswith("sqlite"):
        return scheme + slashes + expand_home(path)
    return storage


def parse(storage: str) -> URL:
    """The parts of a URL. Raises StudyError."""
    try:
        return _parse(storage)
    except _Malformed as error:
        raise unusable_storage(storage, str(error)) from error


def check(storage: str) -> None:
    """Raise StudyError for a malformed URL, and for a database that ends with its process."""
    if is_in_memory(parse(storage)):
        raise unusable_storage(storage, "it is in memory, and nothing would be kept")


def unusable_storage(storage: str, reason: str) -> StudyError:
    """The one-line error for a storage that cannot be opened."""
    line = scrub((reason.strip() or "no reason is known").splitlines()[0], storage)
    return StudyError(
        f"--storage {mask_url_secrets(storage)!r} cannot be opened: {line}; "
        "a URL such as sqlite:///db.sqlite3 is expected"
    )


def _parse(storage: str) -> URL:
    storage = normalise(storage)
    user, at, place = _split_user(storage)
    if at and ("@" in place or "?" in user):
        raise _Malformed(
            "it has more than one @, or a ? before the @; in a user name, a password or a "
            "parameter, write %40 for @ and %3F for ?"
        )
    try:
        return make_url(storage)
    except (SQLAlchemyError, ValueError):  # their texts may repeat a part of a password
        raise _Malformed("it is not the URL of a database") from None


def _split_user(storage: str) -> tuple[str, str, str]:
    """The user and password before an @, the @ itself, and host, port, database and query."""
    scheme, _, location = storage.partition("://")
    if scheme.startswith("sqlite") and location.startswith("/"):  # a path; it may hold an @
        return "", "", location
    user, at, place = location.partition("@")
    return (user, at, place) if at else ("", "", location)


def mask_url_secrets(storage: str) -> str:
    """The URL for output and records: scheme, host, port, database and harmless parameters."""
    storage = normalise(storage)
    scheme = re.match(r"[\w+]+(?=://)", storage)
    if scheme is None:  # a word such as "nonsense" is shown; a list of parameters is masked
        return storage if re.fullmatch(r"[\w./~-]*", storage) else MASK
    try:
        _parse(storage)
    except _Malformed:
        return f"{scheme[0]}://{MASK}"
    _, at, place = _split_user(storage)
    location, mark, query = place.partition("?")
    if not scheme[0].startswith("sqlite") and re.search(r"[&;=\s]", unquote(location)):
        location = MASK  # a query without its question mark
    parameters = "&".join(map(mask_parameter, query.split("&"))) if query else ""
    return f"{scheme[0]}://{MASK + at if at else ''}{location}{mark}{parameters}"


def scrub(text: str, storage: str) -> str:
    """An error's text without the secrets of the URL, which a driver may repeat."""
    user, _, place = _split_user(normalise(storage))
    parameters = place.partition("?")[2].split("&")
    raw = {part.partition("=")[2] for part in parameters if mask_parameter(part) != part}
    raw.add(user.partition(":")[2])
    secrets = {*raw, *map(unquote, raw), *map(unquote_plus, raw)} - {""}
    for secret in sorted(secrets, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, text)
    return text


def sqlite_file(storage: str) -> Path | None:
    """The file of an SQLite database; None for other storages and for databases in memory."""
    try:
        url = _parse(storage)
    except _Malformed:
        return None
    if url.get_backend_name() != "sqlite" or is_in_memory(url):
        return None
    name = str(url.database)
    if url.query.get("uri") and name.startswith("file:"):
        name = unquote(urlsplit(name).path)
    return Path(name).resolve()


def is_in_memory(url: URL) -> bool:
    """Whether this is an SQLite database that ends with its process."""
    name = url.database or ""
    in_memory = name == "" or ":memory:" in name or url.query.get("mode") == "memory"
    return url.get_backend_name() == "sqlite" and in_memory
