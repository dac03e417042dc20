"""Quantized tables as Parquet files: a checkpoint whose codes are read into memory, as the format compresses them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fusedllm.errors import CheckpointError, FusedLLMError
from fusedllm.weights import quantized
from fusedllm.weights.checkpoint import Checkpoint


def read(path: Path) -> Checkpoint:
    """The quantized table in the Parquet file at `path`; nothing but its schema is read of any other.

    Raises:
      CheckpointError: it can't be read, it is not quantized, or it says nothing of its model.
    """
    try:
        # As one file: its directory's name is no column.
        with pq.ParquetFile(path) as file:
            quantized.check_schema(file.schema_arrow, path)
            return quantized.of_table(file.read(), path)
    except CheckpointError:
        raise
    except FusedLLMError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(f"{path} is not a whole Parquet file: {reason}.") from error
