"""What compressed-tensors says about its codes: the `quantization_config` of a `config.json`, read and written.

`config_groups` are the schemes, each with the modules that it is for: by name, by a pattern after `re:`, or by class.
Learnt from https://github.com/vllm-project/compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedllm.errors import CheckpointError, ConfigError, QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.model.attributes import Attributes, shortened
from fusedllm.quant.schemes import scheme_of

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
# Where a code is an element of its own: they differ in what is done to activations, and not in how weights are stored.
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
MIXED = "mixed-precision"
EMBEDDING = "model.embed_tokens"

# What the file itself shows (which modules are quantized), names of versions, and how to run elsewhere.
_NEUTRAL_NAMES = """
ignore quantization_status version global_compression_ratio run_compressed dequantize use_optimized_inference
"""
_NEUTRAL = frozenset(_NEUTRAL_NAMES.split())
_NEUTRAL_ARGUMENTS = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
# A stranger's pattern must not take forever: those that do repeat a group, or repeat much on a long name.
_MAX_PATTERN, _MAX_REPEATS, _MAX_NAME = 300, 4, 100


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of `config_groups`: the modules it is for, how their codes lie, and what they mean."""

    name: str
    targets: tuple[str, ...]
    packed: bool
    strategy: str
    scheme: GroupedScheme


def groups_of(quantization: Mapping[str, Any]) -> list[Group]:
    """The groups of a `quantization_config`.

    Raises:
      ConfigError: it asks for something that is not implemented; it is named.
    """
    attributes = Attributes(quantization, "the quantization_config")
    attributes.expect("quant_method", METHOD)
    for name in ("kv_cache_scheme", "moe_sparsity_config"):
        attributes.expect(name)
    attributes.expect("transform_config", {})
    sparsity = attributes.raw("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense"):
        raise ConfigError(f"{attributes.what} asks for sparse weights ({shortened(sparsity)}), which can't be read.")
    format = attributes.string("format", None)
    groups = attributes.raw("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{attributes.what} has no 'config_groups', so the meaning of its codes is unknown.")
    attributes.drop(_NEUTRAL)
    attributes.finish()
    return [_group(str(name), values, format) for name, values in groups.items()]


def _group(name: str, values: Any, format: str | None) -> Group:
    attributes = Attributes(values, f"{shortened(name)} of the quantization_config")
    what = attributes.what
    own = attributes.string("format", format)
    if own != PACKED and own not in PLAIN:
        known = ", ".join((PACKED, *PLAIN))
        raise ConfigError(f"{what} has the format {shortened(own)}, which can't be read; known are: {known}.")
    targets = attributes.raw("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ConfigError(f"'targets' in {what} must be a list of texts, got {shortened(targets)}.")
    inputs = attributes.raw("input_activations")
    attributes.raw("output_activations")
    weights = Attributes(attributes.raw("weights"), f"'weights' in {what}")
    attributes.finish()
    bits, size = weights.integer("num_bits", 8), weights.integer("group_size", None, low=-1)
    kind = weights.string("type", "int")
    symmetric = weights.boolean("symmetric", True)
    usual = "tensor" if size is None else "group" if size > 0 else "channel"
    strategy = weights.string("strategy", usual)
    if (
        kind not in ("int", "float")
        or strategy not in ("tensor", "channel", "group")
        or (strategy == "group") != ((size or -1) > 0)
    ):
        raise ConfigError(
            f"{weights.what} asks for {shortened(kind)} codes by {shortened(strategy)} with group_size {size}; int or "
            "float codes by tensor, channel or group can be read."
        )
    weights.expect("dynamic", False)
    weights.expect("actorder", False, "weight", "static", "group", "dynamic")
    weights.drop(_NEUTRAL_ARGUMENTS)
    weights.finish()
    if kind == "float" and (own == PACKED or not symmetric):
        raise ConfigError(f"{weights.what} asks for float codes that are packed or asymmetric, which can't be read.")
    by_token = bits == 8 and kind == "int" and symmetric and strategy != "group" and _by_token(inputs)
    try:
        scheme = scheme_of(
            bits,
            size if strategy == "group" and size else 0,
            symmetric,
            "float8" if kind == "float" else "integer",
            8 if by_token else None,
        )
    except QuantizationError as error:
        raise ConfigError(f"{weights.what} can't be read, because {error}") from error
    return Group(name, tuple(targets), own == PACKED, strategy, scheme)


def _by_token(inputs: Any) -> bool:
    """Whether activations become eight bits with a scale for each token, as in our W8A8."""
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    usual = {"num_bits": 8, "type": "int", "symmetric": True}
    return isinstance(inputs, Mapping) and all({**usual, **inputs}.get(key) == value for key, value in wanted.items())


def group_for(module: str, groups: list[Group]) -> Group:
    """The group whose target fits `module` best: its name, then a pattern, then its class.

    Raises:
      CheckpointError: there is none.
      ConfigError: a pattern that can't be matched.
    """
    if len(groups) == 1:
        return groups[0]
    # The order in which the library looks: https://github.com/vllm-project/compressed-tensors, utils/match.py.
    pairs = sorted(((target, group) for group in groups for target in group.targets), key=lambda pair: pair[0])
    kind = "Embedding" if module == EMBEDDING else "Linear"
    for fits in (
        lambda target: target == module,
        lambda target: _matches(target, module),
        lambda target: target == kind,
    ):
        for target, group in pairs:
            if fits(target):
                return group
    raise CheckpointError(f"{module}.weight is quantized, and no group of the quantization_config is for it.")


def _matches(target: str, module: str) -> bool:
    if not target.startswith("re:") or len(module) > _MAX_NAME:
        return False
    pattern = target.removeprefix("re:")
    repeats = sum(pattern.count(sign) for sign in "*+{?")
    if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+{?]", pattern):
        raise ConfigError(f"the target {shortened(target)} of the quantization_config is too intricate to be matched.")
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise ConfigError(
            f"the target {shortened(target)} of the quantization_config is no pattern: {error}."
        ) from error


def format_for(scheme: GroupedScheme) -> str:
    """The format that the library itself would choose: integers in words, W8A8 and float8 as elements."""
    if scheme.codes == "float8":
        return "naive-quantized"
    return "int-quantized" if scheme.activation_bits else PACKED


def configuration(modules: Mapping[GroupedScheme, list[str]], alone: list[str]) -> dict[str, Any]:
    """The `quantization_config` of `modules` by their schemes; the linear layers `alone` are not quantized."""
    formats = {format_for(scheme) for scheme in modules}
    groups = {}
    for number, (scheme, names) in enumerate(modules.items()):
        # Several schemes name their modules: a reader may look for a class before it looks for a name.
        targets = ["Linear"] if len(modules) == 1 else names
        activations = None
        if scheme.activation_bits is not None:
            activations = {
                "num_bits": scheme.activation_bits,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            }
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int" if scheme.codes == "integer" else "float",
                "symmetric": scheme.symmetric,
                "strategy": "group" if scheme.group_size else "channel",
                "group_size": scheme.group_size or None,
                "dynamic": False,
            },
            "input_activations": activations,
            "output_activations": None,
            "format": format_for(scheme),
        }
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "config_groups": groups,
        "ignore": alone,
        "kv_cache_scheme": None,
    }
