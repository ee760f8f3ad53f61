"""Compile the C++ kernels with the system compiler, once per machine, into a user cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from zograph.env import setting

__all__ = ["KernelBuildError", "build", "cache_dir", "compilers"]

SOURCE = Path(__file__).with_name("noise.cpp")
HEADER = SOURCE.with_name("common.h")
BASE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-fast-math")


class KernelBuildError(RuntimeError):
    """No compiler produced a loadable library; the message says what each one answered."""


def cache_dir() -> Path:
    """Return the folder of compiled kernels: $ZOGRAPH_CACHE, or zograph/ in the user's cache."""
    chosen = setting("ZOGRAPH_CACHE")
    if chosen:
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "zograph"


def compilers() -> list[list[str]]:
    """Return the compiler commands to try, $CXX first."""
    found = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else []
    found += [[name] for name in ("c++", "g++", "clang++")]
    return [command for command in found if shutil.which(command[0])]


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(("flags", "Features")):
                    return line
    except OSError:
        pass
    return platform.processor()


def _openmp(version: str) -> list[str]:
    """Flags for OpenMP: link the very libgomp torch has loaded, so that one thread pool exists."""
    if "clang" in version:
        return ["-fopenmp"]
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    bundled += sorted((Path(torch.__file__).parents[1] / "torch.libs").glob("libgomp*.so*"))
    return ["-fopenmp", *map(str, bundled[:1])]


def _flag_sets(version: str, cpu: str) -> list[list[str]]:
    """Flags from best to plainest; the bits do not depend on which set compiles."""
    native = ["-march=native"]
    wide = ["-mprefer-vector-width=512"] if "avx512f" in cpu.split() else []
    openmp = _openmp(version)
    return [native + wide + openmp, native + openmp, ["-fopenmp"], native, []]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def _compile(source: Path, compiler: list[str], flags: list[str], target: Path) -> str:
    """Compile to a temporary name and rename, so that processes never see half a file."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    libraries = [f for f in flags if f.endswith((".so", ".so.1")) or ".so." in f]
    options = [f for f in flags if f not in libraries]
    command = [*compiler, *BASE_FLAGS, *options, "-o", temporary, str(source), *libraries]
    try:
        done = _run(command)
        if done.returncode == 0:
            os.replace(temporary, target)
            return ""
        return f"{' '.join(command)}\n{done.stderr[-500:]}"
    finally:
        Path(temporary).unlink(missing_ok=True)


def _folder() -> Path:
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:  # a read-only home: compile for this process only
        return Path(tempfile.mkdtemp(prefix="zograph-"))


def build(source: Path = SOURCE) -> ctypes.CDLL:
    """Return a source's library, compiled now unless the cache has it.

    Raises
    ------
    KernelBuildError
        If there is no compiler, or none could compile and load the source.
    """
    text = source.read_text(encoding="utf-8") + HEADER.read_text(encoding="utf-8")
    cpu = _cpu_flags()
    folder = _folder()
    problems = []
    for compiler in compilers():
        version = _run([*compiler, "--version"]).stdout
        for flags in _flag_sets(version, cpu):
            parts = [text, *compiler, version, *BASE_FLAGS, *flags, cpu]
            digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=10).hexdigest()
            target = folder / f"{source.stem}-{digest}.so"
            try:
                if not target.exists():
                    problem = _compile(source, compiler, flags, target)
                    if problem:
                        problems.append(problem)
                        continue
                return ctypes.CDLL(str(target))
            except (OSError, subprocess.SubprocessError) as error:
                problems.append(f"{' '.join(compiler)}: {error}")
    raise KernelBuildError("\n".join(problems) or "no C++ compiler found ($CXX, c++, g++, clang++)")
