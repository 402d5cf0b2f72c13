"""Masks secrets in texts and URLs."""

import re

MASK = "***"
# Possible secrets in the text of an error: before the @ of a URL, or after a name.
SECRETS = re.compile(r"(?<=://)[^\s'\"]+(?=@)|(?i:(?<=password=)|(?<=pwd=)|(?<=token=))[^\s&'\"]+")
# Parameters of a database's URL that are shown; any other may be a secret of its driver.
HARMLESS_PARAMETERS = (
    *("host", "port", "dbname", "sslmode", "connect_timeout", "application_name", "charset"),
    *("target_session_attrs", "mode", "uri", "cache", "timeout"),
)
# Their names are shown. Any other name may be a part of a password with an &.
SECRET_PARAMETERS = ("user", "password", "passwd", "pwd", "passfile", "sslkey", "sslpassword")


def mask_text(text: str) -> str:
    """A text, such as that of an error, with possible secrets masked."""
    return SECRETS.sub(MASK, text)


def mask_parameter(parameter: str) -> str:
    """NAME=VALUE of a URL's query, without a value or name that may be a secret."""
    name, equals, value = parameter.partition("=")
    if name in HARMLESS_PARAMETERS and re.fullmatch(r"[\w./,:-]*", value):
        return parameter
    is_known = name.lower() in (*HARMLESS_PARAMETERS, *SECRET_PARAMETERS)
    return f"{name}={MASK}" if equals and is_known else MASK


def mask_url(url: str) -> str:
    """The URL of a database in a record, which may be older than the masking of records.

    A masked URL is returned unchanged, and so is the URL of an SQLite file: a path may have an @.
    """
    scheme, separator, place = url.partition("://")
    if not separator or (scheme.startswith("sqlite") and place.startswith("/")):
        return url
    location, mark, query = place.partition("?")
    if "@" in query:  # of a password with a ?
        return f"{scheme}://{MASK}"
    _, at, location = location.rpartition("@")
    parameters = "&".join(map(mask_parameter, query.split("&"))) if query else ""
    return f"{scheme}://{MASK + at if at else ''}{location}{mark}{parameters}"
