"""Rotary settings as HF writes them, in both styles, and back."""

from __future__ import annotations

import math
from typing import Any, get_args

from fusedllm.config import RopeConfig, RopeKind
from fusedllm.errors import ConfigError
from fusedllm.model.attributes import Attributes, shortened

# What each kind of scaling reads besides theta and its own name; `truncate` is the only one that is not a number.
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}
_REQUIRED = {"linear": ("factor",), "llama3": _KEYS["llama3"]}


def rope_from_hf(attributes: Attributes, max_position: int) -> RopeConfig:
    """The rotary embedding that a config.json asks for; takes its attributes out of `attributes`.

    Raises:
      ConfigError: an unknown kind of scaling, a value of the wrong type, or a setting that is not understood.
    """
    # A base of one or less would rotate every pair at the same speed, or faster and faster: no such model exists.
    theta = attributes.number("rope_theta", 10_000.0, above=1)
    original = attributes.integer("original_max_position_embeddings", None)
    scaling = attributes.raw("rope_scaling", {})
    parameters = attributes.raw("rope_parameters", {})
    if scaling != {} and parameters != {} and scaling != parameters:
        raise ConfigError(f"'rope_scaling' and 'rope_parameters' in {attributes.what} contradict each other.")
    rope = Attributes(
        parameters if scaling == {} else scaling, "'rope_parameters'" if scaling == {} else "'rope_scaling'"
    )
    older = rope.string("type", "default")
    kind = rope.string("rope_type", older)
    if kind not in get_args(RopeKind):
        known = ", ".join(get_args(RopeKind))
        raise ConfigError(f"the rope type {shortened(kind)} in {rope.what} is not implemented; known are: {known}.")
    values: dict[str, Any] = {"kind": kind, "theta": rope.number("rope_theta", theta, above=1)}
    for name in _KEYS[kind]:
        values[name] = rope.number(name, None, above=-math.inf if name.startswith("mscale") else 0)
        if values[name] is None and name in _REQUIRED.get(kind, ()):
            raise ConfigError(f"{rope.what} asks for {kind} scaling without {name!r}.")
    if kind in ("llama3", "yarn"):
        # transformers lets the outer attribute win, and takes the whole context where neither is written.
        inner = rope.integer("original_max_position_embeddings", max_position)
        values["original_max_position"] = inner if original is None else original
    if kind == "yarn":
        values["truncate"] = rope.boolean("truncate", True)
        if values["factor"] is None:
            values["factor"] = max_position / values["original_max_position"]
    rope.expect("partial_rotary_factor", 1)
    rope.drop(frozenset({"finetuned"}))
    rope.finish()
    # Absent numbers take RopeConfig's defaults, which are transformers' (beta_fast 32, beta_slow 1, no mscale).
    return RopeConfig(**{name: value for name, value in values.items() if value is not None})


def rope_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    """The value of `rope_scaling`; `None` for plain rotation. `rope_theta` stands beside it, not in it."""
    if rope.kind == "default":
        return None
    data: dict[str, Any] = {"rope_type": rope.kind}
    for name in _KEYS[rope.kind]:
        value = getattr(rope, name)
        if value is not None:
            data[name] = value
    if rope.kind in ("llama3", "yarn"):
        data["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "yarn" and not rope.truncate:
        data["truncate"] = False
    return data
