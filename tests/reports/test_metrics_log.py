"""metrics.jsonl: whole lines only, never past the step a run resumes from."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import files_no_larger_than

from jaxpeft.core.errors import ResourceError
from jaxpeft.reports.metrics_log import MetricsLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def filled(path, count=5) -> MetricsLog:
    log = MetricsLog(path)
    for step in range(1, count + 1):
        log.append({"step": step, "loss": 1 / step})
    return log


def test_a_line_is_there_as_soon_as_append_returns(path):
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": jnp.float32(0.5), "n": np.int64(3), "note": "ü", "x": None})
        assert json.loads(path.read_text()) == {
            "step": 1, "loss": 0.5, "n": 3, "note": "ü", "x": None
        }  # fmt: skip


def test_nan_and_infinity_become_null(path):
    with MetricsLog(path) as log:
        log.append({"step": 1, "a": float("nan"), "b": jnp.float32(jnp.inf), "c": -np.inf})
    assert path.read_text() == '{"step": 1, "a": null, "b": null, "c": null}\n'


def test_resuming_drops_later_lines_and_appends_after_the_rest(path):
    with filled(path) as log:
        log.truncate_after(3)
        log.append({"step": 4})
    assert steps(path) == [1, 2, 3, 4]


def test_resuming_at_the_last_step_changes_nothing(path):
    with filled(path) as log:
        before = path.read_bytes()
        log.truncate_after(5)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b"\0\0\0\0\n", b'{"step": 3}', b"[3]\n", b"\n"]
)
def test_a_torn_line_and_all_after_it_are_dropped(path, torn):
    filled(path, count=2).close()
    with open(path, "ab") as file:
        file.write(torn)
    with MetricsLog(path) as log:
        log.truncate_after(100)
        log.append({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_a_missing_file_has_nothing_to_drop(path):
    with MetricsLog(path) as log:
        log.truncate_after(0)
    assert path.read_bytes() == b""


def test_a_full_disk_costs_lines_and_one_warning(path, capsys):
    warnings = []
    with MetricsLog(path, warn=warnings.append) as log:
        log.append({"step": 1})
        with files_no_larger_than(path.stat().st_size + 5):  # room for half a line
            log.append({"step": 2})
            log.append({"step": 3})
        log.append({"step": 4})
    assert steps(path) == [1, 4]
    assert warnings == [f"{path}: lines are lost: File too large; training goes on"]


def test_a_file_that_cannot_be_opened_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match="cannot be written: Is a directory"):
        MetricsLog(tmp_path)
