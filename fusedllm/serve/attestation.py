"""`/v1/attestation`: a quote of the hardware that binds a client's nonce to this server's key and manifest."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel

from fusedllm.attesting import Attester, parse_nonce
from fusedllm.serve.auth import too_many
from fusedllm.serve.documented import documented
from fusedllm.serve.errors import UNAVAILABLE, APIError
from fusedllm.serve.keys import Rates
from fusedllm.serve.responses import JSON
from fusedllm.serve.schemas_completions import ErrorBody
from fusedllm.serve.state import Caller, Server

# A client asks once a connection, and hypervisors throttle quotes themselves.
QUOTES_PER_MINUTE = 30

# Quotes are made one after the other; a place in the queue is some seconds at worst.
MAX_WAITING = 16

router = APIRouter()


class AttestationBody(BaseModel):
    """What a verifier needs; docs/attestation.md says what each field is for."""

    nonce: str
    provider: str
    quote: str
    generation: int
    manifest: str
    tls_public_key_sha256: str | None
    channel_bound: bool


class Quoting:
    """Lets one quote be made at a time, in a thread, and each caller have so many a minute.

    Not for several threads: the event loop's alone.
    """

    def __init__(self, attester: Attester) -> None:
        self._attester = attester
        self._rates = Rates(QUOTES_PER_MINUTE)
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def attest(self, caller: str, nonce: bytes) -> dict[str, Any]:
        """The answer for a caller.

        Raises:
          APIError: 429 for a caller who asks too often, 503 where too many wait.
          AttestationUnavailableError, AttestationError: as `Attester.attest`.
        """
        seconds = self._rates.admit(caller)
        if seconds:
            refusal = too_many(seconds, QUOTES_PER_MINUTE)
            raise APIError(
                refusal.status, refusal.message, refusal.type, code=refusal.code, headers=dict(refusal.headers)
            )
        if self._waiting >= MAX_WAITING:
            raise APIError(
                503, f"{MAX_WAITING} others wait for a quote; try again.", UNAVAILABLE, headers={"Retry-After": "1"}
            )
        self._waiting += 1
        try:
            async with self._turn:
                # A client that leaves must not let the next one into the device while this thread is still there.
                return await _to_the_end(asyncio.to_thread(self._attester.attest, nonce))
        finally:
            self._waiting -= 1


@router.get(
    "/v1/attestation",
    responses=documented(AttestationBody)
    | {501: {"model": ErrorBody, "description": "This server can't be attested; the message says why."}},
)
async def attestation(server: Server, key: Caller, nonce: Annotated[str, Query()]) -> JSON:
    """A quote for a nonce of 16 to 64 random bytes in hexadecimal."""
    return JSON(await server.quoting.attest(key, parse_nonce(nonce)))


async def _to_the_end(work: Any) -> Any:
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
