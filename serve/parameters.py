"""Parameters in the wrong place or misspelt: without an error they would have no effect."""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

from fastapi import Request

from serve.errors import bad_request, quote

MAX_NAMES = 100  # of a form or JSON that are compared, 20 us each
FIELDS = {"file": "form", "files": "form", "label": "form", "image": "JSON"}


def check_query(request: Request) -> None:
    """Raise ApiError if the URL has a parameter that is not the route's."""
    known = _parameters(request)
    for name in request.query_params:
        if name in FIELDS and name not in known:
            raise bad_request(f"`{name}` is a field of the {FIELDS[name]}, not of the URL")
        if name not in known:
            likely = _nearest(name, known)
            takes = f"it takes {', '.join(known) or 'none'}"
            remedy = f"did you mean `{likely}`?" if likely else takes
            raise bad_request(f"{request.url.path} takes no parameter {quote(name)}; {remedy}")


def check_fields(request: Request, names: Iterable[str]) -> None:
    """Raise ApiError if a form or JSON has a field that is, or nearly is, one of the URL's."""
    known = _parameters(request)
    for name in islice(names, MAX_NAMES):
        if likely := _nearest(name, known):
            url = f"{request.url.path}?{likely}=..."
            raise bad_request(f"the field {quote(name)} has no effect; send it in the URL: {url}")


def _nearest(name: str, known: list[str]) -> str | None:
    """A parameter with nearly this name: `topk` is near `top`, but `label` is not near `model`."""
    return next(iter(get_close_matches(name[:20].lower(), known, 1, cutoff=0.75)), None)


def _parameters(request: Request) -> list[str]:
    """The parameters of the route's URL, with those of its dependencies."""
    dependant = request.scope["route"].dependant
    parts = [*dependant.dependencies, dependant]
    return [field.alias for part in parts for field in part.query_params]
