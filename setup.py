"""Builds the native modules with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """One CMake build that installs every native file into the package.

    Read from the environment: PYRUNTIME_CMAKE_ARGS (more options for CMake), MAX_JOBS.
    """

    def run(self) -> None:
        import pybind11

        root = Path(__file__).parent.resolve()
        package = Path(self.get_ext_fullpath("pyruntime._cpu")).parent.resolve()
        build = Path(self.build_temp).resolve() / f"cp{sys.version_info[0]}{sys.version_info[1]}"
        build.mkdir(parents=True, exist_ok=True)
        # The folder is kept for its objects; its cache holds paths of an isolated environment that
        # is gone, and options that were not asked for this time.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={package.parent}",
            *shlex.split(os.environ.get("PYRUNTIME_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call(["cmake", "-S", str(root), "-B", str(build), "-GNinja", *options])
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", jobs])
        subprocess.check_call(["cmake", "--install", str(build)])


setup(
    ext_modules=[Extension(f"pyruntime.{name}", sources=[]) for name in ("_cpu", "_cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
