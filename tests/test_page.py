"""The chat page in a browser, against a scripted server: what it sends, shows, keeps and survives."""

from __future__ import annotations

import re
import time

import pytest
from page_server import MODEL, Answer
from selenium.webdriver.common.keys import Keys

pytest_plugins = ["page_browser"]


def test_an_answer_is_shown_while_it_comes_and_measured(page):
    usage = {"prompt_tokens_details": {"cached_tokens": 16}}
    page.server.script = [Answer(("One", " two", " three", " four"), first=0.3, pause=0.3, usage=usage)]
    page.send("Count.")
    # All at one moment, which a busy machine can't tear apart.
    live = """const at = (selector) => document.querySelector(selector);
              return at("#stop").checkVisibility() && !at("#send").checkVisibility()
                && at(".answer").innerText.startsWith("One two") && !at(".answer").innerText.endsWith("four")
                && at("#rate").innerText.startsWith("≈ ");"""
    page.until(lambda: page.text(".answer").startswith("One"))
    page.until(lambda: page.run(live))
    page.until_answered()
    assert page.text(".answer") == "One two three four"
    (sent,) = page.server.requests
    assert sent["messages"] == [{"role": "user", "content": "Count."}]
    assert (sent["model"], sent["stream"], sent["stream_options"]) == (MODEL, True, {"include_usage": True})
    # Three of four tokens came in three pauses of 0.3 s: below 3.3 a second; a busy machine makes the pauses longer.
    assert 0.5 < float(page.text("#rate")) < 4
    first, unit = page.text("#first-token"), page.text("#first-token-unit")
    assert (float(first) / 1000 if unit == "ms" else float(first)) >= 0.3
    assert re.search(r"4 tokens\s*16 of 20 prompt tokens cached", page.text(".measured"))


def test_the_next_request_carries_the_conversation_and_the_settings(page):
    page.ask("First", Answer(("Yes.",)))
    page.run(
        """for (const [id, value] of Object.entries(arguments[0])) {
             document.getElementById(id).value = value;
             document.getElementById(id).dispatchEvent(new Event("input", { bubbles: true }));
           }""",
        {"temperature": 1.25, "top_p": 0.5, "top_k": 40, "max_tokens": 77, "seed": 7, "system": "Be brief."},
    )
    page.ask("Second")
    sent = page.server.requests[-1]
    assert [(m["role"], m["content"]) for m in sent["messages"]] == [
        ("system", "Be brief."),
        ("user", "First"),
        ("assistant", "Yes."),
        ("user", "Second"),
    ]
    assert {name: sent[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")} == {
        "temperature": 1.25,
        "top_p": 0.5,
        "top_k": 40,
        "max_tokens": 77,
        "seed": 7,
    }
    page.click("#new")
    assert page.shown("#welcome")
    assert page.texts(".turn") == []
    page.run("document.querySelector('[type=reset]').click()")
    page.until(lambda: page.text("output") == "0.70")
    page.ask("Third")
    assert page.server.requests[-1]["messages"] == [{"role": "user", "content": "Third"}]
    assert not {"top_k", "seed"} & set(page.server.requests[-1])


def test_a_setting_out_of_range_is_pointed_at_and_nothing_is_sent(page):
    page.run("document.getElementById('seed').value = -1")
    page.send("Hello")
    assert page.run("return document.activeElement.id") == "seed"
    assert page.server.requests == []
    assert page.run("return document.getElementById('message').value") == "Hello"


def test_stopping_keeps_what_came_and_frees_the_server(page):
    page.server.script = [Answer(tuple(f"{i} " for i in range(1000)), pause=0.02)]
    page.send("Count to a thousand.")
    page.until(lambda: "3" in page.text(".answer"))
    page.click("#stop")
    page.until_answered()
    assert "stopped" in page.text(".measured")
    page.until(lambda: page.server.abandoned == 1)
    kept = page.text(".answer")
    assert kept.startswith("0 1 2 3")
    assert page.run("return document.activeElement.id") == "message"
    page.ask("Go on.")
    assert page.server.requests[-1]["messages"][1]["content"].strip() == kept


def test_an_error_is_shown_as_its_sentence_and_the_message_can_be_sent_again(page):
    page.ask("One", Answer(("1",)))
    busy = "64 requests wait already, and no more may; try again later."
    page.ask("Two", Answer(status=503, sentence=busy, retry_after=2))
    assert page.text(".problem[role=alert]:not([hidden])") == f"{busy} It asks to wait 2 s before the next try."
    page.server.script = [Answer(("2",))]
    page.click(".turn:last-child .actions button:last-child")
    page.until(lambda: page.texts(".answer") == ["1", "2"])
    assert page.texts(".said") == ["One", "Two"]
    assert [m["content"] for m in page.server.requests[-1]["messages"]] == ["One", "1", "Two"]
    assert not page.shown(".problem")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (Answer(("Half",), sentence="The step failed."), "The step failed."),
        (Answer(("Half",), breaks=True), "The connection ended before the answer did."),
    ],
    ids=["an error in the stream", "a stream without an end"],
)
def test_an_answer_that_breaks_off_says_so_and_keeps_its_half(page, answer, sentence):
    assert page.ask("Hello", answer) == "Half"
    assert page.text(".problem") == sentence


def test_a_message_that_was_never_answered_joins_the_next(page):
    page.ask("One", Answer(status=503, sentence="Full."))
    page.ask("Two")
    assert page.server.requests[-1]["messages"] == [{"role": "user", "content": "One\n\nTwo"}]


def test_a_key_is_asked_for_kept_in_the_tab_only_and_the_message_sent_again(page):
    page.server.key = "sk-right"
    page.ask("Hello")
    assert page.shown("#key-form")
    assert page.text(".problem") == "This API key is not known; ask whoever runs the server for one."
    assert page.run("return document.activeElement.id") == "key"
    page.press("sk-wrong", Keys.ENTER)
    page.until(lambda: "is not known" in page.text("#key-label"))
    page.press("sk-right", Keys.ENTER)
    page.until(lambda: page.texts(".answer") == ["Hello there, friend."])
    assert not page.shown("#key-form")
    assert page.run("return Object.values(sessionStorage).includes('sk-right')")
    assert not page.run("return (JSON.stringify(localStorage) + document.cookie + location.href).includes('sk-right')")
    page.open()
    page.until(lambda: page.text("#model") == MODEL)
    page.click("#forget-key")
    assert not page.run("return Object.values(sessionStorage).includes('sk-right')")


def test_metrics_are_shown_and_read_only_while_the_page_is_visible(page):
    page.until(lambda: page.text("#hits") == "82 %")
    assert [page.text(f"#{name}") for name in ("running", "waiting", "cache")] == ["3", "2", "25 %"]
    page.server.metrics = page.server.metrics.replace("} 3.0", "} 1.0")
    page.until(lambda: page.text("#running") == "1")
    hide = "Object.defineProperty(document, 'visibilityState', {value: arguments[0], configurable: true});"
    page.run(hide + "document.dispatchEvent(new Event('visibilitychange'))", "hidden")
    # For a reading that had begun; then longer than the two seconds between two of them.
    time.sleep(0.3)
    before = page.server.polls
    time.sleep(2.2)
    assert page.server.polls == before
    page.run(hide + "document.dispatchEvent(new Event('visibilitychange'))", "visible")
    page.until(lambda: page.server.polls > before)
