"""Every job of this repository: `nox -s demo | tests | fuzz | lint | gpu | bench`."""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
# The CPU build of PyTorch is enough for the tests; a newer one is fine where it is installed already.
TORCH = "torch==2.13.0"
# What the C++ tests need that PyPI does not have, by Debian's names, with a file that tells whether it is there.
DEBIAN_PACKAGES = {
    "doctest-dev": Path("/usr/include/doctest/doctest.h"),
    "qemu-user": Path("/usr/bin/qemu-x86_64"),
    "pkg-config": Path("/usr/bin/pkg-config"),
}


def system_packages(session: nox.Session) -> None:
    """Installs missing Debian packages when it may, else names them."""
    missing = [name for name, probe in DEBIAN_PACKAGES.items() if not probe.exists()]
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        session.run("apt-get", "update", "-qq", external=True, silent=True)
        session.run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, external=True, silent=True)
    else:
        session.error(f"install first: {' '.join(missing)} (Debian's names), then run this again")


def cmake_workflow(session: nox.Session, preset: str, *configure: str) -> None:
    session.run("cmake", "--preset", preset, *configure)
    session.run("cmake", "--build", "--preset", preset)
    session.run("ctest", "--preset", preset)


@nox.session
def demo(session: nox.Session) -> None:
    """Installs the package and runs `mlakit demo`."""
    session.install(".[cli]")
    session.run("mlakit", "demo")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no GPU: C++, sanitizers, the wheel, pytest, fuzz."""
    system_packages(session)
    session.install("cmake", "ninja", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")
    # The package puts it where no search looks.
    (cuobjdump,) = Path(session.virtualenv.location).glob("lib/python*/site-packages/nvidia/*/bin/cuobjdump")
    cmake_workflow(session, "ci", f"-DMLAKIT_CUOBJDUMP={cuobjdump.resolve()}")
    cmake_workflow(session, "asan")
    session.install(TORCH)
    session.install("-v", ".[test,cli]")
    session.run("pytest", "python/tests", "-m", "not gpu", *session.posargs)
    session.run("pytest", "fuzz", "-n", "auto", env={"MLAKIT_FUZZ_PROFILE": "ci"})


@nox.session
def fuzz(session: nox.Session) -> None:
    """The property tests alone, with more examples: `nox -s fuzz -- nightly`."""
    session.install(TORCH)
    session.install(".[test]")
    profile = session.posargs[0] if session.posargs else "dev"
    session.run("pytest", "fuzz", env={"MLAKIT_FUZZ_PROFILE": profile})


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, clang-format, mypy and the repository's own rules."""
    session.install("ruff", "clang-format", "mypy", "numpy", "pytest", "rich", "typer")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = subprocess.run(
        ["git", "ls-files", "*.h", "*.hpp", "*.cc", "*.c", "*.cu", "*.cuh"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    session.run("clang-format", "--dry-run", "--Werror", *sources)
    session.run("mypy", "--ignore-missing-imports", "python/src/mlakit")  # torch and other optional ones
    session.run("pytest", "python/tests/test_repository_rules.py", "--noconftest", "-p", "no:cacheprovider")


def sanitize(session: nox.Session, preset: str, *tools: str) -> None:
    for tool in tools:
        test = f"build/{preset}/cpp_tests/gpu/sm90_test"
        session.run("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", test, "--test-case=small*")


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Correctness on a Hopper GPU, with the torch that is installed there and under compute-sanitizer."""
    cmake_workflow(session, "cuda")
    sanitize(session, "cuda", "memcheck", "synccheck", "initcheck")
    session.run("cmake", "--preset", "racecheck")
    session.run("cmake", "--build", "--preset", "racecheck")
    sanitize(session, "racecheck", "racecheck")
    for folder in ("python/tests/gpu", "python/tests/engines"):
        session.run("python3", "-m", "pytest", folder, "-m", "gpu", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Benchmarks of the installed package: `nox -s bench -- cpu` or `-- gpu`."""
    which = session.posargs[0] if session.posargs else "cpu"
    session.run("python3", f"python/benchmarks/bench_{which}.py", *session.posargs[1:])
