"""What is served, and its tokenizer: /v1/models, /tokenize, /detokenize, /tokenizer_info, /version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from fusedllm import __version__
from fusedllm.errors import TokenizerError
from fusedllm.serve.documented import documented
from fusedllm.serve.errors import bad_request
from fusedllm.serve.prepare import INLINE_CHARACTERS, in_thread
from fusedllm.serve.responses import JSON
from fusedllm.serve.schemas_models import (
    DetokenizeBody,
    DetokenizeRequest,
    ModelBody,
    ModelsBody,
    TokenizeBody,
    TokenizeRequest,
    TokenizerInfoBody,
    VersionBody,
)
from fusedllm.serve.state import Server, ServerState, require_caller
from fusedllm.text.tokenizer import Tokenizer

router = APIRouter()
keyed = APIRouter(dependencies=[require_caller])


@keyed.get("/v1/models", responses=documented(ModelsBody))
async def list_models(server: Server) -> JSON:
    """The one model that is served."""
    return JSON({"object": "list", "data": [_describe(server)]})


@keyed.get("/v1/models/{name:path}", responses=documented(ModelBody))
async def show_model(name: str, server: Server) -> JSON:
    """A model by its name."""
    server.check_model(name)
    return JSON(_describe(server))


@keyed.post("/tokenize", responses=documented(TokenizeBody))
async def tokenize(body: TokenizeRequest, server: Server) -> JSON:
    """Token ids of a text, or of a conversation as the model would read it."""
    server.check_model(body.model)
    tokenizer = _tokenizer(server)
    prompt, messages = body.prompt, body.messages or []

    def encode() -> list[int]:
        if prompt is not None:
            return tokenizer.encode(prompt, add_special=body.add_special_tokens is not False)
        begin_answer = body.add_generation_prompt is not False
        return server.llm.render([message.for_template for message in messages], add_generation_prompt=begin_answer)

    def answer() -> JSON:
        tokens = encode()
        texts = [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        context = server.llm.engine.config.max_context
        return JSON({"count": len(tokens), "max_model_len": context, "tokens": tokens, "token_strs": texts})

    size = len(prompt or "") + sum(len(message.content) for message in messages)
    return await in_thread(answer, quick=size <= INLINE_CHARACTERS)


@keyed.post("/detokenize", responses=documented(DetokenizeBody))
async def detokenize(body: DetokenizeRequest, server: Server) -> JSON:
    """The text of token ids, special tokens included: what `/tokenize` would make these ids of."""
    server.check_model(body.model)
    tokenizer, vocab = _tokenizer(server), server.llm.config.vocab_size
    if body.tokens and max(body.tokens) >= vocab:
        raise bad_request(f"tokens names token {max(body.tokens)}, the vocabulary has {vocab}.", "tokens")

    def decode() -> str:
        return tokenizer.decode(body.tokens, skip_special_tokens=False)

    return JSON({"prompt": await in_thread(decode, quick=len(body.tokens) <= INLINE_CHARACTERS)})


@keyed.get("/tokenizer_info", responses=documented(TokenizerInfoBody))
async def tokenizer_info(server: Server) -> JSON:
    """What a client needs to prepare prompts itself: special tokens and the chat template."""
    tokenizer = _tokenizer(server)
    data = tokenizer.data
    return JSON(
        {
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": server.llm.engine.config.max_context,
            "add_bos_token": data.add_bos,
            "bos_token": data.bos_token,
            "eos_token": data.eos_token,
            "pad_token": data.special_tokens.get("pad_token"),
            "unk_token": data.special_tokens.get("unk_token"),
            "chat_template": data.chat_template,
        }
    )


@router.get("/version", responses={200: {"model": VersionBody}})
async def version() -> JSON:
    """The server's version; no secret."""
    return JSON({"version": __version__})


router.include_router(keyed)


def _describe(server: ServerState) -> dict[str, Any]:
    return {
        "id": server.model_name,
        "object": "model",
        "created": server.created,
        "owned_by": "fusedllm",
        "max_model_len": server.llm.engine.config.max_context,
    }


def _tokenizer(server: ServerState) -> Tokenizer:
    tokenizer = server.llm.tokenizer
    if tokenizer is None:
        raise TokenizerError("this checkpoint has no tokenizer, so there is only /v1/completions with token ids.")
    return tokenizer
