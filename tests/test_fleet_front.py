"""HAProxy under the configuration that the product generates, before two servers that tell what they got."""

import contextlib
import http.client
import http.server
import json
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from counsel.errors import UserError
from serve.fleet import haproxy
from serve.fleet.front import HOMES, LEAVING, Front, haproxy_config, map_lines
from serve.server import reserve_port
from tests.waiting import HANG_S, until

try:
    HAPROXY = haproxy.find_haproxy("")
except UserError as absent:
    pytest.skip(str(absent), allow_module_level=True)

CHAT = "/v1/chat/completions"


class Recorder(http.server.ThreadingHTTPServer):
    """Answers every request with 200 and keeps it; `hold` keeps POSTs waiting; `status` is what it answers to them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.go = threading.Event()
        self.go.set()
        self.status = 200
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    server: Recorder

    def do_GET(self) -> None:
        self._answer(200)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        self.server.go.wait(HANG_S)
        self._answer(self.server.status)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("retry-after", "7")
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *words: object) -> None:
        pass


class Fronted:
    """A front before two recorders."""

    def __init__(self, folder: Path, replicas: dict[str, Recorder], port: int) -> None:
        self.replicas, self.port = replicas, port
        self.haproxy = haproxy.Running(folder)
        self.lines: dict[str, str] = {}

    def tell(self, **homes: tuple[tuple[str, ...], bool]) -> None:
        lines: dict[str, str] = {}
        for name, (at, only) in homes.items():
            lines |= map_lines(name, at, only)
        self.haproxy.change_map(self.lines, lines)
        self.lines = lines

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_S)
        with contextlib.closing(connection):
            connection.request(method, path, body or None, {key.replace("_", "-"): of for key, of in headers.items()})
            reply = connection.getresponse()
            return reply.status, {key.lower(): of for key, of in reply.getheaders()}, reply.read()

    def ask(self, model: str, **headers: str) -> tuple[int, str]:
        """The status, and which replica answered."""
        status, got, _ = self.request("POST", CHAT, json.dumps({"messages": [], "model": model}).encode(), **headers)
        return status, got.get("x-replica", "")


@contextlib.contextmanager
def fronted(folder: Path, **options: Any) -> Iterator[Fronted]:
    replicas = {"r1": Recorder(), "r2": Recorder()}
    with contextlib.ExitStack() as undo:
        for recorder in replicas.values():
            undo.callback(recorder.server_close)
            undo.callback(recorder.shutdown)
        reserved = undo.enter_context(reserve_port("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        front = Front("127.0.0.1", port, home_bound=options.pop("home_bound", 4), stop_s=1.0, **options)
        (folder / "haproxy.cfg").write_text(haproxy_config(front, {name: r.address for name, r in replicas.items()}))
        (folder / HOMES).touch()
        haproxy.refuse_bad_config(HAPROXY, folder, "haproxy.cfg")
        process = subprocess.Popen([HAPROXY, "-db", "-f", "haproxy.cfg"], cwd=folder, stderr=subprocess.DEVNULL)
        undo.callback(process.wait)
        undo.callback(process.terminate)
        running = Fronted(folder, replicas, port)

        def is_up() -> bool:
            with contextlib.suppress(OSError):
                return all(state.status == "UP" for state in running.haproxy.servers().values())
            return False

        until(is_up)
        yield running


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    with fronted(tmp_path_factory.mktemp("front"), key_in_flight=3) as running:
        yield running


@pytest.mark.parametrize("metrics_port", [0, 9100])
@pytest.mark.parametrize("key_in_flight", [0, 5])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
@pytest.mark.parametrize(("n_replicas", "traces"), [(1, False), (2, True), (12, False)])
def test_haproxy_accepts_the_configuration(tmp_path, host, key_in_flight, metrics_port, n_replicas, traces):
    """For every kind of front, without a warning."""
    front = Front(host, 8000, 32, key_in_flight=key_in_flight, metrics_port=metrics_port, traces=traces)
    replicas = {f"r{number}": f"10.0.0.{number}:8000" for number in range(1, n_replicas + 1)}
    (tmp_path / "haproxy.cfg").write_text(haproxy_config(front, replicas))
    (tmp_path / HOMES).touch()

    done = subprocess.run([HAPROXY, "-c", "-f", "haproxy.cfg"], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_a_request_and_its_reply_pass_unchanged(front):
    """Byte for byte, whatever it holds: unknown fields, odd JSON, no JSON; with the caller's headers."""
    bodies = (
        b'{ "model" : "ad1", "x":[1,2.50,null,"\\u00e4"],\n"logprobs":null}',
        b"not json",
        '{"model":"ä"}'.encode(),
        b'{"model":{"a":1}}',
        b'{"model":"' + b"a" * 200_000 + b'"}',
    )
    for body in bodies:
        status, headers, _ = front.request("POST", CHAT, body, authorization="Bearer k", x_request_id="me", x_other="1")
        path, got, raw = front.replicas[headers["x-replica"]].got[-1]
        assert (status, path, raw) == (200, CHAT, body)
        assert {"authorization": "Bearer k", "x-request-id": "me", "x-other": "1"}.items() <= {
            key.lower(): of for key, of in got.items()
        }.items()
        assert headers["retry-after"] == "7"


def test_an_adapters_requests_go_to_its_home_in_every_version_and_a_hot_ones_to_each_of_its_homes(front):
    """`model` may come first or last; other models go by load."""
    front.tell(calm=(("r2",), False), gentle=(("r1",), False), hot=(("r1", "r2"), False))

    assert {front.ask(model) for model in ("calm", "calm@0123456789ab") for _ in range(4)} == {(200, "r2")}
    assert {front.ask(model) for model in ("gentle", "gentle@0123456789ab") for _ in range(4)} == {(200, "r1")}
    # All of 40 draws on one side: once in 2^39.
    assert set(Counter(front.ask("hot") for _ in range(200))) == {(200, "r1"), (200, "r2")}
    traffic = front.haproxy.traffic()
    assert traffic["calm"].per_minute >= 8
    assert traffic["calm"].in_flight == 0
    front.tell()
    assert {front.ask("calm")[1] for _ in range(10)} == {"r1", "r2"}


def test_a_full_home_spills_and_the_only_one_does_not(tmp_path):
    """Three in flight at r1, where three are allowed: the next goes to r2, unless only r1 can serve it."""
    with fronted(tmp_path, home_bound=3) as front, contextlib.ExitStack() as held:
        front.tell(calm=(("r1",), False), strict=(("r1",), True))
        held.callback(front.replicas["r1"].go.set)
        front.replicas["r1"].go.clear()
        threads = [threading.Thread(target=front.ask, args=["calm"]) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: front.haproxy.servers()["r1"].in_flight == 3)
        assert front.haproxy.traffic()["calm"].in_flight == 3
        assert front.ask("calm") == (200, "r2")
        strict = threading.Thread(target=front.ask, args=["strict"])
        strict.start()
        until(lambda: front.haproxy.servers()["r1"].in_flight == 4)
        held.close()
        for thread in (*threads, strict):
            thread.join()
        assert [json.loads(body)["model"] for _, _, body in front.replicas["r2"].got] == ["calm"]


def test_a_request_without_a_trace_gets_one_and_one_with_a_trace_keeps_it(tmp_path):
    """A trace of its own each, in W3C's form, sampled."""
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    with fronted(tmp_path, traces=True) as front:
        for headers in ({"traceparent": given}, {}, {}):
            front.ask("x", **headers)
        got = [headers["traceparent"] for recorder in front.replicas.values() for _, headers, _ in recorder.got]
    got.remove(given)
    ids = [re.fullmatch(r"00-([0-9a-f]{32})-([0-9a-f]{16})-01", each).groups() for each in got]
    assert len(ids) == len({trace for trace, _ in ids}) == len({span for _, span in ids}) == 2


def test_a_replica_that_refuses_is_not_the_last_one_asked(front):
    """503 at the home: the other one answers. Other statuses are the caller's to see."""
    front.tell(calm=(("r2",), False))
    for status, seen in ((503, (200, "r1")), (429, (429, "r2")), (500, (500, "r2")), (404, (404, "r2"))):
        front.replicas["r2"].status = status
        assert {front.ask("calm") for _ in range(3)} == {seen}
    front.replicas["r2"].status = 200


def test_a_keys_total_is_counted_over_all_replicas_however_it_is_written(front):
    """Three in flight: the fourth is 429 with the same key in other blanks, and passes with another key."""
    for recorder in front.replicas.values():
        recorder.go.clear()
    threads = [
        threading.Thread(target=front.ask, args=["x"], kwargs={"authorization": f"{scheme} ann"})
        for scheme in ("Bearer", "bearer", "Bearer \t")
    ]
    for thread in threads:
        thread.start()
    until(lambda: sum(state.in_flight for state in front.haproxy.servers().values()) == 3)
    status, headers, body = front.request("POST", CHAT, b"{}", authorization="BEARER   ann")
    other = threading.Thread(target=front.ask, args=["x"], kwargs={"authorization": "Bearer bob"})
    other.start()
    until(lambda: sum(state.in_flight for state in front.haproxy.servers().values()) == 4)
    for recorder in front.replicas.values():
        recorder.go.set()
    for thread in (*threads, other):
        thread.join()

    assert (status, headers["retry-after"]) == (429, "1")
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    assert front.ask("x", authorization="Bearer ann")[0] == 200


def test_routes_of_one_replica_are_refused_with_the_way_to_them(front):
    """`/replicas/NAME/...` reaches exactly that replica."""
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters", "/metrics"):
        status, _, body = front.request("POST", path, b"{}")
        assert (status, "/replicas/NAME" in json.loads(body)["error"]["message"]) == (400, True)
    for name in ("r1", "r2"):
        status, headers, _ = front.request("POST", f"/replicas/{name}/v1/load_lora_adapter", b"{}")
        assert (status, headers["x-replica"]) == (200, name)
        assert front.replicas[name].got[-1][0] == "/v1/load_lora_adapter"
    for path in ("/replicas/r3/metrics", "/replicas/", "/replicas/r1%20/metrics", "/replicas"):
        status, _, body = front.request("GET", path)
        assert (path, status) == (path, 200 if path == "/replicas" else 404)


def test_a_front_that_leaves_fails_ready_and_goes_on(front):
    """And `/health` stays what it is."""
    front.haproxy.change_map({}, {LEAVING: "yes"})
    assert [front.request("GET", path)[0] for path in ("/ready", "/health")] == [503, 200]
    assert front.ask("x")[0] == 200
    front.haproxy.change_map({LEAVING: "yes"}, {})
    assert front.request("GET", "/ready")[0] == 200


def test_homes_that_haproxy_lost_are_told_anew(front):
    """It was started again, so it has none of those that are to be changed."""
    front.haproxy.ask(f"clear map {HOMES}")
    front.haproxy.change_map({"calm": "r1", "gentle": "r1"}, {"calm": "r2", "gentle": "r1"})
    assert {front.ask("calm") for _ in range(3)} == {(200, "r2")}
    assert {front.ask("gentle") for _ in range(3)} == {(200, "r1")}
    front.lines = {"calm": "r2", "gentle": "r1"}


def test_a_missing_or_old_haproxy_is_said_in_one_line(tmp_path):
    """What was found, what is needed, and how to get it."""
    old = tmp_path / "haproxy"
    old.write_text("#!/bin/sh\necho HAProxy version 2.6.12-1+deb12u2\n")
    old.chmod(0o755)
    with pytest.raises(UserError, match=r"is version 2\.6; HAProxy 2\.8 or later is needed"):
        haproxy.find_haproxy(str(old))
    with pytest.raises(UserError, match="no program 'nowhere'; install the extra `fleet`"):
        haproxy.find_haproxy("nowhere")
