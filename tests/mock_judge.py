"""A deterministic judge on loopback: the chat route of an OpenAI-compatible server, over real HTTP.

    python tests/mock_judge.py       prints its port, serves until killed

The *model name* sets how it judges, in words joined by dots. Pairs: `first` always prefers the answer shown first,
`longer` the one with more characters, `fair` the one that contains "better" (neither or both: a tie). A criterion is
met if the answer contains its name. Replies: `broken` cuts the JSON of pairs in the middle, `fenced` wraps it in a code
fence, `refused` answers pairs with 400. GET /seen counts requests per model; GET /version returns 9.9.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SEEN: Counter = Counter()


def between(text: str, tag: str) -> str:
    """The text inside a tag."""
    match = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL)
    return match.group(1) if match else ""


def verdict(how: list[str], body: dict) -> dict:
    """An object that follows the request's schema."""
    text = body["messages"][-1]["content"]
    schema = body["response_format"]["json_schema"]["schema"]
    if "better" not in schema["properties"]:
        answer = between(text, "answer")
        return {name: name in answer for name in schema["properties"]}
    first, second = between(text, "first_answer"), between(text, "second_answer")
    marks = {"longer": (len(first), len(second)), "fair": ("better" in first, "better" in second)}
    one, other = (1, 0) if "first" in how else next(marks[word] for word in how if word in marks)
    return {"reason": "as told", "better": "first" if one > other else "second" if other > one else "tie"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        found = {"/version": {"version": "9.9"}, "/seen": dict(SEEN)}.get(self.path)
        self.answer(200 if found is not None else 404, found if found is not None else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        how = body["model"].split(".")
        SEEN[body["model"]] += 1
        found = verdict(how, body)
        text, finish = json.dumps(found), "stop"
        if "better" in found:
            if "refused" in how:
                self.answer(400, {"error": {"message": "as asked"}})
                return
            if "broken" in how:
                text, finish = text[: len(text) // 2], "length"
            if "fenced" in how:
                text = f"```json\n{text}\n```"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        self.answer(200, {"id": "mock", "object": "chat.completion", "created": 1, "model": f"mock/{body['model']}",
                          "choices": [choice], "usage": usage})  # fmt: skip

    def answer(self, status: int, document: dict) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep test output clean."""


@contextlib.contextmanager
def mock_judge() -> Iterator[str]:
    """Run the judge in a separate process; yield its base URL."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
