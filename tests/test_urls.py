"""mnist.search.urls: what is shown of a database's URL, and which URLs are refused."""

from pathlib import Path

import pytest

from mnist.job.options import Options
from mnist.search import urls
from mnist.search.urls import StudyError

SECRET = "s3cretWord"


@pytest.mark.parametrize(
    ("storage", "shown"),
    [
        ("sqlite:///db.sqlite3", "sqlite:///db.sqlite3"),
        (
            "sqlite:////home/me@work/db.sqlite3?mode=ro",
            "sqlite:////home/me@work/db.sqlite3?mode=ro",
        ),
        ("postgresql://host:5432/db?sslmode=require", "postgresql://host:5432/db?sslmode=require"),
        (f"postgresql://me:{SECRET}@host/db", "postgresql://***@host/db"),
        (f"postgresql://{SECRET}@host/db", "postgresql://***@host/db"),
        (f"postgresql://h/db?user=u&password={SECRET}", "postgresql://h/db?user=***&password=***"),
        (f"postgresql://h/db?sslmode=no;password={SECRET}", "postgresql://h/db?sslmode=***"),
        (f"postgresql://h/db?passfile={SECRET}&{SECRET}", "postgresql://h/db?passfile=***&***"),
        (f"postgresql://h/db&password={SECRET}", "postgresql://***"),
        (f"postgresql://me:p@{SECRET}@host/db", "postgresql://***"),
        (f"postgresql://me:p@host:{SECRET}/db", "postgresql://***"),
        (f"postgresql://h:5432/db?password=p@{SECRET}", "postgresql://***"),
        (f"sqlite+pysqlcipher://:{SECRET}@/db.sqlite3", "sqlite+pysqlcipher://***@/db.sqlite3"),
        (f"postgresql:/me:{SECRET}@host/db", "***"),
        (f"me:{SECRET}@host/db", "***"),
        (f"host=h user=u password={SECRET}", "***"),
    ],
)
def test_only_scheme_host_port_database_and_harmless_parameters_are_shown(
    storage: str, shown: str
) -> None:
    assert urls.mask_url_secrets(storage) == shown
    assert Options(storage=storage).record()["storage"] == shown
    assert SECRET not in str(urls.unusable_storage(storage, "no route to the host"))


@pytest.mark.parametrize(
    "storage",
    [
        f"postgresql://me:p@{SECRET}@host/db",
        f"postgresql://me:p@ss/{SECRET}@host/db",
        f"postgresql://me:p?{SECRET}@host/db",
        f"postgresql://host/db?user=u&password=p@{SECRET}",
        f"postgresql://host:5432/db?password=p@{SECRET}",
    ],
)
def test_a_password_with_an_at_sign_is_refused_without_a_part_of_it(storage: str) -> None:
    with pytest.raises(StudyError, match="write %40 for @") as caught:
        urls.check(storage)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    urls.check("postgresql://me:p%40ss%3Fword@host/db")


def test_an_error_s_text_is_shown_without_the_secrets_of_the_url() -> None:
    storage = f"postgresql://me:p%2Fw@host/db?options=-c%20key%3D{SECRET}"
    text = f'password "p/w" (p%2Fw) of "me", -c key={SECRET}: failed'
    assert urls.scrub(text, storage) == 'password "***" (***) of "me", ***: failed'
    assert SECRET not in str(urls.unusable_storage(storage, text))


@pytest.mark.parametrize(
    "storage",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "sqlite:///file::memory:?cache=shared&uri=true",
    ],
)
def test_a_database_in_memory_is_refused(storage: str) -> None:
    with pytest.raises(StudyError, match="in memory, and nothing would be kept"):
        urls.check(storage)


def test_postgres_and_the_home_folder_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for url, expected in (
        ("postgres://host/db", "postgresql://host/db"),
        ("postgres+psycopg://host/db", "postgresql+psycopg://host/db"),
        ("sqlite:///~/db.sqlite3", "sqlite:////home/me/db.sqlite3"),
        ("sqlite:///db~1.sqlite3", "sqlite:///db~1.sqlite3"),
    ):
        assert urls.normalise(url) == expected
        assert urls.parse(url).render_as_string() == expected
    assert urls.sqlite_file("sqlite:///~/db.sqlite3") == Path("/home/me/db.sqlite3")
    assert urls.sqlite_file("sqlite:///file:/x/a%20b.db?uri=true") == Path("/x/a b.db")
