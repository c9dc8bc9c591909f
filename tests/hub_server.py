"""A stand-in for the Hub's API, as much of it as a push needs."""

import json
import re

from tests.json_handler import JsonHandler


class Hub(JsonHandler):
    """As much of the Hub's API as a push needs; keeps what it was sent in `seen`; while `held`, it never answers."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.server.held is not None:
            self.server.held.wait()
            return None
        if self.path.endswith("/api/validate-yaml"):
            # As the Hub's check: a base is named by its id.
            named = re.search(r"^base_model: (.*)$", json.loads(body)["content"], re.MULTILINE)
            if named and not re.fullmatch(r"[\w.-]+/[\w.-]+", named[1]):
                return self.reply(400, {"errors": [{"message": '"base_model" must be an id'}], "warnings": []})
            return self.reply(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.reply(401, {"error": "Invalid credentials"})
        if self.path.endswith("/api/repos/create"):
            return self.reply(200, {"url": f"{self.server.url}/org/gentle"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        return self.reply(200, {"commitUrl": f"{self.server.url}/org/gentle/commit/{'a' * 40}", "commitOid": "a" * 40,
                                "success": True, "pullRequestUrl": None})  # fmt: skip

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.reply(401, {"error": "Invalid credentials"})
        return self.reply(200, {"id": "org/gentle", "sha": "a" * 40, "siblings": []})
