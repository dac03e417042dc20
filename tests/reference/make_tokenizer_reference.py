"""Makes `tests/data/text/*.json`: ids from llama.cpp, and prompts from Hugging Face's `apply_chat_template`.

Run from the root of the tree, with the extra `reference` installed:

    python tests/reference/make_tokenizer_reference.py --smollm2 PATH_OF_THE_GGUF
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from text_corpus import chunks  # noqa: E402
from text_reference import CHAT_CASES, DATA, PLAIN_CHAT_CASES, SPECIAL, ChatCase, digests, tiny_metadata  # noqa: E402

from fusedllm.text.pretokenizers import PRE_TOKENIZERS  # noqa: E402
from fusedllm.text.special import SPACE_MARK  # noqa: E402

# Where `vocab_only` stands in `struct llama_model_params` of llama.h, and more than that struct takes.
_VOCAB_ONLY, _PARAMS_SIZE = 72, 512


class LlamaCpp:
    """The tokenizer of a GGUF in llama.cpp, through the C interface of the library inside `xllamacpp`."""

    def __init__(self, path: str | Path):
        xllamacpp: Any = importlib.import_module("xllamacpp.xllamacpp")

        class Params(ctypes.Structure):
            _fields_ = (("bytes", ctypes.c_ubyte * _PARAMS_SIZE),)

        library = ctypes.CDLL(xllamacpp.__file__)
        library.llama_model_default_params.restype = Params
        library.llama_model_load_from_file.restype = ctypes.c_void_p
        library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
        library.llama_model_get_vocab.restype = ctypes.c_void_p
        library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        library.llama_tokenize.argtypes = [
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)),
            *(ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
        ]
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        library.llama_log_set(self._silence, None)
        params = library.llama_model_default_params()
        params.bytes[_VOCAB_ONLY] = 1
        model = library.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise RuntimeError(f"llama.cpp can't load {path}")
        self._library, self._vocab = library, library.llama_model_get_vocab(model)

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocab, data, len(data), ids, len(ids), True, parse_special)
        if count < 0:
            raise RuntimeError("llama.cpp can't tokenize this text")
        return ids[:count]


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def train_tiny() -> dict[str, Any]:
    """Two vocabularies of a few hundred tokens, trained on the corpus."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from fusedllm.text.pieces import BYTE_LEVEL_ALPHABET

    texts = chunks()

    def merges(pre_tokenizer: Any, alphabet: Sequence[str], count: int) -> tuple[list[str], list[str]]:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=count,
            initial_alphabet=list(alphabet),
            limit_alphabet=max(len(alphabet), 90),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        vocabulary = tokenizer.get_vocab()
        lines = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
        return sorted(vocabulary, key=vocabulary.__getitem__), lines

    # Without a few bytes, as real vocabularies are: nothing may merge across them.
    missing = set("\u010b\xf1\xf2")
    alphabet = sorted(set(BYTE_LEVEL_ALPHABET) - missing)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens, lines = merges(whole, alphabet, 700)
    lines = [line for line in lines if not missing & set(line)]
    tokens = [token for token in tokens if not missing & set(token) and token not in SPECIAL]
    pieces, _ = merges(pre_tokenizers.Metaspace(prepend_scheme="never", split=False), [SPACE_MARK], 600)
    return {"bpe": {"tokens": [*SPECIAL, *tokens], "merges": lines}, "spm": {"pieces": pieces}}


def apply_chat_template(case: ChatCase) -> str:
    from tokenizers import Tokenizer, models

    transformers: Any = importlib.import_module("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    variables = {"add_generation_prompt": True, **case.variables}
    return str(tokenizer.apply_chat_template(case.messages, chat_template=case.template, tokenize=False, **variables))


def chat_cases() -> list[str]:
    return [apply_chat_template(case) for case in CHAT_CASES]


def smollm2_chat_cases(path: Path) -> list[str]:
    """The conversations rendered with the template that the GGUF carries."""
    import gguf

    template = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
    return [apply_chat_template(dataclasses.replace(case, template=template)) for case in PLAIN_CHAT_CASES]


def ids_of_all(smollm2: Path, tiny: dict[str, Any]) -> dict[str, Any]:
    texts = chunks()

    def both(encode: Callable[..., list[int]]) -> list[str]:
        return [digests([encode(text, flag) for text in texts]) for flag in (True, False)]

    made: dict[str, Any] = {"smollm2": both(LlamaCpp(smollm2).encode)}
    with tempfile.TemporaryDirectory() as folder:
        for name in [*(f"bpe:{pre}" for pre in PRE_TOKENIZERS), "spm:prefix", "spm:plain"]:
            path = Path(folder) / "tiny.gguf"
            write_gguf(path, tiny_metadata(tiny, name))
            made[name] = both(LlamaCpp(path).encode)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, required=True)
    arguments = parser.parse_args()
    tiny = train_tiny()
    files: dict[str, Any] = {
        "tiny_vocabularies": tiny,
        "digests": ids_of_all(arguments.smollm2, tiny),
        "chat": chat_cases(),
    }
    files["digests"]["smollm2_chat"] = digests([list(text.encode()) for text in smollm2_chat_cases(arguments.smollm2)])
    DATA.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (DATA / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
