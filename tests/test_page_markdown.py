"""How the chat page turns what a model writes into nodes: a little markdown, and never markup."""

from __future__ import annotations

import pytest

pytest_plugins = ["page_browser"]


@pytest.fixture(scope="module", autouse=True)
def _open_page(driver, server):
    """One page for all: these tests leave nothing in it."""
    server.reset()
    driver.get(server.url)


# What is shown of a text, as nodes: a list of [tag, inside], text as it is.
NODES = """
const [text, inPieces, done] = arguments;
const nodes = (parent) => [...parent.childNodes].map((node) =>
  node.nodeType === 3 ? node.data : [node.localName, ...nodes(node)]);
import("/page/markdown.js").then(({ render }) => {
  const shown = document.createElement("div");
  for (let end = 0; inPieces && end < text.length; end += 1) render(shown, text.slice(0, end));
  render(shown, text);
  for (const bar of shown.querySelectorAll(".code-bar")) bar.remove();
  done(nodes(shown));
});
"""


@pytest.mark.parametrize("in_pieces", [False, True], ids=["at once", "letter by letter"])
@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("one\ntwo\n\nthree", [["p", "one\ntwo"], ["p", "three"]]),
        ("a **b `**` c** d", [["p", "a ", ["strong", "b ", ["code", "**"], " c"], " d"]]),
        ("*a* 2*3*4 ** b ** ***", [["p", ["em", "a"], " 2*3*4 ** b ** ***"]]),
        ("`` a ` b `` `", [["p", ["code", "a ` b"], " `"]]),
        ("<b>&amp;<img src=x onerror=alert(1)>", [["p", "<b>&amp;<img src=x onerror=alert(1)>"]]),
        ("[x](javascript:alert(1))", [["p", "[x](javascript:alert(1))"]]),
        ("## Two ##\ntext", [["h4", "Two"], ["p", "text"]]),
        ("```py\na\n\n b\n```\nafter", [["div", ["pre", ["code", "a\n\n b"]]], ["p", "after"]]),
        ("````\n```\n````", [["div", ["pre", ["code", "```"]]]]),
        ("~~~\nnever closed", [["div", ["pre", ["code", "never closed"]]]]),
        ("- a\n- b\n  1. c\n\n  d", [["ul", ["li", "a"], ["li", "b", ["ol", ["li", "c"]], ["p", "d"]]]]),
        ("3. c\n\n4. d\nlazy", [["ol", ["li", "c"], ["li", "d\nlazy"]]]),
        ("• a\n• b", [["ul", ["li", "a"], ["li", "b"]]]),
        ("In\n1999. was", [["p", "In\n1999. was"]]),
        ("1. a\n   ```\n   b\n   ```\n2. c", [["ol", ["li", "a", ["div", ["pre", ["code", "b"]]]], ["li", "c"]]]),
        ("  \n\n", []),
    ],
)
def test_markdown_becomes_nodes_and_markup_stays_text(driver, text, nodes, in_pieces):
    assert driver.execute_async_script(NODES, text, in_pieces) == nodes


@pytest.mark.parametrize(
    "text", ["**" * 3000, "*a " * 3000, "`" * 3000, "- " * 3000, "  " * 3000 + "- x", "``x` " * 1500]
)
def test_a_text_of_marks_only_takes_no_time(driver, text):
    script = NODES.replace("done(nodes(shown))", "done(performance.now() - started)")
    took = driver.execute_async_script("const started = performance.now();" + script, text, False)
    # Milliseconds; a search that tries every split would take longer than the sun.
    assert took < 1000
