"""`quantize` and `dequantize`: from whatever holds weights to a quantized Arrow table, and back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fusedllm.calibrate.run import Run
from fusedllm.calibrate.sensitivity import choose_schemes
from fusedllm.calibrate.text import Calibration, calibration_tokens
from fusedllm.errors import QuantizationError
from fusedllm.kernels.grouped import GroupedScheme
from fusedllm.qarray import QuantArray
from fusedllm.quant.encoder import ROUND, Plan, encode, plan_rules
from fusedllm.quant.faces import (
    dequantize_table,
    quantize_batches,
    scale_dtype_named,
    table_metadata,
    with_report,
)
from fusedllm.quant.layers import FLOATS, Layers
from fusedllm.quant.methods import Method, method_named, quantize_matrix
from fusedllm.quant.report import QuantizeReport
from fusedllm.quant.schemes import in_full, not_said, scheme_named, turning
from fusedllm.quant.table import table_schema
from fusedllm.weights import registry
from fusedllm.weights.checkpoint import Checkpoint
from fusedllm.weights.convert import format_of
from fusedllm.weights.files import write_atomically
from fusedllm.weights.open import open_checkpoint
from fusedllm.weights.quantized import CONFIG_KEY, TOKENIZER_KEY, description
from fusedllm.weights.tables import open_layers, reader_of, table_at, with_layers

DEFAULT_SCHEME = "int4-g64"
# The formats of tables.
ARROW, PARQUET = "arrow", "parquet"


def quantize(
    source: Any,
    scheme: str = DEFAULT_SCHEME,
    *,
    method: str = ROUND,
    rules: Mapping[str, str] | None = None,
    calibration: Calibration = None,
    model: str | Path | None = None,
    target_bpw: float | None = None,
    scale_dtype: str = "float16",
    resume: str | Path | None = None,
    report: QuantizeReport | None = None,
    streaming: bool | None = None,
    progress: bool = False,
) -> Any:
    """Weights as a quantized Arrow table (`docs/arrow-format.md`), in one pass and without copies of aligned input.

    Args:
      source: a table of weights: one row a layer with `layer_name`, `weights` (lists of float32, float16, float64 or,
        so named by the metadata, bfloat16; tensors of fixed shape; or bytes beside a column `dtype`) and, where it
        can't be derived, `shape`. A `pyarrow` table or batch, or whatever speaks the Arrow PyCapsule protocol (polars,
        DuckDB, pandas). A `RecordBatchReader` is read batch by batch as the result is. A mapping from names to arrays.
        A path: of an Arrow or Parquet file with such a table, or of a checkpoint, or a model's name.
      scheme: of all matrices that no rule names; or a recipe, which is a scheme with rules of its own after those that
        are given (`w8a8-turned`). docs/quantization.md lists them.
      method: how codes are chosen: `rtn` (the nearest), `clip`, `hqq`, or with calibration `gptq`, `awq` and cascades
        such as `clip+gptq` and `awq+hqq`.
      rules: regular expressions of names, and the scheme, or `keep`, of the layers that they find; the first decides.
      calibration: the path of a text, a list of texts, or token ids, on which activations are measured; by default,
        where the method needs them, the topics of `pydoc`. With a text `clip` and `hqq` weight errors by it too.
      model: whose weights they are: a name or path that says the configuration and the tokenizer, so that the model
        can be calibrated, and `fusedllm.load` can run the result. A checkpoint says it itself, and so does a table
        whose metadata have `fusedllm.config`.
      target_bpw: choose a scheme for each tensor that no rule names, by how much it matters to the model, so that all
        tensors together have so many bits per weight at most; instead of `scheme`. Needs the model and calibration.
      scale_dtype: `float16` or `float32`, of scales and zero points.
      resume: a directory that keeps the layers of a calibration as they are done; one that was stopped goes on there.
      report: is filled in as layers are done; tables carry theirs (`fusedllm.quantize_report`).
      streaming: return a `RecordBatchReader`, whose batches are made as they are asked for, with one layer of a
        checkpoint in memory at a time; by default where `source` is one.
      progress: show a progress bar on standard error.

    Returns:
      A `pyarrow.Table`, or a `RecordBatchReader`.

    Raises:
      QuantizationError: an unknown scheme or method, or a layer that can't be quantized, by its name.
      SourceError, CheckpointError: a path or name that can't be opened.
    """
    how = method_named(method)
    plan = _plan(*in_full(scheme, rules), how, scale_dtype)
    report = QuantizeReport() if report is None else report
    whose = None if model is None else open_checkpoint(registry.resolve(model, progress=progress))
    opened = open_layers(source, progress)
    carried = dict(opened.metadata) | ({} if whose is None else description(whose))
    metadata = table_metadata(plan, scheme, carried)
    schema = table_schema(plan.scale_dtype, metadata)
    if how.needs_calibration or calibration is not None or target_bpw is not None:
        checkpoint = opened.checkpoint or with_layers(whose, opened)
        run = Run(
            checkpoint,
            calibration_tokens(calibration, checkpoint.tokenizer),
            # Vectors are no inputs' weights: a calibration leaves them as they are, whatever a rule says.
            lambda name, shape: plan.scheme_of(name, shape, True) if len(shape) > 1 else None,
            how,
            plan.scale_dtype,
            None if resume is None else Path(resume).expanduser(),
            progress,
        )
        if target_bpw is not None:
            chosen = choose_schemes(run, target_bpw, fixed=plan.rules)
            run = dataclasses.replace(run, scheme_of=lambda name, shape: chosen[name])
        batches = _calibrated(run, plan, metadata, report)
    else:
        shown = tqdm(
            opened.batches,
            total=opened.count,
            desc="quantizing",
            unit="batch",
            disable=None if progress else True,
            leave=False,
        )
        batches = quantize_batches(shown, plan, metadata, report)
    batches = _some(batches)
    if opened.streams if streaming is None else streaming:
        return pa.RecordBatchReader.from_batches(schema, batches)
    return with_report(pa.Table.from_batches(list(batches), schema), report)


def quantize_file(
    source: Any,
    destination: str | Path,
    scheme: str = DEFAULT_SCHEME,
    *,
    force: bool = False,
    format: str | None = None,
    report: QuantizeReport | None = None,
    **options: Any,
) -> Path:
    """As `quantize`, into an Arrow or Parquet file, with one layer of a checkpoint in memory.

    The file is whole or not there. `format` is `arrow` or `parquet`; by default a suffix `.parquet` asks for that and
    any that is of no other format for Arrow. `options` are those of `quantize`.

    Raises:
      CheckpointError: the file exists and `force` is off, or can't be written; and what `quantize` raises.
      QuantizationError: the format, or what the suffix asks for, is no table.
    """
    path = Path(destination).expanduser()
    kind = table_format(path, format)
    if kind is None:
        raise QuantizationError(
            f"{format or path} is no table, which is an .arrow or a .parquet file: `fusedllm quantize` and `fusedllm "
            "convert` write the other formats."
        )
    report = QuantizeReport() if report is None else report
    with write_atomically(path, force=force) as temporary:
        if not isinstance(source, (Checkpoint, Mapping, str, Path)):
            source = reader_of(source)
        made = quantize(source, scheme, report=report, streaming=True, **options)
        new_file = pq.ParquetWriter if kind == PARQUET else pa.ipc.new_file
        with new_file(str(temporary), made.schema) as writer:
            for batch in made:
                writer.write_batch(batch)
    return path


def table_format(path: Path, format: str | None = None) -> str | None:
    """`arrow` or `parquet`, by `format` or by the suffix of `path`; `None` for the other formats."""
    if format is not None:
        return format if format in (ARROW, PARQUET) else None
    if path.suffix.lower() == f".{PARQUET}":
        return PARQUET
    return ARROW if format_of(path) in (None, ARROW) else None


def check_turning(scheme: str, rules: Mapping[str, str] | None, destination: Path) -> None:
    """Refuses a `destination` that is no table where the scheme, or one of the rules, turns the inputs of products.

    Raises:
      QuantizationError: it does; the scheme is named.
    """
    if turned := turning(scheme, rules):
        raise QuantizationError(not_said(turned, str(destination)))


def dequantize(source: Any) -> pa.Table:
    """The float32 weights of a quantized table: `layer_name`, `weights: large_list<float32>`, `shape`.

    What the table says of its model goes along. `source` is a table, a reader, whatever speaks the Arrow PyCapsule
    stream protocol, or the path of an Arrow or Parquet file.

    Raises:
      QuantizationError: it is no quantized table, holds a name twice, or contradicts itself; the message names the
        layer.
    """
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        source = table_at(path)
        if source is None:
            raise QuantizationError(f"{path} is neither an Arrow nor a Parquet file, so it holds no quantized table.")
    reader = reader_of(source)
    found = reader.schema.metadata or {}
    carried = {key: found[key] for key in (CONFIG_KEY, TOKENIZER_KEY) if key in found}
    return dequantize_table(reader).replace_schema_metadata(carried)


def _plan(scheme: str, rules: Mapping[str, str] | None, method: Method, scale_dtype: str) -> Plan:
    numbers = scale_dtype_named(scale_dtype)

    def choose(name: str, weights: jax.Array, scheme: GroupedScheme) -> QuantArray:
        return quantize_matrix(weights, scheme, method, scale_dtype=numbers)

    is_rounding = str(method) == ROUND
    return Plan(scheme_named(scheme), plan_rules(rules), str(method), None if is_rounding else choose, numbers)


def _calibrated(
    run: Run, plan: Plan, metadata: Mapping[bytes, bytes], report: QuantizeReport
) -> Iterator[pa.RecordBatch]:
    """A batch for each tensor that the calibration has done."""
    tensors = run.tensors()
    while True:
        started = time.perf_counter()
        tensor = next(tensors, None)
        if tensor is None:
            return
        name, weights, array = tensor
        layers = Layers()
        layers.add_array(name, weights if array is not None else _as_read(weights, run.checkpoint.tensors[name].dtype))
        made = dataclasses.replace(
            plan, schemes={name: None if array is None else run.scheme_of(name, weights.shape)}, choose=_always(array)
        )
        batch, reports = encode(layers, made, metadata, started)
        report.extend(reports)
        yield batch


def _as_read(weights: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`weights`, which a calibration has in float32, in the `dtype` of their source where that holds them."""
    if dtype not in FLOATS.values():
        return weights
    with np.errstate(over="ignore"):
        narrow = weights.astype(dtype)
    return narrow if np.array_equal(narrow.astype(np.float32), weights) else weights


def _some(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    found = False
    for batch in batches:
        found = found or batch.num_rows > 0
        yield batch
    if not found:
        raise QuantizationError("the table is empty: there is no layer to quantize.")


def _always(array: QuantArray | None) -> Callable[[str, jax.Array, GroupedScheme], QuantArray]:
    def choose(name: str, weights: jax.Array, scheme: GroupedScheme) -> QuantArray:
        assert array is not None
        return array

    return choose
