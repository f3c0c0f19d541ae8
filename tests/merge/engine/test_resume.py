"""What is left after a crash, a full disk or a change of mind, and how it goes on from there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from fusechat_common.errors import FusechatError, RequestError
from fusechat_merge.cli import main
from fusechat_merge.engine import execute, saving
from fusechat_merge.engine.journal import Journal
from fusechat_merge.engine.verify import verify
from fusechat_merge.planning.planner import plan

BF16 = torch.bfloat16
Family = Callable[..., list[Path]]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def work_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, llama_family: Family) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    base, *targets = llama_family(folder, (BF16,) * 3, changes={"vocab_size": 3000})
    (base / "tokenizer.json").write_text("{}")
    return {
        "merge_method": "varm",
        "base_model": str(base),
        "models": [{"model": str(t)} for t in targets],
        "parameters": {"granularity": "layer"},
    }


@pytest.fixture(scope="module")
def crashing() -> Iterator[Callable[..., dict[str, Any]]]:
    program = Path(__file__).parents[2] / "support" / "crashing.py"
    process = subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(
        config: dict[str, Any], out: Path, kill_at: int | str = 0, **more: Any
    ) -> dict[str, Any]:
        assert process.stdin
        assert process.stdout
        order = {"config": config, "out": str(out), "kill_at": kill_at, **more}
        print(json.dumps(order), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()  # type: ignore[union-attr]
    process.wait(60)


OPTIONS = {"memory": 5_000_000, "shard_size": 150_000, "threads": 2}


@pytest.fixture(scope="module")
def whole(
    config: dict[str, Any], crashing: Callable[..., dict[str, Any]], tmp_path_factory: Any
) -> tuple[dict[str, bytes], int, int]:
    """An uninterrupted merge: its files, how many calls it took, bytes written."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ended = crashing(config, out, options=OPTIONS)
    assert ended["status"] == 0
    assert not work_of(out).exists()
    return content(out), ended["calls"], ended["written"]


def test_twenty_kills_each_resumed_to_the_same_bytes(
    tmp_path: Path, config: dict[str, Any], crashing: Any, whole: Any
) -> None:
    files, calls, _ = whole
    # How many calls there are depends a little on when the saver gets to run.
    moments: list[int | str] = [*random.Random(0).sample(range(1, calls * 3 // 4), 16)]
    moments += ["before fsync", "after fsync", "before rename", "after rename"]
    for number, moment in enumerate(moments):
        out = tmp_path / str(number)
        assert crashing(config, out, moment, options=OPTIONS)["status"] == signal.SIGKILL
        if out.exists():  # killed after it was published
            assert content(out) == files
        resumed = crashing(config, out, options=OPTIONS | {"threads": 1})
        assert (resumed["status"], resumed["error"]) == (0, None)
        assert content(out) == files
        assert not work_of(out).exists()


def test_killed_again_and_again(
    tmp_path: Path, config: dict[str, Any], crashing: Any, whole: Any
) -> None:
    files, calls, _ = whole
    out = tmp_path / "out"
    deaths = 0
    while crashing(config, out, calls * 2 // 3, options=OPTIONS)["status"] == signal.SIGKILL:
        deaths += 1
        assert deaths < 10
    assert deaths
    assert content(out) == files


def test_a_resumed_merge_does_not_write_again_what_is_safe(
    tmp_path: Path, llama_family: Family, crashing: Any
) -> None:
    changes = {"num_hidden_layers": 14, "vocab_size": 64}
    base, target = llama_family(tmp_path / "in", (BF16,) * 2, changes=changes)
    config = {"merge_method": "varm", "base_model": str(base), "models": [{"model": str(target)}]}
    written = crashing(config, tmp_path / "whole", options=OPTIONS)["written"]
    out = tmp_path / "out"
    ended = crashing(config, out, kill_after=int(0.8 * written), options=OPTIONS)
    assert ended["status"] == signal.SIGKILL
    resumed = crashing(config, out, options=OPTIONS)
    assert content(out) == content(tmp_path / "whole")
    assert 0 < resumed["written"] < written / 2


def test_no_room(tmp_path: Path, config: dict[str, Any], crashing: Any, whole: Any) -> None:
    files, _, _ = whole
    out = tmp_path / "out"
    ended = crashing(config, out, options=OPTIONS, file_limit=120_000)
    code, message = ended["error"]
    assert code == 1
    assert "no room left" in message
    assert "the same command goes on from there" in message
    assert not out.exists()
    assert crashing(config, out, options=OPTIONS)["error"] is None
    assert content(out) == files


def cli(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


@pytest.fixture
def yml(tmp_path: Path, config: dict[str, Any]) -> Path:
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def interrupt(yml: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished merge: it breaks when the side files are to be written."""
    with monkeypatch.context() as patch:
        patch.setattr(
            execute, "write_side_files", lambda *_: (_ for _ in ()).throw(OSError("gone"))
        )
        result = cli("run", str(yml), str(out))
    assert result.exit_code == 1
    assert "gone; what was done is kept: the same command goes on from there" in result.stderr
    assert work_of(out).exists()


def test_changed_configuration_is_refused_with_what_changed(
    tmp_path: Path, yml: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(yml, out, monkeypatch)
    yml.write_text(yaml.safe_dump({**config, "dtype": "float32"}))
    result = cli("run", str(yml), str(out))
    assert result.exit_code == 2
    assert "--no-resume starts over" in result.stderr
    assert 'configuration: dtype was null, is "float32"' in result.stderr
    assert cli("run", str(yml), str(out), "--no-resume").exit_code == 0


def test_changed_source_is_refused_with_its_name(
    tmp_path: Path, yml: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(yml, out, monkeypatch)
    file = Path(config["models"][0]["model"]) / "model.safetensors"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    try:
        result = cli("run", str(yml), str(out))
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert result.exit_code == 2
    assert f"sources: {file} was" in result.stderr
    assert cli("run", str(yml), str(out)).exit_code == 0


def test_a_source_that_changes_during_the_merge(
    tmp_path: Path, yml: Path, config: dict[str, Any]
) -> None:
    file = Path(config["models"][1]["model"]) / "model.safetensors"
    before = file.stat()

    def touch(tensor: str, nbytes: int) -> None:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))

    try:
        with pytest.raises(FusechatError, match="was changed while it was being merged; the same"):
            execute.merge(config, tmp_path / "out", progress=touch)
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not (tmp_path / "out").exists()


def test_what_was_made_from_a_source_that_changed_is_not_kept(
    tmp_path: Path, llama_family: Family
) -> None:
    base, target = llama_family(tmp_path / "in", (BF16,) * 2)
    config = {"merge_method": "varm", "base_model": str(base), "models": [{"model": str(target)}]}
    expected = content(execute.merge(config, tmp_path / "whole"))
    file = target / "model.safetensors"
    whole, before = file.read_bytes(), file.stat()

    def rewrite(tensor: str, nbytes: int) -> None:
        file.write_bytes(whole[: len(whole) // 4].ljust(len(whole), b"\0"))

    with pytest.raises(FusechatError):
        execute.merge(config, tmp_path / "out", progress=rewrite, threads=1)
    file.write_bytes(whole)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # from a backup
    assert content(execute.merge(config, tmp_path / "out")) == expected


def test_a_source_that_vanished(tmp_path: Path, config: dict[str, Any]) -> None:
    planned = plan(config)
    file = Path(config["models"][1]["model"]) / "model.safetensors"
    file.rename(file.with_name("elsewhere"))
    try:
        with pytest.raises(FusechatError, match=r"No such file.*the same command goes on"):
            execute.carry_out(planned, tmp_path / "out")
    finally:
        file.with_name("elsewhere").rename(file)
    execute.carry_out(planned, tmp_path / "out")
    assert verify(config, tmp_path / "out") == []


def test_ctrl_c(tmp_path: Path, config: dict[str, Any]) -> None:
    def interrupt(tensor: str, nbytes: int) -> None:
        if nbytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute.merge(config, tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    execute.merge(config, tmp_path / "out")


def test_events_for_programs(tmp_path: Path, yml: Path) -> None:
    result = cli("run", str(yml), str(tmp_path / "out"), "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["plan", "done"]
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["bytes"] == progress[-1]["of"]
    assert result.stderr.count("\r") == 0


def test_finished_is_finished(tmp_path: Path, yml: Path) -> None:
    out = tmp_path / "out"
    assert cli("run", str(yml), str(out)).exit_code == 0
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    again = cli("run", str(yml), str(out))
    assert again.exit_code == 0
    assert "nothing to do" in again.stderr
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp


def test_out_in_use_is_kept_until_the_new_model_is_complete(
    tmp_path: Path, yml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    result = cli("run", str(yml), str(out))
    assert result.exit_code == 2
    assert "is in use by something other than this merge" in result.stderr
    assert "merging" not in result.stderr  # nothing is announced that can't be done
    assert not work_of(out).exists()
    with monkeypatch.context() as patch:
        patch.setattr(
            execute, "write_side_files", lambda *_: (_ for _ in ()).throw(OSError("gone"))
        )
        assert cli("run", str(yml), str(out), "--overwrite").exit_code == 1
    assert [p.name for p in out.iterdir()] == ["precious"]
    assert cli("run", str(yml), str(out), "--overwrite").exit_code == 0
    assert not (out / "precious").exists()
    assert (out / "model.safetensors").exists()
    assert not work_of(out).exists()


def test_a_second_run_is_refused(tmp_path: Path, yml: Path) -> None:
    out = tmp_path / "out"
    holder = Journal(work_of(out) / "journal")
    result = cli("run", str(yml), str(out))
    holder.close()
    assert result.exit_code == 2
    assert "another fusechat-merge is writing here now" in result.stderr
    assert "merging" not in result.stderr
    assert cli("run", str(yml), str(out)).exit_code == 0


def test_a_shard_that_was_lost_is_made_again(
    tmp_path: Path, yml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(yml, out, monkeypatch)
    (work_of(out) / "model" / "model.safetensors").unlink()
    assert cli("run", str(yml), str(out)).exit_code == 0
    assert cli("verify", str(yml), str(out)).exit_code == 0


def test_a_journal_cut_short_is_believed_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "work" / "journal"
    journal = Journal(path)
    journal.begin({"a": 1})
    journal.add(elements={"x": 5})
    journal.add(elements={"x": 9, "y": 1})
    journal.close()
    path.write_bytes(path.read_bytes()[:-4])
    journal = Journal(path)
    assert journal.done.elements == {"x": 5}
    journal.add(weights={"x": [0.1]})
    journal.close()
    journal = Journal(path)
    assert (journal.done.elements, journal.done.weights) == ({"x": 5}, {"x": [0.1]})
    with open(path, "ab") as file:  # blocks that the system had reserved, but not written
        file.write(bytes(7) + b"\n" + b'{"elements":{"x":7}}\n')
    with pytest.raises(RequestError, match="another fusechat-merge"):
        Journal(path)
    journal.close()
    journal = Journal(path)
    assert journal.done.elements == {"x": 5}
    journal.close()


def test_a_journal_that_its_last_holder_removed_just_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain, removed = tmp_path / "work" / "journal", fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(path.read_bytes())
            shutil.rmtree(path.parent)
        plain(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    journal = Journal(path)
    journal.begin({"a": 1})
    journal.close()
    assert removed == [b""]
    assert path.read_text() == '{"identity":{"a":1}}\n'


@pytest.mark.parametrize("changed", ["device", "numba"])
def test_a_merge_begun_elsewhere_is_another(
    tmp_path: Path, yml: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    out = tmp_path / "out"
    interrupt(yml, out, monkeypatch)
    if changed == "device":
        path = work_of(out) / "journal"
        path.write_text(path.read_text().replace('"device":"cpu"', '"device":"cuda"'))
        message = 'device was "cuda", is "cpu"'
    else:
        plain = execute.version

        def version(package: str) -> str:
            if package == "numba":
                raise PackageNotFoundError(package)
            return plain(package)

        message = f'software: numba was "{plain("numba")}", is null'
        monkeypatch.setattr(execute, "version", version)
    result = cli("run", str(yml), str(out))
    assert result.exit_code == 2
    assert message in result.stderr
    monkeypatch.undo()
    assert cli("run", str(yml), str(out), "--no-resume").exit_code == 0


def test_saving_falls_behind(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every note is worth more than two saves: each waits for the disk."""
    expected = content(execute.merge(config, tmp_path / "whole"))
    monkeypatch.setattr(saving, "SAVE_EVERY", 1)
    assert content(execute.merge(config, tmp_path / "out")) == expected


def test_a_disk_that_fails_when_it_is_to_be_sure(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(execute.merge(config, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(saving, "SAVE_EVERY", 1)
        failed = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
        patch.setattr(saving.ShardFiles, "sync", failed)
        with pytest.raises(FusechatError, match="Input/output error; what was done is kept"):
            execute.merge(config, tmp_path / "out")
    assert failed.call_count == 1  # what it lost, a second one would not tell
    assert not (tmp_path / "out").exists()
    journal = Journal(work_of(tmp_path / "out") / "journal")
    assert not journal.done.elements
    journal.close()
    assert content(execute.merge(config, tmp_path / "out")) == expected


def test_an_unfinished_merge_is_kept_while_out_is_in_use(
    tmp_path: Path, yml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(yml, out, monkeypatch)
    plain = execute.Journal

    def late(path: Path) -> Journal:
        out.mkdir()
        (out / "precious").touch()
        return plain(path)

    before = content(work_of(out))
    with monkeypatch.context() as patch:
        patch.setattr(execute, "Journal", late)
        result = cli("run", str(yml), str(out))
    assert result.exit_code == 2
    assert "in use by something other than this merge" in result.stderr
    assert content(work_of(out)) == before
    assert cli("run", str(yml), str(out), "--overwrite").exit_code == 0


def stopped_at(
    count: int, monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any
) -> None:
    """A merge whose disk fails at the ``count``-th note."""
    plain, seen = saving.Saver.note, 0

    def note(self: saving.Saver, kind: str, name: str, value: Any, nbytes: int = 0) -> None:
        nonlocal seen
        plain(self, kind, name, value, nbytes)
        seen += 1
        if seen == count:
            raise OSError(5, "stop")

    with monkeypatch.context() as patched:
        patched.setattr(saving, "SAVE_EVERY", 20_000)
        patched.setattr(saving.Saver, "note", note)
        with pytest.raises(FusechatError):
            execute.merge(*arguments, **options)


@pytest.mark.parametrize("method", ["linear", "varm"])
@pytest.mark.parametrize("full", [False, True])
def test_a_lost_shard_is_made_again(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str, full: bool
) -> None:
    """Also where the first start after the loss found the disk full."""
    models = [model | {"parameters": {"weight": 0.5}} for model in config["models"]]
    config = config | {"merge_method": method, "models": models}
    if method == "linear":
        config = {key: config[key] for key in ("merge_method", "models")}
    options: dict[str, Any] = {"shard_size": 20_000, "threads": 1}
    expected = content(execute.merge(config, tmp_path / "whole", **options))
    stopped_at(20, monkeypatch, config, tmp_path / "out", **options)
    min((work_of(tmp_path / "out") / "model").iterdir()).unlink()
    if full:
        with monkeypatch.context() as patched:
            no_room = OSError(errno.ENOSPC, "No space left on device")
            patched.setattr(saving, "reserve", Mock(side_effect=no_room))
            with pytest.raises(FusechatError, match="no room left"):
                execute.merge(config, tmp_path / "out", **options)
    assert content(execute.merge(config, tmp_path / "out", **options)) == expected


def test_a_selection_with_ties_goes_on_with_other_memory(
    tmp_path: Path, llama_family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(label: str, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (tensor.float() * 4).round().div(4).to(BF16)

    paths = llama_family(tmp_path / "in", (BF16,) * 3, changes={"vocab_size": 40_000}, edit=coarse)
    config = {
        "merge_method": "fusechat_sce",
        "base_model": str(paths[0]),
        "models": [{"model": str(path)} for path in paths[1:]],
        "parameters": {"select_topk": 0.3},
    }
    expected = content(execute.merge(config, tmp_path / "whole", threads=1))
    out = tmp_path / "out"
    stopped_at(8, monkeypatch, config, out, threads=1, memory=9_000_000)
    done = Journal(work_of(out) / "journal")
    assert any(0 < elements < 40_000 * 32 for elements in done.done.elements.values())
    done.close()
    assert content(execute.merge(config, out, threads=1)) == expected  # its report as well


def test_an_adapter_scaled_otherwise_is_another_merge(tmp_path: Path, llama_family: Family) -> None:
    base, target = llama_family(tmp_path / "in", (BF16,) * 2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    factors = {weights.format("A"): torch.ones(2, 32), weights.format("B"): torch.ones(48, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    config = {
        "merge_method": "varm",
        "base_model": str(base),
        "models": [{"model": f"{base}+{adapter}"}, {"model": str(target)}],
    }
    out = execute.merge(config, tmp_path / "out")
    execute.merge(config, out)  # finished
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 400}))
    with pytest.raises(RequestError, match="in use by something other"):
        execute.merge(config, out)


def test_another_merge_that_finished_in_the_meantime_is_kept(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    execute.merge(config, tmp_path / "other")
    plain = execute.Journal

    def late(path: Path) -> Journal:
        if not out.exists():
            (tmp_path / "other").rename(out)
        return plain(path)

    monkeypatch.setattr(execute, "Journal", late)
    with pytest.raises(RequestError, match="in use by something other than this merge"):
        execute.merge({**config, "dtype": "float32"}, out)
    assert not work_of(out).exists()
    out.rename(tmp_path / "other")
    execute.merge(config, out)  # the same merge: finished
    assert verify(config, out) == []
    assert not work_of(out).exists()


def test_what_came_into_out_during_the_merge_is_kept(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    out = tmp_path / "out"

    def someone_else(tensor: str, nbytes: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").touch()

    with pytest.raises(FusechatError, match="not empty.*what was done is kept"):
        execute.merge(config, out, progress=someone_else)
    assert [p.name for p in out.iterdir()] == ["precious"]


def test_a_finished_merge_is_tidied_up_after_but_not_a_running_one(
    tmp_path: Path, yml: Path
) -> None:
    out = tmp_path / "out"
    assert cli("run", str(yml), str(out)).exit_code == 0
    running = Journal(work_of(out) / "journal")
    assert cli("run", str(yml), str(out)).exit_code == 0
    assert work_of(out).exists()
    running.close()
    running.path.unlink()  # the first to go, where it was killed just then
    (work_of(out) / "model").mkdir()
    assert cli("run", str(yml), str(out)).exit_code == 0
    assert not work_of(out).exists()


@pytest.mark.parametrize("planted", ["", "journal", "model/model.safetensors"])
def test_links_in_the_place_of_the_work_are_not_followed(
    tmp_path: Path, yml: Path, config: dict[str, Any], planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if planted:
        interrupt(yml, out, monkeypatch)
        (work_of(out) / planted).rename(elsewhere)
        (work_of(out) / planted).symlink_to(elsewhere)
        before = elsewhere.read_bytes()
    else:
        (elsewhere / "model").mkdir(parents=True)
        (elsewhere / "model" / "precious").touch()
        work_of(out).symlink_to(elsewhere)
    result = cli("run", str(yml), str(out))
    assert result.exit_code == (1 if planted else 2)
    assert "Error: " in result.stderr
    if planted:
        assert elsewhere.read_bytes() == before
    else:
        assert "is in the way" in result.stderr
        assert (elsewhere / "model" / "precious").exists()
    assert not out.exists()


def test_another_users_work_folder_in_a_shared_place(
    tmp_path: Path, yml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    interrupt(yml, shared / "out", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        result = cli("run", str(yml), str(shared / "out"))
    assert result.exit_code == 2
    assert "another user's" in result.stderr
    assert cli("run", str(yml), str(shared / "out")).exit_code == 0
