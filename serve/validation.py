"""A request that vLLM's schema does not take, said in a line that a person reads.

For a field that may be several things, pydantic complains once for each of them, and quotes what was given each time:
hundreds of complaints for one missing id.
"""

from typing import Any

from serve.api_errors import ApiError

_SHOWN = 3


async def refuse(request: Any, error: Any) -> Any:
    """FastAPI's handler of a RequestValidationError: raises ApiError 400 with the first complaints and their places."""
    from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param

    said: dict[str, str] = {}
    for complaint in error.errors():
        place = clean_loc_for_param(complaint["loc"]).removeprefix("body.")
        # What a validator of vLLM's own says has no place, or the whole body for one.
        said.setdefault(place, str(complaint["msg"]).removeprefix("Value error, "))
    shown = "; ".join(f"{place}: {text}" if place else text for place, text in list(said.items())[:_SHOWN])
    more = f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    raise ApiError(400, shown + more, param=next(iter(said), None))
