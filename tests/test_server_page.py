"""The page at ``/``: what it may do, and what it does in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from browser import Browser, found
from served import Served, load, write_model

from infer.completion import Choice, Completion, Event
from infer.server.config import ServerConfig
from infer.server.page import render

KEY = "sk-a-key-of-the-page"
needs_browser = pytest.mark.skipif(found() is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("page") / "tiny")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with Served(load(folder, prefix_cache=True), delay_s=0.02) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(1200, 800) as running:
        yield running


@pytest.fixture
def tab(browser: Browser, served: Served) -> Iterator[Browser]:
    """The page, as somebody finds it who has just come; in the end nothing must be wrong with it."""
    browser.console.clear()
    browser.requests.clear()
    browser.look(1200, 800)
    browser.goto(served.url + "/")
    browser.wait("document.getElementById('state').dataset.state === 'ready'")
    yield browser
    assert browser.console == []
    assert browser.requests and all(address.startswith((served.url, "data:")) for address in browser.requests)


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_only_its_own_script_and_style_may_run(served: Served) -> None:
    answer = httpx2.get(served.url + "/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert (policy["script-src"], policy["style-src"]) == (hash_of(script), hash_of(style))
    assert policy["connect-src"] == "'self'" and "unsafe" not in answer.headers["content-security-policy"]
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert set(re.findall(r"https?://[\w./]+", answer.text)) == {"http://www.w3.org/2000/svg"}, "names, not addresses"
    assert not re.search(r"<[^>]*\son\w+=|<[^>]*\sstyle=|javascript:|innerHTML|insertAdjacentHTML|eval\(", answer.text)
    assert "{{" not in answer.text and len(answer.content) < 50_000
    assert httpx2.head(served.url + "/").status_code == 200 and httpx2.post(served.url + "/").status_code == 405


def status(served: Served, path: str, key: str = "") -> int:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.get(served.url + path, headers=headers).status_code


def test_with_keys_it_is_shown_only_where_that_is_said(folder: Path) -> None:
    llm = load(folder)
    with Served(llm, ServerConfig(keys=(KEY,))) as closed:
        assert [status(closed, "/"), status(closed, "/", KEY), status(closed, "/?a")] == [401, 200, 401]
    with Served(load(folder), ServerConfig(keys=(KEY,), page="open")) as shown:
        assert [status(shown, "/"), status(shown, "/metrics"), status(shown, "/v1/models")] == [200, 401, 401]
        for path in ("//", "/%2f", "/index.html", "/;x"):
            assert status(shown, path) == 401, path
        assert KEY not in httpx2.get(shown.url + "/").text
        document = httpx2.get(shown.url + "/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
        assert document["paths"]["/"]["get"]["security"] == []
    with Served(load(folder), ServerConfig(page="off", metrics=False)) as without:
        assert status(without, "/") == 404
    assert b'data-pictures="no"' in render(keys=False, pictures=False).body


def say(tab: Browser, text: str) -> None:
    tab.click("#prompt")
    tab.type(text)
    tab.press("Enter")


IDLE = "!document.querySelector('.turn.busy') && !!document.querySelector('.turn .note')"


@needs_browser
def test_an_answer_is_streamed_and_the_pictures_move(tab: Browser, served: Served) -> None:
    words = "(document.querySelector('.turn:last-child .text')?.textContent.length ?? 0)"
    before = tab.js("document.querySelector('.card .stroke')?.getAttribute('d') ?? ''")
    say(tab, "tell me of the sea")
    first = tab.wait(words)
    assert tab.js("!!document.querySelector('.turn.busy')"), "it is shown before it is whole"
    assert tab.wait(f"{words} > {first}")
    tab.wait("document.querySelector('.now').textContent === '1running'")
    tab.wait(IDLE)
    note = tab.js("document.querySelector('.turn .note').textContent")
    assert re.match(r"64 tokens · first after [\d.]+ m?s · [\d.]+ ms each · ended at the limit", note), note
    assert tab.js("document.querySelector('.turn.user .text').textContent") == "tell me of the sea"
    tab.wait("document.querySelectorAll('.card .now')[2].textContent.endsWith('ms')")
    tab.wait("document.querySelectorAll('.card .now')[3].textContent.endsWith('ms')")
    assert tab.js("document.querySelector('.card .stroke').getAttribute('d')") != before
    labels = tab.js("[...document.querySelectorAll('.card svg')].map(s => s.getAttribute('aria-label'))")
    assert len(labels) == 6 and "Time to first token" in labels[2] and labels[2].endswith("ms")


@needs_browser
def test_stop_ends_an_answer_in_the_engine_too(tab: Browser, served: Served) -> None:
    tab.js("document.getElementById('most').value = 200")
    for how in (lambda: tab.click("#stop"), lambda: tab.press("Escape")):
        say(tab, "on and on")
        tab.wait("document.querySelector('.turn.busy .text')?.textContent")
        how()
        tab.wait("document.querySelector('.turn:last-child .note')?.textContent.endsWith('stopped')")
        end = time.monotonic() + 3
        while served.llm.engine.busy:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert tab.js("document.activeElement.id") == "prompt"
    assert tab.js("document.querySelectorAll('.turn.user').length") == 2
    tab.click("#fresh")
    assert tab.js("document.querySelectorAll('.turn').length") == 0


@needs_browser
def test_what_a_model_writes_is_text(tab: Browser, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;b&gt;"

    async def stream(prompt: Sequence[int], *_: Any, **__: Any) -> AsyncIterator[Event]:
        for index in range(0, len(evil), 7):
            yield Event(0, 0, evil[index : index + 7], (5,))
        choice = Choice(0, (5,), evil, "stop")
        yield Event(0, 0, "", (), (), "stop", Completion(tuple(prompt), (choice,)))

    monkeypatch.setattr(served.engine, "stream", stream)
    say(tab, "<b onclick=1>hello</b>")
    tab.wait(IDLE)
    assert tab.js("document.querySelector('.turn:last-child .text').textContent") == evil
    assert tab.js("document.querySelector('.turn.user .text').textContent") == "<b onclick=1>hello</b>"
    assert tab.js("document.querySelectorAll('#log img, #log script, #log b').length") == 0
    assert tab.js("document.title") == "tiny · Lockstep"
    assert tab.js("(() => { try { document.body.innerHTML = '<p>'; return false } catch { return true } })()")
    tab.console.clear()  # of the line above, which the browser refused and told


@needs_browser
def test_a_model_without_a_chat_template_continues_texts(
    browser: Browser, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.app.state.server.codec, "template", None)
    browser.console.clear()
    browser.goto(served.url + "/")
    browser.wait("document.getElementById('hint').textContent.includes('no chat template')")
    say(browser, "once upon")
    browser.wait(IDLE)
    assert browser.js("document.querySelector('.turn .text').textContent.startsWith('once upon')")
    assert browser.js("document.querySelector('.turn .text').textContent.length") > 20
    assert browser.console == []


@needs_browser
def test_a_key_is_asked_for_kept_in_the_tab_and_never_shown(browser: Browser, folder: Path) -> None:
    with Served(load(folder), ServerConfig(keys=(KEY,), page="open")) as shown:
        browser.console.clear()
        browser.requests.clear()
        browser.goto(shown.url + "/")
        browser.wait("!document.getElementById('key-form').hidden")
        assert browser.requests[1:] == [] or all(r.startswith("data:") for r in browser.requests[1:])
        browser.click("#key")
        browser.type(KEY)
        browser.press("Enter")
        browser.wait("document.getElementById('state').dataset.state === 'ready'")
        assert browser.js("document.getElementById('key-form').hidden && document.getElementById('key').value === ''")
        say(browser, "hello")
        browser.wait(IDLE)
        assert browser.js("localStorage.length") == 0 and browser.js("document.cookie") == ""
        assert not any(KEY in address for address in browser.requests) and browser.console == []


@needs_browser
def test_it_fits_a_phone_in_both_modes(tab: Browser) -> None:
    for dark in (False, True):
        tab.look(360, 740, dark=dark)
        for view in ("#view-chat", "#view-pictures"):
            tab.click(view)
            assert tab.js(
                "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
            )
        assert tab.js("getComputedStyle(document.getElementById('chat')).display") == "none"
        assert tab.js("document.querySelectorAll('.card')[0].getBoundingClientRect().width") > 300
        tab.click("#view-chat")
        tab.wait("document.getElementById('send').getBoundingClientRect().right <= innerWidth")
        colours = tab.js("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        light, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
        assert (light < 60 and ink > 180) if dark else (light > 200 and ink < 80)
