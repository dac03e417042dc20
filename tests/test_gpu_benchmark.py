"""`benchmarks/gpu.py` and what belongs to it: no part is broken, figures are kept, goals and floors are as they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import gpu
import gpu_compile
import gpu_floors
import gpu_goals
import gpu_hlo
import gpu_kernels
import gpu_model
import gpu_part
import gpu_report
import gpu_tables
from common import plain_json, sizes
from gpu_parts import PARTS

from fusedllm.errors import ImplementationError
from fusedllm.kernels import linear_triton
from fusedllm.kernels.linear import linear
from fusedllm.kernels.pallas_support import interpreting
from fusedllm.kernels.quantize import quantize
from fusedllm.quant.schemes import SCHEMES
from fusedllm.weights.registry import architecture

ROOT = Path(__file__).parent.parent

# Those that start processes which compile a model; `--tiny` runs them, and the tests of the ladder what is in them.
PROCESSES = ("policies", "compile", "peers", "ladder", "tests")
IN_PROCESS = [each for each in PARTS if each.name not in PROCESSES]
ROWS = ("decode", "prefill", "quantized", "kernels", "quantize", "crossings")


def a_part(seconds: float = 600.0) -> gpu_part.Part:
    return gpu_part.Part(gpu_part.TINY, True, time.monotonic() + seconds, lambda found: None)


@pytest.mark.parametrize("each", IN_PROCESS, ids=lambda each: each.name)
def test_a_part_runs_on_small_shapes_and_its_figures_go_into_json(each, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # A part may ask for devices.
    part = a_part()
    gpu_part.run(each.module, each.function, part)
    found = json.loads(plain_json(part.found))
    assert "failed" not in found, found
    assert bool(found.get("rows")) == (each.name in ROWS)
    assert not any("FAILED" in why for why in found.get("skipped", {}).values()), found
    # What was found makes a report, alone as with others.
    assert gpu_report.report({"parts": {each.name: found}, "tiny": True})


def test_a_part_that_fails_is_told_in_one_line_and_keeps_what_it_found(monkeypatch):
    def broken(part):
        part.row(first=1)
        part.attempt("second", lambda: 1 / 0)
        raise MemoryError("no room\nfor this")

    monkeypatch.setattr(gpu_model, "decode_part", broken)
    part = a_part()
    gpu_part.run("gpu_model", "decode_part", part)
    assert part.found["rows"] == [{"first": 1}]
    assert part.found["skipped"] == {"second": "ZeroDivisionError: division by zero"}
    assert part.found["failed"] == "MemoryError: no room"


def test_nothing_is_begun_after_a_part_s_time():
    part = a_part(seconds=-1)
    assert part.attempt("late", lambda: pytest.fail("it ran")) is None
    assert part.found["skipped"] == {"late": "no time was left"}


def test_the_command_runs_parts_in_processes_and_kills_what_takes_too_long(tmp_path, monkeypatch):
    # A part that would sleep for a minute, by the same way as the others: with its figure on disk it is killed.
    (tmp_path / "gpu_sleeps.py").write_text(
        "import time\n\ndef sleeps(part):\n    part.put('before', 1)\n    time.sleep(60)\n"
    )
    (tmp_path / "gpu_parts.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Each:\n    name: str\n    title: str\n"
        "    module: str\n    function: str\n    seconds: float\n\n\n"
        "PARTS = (Each('sleeps', '', 'gpu_sleeps', 'sleeps', 1),)\n"
    )
    program = (tmp_path / "gpu_part.py").write_text((ROOT / "benchmarks" / "gpu_part.py").read_text())
    assert program
    (tmp_path / "common.py").write_text((ROOT / "benchmarks" / "common.py").read_text())
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    slow = type(PARTS[0])("sleeps", "", "gpu_sleeps", "sleeps", 4)
    result = gpu.measure([slow], tmp_path / "out", budget=4.0, tiny=True, programs=tmp_path / "programs")
    found = result["parts"]["sleeps"]
    assert found["before"] == 1
    assert "was not done after" in found["failed"]
    assert found["wall_seconds"] < 30
    assert json.loads((tmp_path / "out" / "gpu-unknown.json").read_text())["parts"]["sleeps"] == found


def test_the_command_lists_its_parts_without_jax():
    code = (
        "import runpy, sys; sys.argv = ['gpu.py', '--list']; runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    )
    code += "; assert 'jax' not in sys.modules"
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'benchmarks'); {code}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.split()[0] for line in ran.stdout.splitlines()] == [each.name for each in PARTS]


def test_time_that_parts_leave_is_given_to_those_after_them():
    first, *others = PARTS
    wanted = sum(each.seconds for each in others)
    assert gpu.allowance(first, others, first.seconds + wanted + 100) == first.seconds + 100
    half = (first.seconds + wanted) / 2
    assert gpu.allowance(first, others, half) == pytest.approx(first.seconds / 2)
    assert gpu.allowance(PARTS[-1], [], 7.0) == 7.0


@pytest.mark.parametrize("name", ["xla", "triton"])
def test_implementations_are_asked_for_by_name_and_say_themselves_that_they_can_not_run(name):
    case = next(gpu_kernels.linear_cases(a_part()))
    operands = case.make(0)
    if name == "xla":
        program = gpu_kernels.lowered(case, name, operands).compile()
        assert gpu_kernels.timed(gpu_part.Clock(), program, [operands], 1).samples[0] > 0
    else:
        with pytest.raises(ImplementationError, match="can't run"):
            gpu_kernels.lowered(case, name, operands)


def test_tables_are_found_and_a_row_s_variants_change_one_number_each():
    found = {table.title: table for table in gpu_tables.tables()}
    assert {"linear_triton.BLOCKS", "ring_linear_triton.BLOCKS"} <= found.keys()
    row = found["linear_triton.BLOCKS"].rows[0]
    made = dict(gpu_tables.variants(row))
    rows, stages = row.rows, row.stages
    wanted = {f"rows {rows} -> {2 * rows}", f"rows {rows} -> {rows // 2}"}
    assert {*wanted, f"stages {stages} -> {stages + 1}", f"stages {stages} -> {stages - 1}"} <= made.keys()
    for other in made.values():
        assert sum(getattr(other, name) != getattr(row, name) for name in type(row).__dataclass_fields__) == 1


def test_a_replaced_row_is_what_a_kernel_is_traced_with_until_the_end():
    table = next(table for table in gpu_tables.tables() if table.title == "linear_triton.BLOCKS")
    weight = quantize(jax.random.normal(jax.random.key(0), (96, 64)), SCHEMES["int4-g32"])
    x = jax.random.normal(jax.random.key(1), (32, 64), jnp.bfloat16)  # Of the second row.

    def traced():
        return str(jax.make_jaxpr(lambda x: linear(x, weight, implementation="triton")[0])(x))

    def product():
        return np.asarray(linear(x, weight, implementation="triton")[0], np.float32)

    before = table.rows
    with interpreting():
        usual, right = traced(), product()
        other = next(row for change, row in gpu_tables.variants(before[1]) if change.startswith("rows"))
        with gpu_tables.replaced(table, 1, other):
            assert traced() != usual
            np.testing.assert_allclose(product(), right, rtol=2**-7)  # A last bit of bfloat16.
        assert table.rows is before
        assert traced() == usual


def test_variants_are_timed_beside_the_table_s_own_and_the_best_is_told(monkeypatch):
    """As on a GPU, the kernels interpreted."""
    monkeypatch.setattr(gpu_tables, "on_gpu", lambda: True)
    # One case, and of one number of its row both variants.
    monkeypatch.setattr(gpu_kernels, "LINEAR_TOKENS", (32,))
    cases = [case for case in gpu_kernels.linear_cases(a_part()) if case.name.startswith("int8,")]
    monkeypatch.setattr(gpu_tables, "in_turn", lambda part: cases)
    own = linear_triton.BLOCKS[1]
    few = [change for change in gpu_tables.variants(own) if change[0].startswith("rows")]
    monkeypatch.setattr(gpu_tables, "variants", lambda row: iter(few if row is own else ()))
    part = a_part()
    with interpreting():
        gpu_part.run("gpu_tables", "tables_part", part)
    assert "failed" not in part.found, part.found
    assert "skipped" not in part.found, part.found
    assert [row["variant"] for row in part.found["rows"]] == [change for change, _ in few]
    assert len(few) == 2
    assert all(row["table"] == "linear_triton.BLOCKS" and row["row"] == 1 for row in part.found["rows"])
    fastest = min(part.found["rows"], key=lambda row: row["ratio"])
    assert gpu_tables.best(part.found["rows"]) == ([fastest] if fastest["ratio"] < 1 else [])


def test_the_clock_subtracts_what_its_plug_takes(monkeypatch):
    """As on a GPU: the CPU's queue stands for its."""
    monkeypatch.setattr(gpu_part, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu_part, "PLUG_SIZE", 64)
    clock = gpu_part.Clock()
    x = gpu_part.normal((256, 256), "float32")
    product = jax.jit(lambda x: x @ x)
    found = clock.time([lambda: product(x)], 3)
    assert len(found.samples) == 3
    assert all(sample > 0 for sample in found.samples)


def test_goals_are_judged_by_what_was_measured_and_only_on_the_chip_that_they_are_of():
    parts = {
        "environment": {"device": {"kind": "NVIDIA H200"}},
        "tests": {"counts": {"passed": 9}, "passed": True},
        "ceilings": {"to_device": {"median": 50e9}, "to_host": {"median": 40e9}, "copy": {"median": 4e12}},
        "prefill": {"rows": [{"tokens": 1024, "seconds": {"median": 4e-3}}]},
        "decode": {"rows": [{"context": 128, "batch": 1, "tokens_per_second": 1000.0, "step_seconds": 1e-3}]},
        "quantized": {"rows": [{"weights": "int8", "decode_ratio": 1.5}]},
        "arrow": {"bytes_per_second": {"median": 30e9}},
        "policies": {
            "rows": [{"policy": "masked", "latency": 0.3, "trusted": 0.1, "sent": 2.5e9, "received": 2e9}]
        },
        "peers": {"rows": [{"kind": "eager", "what": "decode", "seconds": {"median": 8e-3}}]},
    }  # fmt: skip
    found = {each["goal"]: each for each in gpu_goals.verdicts({"parts": parts, "tiny": False})}
    told = {name: each["verdict"] for name, each in found.items()}
    assert told["kernels' tests that failed"] == "held"
    assert told["prefill of 1,024 tokens"] == "held"
    assert told["decode at batch 1"] == "MISSED"
    assert told["int8 decode, of bfloat16's"] == "held"
    assert told["int4 decode, of bfloat16's"] == "not measured"
    assert found["Arrow file to device, of the link"]["measured"] == pytest.approx(0.6)
    # 50 ms there, 50 ms back and 100 ms of work.
    assert found["masked prefill, of its transfers and trusted work"]["measured"] == pytest.approx(1.5)
    assert found["decode, of transformers eager"]["measured"] == pytest.approx(8)
    parts["environment"]["device"]["kind"] = "NVIDIA A100"
    elsewhere = {each["goal"]: each["verdict"] for each in gpu_goals.verdicts({"parts": parts, "tiny": False})}
    assert elsewhere["decode at batch 1"] == "not judged here"
    assert elsewhere["int8 decode, of bfloat16's"] == "held"
    assert all("not" in each["verdict"] for each in gpu_goals.verdicts({"parts": parts, "tiny": True}))


def test_floors_are_what_the_issue_counted_by_hand():
    model, chip = sizes(architecture("llama-1b")), gpu_floors.CHIPS["h200"]
    step = gpu_floors.whole(model, 1, 128)
    # 1.236 billion weights in two bytes, and 4 MB of cache.
    assert step.bytes == pytest.approx(2.476e9, rel=1e-3)
    assert step.bound(chip) == "bytes"
    assert step.floor(chip) == pytest.approx(0.516e-3, rel=1e-2)
    prompt = gpu_floors.whole(model, 1024, 0)
    assert prompt.bound(chip) == "operations"
    assert 2.0e12 < prompt.operations < 2.5e12
    # The parts alone need no fewer operations than the whole, and a layer's weights are counted once.
    parts = [*gpu_floors.layer(model, 1024, 0)]
    assert 16 * sum(part.operations for part in parts) >= 0.99 * prompt.operations
    weights = 2 * (2048 * (2048 + 1024) + 2048 * 2048 + 3 * 2048 * 8192)
    assert 0 < sum(part.bytes for part in gpu_floors.layer(model, 1, 0)) / weights - 1 < 0.01


def test_the_page_of_floors_is_what_the_program_prints():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    printed = gpu_floors.report(sizes(architecture("llama-1b")), gpu_floors.CHIPS["h200"], 1024, 128)
    for line in printed.splitlines():
        assert not line.startswith("| ") or " ".join(line.split()) in [
            " ".join(each.split()) for each in page.splitlines()
        ]


def test_kernels_and_copies_of_a_program_are_counted_loops_once_and_fusions_as_one():
    program = gpu_hlo.Program(
        """
HloModule step

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %e = f32[8]{0} exponential(%p)
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %c = f32[8]{0} copy(%f)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %c)
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%arg), index=0
  ROOT %less = pred[] fusion(%n), kind=kLoop, calls=%fused
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %g = f32[8]{0} custom-call(%a), custom_call_target="gemm"
  %s = (s32[], f32[8]{0}, /*index=2*/f32[8]{0}) tuple(%g, %g, %g)
  %w = (s32[], f32[8]{0}, /*index=2*/f32[8]{0}) while(%s), condition=%condition, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""
    )
    whole, step = program.count(), program.largest_loop()
    assert (whole.kernels, whole.copies) == (4, [32])
    assert (step.kernels, step.copies) == (2, [32])


def test_targets_say_which_chip_they_are():
    found = {
        name: gpu_compile.capability(path.read_text(encoding="utf-8")) for name, path in gpu_compile.TARGETS.items()
    }
    assert found == {"h200": 9.0, "a100": 8.0}
    kinds = {name: gpu_compile.kind(path.read_text(encoding="utf-8")) for name, path in gpu_compile.TARGETS.items()}
    assert kinds == {"h200": "NVIDIA H200", "a100": "NVIDIA A100-SXM4-80GB"}
    # A chip that can be compiled for has a row in the table of floors, of the same bandwidth.
    for name, path in gpu_compile.TARGETS.items():
        assert f"memory_bandwidth: {gpu_floors.CHIPS[name].bandwidth:.0f}\n" in path.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="no cuda_compute_capability"):
        gpu_compile.capability("gpu_device_info {}")


def test_what_ptxas_says_of_kernels_is_read():
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    16 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
    assert gpu_compile._read(said) == [
        gpu_compile.Kernel("first", 64, 0, 2048),
        gpu_compile.Kernel("second", 255, 24, 0),
    ]


@pytest.mark.slow
def test_programs_are_compiled_for_a_gpu_that_is_not_here(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="needs XLA's compiler for CUDA, of the extra `gpu-compile`")
    path = tmp_path / "compiled.json"
    command = [sys.executable, "benchmarks/gpu_compile.py", "--ckpt", "smollm2-135m", "--json", str(path)]
    subprocess.run([*command, "--programs", "decode", "--max-context", "256"], cwd=ROOT, check=True, timeout=600)
    (found,) = json.loads(path.read_text())["programs"].values()
    assert found["aliased"] >= found["cache"] > 0
    assert found["count"]["kernels"] > 30 * found["layer"]["kernels"] > 0
