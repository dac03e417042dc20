"""AWQ's factors of a layer, folded into what makes its inputs: the same function, in weights that quantize better."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from fusedllm.calibrate.layers import SITES
from fusedllm.config import ModelConfig
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.model.params import LayerParams
from fusedllm.quant.awq import awq_scales
from fusedllm.quant.statistics import Statistics

Schemes = Mapping[str, GroupedScheme | None]
"""Of a layer's matrices, by their field of `LayerParams`; `None` for one that stays."""


def fold_factors(
    config: ModelConfig,
    layer: LayerParams,
    statistics: Mapping[str, Statistics],
    schemes: Schemes,
    scale_dtype: np.dtype,
) -> tuple[LayerParams, dict[str, Statistics]]:
    """The layer with AWQ's factors (arXiv:2306.00978) in its matrices, and the statistics of their inputs then.

    Norms make up for the factors of q, k, v and of gate and up, `up` for those of `down`, and `v` for those of `o`
    where each query head has a value head of its own.
    """
    statistics = dict(statistics)
    makers = {"down": "up", "qkv": "attention_norm", "gate_up": "mlp_norm"}
    if config.num_heads == config.num_kv_heads:
        makers = {"o": "v", **makers}
    for site, maker in makers.items():
        fields = [field for field in SITES[site] if schemes[field] is not None]
        # All readers of an input see it divided.
        if len(fields) < len(SITES[site]):
            continue
        pairs = [(getattr(layer, field), schemes[field]) for field in fields]
        factors = awq_scales([(w, s) for w, s in pairs if s is not None], statistics[site], scale_dtype)
        changed = {field: getattr(layer, field) * factors for field in fields}
        made = getattr(layer, maker)
        changed[maker] = made / (factors if made.ndim == 1 else factors[:, None])
        bias: jax.Array | None = getattr(layer, f"{maker}_bias", None)
        if bias is not None:
            changed[f"{maker}_bias"] = bias / factors
        layer = layer.replace(**changed)  # type: ignore[attr-defined]
        statistics[site] = statistics[site].of_divided(factors)
    return layer, statistics
