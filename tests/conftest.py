"""The CPU pretends to be eight devices, and compiled programs are kept for the next run.

Shapes and types in annotations are checked while tests run if JAXPEFT_CHECK_TYPES is 1.
"""

import functools
import gc
import importlib.metadata
import itertools
import os
import pathlib

import compiled_programs

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the tests' time is compilation: the same programs, machine code that is made sooner.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones refuse what they lack
    flags += " --xla_cpu_use_fusion_emitters=false"
given = os.environ.get("XLA_FLAGS", "")
if flags not in given:  # a worker inherits them; given twice, they would be other keys of the cache
    os.environ["XLA_FLAGS"] = f"{given} {flags}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.update(compiled_programs.SETTINGS)

if os.environ.get("JAXPEFT_CHECK_TYPES") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("jaxpeft", "checker.check")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

MOST_MAPS = 30_000
LONG = (
    "test_methods",
    "test_chaos",
    "test_load_memory",
    "test_hosts",
    "test_meshes",
    "test_train_faults",
    "test_train_methods",
    "test_golden_methods",
    "test_decoding",
    "test_train_outside",
    "test_prefix",
)
"""Files that take longest: they are begun first, so that no process ends long after the others."""
TESTS = itertools.count(1)


def pytest_configure(config):
    """Checks the compilation cache before the first test, not in each process of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        compiled_programs.clean()


def pytest_collection_finish():
    """Tracing makes many objects: what is imported is not searched for garbage every time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Puts the files of `LONG` in front."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def getkey():
    """A function that gives a new PRNG key at every call, the same ones in every run."""
    keys = map(jax.random.wrap_key_data, _key_data())
    return lambda: next(keys)


@functools.cache
def _key_data():
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(5678), 1000)))


@pytest.fixture(scope="module")
def one_device():
    """Runs made in this process see the first device only."""
    from jaxpeft.mesh import layouts

    with pytest.MonkeyPatch.context() as patch:
        mesh = layouts.make_mesh(devices=jax.devices()[:1])
        patch.setattr(layouts, "make_mesh", lambda **sizes: mesh)
        yield


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
    """Every program holds several memory maps, and Linux gives a process 65,530 of them.

    Beyond that LLVM aborts the process. Looked at every twentieth test: it takes time.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(TESTS) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
