"""The environment variables that this process reads and passes on."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def extend_environment(**values: str) -> Iterator[None]:
    """Set environment variables in this block, also for the processes that it starts."""
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
