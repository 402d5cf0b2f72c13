"""The errors of a request."""

import json


class ApiError(Exception):
    """An error response: its status, code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def bad_request(message: str) -> ApiError:
    return ApiError(400, "bad_request", message)


def quote(text: str) -> str:
    """A client's text for a message: at most 40 characters, control characters escaped."""
    return json.dumps(text[:40], ensure_ascii=False)
