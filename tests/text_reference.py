"""What the tokenizer tests and the script that makes their stored data share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "text"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
_GROUP = 25


def digests(ids: Sequence[Sequence[int]]) -> str:
    """One short digest for each group of texts: a difference is found, and roughly where, at a few bytes each."""
    groups = [ids[start : start + _GROUP] for start in range(0, len(ids), _GROUP)]
    return " ".join(hashlib.sha256(json.dumps(list(map(list, group))).encode()).hexdigest()[:8] for group in groups)


def load(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def tiny_metadata(tiny: dict[str, Any], name: str) -> dict[str, Any]:
    """GGUF metadata of a small vocabulary: `bpe:PRE`, or `spm:prefix` and `spm:plain` (no space in front)."""
    kind, variant = name.split(":")
    if kind == "bpe":
        tokens = tiny["bpe"]["tokens"]
        # The last special token is user-defined: text to the outside, yet never split.
        types = [3] * (len(SPECIAL) - 1) + [4] + [1] * (len(tokens) - len(SPECIAL))
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": variant,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": tiny["bpe"]["merges"],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 2,
        }
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [piece for piece in tiny["spm"]["pieces"] if piece not in head]
    # SentencePiece scores a piece by the rank of the merge that made it; single characters come last.
    merged = [piece for piece in pieces if len(piece) > 1]
    single = [piece for piece in pieces if len(piece) == 1]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*head, *merged, *single, "<tool>"],
        "tokenizer.ggml.scores": [0.0] * len(head) + [-float(rank) for rank in range(len(pieces))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": variant == "prefix",
        "tokenizer.ggml.add_bos_token": variant == "prefix",
    }


@dataclass(frozen=True)
class ChatCase:
    template: str
    messages: list[dict[str, Any]]
    variables: dict[str, Any] = field(default_factory=dict)


# In the manner of SmolLM2, Llama 3 and Mistral, each with what is peculiar to it.
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{#- A system message may be missing. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.content is none %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {% if message.role == 'assistant' %}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
    {% else %}
    {{- message['content'] | tojson }}
    {% endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

BRACKETS = """{%- set loop_messages = messages %}
{{ bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

_TALK = [
    {"role": "user", "content": 'What is 2 < 3 && "é"?'},
    {"role": "assistant", "content": "  True, 👍 <b>indeed</b>.  "},
    {"role": "user", "content": "Why?\n"},
]
_SYSTEM = [{"role": "system", "content": " Be brief. "}, *_TALK]
_TOOL = {"type": "function", "function": {"name": "weather", "description": "It's <new> & ünïcode"}}
_DATE = {"date_string": "26 Jul 2024"}

CHAT_CASES = [
    ChatCase(CHATML, _TALK),
    ChatCase(CHATML, _SYSTEM, {"add_generation_prompt": False}),
    ChatCase(HEADERS, _TALK, _DATE),
    ChatCase(HEADERS, [*_SYSTEM, {"role": "assistant", "content": None}], {**_DATE, "tools": [_TOOL]}),
    ChatCase(HEADERS, _SYSTEM, {**_DATE, "add_generation_prompt": False}),
    ChatCase(BRACKETS, _TALK),
    ChatCase(BRACKETS, _TALK[:2]),
]

# What every template can render, the one that a real model carries included.
PLAIN_CHAT_CASES = CHAT_CASES[:2]
