"""The example with a model of one's own: a run that is stopped ends like one that is not."""

import json
import runpy
import sys

import pytest
from places import ROOT

import jaxpeft as jp
from jaxpeft.data import batches
from jaxpeft.data.batches import Plan, iterate

SCRIPT = ROOT / "scripts" / "examples" / "any_model.py"


def run(folder, monkeypatch):
    """The command, in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def interrupted(*args, **options):
    """Batches until Ctrl-C in step 18, behind the checkpoint of step 10."""
    for index, batch in enumerate(iterate(*args, **options)):
        if index == 17:
            raise KeyboardInterrupt
        yield batch


def results(folder):
    lines = (folder / "log.jsonl").read_bytes()
    files = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    return lines, files


def test_a_run_that_is_stopped_goes_on_to_the_same_metrics_and_adapter(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(batches, "iterate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, monkeypatch)
    assert len((stopped / "log.jsonl").read_bytes().splitlines()) == 17
    assert not (stopped / "adapter").exists()
    run(stopped, monkeypatch)
    lines, files = results(whole)
    assert results(stopped) == (lines, files)
    losses = [json.loads(line)["loss"] for line in lines.splitlines()]
    assert len(losses) == 40
    assert losses[-1] < 0.6 * losses[0]
    assert files.keys() == {"adapter.safetensors", "jaxpeft_adapter.json"}
    other = lambda *args, **options: Plan(*args, **options, seed=1)  # noqa: E731
    monkeypatch.setattr(jp, "Plan", other)
    with pytest.raises(jp.UserError, match="this run began with other data"):
        run(stopped, monkeypatch)
