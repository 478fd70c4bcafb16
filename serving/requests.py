"""Parse and validate the body of a request. Runs in a worker thread (worker_pools.py).

The size of a body is bounded (middleware.py). Validation of a list stops at the first wrong entry (`fail_fast` in
schemas.py); otherwise pydantic would build one error for each of 500,000 wrong entries.
Called by service.py. Read next: schemas.py (the fields), errors.py (the shape of errors).
"""

import json
from typing import TypeVar

from pydantic import ValidationError

from serving.errors import ApiError, union_error
from serving.schemas import LenientModel

Body = TypeVar("Body", bound=LenientModel)


def parse_body(raw: bytes, kind: type[Body]) -> Body:
    """Return the request in a body. Raises ApiError 400 that names the field and its allowed values."""
    try:
        content = json.loads(raw)
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON: nested too deeply") from None
    except ValueError as error:  # includes bytes that are not UTF-8 and numbers of more than 4,300 digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {reason}"[:500]) from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        where, message = union_error(error.errors(include_url=False, include_input=False))
        raise ApiError(400, f"{where or 'body'}: {message}"[:500], where[:200] or None) from None
