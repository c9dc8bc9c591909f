"""A stand-in for the part of the Hub's API that a push uses."""

import json
import re

from tests.json_handler import JsonHandler


class Hub(JsonHandler):
    """Keeps the requests it gets in `seen`; does not answer while `held` is set."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.server.held is not None:
            self.server.held.wait()
            return None
        if self.path.endswith("/api/validate-yaml"):
            # Like the Hub, it requires an id for the base.
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
