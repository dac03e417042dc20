"""The page's files without a browser: headers, caching, and that nothing in them points outside."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import fusedllm.serve.page as page

FILES = sorted((Path(page.__file__).parent / "page").iterdir())
# Names of vocabularies, which no browser fetches; and sources in comments.
NOT_FETCHED = ("http://www.w3.org/2000/svg", "https://html.spec.whatwg.org/")


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(page.router)
    return TestClient(app)


def path_of(file: Path) -> str:
    return "/" if file.name == page.INDEX else f"/page/{file.name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_is_served_as_it_is_with_a_strict_policy(client, file):
    response = client.get(path_of(file))
    assert response.status_code == 200
    assert response.content == file.read_bytes()
    assert response.headers["content-type"] == page.MEDIA_TYPES[file.suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_that_the_browser_has_is_not_sent_again(client, file):
    first = client.get(path_of(file))
    etag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    for named in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get(path_of(file), headers={"If-None-Match": named})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
        assert "content-security-policy" in again.headers
    assert client.get(path_of(file), headers={"If-None-Match": '"other"'}).status_code == 200


def test_etags_differ_between_files():
    assert len({asset.etag for asset in page.assets().values()}) == len(FILES)


def test_head_answers_with_the_length_and_no_body(client):
    response = client.head("/")
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) == len(client.get("/").content)


@pytest.mark.parametrize(
    "name", ["nothing.js", "..%2Fpage.py", "%2E%2E/page.py", "app.js/", "", "INDEX.HTML", "a" * 5000]
)
def test_what_the_page_does_not_have_is_404(client, name):
    assert client.get(f"/page/{name}", follow_redirects=False).status_code in (404, 307)
    assert (
        client.get(f"/page/{name}", follow_redirects=True).headers["content-type"] == "application/json"
        or name == "app.js/"
    )


def test_the_page_is_no_part_of_the_described_api(client):
    assert client.get("/openapi.json").json()["paths"] == {}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_points_outside(file):
    text = file.read_text()
    for known in NOT_FETCHED:
        text = text.replace(known, "")
    assert not re.search(r"https?:|wss?:|[\"'(=]//|@import|url\(", text)


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.suffix in (".js", ".html")], ids=lambda file: file.name
)
def test_no_file_turns_text_into_markup_or_code(file):
    text = file.read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", text
    )
    if file.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)


def test_every_name_in_the_page_is_a_file(client):
    for file in FILES:
        text = file.read_text()
        for name in re.findall(r"(?:src|href)=\"page/([^\"]+)\"|from \"\./([^\"]+)\"", text):
            assert client.get(f"/page/{''.join(name)}").status_code == 200, name


def test_no_module_grows_into_a_warehouse():
    lengths = {file.name: len(file.read_text().splitlines()) for file in FILES if file.suffix == ".js"}
    assert max(lengths.values()) < 300, lengths
