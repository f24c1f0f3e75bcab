"""Measures jaxpeft beside torch + PEFT and Tunix: the same work, in turns, on the same machine.

Every side runs in a process and in an environment of its own, with memory in huge pages and the
same weights. Cases: training LoRA, DoRA, QLoRA, a soft prompt and the whole model on random
tokens with AdamW; LoRA on one long example, and on many packed into such a row; greedy decoding
with an adapter and merged; from the start of the process to the end of the first step; and a large
matrix product, for the machine's peak. Every side runs in several settings, and in every round of
a case each setting of each side has one turn.

It prints tables in Markdown and writes everything it saw to a JSON file, after every turn.

Usage: python scripts/benchmark.py --setup [SIDE ...] builds the environments of the other sides;
python scripts/benchmark.py [--quick] [--only CASE ...] [--sides SIDE ...] measures
(--help has more). The model is the quickstart's, SmolLM2-135M; where scripts/quickstart_data.py has
not linked it, the weights are random, of the same sizes.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_process as process
import benchmark_side as side
from benchmark_process import COLD, SECOND
from benchmark_table import GEMM, OURS, START, report

SIDES = (OURS, "torch", "tunix")
OUTPUT = "results.json"
DTYPES = ("float32", "bfloat16")


class Setting(NamedTuple):
    """How a side does a case: dtype, what is computed again, and the compilation cache."""

    dtype: str = "float32"
    remat: str = "none"
    cache: str = ""


class Case(NamedTuple):
    """A kind of work, and the settings that each side has turns in."""

    work: dict[str, Any]
    settings: dict[str, tuple[Setting, ...]]

    def of(self, dtypes: Sequence[str]) -> "Case":
        """The same with those settings alone that have one of these dtypes."""
        some = {
            side: tuple(one for one in settings if one.dtype in dtypes)
            for side, settings in self.settings.items()
        }
        return self._replace(settings=some)


F32, BF16 = Setting("float32"), Setting("bfloat16")
F32_DOTS, BF16_DOTS = Setting("float32", "dots"), Setting("bfloat16", "dots")
F32_FULL, BF16_FULL = Setting("float32", "full"), Setting("bfloat16", "full")


def training(method: str, sides: dict[str, tuple[Setting, ...]] | None = None, **work: int) -> Case:
    """Training by a method; by default in the settings that its comparisons need."""
    usual = {OURS: (F32_DOTS, F32_FULL, BF16_DOTS), "torch": (F32, BF16), "tunix": (F32,)}
    return Case({"kind": "train", "method": method, **work}, usual | (sides or {}))


def decoding(method: str, batch_size: int) -> Case:
    """Greedy decoding."""
    both = (F32, BF16)
    return Case(
        {"kind": "generate", "method": method, "batch_size": batch_size},
        {OURS: both, "torch": both, "tunix": (F32,)},
    )


CASES = {
    GEMM: Case({"kind": "gemm"}, {OURS: (F32, BF16), "torch": (F32, BF16)}),
    "lora": training(
        "lora",
        {
            OURS: (F32, F32_DOTS, F32_FULL, BF16_DOTS, BF16_FULL),
            "torch": (F32, F32_FULL, BF16, BF16_FULL),
            "tunix": (F32, F32_FULL, BF16),
        },
    ),
    "dora": training("dora"),
    "qlora": training("qlora"),
    "prompt": training("prompt"),
    "full": training("full"),
    "long": training("lora", batch_size=1, seq_len=2048),
    "packed": training("lora", batch_size=1, seq_len=2048, segment=64),
    **{
        f"generate-{name}-{batch}": decoding(method, batch)
        for name, method in (("adapter", "lora"), ("merged", "merged"))
        for batch in (1, 8)
    },
    START: Case(
        {"kind": "train", "method": "lora", "warmup": 0, "calls": 1},
        {
            OURS: (Setting(cache=COLD), Setting(cache=SECOND)),
            "torch": (F32,),
            "tunix": (Setting(cache=COLD), Setting(cache=SECOND)),
        },
    ),
}
QUICK = {
    GEMM: CASES[GEMM]._replace(settings={OURS: (F32,)}),
    "lora": training("lora", {OURS: (F32_DOTS, F32_FULL), "torch": (F32,), "tunix": (F32,)}),
    "generate-adapter-1": decoding("lora", 1)._replace(settings={OURS: (F32,), "torch": (F32,)}),
}


def turns(cases: dict[str, Case], sides: Sequence[str], rounds: int) -> Iterator[tuple]:
    """Who measures what, in order.

    Yields:
        Case, number of the round, side, setting. In every round the first settings of all sides
        have their turns next to each other, then the second ones, and so on.
    """
    for name, case in cases.items():
        lists = {one: case.settings.get(one, ()) for one in sides}
        for number in range(1, rounds + 1):
            for place in range(max(map(len, lists.values()), default=0)):
                for one, settings in lists.items():
                    if place < len(settings):
                        yield name, number, one, settings[place]


def say_turn(record: dict[str, Any], work: side.Work) -> None:
    """One line of progress."""
    if "seconds" in record:
        mean = sum(record["seconds"]) / len(record["seconds"])
        unit, rate = ("GFLOP/s", 1e-9) if work.kind == "gemm" else ("tokens/s", 1.0)
        text = f"{rate * work.amount / mean:.4g} {unit}, {record['peak_bytes'] / 2**30:.2f} GiB"
        text += f", first call after {record['start_seconds']:.1f} s"
    else:
        text = record.get("unsupported") or f"failed: {record['failed']}"
    print(f"    {text}", flush=True)


def measure(args: argparse.Namespace, seen: dict[str, Any], file: Path) -> None:
    """Gives every side its turns; adds a record to `seen` after each, and writes it to the file.

    Raises:
        ValueError: Something is missing.
    """
    cases = {name: (QUICK if args.quick else CASES)[name] for name in args.only}
    cases = {name: case.of(args.dtypes) for name, case in cases.items()}
    order = list(turns(cases, args.sides, args.rounds))
    for name in args.only:
        if not any(turn[0] == name for turn in order):
            asked = f"{', '.join(args.sides)} with {', '.join(args.dtypes)}"
            raise ValueError(f"--only {name}: no setting of {asked}; name others.")
    pythons = {name: process.interpreter(name, args.python) for name in args.sides}
    ours = process.interpreter(OURS, args.python)
    seen["model"] = process.prepare_model(ours, args.model)
    for place, (name, number, one, setting) in enumerate(order, 1):
        words = ", ".join(filter(None, (setting.dtype, f"remat {setting.remat}", setting.cache)))
        print(f"[{place}/{len(order)}] {name}, round {number}: {one}, {words}", flush=True)
        counts = {"warmup": args.warmup, "calls": args.steps} | cases[name].work
        work = side.Work(
            **counts, model=seen["model"]["folder"], dtype=setting.dtype, remat=setting.remat
        )
        cache = {"JAX_COMPILATION_CACHE_DIR": str(process.cache_folder(setting.cache, one))}
        found = process.take_turn(pythons[one], one, work, cache)
        record = {"case": name, "side": one, "round": number, **setting._asdict()}
        record |= {"amount": work.amount, "work": dataclasses.asdict(work), **found}
        say_turn(record, work)
        seen["records"].append(record)
        file.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measures jaxpeft beside torch + PEFT and Tunix.")
    others = SIDES[1:]
    parser.add_argument(
        "--setup", nargs="*", choices=others, metavar="SIDE", help="build environments, and stop"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="SIDE")
    parser.add_argument(
        "--python", action="append", default=[], metavar="SIDE=PATH", help="another environment"
    )
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, or a GGUF file")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE")
    parser.add_argument("--rounds", type=int, help="turns of every setting; default 3")
    parser.add_argument("--steps", type=int, help="measured calls of a turn; default 5")
    parser.add_argument("--warmup", type=int, help="calls before them; default 2")
    parser.add_argument("--quick", action="store_true", help="few cases, one round: minutes")
    parser.add_argument("--output", type=Path, default=process.BENCH / OUTPUT)
    args = parser.parse_args(argv)
    if args.setup is not None:
        args.setup = args.setup or list(others)
    few, usual = {"rounds": 1, "steps": 2, "warmup": 1}, {"rounds": 3, "steps": 5, "warmup": 2}
    for name, value in (few if args.quick else usual).items():
        given = getattr(args, name)
        setattr(args, name, value if given is None else given)
        if getattr(args, name) < (name != "warmup"):
            parser.error(f"--{name}: must be at least {int(name != 'warmup')}, got {given}")
    args.sides = args.sides or list(SIDES[:2] if args.quick else SIDES)
    args.only = args.only or list(QUICK if args.quick else CASES)
    if missing := [name for name in args.only if args.quick and name not in QUICK]:
        parser.error(f"--quick: has {', '.join(QUICK)}, not {', '.join(missing)}")
    pairs = [text.partition("=") for text in args.python]
    if wrong := [one for one, equals, path in pairs if one not in SIDES or not (equals and path)]:
        parser.error(f"--python: expected SIDE=PATH with one of {', '.join(SIDES)}, got {wrong[0]}")
    args.python = {one: path for one, _, path in pairs}
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        Its exit status: 0 done, 2 where something is missing or wrong, or a turn failed.
    """
    args = parse(argv)
    try:
        if args.setup is not None:
            process.set_up(args.setup)
            return 0
        args.output.parent.mkdir(parents=True, exist_ok=True)
        seen: dict[str, Any] = {
            "machine": process.machine(),
            "commit": process.commit(),
            "environment": process.ENVIRONMENT,
            "command": sys.argv if argv is None else list(argv),
            "records": [],
        }
        measure(args, seen, args.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = seen["machine"]
    print(f"\n{about['processor']}, {about['cores']} cores, commit {seen['commit']}\n")
    print(report(seen["records"]))
    print(f"\neverything: {args.output}")
    failed = sum("failed" in record for record in seen["records"])
    if failed:
        print(f"error: {failed} turns failed; {args.output} says why", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
