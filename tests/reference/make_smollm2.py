"""SmolLM2-135M-Instruct in HF transformers, float32, with the weights of its GGUF: stored for `tests/test_smollm2.py`.

    python -m tests.reference.make_smollm2 SmolLM2-135M-Instruct.Q4_1.gguf            # writes tests/data/smollm2.json
    python -m tests.reference.make_smollm2 SmolLM2-135M-Instruct.Q4_1.gguf --check    # compares with what is stored

transformers' own GGUF reader is not used: it rebuilds this tokenizer without its splitting of digits. The weights
are dequantized with the `gguf` library, and the tokenizer is built here from the metadata as llama.cpp reads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

STORED = Path(__file__).parent.parent / "data" / "smollm2.json"
NEW_TOKENS = 48
WINDOW, WINDOWS = 512, 8
TOPICS = ("assignment", "class", "exceptions", "try", "function", "lambda", "numbers")
SPECIAL = 3  # GGUF's token type for control tokens.
# A logit gap below which float32 rounding in another order might choose the other token; such prompts prove nothing.
NEAR_TIE = 5e-3


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


CHATS = [
    _user("What is the capital of France?"),
    _user("Write a Python function that returns the n-th Fibonacci number."),
    _user("What is 17 + 25? Then multiply 12 by 340."),
    _user("List five fruits, one per line."),
    _user("Tell me a short story about a lighthouse keeper and a whale."),
    _user('Translate into French: "Good morning, my friend. Where is the station?"'),
    _user("Why is the sky blue? Explain it in two sentences."),
    [{"role": "system", "content": "You are a pirate."}, *_user("How do I cook rice?")],
    [
        *_user("My name is Ada and I was born in 1815."),
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        *_user("What is my name?"),
    ],
    _user("What do the emoji 🎉 and the word 你好 mean?"),
]

LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def metadata(gguf_path: Path) -> dict[str, Any]:
    """The key/value pairs of a GGUF."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(gguf_path).fields.items()}


def weights(gguf_path: Path) -> dict[str, np.ndarray]:
    """The tensors of a llama GGUF as float32, by HF's names and in HF's order of rows."""
    from gguf import GGUFReader, dequantize

    reader, values, tensors = GGUFReader(gguf_path), metadata(gguf_path), {}
    heads = {"attn_q": values["llama.attention.head_count"], "attn_k": values["llama.attention.head_count_kv"]}
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in outer:
            tensors[outer[tensor.name]] = value
            continue
        _, layer, part, kind = tensor.name.split(".")
        if part in heads:
            # The file interleaves the two halves of a head, which HF's rotation keeps apart.
            halves = value.reshape(heads[part], -1, 2, value.shape[-1])
            value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
        tensors[f"model.layers.{layer}.{LINEAR[part]}.{kind}"] = value
    return tensors


def config(gguf_path: Path) -> dict[str, Any]:
    """The keyword arguments of `LlamaConfig` for a llama GGUF with tied embeddings."""
    values = metadata(gguf_path)
    return {
        "vocab_size": len(values["tokenizer.ggml.tokens"]),
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": float(values["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(values["llama.rope.freq_base"])},
        "tie_word_embeddings": True,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
    }


def model(gguf_path: Path, attention: str = "eager") -> Any:
    """The GGUF as a transformers model in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    built = LlamaForCausalLM(LlamaConfig(**config(gguf_path), attn_implementation=attention)).float().eval()
    tensors = {name: torch.from_numpy(value) for name, value in weights(gguf_path).items()}
    missing, unexpected = built.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"the tensors do not fit the model: missing {missing}, unexpected {unexpected}")
    built.tie_weights()
    return built


def tokenizer(gguf_path: Path) -> Any:
    """The GGUF's tokenizer: byte-level BPE behind a splitter that makes every digit a word of its own (`smollm`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    values = metadata(gguf_path)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL]
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return built


def render(template: str, messages: list[dict[str, str]]) -> str:
    """A chat as the text that the model continues, rendered with the settings that transformers gives jinja2."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


def greedy(reference: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """`count` tokens after `prompt`, across any end of sequence, and each one's gap to the second best logit."""
    import torch
    from transformers import DynamicCache

    cache, tokens, gaps, said = DynamicCache(config=reference.config), prompt, [], []
    with torch.inference_mode():
        for _ in range(count):
            logits = reference(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0, -1]
            best = logits.topk(2)
            tokens = [int(best.indices[0])]
            said += tokens
            gaps.append(float(best.values[0] - best.values[1]))
    return said, gaps


def perplexity(reference: Any, ids: list[int]) -> float:
    """Over windows that don't overlap, each scored on its own, its first token unscored."""
    import torch

    total = 0.0
    windows = torch.tensor(ids).reshape(-1, WINDOW)
    with torch.inference_mode():
        for window in windows:
            scores = reference(window[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            total -= float(scores.gather(1, window[1:, None]).sum())
    return float(np.exp(total / (len(windows) * (WINDOW - 1))))


def sha256(ids: list[int]) -> str:
    """Of the ids as little-endian 32-bit integers."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()


def make(gguf_path: Path, stored_ids: list[int] | None) -> dict[str, Any]:
    """What is stored. `stored_ids`: the perplexity's token ids, where they are not to be taken from this Python."""
    import pydoc_data.topics

    import torch
    import transformers

    reference, words, template = model(gguf_path), tokenizer(gguf_path), metadata(gguf_path)["tokenizer.chat_template"]
    end = reference.config.eos_token_id
    chats = []
    for messages in CHATS:
        prompt = words.encode(render(template, messages)).ids
        said, gaps = greedy(reference, prompt, NEW_TOKENS)
        length = said.index(end) if end in said else None
        print(f"smallest gap {min(gaps):.3f}, ends after {length}: {words.decode(said[:length])!r}", file=sys.stderr)
        if min(gaps) < NEAR_TIE:
            raise SystemExit(f"two tokens are within {min(gaps):.1e}: {messages} needs another wording.")
        chats.append(
            {
                "messages": messages,
                "prompt_ids": prompt,
                "continuation_ids": said,
                "tokens_before_eos": length,
                "text": words.decode(said[:length]),
                "smallest_logit_gap": round(min(gaps), 5),
            }
        )
    text = "".join(pydoc_data.topics.topics[name] for name in TOPICS)
    ids = stored_ids or words.encode(text).ids[: WINDOW * WINDOWS]
    return {
        "gguf_sha256": hashlib.sha256(gguf_path.read_bytes()).hexdigest(),
        "made_with": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "chats": chats,
        "perplexity": {"value": perplexity(reference, ids), "window": WINDOW, "sha256": sha256(ids), "ids": ids},
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--check", action="store_true", help="compare with the stored file, write nothing")
    arguments = parser.parse_args()
    if not arguments.check:
        made = make(arguments.gguf, None)
        STORED.write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"perplexity {made['perplexity']['value']:.4f}; {STORED.stat().st_size} bytes")
        return 0
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    made = make(arguments.gguf, stored["perplexity"]["ids"])
    close = abs(made["perplexity"]["value"] / stored["perplexity"]["value"] - 1) < 1e-5
    said = [[chat["prompt_ids"], chat["continuation_ids"]] for chat in made["chats"]]
    same = said == [[chat["prompt_ids"], chat["continuation_ids"]] for chat in stored["chats"]]
    print(f"same continuations: {same}; same perplexity: {close}")
    return int(not (same and close and made["gguf_sha256"] == stored["gguf_sha256"]))


if __name__ == "__main__":
    sys.exit(main())
