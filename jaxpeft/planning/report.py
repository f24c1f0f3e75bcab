"""Prints a plan for people; `jaxpeft.plan` makes the plan."""

import sys
from collections.abc import Sequence
from typing import Any

from jaxpeft.methods import summary
from jaxpeft.planning.machines import GIB
from jaxpeft.reports import tables

_LONGEST = 600


def print_plan(plan: dict[str, Any], stream: Any = None) -> None:
    """Prints a plan for a person.

    Args:
        plan: From `make_plan`.
        stream: A text stream; standard output by default.
    """
    stream = stream or sys.stdout
    modules = [summary.ModuleRow(**row) for row in plan["modules"]]
    tables.print_run_table(_facts(plan), modules, stream=stream)
    samples = plan["data"].get("samples", [])
    if samples:
        left, right = _marks(stream)
        print(f"\nfirst rows, {left}learned{right}:", file=stream)
    for sample in samples:
        text = mark_learned(sample["parts"], _marks(stream))
        text = text.encode(stream.encoding or "utf-8", "backslashreplace")
        print(f"  line {sample['line']}:", file=stream)
        for line in text.decode(stream.encoding or "utf-8").split("\n"):
            print(f"    {line}", file=stream)
    print(file=stream)
    tables.print_run_table(_verdict(plan), [], stream=stream)


def mark_learned(parts: Sequence[dict[str, Any]], marks: tuple[str, str]) -> str:
    """The text of an example, with marks around learned text.

    Args:
        parts: From `jaxpeft.planning.plan.decode_parts`.
        marks: The marks before and after learned text.
    """
    return "".join(_shown(part, marks) for part in parts)


def _marks(stream: Any) -> tuple[str, str]:
    """The marks before and after learned text on this stream."""
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
    return ("\u27e6", "\u27e7") if encoding.startswith("utf") else ("[[", "]]")


def _shown(part: dict[str, Any], marks: tuple[str, str]) -> str:
    """The text of a part; the middle of a long one is left out."""
    text = part["text"]
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} ...{len(text) - 2 * half:,} characters... {text[-half:]}"
    return f"{marks[0]}{text}{marks[1]}" if part["learned"] else text


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def _facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The plan without memory, as names and values."""
    base, trained = plan["base_parameters"], plan["trainable_parameters"]
    batch, found, dtypes = plan["batch"], plan["data"], plan["dtypes"]
    devices = plan["devices"]
    quantized = f" ({dtypes['quantization']})" if dtypes["quantization"] else ""
    at_a_time = ""
    if batch["microbatch_size"] not in (None, batch["batch_size"]):
        at_a_time = f", {batch['microbatch_size']} rows at a time"
    rows = [
        ("model", f"{plan['model']} ({plan['model_type']}), {base:,} parameters"),
        ("method", plan["method"]),
        ("trainable", f"{trained:,} parameters ({100 * trained / max(base, 1):.3g} %)"),
        (
            "dtypes",
            f"base {dtypes['base']}{quantized}, compute {dtypes['compute']}, adapter float32",
        ),
    ]
    if plan["base_leaves_trained"]:
        rows.append(("base leaves trained", ", ".join(plan["base_leaves_trained"])))
    if "missing" in found:
        rows.append(
            ("data", f"not read: {found['missing']}; every row is taken for full (max_length)")
        )
    else:
        left_out = f", {found['dropped']:,} dropped" if found["dropped"] else ""
        cut = f", {found['truncated']:,} truncated" if found["truncated"] else ""
        several = f", {found['examples']:,} examples" if found["examples"] > found["rows"] else ""
        rows.append(("data", f"{found['rows']:,} rows{several}{left_out}{cut}"))
        rows += [("note", note) for note in found["notes"]]
        rows.append(
            (
                "an epoch",
                f"{found['tokens_per_epoch']:,} tokens, "
                f"{found['supervised_tokens_per_epoch']:,} supervised, "
                f"{found['sequences_per_epoch']:,} sequences, {found['steps_per_epoch']:.4g} steps",
            )
        )
    epochs = f" ({found['epochs']:.3g} epochs)" if "epochs" in found else ""
    steps = "not known without data" if plan["steps"] is None else f"{plan['steps']:,}{epochs}"
    axes = " x ".join(f"{axis} {size}" for axis, size in devices["mesh"].items() if size > 1)
    saved = plan["checkpoint_bytes"]
    rows += [
        (
            "batch",
            f"{batch['batch_size']} x {batch['seq_len']} tokens{at_a_time}, remat {batch['remat']}",
        ),
        ("steps", steps),
        ("checkpoint", f"{saved:,} bytes, {plan['checkpoints_kept']} kept"),
        ("FLOPs", f"{plan['flops_per_step']:.4g} a step (matrix products, at most)"),
        (
            "devices",
            f"{devices['count']} x {devices['unit']}, {devices['name']}"
            + (f" ({axes})" if axes else ""),
        ),
    ]
    return rows


def _verdict(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The plan's memory, as names and values."""
    memory, devices = plan["memory"], plan["devices"]
    unit, rows = devices["unit"], []
    if memory["by_kind"]:
        kinds = ", ".join(f"{name} {_gib(count)}" for name, count in memory["by_kind"].items())
        rows.append((f"memory a {unit}", kinds))
    needs = f"{_gib(memory['device_bytes'])} of {_gib(devices['device_bytes'])} a {unit}"
    if not memory["by_kind"]:  # XLA refused the program
        needs += ", some of which XLA keeps for itself"
    rows.append(("verdict", f"{'fits' if memory['fits'] else 'does not fit'}: {needs}"))
    for one in plan.get("alternatives", []):
        changes = " ".join(f"--{name} {value}" for name, value in one["changes"].items())
        verdict = "fits" if one["fits"] else "does not fit"
        rows.append(("with", f"{changes}: {_gib(one['device_bytes'])}, {verdict}"))
    if "alternatives" in plan and not any(one["fits"] for one in plan["alternatives"]):
        rows.append(("", "nothing that was tried fits; take more devices, or shorter rows"))
    return rows
