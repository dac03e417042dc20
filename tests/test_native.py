"""The native library: choice of implementation and variant, threads, and what is said where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import fusedllm
from fusedllm.errors import ConfigError, ImplementationError
from fusedllm.kernels import native
from fusedllm.kernels.linear import linear

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "why_unavailable", lambda: "they were not built")
    monkeypatch.setattr(native, "_warned", type(native._warned)())


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@needs_native
def test_the_portable_variant_runs_everywhere():
    assert native.isas()[-1] == "portable"
    assert native.isa() in native.isas()


@needs_native
def test_a_variant_is_chosen_inside_a_block_only():
    before = native.isa()
    with native.using_isa("portable"):
        assert native.isa() == "portable"
    assert native.isa() == before
    with (
        pytest.raises(ImplementationError, match=r"'mmx' can't run here; this processor runs: .*portable"),
        native.using_isa("mmx"),
    ):
        pass


@needs_native
def test_the_environment_chooses_a_variant():
    code = "from fusedllm.kernels import native; print(native.isa())"
    assert python(code, FUSEDLLM_CPU_ISA="portable").stdout.strip() == "portable"
    refused = python(code, FUSEDLLM_CPU_ISA="sse9")
    assert "FUSEDLLM_CPU_ISA asks for 'sse9'; this processor runs:" in refused.stderr
    command = "import sys; from fusedllm.cli.main import main; sys.exit(main(['generate', '--max-tokens', '1']))"
    refused = python(command, FUSEDLLM_CPU_ISA="sse9")
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    assert "this processor runs:" in refused.stderr


def test_without_the_library_xla_serves_and_one_warning_says_so(without_native):
    x, weight = jnp.ones((2, 8)), jnp.ones((3, 8))
    with pytest.warns(native.MissingKernelsWarning, match="native CPU kernels are missing: they were not built"):
        (product,) = linear(x, weight)
    np.testing.assert_array_equal(product, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear(x, weight)


def test_asking_for_what_is_missing_is_refused(without_native):
    with pytest.raises(ImplementationError, match="linear: the implementation 'ffi' can't run: they were not built"):
        linear(jnp.ones((2, 8)), jnp.ones((3, 8)), implementation="ffi")
    with pytest.raises(ImplementationError, match="the implementation 'ffi' can't run: they were not built"):
        fusedllm.load("smollm2-135m", implementation="ffi")


@needs_native
@pytest.mark.parametrize("threads", [0, -1, True, 1.5, 257, 2**32 + 1])
def test_a_number_of_threads_that_is_none_is_refused(threads):
    with pytest.raises(ConfigError, match="threads must be an integer from 1 to 256"):
        fusedllm.load("smollm2-135m", threads=threads)


@pytest.mark.parametrize("bits", [0, 4, "16"])
def test_other_numbers_of_activation_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="activation_bits must be 8 or 16"):
        fusedllm.load("smollm2-135m", activation_bits=bits)


def test_a_cache_dtype_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"kv_dtype must be auto, float32, .*, int8, fp8, got 'fp4'"):
        fusedllm.load("smollm2-135m", kv_dtype="fp4", random_weights=True)


@needs_native
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_threads_are_those_that_the_process_may_use():
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from fusedllm.kernels import native
print(native.threads())
"""
    assert python(code).stdout.strip() == "1"


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, numpy as np
from fusedllm.kernels import native
from fusedllm.kernels.packed import SCHEMES
blocks = np.ones((4096, 36), np.uint8)
def pack():
    out = np.empty(SCHEMES["Q4_0"].packed_shape((4096, 64)), np.uint8)
    native.pack(0, 4096, 64, blocks, out)
    return out
native.set_threads(2)
expected = pack()
child = os.fork()
if child == 0:
    native.set_threads(8)
    os._exit(0 if all((pack() == expected).all() for _ in range(50)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code).stdout.strip() == "0"


@needs_native
def test_a_library_of_another_age_is_not_used():
    code = "from fusedllm.kernels import native; native.INTERFACE += 1; print(native.why_unavailable())"
    assert "was built from other sources; build it again" in python(code).stdout


@needs_native
def test_who_takes_an_item_changes_no_bit():
    """XLA's threads flush denormal numbers to zero, others do not; the pool's do as the caller does."""
    code = """
import jax.numpy as jnp, numpy as np
from fusedllm.kernels import native
from fusedllm.kernels.linear import linear
from fusedllm.kernels.packed import SCHEMES
native.set_threads(2)
out = np.empty(SCHEMES["Q4_0"].packed_shape((4096, 64)), np.uint8)
native.pack(0, 4096, 64, np.ones((4096, 36), np.uint8), out)
x, weight = jnp.full((1, 8), 1e-20), jnp.full((65536, 8), 1e-20)
print(len({np.asarray(linear(x, weight, implementation="ffi")[0]).tobytes() for _ in range(5)}),
      len(np.unique(linear(x, weight, implementation="ffi")[0])))
"""
    assert python(code).stdout.split() == ["1", "1"]


def test_pallas_is_refused_on_a_cpu():
    with pytest.raises(ImplementationError, match="no lowering for the CPU"):
        fusedllm.load("smollm2-135m", implementation="pallas")


@needs_native
def test_an_idle_pool_sleeps():
    code = """
import time, jax.numpy as jnp
from fusedllm.kernels.linear import linear
linear(jnp.ones((1, 512)), jnp.ones((4096, 512)))[0].block_until_ready()
time.sleep(0.2)
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""
    done = python(code)
    assert float(done.stdout) < 0.1, done.stderr
