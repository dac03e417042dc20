"""Checkpoints as Orbax writes them: the parameters as a tree of arrays, the configuration and tokenizer beside it.

The items of the checkpoint are `params` (a PyTree, nested by the parts of HF's tensor names) and `model` (JSON), so
that other JAX programs restore `params` with Orbax alone. https://orbax.readthedocs.io
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import glob
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from fusedllm.config import ModelConfig
from fusedllm.errors import CheckpointError, FusedLLMError
from fusedllm.model.params import Params, describe, map_specs, specs
from fusedllm.text.data import TokenizerData
from fusedllm.weights.checkpoint import Checkpoint, LazyTensor
from fusedllm.weights.files import is_disk_full, remove
from fusedllm.weights.load import check_tensors

FORMAT_VERSION = 1
# After a failed save: how long nothing may have come back before it is taken for gone, and how long to try at most.
_QUIET_SECONDS = 0.5
_MOST_SECONDS = 30.0
PARAMS_ITEM = "params"
MODEL_ITEM = "model"

Shardings = Params | jax.sharding.Sharding


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Saves `checkpoint` as the directory `path`, which must not exist.

    Orbax takes the tree as a whole: tensors that are mapped stay on the disk until their turn, those that have to be
    computed (dequantized, cast) are in memory together.

    Raises:
      CheckpointError: `path` exists, Orbax can't write it, or a tensor's name is the beginning of another's.
        A full disk comes as what TensorStore raises, with the system's words, which `write_atomically` recognizes.
    """
    if os.path.lexists(path):
        raise CheckpointError(f"{path} exists already: choose another name.")
    model = {
        "format_version": FORMAT_VERSION,
        "config": checkpoint.config.to_dict(),
        "tokenizer": checkpoint.tokenizer.to_json() if checkpoint.tokenizer else None,
    }
    arrays = nest({name: np.asarray(tensor.read()) for name, tensor in checkpoint.tensors.items()})
    # Trained weights hardly compress, and reading them back would wait for the decompression.
    arrays_handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    handler = ocp.CompositeCheckpointHandler(**{PARAMS_ITEM: arrays_handler, MODEL_ITEM: ocp.JsonCheckpointHandler()})
    items = {PARAMS_ITEM: ocp.args.PyTreeSave(arrays), MODEL_ITEM: ocp.args.JsonSave(model)}
    try:
        with _quiet, ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(os.path.abspath(path), ocp.args.Composite(**items))
    except BaseException as error:
        _hush_stragglers()
        _remove_leftovers(Path(os.path.abspath(path)))
        if is_disk_full(error) or not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{path} can't be written by Orbax: {_one_line(error)}.") from error


def read(path: Path) -> Checkpoint:
    """The checkpoint in the Orbax directory at `path`; a `read()` restores the tensors of one layer together.

    Raises:
      CheckpointError: no Orbax checkpoint, one of another program (without our `model` item), of a newer format
        version, or damaged.
    """
    if not (path / PARAMS_ITEM).is_dir() or not (path / MODEL_ITEM).is_dir():
        raise CheckpointError(
            f"{path} is not an Orbax checkpoint of fusedllm: it needs the items {PARAMS_ITEM!r} and {MODEL_ITEM!r}."
        )
    with _orbax_errors(path):
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            model: Mapping[str, Any] = checkpointer.restore(_item(path, MODEL_ITEM), ocp.args.JsonRestore())
        version = model["format_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version!r}; this fusedllm reads up to {FORMAT_VERSION}: "
                "install a newer one."
            )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.metadata(_item(path, PARAMS_ITEM)).item_metadata
        if arrays is None:
            raise CheckpointError(f"{path} is damaged: Orbax finds no description of its arrays.")
        text, layers = model["tokenizer"], _Layers(path)
        for name, leaf in flatten(arrays.tree).items():
            layers.add(name, tuple(leaf.shape), np.dtype(leaf.dtype))
        return Checkpoint(
            config=ModelConfig.from_dict(model["config"]),
            tensors=layers.tensors,
            tokenizer=None if text is None else TokenizerData.from_json(text),
            format="orbax",
            path=path,
        )


def restore_params(
    path: Path, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[ModelConfig, Params]:
    """The configuration and the parameters in the Orbax directory at `path`, each read straight to its devices.

    `shardings` is one sharding for all parameters or a `Params` of shardings, and `None` the default device. A device
    reads its own part only. `dtype=None` keeps the file's.

    Raises:
      CheckpointError: as `read`, and where tensors are missing, unknown or misshapen.
    """
    checkpoint = read(path)
    wanted = specs(checkpoint.config)
    check_tensors(checkpoint, wanted)
    by_name = _by_name(checkpoint.config, shardings)
    arguments = {
        name: ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=by_name[name],
            global_shape=spec.shape,
            dtype=checkpoint.tensors[name].dtype if dtype is None else np.dtype(dtype),
        )
        for name, spec in wanted.items()
    }
    arrays = _restore(path, arguments)
    return checkpoint.config, map_specs(lambda spec: arrays[spec.name], describe(checkpoint.config))


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` as `{"a": {"b": x}}`; `flatten` is its inverse.

    Raises:
      CheckpointError: a name is the beginning of another one, such as `a` and `a.b`.
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise CheckpointError(f"the tensor {name!r} can't be nested: a part of its name is a tensor too.")
        if last in branch:
            raise CheckpointError(f"the tensor {name!r} can't be nested: its name is a part of another's.")
        branch[last] = value
    return tree


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": x}}` as `{"a.b": x}`; lists count as mappings from their indices."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        branch = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(branch, Mapping):
            flat |= flatten(branch, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _by_name(config: ModelConfig, shardings: Shardings | None) -> dict[str, jax.sharding.Sharding]:
    if isinstance(shardings, Params):
        return dict(zip(specs(config), jax.tree.leaves(shardings), strict=True))
    one = shardings or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return dict.fromkeys(specs(config), one)


class _Layers:
    """Restores a layer when its first tensor is read, and hands its arrays out one by one.

    A restore costs tens of milliseconds whatever its size, since Orbax parses the metadata of the whole tree: too much
    to pay for each tensor. Two layers at most wait here to be read.
    """

    WAITING = 2

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, LazyTensor] = {}
        self.names: dict[str, list[str]] = {}
        self.restored: dict[str, dict[str, np.ndarray]] = {}
        self.lock = threading.Lock()

    def add(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.tensors[name] = LazyTensor(name, shape, dtype, nbytes, functools.partial(self.read, name))
        self.names.setdefault(_layer_of(name), []).append(name)

    def read(self, name: str) -> np.ndarray:
        layer = _layer_of(name)
        with self.lock:
            if name not in self.restored.get(layer, {}):
                arguments = {each: ocp.RestoreArgs(restore_type=np.ndarray) for each in self.names[layer]}
                self.restored[layer] = _restore(self.path, arguments)
            values = self.restored[layer].pop(name)
            if not self.restored[layer]:
                del self.restored[layer]
            while len(self.restored) > self.WAITING:
                del self.restored[next(iter(self.restored))]
        announced = self.tensors[name]
        if values.shape != announced.shape or values.dtype != announced.dtype:
            raise CheckpointError(f"{self.path} is damaged: {name!r} is not what its metadata says.")
        # Freshly made and held by nobody else, so it may be used as it lies.
        values.flags.writeable = False
        return values


def _layer_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else name


def _restore(path: Path, arguments: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
    wanted = ocp.args.PyTreeRestore(
        item=nest(dict.fromkeys(arguments, 0)), restore_args=nest(arguments), partial_restore=True
    )
    with _orbax_errors(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return flatten(checkpointer.restore(_item(path, PARAMS_ITEM), wanted))


def _item(path: Path, item: str) -> str:
    return os.path.join(os.path.abspath(path), item)


@contextlib.contextmanager
def _orbax_errors(path: Path) -> Iterator[None]:
    try:
        with _quiet:
            yield
    except CheckpointError:
        raise
    except FusedLLMError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # Orbax and TensorStore raise whatever the layer that noticed raises; there is no common base to catch.
    except Exception as error:
        _hush_stragglers()
        raise CheckpointError(f"{path} can't be restored by Orbax: {_one_line(error)}.") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[-300:].rstrip(".") or type(error).__name__


def _remove_leftovers(path: Path) -> None:
    """Deletes what a failed save left beside `path`, until it stays away.

    TensorStore's threads outlive the save. A write that begins after the deletion makes its directories again; one
    that had begun before fails, since its file is gone. So nothing comes back after a while without a return.
    """

    def clear() -> bool:
        # Never `path` itself: Orbax renames to it when all is written, so what is there is whole.
        found = list(path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"))
        for leftover in found:
            remove(leftover)
        return bool(found)

    # The last resort, should one write begin later than all that was waited for.
    atexit.register(clear)
    started = quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < _QUIET_SECONDS and time.monotonic() - started < _MOST_SECONDS:
        if clear():
            quiet_since = time.monotonic()
        time.sleep(_QUIET_SECONDS / 20)


def _hush_stragglers() -> None:
    """Drops what the other reads of a failed restore still report to the event loop that Orbax has closed by then."""
    earlier = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            earlier(unraisable)

    if getattr(earlier, "__qualname__", None) != hook.__qualname__:
        sys.unraisablehook = hook


class _Quiet(logging.Filter):
    """Holds back what absl logs below an error while at least one thread is inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.inside or record.levelno >= logging.ERROR


# Orbax warns through absl about things that are not wrong here, such as an item opened by itself.
_quiet = _Quiet()
logging.getLogger("absl").addFilter(_quiet)
