"""OpenTelemetry traces of requests: vLLM's own spans, sent to a collector."""

import importlib
import urllib.parse

from counsel.errors import UserError
from serve.plan_builder import PlanBuilder

# What vLLM imports for them.
_NEEDED = (
    "opentelemetry.sdk.trace",
    "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.semconv_ai",
)


def add_traces(builder: PlanBuilder, endpoint: str) -> None:
    """Send one span per request to `endpoint`: OTLP over HTTP if it has a path, else over gRPC.

    Raises UserError for what is not a URL, and where the packages are missing.
    """
    if not endpoint:
        return
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"otlp_traces_endpoint is {endpoint!r}; it must be like http://127.0.0.1:4317 (gRPC) or "
            "http://127.0.0.1:4318/v1/traces (HTTP)"
        )
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"otlp_traces_endpoint is {endpoint!r}, but {error.name} is not installed; pip install "
                "opentelemetry-sdk opentelemetry-exporter-otlp opentelemetry-semantic-conventions-ai, or leave it out"
            ) from error
    builder.flag("--otlp-traces-endpoint", endpoint, why="one span per request, in the trace of its traceparent header")
    protocol, why = ("http/protobuf", "has a path") if parts.path.strip("/") else ("grpc", "has no path")
    builder.variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol, f"the endpoint {why}")
    builder.variable("OTEL_SERVICE_NAME", "counsel-serve", "the name in the traces")
