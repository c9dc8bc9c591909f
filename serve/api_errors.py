"""Errors in the shape, and with the status, that the official SDK maps to its exception classes."""

import json
from collections.abc import Mapping

# Status -> (type, code): 400 BadRequestError, 401 AuthenticationError, 403 PermissionDeniedError, 404 NotFoundError,
# 408/413/422 APIStatusError, 429 RateLimitError, 5xx InternalServerError.
_KINDS = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "insufficient_permissions"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    502: ("server_error", "bad_gateway"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "gateway_timeout"),
}


class ApiError(Exception):
    """Why a request is refused: an HTTP status, one line for the caller, and OpenAI's `param` and `code`."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str = "", retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _KINDS[status][1]
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        error = {"message": self.message, "type": _KINDS[self.status][0], "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def headers(self) -> Mapping[str, str]:
        retry = {"retry-after": str(self.retry_after_s)} if self.retry_after_s is not None else {}
        challenge = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return {"content-type": "application/json", **retry, **challenge}
