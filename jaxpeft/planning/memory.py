"""The memory of the training step, counted by XLA, on devices that need not be present.

The step of a run is compiled ahead of time from shapes alone, for this machine or for a TPU
topology. The compiled program tells what a device must hold: arguments (the base, the trained
arrays, the optimizer's state, a batch), temporaries, and the program itself. Nothing is estimated:
if a run does not fit, its alternatives are compiled too.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxpeft.config.run_config import RunConfig
from jaxpeft.core.backend import traced_for
from jaxpeft.core.errors import UserError
from jaxpeft.mesh import layouts
from jaxpeft.models.config import ModelConfig
from jaxpeft.planning.machines import GIB, Machine
from jaxpeft.pretrained.shapes import placed_model
from jaxpeft.training.checks import check_batches, check_model
from jaxpeft.training.rows import Rows
from jaxpeft.training.run import Run


class Memory(NamedTuple):
    """The memory of a compiled program on one device, in bytes, as XLA counts it.

    Attributes:
        arguments: Base, state and batch.
        results: New state and metrics, except those that reuse the memory of arguments.
        temporaries: Intermediate values, at their peak.
        code: The program.
    """

    arguments: int
    results: int
    temporaries: int
    code: int


class Measured(NamedTuple):
    """The result of compiling the step.

    Attributes:
        run: The run, as shapes.
        memory: Memory by kind; None if XLA refused the program for lack of memory.
        device_bytes: The bytes that a device must hold.
        fits: Whether a device can hold them.
        seconds: How long compiling took.
    """

    run: Run
    memory: Memory | None
    device_bytes: int
    fits: bool
    seconds: float

    def line(self, machine: Machine) -> str:
        """The result in one line."""
        has, verdict = machine.device_bytes / GIB, "fits" if self.fits else "does not fit"
        needs = f"{self.device_bytes / GIB:.2f} of {has:.2f} GiB a {machine.unit}"
        return f"{needs}: {verdict} ({self.seconds:.0f} s)"


def make_run(config: RunConfig, model: ModelConfig, rows: Rows, machine: Machine) -> Run:
    """The run that training would make, with shapes on the devices of a machine.

    Raises:
        UserError: Mesh or batches do not fit the devices.
    """
    mesh = layouts.make_mesh(**config.mesh.sizes, devices=machine.devices)
    check_batches(config, mesh)
    layout = layouts.Layout(mesh, layouts.parse_rules(config.mesh.rules), model)
    section = config.model
    base = placed_model(
        model,
        layout,
        dtype=section.dtype,
        compute_dtype=section.compute_dtype,
        quantization=section.quantization,
        double_quantization=section.double_quantization,
    )
    base = dataclasses.replace(base, name=section.path, revision=section.revision or "")
    return Run(config, base, rows, layout, shapes_only=True)


@contextlib.contextmanager
def tracing_for(machine: Machine) -> Iterator[None]:
    """Programs traced in this block are for the devices of a machine."""
    with contextlib.nullcontext() if machine.platform is None else traced_for(machine.platform):
        yield


def measure(config: RunConfig, model: ModelConfig, rows: Rows, machine: Machine) -> Measured:
    """Compiles a run's training step for a machine.

    Args:
        config: The run.
        model: Its architecture.
        rows: Its data, which decide the shape of a batch.
        machine: The devices.

    Raises:
        UserError: Mesh or batches do not fit the devices.
    """
    with tracing_for(machine):
        run, began = make_run(config, model, rows, machine), time.perf_counter()
        try:
            compiled = run.compile_step()
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            return Measured(run, None, needed, False, time.perf_counter() - began)
    seconds, stats = time.perf_counter() - began, compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    return Measured(run, memory, sum(memory), sum(memory) <= machine.device_bytes, seconds)


def needed_bytes(text: str) -> int | None:
    """The memory that a program needs, from XLA's text refusing it; None if the text does not say.

    Example:
        >>> needed_bytes("Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm.")
        26306674688
    """
    used = r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"
    found = re.search(rf"{used}|memory required for [\w ]+ \(([\d.]+)([KMGT]?)\) exceeds", text)
    if not found:
        return None
    number, unit = found[1] or found[3], found[2] or found[4] or " "
    return round(float(number) * 1024 ** " KMGT".index(unit))


def levers(config: RunConfig, machine: Machine) -> list[list[dict[str, Any]]]:
    """The keys of a config that save memory, each with values from mild to strong.

    They are rematerialisation, fewer rows at a time (the update is the same), a base spread over
    the devices, and a quantised base.
    """
    train, mesh, found = config.train, config.mesh, []
    if train.remat != "full":
        found.append([{"train.remat": "full"}])
    sizes = mesh.sizes
    free = max(machine.count // math.prod(size for size in sizes.values() if size > 0), 1)
    sizes = {axis: free if size == -1 else size for axis, size in sizes.items()}
    shards = sizes["data"] * sizes["fsdp"]
    rows = train.microbatch_size or train.batch_size
    smaller = [n for n in range(rows - 1, 0, -1) if train.batch_size % n == n % shards == 0]
    if smaller:
        found.append([{"train.microbatch_size": n} for n in smaller])
    if sizes["data"] > 1:
        found.append([{"mesh.data": 1, "mesh.fsdp": shards}])
    if config.model.quantization is None:
        found.append([{"model.quantization": "nf4"}])
    return found


def changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """A config with some values replaced, given by the paths of their keys."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, _, name = path.partition(".")
        sections.setdefault(section, {})[name] = value
    replaced = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in sections.items()
    }
    return dataclasses.replace(config, **replaced)


class Alternative(NamedTuple):
    """Other values of some keys, and the result of compiling with them.

    Attributes:
        changes: Values by the paths of their keys.
        device_bytes: The bytes that a device must hold.
        fits: Whether a device can hold them.
        seconds: How long compiling took.
    """

    changes: dict[str, Any]
    device_bytes: int
    fits: bool
    seconds: float


def find_fitting(
    config: RunConfig,
    model: ModelConfig,
    rows: Rows,
    machine: Machine,
    tokenizer: Any = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Alternative]:
    """Compiles changes that may make a run fit: each lever alone, then several together.

    Args:
        config: A run that does not fit.
        model: Its architecture.
        rows: Its data.
        machine: The devices.
        tokenizer: Its tokenizer, for methods that need it.
        say: Called with a line before and after each compilation.

    Returns:
        Everything that was tried, in that order. The values of a lever are tried up to the first
        that fits.
    """
    found, strongest = [], []

    def tried(changes: dict[str, Any]) -> bool | None:
        """Whether the changed run fits; None if the changes are not possible."""
        names = ", ".join(f"{name}: {value}" for name, value in changes.items())
        say(f"compiling with {names}")
        try:
            other = changed(config, changes)
            check_model(other, model, tokenizer)
            now = measure(other, model, rows, machine)
        except UserError as error:
            say(f"not possible: {error}")
            return None
        found.append(Alternative(changes, now.device_bytes, now.fits, now.seconds))
        say(now.line(machine))
        return now.fits

    for values in levers(config, machine):
        for changes in values:
            if (fits := tried(changes)) is not None:
                strongest = [one for one in strongest if one not in values] + [changes]
            if fits or fits is None:
                break
    if any(one.fits for one in found):
        return found
    together = strongest[0] if strongest else {}
    for changes in strongest[1:]:
        together = together | changes
        if tried(together):
            break
    return found
