"""The server's own metrics, read from `/metrics` as servers write it, and from servers that do not do so well."""

import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from counsel.files import read_jsonl
from loadtest.scrape import Scraper, merge_engines, read_metrics, server_metrics
from tests.waiting import until

PAGE = (
    "# HELP vllm:num_requests_running Number of requests.\n"
    'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 2.0\n'
    'vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:kv_cache_usage_perc{engine="1"} 0.7\n'
    'counsel_adapter_events_total{adapter="a@1",event="load"} 4.0\n'
    'counsel_adapter_events_total{adapter="a@1",event="evict"} 1.0\n'
    'counsel_adapter_events_created{adapter="a@1",event="load"} 1.7e+09\nother_total 9\n'
)


def samples(*pages: str) -> list[dict[str, float]]:
    return merge_engines([read_metrics(page) for page in pages])


def test_gauges_are_summed_and_shares_averaged():
    """Three and two running are five. Half of one cache and seven tenths of another are six tenths of both."""
    assert samples(PAGE) == [{"running": 5.0, "kv_used": pytest.approx(0.6), "loads": 0.0, "unloads": 0.0}]


def tokens(*by_engine: float) -> str:
    return "".join(f'vllm:generation_tokens_total{{engine="{n}"}} {value}\n' for n, value in enumerate(by_engine))


@pytest.mark.parametrize(
    ("pages", "grown"),
    [
        ([tokens(100), tokens(150)], [0, 50]),
        ([tokens(100), tokens(150), tokens(10), tokens(30)], [0, 50, 60, 80]),  # reset to 0 in between
        ([tokens(100, 100), tokens(120, 130), tokens(5, 140)], [0, 50, 65]),  # one of two engines was reset
        ([tokens(100), "", tokens(130)], [0, None, 30]),  # a page without the series
        ([tokens(100), tokens(100, 7)], [0, 7]),  # an engine that appeared later
        ([tokens(100), tokens(float("nan")), tokens(110)], [0, None, 10]),
    ],
)
def test_counters_grow_through_restarts(pages, grown):
    """The growth since the first page, worked out by hand; it never falls."""
    assert [found.get("tokens") for found in samples(*pages)] == grown


def test_values_that_are_not_finite_are_left_out():
    """NaN and infinity come from an engine that has not started; the values of the others stay."""
    page = (
        'vllm:kv_cache_usage_perc{engine="0"} NaN\nvllm:kv_cache_usage_perc{engine="1"} 0.4\n'
        "vllm:num_requests_waiting +Inf\n"
    )

    assert samples(page) == [{"kv_used": 0.4}]


def test_labels_may_hold_any_character():
    """A quote and a brace in an adapter's name do not hide its event."""
    page = 'counsel_adapter_events_total{adapter="a\\"} b",event="load"} %s\n'

    assert [sample["loads"] for sample in samples(page % 4, page % 7)] == [0, 3]


def test_a_page_that_ends_within_a_line_is_refused():
    """Half a value is not a value: the whole page is left out, like one that never came."""
    with pytest.raises(ValueError, match="could not convert"):
        read_metrics(tokens(100) + 'vllm:generation_tokens_total{engine="1')


def test_gauges_have_a_peak_and_counters_a_growth():
    """Running was 1, then 3. Four adapters were loaded, after the ten before the run."""
    metrics = server_metrics([{"running": 1, "loads": 10}, {"running": 3, "loads": 14}], "note")

    assert metrics == {"samples": 2, "note": "note", "running": {"mean": 2.0, "max": 3}, "loads": 4}


class Pages(BaseHTTPRequestHandler):
    """Answers with one page after the other. None is a page that ends early."""

    pages: Sequence[str | None] = ()
    requests = 0

    def do_GET(self) -> None:
        page = Pages.pages[min(Pages.requests, len(Pages.pages) - 1)]
        body = (page or PAGE[:20]).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body) + (1000 if page is None else 0)))
        self.end_headers()
        self.wfile.write(body)
        Pages.requests += 1

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Pages) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1"
        listening.shutdown()


def test_a_page_that_is_cut_short_is_a_gap(tmp_path: Path, server, monkeypatch):
    """The second of four pages is cut short, the third is NaN: the first and last are kept, and a note says why."""
    monkeypatch.setattr("loadtest.scrape._INTERVAL_S", 0.0)
    monkeypatch.setattr(Pages, "requests", 0)
    monkeypatch.setattr(Pages, "pages", [tokens(100), None, tokens(float("nan")), tokens(130)])
    with Scraper(server) as scraper:
        until(lambda: Pages.requests > 4)
    scraper.write(tmp_path / "server.jsonl", 0.0)

    found = [line["tokens"] for line in read_jsonl(tmp_path / "server.jsonl") if "tokens" in line]
    assert found[:2] == [0.0, 30.0]
    assert "/metrics" in scraper.note
