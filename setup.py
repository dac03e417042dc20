"""Builds the native kernels of `fusedllm/kernels/cpu/`; everything else about the package is in pyproject.toml.

They are optional: without a C++ compiler (or without jaxlib's header) the install goes on, XLA serves, and the package
says once at run time what that loses.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = sorted(path.as_posix() for path in Path("fusedllm/kernels/cpu").glob("*.cc"))
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
# Only these files may contain instructions that not every processor has; which of them run is decided at run time.
VARIANT_FLAGS = {
    "variant_avx2.cc": AVX2,
    "variant_avx512.cc": AVX512,
    "variant_avx512bf16.cc": [*AVX512, "-mavx512bf16"],
}
# Of a build for the sanitizers, say.
EXTRA = os.environ.get("FUSEDLLM_BUILD_FLAGS", "").split()


class BuildKernels(build_ext):
    """Compiles each source with its own flags. The result is no Python module: `kernels/native.py` loads it."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles on all cores, and links."""
        jaxlib = importlib.util.find_spec("jaxlib")
        if jaxlib is None or jaxlib.origin is None:
            raise CompileError("the native kernels need jaxlib's header, and jaxlib is not installed")
        include = str(Path(jaxlib.origin).parent / "include")
        x86 = platform.machine().lower() in ("x86_64", "amd64")

        def compile_with(source: str, variant: list[str]) -> list[str]:
            # jaxlib's as a system's header, whose warnings are not ours.
            flags = [*FLAGS, *variant, *EXTRA, "-isystem", include]
            return self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
            )

        def compile_one(source: str) -> list[str]:
            variant = VARIANT_FLAGS.get(Path(source).name, []) if x86 else []
            try:
                return compile_with(source, variant)
            except CompileError:
                if not variant:
                    raise
                # An older compiler, or one for another processor. Without its flags a variant is left out.
                return compile_with(source, [])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread", *EXTRA],
            target_lang="c++",
        )

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None that a Python module would have."""
        return []


setup(
    ext_modules=[
        Extension(
            "fusedllm.kernels._cpu",
            SOURCES,
            depends=sorted(path.as_posix() for path in Path("fusedllm/kernels/cpu").glob("*.h")),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
