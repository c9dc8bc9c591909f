"""HAProxy's configuration for a fleet's front. Pure: replicas and limits in, text out; `haproxy -c` accepts it.

A request's way: `model` is read from the body, its adapter's home is looked up in the map HOMES, and the home gets the
request while it has fewer than `home_bound` in flight; all else goes to the replica with the fewest. Nothing of a
request is changed, but for the header of a trace. HAProxy tries another replica when one cannot be reached, closes the
connection before it answers, or says 503. Once an answer has begun, it is never asked for again.

HOMES (a file that HAProxy reads at its start; later it is told over its socket):

    gentle r1           gentle's home
    gentle/0 r1         with several homes, a request draws one of DRAWS lines
    gentle/1 r3
    calm r2/only        only r2 can serve it, so nothing goes elsewhere, not even when r2 is full or down
    /leaving yes        `/ready` answers 503: this front is about to stop
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.api_errors import ApiError

HOMES, SOCKET = "homes.map", "haproxy.sock"
ONLY, LEAVING = "/only", "/leaving"
# Divisible by 1, 2, 3, 4 and 6: so many homes share an adapter's requests evenly.
DRAWS = 12

# A larger body is still served, but its `model` may be beyond what is read: it goes to the least busy replica. HAProxy
# clears a buffer of this size for each request; with ten times as much, that took more than a millisecond.
_BUFFER_BYTES = 128 << 10
_KEYS = "keys"
# W3C trace context: version, trace, span, sampled.
_TRACEPARENT = (
    "  http-request set-header traceparent 00-%[uuid,regsub(-,,g)]-%[uuid,regsub(-,,g),bytes(0,16)]-01 "
    "unless { req.hdr(traceparent) -m found }"
)
_ADMIN_ROUTES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters", "/metrics")

_NO_REPLICA = "no replica is ready; ask again in a moment"
# What HAProxy itself says, in the shape of every other error.
_ERRORS = (
    ApiError(400, "the request is not HTTP as this server accepts it"),
    ApiError(408, "the request did not arrive in time"),
    ApiError(500, "the front failed", retry_after_s=1),
    ApiError(502, "the replica ended while it answered; ask again", retry_after_s=1),
    ApiError(503, _NO_REPLICA, retry_after_s=5),
    ApiError(504, "the replica did not answer in time", retry_after_s=5),
)


@dataclass(frozen=True)
class Front:
    """Where the front listens and what it allows. metrics_port 0: no listener for metrics.

    home_bound: see the module. key_in_flight: per key over all replicas; 0 for no total. replica_connections: most
    connections to one replica. stop_s: how long running answers get when the front stops. traces: a request that comes
    without a `traceparent` header gets one, so that its replicas' spans are in one trace. listener: the file descriptor
    of a socket that listens already, instead of `host` and `port`: connections wait in it while HAProxy starts again.
    """

    host: str
    port: int
    home_bound: int
    key_in_flight: int = 0
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    replica_connections: int = 1000
    stop_s: float = 30.0
    traces: bool = False
    listener: int | None = None


def haproxy_config(front: Front, replicas: Mapping[str, str]) -> str:
    """The configuration for a front before `replicas`: name -> `host:port`."""
    return "\n".join(
        (
            *_global(front),
            *_defaults(),
            *_frontend(front, list(replicas)),
            *_metrics(front),
            *_tables(front),
            *_balanced(front, replicas),
            *_single(front, replicas),
            "",
        )
    )


def map_lines(name: str, homes: Sequence[str], only: bool) -> dict[str, str]:
    """The lines of HOMES for one adapter: key -> value."""
    mark = ONLY if only else ""
    lines = {name: f"{homes[0]}{mark}"}
    if len(homes) > 1:
        lines |= {f"{name}/{draw}": f"{homes[draw % len(homes)]}{mark}" for draw in range(DRAWS)}
    return lines


def _global(front: Front) -> list[str]:
    return [
        "global",
        # Connections are bounded by it: without it, a high limit of the system would make HAProxy reserve for them all.
        "  fd-hard-limit 32768",
        # Without it, a second front on this port would start, and the kernel would share the requests between them.
        "  noreuseport",
        f"  hard-stop-after {max(1, round(front.stop_s))}s",
        f"  stats socket unix@{SOCKET} mode 600 level admin",
        f"  tune.bufsize {_BUFFER_BYTES}",
    ]


def _defaults() -> list[str]:
    return [
        "defaults",
        "  mode http",
        # The body is read first: it names the model, and a slow client takes no place at a replica.
        "  option http-buffer-request",
        # A stream's chunks are sent at once, and a client that goes away ends its request at the replica.
        "  option http-no-delay",
        "  option abortonclose",
        "  timeout connect 2s",
        "  timeout check 5s",
        "  timeout client 10m",
        "  timeout server 10m",
        "  timeout queue 30s",
        "  timeout http-request 60s",
        "  timeout http-keep-alive 60s",
        "  retries 3",
        "  option redispatch 1",
        "  retry-on conn-failure empty-response 503",
        "  http-reuse always",
        *map(_own_error, _ERRORS),
    ]


def _frontend(front: Front, names: Sequence[str]) -> list[str]:
    host = f"[{front.host}]" if ":" in front.host else front.host
    leaving = ApiError(503, "the front is about to stop", retry_after_s=5)
    no_replica = ApiError(503, _NO_REPLICA, retry_after_s=5)
    one_only = ApiError(
        400,
        "this acts on one replica: ask for /replicas/NAME/... with a NAME of `python -m serve fleet status`; what is "
        "published, rolled back or removed in the store reaches all replicas",
    )
    unknown = ApiError(404, "there is no replica of that name", code="unknown_url")
    total = ApiError(
        429, f"this key has more than {front.key_in_flight} requests in flight on all replicas", retry_after_s=1
    )
    ok = "  http-request return status 200 content-type text/plain string ok if"
    limit = [
        # The key alone, as a replica reads it: neither the scheme's case nor blanks make it another one.
        f"  http-request track-sc1 req.fhdr(authorization),word(2,' \t'),sha2(256) table {_KEYS} if METH_POST",
        _refusal(total, f"METH_POST {{ sc1_conn_cur({_KEYS}) gt {front.key_in_flight} }}"),
    ]
    drawn = f"var(txn.model),concat(/,txn.draw),map({HOMES})"
    return [
        "frontend fleet",
        f"  bind {host}:{front.port}" if front.listener is None else f"  bind fd@{front.listener}",
        f"{ok} {{ path /health }}",
        _refusal(leaving, f"{{ path /ready }} {{ str({LEAVING}),map({HOMES}) -m found }}"),
        f"{ok} {{ path /ready }} {{ nbsrv(replicas) ge 1 }}",
        _refusal(no_replica, "{ path /ready }"),
        _refusal(one_only, f"{{ path {' '.join(_ADMIN_ROUTES)} }}"),
        "  http-request set-var(txn.replica) path,field(3,/) if { path_beg /replicas/ }",
        _refusal(unknown, f"{{ var(txn.replica) -m found }} !{{ var(txn.replica) -m str {' '.join(names)} }}"),
        r"  http-request replace-path /replicas/[^/]+(.*) \1 if { var(txn.replica) -m found }",
        *(limit if front.key_in_flight else []),
        *([_TRACEPARENT] if front.traces else []),
        # An adapter's home is the same for all its versions.
        "  http-request set-var(txn.model) req.body,json_query('$.model'),field(1,@) if METH_POST",
        f"  http-request set-var(txn.home) var(txn.model),map({HOMES}) if {{ var(txn.model) -m found }}",
        f"  http-request set-var(txn.draw) rand({DRAWS}) if {{ var(txn.home) -m found }}",
        f"  http-request set-var(txn.home) {drawn} if {{ var(txn.home) -m found }} {{ {drawn} -m found }}",
        "  http-request track-sc0 var(txn.model) table adapters if { var(txn.home) -m found }",
        f"  http-request set-var(txn.replica) var(txn.home),field(1,/) if {{ var(txn.home) -m end {ONLY} }}",
        "  use_backend replica-%[var(txn.replica)] if { var(txn.replica) -m found }",
        "  default_backend replicas",
    ]


def _metrics(front: Front) -> list[str]:
    if not front.metrics_port:
        return []
    host = f"[{front.metrics_host}]" if ":" in front.metrics_host else front.metrics_host
    return [
        "frontend metrics",
        f"  bind {host}:{front.metrics_port}",
        "  http-request use-service prometheus-exporter if { path /metrics }",
        "  http-request return status 404",
    ]


def _tables(front: Front) -> list[str]:
    """What HAProxy counts: per adapter, and per key, of which it keeps only a hash."""
    tables = [
        "backend adapters",
        "  stick-table type string len 64 size 100k expire 10m store conn_cur,http_req_rate(60s)",
    ]
    if front.key_in_flight:
        tables += [f"backend {_KEYS}", "  stick-table type binary len 32 size 100k expire 1h store conn_cur"]
    return tables


def _balanced(front: Front, replicas: Mapping[str, str]) -> list[str]:
    """All replicas. A home that is down is skipped, and one that is full too; then the fewest in flight decide."""
    return [
        "backend replicas",
        "  balance leastconn",
        *_checks(),
        "  http-response set-header x-replica %s",
        # A dead replica gets nothing from the first failed connection on. Not for bad answers: a request could cause
        # them. Idle connections are closed before the replica closes them.
        f"  default-server check inter 1s fall 1 rise 1 observe layer4 error-limit 1 on-error mark-down "
        f"maxconn {front.replica_connections} pool-purge-delay 2s",
        *(f"  server {name} {address}" for name, address in replicas.items()),
        *(
            f"  use-server {name} if {{ var(txn.home) -m str {name} }} "
            f"{{ srv_conn(replicas/{name}) lt {front.home_bound} }}"
            for name in replicas
        ),
    ]


def _checks() -> list[str]:
    # A replica without keys answers to this machine's own name only.
    return [
        "  option httpchk",
        "  http-check send meth GET uri /ready ver HTTP/1.1 hdr Host localhost",
        "  http-check expect status 200",
    ]


def _single(front: Front, replicas: Mapping[str, str]) -> list[str]:
    """One replica and no other: its admin routes, and adapters that only it can serve."""
    return [
        line
        for name, address in replicas.items()
        for line in (
            f"backend replica-{name}",
            "  http-response set-header x-replica %s",
            f"  server {name} {address} track replicas/{name} maxconn {front.replica_connections} pool-purge-delay 2s",
        )
    ]


def _refusal(error: ApiError, condition: str) -> str:
    return f"  http-request return status {error.status} {_reply(error)} if {condition}"


def _own_error(error: ApiError) -> str:
    return f"  http-error status {error.status} {_reply(error)}"


def _reply(error: ApiError) -> str:
    # JSON's escape for the one character that HAProxy's quotes end at.
    body = error.body().decode().replace("'", r"\u0027")
    retry = f" hdr Retry-After {error.retry_after_s}" if error.retry_after_s else ""
    return f"content-type application/json string '{body}'{retry}"
