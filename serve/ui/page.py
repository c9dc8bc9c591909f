"""Serves the chat page: one HTML document, two stylesheets and a few JavaScript modules, as they are in this folder.

There is no build step and no second server. The page talks to this server's own API, and its Content-Security-Policy
lets the browser load and call nothing else: no font, script or analytics of another host.
"""

from pathlib import Path
from typing import Any, NamedTuple

import counsel.report
from serve.ui.votes import REASONS

_HERE = Path(__file__).parent
PAGE = "/ui"
_SCRIPTS = ("main.js", "api.js", "conversations.js", "elements.js", "settings.js", "turns.js", "votes.js")
_STYLES = {"look.css": Path(counsel.report.__file__).parent / "style.css", "chat.css": _HERE / "chat.css"}
PATHS = (PAGE, *(f"{PAGE}/{name}" for name in (*_STYLES, *_SCRIPTS)))

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # A page of an earlier version must not call a later server.
    "Cache-Control": "no-cache",
}


class File(NamedTuple):
    """One file as it is sent."""

    content: bytes
    media_type: str


def files() -> dict[str, File]:
    """Every file of the page by its path."""
    html = counsel.report.render("page.html", _HERE, reasons=REASONS)
    found = {PAGE: File(html.encode(), "text/html")}
    for name, path in _STYLES.items():
        found[f"{PAGE}/{name}"] = File(path.read_bytes(), "text/css")
    for name in _SCRIPTS:
        found[f"{PAGE}/{name}"] = File((_HERE / name).read_bytes(), "text/javascript")
    return found


def attach_page(app: Any) -> None:
    """Add the page's routes to vLLM's app."""
    from fastapi import Request
    from fastapi.responses import Response

    by_path = files()

    async def send(request: Request) -> Response:
        file = by_path[request.url.path]
        return Response(file.content, media_type=f"{file.media_type}; charset=utf-8", headers=HEADERS)

    for path in by_path:
        app.add_api_route(path, send, methods=["GET"])
