"""Builds the compiled kernels; everything else about the package is in pyproject.toml.

An extension that cannot be built is left out with one warning, and the Python twins run.
IMDS_REQUIRE_KERNEL=1 makes that an error, IMDS_DISABLE_KERNEL=1 builds none.
"""

from __future__ import annotations

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The compiled modules of imds/_kernel. Touch this, then update KERNELS there (a test compares the two).
KERNELS = ("executor", "links", "record", "sortedset", "store", "switch")

FLAGS = ["-O2", "-Wall", "-Wextra", *os.environ.get("IMDS_KERNEL_FLAGS", "").split()]
# What Cython's own code brings up: helpers that this module does not use, parameters that a slot must have.
FLAGS += ["-Wno-unused-function", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
LINK_FLAGS = os.environ.get("IMDS_KERNEL_LINK_FLAGS", "").split()


def flag(name: str) -> bool:
    """Whether the environment variable ``name`` is set to anything but 0."""
    return os.environ.get(name, "") not in ("", "0")


class BuildKernels(build_ext):
    """build_ext that goes on without the kernels, unless they are required."""

    def finalize_options(self) -> None:
        """Turn Cython into C."""
        try:
            from Cython.Build import cythonize

            self.distribution.ext_modules = cythonize(
                self.distribution.ext_modules,
                compiler_directives={
                    "language_level": 3,
                    "boundscheck": False,
                    "wraparound": False,
                    "cdivision": True,
                    "initializedcheck": False,
                },
            )
        except Exception as error:
            self.do_without(error)
        super().finalize_options()

    def run(self) -> None:
        """Turn C into modules."""
        try:
            super().run()
        except Exception as error:
            self.do_without(error)

    def do_without(self, error: Exception) -> None:
        """Warn, and build nothing; raise ``error`` where the kernels are required."""
        if flag("IMDS_REQUIRE_KERNEL"):
            raise error
        sys.stderr.write(
            "warning: imds is built without its compiled kernels and will run its Python ones, "
            f"at a fraction of the speed: {error}\n"
        )
        self.distribution.ext_modules = self.extensions = []


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[]
    if flag("IMDS_DISABLE_KERNEL")
    else [
        Extension(
            f"imds._kernel.{name}",
            [f"imds/_kernel/{name}.pyx"],
            extra_compile_args=FLAGS,
            extra_link_args=LINK_FLAGS,
        )
        for name in KERNELS
    ],
)
