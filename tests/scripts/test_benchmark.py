"""The benchmark: whose turn it is, what a side's process says, and what the tables make of it."""

import json
import sys
from pathlib import Path

import benchmark as bench
import benchmark_process as process
import benchmark_side as side
import benchmark_table as table
import benchmark_torch
import benchmark_tunix
import numpy as np
import pytest
from places import GOLDEN

import jaxpeft as jp

GIB = 2**30
MODEL = str(GOLDEN / "models" / "llama3")


def record(case, one, seconds, *, peak=GIB, dtype="float32", remat="none", amount=100, **more):
    given = {"case": case, "side": one, "dtype": dtype, "remat": remat, "cache": "", "round": 1}
    measured = {"seconds": seconds, "amount": amount, "peak_bytes": peak}
    return given | measured | more


def rows_of(*records):
    return [dict(zip(table.HEADINGS, row, strict=True)) for row in table.table(lines_of(*records))]


def lines_of(*records):
    return table.lines_of(records)


def test_median_and_spread_are_over_the_calls_of_all_rounds():
    (line,) = lines_of(
        record("lora", "jaxpeft", [1.0, 0.5], peak=2 * GIB), record("lora", "jaxpeft", [0.25])
    )
    assert line.values == (100.0, 200.0, 400.0)
    assert (line.median, line.peak) == (200.0, 2 * GIB)
    assert table.value_text(line) == "200 (100-400) tokens/s"


def test_a_side_is_compared_with_jaxpeft_s_fastest_and_default_in_its_dtype():
    rows = rows_of(
        record("lora", "jaxpeft", [0.5], peak=6 * GIB),
        record("lora", "jaxpeft", [0.8], peak=1 * GIB, remat="full"),
        record("lora", "jaxpeft", [0.1], peak=4 * GIB, dtype="bfloat16"),
        record("lora", "torch", [1.0], peak=4 * GIB),
        record("lora", "torch", [0.2], peak=2 * GIB, dtype="bfloat16", remat="full"),
    )
    assert [row[table.HEADINGS[5]] for row in rows] == ["", "", "", "2.00x, 1.50x", "2.00x, 2.00x"]
    assert [row[table.HEADINGS[6]] for row in rows] == ["", "", "", "1.25x, 0.25x", ""]
    assert [row["setting"] for row in rows] == [
        *("float32", "float32, remat full", "bfloat16", "float32", "bfloat16, checkpointing")
    ]


def test_a_start_is_in_seconds_and_the_shorter_one_is_the_faster():
    start = [
        record("start", "jaxpeft", [1.0], start_seconds=20.0) | {"cache": "cold"},
        record("start", "jaxpeft", [1.0], start_seconds=8.0) | {"cache": "second run"},
        record("start", "torch", [1.0], start_seconds=10.0),
    ]
    rows = rows_of(*start)
    assert [row["speed"] for row in rows] == ["20 s", "8 s", "10 s"]
    assert rows[2][table.HEADINGS[5]] == "1.25x, 1.00x"
    (compared,) = table.compare(lines_of(*start))
    assert compared[1:5] == ["float32, second run", "torch, float32", "1.25x", ">= 1.00x: met"]


def test_comparisons_say_what_was_wanted_and_whether_it_is_met():
    lines = lines_of(
        record("lora", "jaxpeft", [0.5], peak=6 * GIB),
        record("lora", "jaxpeft", [0.9], peak=GIB, remat="full"),
        record("lora", "torch", [1.0], peak=5 * GIB),
        record("lora", "torch", [0.25], peak=3 * GIB, dtype="bfloat16"),
        record("qlora", "jaxpeft", [0.6], peak=GIB),
    )
    rows = {row[0]: row[1:] for row in table.compare(lines)}
    no_checkpointing = rows["LoRA, default against no checkpointing"]
    assert no_checkpointing[2:] == ["1.11x", ">= 1.05x: met", "0.20x", "<= 0.25x: met"]
    assert rows["LoRA, fastest in float32"][2:4] == ["2.00x", ">= 1.20x: met"]
    fastest = rows["LoRA, fastest of all settings"]
    assert fastest[:4] == ["float32", "torch, bfloat16", "0.50x", ""]
    assert rows["QLoRA against LoRA"][2:4] == ["0.83x", ">= 0.77x: met"]
    assert len(rows) == 4


def test_what_is_wanted_and_not_reached_is_missed():
    assert table.verdict(1.2, 1.199, ">=") == ">= 1.20x: missed"
    assert table.verdict(0.25, 0.251, "<=") == "<= 0.25x: missed"


def test_what_a_side_cannot_do_is_a_dash_with_its_reason():
    refused = {"case": "dora", "side": "tunix", "dtype": "float32", "remat": "none", "round": 1}
    refused |= {"cache": "", "amount": 8, "unsupported": "it has no DoRA"}
    ours = record("dora", "jaxpeft", [1.0])
    assert rows_of(ours, refused)[1]["speed"] == "-"
    text = table.report([ours, refused])
    assert "| dora | tunix | float32 | - | - |  |  |" in text
    assert "- dora, tunix: it has no DoRA" in text


def test_one_failed_turn_does_not_hide_those_that_went_well():
    failed = {"case": "lora", "side": "torch", "dtype": "float32", "remat": "none", "round": 1}
    failed |= {"cache": "", "amount": 100, "failed": "exit code -9: no message"}
    (line,) = lines_of(failed, record("lora", "torch", [0.5]))
    assert (line.values, line.why) == ((200.0,), "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_utilisation_is_the_rate_of_the_model_over_that_of_its_matrix_product(dtype):
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    lines = lines_of(
        record("gemm", "jaxpeft", [3.0], amount=200e9, dtype=other),
        record("gemm", "jaxpeft", [2.0, 1.0], amount=200e9, dtype=dtype),
        record("lora", "jaxpeft", [0.5, 0.5, 9.0], flops=75e9, device="cpu", dtype=dtype),
        record("lora", "torch", [0.5], dtype=dtype),
    )
    (text,) = table.utilisation(lines)
    rate = f"LoRA, {dtype}: 150 GFLOP/s"
    shares = "100.0% of the matrix product's median 150, 75.0% of its best 200"
    assert text == f"{rate}, {shares}"


def test_memory_is_the_device_s_where_it_has_its_own():
    (line,) = lines_of(record("lora", "torch", [1.0], peak=GIB, device_peak_bytes=3 * GIB))
    assert line.peak == 3 * GIB


def test_the_tables_of_a_file_are_printed_again(tmp_path, capsys):
    file = tmp_path / "results.json"
    records = [record("lora", "jaxpeft", [0.5])]
    file.write_text(json.dumps({"records": records}))
    assert table.main([str(file)]) == 0
    assert capsys.readouterr().out.strip() == table.report(records)
    assert table.main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_sides_have_turns_next_to_each_other_in_every_round():
    a, b = bench.Setting(), bench.Setting(remat="full")
    case = bench.Case({"kind": "train"}, {"jaxpeft": (a, b), "torch": (a,), "tunix": (a,)})
    order = list(bench.turns({"lora": case}, ["jaxpeft", "torch"], 2))
    one_round = [("jaxpeft", a), ("torch", a), ("jaxpeft", b)]
    assert order == [("lora", number, *turn) for number in (1, 2) for turn in one_round]


def test_turns_may_be_of_some_dtypes_alone():
    narrow, wide = bench.Setting("bfloat16"), bench.Setting("float32", "full")
    case = bench.Case({"kind": "train"}, {"jaxpeft": (narrow, wide), "torch": (narrow,)})
    assert case.of(["float32"]).settings == {"jaxpeft": (wide,), "torch": ()}
    assert case.of(bench.DTYPES) == case


def test_every_comparison_has_the_turns_it_needs():
    for one in table.COMPARISONS:
        for case, name, wanted in (
            (one.case, "jaxpeft", one.ours),
            (one.against or one.case, one.side, one.theirs),
        ):
            settings = bench.CASES[case].settings[name]
            pairs = [zip(wanted, setting[:2], strict=True) for setting in settings]
            assert any(all(want in (None, got) for want, got in both) for both in pairs), one


def test_a_cold_start_comes_before_the_second_run_that_reuses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "BENCH", tmp_path)
    caches = [setting.cache for setting in bench.CASES["start"].settings["jaxpeft"]]
    assert caches == [process.COLD, process.SECOND]
    folder = process.cache_folder(process.COLD, "jaxpeft")
    folder.mkdir()
    (folder / "program").touch()
    assert process.cache_folder(process.SECOND, "jaxpeft") == folder
    assert (folder / "program").exists()
    assert not process.cache_folder(process.COLD, "jaxpeft").exists()
    assert process.cache_folder("", "jaxpeft") != folder


def test_the_warm_up_is_not_measured(capsys):
    numbers = iter([3.0, 2.0, 1.0])
    found = side.timed(side.Work(kind="train", warmup=1, calls=2), lambda: next(numbers))
    assert found["values"] == [3.0, 2.0, 1.0]
    assert len(found["seconds"]) == 2
    heard = [side.heard(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["number"] for event in heard if event is not None] == [1, 2, 3]


def test_only_marked_lines_are_heard():
    assert side.heard('{"event": "result"}\n') is None
    assert side.heard(f'{side.MARK}{{"event": "result"}}\n') == {"event": "result"}


@pytest.mark.parametrize(
    ("work", "amount"),
    [
        (side.Work(kind="train", batch_size=4, seq_len=512), 2048),
        (side.Work(kind="generate", batch_size=8, new_tokens=32), 256),
        (side.Work(kind="gemm"), 2 * 4096**3),
    ],
)
def test_a_call_counts_real_tokens_or_flops(work, amount):
    assert work.amount == amount


def test_sizes_are_read_from_a_process_s_status():
    status = "VmPeak:\t  900 kB\nVmHWM:\t   20 kB\nRssAnon:\t  7 kB\n"
    assert side.status_bytes(status, "VmHWM") == 20 * 1024
    assert side.status_bytes(status, "VmSwap") == 0


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Takes the turn of a side that is a given program."""
    monkeypatch.setattr(process, "SCRIPTS", tmp_path)
    (tmp_path / "benchmark_side.py").write_bytes(Path(side.__file__).read_bytes())

    def take(program, **work):
        (tmp_path / "benchmark_fake.py").write_text(program)
        work = side.Work(kind="train", **work)
        return process.take_turn(sys.executable, "fake", work, {"FOR_THE_SIDE": "7"})

    return take


FAKE = """
import os
import benchmark_side as side

def measure(work):
    if work.method == "dora":
        raise side.UnsupportedError("not this one")
    print("what a library says")
    memory = bytearray(64 * 2**20)
    memory[::4096] = b"x" * len(memory[::4096])
    names = ("GLIBC_TUNABLES", "FOR_THE_SIDE")
    return side.timed(work, lambda: 1.5) | {"saw": [os.environ[name] for name in names]}

side.run(measure, ["numpy", "no-such-package"])
"""


def test_a_turn_brings_back_what_its_process_reports(fake):
    found = fake(FAKE, method="lora", warmup=1, calls=3)
    assert found["values"] == [1.5] * 4
    assert len(found["seconds"]) == 3
    assert found["start_seconds"] > sum(found["seconds"])
    assert found["saw"] == ["glibc.malloc.hugetlb=1", "7"]
    assert set(found["versions"]) == {"python", "numpy"}
    if Path("/proc/self/status").exists():  # its own memory, not that of the process it is from
        assert 64 * 2**20 < found["peak_bytes"] < 512 * 2**20


def test_a_side_that_cannot_do_the_work_says_why(fake):
    assert fake(FAKE, method="dora")["unsupported"] == "not this one"


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise RuntimeError('out of memory')", "exit code 1: RuntimeError: out of memory"),
        ("import os; os.abort()", "exit code -6: no message"),
        ("print('done')", "exit code 0: no message"),
    ],
)
def test_a_turn_that_breaks_off_says_how(fake, program, why):
    assert fake(program) == {"failed": why}


def test_a_missing_environment_names_the_flag_that_builds_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--sides", "jaxpeft", "torch"]) == 2
    error = capsys.readouterr().err
    assert "--setup torch" in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert bench.main(["--python", "torch=nowhere/python"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere/python: no such file")


def test_the_model_is_a_folder_as_it_is_or_is_written_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    works = []
    monkeypatch.setattr(process, "take_turn", lambda *given: works.append(given[2]) or {})
    assert process.prepare_model("python", Path(MODEL)) == {"folder": MODEL, "weights": MODEL}
    assert not works
    Path("one.gguf").touch()
    found = process.prepare_model("python", Path("one.gguf"))
    assert found == {"folder": str(tmp_path / ".bench" / "model-one"), "weights": "one.gguf"}
    assert process.prepare_model("python", None)["weights"] == "random"
    assert [work.source for work in works] == ["one.gguf", ""]
    with pytest.raises(ValueError, match=r"--model two\.gguf: no such file"):
        process.prepare_model("python", Path("two.gguf"))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--rounds", "0"], "--rounds: must be at least 1, got 0"),
        (["--warmup", "-1"], "--warmup: must be at least 0, got -1"),
        (["--quick", "--only", "dora"], "not dora"),
        (["--python", "tunix"], "expected SIDE=PATH"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(flags)
    assert text in capsys.readouterr().err


def test_a_whole_call_measures_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    taken = []

    def take_turn(python, name, work, environment):
        taken.append((name, work.kind))
        if work.kind == "prepare":
            return {"seconds": []}
        if name == "torch" and work.kind == "generate":
            return {"failed": "exit code -9: no message"}
        return {"seconds": [0.5] * work.calls, "peak_bytes": GIB, "start_seconds": 2.0, "flops": 1}

    monkeypatch.setattr(process, "take_turn", take_turn)
    arguments = ["--quick", "--python", f"torch={sys.executable}", "--output", "out/results.json"]
    assert bench.main(arguments) == 2
    said = capsys.readouterr()
    assert taken[0] == ("jaxpeft", "prepare")
    assert "lora, round 1: torch, float32, remat none" in said.out
    assert "| lora | torch | float32 | 4096 (4096-4096) tokens/s | 1.00 GiB |" in said.out
    assert said.err == "error: 1 turns failed; out/results.json says why\n"
    seen = json.loads(Path("out/results.json").read_text())
    assert len(seen["records"]) == len(taken) - 1
    assert seen["model"]["weights"] == "random"
    assert seen["records"][0]["work"]["calls"] == 2
    assert {"machine", "commit", "command", "environment"} <= seen.keys()


@pytest.mark.parametrize(
    ("one", "given"),
    [
        (benchmark_torch, {"kind": "train", "method": "lora", "remat": "dots"}),
        (benchmark_torch, {"kind": "train", "method": "lora", "segment": 64}),
        (benchmark_tunix, {"kind": "train", "method": "lora", "segment": 64}),
        (benchmark_tunix, {"kind": "train", "method": "dora"}),
        (benchmark_tunix, {"kind": "generate", "method": "lora"}),
    ],
)
def test_sides_refuse_what_they_cannot_do(one, given):
    with pytest.raises(side.UnsupportedError):
        one.measure(side.Work(**given))


def test_a_case_that_no_setting_is_left_of_is_refused(tmp_path, capsys):
    file = tmp_path / "results.json"
    asked = ["--only", "start", "--sides", "jaxpeft", "--dtypes", "bfloat16", "--output", str(file)]
    assert bench.main(asked) == 2
    assert "--only start: no setting of jaxpeft with bfloat16" in capsys.readouterr().err
    assert not file.exists()


def tiny(kind, method, **more):
    given = {"warmup": 0, "calls": 1, "batch_size": 8, "seq_len": 16, "rank": 2} | more
    return side.Work(kind=kind, method=method, model=MODEL, **given)


@pytest.mark.parametrize(
    ("method", "segment", "change"),
    [
        ("lora", 0, 1e-5),
        pytest.param("lora", 4, 1e-5, marks=pytest.mark.slow),
        ("full", 0, 1e-5),
        pytest.param("qlora", 0, 0.1, marks=pytest.mark.slow),
        ("prompt", 0, 0.5),
    ],
)
def test_jaxpeft_s_side_trains_on_every_token_of_the_batch(method, segment, change):
    import benchmark_jaxpeft

    work = tiny("train", method, segment=segment, virtual_tokens=3, remat="full")
    found = benchmark_jaxpeft.train(work)
    length = segment or 16
    tokens = np.random.default_rng(0).integers(128, size=(8 * 16 // length, length))
    logits = np.asarray(jp.load_model(MODEL)(tokens), np.float64)[:, :-1]
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
    loss = (np.log(np.exp(logits).sum(axis=2)) - chosen).mean()
    assert found["values"] == [pytest.approx(loss, rel=change)]
    assert found["flops"] > 0
    assert found["xla"]["temp"] > 0


def test_flops_of_the_model_do_not_count_what_is_computed_again():
    import benchmark_jaxpeft

    counts = []
    for remat in ("none", "full"):
        run = benchmark_jaxpeft.make_run(tiny("train", "lora", remat=remat))
        counts.append(benchmark_jaxpeft.model_flops(run))
    assert counts[0] == counts[1]
    width, inner, layers, vocab, kv, rank = 32, 48, 3, 128, 16, 2
    kernels = [(width, width)] * 2 + [(width, kv)] * 2 + [(width, inner)] * 2 + [(inner, width)]
    products = 2 * sum(a * b for a, b in kernels)  # forward, and gradient of the input
    factors = 3 * rank * sum(a + b for a, b in kernels)  # and gradient of the factors
    least = 2 * 8 * 16 * (layers * (products + factors) + 2 * width * vocab)
    assert least <= counts[0] + 2 * 8 * 16 * sum(a * b for a, b in kernels[:7])
    assert counts[0] < 1.5 * least


@pytest.mark.parametrize("method", ["lora", "merged"])
def test_jaxpeft_s_side_writes_as_many_tokens_as_asked(method):
    import benchmark_jaxpeft

    work = tiny("generate", method, batch_size=2, prompt_tokens=5, new_tokens=4)
    assert len(benchmark_jaxpeft.generate(work)["seconds"]) == 1
