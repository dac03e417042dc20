"""How the chat page looks and is used: by keyboard alone, on a phone, by day and night; and how text becomes nodes."""

from __future__ import annotations

import re

import pytest
from page_server import Answer
from selenium.webdriver.common.keys import Keys

pytest_plugins = ["page_browser"]

# WCAG 2.2, 1.4.3: level AA for text.
CONTRAST = 4.5
PHONE = (320, 640)

# The colour and the ground of every text that can be seen, placeholders too; what is disabled is exempt there.
COLOURS = """
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return "none";
};
const found = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!node.checkVisibility() || node.matches(":disabled, :disabled *, .hidden, .skip")) continue;
  const name = node.tagName + "." + node.className + "#" + node.id;
  if (own) found.push([name, getComputedStyle(node).color, ground(node)]);
  if (node.placeholder) found.push([name, getComputedStyle(node, "::placeholder").color, ground(node)]);
}
return found;
"""

# Every part of the conversation that has a look of its own.
LONG = "\n".join(
    [
        "# A heading",
        "Some **bold** and *leaning* words, and `code`.",
        "",
        "1. one",
        "2. two",
        "   - inner " + "x" * 90,
        "",
        "```python",
        "print('" + "long " * 40 + "')",
        "```",
        "The end.",
    ]
)


def luminance(colour: str) -> float:
    """Relative luminance of an opaque `rgb(...)`, as WCAG 2.2 defines it."""
    channels = [int(part) / 255 for part in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()]  # type: ignore[union-attr]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 860), PHONE], ids=["desktop", "phone"])
def test_every_text_can_be_read_by_day_and_by_night(page, scheme, size):
    page.screen(*size, scheme)
    page.ask("Show me everything.", Answer((LONG,)))
    page.ask("And fail.", Answer(status=503, sentence="The server is full."))
    page.server.key = "sk"
    page.ask("And ask for a key.")
    colours = page.run(COLOURS)
    if size == PHONE:
        page.click("#open-panel")
        colours += page.run(COLOURS)
    assert len(colours) > 40
    low = {name: (one, other) for name, one, other in colours if contrast(one, other) < CONTRAST}
    assert low == {}
    paper = page.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (luminance(paper) > 0.8) == (scheme == "light")
    assert (luminance(paper) < 0.05) == (scheme == "dark")


def test_the_contrast_rule_knows_the_extremes():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert (
        contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)")
        < CONTRAST
        < contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)")
    )


def test_the_switch_overrides_the_system_and_is_kept(page):
    paper = "return getComputedStyle(document.documentElement).backgroundColor"
    page.screen(1280, 860, "dark")
    dark = page.run(paper)
    page.click("#theme")
    assert page.run("return document.querySelector('#theme').ariaLabel") == "Theme: light"
    light = page.run(paper)
    assert luminance(light) > luminance(dark)
    page.open()
    assert page.run(paper) == light
    page.screen(1280, 860, "light")
    page.click("#theme")
    assert page.run(paper) == dark
    page.click("#theme")
    assert page.run("return document.querySelector('#theme').ariaLabel") == "Theme: system"
    assert page.run(paper) == light


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    page.screen(width, 640)
    page.ask("y" * 300, Answer((LONG,)))
    page.ask("And fail.", Answer(status=503, sentence="z" * 300))
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.run(overflow) <= 0
    for selector in ("#message", "#send", "#theme", "#new"):
        box = page.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.left, b.right]", selector
        )
        assert 0 <= box[0] < box[1] <= width, selector
    if page.shown("#open-panel"):
        page.click("#open-panel")
        assert page.shown("#temperature")
        assert page.run(overflow) <= 0


def test_a_whole_conversation_needs_no_mouse(page):
    focused = "return document.activeElement.id"
    assert page.run(focused) == "message"
    page.press("One line")
    page.chord(Keys.SHIFT, Keys.ENTER)
    page.press("and another")
    page.server.script = [Answer(("An answer.",)), Answer(tuple("abc" * 500), pause=0.02)]
    page.press(Keys.ENTER)
    page.until(lambda: page.texts(".answer") == ["An answer."])
    page.until_answered()
    assert page.server.requests[-1]["messages"][0]["content"] == "One line\nand another"
    # Enter while an answer comes sends nothing, and loses nothing.
    page.press("Long", Keys.ENTER)
    page.until(lambda: "abc" in page.text(".turn:last-child .answer"))
    page.press("draft", Keys.ENTER)
    assert page.run("return document.activeElement.value") == "draft"
    page.press(Keys.ESCAPE)
    page.until_answered()
    assert "stopped" in page.text(".turn:last-child .measured")
    assert page.run(focused) == "message"
    assert len(page.server.requests) == 2


def test_tab_reaches_every_control_and_shows_where_it_is(page):
    page.ask("Hello", Answer((LONG,)))
    page.run("document.activeElement.blur()")
    seen = []
    while not seen or seen[-1][0] != "message":
        assert len(seen) < 40, seen
        page.press(Keys.TAB)
        name, ring = page.run(
            """const node = document.activeElement;
               const ring = getComputedStyle(node.id === "message" ? node.parentElement : node);
               return [node.id || node.className || node.tagName,
                       ring.outlineStyle !== "none" || ring.boxShadow !== "none"];"""
        )
        # The document itself is where a round begins.
        seen += [] if name == "BODY" else [(name, ring)]
    names = [name for name, _ in seen]
    wanted = {"new", "theme", "temperature", "top_p", "top_k", "max_tokens", "seed", "system", "message"}
    assert wanted <= set(names), names
    assert "PRE" in names
    assert all(ring for _, ring in seen), seen


def test_every_control_has_a_name_and_answers_are_announced_when_whole(page):
    nameless = page.run(
        """return [...document.querySelectorAll("button, input, textarea")].filter((node) =>
             !(node.ariaLabel || node.labels?.length || node.innerText.trim())).map((node) => node.outerHTML)"""
    )
    assert nameless == []
    log = "const log = document.getElementById('log'); return [log.role, log.ariaLive, log.ariaBusy]"
    page.server.script = [Answer(("a", "b"), first=0.3)]
    page.send("Hello")
    page.until(lambda: page.run(log) == ["log", "polite", "true"])
    page.until_answered()
    assert page.run(log) == ["log", "polite", None]
    assert page.run("return document.getElementById('status').textContent") == "The answer is complete."


def test_the_panel_of_a_phone_covers_and_uncovers_the_conversation(page):
    page.screen(*PHONE)
    assert not page.shown("#panel")
    page.run("document.getElementById('open-panel').focus()")
    page.press(Keys.ENTER)
    assert page.shown("#panel")
    assert page.run("return document.querySelector('main').inert")
    page.press(Keys.ESCAPE)
    assert not page.shown("#panel")
    assert not page.run("return document.querySelector('main').inert")
    assert page.run("return document.activeElement.id") == "open-panel"


def test_a_reader_who_scrolls_up_is_left_alone(page):
    page.screen(1280, 400)
    page.server.script = [Answer(tuple(f"line {i}\n\n" for i in range(1500)), pause=0.01)]
    page.send("Long")
    page.until(lambda: page.run("return scrollY") > 300)
    page.run("scrollBy(0, -20)")
    page.until(lambda: page.shown("#latest"))
    where = page.run("return scrollY")
    count = len(page.texts(".answer p"))
    page.until(lambda: len(page.texts(".answer p")) > count + 10)
    assert page.run("return scrollY") == where
    page.click("#latest")
    count = len(page.texts(".answer p"))
    page.until(lambda: len(page.texts(".answer p")) > count + 10)
    assert page.run("return scrollY") > where
    page.press(Keys.ESCAPE)
    page.until_answered()


def test_who_wants_no_motion_sees_none(page):
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.server.script = [Answer(("a",), first=0.5)]
    page.send("Hello")
    page.until(lambda: page.shown("#stop"))
    assert page.run("return document.getAnimations().length") == 0
    page.until_answered()
