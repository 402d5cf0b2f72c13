"""The server as an AWS Lambda function behind a function URL.

The import starts the server once, in Lambda's initialisation, and not in each request.
"""

import asyncio
import json
from typing import Any

from serve.app import app

# isort: split
from mangum import Mangum
from mangum.protocols import LifespanCycle

MAX_BODY_BYTES = 6_000_000  # of a Lambda event; pictures are in base64 in it, 4/3 of their size

asyncio.set_event_loop(asyncio.new_event_loop())
LifespanCycle(app, "on").__enter__()  # raises LifespanFailure for a wrong setting; never left
_answer = Mangum(app, lifespan="off")


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """The response to the event of a function URL (version 2.0); 413 for too large a body."""
    size = len(event.get("body") or "")
    if size > MAX_BODY_BYTES:
        return _too_large(size, event.get("isBase64Encoded", False), context.aws_request_id)
    return _answer(event, context)


def _too_large(size: int, in_base64: bool, request_id: str) -> dict[str, Any]:
    message = f"the body is {size / 1e6:.1f} MB{' in base64' if in_base64 else ''}; the limit of "
    message += f"AWS Lambda is {MAX_BODY_BYTES / 1e6:.0f} MB, a picture of about 4.5 MB; "
    message += "send a smaller picture, or fewer in a request"
    error = {"code": "too_large", "message": message, "request_id": request_id}
    headers = {"content-type": "application/json", "x-request-id": request_id}
    return {"statusCode": 413, "headers": headers, "body": json.dumps({"error": error})}
