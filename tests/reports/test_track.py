import itertools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.core.errors import UserError
from jaxpeft.reports.trackers import make_trackers, without_secrets


class FakeServer:
    """Keeps runs as W&B does: rows by step, and a resumed run begins after its last row."""

    def __init__(self):
        self.runs, self.inits, self.finished = {}, [], []
        self.ids = (f"id{n}" for n in itertools.count())
        self.broken = False

    def init(self, **options):
        if self.broken:
            raise ConnectionError("no route\nto host")
        self.inits.append(options)
        return FakeRun(self, options["id"] or next(self.ids))


class FakeRun:
    def __init__(self, server, run_id):
        self.server, self.id = server, run_id
        self.rows = server.runs.setdefault(run_id, [])
        self.step = self.rows[-1][0] + 1 if self.rows else 0

    def log(self, numbers, step):
        if self.server.broken:
            raise ConnectionError("no route to host")
        self.rows.append((step, numbers))

    def finish(self, exit_code):
        self.server.finished.append(exit_code)


@pytest.fixture
def server(monkeypatch):
    server, module = FakeServer(), types.ModuleType("wandb")
    module.init = server.init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return server


def event_bytes(tmp_path):
    return b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())


def test_no_tracker_writes_nothing(tmp_path):
    tracker = make_trackers(False, None, tmp_path, {})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_numbers_go_to_both_and_everything_else_is_left_out(tmp_path, server):
    tracker = make_trackers(True, "project", tmp_path, {"seed": 0})
    metrics = {"step": 3, "loss": jnp.float32(1.5), "skipped": 2, "lr": np.float64(0.25)}
    tracker.log(3, {**metrics, "text": "hi", "nothing": None, "many": np.zeros(2)})
    tracker.close()
    assert server.runs == {"id0": [(3, {"loss": 1.5, "skipped": 2.0, "lr": 0.25})]}
    tags = event_bytes(tmp_path)
    assert all(tag in tags for tag in (b"loss", b"skipped", b"lr"))
    assert not any(tag in tags for tag in (b"text", b"nothing", b"many"))


def test_resumed_run_goes_on_in_the_same_wandb_run_without_repeating_steps(tmp_path, server):
    first = make_trackers(False, "project", tmp_path, {})
    for step in range(1, 8):
        first.log(step, {"loss": float(step)})
    resumed = make_trackers(False, "project", tmp_path, {}, first_step=5)
    for step in range(6, 11):
        resumed.log(step, {"loss": float(step)})
    assert (tmp_path / "wandb_run_id").read_text() == "id0\n"
    assert list(server.runs) == ["id0"]
    assert [step for step, _ in server.runs["id0"]] == list(range(1, 11))


def test_two_rows_of_the_same_step_both_arrive(tmp_path, server):
    tracker = make_trackers(False, "project", tmp_path, {})
    tracker.log(2, {"loss": 1.0})
    tracker.log(2, {"eval_loss": 2.0})
    assert server.runs["id0"] == [(2, {"loss": 1.0}), (2, {"eval_loss": 2.0})]


def test_run_from_the_start_gets_a_new_wandb_run(tmp_path, server):
    make_trackers(False, "project", tmp_path, {})
    make_trackers(False, "project", tmp_path, {})
    assert [options["id"] for options in server.inits] == [None, None]
    assert (tmp_path / "wandb_run_id").read_text() == "id1\n"


def test_given_run_id_wins_over_the_stored_one(tmp_path, server):
    (tmp_path / "wandb_run_id").write_text("old\n")
    make_trackers(False, "project", tmp_path, {}, "mine", first_step=5)
    assert server.inits[0]["id"] == "mine"


def test_tensorboard_is_told_from_which_step_a_resumed_run_begins_anew(tmp_path):
    make_trackers(True, None, tmp_path, {}, first_step=300).close()
    # Field 2 (step) is 301, field 7 holds SessionLog.status = START.
    assert bytes.fromhex("10ad02" + "3a020801") in event_bytes(tmp_path)


@pytest.mark.parametrize("leftover", ["nothing", "folder"])
def test_missing_wandb_is_an_error_at_start_that_says_what_to_install(
    tmp_path, monkeypatch, leftover
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    if leftover == "folder":  # a namespace package made of the logs of an earlier run
        monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(UserError, match=r"^track\.wandb: .*pip install wandb.*track\.wandb: null"):
        make_trackers(False, "project", tmp_path, {})


@pytest.mark.parametrize("first_step", [0, 5])
def test_wandb_that_cannot_start_is_one_warning(tmp_path, server, first_step):
    server.broken, warnings = True, []
    tracker = make_trackers(
        True, "project", tmp_path, {}, first_step=first_step, warn=warnings.append
    )
    tracker.log(6, {"loss": 1.0})
    tracker.close()
    (warning,) = warnings
    assert warning.startswith("track.wandb: cannot be started: ConnectionError: no route to host;")
    assert "\n" not in warning
    assert b"loss" in event_bytes(tmp_path)


def test_tensorboard_folder_that_is_a_file_is_one_warning(tmp_path, server):
    (tmp_path / "tensorboard").write_text("")
    warnings = []
    tracker = make_trackers(True, "project", tmp_path, {}, warn=warnings.append)
    tracker.log(6, {"loss": 1.0})
    tracker.close()
    (warning,) = warnings
    assert warning.startswith("track.tensorboard: cannot be started: ")
    assert server.runs == {"id0": [(6, {"loss": 1.0})]}


def test_failing_tracker_warns_once_and_the_other_goes_on(tmp_path, server):
    warnings = []
    tracker = make_trackers(True, "project", tmp_path, {}, warn=warnings.append)
    tracker.log(1, {"loss": 1.0})
    server.broken = True
    before = len(event_bytes(tmp_path))
    tracker.log(2, {"loss": 1.0})
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert len(warnings) == 1
    assert warnings[0].startswith("wandb failed")
    assert len(event_bytes(tmp_path)) > before


def test_warnings_go_to_standard_error_by_default(tmp_path, server, capsys):
    tracker = make_trackers(False, "project", tmp_path, {})
    server.broken = True
    tracker.log(1, {"loss": 1.0})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("warning: wandb failed")
    assert err.count("\n") == 1


def test_interrupt_inside_a_tracker_is_not_swallowed(tmp_path, server, monkeypatch):
    tracker = make_trackers(False, "project", tmp_path, {})

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeRun, "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tracker.log(1, {"loss": 1.0})


def test_close_passes_the_exit_code_and_works_twice(tmp_path, server):
    tracker = make_trackers(True, "project", tmp_path, {})
    tracker.close(exit_code=3)
    tracker.close()
    assert server.finished == [3]


def test_other_processes_write_nothing(tmp_path, server, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    tracker = make_trackers(True, "project", tmp_path, {})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert server.inits == []
    assert list(tmp_path.iterdir()) == []


def test_secrets_do_not_reach_wandb(tmp_path, server):
    config = {
        "model": {
            "path": "https://me:pass1@host/m?X-Amz-Signature=pass2&a=1",
            "hub_token": "pass3",
        },
        "data": {"train": ["a.jsonl", "hf_pass4pass4pass4pass4"], "max_length": 512},
        "api_key": "pass5",
        "optim": {"learning_rate": 1e-3},
    }
    make_trackers(False, "project", tmp_path, config)
    sent = server.inits[0]["config"]
    assert "pass" not in str(sent)
    assert sent["optim"] == {"learning_rate": 1e-3}
    assert sent["data"]["max_length"] == 512
    assert config["api_key"] == "pass5"


def test_plain_settings_are_not_hidden():
    config = {"max_new_tokens": 32, "tokens": 5, "key": "lora", "path": "a/b@main", "token": None}
    assert without_secrets(config) == config


def test_tracking_imports_neither_torch_nor_tensorflow(tmp_path):
    code = (
        "import sys; from jaxpeft.reports.trackers import make_trackers as m; "
        f"m(True, None, {str(tmp_path)!r}, {{}}).close(); "
        "print({'torch', 'tensorflow', 'tensorboard', 'tensorboardX', 'wandb'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
