"""Every exception a caller of fusedllm can catch; each message is one sentence for the user.

A message says what was asked, what was found and what to do. The command line prints it and exits with
`exit_code`; a traceback appears only with `--debug`.
"""

from __future__ import annotations


class FusedLLMError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 2


class ConfigError(FusedLLMError):
    """A model configuration is invalid, or contains mathematics that this package does not implement."""


class CheckpointError(FusedLLMError):
    """A checkpoint is missing, truncated, malformed, or does not hold the tensors that its configuration names."""


class QuantizationError(FusedLLMError, ValueError):
    """Weights can't be quantized (NaN, a scale beyond float16, ...), or a quantized table can't be read."""


class SourceError(FusedLLMError):
    """A named model can't be fetched: unknown name, no network, gated repository, checksum mismatch."""


class TokenizerError(FusedLLMError):
    """A tokenizer or chat template is missing, malformed, or of a kind that this package does not implement."""


class RequestError(FusedLLMError):
    """A generation request or a sampling parameter is out of range."""


class ContextLengthError(RequestError):
    """A prompt (with the tokens asked for) does not fit the context; the message carries both numbers."""


class QueueFullError(FusedLLMError):
    """As many requests wait as may wait; the message says how many. Try again later."""


class EngineStoppedError(FusedLLMError):
    """A request came to an engine that no longer takes any: it is draining, or its thread has ended."""


class SettingsError(FusedLLMError):
    """A setting of the server is out of range or contradicts another, or it can't listen where it was told to."""


class ImplementationError(FusedLLMError):
    """A kernel implementation was asked for that can't run on this backend; the message says why."""


class PolicyError(FusedLLMError):
    """A policy of the trust boundary is unknown, has no device to run on, or can't run with what else was asked for."""


class ShardingError(FusedLLMError):
    """A model can't be split over the mesh that was asked for: its sizes, its weights' layout, or the devices."""


class CompileForbiddenError(FusedLLMError):
    """Something compiled inside `forbid_compile()`; the message names the program and its shape."""


class BoundaryError(FusedLLMError):
    """The boundary between the trusted side and the device can't be crossed; nothing was sent under a used pad."""


class PadReuseError(BoundaryError):
    """A pad was about to hide a second message, or to leave the process that drew it; the message says which."""


class PadExhaustedError(BoundaryError):
    """There are not as many pads as a product needs, and none came in time; the message says how to have more."""


class IntegrityError(BoundaryError):
    """A product that came back from the device is not the one that was asked for; what it was part of ends."""


class AttestationUnavailableError(FusedLLMError):
    """There is nothing that could vouch for this process: no such hardware, no access to it, or no manifest."""


class AttestationError(FusedLLMError):
    """A quote could not be made, or what a server says of itself can't be read."""


class VerificationError(FusedLLMError):
    """Something that an attestation had to show did not hold, or could not be checked."""

    exit_code = 1
