"""Tokenizer files of a Hugging Face directory: `tokenizer.json` and what stands beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusedllm.errors import TokenizerError
from fusedllm.text.data import TokenizerData

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_OWN_TOKENS = ("eot_token", "eom_token")


def from_hf_directory(path: str | Path) -> TokenizerData | None:
    """Reads the tokenizer of a directory, or returns `None` if it has no `tokenizer.json`.

    Beside it are read, where present: `tokenizer_config.json`, `special_tokens_map.json` (for tokens that the first
    does not name) and `chat_template.jinja` (which wins over a template in the configuration).

    Raises:
      TokenizerError: a file that can't be read, or does not hold what its name promises.
    """
    directory = Path(path)
    if not (directory / "tokenizer.json").is_file():
        return None
    tokenizer_json = _read(directory / "tokenizer.json")
    tokenizer = _parse(tokenizer_json, directory / "tokenizer.json")
    if not isinstance(tokenizer.get("model"), dict):
        raise TokenizerError(f"{directory / 'tokenizer.json'} is not a tokenizer: it has no model")
    config = _read_json(directory / "tokenizer_config.json")
    named = {**_named_tokens(_read_json(directory / "special_tokens_map.json")), **_named_tokens(config)}
    bos_token, eos_token = named.pop("bos_token", None), named.pop("eos_token", None)
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = bos_token is not None and _first_token(tokenizer.get("post_processor")) == bos_token
    template = directory / "chat_template.jinja"
    return TokenizerData(
        tokenizer_json=tokenizer_json,
        chat_template=_read(template) if template.is_file() else _template(config, directory),
        bos_token=bos_token,
        eos_token=eos_token,
        add_bos=add_bos and bos_token is not None,
        special_tokens=named,
    )


def write_hf_directory(data: TokenizerData, path: str | Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`: the inverse of `from_hf_directory`.

    Raises:
      TokenizerError: a directory that can't be written.
    """
    directory = Path(path)
    named = {"bos_token": data.bos_token, "eos_token": data.eos_token, **data.special_tokens}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": data.add_bos,
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in named.items() if token is not None},
    }
    files = {
        "tokenizer.json": data.tokenizer_json,
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }
    if data.chat_template is not None:
        files["chat_template.jinja"] = data.chat_template
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            # Bytes, so that no platform turns line ends into others.
            (directory / name).write_bytes(text.encode())
    except OSError as error:
        raise TokenizerError(f"the tokenizer can't be written to {directory}: {error.strerror}") from error


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise TokenizerError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text") from error


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} holds a {type(values).__name__} and no object")
    return values


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(_read(path), path) if path.is_file() else {}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens by name; each is a text, or an object with the text as its `content`."""
    named = {}
    for name in (*_NAMED_TOKENS, *_OWN_TOKENS):
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            named[name] = token
        elif token is not None:
            raise TokenizerError(f"the tokenizer configuration names {token!r} as {name}, which is not a text")
    return named


def _template(config: Mapping[str, Any], directory: Path) -> str | None:
    """A template, or the one named `default` of a list of named ones."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"the chat_template of {directory / 'tokenizer_config.json'} is not a text")
    return template


def _first_token(processor: Any) -> str | None:
    """The token that a post-processor puts in front of a text, if it is of a kind that does so."""
    if not isinstance(processor, Mapping):
        return None
    if processor.get("type") == "Sequence":
        # The last one that puts a token in front has the last word on what comes first.
        inner = [_first_token(step) for step in processor.get("processors") or ()]
        return next((token for token in reversed(inner) if token is not None), None)
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        cls = processor.get("cls")
        return cls[0] if isinstance(cls, list) and cls and isinstance(cls[0], str) else None
    single = processor.get("single")
    first = single[0] if isinstance(single, list) and single else None
    special = first.get("SpecialToken") if isinstance(first, Mapping) else None
    token = special.get("id") if isinstance(special, Mapping) else None
    return token if isinstance(token, str) else None
