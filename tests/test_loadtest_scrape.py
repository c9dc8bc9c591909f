"""The server's own figures, read from `/metrics` as servers write it, and from servers that do not do so well."""

import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from counsel.files import read_jsonl
from loadtest.scrape import Scraper, over_engines, read_metrics, server_figures
from tests.waiting import until

PAGE = (
    "# HELP vllm:num_requests_running Number of requests.\n"
    'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 2.0\n'
    'vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:kv_cache_usage_perc{engine="1"} 0.7\n'
    'counsel_adapter_events_total{adapter="a@1",event="load"} 4.0\n'
    'counsel_adapter_events_total{adapter="a@1",event="evict"} 1.0\n'
    'counsel_adapter_events_created{adapter="a@1",event="load"} 1.7e+09\nother_total 9\n'
)


def figures(*pages: str) -> list[dict[str, float]]:
    return over_engines([read_metrics(page) for page in pages])


def test_series_are_added_up_and_shares_averaged():
    """Three and two running are five; half of one cache and seven tenths of another are six tenths of both."""
    assert figures(PAGE) == [{"running": 5.0, "kv_used": pytest.approx(0.6), "loads": 0.0, "unloads": 0.0}]


def tokens(*by_engine: float) -> str:
    return "".join(f'vllm:generation_tokens_total{{engine="{n}"}} {value}\n' for n, value in enumerate(by_engine))


@pytest.mark.parametrize(
    ("pages", "grown"),
    [
        ([tokens(100), tokens(150)], [0, 50]),
        ([tokens(100), tokens(150), tokens(10), tokens(30)], [0, 50, 60, 80]),  # set back to 0 in between
        ([tokens(100, 100), tokens(120, 130), tokens(5, 140)], [0, 50, 65]),  # one of two engines was
        ([tokens(100), "", tokens(130)], [0, None, 30]),  # a page without it
        ([tokens(100), tokens(100, 7)], [0, 7]),  # an engine that came later
        ([tokens(100), tokens(float("nan")), tokens(110)], [0, None, 10]),
    ],
)
def test_counters_grow_through_restarts(pages, grown):
    """The growth since the first page, by hand: never less than before."""
    assert [found.get("tokens") for found in figures(*pages)] == grown


def test_what_is_no_number_says_nothing():
    """NaN and infinities of an engine that has not begun are left out, and the others stay."""
    page = (
        'vllm:kv_cache_usage_perc{engine="0"} NaN\nvllm:kv_cache_usage_perc{engine="1"} 0.4\n'
        "vllm:num_requests_waiting +Inf\n"
    )

    assert figures(page) == [{"kv_used": 0.4}]


def test_gauges_peak_and_counters_grow():
    """Running was 1 then 3; four loads came on top of the ten before the run."""
    found = server_figures([{"running": 1, "loads": 10}, {"running": 3, "loads": 14}], "note")

    assert found == {"samples": 2, "note": "note", "running": {"mean": 2.0, "max": 3}, "loads": 4}


class Pages(BaseHTTPRequestHandler):
    """Answers with one page after the other; None: a page that ends before it should."""

    left: Sequence[str | None] = ()
    asked = 0

    def do_GET(self) -> None:
        page = Pages.left[min(Pages.asked, len(Pages.left) - 1)]
        body = (page or PAGE[:20]).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body) + (1000 if page is None else 0)))
        self.end_headers()
        self.wfile.write(body)
        Pages.asked += 1

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Pages) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1"
        listening.shutdown()


def test_a_page_that_is_cut_short_is_a_gap(tmp_path: Path, server, monkeypatch):
    """The second of four is cut short, the third is full of NaN: the first and the last are there, and it is said."""
    monkeypatch.setattr("loadtest.scrape._EVERY_S", 0.0)
    monkeypatch.setattr(Pages, "asked", 0)
    monkeypatch.setattr(Pages, "left", [tokens(100), None, tokens(float("nan")), tokens(130)])
    with Scraper(server) as scraper:
        until(lambda: Pages.asked > 4)
    scraper.write(tmp_path / "server.jsonl", 0.0)

    found = [line["tokens"] for line in read_jsonl(tmp_path / "server.jsonl") if "tokens" in line]
    assert found[:2] == [0.0, 30.0]
    assert "/metrics" in scraper.note
