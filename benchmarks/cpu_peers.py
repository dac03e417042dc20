"""The peers of the CPU's benchmarks: llama.cpp through its C interface, and HF transformers.

    python benchmarks/cpu_peers.py LIBRARY MODEL.gguf [TOKEN ...]     loads, and prints the token after these

llama.cpp's Python packages cost it up to a quarter of its decode speed, so their shared library is called directly. Its
parameters are structures passed by value whose layout changes between versions. Their first fields do not, the default
values tell where the others are, and what was set is read back, so that one program serves the versions around today's.

Nothing heavy is imported here: a process that has this file for its program shows how fast llama.cpp starts.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import memory, seconds

DECODE_TOKENS = 64
# Steps that are run before a decode is timed: the first after a prefill rearranges what the prefill has left.
WARM_STEPS = 2
# llama.cpp's own default; a prompt that is longer comes in parts.
BATCH_TOKENS = 2048


def prompts(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    """Token ids that are the same on all sides; what they say changes no time."""
    return np.random.RandomState(length).randint(0, vocab_size, (batch, length)).tolist()


def libraries() -> list[str]:
    """llama.cpp's shared libraries in this environment: the one of `llama-cpp-python`, the one of `xllamacpp`."""
    found = []
    for package, pattern in (("llama_cpp", "lib/libllama.*"), ("xllamacpp", "xllamacpp*.so")):
        spec = importlib.util.find_spec(package)
        for directory in (spec.submodule_search_locations or []) if spec else []:
            found += [str(path) for path in Path(directory).glob(pattern) if path.suffix in (".so", ".dylib")][:1]
    return found


def package(library: str) -> str:
    """The Python package that a library belongs to, with its version where both are found."""
    known = {"llama_cpp": "llama-cpp-python", "xllamacpp": "xllamacpp"}
    name = next((name for part, name in known.items() if part in library), "another build")
    for directory in Path(library).absolute().parents:
        for found in directory.glob(f"{name.replace('-', '_')}-*.dist-info"):
            return f"{name} {found.stem.rpartition('-')[2]}"
    return name


class _Parameters(ctypes.Structure):
    """Any parameter structure, and room behind it: by value, what is larger than its callee expects does no harm."""

    _fields_ = (("words", ctypes.c_int32 * 256),)


class _Batch(ctypes.Structure):
    """`llama_batch`: what is given to one `llama_decode`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


# Functions that don't return an int32, and arguments that ctypes must not take for int32.
_POINTER = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _Parameters)),
    "llama_init_from_model": (_POINTER, (_POINTER, _Parameters)),
    "llama_set_n_threads": (None, (_POINTER, ctypes.c_int32, ctypes.c_int32)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_decode": (ctypes.c_int32, (_POINTER, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_POINTER,)),
    "llama_log_set": (None, (_POINTER, _POINTER)),
    "llama_print_system_info": (ctypes.c_char_p, ()),
    **{f"llama_{name}": (ctypes.c_uint32, (_POINTER,)) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")},
}
_SIZES = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")  # The structure begins with these, in this order.


class LlamaCpp:
    """A GGUF file in llama.cpp, with a context for one sequence and, once asked for, one for a batch of them."""

    def __init__(self, library: str, path: str, threads: int, context: int, flash: bool | None = None) -> None:
        self._lib = _open(library)
        self._threads, self._context, self._flash = threads, context, flash
        self._model = self._lib.llama_model_load_from_file(path.encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp could not load {path}.")
        self.vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._contexts: dict[int, int] = {}

    def prefill(self, tokens: int) -> float:
        """Tokens a second of a prompt, its first token's choice included."""
        (ids,) = prompts(self.vocab_size, 1, tokens)
        return tokens / seconds(lambda: self._start([ids]).argmax(-1))

    def decode(self, context: int, batch: int = 1) -> float:
        """Tokens a second of `DECODE_TOKENS` greedy steps, `batch` sequences with prompts of their own together."""
        requests = prompts(self.vocab_size, batch, context)
        last = self._start(requests).argmax(-1)
        for step in range(WARM_STEPS):
            last = self._step(last, context + step).argmax(-1)

        def loop() -> None:
            token = last
            for step in range(DECODE_TOKENS):
                token = self._step(token, context + WARM_STEPS + step).argmax(-1)

        return batch * DECODE_TOKENS / seconds(loop)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` most likely tokens after `ids`, one after the other."""
        tokens = [int(self._start([ids]).argmax())]
        while len(tokens) < count:
            tokens.append(int(self._step(np.asarray(tokens[-1:]), len(ids) + len(tokens) - 1).argmax()))
        return tokens

    def save_logits(self, ids: list[int], path: str) -> None:
        """Writes the logits after each token of `ids`, float32 `[seq, vocab]`, as a NumPy file."""
        context = self._clear(1)
        positions = np.arange(len(ids))
        np.save(path, self._decode(context, ids, positions, np.zeros_like(positions), np.ones_like(positions)))

    def memory(self) -> dict[str, int]:
        """This process's memory in bytes, after a generation."""
        self.decode(16)
        return memory()

    def system(self) -> str:
        """What the library says of its variants."""
        text: bytes = self._lib.llama_print_system_info()
        return text.decode()

    def _clear(self, batch: int) -> int:
        """The context for `batch` sequences, made on first use, empty."""
        if batch not in self._contexts:
            self._contexts[batch] = self._make_context(batch)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._contexts[batch]), False)
        return self._contexts[batch]

    def _make_context(self, batch: int) -> int:
        parameters = self._lib.llama_context_default_params()
        # A batch has short prompts only; each sequence gets its own part of the cache.
        context = self._context if batch == 1 else batch * 256
        parameters.words[0], parameters.words[1], parameters.words[3] = context, BATCH_TOKENS, batch
        if self._flash is not None:
            parameters.words[_flash_word(parameters.words)] = int(self._flash)
        made = self._lib.llama_init_from_model(self._model, parameters)
        if not made:
            raise SystemExit("llama.cpp could not make a context.")
        self._lib.llama_set_n_threads(made, self._threads, self._threads)
        sizes = {name: getattr(self._lib, f"llama_{name}")(made) for name in _SIZES}
        if sizes["n_ctx"] < context or sizes["n_batch"] < min(context, BATCH_TOKENS) or sizes["n_seq_max"] != batch:
            raise SystemExit(f"llama.cpp has taken other sizes than it was given: {sizes}. Is its interface a new one?")
        return int(made)

    def _start(self, requests: Sequence[Sequence[int]]) -> np.ndarray:
        """Prefills each prompt as a sequence; logits after the last token of each, `[batch, vocab]`."""
        context, length = self._clear(len(requests)), len(requests[0])
        ids = np.concatenate(requests)
        positions = np.tile(np.arange(length), len(requests))
        return self._decode(
            context, ids, positions, np.repeat(np.arange(len(requests)), length), positions == length - 1
        )

    def _step(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """One more token for each sequence; the next logits, `[batch, vocab]`."""
        batch = len(tokens)
        return self._decode(self._contexts[batch], tokens, np.full(batch, position), np.arange(batch), np.ones(batch))

    def _decode(self, context: int, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> np.ndarray:
        """`llama_decode`; a view of the wanted logits, which the next call overwrites."""
        count = len(tokens)
        token, position, sequence = (np.ascontiguousarray(x, np.int32) for x in (tokens, positions, sequences))
        ones, output = np.ones(count, np.int32), np.ascontiguousarray(wanted, np.int8)
        pointers = (sequence.ctypes.data + 4 * np.arange(count)).astype(np.uintp)
        arrays = (token, None, position, ones, pointers, output)
        rows = 0
        for start in range(0, count, BATCH_TOKENS):
            addresses = [None if x is None else x.ctypes.data + start * x.itemsize for x in arrays]
            part = min(BATCH_TOKENS, count - start)
            if self._lib.llama_decode(context, _Batch(part, *addresses)) != 0:
                raise SystemExit("llama_decode has failed.")
            rows = int(output[start : start + part].sum())
        return np.ctypeslib.as_array(self._lib.llama_get_logits(context), (rows, self.vocab_size))


def _flash_word(words: Sequence[int]) -> int:
    """Where `flash_attn_type` is: behind 4 and 4 threads come several enumerations, four of them -1, this the last."""
    threads = next((at for at in range(4, 12) if words[at] == words[at + 1] == 4), None)
    for at in range(threads + 2, threads + 5) if threads else ():
        if [words[at + offset] for offset in range(5)] == [-1, -1, -1, -1, 0]:
            return at + 3
    raise SystemExit("this version of llama.cpp has other parameters than are known here; try without --flash.")


def _open(library: str) -> Any:
    """The library with its signatures, its messages off."""
    lib = ctypes.CDLL(library)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    lib.silent = silent  # Kept alive as long as the library calls it.
    lib.llama_log_set(ctypes.cast(silent, ctypes.c_void_p), None)
    lib.llama_backend_init()
    return lib


class Transformers:
    """HF transformers: one forward pass with a key/value cache, then a greedy loop on it."""

    def __init__(self, exported: str, threads: int, dtype: str = "bfloat16") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(exported, dtype=getattr(torch, dtype)).eval()

    def prefill(self, tokens: int) -> float:
        """Tokens a second of a prompt, its first token's choice included."""
        return tokens / seconds(lambda: self._forward(self._prompt(tokens), None))

    def decode(self, context: int, batch: int = 1) -> float:
        """Tokens a second of `DECODE_TOKENS` greedy steps."""
        token, cache = self._forward(self._prompt(context, batch), None)

        def loop() -> None:
            last = token
            for _ in range(DECODE_TOKENS):
                last, _ = self._forward(last, cache)
                last.tolist()  # As a caller who watches for the end of the text must.

        return batch * DECODE_TOKENS / seconds(loop)

    def memory(self) -> dict[str, int]:
        """This process's memory in bytes, after a generation."""
        self.decode(16)
        return memory()

    def _prompt(self, length: int, batch: int = 1) -> Any:
        return self._torch.tensor(prompts(self._model.config.vocab_size, batch, length))

    def _forward(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


def main() -> None:
    """The command."""
    library, path, threads, *ids = sys.argv[1:]
    print(LlamaCpp(library, path, int(threads), context=4096).greedy([int(token) for token in ids], 1)[0], flush=True)


if __name__ == "__main__":
    main()
