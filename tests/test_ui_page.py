"""The chat page in headless Chromium, against the real server: answers, choices, votes, failures, and its promises.

Skipped where Playwright or Chromium is missing (Debian: apt install chromium). Nothing here waits for a time: streams
are held by tests/holding_proxy.py at an event that the test names.
"""

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from counsel import store as adapter_store
from serve.api_errors import ApiError
from tests.conftest import Served
from tests.holding_proxy import Canned, HoldingProxy, proxied
from tests.tiny import tiny_adapter
from tests.waiting import HANG_S, until

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
expect = playwright.expect

# Greedy and short: the tiny model's own answers, the same each time.
SETTINGS = {"temperature": 0, "max_completion_tokens": 12}
QUESTION = "what can help me sleep"
PHONE = {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # Everything runs as root in a container, where Chromium's sandbox cannot.
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        expect.set_options(timeout=HANG_S * 1000)
        yield chromium
        chromium.close()


@pytest.fixture
def proxy(server: Served) -> Iterator[HoldingProxy]:
    with proxied(server.base_url) as running:
        yield running


@pytest.fixture
def visit(browser, server: Served, proxy: HoldingProxy):
    """Open the page with the user's key typed in. Afterwards: no request went elsewhere, no key was in an address."""
    requests: list[str] = []
    errors: list[str] = []
    contexts = []

    def open_page(*, key: str = server.user_key, script: str = "", **options: object):
        context = browser.new_context(viewport={"width": 1100, "height": 800}, **options)
        context.set_default_timeout(HANG_S * 1000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        first_visit = "localStorage.getItem('counsel.settings') === null"
        context.add_init_script(
            f"if ({first_visit}) localStorage.setItem('counsel.settings', '{json.dumps(SETTINGS)}')"
        )
        if script:
            context.add_init_script(script)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: "Content Security" in message.text and errors.append(message.text))
        page.goto(proxy.url + "/ui")
        if key:
            page.click("#open-settings")
            page.fill("#key", key)
            page.press("#key", "Enter")
            expect(page.locator("#model option").first).to_be_attached()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert [url for url in requests if not url.startswith((proxy.url, "data:", f"blob:{proxy.url}"))] == []
    assert [url for url in requests if server.user_key in url] == []


def ask(page, text: str = QUESTION) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def answers(page):
    return page.locator(".answer .text")


def current(server: Served, name: str) -> str:
    return server.client().models.retrieve(name).model_dump()["root"]


def test_an_answer_streams_and_can_be_stopped_with_the_keyboard(visit, proxy):
    """Its first words are shown while the rest is held; Escape hangs up and keeps them; the next question works."""
    page = visit()
    proxy.hold_after = 2
    # The focus is back on what opened the settings; the message field is a few stops away.
    for _ in range(10):
        if page.evaluate("document.activeElement.id") == "question":
            break
        page.keyboard.press("Tab")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    expect(answers(page)).not_to_be_empty()
    first = answers(page).text_content()
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#status")).to_have_text("Waiting for the answer.")

    page.keyboard.press("Escape")
    expect(page.get_by_text("Not the whole answer.")).to_be_visible()
    until(proxy.hung_up.is_set)
    proxy.release()
    assert answers(page).text_content() == first

    page.keyboard.type("and then")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(2)
    expect(page.locator("#send")).to_be_visible()
    expect(answers(page).last).not_to_be_empty()
    assert [turn["content"] for turn in proxy.chats[-1]["messages"]] == [QUESTION, first, "and then"]


def test_a_published_adapter_appears_and_a_removed_one_is_told(visit, proxy, server, tmp_path):
    """Without a reload. An answer names its exact version; the retry goes to the model that is chosen then."""
    page = visit()
    picker = page.locator("#model")
    picker.select_option("gentle")
    manifest = server.publish("fresh", tiny_adapter(server.base.path, tmp_path / "fresh", seed=5))
    try:
        expect(picker.locator(f"option[value='{manifest.id}']")).to_be_attached()
        expect(picker).to_have_value("gentle")
        picker.select_option("fresh")
        ask(page)
        expect(page.locator(".who")).to_have_text(manifest.id)
        expect(page.locator("#send")).to_be_visible()
    finally:
        adapter_store.remove(server.store, "fresh")
    expect(picker.locator("option", has_text="fresh (not served any more)")).to_be_attached()
    ask(page, "still there")
    expect(page.locator("#problem")).to_contain_text("not served any more; choose another")
    expect(page.locator("#question")).to_have_value("still there")
    picker.select_option("calm")
    page.click("#problem button")
    expect(page.locator(".who").last).to_have_text(current(server, "calm"))
    expect(page.locator("#question")).to_have_value("")


@pytest.mark.parametrize("drawn", [0, 1])
@pytest.mark.parametrize("better", ["first", "second"])
def test_two_models_side_by_side_are_blind_until_the_choice(visit, proxy, server, drawn, better):
    """In either drawn order no name is shown; the vote says what was where; the better answer goes on."""
    # The draw is one random byte; the ids of conversations are longer.
    real = "const real = crypto.getRandomValues.bind(crypto);"
    draw = f"{real} crypto.getRandomValues = (array) => array.length === 1 ? array.fill({drawn}) : real(array);"
    page = visit(script=draw)
    page.locator("#model").select_option("gentle")
    page.click("#beside")
    page.locator("#other").select_option("calm")
    ask(page)
    expect(page.locator(".choice")).to_be_visible()
    assert not re.search("gentle|calm", page.locator("#turns").inner_html())
    ask(page, "too early")
    expect(page.locator("#problem")).to_contain_text("Choose one of the two answers first")
    shown = answers(page).all_text_contents()

    page.locator(".choice").get_by_role("button", name="Answer 1" if better == "first" else "Answer 2").click()
    page.check("text=warmth")
    page.check("#consent")
    page.fill("#comment", "kinder")
    page.click("#vote .primary")
    expect(page.get_by_text(f"Your vote: Answer {1 if better == 'first' else 2} is better.")).to_be_visible()
    models = [current(server, name) for name in (("calm", "gentle"), ("gentle", "calm"))[drawn]]
    assert page.locator(".who").all_text_contents() == [f"Answer {i + 1}: {model}" for i, model in enumerate(models)]
    rows = [json.loads(line) for line in (Path(server.server.config.votes) / "votes.jsonl").read_text().splitlines()]
    row = rows[-1]
    assert (row["models"], row["choice"], row["blind"], row["reasons"]) == (models, better, True, ["warmth"])
    better_at = 0 if better == "first" else 1
    assert row["chosen"][0]["content"] == shown[better_at]
    assert row["rejected"][0]["content"] == shown[1 - better_at]
    assert (row["prompt"], row["comment"]) == ([{"role": "user", "content": QUESTION}], "kinder")
    assert row["sampling"] == {**SETTINGS, "top_p": 1}

    page.click("#beside")
    page.fill("#question", "")
    ask(page, "go on")
    expect(page.locator("#send")).to_be_visible()
    assert proxy.chats[-1]["messages"][1]["content"] == shown[better_at]
    delete = page.get_by_role("button", name="Delete my vote", exact=True)
    delete.click()
    expect(delete).to_have_count(0)
    assert row["id"] not in (Path(server.server.config.votes) / "votes.jsonl").read_text()


def test_a_vote_without_a_yes_sends_no_text(visit, proxy, server):
    """Only what was chosen leaves the page. It can be deleted even when the answer it was about is gone."""
    page = visit()
    ask(page)
    with page.expect_request("**/v1/votes") as sent:
        page.get_by_role("button", name="Bad answer").click()
        page.click("#vote .primary")
    expect(page.get_by_text("Your vote: bad.")).to_be_visible()
    body = sent.value.post_data_json
    assert set(body) == {"answers", "choice", "blind", "consent", "reasons", "sampling"}
    assert [set(answer) for answer in body["answers"]] == [{"model"}]
    file = Path(server.server.config.votes) / "votes.jsonl"
    vote_id = json.loads(file.read_text().splitlines()[-1])["id"]
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Bad answer")).to_be_visible()
    page.click("#open-conversations")
    page.click("#delete-votes")
    expect(page.locator("#delete-votes")).to_be_disabled()
    assert vote_id not in file.read_text()


def test_a_conversation_is_kept_edited_repeated_copied_saved_and_loaded(visit, proxy, tmp_path):
    """A reload changes nothing; an edit cuts what follows; a file holds what training reads, and comes back."""
    page = visit()
    page.click("#open-settings")
    page.fill("#system", "be kind")
    page.press("#key", "Enter")
    for text in ("one", "two"):
        ask(page, text)
        expect(page.locator("#send")).to_be_visible()
        expect(answers(page).last).not_to_be_empty()
    before = page.locator("#turns").inner_text()
    page.reload()
    expect(page.locator("#model option").first).to_be_attached()
    assert page.locator("#turns").inner_text() == before

    page.locator(".answer").first.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == answers(page).first.text_content()

    page.get_by_role("button", name="Regenerate").click()
    until(lambda: len(proxy.chats) == 3)
    expect(page.locator("#send")).to_be_visible()
    assert proxy.chats[2] == proxy.chats[1]

    page.locator(".mine").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit your message").fill("uno")
    page.get_by_role("button", name="Ask again from here").click()
    expect(answers(page)).to_have_count(1)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    asked = [("system", "be kind"), ("user", "uno")]
    assert [(turn["role"], turn["content"]) for turn in proxy.chats[-1]["messages"]] == asked

    page.click("#open-conversations")
    with page.expect_download() as download:
        page.click("#save-file")
    file = tmp_path / "talk.json"
    download.value.save_as(file)
    saved = json.loads(file.read_text())["messages"]
    assert [(turn["role"], turn["content"]) for turn in saved[:2]] == asked
    assert saved[2]["content"] == answers(page).text_content()
    page.click("#delete-all")
    expect(page.locator("#turns li")).to_have_count(0)
    file.with_name("bad.json").write_text('{"messages": [{"role": "assistant", "content": "x"}]}')
    page.set_input_files("#file", file.with_name("bad.json"))
    expect(page.locator("#file-problem")).to_have_text("In this file, user and assistant do not take turns.")
    page.set_input_files("#file", file)
    expect(page.locator("#turns li")).to_have_count(2)
    expect(page.get_by_role("button", name="Good answer")).to_have_count(0)


def test_failures_are_told_in_words_and_can_be_repeated(visit, proxy, server):
    """No key, too many requests, a stream that breaks, a server that is away: the question is never lost."""
    page = visit(key="")
    expect(page.locator("#connection")).to_contain_text("needs an API key: type it in under Settings")
    page.click("#open-settings")
    page.fill("#key", server.user_key)
    page.press("#key", "Enter")
    expect(page.locator("#connection")).to_be_hidden()

    busy = ApiError(429, "too many", retry_after_s=7)
    cut = b'data: {"model": "m", "choices": [{"delta": {"content": "half an ans"}}]}\n\n'
    proxy.answers = [Canned(429, busy.body(), tuple(busy.headers().items())), Canned(200, cut)]
    problem = page.locator("#problem")
    ask(page)
    expect(problem).to_contain_text("Too many of your requests are waiting. Try again in 7 s.")
    expect(page.locator("#question")).to_have_value(QUESTION)
    problem.get_by_role("button").click()
    expect(problem).to_contain_text("The connection ended in the middle of the answer.")
    expect(answers(page)).to_have_text("half an ans")
    problem.get_by_role("button").click()
    expect(page.get_by_role("button", name="Good answer")).to_be_visible()
    expect(problem).to_be_hidden()
    assert len(proxy.chats) == 3
    assert [turn["content"] for turn in proxy.chats[2]["messages"]] == [QUESTION]


def test_a_server_that_is_away_comes_back(visit, browser, server):
    """The page says so, follows by itself, and the retry asks the same question."""
    with proxied(server.base_url) as first:
        port = first.server_port
        page = browser.new_page()
        page.set_default_timeout(HANG_S * 1000)
        page.goto(first.url + "/ui")
        page.evaluate("(key) => sessionStorage.setItem('counsel.key', key)", server.user_key)
        page.reload()
        expect(page.locator("#model option").first).to_be_attached()
    ask(page)
    expect(page.locator("#problem")).to_contain_text("The server does not answer. It may be stopped or restarting.")
    expect(page.locator("#connection")).to_be_visible()
    with proxied(server.base_url, port) as second:
        expect(page.locator("#connection")).to_be_hidden()
        page.click("#problem button")
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        assert [turn["content"] for turn in second.chats[0]["messages"]] == [QUESTION]
        # Nobody has set a length: the server's own limit holds.
        assert "max_completion_tokens" not in second.chats[0]
        page.close()


@functools.cache
def axe_source() -> str:
    folder = Path(pytest.importorskip("axe_playwright_python", reason="axe is not installed").__file__).parent
    return (folder / "axe.min.js").read_text(encoding="utf-8")


def violations(page) -> list[str]:
    page.evaluate(axe_source())
    found = page.evaluate("axe.run()")["violations"]
    return [f"{one['id']}: {node['html'][:120]} {node['failureSummary']}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [None, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(visit, scheme, viewport):
    """In every state of the page: empty, a choice of two, each dialog, a problem."""
    page = visit(color_scheme=scheme)
    if viewport:
        page.set_viewport_size(viewport)

    def check() -> None:
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0

    check()
    page.locator("#model").select_option("gentle")
    page.click("#beside")
    page.locator("#other").select_option("calm")
    ask(page)
    expect(page.locator(".choice")).to_be_visible()
    check()
    page.locator(".choice").get_by_role("button", name="Answer 2").click()
    page.check("#consent")
    check()
    page.keyboard.press("Escape")
    ask(page, "x")
    expect(page.locator("#problem")).to_be_visible()
    check()
    page.get_by_role("button", name="Skip").click()
    ask(page, "w" * 300)
    expect(page.locator("#send")).to_be_visible()
    check()
    for opener in ("#open-settings", "#open-conversations"):
        page.click(opener)
        check()
        page.keyboard.press("Escape")
        expect(page.locator(opener)).to_be_focused()
