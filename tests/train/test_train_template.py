"""model.chat_template: what a run learns under it, what it keeps of it, and when it goes on."""

import json
import pathlib
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_run import settings, write_rows
from toy_tokenizer import CHATML, shown

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.config.run_config import RunConfig
from jaxpeft.core.errors import UserError
from jaxpeft.planning.plan import describe_data
from jaxpeft.pretrained.load import load_model_config
from jaxpeft.training.output import folder
from jaxpeft.training.output.template import find_template, keep_template, run_tokenizer
from jaxpeft.training.run import Run

OTHER = (
    "{% for m in messages %}<s>{{ m['role'] }}={{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant={% endif %}"
)
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
LEARNED = "<s>user=hi<|im_end|><s>assistant=[ho<|im_end|>]"


def make_config(files, folder, template: pathlib.Path | None, **changes) -> RunConfig:
    write_rows(folder / "rows.jsonl", [ROW] * 8)
    path = None if template is None else str(template)
    changes = {
        "model": {"path": str(files.model), "chat_template": path},
        "data": {"train": str(folder / "rows.jsonl"), "eval": None, "max_length": 128},
        "evaluation": {"every": None},
        "train": {"steps": 1, "batch_size": 2},
        **changes,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings(files, folder / "run", **changes)))
    return jp.load_config(str(file))


@pytest.fixture
def template(tmp_path):
    (tmp_path / "t.jinja").write_text(OTHER)
    return tmp_path / "t.jinja"


def began(config: RunConfig, template: str) -> None:
    """Leaves what a run leaves that was stopped before its first checkpoint."""
    output = pathlib.Path(config.output_dir)
    output.mkdir()
    keep_template(config, template)
    folder.write_config(config)


def test_rows_are_learned_under_the_template(files, tmp_path, template):
    config = make_config(files, tmp_path, template)
    tokenizer = run_tokenizer(config, find_template(config))
    model = load_model_config(files.model)
    for rows in (
        program.read_data(config, model, tokenizer),
        program.read_data(config, model),
    ):
        batch = rows.plan.batch(0)
        count = int((batch["segment_ids"][0] == 1).sum())
        learned = [0, *batch["weights"][0, : count - 1]]  # weights are of the token behind
        assert shown(batch["tokens"][0, :count], learned) == LEARNED
    told = describe_data(rows, None, tokenizer, model.vocab_size)
    assert "<s>user=hi" in str(told)


def test_a_run_keeps_the_text_and_goes_on_without_the_file(files, tmp_path, template):
    config = make_config(files, tmp_path, template, method={"name": "full"})
    program.train(config)
    output = tmp_path / "run"
    assert (output / "model" / "chat_template.jinja").read_text() == OTHER
    assert jp.load_model(str(output / "model")).tokenizer.chat_template == OTHER
    assert jp.load_model(str(files.model)).tokenizer.chat_template == CHATML
    name = "tokenizer.json"
    assert (output / "model" / name).read_bytes() == (files.model / name).read_bytes()
    generation = json.loads((output / "model" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1]}  # <|im_end|>, where the template ends a turn
    assert (output / "chat_template.jinja").read_text() == OTHER
    assert yaml.safe_load((output / "config.yaml").read_text())["model"]["chat_template"]
    template.unlink()
    assert find_template(config) == OTHER
    program.train(config)  # it is finished, which is seen after the rows are read
    template.write_text(OTHER.replace("=", ": "))
    with pytest.raises(UserError, match=r"t.jinja is not what this run began with, another text"):
        program.train(config)
    other = make_config(files, tmp_path, None, method={"name": "full"})
    with pytest.raises(UserError, match=r"model.chat_template: null is not what this run began"):
        program.train(other)
    assert (output / "chat_template.jinja").read_text() == OTHER
    assert find_template(config, accepted=("chat_template",)) == OTHER.replace("=", ": ")
    with pytest.raises(UserError, match=r"training data|accept_changes data"):
        program.train(config, accepted=("chat_template",))  # rows are rendered otherwise
    assert find_template(config, overwrite=True) == OTHER.replace("=", ": ")
    (tmp_path / "same.jinja").write_text(OTHER)
    assert find_template(make_config(files, tmp_path, tmp_path / "same.jinja")) == OTHER


@pytest.mark.parametrize("overridden", [True, False])
def test_an_adapter_is_told_the_template_that_overrides(files, tmp_path, template, overridden):
    config = make_config(files, tmp_path, template if overridden else None)
    run: Any = SimpleNamespace(
        config=config,
        rows=SimpleNamespace(stop_ids=(1,)),
        base=SimpleNamespace(tokenizer=run_tokenizer(config, find_template(config))),
    )
    settings = Run.chat_settings(run)
    assert settings.template == (OTHER if overridden else "")
    assert settings.stop_ids == (1,)


def test_a_run_that_began_without_a_template_does_not_get_one(files, tmp_path, template):
    began(make_config(files, tmp_path, None), "")
    with pytest.raises(UserError, match=r"t.jinja is not .*began with, the tokenizer's own; put"):
        program.train(make_config(files, tmp_path, template))
    assert not (tmp_path / "run" / "chat_template.jinja").exists()


def test_a_template_left_by_a_start_that_was_killed_is_taken_over_by_the_same_start(
    files, tmp_path, template
):
    config = make_config(files, tmp_path, template)
    left = tmp_path / "run" / "chat_template.jinja"
    left.parent.mkdir()
    keep_template(config, OTHER)
    program.check_folder(config)
    keep_template(config, find_template(config))
    assert left.read_text() == OTHER
    with pytest.raises(UserError, match=r"run/chat_template\.jinja: exists without config\.yaml"):
        keep_template(config, OTHER + " ")
    assert left.read_text() == OTHER


@pytest.mark.parametrize("named", ["none", "other", "the same file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_template_that_is_no_runs_is_neither_removed_nor_replaced(
    files, tmp_path, template, named, overwrite
):
    place = tmp_path / "run" / "chat_template.jinja"
    place.parent.mkdir()
    place.write_text("{# mine #}" + OTHER)
    path = {"none": None, "other": template, "the same file": place}[named]
    before = (place.read_bytes(), place.stat().st_mtime_ns)
    with pytest.raises(
        UserError, match=r"chat_template\.jinja: exists without config\.yaml, so it"
    ):
        program.train(make_config(files, tmp_path, path), overwrite=overwrite)
    assert (place.read_bytes(), place.stat().st_mtime_ns) == before
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_never_writes_into_the_folder_of_its_base(files, tmp_path, overwrite):
    base = shutil.copytree(files.model, tmp_path / "base")
    (base / "chat_template.jinja").write_text(OTHER)
    (tmp_path / "link").symlink_to(base)
    before = {file: file.read_bytes() for file in base.iterdir()}
    config = make_config(
        files, tmp_path, None, model={"path": str(base)}, output_dir=str(tmp_path / "link")
    )
    with pytest.raises(UserError, match=r"output_dir: .*link is the folder of the base model, mod"):
        program.train(config, overwrite=overwrite)
    assert {file: file.read_bytes() for file in base.iterdir()} == before


def test_only_the_file_that_the_run_went_by_may_be_gone(files, tmp_path, template):
    config = make_config(files, tmp_path, template)
    began(config, OTHER)
    template.unlink()
    assert find_template(config) == OTHER
    mistyped = make_config(files, tmp_path, tmp_path / "tt.jinja")
    with pytest.raises(
        UserError, match=r"model\.chat_template: .*/tt\.jinja: no such file"
    ) as error:
        program.train(mistyped)
    assert error.value.exit_code == 2
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["model"]["chat_template"] == str(template)


def test_a_bad_template_is_told_before_anything_is_written(files, tmp_path, template):
    template.write_text("a\n{% for m in messages %}")
    with pytest.raises(UserError, match=r"model.chat_template: .*t.jinja:2: not a chat template"):
        program.train(make_config(files, tmp_path, template))
    assert not (tmp_path / "run").exists()


def test_overwrite_does_not_discard_the_template_that_is_read(files, tmp_path):
    config = make_config(files, tmp_path, tmp_path / "run" / "chat_template.jinja")
    began(config, OTHER)
    with pytest.raises(UserError, match=r"--overwrite would discard what this run reads: .*jinja"):
        program.train(config, overwrite=True)


def test_discarding_a_run_discards_its_template(files, tmp_path, template):
    config = make_config(files, tmp_path, template)
    began(config, OTHER)
    folder.discard(pathlib.Path(config.output_dir))
    assert list(pathlib.Path(config.output_dir).iterdir()) == []


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_path_is_no_template(files, tmp_path, value):
    with pytest.raises(UserError, match=r"model.chat_template: must be null or a file, got"):
        make_config(files, tmp_path, None, model={"path": str(files.model), "chat_template": value})


@pytest.mark.parametrize("section", ["data", "train"])
def test_the_key_of_other_libraries_leads_to_ours(files, tmp_path, section):
    changes = {section: {"chat_template": "x"}}
    with pytest.raises(UserError, match=r"belongs under \"model\": model.chat_template"):
        make_config(files, tmp_path, None, **changes)
