"""A fleet of real gateways, pools and store watchers on engines that only wait, behind a real HAProxy."""

import concurrent.futures
import contextlib
import http.client
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.stand_in import COMMAND, put_in_store
from counsel import store as adapter_store
from counsel.errors import UserError
from counsel.files import write_json, write_jsonl
from eval.batch import batch
from eval.config import BatchConfig
from eval.samples import read_rows
from serve.config import ServeConfig
from serve.fleet import haproxy
from serve.fleet.commands import FleetFolder, FrontConfig, show_config, show_status
from serve.fleet.config import FleetConfig
from serve.fleet.fleet import Fleet
from serve.server import reserve_port
from tests.conftest import tiny_config
from tests.json_handler import JsonHandler
from tests.waiting import HANG_S, is_alive, until

try:
    haproxy.find_haproxy("")
except UserError as absent:
    pytest.skip(str(absent), allow_module_level=True)

CHAT = "/v1/chat/completions"
V1, V2 = "0" * 11 + "1", "0" * 11 + "2"


class Answer:
    """One request's status, the replica that answered, the body, and whether it came whole; `begun`: its head came."""

    def __init__(
        self, fleet: Fleet, model: str, path: str = CHAT, text: str = "hi", stream: bool = False,
        begun: threading.Event | None = None,
    ) -> None:  # fmt: skip
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}
        self.whole = True
        self.status, self.replica, self.body = 0, "", b""
        connection = http.client.HTTPConnection("127.0.0.1", fleet.config.port, timeout=HANG_S)
        with contextlib.closing(connection):
            try:
                connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
                reply = connection.getresponse()
                if begun is not None:
                    begun.set()
                self.status, self.replica = reply.status, reply.getheader("x-replica") or ""
                self.body = reply.read()
            except http.client.IncompleteRead as cut:
                self.body, self.whole = cut.partial, False
            except (OSError, http.client.HTTPException):
                self.whole = False

    @property
    def good(self) -> bool:
        return self.whole and self.status == 200 and (b"data: " not in self.body or self.body.endswith(b"[DONE]\n\n"))

    @property
    def model(self) -> str:
        return str(json.loads(self.body)["model"])


def fleet_config(folder: Path, **changes: Any) -> FleetConfig:
    small: dict[str, Any] = {"port": 0, "store": str(folder / "store"), "logs": str(folder / "logs"), "max_loras": 2,
                             "max_cpu_loras": 4, "leave_s": 0.5, "drain_s": HANG_S}  # fmt: skip
    return FleetConfig(**{**small, **changes})


def turning(fleet: Fleet, promise: Callable[[], bool]) -> None:
    """Let the fleet work until the promise is kept."""

    def kept() -> bool:
        fleet.turn()
        return promise()

    until(kept)


def up(fleet: Fleet) -> int:
    with contextlib.suppress(OSError):
        return sum(state.status == "UP" for state in fleet.haproxy.servers().values())
    return 0


def status(fleet: Fleet) -> dict[str, Any]:
    return dict(show_status(FleetFolder(fleet.config.port, str(fleet.folder.parent))).document)


def settled_homes(fleet: Fleet) -> dict[str, list[str]]:
    """Each adapter's one home, once none is elsewhere for the time being, as after a restart."""

    def homes() -> dict[str, list[str]]:
        return dict(status(fleet)["homes"])

    turning(fleet, lambda: sorted(home for at in homes().values() for home in at) == ["r1"] * 4 + ["r2"] * 4)
    return homes()


def loaded_by(fleet: Fleet) -> dict[str, set[str]]:
    return {
        replica.name: {row["id"] for row in replica.adapters or () if row["state"] == "loaded"}
        for replica in fleet.replicas
    }


def loads(fleet: Fleet) -> int:
    """Adapter loads of all replicas since they started."""
    n = 0.0
    for replica in fleet.replicas:
        connection = http.client.HTTPConnection(replica.private, timeout=HANG_S)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        n += sum(map(float, re.findall(r'counsel_adapter_events_total\{[^}]*event="load"\} ([0-9.e+]+)', text)))
    return int(n)


@contextlib.contextmanager
def started(config: FleetConfig, n_up: int) -> Iterator[Fleet]:
    with Fleet(config, COMMAND) as fleet:
        turning(fleet, lambda: up(fleet) == n_up)
        yield fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two replicas with four places each, and eight adapters."""
    folder = tmp_path_factory.mktemp("fleet")
    for number in range(8):
        put_in_store(folder / "store", f"ad{number}", V1)
    with started(fleet_config(folder, replicas=2), 2) as running:
        turning(running, lambda: sum(map(len, loaded_by(running).values())) == 8)
        yield running


def test_each_adapter_is_loaded_once_where_its_requests_go(fleet, capsys):
    """Eight adapters in two times four places, each loaded before the first request: 80 requests load none again."""
    homes = settled_homes(fleet)
    assert sorted(map(len, homes.values())) == [1] * 8

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: Answer(fleet, f"ad{number % 8}"), range(80)))

    assert all(answer.good for answer in answers)
    assert all(answer.replica == homes[f"ad{number % 8}"][0] for number, answer in enumerate(answers))
    assert loads(fleet) == 8
    shown = capsys.readouterr().out
    assert re.search(r"r1 +http://127.0.0.1:\d+ +up +0 +\d+ +4 +4 +0", shown)


def test_publish_rollback_and_remove_reach_every_replica(fleet):
    """Without a word to any of them: the store is what they follow."""

    def answered() -> set[str]:
        every = [Answer(fleet, "fresh", f"/replicas/{name}{CHAT}") for name in ("r1", "r2")]
        return {answer.model if answer.good else str(answer.status) for answer in every}

    store = Path(fleet.config.store)
    put_in_store(store, "fresh", V1)
    turning(fleet, lambda: answered() == {f"fresh@{V1}"} and "fresh" in status(fleet)["homes"])
    put_in_store(store, "fresh", V2)
    turning(fleet, lambda: answered() == {f"fresh@{V2}"})
    adapter_store.rollback(store, "fresh")
    turning(fleet, lambda: answered() == {f"fresh@{V1}"})
    adapter_store.remove(store, "fresh")
    turning(fleet, lambda: answered() == {"404"} and "fresh" not in status(fleet)["homes"])


def test_a_rolling_restart_under_load_loses_nothing(fleet, tmp_path):
    """Every replica is replaced while streams and plain requests go on; a stream that was running ends whole."""
    before = {replica.name: replica.kept.pid for replica in fleet.replicas}
    stop, failed, n = threading.Event(), [], [0]

    def client(number: int) -> None:
        while not stop.is_set():
            answer = Answer(fleet, f"ad{number}", stream=number % 2 == 0)
            n[0] += 1
            if not answer.good:
                failed.append((answer.status, answer.body))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        try:
            running = [
                pool.submit(Answer, fleet, name, text=f"hold {tmp_path / 'go'}", stream=True) for name in ("ad0", "ad1")
            ]
            until(lambda: sum(state.in_flight for state in fleet.haproxy.servers().values()) == 2)
            clients = [pool.submit(client, number) for number in range(4)]
            fleet.restart_all()
            # A replica that leaves waits for its stream, so the stream ends only now.
            turning(fleet, lambda: up(fleet) < 2)
            (tmp_path / "go").touch()
            assert all(future.result().good for future in running)
            turning(fleet, lambda: up(fleet) == 2 and all(r.kept.restarts == 1 and r.kept.pid for r in fleet.replicas))
        finally:
            (tmp_path / "go").touch()
            stop.set()
        for future in clients:
            future.result()

    assert all(replica.kept.pid != before[replica.name] for replica in fleet.replicas)
    assert n[0] > 0
    assert failed == []


def test_a_killed_replica_costs_only_the_streams_that_had_begun(fleet, tmp_path):
    """What it had not begun to answer is answered by the other one; it is started again with the homes that it had."""
    homes = settled_homes(fleet)
    victim = next(replica for replica in fleet.replicas if replica.name == homes["ad0"][0])
    other = next(replica.name for replica in fleet.replicas if replica is not victim)
    hold, restarts, begun = f"hold {tmp_path / 'go'}", victim.kept.restarts, threading.Event()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        try:
            plain = [pool.submit(Answer, fleet, "ad0", text=hold) for _ in range(4)]
            stream = pool.submit(Answer, fleet, "ad0", text=hold, stream=True, begun=begun)
            until(lambda: fleet.haproxy.servers()[victim.name].in_flight == 5)
            begun.wait(HANG_S)
            os.kill(victim.kept.pid, signal.SIGKILL)
            until(lambda: fleet.haproxy.servers()[other].in_flight == 4)
            assert not stream.result().whole
        finally:
            (tmp_path / "go").touch()
        assert [(answer.result().good, answer.result().replica) for answer in plain] == [(True, other)] * 4

    assert Answer(fleet, "ad0").replica == other
    turning(fleet, lambda: up(fleet) == 2 and victim.kept.restarts == restarts + 1)
    turning(fleet, lambda: status(fleet)["homes"] == homes)
    assert Answer(fleet, "ad0").replica == victim.name


def test_a_batch_goes_on_when_a_replica_is_killed(fleet, tmp_path):
    """Killed while it works on half of the requests: each has one answer, of its own model, and none has failed."""
    ids = {f"{text} {number}": f"ad{number % 8}" for number in range(16) for text in ("held", "quick")}
    requests = [
        {"custom_id": name, "method": "POST", "url": CHAT, "body": {"model": model, "messages": [
            {"role": "user", "content": f"hold {tmp_path / 'go'}" if name.startswith("held") else "hi"}]}}
        for name, model in ids.items()
    ]  # fmt: skip
    write_jsonl(tmp_path / "in.jsonl", requests)
    config = BatchConfig(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), url=fleet.base_url, concurrency=32)
    homes = settled_homes(fleet)
    victim = next(replica for replica in fleet.replicas if replica.name == homes["ad0"][0])
    other = next(replica.name for replica in fleet.replicas if replica is not victim)
    restarts = victim.kept.restarts

    def in_flight() -> dict[str, int]:
        return {name: state.in_flight for name, state in fleet.haproxy.servers().items()}

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            answering = pool.submit(batch, config)
            # All but the held ones are answered.
            until(lambda: len(read_rows(tmp_path / "out.jsonl")) == 16 and sum(in_flight().values()) == 16)
            assert in_flight()[victim.name] == 8
            os.kill(victim.kept.pid, signal.SIGKILL)
            until(lambda: in_flight()[other] == 16)
        finally:
            (tmp_path / "go").touch()
        document = answering.result().document

    rows = read_rows(tmp_path / "out.jsonl")
    assert (document["requests"], document["failed"]) == (32, 0)
    assert {row["custom_id"]: row["response"]["body"]["model"] for row in rows} == {
        name: f"{model}@{V1}" for name, model in ids.items()
    }
    assert len(rows) == 32
    turning(fleet, lambda: up(fleet) == 2 and victim.kept.restarts == restarts + 1)
    turning(fleet, lambda: status(fleet)["homes"] == homes)


def test_a_killed_front_is_started_again_with_its_homes(fleet):
    """The map that it reads is the one it was told. Who connects meanwhile waits for it."""
    homes = settled_homes(fleet)
    restarts = fleet.front.restarts
    os.kill(fleet.front.pid, signal.SIGKILL)
    fleet.front.process.wait()
    early = http.client.HTTPConnection("127.0.0.1", fleet.config.port, timeout=HANG_S)
    with contextlib.closing(early):
        early.connect()
        turning(fleet, lambda: fleet.front.restarts == restarts + 1 and up(fleet) == 2)
        early.request("GET", "/ready")
        assert early.getresponse().status == 200
    assert {name: [Answer(fleet, name).replica] for name in homes} == homes


@contextlib.contextmanager
def elsewhere(
    folder: Path, name: str, host: str, metrics_port: int, **options: Any
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that the fleet did not start: its URL and its process."""
    with reserve_port(host, 0) as reserved:
        port = reserved.getsockname()[1]
        config = ServeConfig(
            host=host,
            port=port,
            metrics_host=host,
            metrics_port=metrics_port,
            store=str(folder / "store"),
            logs=str(folder / "logs"),
            drain_s=1.0,
            leave_s=0.0,
            **options,
        )
        write_json(folder / f"{name}.json", asdict(config))
        process = subprocess.Popen([*COMMAND, "--config", str(folder / f"{name}.json")])
        try:
            yield f"http://{host}:{port}", process
        finally:
            process.kill()
            process.wait()


def test_a_replica_that_cannot_serve_a_version_says_so_and_gets_none_of_its_requests(tmp_path, capsys):
    """Not by load, not when the one that can is full or gone; its other adapters stay."""
    store = tmp_path / "store"
    put_in_store(store, "small", V1)
    put_in_store(store, "large", V1)
    with contextlib.ExitStack() as undo:
        port = free_on("127.0.0.1", "127.0.0.2", "127.0.0.3")
        urls, processes = zip(
            undo.enter_context(elsewhere(tmp_path, "a", "127.0.0.2", port, max_lora_rank=16)),
            undo.enter_context(elsewhere(tmp_path, "b", "127.0.0.3", port, max_lora_rank=64)),
            strict=True,
        )
        config = fleet_config(tmp_path, replica_urls=urls, metrics_port=port, home_in_flight=1)
        fleet = undo.enter_context(started(config, 2))
        put_in_store(store, "large", V2, rank=64)
        turning(fleet, lambda: bool(status(fleet)["refused"]))
        turning(fleet, lambda: status(fleet)["homes"]["large"] == ["r2"])

        (refused,) = status(fleet)["refused"]
        assert (refused["replica"], refused["adapter"]) == ("r1", f"large@{V2}")
        assert "rank 64" in refused["reason"]
        assert f"r1 does not serve large@{V2}: its rank 64 is above" in capsys.readouterr().out
        turning(fleet, lambda: Answer(fleet, "large").model == f"large@{V2}")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: Answer(fleet, "large"), range(40)))
        assert {(answer.status, answer.replica, answer.model) for answer in answers} == {(200, "r2", f"large@{V2}")}

        processes[1].kill()
        until(lambda: up(fleet) == 1)
        assert Answer(fleet, "large").status == 503
        assert Answer(fleet, "small").replica == "r1"


def free_on(*hosts: str) -> int:
    """A port that is free on each address."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(UserError):
            port = held.enter_context(reserve_port(hosts[0], 0)).getsockname()[1]
            for host in hosts[1:]:
                held.enter_context(reserve_port(host, port))
            return int(port)


PATIENT = (
    "import sys; import serve.fleet.fleet as fleet; from benchmarks.stand_in import COMMAND\n"
    "fleet.Fleet.__init__.__defaults__ = (COMMAND,)\n"
    "from serve.__main__ import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.parametrize(("number", "exit_status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_everything_ends_with_the_command(tmp_path, number, exit_status):
    """Also where a shell started it in the background, with Ctrl-C ignored; a killed one leaves nothing behind."""
    words = [
        "fleet",
        "--replicas",
        "1",
        "--port",
        "0",
        "--store",
        str(tmp_path / "store"),
        "--logs",
        str(tmp_path / "logs"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT, *words, "--leave-s", "0", "--drain-s", "600"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    port = re.search(r"http://127.0.0.1:(\d+)/v1", process.stderr.readline())[1]
    folder = FleetFolder(int(port), str(tmp_path / "logs"))

    def is_up() -> bool:
        with contextlib.suppress(UserError):
            return all(replica["up"] for replica in show_status(folder).document["replicas"].values())
        assert process.poll() is None, process.stderr.read()
        return False

    until(is_up)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == exit_status
    until(lambda: not any(map(is_alive, children)))
    if exit_status == 0:
        assert json.loads(out.splitlines()[-1])["replicas"] == 1
    with pytest.raises(UserError, match="no fleet runs"):
        show_status(folder)


def test_a_replica_that_never_starts_ends_the_command_with_its_reason(tmp_path):
    """One line, with the log; nothing stays."""
    fails = (sys.executable, "-c", "print('error: no weights'); raise SystemExit(1)")
    fleet = Fleet(fleet_config(tmp_path, replicas=2), fails)
    with pytest.raises(UserError, match=r"r1 did not start: no weights \(log: "), fleet:
        turning(fleet, lambda: False)
    assert fleet.front.pid is None


def test_what_a_fleet_refuses(tmp_path):
    """An open door, no replica, an address that is not one, a public port without keys."""
    with pytest.raises(UserError, match="can be reached by other machines, but no keys are set"):
        Fleet(fleet_config(tmp_path, host="0.0.0.0"))
    with pytest.raises(UserError, match="needs at least one replica"):
        fleet_config(tmp_path, replicas=0)
    for url in (
        "10.0.0.5:8000",
        "https://10.0.0.5:8000",
        "http://10.0.0.5",
        "http://10.0.0.5:x",
        "http://10.0.0.5:8000/a",
    ):
        with pytest.raises(UserError, match=r"each must be like http://10\.0\.0\.5:8000"):
            fleet_config(tmp_path, replica_urls=(url,))
    for host in ("0.0.0.0", "8.8.8.8", "example.com", "::"):
        with pytest.raises(UserError, match="no key is needed there"):
            fleet_config(tmp_path, metrics_host=host)
    assert [fleet_config(tmp_path, metrics_host=host).metrics_host for host in ("10.0.0.5", "::1", "localhost")]


def test_the_configuration_for_ones_own_front_is_complete(tmp_path, capsys):
    """With its map of homes; HAProxy accepts it where it lies."""
    config = FrontConfig(replica_urls=("http://10.0.0.5:8000",), output=str(tmp_path / "own" / "haproxy.cfg"))
    assert show_config(config).document["config"] == config.output
    haproxy.refuse_bad_config(haproxy.find_haproxy(""), tmp_path / "own", "haproxy.cfg")
    show_config(FrontConfig(replica_urls=("http://10.0.0.5:8000/v1",)))
    assert capsys.readouterr().out == (tmp_path / "own" / "haproxy.cfg").read_text()


class Collector(JsonHandler):
    """An OpenTelemetry collector over HTTP: keeps the spans that it is sent."""

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in sent.resource_spans:
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.reply(200, {})


@pytest.fixture
def collector() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.spans = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_two_real_servers_serve_as_one(tiny_model, tmp_path, capsys, collector):
    """vLLM on a tiny model: adapters are at home where they were preloaded, answer exactly, and leave a trace each."""
    from tests.tiny import tiny_adapter

    store = tmp_path / "store"
    for seed, name in enumerate(("calm", "gentle")):
        adapter_store.publish(store, name, tiny_adapter(tiny_model.path, tmp_path / name, seed=seed), tiny_model)
    tiny = {**asdict(tiny_config(tmp_path, tiny_model.path)), "replicas": 2, "allowed_origins": ()}
    tiny["otlp_traces_endpoint"] = f"http://127.0.0.1:{collector.server_address[1]}/v1/traces"
    with Fleet(FleetConfig(**tiny)) as fleet:
        turning(fleet, lambda: up(fleet) == 2 and sum(map(len, loaded_by(fleet).values())) == 2)
        homes = status(fleet)["homes"]
        assert sorted(homes.values()) == [["r1"], ["r2"]]
        for name in ("calm", "gentle"):
            answer = Answer(fleet, name)
            assert answer.good, answer.body
            assert [answer.replica] == homes[name]
            assert answer.model == adapter_store.find(store, name).id

        def requests() -> set[bytes]:
            """The traces of the requests that came through the front; what a replica asks itself has no parent."""
            return {span.trace_id for span in collector.spans if span.name == "llm_request" and span.parent_span_id}

        until(lambda: len(requests()) == 2)
