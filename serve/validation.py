"""A short error for a request that does not fit vLLM's schema.

For a field of several possible types, pydantic reports one error per type, and quotes the value each time: hundreds of
errors for one missing id.
"""

from typing import Any

from serve.api_errors import ApiError

_SHOWN = 3


async def refuse(request: Any, error: Any) -> Any:
    """FastAPI's handler for a RequestValidationError: raises ApiError 400 with the first errors and where they are."""
    from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param

    messages: dict[str, str] = {}
    for entry in error.errors():
        place = clean_loc_for_param(entry["loc"]).removeprefix("body.")
        # An error of vLLM's own validators has no place, or the whole body as its place.
        messages.setdefault(place, str(entry["msg"]).removeprefix("Value error, "))
    shown = "; ".join(f"{place}: {text}" if place else text for place, text in list(messages.items())[:_SHOWN])
    more = f"; and {len(messages) - _SHOWN} more" if len(messages) > _SHOWN else ""
    raise ApiError(400, shown + more, param=next(iter(messages), None))
