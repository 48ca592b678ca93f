"""What every test shares: eight CPU devices, a compile cache, types checked.

Most of the time goes into compiling programs that run once. So the compiler is asked
for little optimisation, for its older code for loops and to leave programs in one part,
Python's garbage collector, which would walk all traces again and again, runs once a
file, and what a file compiled goes when memory runs high.
"""

import ctypes
import functools
import gc
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# As environment variables too, so that the processes a test starts share them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)

if not flags.FLAGS.is_parsed():  # grain's worker processes read absl flags
    flags.FLAGS.mark_as_parsed()

TYPES_CHECKED = importlib.util.find_spec("beartype") is not None
if TYPES_CHECKED:
    if "jaxtransfer" in sys.modules:
        raise RuntimeError("jaxtransfer was imported before its types could be checked")
    # What beartype can't check (a protocol without @runtime_checkable) is a warning.
    jaxtyping.install_import_hook(
        "jaxtransfer",
        "beartype.beartype(conf=beartype.BeartypeConf("
        "warning_cls_on_decorator_exception=UserWarning))",
    )


gc.disable()


_present_code = False
_flags = os.environ["XLA_FLAGS"]
_quick_flags = _flags


def _compile_quickly() -> None:
    """Have programs in one part, and XLA's older code for loops.

    Small programs compile in 0.6 of the time as one part for LLVM instead of 32, and by
    the older code, which tests marked "present_code" don't get, in a third to a half.
    JAX takes such options for a single function, or by XLA_FLAGS for the whole process
    and only if this XLA knows them; so its own function is wrapped, if it is there.
    Processes that a test starts get them as XLA_FLAGS.
    And all programs are written down in one MLIR context: JAX makes one for each, which
    for small ones is a fifth of the time.
    """
    from jax._src import compiler
    from jax._src.interpreters import mlir

    from jaxtransfer import parallel

    if hasattr(mlir, "make_ir_context"):
        own = mlir.make_ir_context
        shared = functools.cache(own)
        # A program that is compiled while another is written down has its own.
        mlir.make_ir_context = lambda: own() if mlir.ir.Context.current else shared()
    original = getattr(compiler, "get_compile_options", None)
    older = parallel.if_known("xla_cpu_use_fusion_emitters", False)
    whole = parallel.if_known("xla_cpu_parallel_codegen_split_count", 1)
    global _quick_flags
    for name, value in {**whole, **older}.items():
        _quick_flags += f" --{name}={str(value).lower()}"
    if original is None:
        return

    def get_compile_options(*arguments, **named):
        options = original(*arguments, **named)
        quicker = whole if _present_code else {**whole, **older}
        asked = dict(options.env_option_overrides)
        options.env_option_overrides = list({**quicker, **asked}.items())
        return options

    compiler.get_compile_options = get_compile_options


def pytest_sessionstart() -> None:
    _compile_quickly()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the test's fixtures."""
    global _present_code
    _present_code = item.get_closest_marker("present_code") is not None
    os.environ["XLA_FLAGS"] = _flags if _present_code else _quick_flags


def _resident_gigabytes() -> float:
    status = pathlib.Path("/proc/self/statm")
    if not status.exists():
        return 0.0
    pages = int(status.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    """After each file: collect garbage, and drop compiled programs if they are many.

    What survives one collection is left out of the next, until programs are dropped.
    The memory they had goes back, or each file after would be taken for a large one.
    """
    yield
    many = _resident_gigabytes() > 2.5
    if many:
        jax.clear_caches()
        gc.unfreeze()
    gc.collect()
    gc.freeze()
    if many and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)


@pytest.fixture
def key() -> jax.Array:
    """The typed key of seed 0."""
    return jax.random.key(0)


@pytest.fixture
def types_unchecked() -> Iterator[None]:
    """Lets wrong shapes and types through to the errors of the library itself."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def data_dir() -> str:
    """``JAXTRANSFER_DATA_DIR`` as it is given to ``jaxtransfer.data.load``."""
    value = os.environ.get("JAXTRANSFER_DATA_DIR", "")
    if not value:
        pytest.skip("JAXTRANSFER_DATA_DIR is not set: no prepared data sets to read")
    missing = [part for part in value.split(os.pathsep) if not os.path.isdir(part)]
    if missing:
        pytest.fail(f"JAXTRANSFER_DATA_DIR names folders that don't exist: {missing}")
    return value
