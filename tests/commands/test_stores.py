"""Everything a run reads and writes in a bucket, on a fake Google Cloud Storage of this machine."""

import errno
import importlib
import os
import pathlib
import re
import subprocess
import sys

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from fake_bucket import BUCKET, fake_bucket, put_folder
from places import HELPERS
from rich_folder import NOT_COPIED, read_all, write_rich
from tiny_run import STEPS, make_files, settings, training_lines

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.checkpoints import manifest
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.cli import exits
from jaxpeft.core.errors import CheckpointError, ResourceError, StoreError, UserError
from jaxpeft.files import folders, storage
from jaxpeft.pretrained.save import require_place
from jaxpeft.reports.metrics_log import open_log
from jaxpeft.training.output.lock import OWNER, hold

ROOT = f"gs://{BUCKET}"
STATE = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(5)}}


@pytest.fixture(scope="module", autouse=True)
def bucket():
    """A bucket with nothing in it, which gcsfs, epath and TensorStore are led to."""
    with fake_bucket() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
        fsspec.filesystem("gcs").clear_instance_cache()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What a run reads, on disk and, under `ROOT`/files, in the bucket."""
    folder = tmp_path_factory.mktemp("files")
    files = make_files(folder)
    put_folder(folder, f"{ROOT}/files")
    return files


def write_config(files, folder, output, **changes) -> str:
    """The config of a run; one whose output lies in the bucket reads from there, too."""
    values = settings(files, output, **changes)
    if storage.is_remote(output):
        values["model"] = {"path": f"{ROOT}/files/model"}
        values["data"] |= {name: f"{ROOT}/files/{name}.jsonl" for name in ("train", "eval")}
    path = folder / f"{pathlib.PurePath(output).name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def killed(config: str, moment: str) -> None:
    command = [sys.executable, str(HELPERS / "faulty_train.py"), moment, "SIGKILL", config]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


def without_times(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_goes_on_to_the_bytes_of_one_on_disk(
    files, tmp_path, one_device, capsys
):
    disk, there = tmp_path / "run", storage.as_path(f"{ROOT}/run-there")
    program.main([write_config(files, tmp_path, disk)])
    config = write_config(files, tmp_path, str(there))
    killed(config, "step:8")
    assert {path.name for path in (there / "checkpoints").iterdir()} >= {"3"}
    assert not (there / "adapter").exists()
    program.main([config])

    adapter = (there / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapter == (disk / "adapter" / "adapter_model.safetensors").read_bytes()
    assert without_times(training_lines(there)) == without_times(training_lines(disk))
    assert [line["step"] for line in training_lines(there)] == list(range(1, STEPS + 1))
    assert Checkpoints(there / "checkpoints").steps() == [9, 12]

    command = importlib.import_module("jaxpeft.generate")
    capsys.readouterr()
    program.main([config])
    assert "already finished" in capsys.readouterr().out
    for folder, model in ((disk, files.model), (there, f"{ROOT}/files/model")):
        flags = ["--raw", "--max_new_tokens", "4", "--no_compilation_cache"]
        command.main(["--model", str(model), "--adapter", str(folder), *flags, "aabc="])
    answers = capsys.readouterr().out
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]
    assert answers.strip()


def saved(folder: str, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=9, warn=lambda text: None)
    for step in steps:
        checkpoints.save(step, STATE, meta={"step": step})
    checkpoints.wait()
    return checkpoints


def test_a_step_without_its_marker_does_not_exist():
    folder = f"{ROOT}/without-marker"
    checkpoints = saved(folder, 1, 2)
    assert checkpoints.steps() == [1, 2]
    (storage.as_path(folder) / "2" / manifest.NAME).unlink()
    assert checkpoints.steps() == [1]
    assert checkpoints.latest() == 1
    again = saved(folder, 2)  # the objects of the unfinished one are out of its way
    assert again.steps() == [1, 2]
    restored = again.restore(2, STATE)
    np.testing.assert_array_equal(restored["a"], np.arange(6.0).reshape(2, 3))


def refusing(patch, method: str, part: str) -> None:
    """Lets calls of the store's client fail whose path has this part."""
    storage.as_path(ROOT)  # settles which client it is
    client = fsspec.filesystem("gcs", finalize_on_close=True)
    original = getattr(client, method)

    def call(path, *args, **options):
        if part in str(path):
            raise OSError("Forbidden: not now")
        return original(path, *args, **options)

    patch.setattr(client, method, call)


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(monkeypatch):
    folder = f"{ROOT}/silent"
    checkpoints = saved(folder, 1)
    client = fsspec.filesystem("gcs", finalize_on_close=True)

    def fail(path, **_):
        raise OSError("Forbidden: not now")

    with monkeypatch.context() as patch:
        patch.setattr(client, "info", fail)
        with pytest.raises(StoreError, match=r"silent/1/manifest\.json: not allowed"):
            checkpoints.latest()
    assert checkpoints.latest() == 1


def test_a_manifest_that_the_store_does_not_give_is_not_taken_for_damage(monkeypatch):
    folder, told = f"{ROOT}/refused", []
    with Checkpoints(folder, keep=1, warn=told.append) as checkpoints:
        checkpoints.save(1, STATE, meta={}, metric=0.5)
        checkpoints.save(2, STATE, meta={}, metric=0.7)
        with monkeypatch.context() as patch:
            refusing(patch, "open", "refused/1/manifest.json")
            checkpoints.save(3, STATE, meta={}, metric=0.9)
            checkpoints.wait()
            assert checkpoints.steps() == [1, 2, 3]
            assert "refused: no old step is deleted: " in told[0]
            with pytest.raises(StoreError, match=r"refused/1/manifest\.json: not allowed"):
                checkpoints.best()
        with monkeypatch.context() as patch:
            refusing(patch, "open", "refused/3/manifest.json")
            with pytest.raises(StoreError, match=r"refused/3/manifest\.json: not allowed"):
                Checkpoints(folder).latest()
        assert checkpoints.steps() == [1, 2, 3]
        assert checkpoints.best() == 1


def test_the_marker_is_the_object_written_last(monkeypatch):
    folder = f"{ROOT}/interrupted"
    checkpoints = saved(folder, 1)
    there_before = []

    client = fsspec.filesystem("gcs", finalize_on_close=True)

    def fail(path, mode="rb", open_=client.open, **options):
        if "w" in mode and path.endswith(manifest.NAME):
            there_before.extend(storage.objects(storage.as_path(f"{folder}/2")))
            patch.setattr(client, "rm", None)  # what is left cannot be removed either
            raise OSError("Forbidden: the store is gone")
        return open_(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(client, "open", fail)
        checkpoints.save(2, STATE, meta={})
        with pytest.raises(StoreError, match=r"/2: cannot be saved: .*Earlier steps are") as caught:
            checkpoints.wait()
    assert caught.value.exit_code == 5
    assert "commit_success.txt" in there_before  # Orbax had written all of it
    assert manifest.NAME not in there_before
    assert checkpoints.latest() == 1
    assert saved(folder, 2).latest() == 2


def change_an_object(step: storage.StoragePath) -> tuple[str, bytes]:
    """Flips a bit of a checkpoint; the name of the object, and what it is now."""
    name = next(name for name in storage.objects(step) if "/d/" in name)
    data = bytearray((step / name).read_bytes())
    data[len(data) // 2] ^= 1
    (step / name).write_bytes(bytes(data))
    return name, bytes(data)


def test_a_changed_object_is_noticed_the_older_step_used_and_only_the_owner_sets_it_aside():
    folder, told, owned = storage.as_path(f"{ROOT}/changed"), [], []

    def check_owner():
        if not owned:
            raise UserError("another run is writing here")

    saved(str(folder), 1, 3)
    name, data = change_an_object(folder / "3")
    before = storage.objects(folder)
    with Checkpoints(folder, warn=told.append, check_owner=check_owner) as checkpoints:
        assert checkpoints.latest() == 1
        assert f"{name}: its crc32c differs" in told[0]
        with pytest.raises(UserError, match=r"^another run is writing here"):
            checkpoints.save(2, STATE, meta={})
        assert storage.objects(folder) == before
        owned.append(True)
        checkpoints.save(2, STATE, meta={})
    assert checkpoints.steps() == [1, 2]
    assert (folder / "damaged" / "3" / name).read_bytes() == data


def test_a_run_whose_newest_step_is_damaged_goes_on_from_the_one_before(
    files, tmp_path, one_device, monkeypatch, capsys
):
    there = storage.as_path(f"{ROOT}/damaged-run")
    changes = {"train": {"steps": 2}, "evaluation": {"every": None}, "checkpoint": {"every": 1}}
    config = write_config(files, tmp_path, str(there), **changes)
    program.main([config])
    adapter = (there / "adapter" / "adapter_model.safetensors").read_bytes()
    change_an_object(there / "checkpoints" / "2")
    before = storage.objects(there)

    def fail(*_, **__):
        raise UserError("this model cannot be loaded")

    with monkeypatch.context() as patch:
        patch.setattr(program, "load_model", fail)
        with pytest.raises(UserError, match="this model"):
            program.main([config])
    assert storage.objects(there) == before
    program.main([config])
    assert (there / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert {path.name for path in (there / "checkpoints" / "damaged").iterdir()} == {"2"}
    assert "checkpoints/2: set aside in " in capsys.readouterr().err


def test_a_copy_of_a_checkpoint_on_disk_is_verified_too(tmp_path):
    saved(f"{ROOT}/copied", 1)
    fsspec.filesystem("gcs").get(f"{ROOT}/copied/", f"{tmp_path}/", recursive=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1
    file = next((tmp_path / "1" / "state" / "d").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="its crc32c differs"):
        Checkpoints(tmp_path).latest()


def test_old_steps_go_marker_first(monkeypatch):
    folder, checkpoints = f"{ROOT}/pruned", saved(f"{ROOT}/pruned", 1)
    gone = []
    monkeypatch.setattr(storage, "remove", lambda path: gone.append((path.name, path / "x")))
    fewer = Checkpoints(folder, keep=1)
    fewer.save(2, STATE, meta={})
    fewer.wait()
    assert [name for name, _ in gone] == ["1"]
    assert checkpoints.steps() == [2]  # although its other objects are still there


def test_lines_are_kept_with_the_checkpoint_and_cut_back_to_it():
    place = storage.as_path(f"{ROOT}/lines/metrics.jsonl")
    with open_log(place) as log:
        for step in (1, 2, 3):
            log.append({"step": step})
            if step < 3:
                log.keep()
    assert place.read_text() == '{"step": 1}\n{"step": 2}\n'
    with open_log(place) as log:
        log.truncate_after(1)
        assert place.read_text() == '{"step": 1}\n'


def test_of_two_runs_in_one_folder_the_older_one_stops():
    with hold(f"{ROOT}/twice") as older:
        older.begin()
        with hold(f"{ROOT}/twice") as newer:
            older.check()
            newer.begin()
            newer.check()
            where = rf"twice: another run .*pid {os.getpid()} on .*, begun 2.* UTC\)"
            with pytest.raises(UserError, match=where):
                older.check()


def test_a_run_that_lost_the_folder_makes_no_step_and_removes_none():
    folder, told, answers = f"{ROOT}/lost", [], iter([True, False, False, False])

    def check_owner():
        if not next(answers):
            raise UserError("another run is writing here")

    saved(folder, 1)
    older = Checkpoints(folder, keep=1, warn=told.append, check_owner=check_owner)
    older.save(2, STATE, meta={})
    older.wait()
    assert "no old step is deleted: another run" in told[0]
    older.save(3, STATE, meta={})
    with pytest.raises(UserError, match=r"^another run is writing here"):
        older.wait()
    assert older.steps() == [1, 2]
    assert storage.objects(storage.as_path(f"{folder}/3"))  # perhaps the other run's


@pytest.mark.parametrize("moment", ["step", "export"])
def test_a_run_that_another_one_took_the_folder_from_writes_nothing_more(
    files, tmp_path, one_device, monkeypatch, moment
):
    there = storage.as_path(f"{ROOT}/taken-at-{moment}")
    changes = {"train": {"steps": 1}, "evaluation": {"every": None}, "checkpoint": {"every": 1}}
    config = write_config(files, tmp_path, str(there), **changes)

    def take(*_):
        (there / OWNER).write_text('{"pid": 1, "host": "other"}')

    def take_at_step(run, batch, put=program.Run.put):
        if hasattr(run, "state"):
            take()
        return put(run, batch)

    if moment == "step":
        monkeypatch.setattr(program.Run, "put", take_at_step)
    else:
        monkeypatch.setattr(program, "loop", take)
    with pytest.raises(UserError, match=r"another run is writing here now \(pid 1 on other\)"):
        program.main([config])
    found = {name for name in storage.objects(there) if not name.startswith("metrics")}
    assert found == {"config.yaml", OWNER}
    assert not storage.exists(there / "metrics.jsonl") or not training_lines(there)


def test_a_start_that_fails_takes_the_folder_from_nobody(files, tmp_path, one_device, monkeypatch):
    there = storage.as_path(f"{ROOT}/not-taken")

    def load(*args, load_model=program.load_model, **options):
        saved(f"{there}/checkpoints", 5)
        return load_model(*args, **options)

    monkeypatch.setattr(program, "load_model", load)
    with pytest.raises(UserError, match="not-taken: another run saved step 5 meanwhile"):
        program.main([write_config(files, tmp_path, str(there))])
    assert {name.partition("/")[0] for name in storage.objects(there)} == {"checkpoints"}


def test_of_several_objects_the_old_last_one_goes_first(monkeypatch):
    there = storage.as_path(f"{ROOT}/replaced")
    folders.write_folder(there, {"a": b"1", "last": b"1"})
    with monkeypatch.context() as patch:
        refusing(patch, "open", "replaced/a")
        with pytest.raises(StoreError, match="replaced: not allowed"):
            folders.write_folder(there, {"a": b"2", "last": b"2"})
    assert set(storage.objects(there)) == {"a"}
    with monkeypatch.context() as patch:
        refusing(patch, "info", "replaced")
        with pytest.raises(StoreError, match="replaced: not allowed"):
            require_place(there)


def test_a_full_temporary_folder_is_named():
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ResourceError, match="TMPDIR"), folders.new_folder(f"{ROOT}/full"):
        raise full


def test_a_model_is_saved_and_its_config_is_written_last(files, monkeypatch):
    base, there = jp.load_model(f"{ROOT}/files/model"), f"{ROOT}/saved"
    assert base.fingerprint == jp.load_model(str(files.model)).fingerprint
    jp.save_model(there, base)
    assert jp.load_model(there).fingerprint == base.fingerprint
    with pytest.raises(UserError, match="saved: holds a model already"):
        jp.save_model(there, base)
    with pytest.raises(UserError, match="is the model that is read"):
        jp.save_model(f"{ROOT}/files/model/", base, overwrite=True)

    client = fsspec.filesystem("gcs", finalize_on_close=True)

    def fail(local, url, put=client.put_file):
        if local.endswith(".safetensors"):
            raise OSError("Forbidden: not yours")
        put(local, url)

    monkeypatch.setattr(client, "put_file", fail)
    with pytest.raises(UserError, match=r"saved: not allowed \(Forbidden: not yours\); log in"):
        jp.save_model(there, base, overwrite=True)
    assert not (storage.as_path(there) / "config.json").exists()


def test_a_model_in_a_bucket_is_saved_with_the_bytes_of_its_files(tmp_path):
    folder = write_rich(tmp_path / "rich", "named")
    put_folder(folder, f"{ROOT}/rich")
    base = jp.load_model(f"{ROOT}/rich")
    assert set(base.tokenizer.chat_template) == {"default", "tool_use"}
    jp.save_model(str(tmp_path / "out"), base)
    jp.save_model(f"{ROOT}/copy", base)
    jp.save_model(f"{ROOT}/copy", base, overwrite=True)
    before, after = read_all(folder), read_all(tmp_path / "out")
    new = {"config.json", "model.safetensors"}
    assert after.keys() - new == before.keys() - new - NOT_COPIED
    assert all(after[name] == before[name] for name in after.keys() - new)
    assert storage.objects(storage.as_path(f"{ROOT}/copy")).keys() == after.keys()


def test_ranges_of_an_object_are_those_of_the_file(files, monkeypatch):
    file = files.model / "model.safetensors"
    data = file.read_bytes()
    view = memoryview(bytearray(100))
    for path in (file, storage.as_path(f"{ROOT}/files/model/model.safetensors")):
        ranges = storage.Ranges(path)
        assert ranges.read_into(view, 50) == 100
        assert bytes(view) == data[50:150]
        assert ranges.read_into(view, len(data) - 7) == 7
        assert ranges.read_into(view, len(data)) == 0
        monkeypatch.setattr(storage, "_MAX_REQUEST_BYTES", 60)
        assert ranges.read_into(view, 0) == (60 if storage.is_remote(path) else 100)
        ranges.close()
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--model.path", f"{ROOT}/nothing"), r"nothing: no such bucket, or it has no config.json"),
        (("--model.path", "gs://no-such-bucket/m"), r"no-such-bucket/m: no such bucket, or"),
        (("--model.path", f"{ROOT}/x.gguf"), r"x\.gguf: a \.gguf file is read from a disk only"),
        (("--data.train", f"{ROOT}/files/tran.jsonl"), r"tran\.jsonl: no such .*: train\.jsonl"),
        (("--data.train", "gs://no-such-bucket/x.jsonl"), r"no-such-bucket/x\.jsonl: no such file"),
        (("--data.eval", "s3://bucket/x.jsonl"), r"s3://bucket/x\.jsonl: of object stores only gs"),
        (("--output_dir", "gs://no-such-bucket/run"), r"no-such-bucket/run: .*no such bucket"),
        (("--output_dir", "gs:///run"), r"gs:///run: names no bucket"),
        (("--method.init_from", f"{ROOT}/nothing"), r"nothing: .* no adapter_config\.json or"),
        (("--track.tensorboard", "true"), r"track\.tensorboard: needs an output_dir on a disk"),
        (("--profile", "1:2"), r"--profile: needs an output_dir on a disk"),
    ],
)
def test_bad_places_are_told_in_one_line(
    files, tmp_path, one_device, capsys, monkeypatch, flags, text
):
    config = write_config(files, tmp_path, f"{ROOT}/bad")
    monkeypatch.setattr(sys, "argv", ["train", config, *flags])
    with pytest.raises(SystemExit) as stop:
        exits.run(program.main)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert line.startswith("error: ")
    assert re.search(text, line), line


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("train.jsonl", f"{ROOT}/files/train.jsonl"),
        ("eval.jsonl", f"{ROOT}/files/eval.jsonl"),
        ("model/config.json", f"{ROOT}/files/model/config.json"),
        ("model/tokenizer.json", f"{ROOT}/files/model"),
        ("model/model.safetensors", "object store"),
    ],
)
def test_a_store_that_refuses_what_a_run_reads_is_told_in_one_line(
    files, tmp_path, one_device, capsys, monkeypatch, name, where
):
    monkeypatch.setattr(sys, "argv", ["train", write_config(files, tmp_path, f"{ROOT}/bad")])
    refusing(monkeypatch, "open", f"files/{name}")
    with pytest.raises(SystemExit) as stop:
        exits.run(program.main)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == StoreError.exit_code == 5
    assert re.search(rf"^error: {where}: not allowed \(Forbidden", line), line


def test_what_stores_refuse_is_told_with_the_way_out(monkeypatch):
    import gcsfs

    storage.as_path(ROOT)
    refused = gcsfs.retry.HttpError({"code": 403, "message": "no storage.objects.get access"})
    assert storage.is_store_error(refused)
    assert "not allowed (no storage.objects.get access, 403); log in with" in storage.explain(
        refused
    )
    assert not storage.is_store_error(KeyError("x"))
    monkeypatch.setattr(storage, "_reached", set())
    assert not storage.is_store_error(refused)


def test_without_gcsfs_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://x/y: needs pip install 'jaxpeft\[gcs\]'"):
        jp.load_model("gs://x/y")
