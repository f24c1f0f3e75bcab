"""The plan of a run, from shapes alone: trained parameters, data, and the cost of a step.

The memory of a device is found by compiling the real training step, for this machine or for TPUs
that need not be present (`jaxpeft.planning.memory`).
"""

import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxpeft.checkpoints import leaves as checkpoint_leaves
from jaxpeft.config.run_config import RunConfig
from jaxpeft.core import paths
from jaxpeft.core.flops import count_flops
from jaxpeft.data.batches import Plan
from jaxpeft.data.encode import Examples
from jaxpeft.files import storage
from jaxpeft.files.locate import locate
from jaxpeft.mesh.constraints import traced_on
from jaxpeft.methods import summary
from jaxpeft.methods.adapter import RANK, Adapter, is_named
from jaxpeft.models.config import ModelConfig
from jaxpeft.planning.machines import Machine, find_machine
from jaxpeft.planning.memory import Measured, find_fitting, measure, tracing_for
from jaxpeft.pretrained.chat_template import read_template
from jaxpeft.pretrained.load import load_model_config
from jaxpeft.pretrained.tokenizer import has_tokenizer
from jaxpeft.training.checks import check_model, start_on_zeros
from jaxpeft.training.output.template import run_tokenizer
from jaxpeft.training.rows import Rows, read_data
from jaxpeft.training.run import Run, leaves

SAMPLES = 3


def compile_only() -> None:
    """Restricts JAX to the CPU, and allows libtpu to be loaded where there is no TPU.

    Call it before JAX looks for devices. Otherwise libtpu would ask the cloud what machine this is,
    and keep other processes from loading it.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")


def make_plan(
    config: RunConfig, topology: str | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Makes the plan of a run.

    Args:
        config: The run.
        topology: TPUs such as "v5e:2x4", which need not be present; None for this machine.
        say: Called with a line before and after work that takes time.

    Returns:
        JSON values; sizes are in bytes.

    Raises:
        UserError: Training would refuse the run too, for a reason other than missing data or
            tokenizer; or there is no such topology.
    """
    machine = find_machine(topology)
    model = load_model_config(config.model.path, config.model.revision)
    folder = locate(config.model.path, config.model.revision, weights=False)
    tokenizer = None
    if has_tokenizer(folder):
        template = config.model.chat_template
        tokenizer = run_tokenizer(config, "" if template is None else read_template(template))
    check_model(config, model, tokenizer)
    missing = None
    if tokenizer is None:
        missing = f"{config.model.path} has no tokenizer"
    elif not storage.exists(storage.as_path(os.path.expanduser(config.data.train))):
        missing = f"{config.data.train} is not there"
    rows = read_data(config, model, tokenizer) if missing is None else full_rows(config, model)
    say(f"compiling the training step for {describe_machine(machine)}")
    measured = measure(config, model, rows, machine)
    say(measured.line(machine))
    run = measured.run
    with tracing_for(machine), traced_on(run.layout):
        flops = count_flops(run.make_step(), *run.step_arguments())
    plan = describe(run, model, tokenizer)
    plan["data"] = describe_data(rows, missing, tokenizer, model.vocab_size)
    plan["flops_per_step"] = flops
    plan["devices"] = {
        "name": machine.name,
        "count": machine.count,
        "unit": machine.unit,
        "mesh": dict(run.mesh.shape),
        "device_bytes": machine.device_bytes,
    }
    plan["memory"] = describe_memory(measured)
    if not measured.fits:
        alternatives = find_fitting(config, model, rows, machine, tokenizer, say)
        plan["alternatives"] = [one._asdict() for one in alternatives]
    return plan


def full_rows(config: RunConfig, model: ModelConfig) -> Rows:
    """Rows that stand for missing data: every one is full."""
    length, count = config.data.max_length, config.train.batch_size
    examples = Examples.of_tokens([np.zeros(length, np.int32)] * count, config.data.train)
    plan = Plan(
        examples, batch_size=count, max_length=length, packing=config.data.packing, pad_id=0
    )
    return Rows(plan, config.train.steps or 1, None, train_rows=0)


def describe(run: Run, model: ModelConfig, tokenizer: Any) -> dict[str, Any]:
    """Describes what is trained, and what is saved of it."""
    config, plan = run.config, run.rows.plan
    adapter = run.state.adapter
    trained = config.method.trainable(adapter.params)
    ranked = dataclasses.replace(adapter, buffers=rank_buffers(config, model, tokenizer))
    extra = sum(leaf.size for leaf in jax.tree.leaves(run.state.trained["base"]))
    return {
        "model": config.model.path,
        "model_type": model.model_type,
        "method": str(config.method),
        "base_parameters": summary.count_parameters(run.base_shapes),
        "trainable_parameters": summary.count_trainable(ranked, trained) + extra,
        "modules": [
            row._asdict() for row in summary.describe_adapter(run.base_shapes, ranked, trained)
        ],
        "base_leaves_trained": list(config.optim.trainable),
        "dtypes": {
            "base": config.model.dtype,
            "quantization": config.model.quantization,
            "compute": np.dtype(run.base.module.compute_dtype).name,
            "adapter": "float32",
        },
        "batch": {
            "batch_size": plan.batch_size,
            "seq_len": plan.seq_len,
            "microbatch_size": config.train.microbatch_size,
            "remat": config.train.remat,
        },
        "steps": run.rows.steps if config.train.steps or run.rows.train_rows else None,
        "checkpoint_bytes": checkpoint_leaves.num_bytes(
            checkpoint_leaves.named_leaves(leaves(run.state))
        ),
        "checkpoints_kept": config.checkpoint.keep,
    }


def rank_buffers(config: RunConfig, model: ModelConfig, tokenizer: Any) -> dict:
    """The ranks of an adapter's layers. They are values, the only ones that a plan computes."""
    start: Callable[[], Adapter] = start_on_zeros(config, model, tokenizer)

    def ranks() -> dict:
        leaves = paths.flatten(start().buffers)
        return {path: leaf for path, leaf in leaves.items() if is_named(path, RANK)}

    return paths.unflatten(jax.jit(ranks)())


def describe_data(
    rows: Rows, missing: str | None, tokenizer: Any, vocab_size: int
) -> dict[str, Any]:
    """Describes an epoch, and three rows as the step sees them."""
    if missing is not None:
        return {"missing": missing}
    plan = rows.plan
    return {
        "rows": rows.train_rows,
        "examples": rows.train_examples,
        "notes": list(rows.notes),
        "dropped": rows.dropped,
        "truncated": rows.truncated,
        "sequences_per_epoch": plan.num_sequences,
        "tokens_per_epoch": plan.tokens_per_epoch,
        "supervised_tokens_per_epoch": plan.supervised_tokens_per_epoch,
        "steps_per_epoch": plan.num_sequences / plan.batch_size,
        "epochs": rows.steps * plan.batch_size / plan.num_sequences,
        "samples": sample_rows(plan, tokenizer, vocab_size),
    }


def sample_rows(
    plan: Plan, tokenizer: Any, vocab_size: int, count: int = SAMPLES
) -> list[dict[str, Any]]:
    """The first rows that training sees, decoded from the arrays of its batches.

    Returns:
        For each its line in the file, and its text in parts that are learned or not.
    """
    found = []
    for step in range(plan.steps_per_epoch):
        batch, lines = plan.batch(step), iter(plan.rows_of(step))
        arrays = (batch[name] for name in ("tokens", "weights", "segment_ids"))
        for tokens, weights, segments in zip(*arrays, strict=True):
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                # A weight belongs to the target, which is the next token.
                learned = np.concatenate([[False], weights[inside][:-1] > 0])
                parts = decode_parts(tokens[inside], learned, tokenizer, vocab_size)
                found.append({"line": next(lines), "parts": parts})
                if len(found) == count:
                    return found
    return found


def decode_parts(
    tokens: np.ndarray, learned: np.ndarray, tokenizer: Any, vocab_size: int
) -> list[dict[str, Any]]:
    """The text of each run of tokens that are learned or not; virtual tokens are only counted."""
    parts = []
    kinds = zip(learned.tolist(), (tokens >= vocab_size).tolist(), strict=True)
    at = 0
    for (is_learned, virtual), run in itertools.groupby(kinds):
        length = len(list(run))
        ids = tokens[at : at + length].tolist()
        text = f"<{length} virtual tokens>" if virtual else tokenizer.decode(ids)
        parts.append({"text": text, "learned": is_learned, "tokens": length})
        at += length
    return parts


def describe_memory(measured: Measured) -> dict[str, Any]:
    """Describes the memory that a device needs."""
    by_kind = {} if measured.memory is None else measured.memory._asdict()
    return {
        "device_bytes": measured.device_bytes,
        "fits": measured.fits,
        "by_kind": by_kind,
        "compile_seconds": round(measured.seconds, 1),
    }


def describe_machine(machine: Machine) -> str:
    """Describes the devices, such as "8 v5e chips (v5e:2x4)"."""
    return f"{machine.count} {machine.unit}{'s' if machine.count > 1 else ''} ({machine.name})"
