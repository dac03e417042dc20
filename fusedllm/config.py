"""Frozen descriptions of a model, of its rotary embedding and of a sampling request, validated once, here.

Nothing in this file imports jax: the command line reads it before any backend is chosen.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, cast

from fusedllm.errors import ConfigError, RequestError

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) and how it is stretched past the trained length.

    `linear` divides positions by `factor` (arXiv:2306.15595); `llama3` is Llama 3.1's frequency-dependent scaling;
    `yarn` is arXiv:2309.00071. `original_max_position` is the context length that the model was trained with, in
    tokens. `attention_factor` multiplies cos and sin; `None` means YaRN's own `0.1 ln(factor) + 1`.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _require(self.theta > 0, "rope theta", self.theta, "a positive number")
        _require(
            self.kind in ("default", "linear", "llama3", "yarn"),
            "rope kind",
            self.kind,
            "default, linear, llama3 or yarn",
        )
        _require(self.factor > 0, "rope factor", self.factor, "a positive number")
        if self.kind in ("llama3", "yarn"):
            _require(
                self.original_max_position is not None and self.original_max_position > 0,
                f"original_max_position of {self.kind} rope scaling",
                self.original_max_position,
                "a positive number of tokens",
            )
        if self.kind == "llama3":
            _require(
                self.high_freq_factor > self.low_freq_factor,
                "llama3 rope high_freq_factor",
                self.high_freq_factor,
                f"more than low_freq_factor ({self.low_freq_factor})",
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and the mathematics of one LLaMA-family model. Sizes are counts of elements, lengths are tokens.

    `sliding_windows` has one entry per layer: how many of the latest positions (the own one included) a query may
    attend to, or `None` for all of them. `attention_bias` adds a bias to q, k and v; `attention_output_bias` to o;
    `mlp_bias` to gate, up and down. `qk_norm` puts an RMS norm over head_dim on q and k before the rotation.

    Raises:
      ConfigError: a size that is not positive, heads that do not divide, a window list of the wrong length.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and not isinstance(value, bool) and value > 0, name, value, "a positive integer"
            )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            self.num_heads,
            f"a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary embedding rotates pairs)")
        _require(0 < self.rms_norm_eps < 1, "rms_norm_eps", self.rms_norm_eps, "between 0 and 1")
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        _require(
            len(self.sliding_windows) == self.num_layers,
            "sliding_windows",
            f"{len(self.sliding_windows)} entries",
            f"one entry for each of the {self.num_layers} layers",
        )
        for window in self.sliding_windows:
            _require(
                window is None or (isinstance(window, int) and window > 0),
                "a sliding window",
                window,
                "a positive number of tokens",
            )
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            _require(
                0 <= token < self.vocab_size, "a special token id", token, f"inside the vocabulary of {self.vocab_size}"
            )

    @property
    def num_parameters(self) -> int:
        """How many weights the model has (tied embeddings counted once)."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        layer += self.attention_bias * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        layer += self.attention_output_bias * self.hidden_size
        layer += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        layer += self.qk_norm * 2 * self.head_dim
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + vocabulary + self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The configuration that `to_dict` wrote.

        Raises:
          ConfigError: an unknown or missing key, or a value of the wrong kind.
        """
        try:
            values = dict(data)
            values["rope"] = RopeConfig(**values["rope"])
            values["sliding_windows"] = tuple(values["sliding_windows"])
            values["eos_token_ids"] = tuple(values["eos_token_ids"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the model configuration can't be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn, and when a request ends. `temperature=0` is greedy.

    The filters are applied in this order: logit bias, repetition penalty (arXiv:1909.05858; prompt and output),
    presence and frequency penalties (output only), temperature, `top_k` (0 keeps all), `top_p` (arXiv:1904.09751),
    `min_p` (arXiv:2407.01082). `logprobs` are of the model's own distribution, before any of them: `None` returns
    none, `0` the chosen token's, `n` also those of the `n` most likely tokens. `seed=None` draws a fresh seed.

    Raises:
      RequestError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    MAX_LOGPROBS = 20
    MAX_LOGIT_BIAS = 300
    # Far beyond any difference of logits, and far from the end of float32.
    MAX_BIAS = 1_000_000
    MAX_STOP_TOKEN_IDS = 16

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, kind, wanted in (("stop", str, "texts"), ("stop_token_ids", Integral, "token ids")):
            value = getattr(self, name)
            _ask(
                isinstance(value, Sequence)
                and all(isinstance(item, kind) and not isinstance(item, bool) for item in value),
                name,
                value,
                f"a list of {wanted}",
            )
            object.__setattr__(self, name, tuple(value))
        number = self._number
        number("temperature", 0, 100)
        number("top_p", 0, 1, open_low=True)
        number("min_p", 0, 1)
        number("repetition_penalty", 0, 100, open_low=True)
        number("presence_penalty", -100, 100)
        number("frequency_penalty", -100, 100)
        number("top_k", 0, 2**31 - 1, integer=True)
        number("max_tokens", 1, 2**31 - 1, integer=True)
        if self.seed is not None:
            number("seed", -(2**63), 2**64 - 1, integer=True)
        if self.logprobs is not None:
            number("logprobs", 0, self.MAX_LOGPROBS, integer=True)
        _ask(all(self.stop), "stop", self.stop, "strings that are not empty")
        _ask(
            len(self.stop_token_ids) <= self.MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"{len(self.stop_token_ids)} ids",
            f"at most {self.MAX_STOP_TOKEN_IDS}",
        )
        _ask(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a mapping from token id to bias")
        _ask(
            len(self.logit_bias) <= self.MAX_LOGIT_BIAS,
            "logit_bias",
            f"{len(self.logit_bias)} entries",
            f"at most {self.MAX_LOGIT_BIAS}",
        )
        try:
            bias = {operator.index(token): float(value) for token, value in self.logit_bias.items()}
        except (TypeError, ValueError):
            raise RequestError(f"logit_bias must map token ids to numbers, got {dict(self.logit_bias)!r}.") from None
        fits = all(abs(value) <= self.MAX_BIAS for value in bias.values())
        _ask(fits, "logit_bias", bias, f"biases from -{self.MAX_BIAS} to {self.MAX_BIAS}")
        object.__setattr__(self, "logit_bias", bias)

    @property
    def has_penalties(self) -> bool:
        """Whether what was generated before changes the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _number(self, name: str, low: float, high: float, *, open_low: bool = False, integer: bool = False) -> None:
        value = getattr(self, name)
        fits = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
        fits = fits and (low < value if open_low else low <= value) and value <= high
        kind = "an integer" if integer else "a number"
        _ask(fits, name, value, f"{kind} {'above' if open_low else 'from'} {low} {'up ' if open_low else ''}to {high}")


class Sampler(enum.IntEnum):
    """How much of sampling a program has; what a smaller one can do, a larger one does with the same tokens.

    Where a branch asks the host, as on a GPU, a program without branches is worth its compilation.
    """

    UNFILTERED = 0
    """The likeliest token, or one drawn by temperature alone."""
    FILTERED = 1
    """Also top-k, top-p and min-p."""
    FULL = 2
    """Also biases, penalties, grammars and log-probabilities; what no row asks for is branched around."""

    @classmethod
    def of(cls, sampling: SamplingParams, constrained: bool = False) -> Sampler:
        """The smallest one for a request; `constrained` says that it follows a grammar."""
        if constrained or sampling.has_penalties or sampling.logit_bias or sampling.logprobs is not None:
            return cls.FULL
        filters = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        return cls.FILTERED if filters and sampling.temperature > 0 else cls.UNFILTERED


def sampling_from_keywords(sampling: SamplingParams | None, keywords: Mapping[str, Any]) -> SamplingParams:
    """`sampling`, or the defaults, with `keywords` replaced in it.

    Raises:
      RequestError: a keyword that is not a sampling parameter, or a value outside its range.
    """
    known = {f.name for f in dataclasses.fields(SamplingParams)}
    unknown = sorted(set(keywords) - known)
    if unknown:
        raise RequestError(f"unknown sampling parameter {unknown[0]!r}; known are: {', '.join(sorted(known))}.")
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling must be a SamplingParams, got {sampling!r}; single parameters go by keyword.")
    return dataclasses.replace(sampling or SamplingParams(), **cast("dict[str, Any]", dict(keywords)))


def _require(holds: bool, what: str, found: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{what} must be {wanted}, got {found!r}.")


def _ask(holds: bool, what: str, found: object, wanted: str) -> None:
    if not holds:
        raise RequestError(f"{what} must be {wanted}, got {found!r}.")
