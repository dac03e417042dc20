"""How large the KV cache is made: what a position costs, what there is, and refusals with numbers."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from conftest import TINY, TINY_ENGINE
from hypothesis import given
from hypothesis import strategies as st

from fusedllm.backend import KV_DTYPES
from fusedllm.engine.config import EngineConfig
from fusedllm.engine.memory import (
    available_bytes,
    bytes_per_position,
    cache_tokens_for,
    control_group_bytes,
    weight_bytes,
)
from fusedllm.errors import RequestError
from fusedllm.llm import LLM
from fusedllm.sizing import CacheSize, fitting_engine
from fusedllm.weights.random import random_params

# SmolLM2-135M's: 30 layers of 3 heads of 64.
SMOLLM2 = dataclasses.replace(
    TINY, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, sliding_windows=()
)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", 46_080), ("bfloat16", 23_040), ("float16", 23_040), ("int8", 12_240), ("fp8", 11_520)],
)
def test_a_position_of_smollm2_costs_what_its_shape_says(dtype, expected):
    assert bytes_per_position(SMOLLM2, KV_DTYPES[dtype]) == expected


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_position_costs_what_the_runner_takes_for_it(dtype):
    llm = LLM(TINY, random_params(TINY, "float32", seed=1), engine=TINY_ENGINE, kv_dtype=KV_DTYPES[dtype])
    positions = TINY_ENGINE.num_pages * TINY_ENGINE.page_size
    assert llm.engine.runner.cache_bytes == positions * bytes_per_position(TINY, KV_DTYPES[dtype])


def tokens_for(**keywords):
    defaults = {"max_context": 4096, "max_batch": 8, "page_size": 16, "available": 10**9}
    return cache_tokens_for(SMOLLM2, jnp.bfloat16, **{**defaults, **keywords})


def test_a_fraction_is_of_what_the_weights_leave():
    tokens = tokens_for(available=10**9, weights=6 * 10**8, fraction=0.5)
    # 200 MB are 542 pages of 368,640 bytes, one of which is the null page.
    assert tokens == 541 * 16


def test_an_amount_is_taken_as_it_is():
    assert tokens_for(cache_bytes=200_000_000) == 541 * 16
    assert tokens_for(cache_tokens=5000) == 5000


def test_by_default_it_is_what_the_requests_can_use_and_at_most_half():
    assert tokens_for(available=10**12) == 8 * 4096
    assert tokens_for(available=400_000_000) == 541 * 16


def test_what_is_chosen_is_never_more_than_asked_and_less_by_no_more_than_two_pages():
    position = bytes_per_position(SMOLLM2, jnp.bfloat16)
    for amount in range(10**8, 10**8 + 10**6, 99_999):
        tokens = tokens_for(cache_bytes=amount)
        taken = EngineConfig(max_context=4096, cache_tokens=tokens).num_pages * 16 * position
        assert amount - 16 * position < taken <= amount


def test_a_cache_that_does_not_hold_one_request_is_refused_with_numbers():
    with pytest.raises(RequestError) as refused:
        tokens_for(available=300_000_000, weights=200_000_000, fraction=0.5)
    sentence = str(refused.value)
    for number in ("4,096 tokens", "94.4 MB", "23,040 bytes a token", "100.0 MB are free", "200.0 MB of weights"):
        assert number in sentence
    assert "max_context" in sentence


@pytest.mark.parametrize("ask", [{"cache_tokens": 10**6}, {"cache_bytes": 10**10}])
def test_more_than_there_is_is_refused_with_numbers(ask):
    with pytest.raises(RequestError, match=r"more than there is \(1,000\.0 MB are free\)"):
        tokens_for(**ask)


def test_weights_alone_that_do_not_fit_leave_nothing():
    with pytest.raises(RequestError, match=r"\(0\.0 MB are free beside 2,000\.0 MB of weights\)"):
        tokens_for(weights=2 * 10**9)


@pytest.mark.parametrize(
    "ask",
    [{"fraction": 0}, {"fraction": 1.1}, {"fraction": float("nan")}, {"cache_bytes": 0}, {"cache_tokens": -1},
     {"fraction": 0.5, "cache_tokens": 8192}],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(ask):
    with pytest.raises(RequestError):
        tokens_for(**ask)


def test_a_device_that_tells_nothing_needs_to_be_told():
    with pytest.raises(RequestError, match="does not tell"):
        tokens_for(available=None)
    assert tokens_for(available=None, cache_tokens=5000) == 5000


@given(st.integers(1, 10**12), st.floats(0.01, 1), st.integers(0, 10**11))
def test_a_fraction_is_never_exceeded(available, fraction, weights):
    try:
        tokens = tokens_for(available=available, fraction=fraction, weights=weights, max_context=64)
    except RequestError:
        return
    assert tokens >= 64
    assert (tokens + 16) * bytes_per_position(SMOLLM2, jnp.bfloat16) <= fraction * (available - weights)


def tensor(elements, nbytes, quantization=None):
    return SimpleNamespace(shape=(elements,), nbytes=nbytes, quantization=quantization)


def test_weights_count_as_they_will_lie_in_memory():
    tensors = {"a": tensor(1000, 2000), "b": tensor(320, 180, "Q4_0"), "c": tensor(256, 144, "Q4_K")}
    checkpoint = SimpleNamespace(tensors=tensors)
    assert weight_bytes(checkpoint, None) == 2000 + 180 + 512
    assert weight_bytes(checkpoint, np.float32) == 4 * 1576


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert control_group_bytes(tmp_path) is None


def test_version_2_limits_of_every_group_on_the_way_up_hold(tmp_path):
    group = "sys/fs/cgroup/a/b"
    write(tmp_path, {
        "proc/self/cgroup": "0::/a/b\n",
        f"{group}/memory.max": "max\n",
        f"{group}/memory.current": "100\n",
        "sys/fs/cgroup/a/memory.max": "1000\n",
        "sys/fs/cgroup/a/memory.current": "700\n",
        "sys/fs/cgroup/a/memory.stat": "anon 300\ninactive_file 250\nactive_file 150\n",
    })  # fmt: skip
    assert control_group_bytes(tmp_path) == 1000 - 700 + 250
    (tmp_path / group / "memory.max").write_text("200\n")
    assert control_group_bytes(tmp_path) == 100
    (tmp_path / group / "memory.current").write_text("300\n")
    assert control_group_bytes(tmp_path) == 0


def test_version_1_knows_its_limit_by_other_names(tmp_path):
    group = "sys/fs/cgroup/memory/docker/x"
    files = {
        "proc/self/cgroup": "3:cpuset:/\n4:cpu,memory:/docker/x\n0::/\n",
        f"{group}/memory.limit_in_bytes": "5000\n",
        f"{group}/memory.usage_in_bytes": "4000\n",
        f"{group}/memory.stat": "cache 900\ntotal_inactive_file 500\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "9999\n",
    }
    write(tmp_path, files)
    assert control_group_bytes(tmp_path) == 1500


def test_in_a_container_the_group_may_be_found_at_the_mount(tmp_path):
    write(tmp_path, {
        "proc/self/cgroup": "0::/../../host/only\n",
        "sys/fs/cgroup/memory.max": "3000\n",
        "sys/fs/cgroup/memory.current": "1000\n",
    })  # fmt: skip
    assert control_group_bytes(tmp_path) == 2000


@pytest.mark.parametrize("content", ["", "nonsense", "0::", "a:b:c:d\n::::\n"])
def test_files_that_make_no_sense_set_no_limit(tmp_path, content):
    write(tmp_path, {"proc/self/cgroup": content, "sys/fs/cgroup/memory.max": "x", "sys/fs/cgroup/memory.stat": "a"})
    assert control_group_bytes(tmp_path) is None


def test_a_cpu_has_what_is_free_and_no_more_than_its_group_leaves(tmp_path):
    free = available_bytes(root=tmp_path)
    assert 0 < free <= psutil.virtual_memory().total
    write(tmp_path, {
        "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "12345\n", "sys/fs/cgroup/memory.current": "345\n",
    })  # fmt: skip
    assert available_bytes(root=tmp_path) == 12_000


@pytest.mark.parametrize(
    ("stats", "expected"),
    [({"bytes_limit": 1000, "bytes_in_use": 300}, 700), ({"bytes_limit": 100, "bytes_in_use": 300}, 0), (None, None)],
)
def test_an_accelerator_has_what_its_allocator_has(stats, expected):
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert available_bytes(device) == expected


def test_an_engine_is_made_to_fit_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("fusedllm.sizing.available_bytes", lambda: 2 * 10**9)
    sizes = {"batch_buckets": (1, 2, 4), "token_budget": 128, "max_context": 1024, "random_weights": True}
    source, engine = fitting_engine("smollm2-135m", CacheSize(), **sizes)
    assert source == "smollm2-135m"
    assert (engine.cache_tokens, engine.max_batch, engine.token_budget) == (4 * 1024, 4, 128)
    _, engine = fitting_engine("smollm2-135m", CacheSize(tokens=2048), **sizes)
    assert engine.cache_tokens == 2048
    with pytest.raises(RequestError, match="more than there is"):
        fitting_engine("smollm2-135m", CacheSize(bytes=10**10), **sizes)


def test_a_narrower_cache_holds_more(monkeypatch):
    monkeypatch.setattr("fusedllm.sizing.available_bytes", lambda: 2 * 10**9)
    sizes = {"batch_buckets": (1,), "token_budget": 128, "max_context": 1024, "random_weights": True}
    held = [
        fitting_engine("smollm2-135m", CacheSize(fraction=0.5), kv_dtype=kind, **sizes)[1].cache_tokens
        for kind in ("float32", "bfloat16", "int8", "fp8")
    ]
    assert all(wide < narrow for wide, narrow in itertools.pairwise(held))
