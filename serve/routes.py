"""Which routes exist and who may use them; everything else is a 404."""

import re
import urllib.parse

from serve.api_errors import ApiError
from serve.config import is_loopback
from serve.keys import ADMIN, USER, Key, KeyRing
from serve.request_rewrite import CHAT, COMPLETIONS, RESPONSES
from serve.ui import page
from serve.ui.votes import VOTES

ANYONE = "anyone"
ROUTES = {
    ("GET", "/health"): ANYONE,
    ("GET", "/ready"): ANYONE,
    ("GET", "/version"): USER,
    ("GET", "/v1/models"): USER,
    ("POST", CHAT): USER,
    ("POST", COMPLETIONS): USER,
    ("POST", RESPONSES): USER,
    ("GET", "/metrics"): ADMIN,
    ("GET", "/v1/adapters"): ADMIN,
    ("POST", "/v1/load_lora_adapter"): ADMIN,
    ("POST", "/v1/unload_lora_adapter"): ADMIN,
}
# The chat page is for anyone to load: it holds no secret, and a browser's address bar sends no key.
UI_ROUTES = {**{("GET", path): ANYONE for path in page.PATHS}, ("POST", VOTES): USER}
GENERATING = (CHAT, COMPLETIONS, RESPONSES)
ANONYMOUS = Key(USER, "anonymous", "")

_ONE_VOTE = re.compile(rf"{VOTES}/[0-9a-f]{{32}}")
_ONE_MODEL = re.compile(r"/v1/models/[A-Za-z0-9._@/-]{1,200}")

Headers = dict[bytes, bytes]


def required_role(method: str, path: str, *, preflight: bool, open_server: bool, ui: bool) -> str:
    """The role that a request needs. Raises ApiError 404 or 405 for a route that does not exist.

    preflight: it is a browser's CORS preflight, and this server allows some origin. open_server: no keys are set. ui:
    this server has the chat page.
    """
    if preflight:
        # A browser sends no key with it; vLLM's CORS middleware answers it.
        return ANYONE
    routes = ROUTES | UI_ROUTES if ui else ROUTES
    role = routes.get((method, path))
    if role is None and method == "GET" and _ONE_MODEL.fullmatch(path):
        role = USER
    if role is None and ui and method == "DELETE" and _ONE_VOTE.fullmatch(path):
        role = USER
    if role is None:
        if any(path == known for _, known in routes):
            raise ApiError(405, f"{path} does not accept {method}")
        raise ApiError(404, f"there is no {method} {path} here", code="unknown_url")
    if role == ADMIN and path == "/metrics" and open_server:
        # Only this machine reaches a server without keys: its metrics are as open as its answers.
        return USER
    return role


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks which requests another site's page may send."""
    return method == "OPTIONS" and b"origin" in headers and bool(headers.get(b"access-control-request-method"))


def authenticate(keys: KeyRing, role: str, headers: Headers) -> Key:
    """The caller's key. Raises ApiError 401 where one is needed and it is missing or unknown."""
    if role == ANYONE:
        return ANONYMOUS
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    key = keys.find(token.strip()) if scheme.lower() == "bearer" else None
    if key is None and keys.open and role == USER:
        return ANONYMOUS
    if key is None:
        raise ApiError(
            401, "an API key is needed: Authorization: Bearer <key>" if not token else "the API key is unknown"
        )
    return key


def refuse_foreign_host(headers: Headers) -> None:
    """Raise ApiError 403 unless the request names this machine as localhost. For servers without keys.

    Such a server trusts whoever is on this machine. A web page can abuse that: its host name may be changed to resolve
    to 127.0.0.1 after the page is loaded (DNS rebinding). The browser still sends that host name.
    """
    try:
        host = urllib.parse.urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname
    except ValueError:
        host = None
    if not is_loopback(host or ""):
        raise ApiError(403, f"a server without keys answers to localhost only, not to {host!r}; start it with --keys")
