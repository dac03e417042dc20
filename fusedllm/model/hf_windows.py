"""Which layers have a sliding window, as the HF class of each family decides it."""

from __future__ import annotations

from typing import Literal

from fusedllm.errors import ConfigError
from fusedllm.model.attributes import Attributes, shortened

WindowKind = Literal["none", "all", "layers"]

LAYER_TYPES = {False: "full_attention", True: "sliding_attention"}

# What transformers assumes where a Mistral or Qwen config is silent.
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28


def windows_from_hf(
    attributes: Attributes, kind: WindowKind, num_layers: int, *, silent: bool
) -> tuple[int | None, ...]:
    """Each layer's window in tokens, or `None`; takes its attributes out of `attributes`.

    `silent` says that `sliding_window` is not in the config: only then does the class's own window hold, a written
    null means none.

    Raises:
      ConfigError: a value of the wrong type, or windows that the family does not have.
    """
    use = attributes.boolean("use_sliding_window", False) if kind == "layers" else kind == "all"
    window = None
    if kind == "none":
        attributes.expect("sliding_window")
    else:
        # Qwen's configs carry a window that is not in use, sometimes zero.
        written = attributes.integer("sliding_window", _DEFAULT_WINDOW if silent else None, low=1 if use else 0)
        window = written if use else None
    attributes.expect("use_sliding_window", window is not None)
    first = attributes.integer("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS, low=0)
    start = first if kind == "layers" else 0
    windows = tuple(window if index >= start else None for index in range(num_layers))
    types = attributes.raw("layer_types")
    if types is None:
        return windows
    if not isinstance(types, list) or len(types) != num_layers or not all(one in LAYER_TYPES.values() for one in types):
        raise ConfigError(
            f"'layer_types' in {attributes.what} must name 'full_attention' or 'sliding_attention' for each of the "
            f"{num_layers} layers, got {shortened(types)}."
        )
    if window is None and "sliding_attention" in types:
        raise ConfigError(f"'layer_types' in {attributes.what} asks for 'sliding_attention', but no window is set.")
    if kind == "all" and window is not None and "full_attention" in types:
        raise ConfigError(
            f"'layer_types' in {attributes.what} gives some layers full attention beside a 'sliding_window'; this "
            "family has one window for all layers."
        )
    return tuple(window if one == "sliding_attention" else None for one in types)
