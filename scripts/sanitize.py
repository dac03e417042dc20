"""Runs the tests of the native kernels with the compiler's address and undefined-behaviour sanitizers.

    python scripts/sanitize.py
    python scripts/sanitize.py -k attention

Builds the kernels a second time, with checks, in a temporary directory; the installed library stays as it is. Needs
GCC or Clang and the extra `test`. Arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = [
    "test_packed.py",
    "test_linear.py",
    "test_draw.py",
    "test_rows.py",
    "test_cached_attention.py",
    "test_quantize_kernel.py",
    "test_ring_linear.py",
    "test_hadamard.py",
    "test_ring.py",
]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"


def main() -> None:
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as directory:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", directory, "--build-temp", directory]
        subprocess.run(build, cwd=ROOT, check=True, env={**os.environ, "FUSEDLLM_BUILD_FLAGS": FLAGS})
        (library,) = Path(directory).glob("fusedllm/kernels/_cpu*")
        runtimes = [_runtime(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
        environment = {
            **os.environ,
            "FUSEDLLM_CPU_LIBRARY": str(library),
            # The interpreter is not built with the sanitizers, so their runtime must be there before it.
            "LD_PRELOAD": " ".join(runtimes),
            # The interpreter and jaxlib keep memory until the process ends.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        tests = [f"tests/{name}" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *sys.argv[1:]]
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


def _runtime(compiler: str, name: str) -> str:
    asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return asked.stdout.strip()


if __name__ == "__main__":
    main()
