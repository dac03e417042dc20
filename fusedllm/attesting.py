"""The server's face of attestation: who it is, in a quote that hardware signs. Loads no jax."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedllm import __version__
from fusedllm.errors import AttestationUnavailableError, SettingsError
from fusedllm.partition import tsm
from fusedllm.partition.attestation import parse_nonce, public_key_sha256, report_data
from fusedllm.partition.manifest import Manifest

if TYPE_CHECKING:
    from fusedllm.weights.checkpoint import Checkpoint

__all__ = ["Attester", "Manifest", "available", "manifest_of", "parse_nonce"]

available = tsm.available


def manifest_of(ckpt: str | Path | Checkpoint, policy: str = "plain", progress: bool = False) -> Manifest:
    """The manifest of a server that runs `ckpt` under `policy`; reads all of its weights once.

    `ckpt` is a name of `fusedllm models`, `hf:OWNER/NAME`, a path, or an open `Checkpoint`.

    Raises:
      SourceError, CheckpointError: as `load`.
    """
    from fusedllm.partition.measure import manifest_of as measured

    if isinstance(ckpt, (str, Path)):
        from fusedllm.weights.open import open_checkpoint
        from fusedllm.weights.registry import resolve

        ckpt = open_checkpoint(resolve(ckpt, progress=progress))
    return measured(ckpt, policy, __version__, progress)


class Attester:
    """Answers for one server: its manifest, the key of its certificate, and quotes that bind both to a nonce.

    Args:
      manifest: what the server runs; without one it vouches for nothing.
      certificate: its TLS certificate, PEM; `None` without TLS, and no channel is bound then.
      quote: makes a quote for 64 bytes; blocks.

    Raises:
      AttestationError: the certificate can't be read.
    """

    def __init__(
        self,
        manifest: Manifest | None,
        certificate: str | Path | None = None,
        quote: Callable[[bytes], tsm.Quote] = tsm.quote,
    ) -> None:
        self._manifest = manifest
        self._quote = quote
        # Read once, as the server reads it: a certificate that is renewed on disk is not yet the one that is served.
        self._key = None if certificate is None else public_key_sha256(_read(certificate))

    def attest(self, nonce: bytes) -> dict[str, Any]:
        """The answer of `/v1/attestation`; takes as long as the hardware does.

        Raises:
          AttestationUnavailableError: no hardware, no access to it, or no manifest.
          AttestationError: the hardware failed, or stayed busy.
        """
        if self._manifest is None:
            if not available():
                # Says what is missing.
                self._quote(bytes(64))
            raise AttestationUnavailableError(
                "this server was started without a manifest, so that it can vouch for nothing; start it without "
                "--no-attestation and with a checkpoint."
            )
        quote = self._quote(report_data(nonce, self._key, self._manifest.sha256))
        return {
            "nonce": nonce.hex(),
            "provider": quote.provider,
            "quote": base64.b64encode(quote.blob).decode("ascii"),
            "generation": quote.generation,
            "manifest": self._manifest.text,
            "tls_public_key_sha256": None if self._key is None else self._key.hex(),
            "channel_bound": self._key is not None,
        }


def _read(certificate: str | Path) -> bytes:
    try:
        return Path(certificate).read_bytes()
    except OSError as error:
        raise SettingsError(f"the certificate {certificate} can't be read: {error.strerror or error}.") from error
