"""Quantizes a model layer by layer on what goes through it: statistics, codes, and on with the codes' own outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fusedllm.calibrate.fold import fold_factors
from fusedllm.calibrate.layers import SITES, Sums, empty_sums, head_sums, layer_output, layer_sums, statistics_of
from fusedllm.calibrate.resume import Finished
from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.model.params import LayerParams, ParamSpec, describe, specs
from fusedllm.qarray import QuantArray
from fusedllm.quant.methods import Method, quantize_matrices, quantize_matrix
from fusedllm.quant.statistics import Statistics
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.load import check_tensors

# Tokens that go through a layer together.
TOGETHER = 2048
HEAD = "head"

SchemeOf = Callable[[str, tuple[int, ...]], GroupedScheme | None]


class Tensor(NamedTuple):
    """A finished tensor: its name, what it is in float32, and its codes, or `None` where it stays."""

    name: str
    weights: np.ndarray
    array: QuantArray | None


@dataclass(frozen=True)
class Run:
    """A calibration.

    Attributes:
      checkpoint: the model; a layer of it is in memory at a time.
      tokens: int32 `[windows, window]`.
      scheme_of: what a tensor becomes, by its name and shape; `None` for one that stays.
      method: how.
      scale_dtype: of scales and zero points.
      directory: where finished layers are kept, so that a run that was stopped goes on; `None` keeps none.
      progress: show a progress bar on standard error.
    """

    checkpoint: Checkpoint
    tokens: np.ndarray
    scheme_of: SchemeOf
    method: Method
    scale_dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float16))
    directory: Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        """Refuses tokens that the model does not have, of which a negative one would be read as another."""
        size = self.checkpoint.config.vocab_size
        if not self.tokens.size or not 0 <= self.tokens.min() <= self.tokens.max() < size:
            found = f"{self.tokens.min()} to {self.tokens.max()}" if self.tokens.size else "none"
            raise QuantizationError(
                f"calibration tokens must be from 0 to {size - 1}, of which the model's vocabulary is, got {found}."
            )

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the model, in the order of the layers, when it is done.

        Statistics are of inputs that the layers before, quantized, have made. The embedding, from which no product
        reads, is quantized for its own sake; one that is the head as well when the head's inputs are known.

        Raises:
          CheckpointError: a tensor is missing or can't be read.
          QuantizationError: the method can't do it, or `directory` holds layers of another run.
        """
        config = self.checkpoint.config
        check_tensors(self.checkpoint, specs(config))
        description: Any = describe(config)
        finished = self._finished()
        embedding = self._tensor(description.embedding, Method(grid=self.method.grid))
        if not config.tie_embeddings:
            yield embedding
        table = embedding.weights if config.tie_embeddings else _values(embedding)
        hidden = table[self.tokens]
        done = 0 if finished is None else finished.count()
        if done and finished is not None:
            hidden = finished.hidden(done - 1)
        for index in tqdm(
            range(config.num_layers), desc="calibrating", unit="layer", disable=None if self.progress else True
        ):
            if index < done and finished is not None:
                yield from self._stored(description.layers[index], finished.arrays(index))
                continue
            made = self._layer(index, description.layers[index], hidden)
            hidden = self._through(index, _layer_of(description.layers[index], made), hidden)
            if finished is not None:
                # Only AWQ changes the weights themselves; others can be read again.
                finished.save(index, hidden, _arrays(made, self.method.awq))
            yield from made
            self.checkpoint.release()
        yield from self._head(description, hidden)

    def statistics(self) -> Iterator[tuple[str, Statistics]]:
        """The statistics of every matrix's inputs in the model as it is, by the matrix's name, layer by layer."""
        config = self.checkpoint.config
        description: Any = describe(config)
        states = self.states()
        for index, hidden in enumerate(states[:-1]):
            described = description.layers[index]
            for site, found in self.site_statistics(index, self.float_layer(described), hidden).items():
                for name in SITES[site]:
                    yield getattr(described, name).name, found
            self.checkpoint.release()
        head = description.embedding if description.head is None else description.head
        yield head.name, self.head_statistics(self.read(description.final_norm.name), states[-1])

    def states(self) -> list[np.ndarray]:
        """The hidden states of the model as it is, `[windows, window, hidden]`: what each layer takes, and the head."""
        config = self.checkpoint.config
        description: Any = describe(config)
        states = [self.read(description.embedding.name)[self.tokens]]
        for index in tqdm(
            range(config.num_layers), desc="measuring", unit="layer", disable=None if self.progress else True
        ):
            states.append(self._through(index, self.float_layer(description.layers[index]), states[-1]))
            self.checkpoint.release()
        return states

    def _finished(self) -> Finished | None:
        if self.directory is None:
            return None
        config = self.checkpoint.config
        wanted = {name: self.scheme_of(name, spec.shape) for name, spec in specs(config).items()}
        settings = {
            "config": config.to_dict(),
            "weights": self._fingerprint(wanted),
            "tokens": hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes()).hexdigest(),
            "schemes": {name: None if scheme is None else scheme.name for name, scheme in wanted.items()},
            "method": str(self.method),
            "scale_dtype": str(self.scale_dtype),
        }
        return Finished(self.directory, settings)

    def _fingerprint(self, names: Iterable[str]) -> str:
        """Of all weights: a path does not tell, as the file there may be another, or a table may stand for it."""
        digest = hashlib.sha256()
        for name in names:
            values = np.ascontiguousarray(self.checkpoint.tensors[name].read())
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(values.reshape(-1).view(np.uint8).data)
            self.checkpoint.release()
        return digest.hexdigest()

    def _layer(self, index: int, described: Any, hidden: np.ndarray) -> list[Tensor]:
        layer = self.float_layer(described)
        statistics = self.site_statistics(index, layer, hidden)
        schemes = {
            name: self.scheme_of(getattr(described, name).name, getattr(described, name).shape)
            for names in SITES.values()
            for name in names
        }
        if self.method.awq:
            layer, statistics = fold_factors(self.checkpoint.config, layer, statistics, schemes, self.scale_dtype)
        arrays: dict[str, QuantArray] = {}
        for site, names in SITES.items():
            pairs = {name: (getattr(layer, name), schemes[name]) for name in names}
            wanted = {name: (weights, scheme) for name, (weights, scheme) in pairs.items() if scheme is not None}
            found = quantize_matrices(
                list(wanted.values()), self.method, statistics[site], scale_dtype=self.scale_dtype
            )
            arrays |= dict(zip(wanted, found, strict=True))
        made = []
        for name, spec in _fields(described).items():
            made.append(Tensor(spec.name, np.asarray(getattr(layer, name)), arrays.get(name)))
        return made

    def _head(self, description: Any, hidden: np.ndarray) -> Iterator[Tensor]:
        norm = self.read(description.final_norm.name)
        statistics = self.head_statistics(norm, hidden)
        yield Tensor(description.final_norm.name, norm, None)
        head = description.embedding if description.head is None else description.head
        yield self._tensor(head, Method(grid=self.method.grid, gptq=self.method.gptq), statistics)

    def _tensor(self, spec: ParamSpec, method: Method, statistics: Statistics | None = None) -> Tensor:
        weights = self.read(spec.name)
        scheme = self.scheme_of(spec.name, spec.shape)
        if scheme is None:
            return Tensor(spec.name, weights, None)
        array = quantize_matrix(jnp.asarray(weights), scheme, method, statistics, scale_dtype=self.scale_dtype)
        return Tensor(spec.name, weights, array)

    def site_statistics(self, index: int, layer: LayerParams, hidden: np.ndarray) -> dict[str, Statistics]:
        """The statistics of what the sites of `layer`, the one at `index`, see of the states `hidden` that it takes."""
        sums: Sums = {site: empty_sums(getattr(layer, names[0]).shape[1]) for site, names in SITES.items()}
        window = self.checkpoint.config.sliding_windows[index]
        for part in self._parts(hidden):
            sums = layer_sums(self.checkpoint.config, layer, jnp.asarray(part), sums, window=window)
        return {site: statistics_of(one, self.tokens.size) for site, one in sums.items()}

    def head_statistics(self, norm: np.ndarray, hidden: np.ndarray) -> Statistics:
        """The statistics of what the head sees of the states `hidden`, after the final `norm`."""
        sums = empty_sums(hidden.shape[-1])
        for part in self._parts(hidden):
            sums = head_sums(self.checkpoint.config, jnp.asarray(norm), jnp.asarray(part), sums)
        return statistics_of(sums, self.tokens.size)

    def _through(self, index: int, layer: LayerParams, hidden: np.ndarray) -> np.ndarray:
        window = self.checkpoint.config.sliding_windows[index]
        out = np.empty_like(hidden)
        at = 0
        for part in self._parts(hidden):
            out[at : at + len(part)] = layer_output(self.checkpoint.config, layer, jnp.asarray(part), window=window)
            at += len(part)
        return out

    def _parts(self, hidden: np.ndarray) -> Iterator[np.ndarray]:
        step = max(1, TOGETHER // hidden.shape[1])
        for start in range(0, len(hidden), step):
            yield hidden[start : start + step]

    def read(self, name: str) -> np.ndarray:
        """A tensor of the model, float32."""
        return np.asarray(self.checkpoint.tensors[name].read(), np.float32)

    def float_layer(self, described: Any) -> LayerParams:
        """A layer of the model, float32, from its description."""
        return described.replace(
            **{name: jnp.asarray(self.read(spec.name)) for name, spec in _fields(described).items()}
        )

    def _stored(self, described: Any, arrays: Mapping[str, np.ndarray]) -> Iterator[Tensor]:
        for spec in _fields(described).values():
            weights = arrays.get(f"{spec.name}/weights")
            weights = self.read(spec.name) if weights is None else weights
            if f"{spec.name}/values" not in arrays:
                yield Tensor(spec.name, weights, None)
                continue
            scheme = self.scheme_of(spec.name, spec.shape)
            assert scheme is not None
            parts = [arrays.get(f"{spec.name}/{part}") for part in ("values", "scales", "zeros")]
            values, scales, zeros = (None if part is None else jnp.asarray(part) for part in parts)
            assert values is not None
            yield Tensor(spec.name, weights, QuantArray(values, scales, zeros, scheme, spec.shape))


def _fields(described: Any) -> dict[str, ParamSpec]:
    """The parameters that a layer has, by their field."""
    return {name: spec for name, spec in vars(described).items() if isinstance(spec, ParamSpec)}


def _values(tensor: Tensor) -> np.ndarray:
    return tensor.weights if tensor.array is None else np.asarray(tensor.array.dequantize())


def _layer_of(described: Any, made: list[Tensor]) -> LayerParams:
    values = {tensor.name: jnp.asarray(_values(tensor)) for tensor in made}
    fields = {name: values[spec.name] for name, spec in _fields(described).items()}
    return described.replace(**fields)


def _arrays(made: list[Tensor], changed: bool) -> dict[str, np.ndarray]:
    arrays = {}
    for name, weights, array in made:
        if changed:
            arrays[f"{name}/weights"] = weights
        if array is not None:
            parts = {"values": array.values, "scales": array.scales, "zeros": array.zeros}
            arrays |= {f"{name}/{part}": np.asarray(one) for part, one in parts.items() if one is not None}
    return arrays
