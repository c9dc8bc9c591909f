"""The base class of the stand-ins for other projects' HTTP servers."""

import http.server
import json


class JsonHandler(http.server.BaseHTTPRequestHandler):
    """Replies in JSON and logs nothing, so that a test's output is its own."""

    def reply(self, status: int, document: object) -> None:
        payload = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass
