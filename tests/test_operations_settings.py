"""The server's settings: what can't be is refused with one sentence, and keys are nowhere to be read."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from fusedllm.errors import SettingsError
from fusedllm.serve.keys import KeyDigest
from fusedllm.serve.server import settings_from_keywords
from fusedllm.serve.settings import KEYS_VARIABLE, ServerSettings, read_keys

REFUSED = [
    ({"host": ""}, "host"),
    ({"port": -1}, "port"),
    ({"port": 65536}, "port"),
    ({"port": True}, "port"),
    ({"port": "8000"}, "port"),
    ({"max_queue": 0}, "max_queue"),
    ({"max_body_bytes": 0}, "max_body_bytes"),
    ({"max_n": 1.5}, "max_n"),
    ({"max_prompt_tokens": 0}, "max_prompt_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"requests_per_minute": 0}, "requests_per_minute"),
    ({"request_seconds": 0}, "request_seconds"),
    ({"body_seconds": float("nan")}, "body_seconds"),
    ({"send_seconds": float("inf")}, "send_seconds"),
    ({"drain_seconds": -1}, "drain_seconds"),
    ({"log_prompts": 1}, "log_prompts"),
    ({"log_format": "xml"}, "log_format"),
    ({"model_name": "two\nlines"}, "model_name"),
    ({"private_key": "key.pem"}, "without a certificate"),
    ({"certificate": "/nowhere/cert.pem"}, "there is none at /nowhere/cert.pem"),
    ({"cors_origins": ("https://a.example/path",)}, "CORS origin"),
    ({"cors_origins": "https://a.example"}, "cors_origins"),
    ({"api_keys": "secret-of-mine"}, "api_keys"),
    ({"api_keys": ("",)}, "API key"),
    ({"api_keys": ("secret of mine",)}, "API key"),
    ({"api_keys": ("sécret-of-mine",)}, "API key"),
]


@pytest.mark.parametrize(("keywords", "part"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_setting_that_cannot_be_is_refused_with_one_sentence(keywords, part):
    with pytest.raises(SettingsError) as refused:
        ServerSettings(**keywords)
    sentence = str(refused.value)
    assert part in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "cret" not in sentence


def test_the_defaults_are_for_this_machine_only():
    settings = ServerSettings()
    assert settings.is_loopback
    assert settings.cors_origins == ()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.0.7", False), ("example.org", False)],
)  # fmt: skip
def test_loopback_is_what_only_this_machine_reaches(host, loopback):
    assert ServerSettings(host=host).is_loopback is loopback


def test_no_key_can_be_read_from_the_settings():
    settings = ServerSettings(api_keys=("sesame-open",))
    assert "sesame" not in repr(settings)
    assert "sesame" not in repr(settings.api_keys)
    assert b"sesame" not in pickle.dumps(settings)


def test_settings_made_from_settings_keep_the_keys():
    settings = dataclasses.replace(ServerSettings(api_keys=("sesame-open",)), port=1)
    assert settings.api_keys == (KeyDigest.of("sesame-open"),)


def test_keywords_override_and_unknown_ones_are_named():
    assert settings_from_keywords(ServerSettings(port=1), {"max_n": 3}) == ServerSettings(port=1, max_n=3)
    with pytest.raises(SettingsError, match="'prot'"):
        settings_from_keywords(None, {"prot": 1})


def test_keys_come_from_flag_file_and_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  of-the-file  \nof-both\n")
    environment = {KEYS_VARIABLE: "of-environment, of-both\nanother"}
    assert read_keys(["of-flag"], file, environment) == (
        "of-flag", "of-the-file", "of-both", "of-environment", "another",
    )  # fmt: skip
    assert read_keys([], None, {}) == ()


def test_a_place_for_keys_without_any_is_refused(tmp_path):
    """An open server is not what somebody wanted who named a place for keys."""
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n")
    with pytest.raises(SettingsError, match="has none in it"):
        read_keys([], empty, {})
    with pytest.raises(SettingsError, match="can't be read"):
        read_keys([], tmp_path / "missing", {})
    with pytest.raises(SettingsError, match=KEYS_VARIABLE):
        read_keys([], None, {KEYS_VARIABLE: " "})
