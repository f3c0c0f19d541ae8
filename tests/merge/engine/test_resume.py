"""What is left after a crash, a full disk or a change of mind, and how it is resumed."""

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
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from fusechat_common.errors import FusechatError, RequestError
from fusechat_merge.engine import execute, saving
from fusechat_merge.engine.journal import Journal
from fusechat_merge.engine.verify import verify
from tests.support.checkpoints import llama_family, write_adapter
from tests.support.merging import change_json, cli, configuration, content, work_of, write_yaml

BF16 = torch.bfloat16
IN_USE = "in use by something other than this merge"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    paths = llama_family(folder, (BF16,) * 3, changes={"vocab_size": 3000})
    (paths[0] / "tokenizer.json").write_text("{}")
    return configuration(paths, parameters={"granularity": "layer"})


@pytest.fixture
def yml(tmp_path, config):
    return write_yaml(tmp_path / "merge.yml", config)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def expected(config, tmp_path):
    """The files of an uninterrupted merge in this process."""
    return content(execute.merge(config, tmp_path / "whole"))


@pytest.fixture
def other_source(config):
    """The second target's file; in the end as it was before."""
    file = Path(config["models"][1]["model"]) / "model.safetensors"
    before = file.stat()
    yield file
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(file: Path) -> None:
    """Changed a second later than it was."""
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


# -- killed, with the process that is killed forked from tests/support/crashing.py


@pytest.fixture(scope="module")
def crashing():
    command = [sys.executable, Path(__file__).parents[2] / "support" / "crashing.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)

    def run(config, out, kill_at=0, **more):
        order = {"config": config, "out": str(out), "kill_at": kill_at, **more}
        print(json.dumps(order), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(60)


OPTIONS = {"memory": 5_000_000, "shard_size": 150_000, "threads": 2}


@pytest.fixture(scope="module")
def whole(config, crashing, tmp_path_factory):
    """An uninterrupted merge: its files, how many calls it took."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ended = crashing(config, out, options=OPTIONS)
    assert ended["status"] == 0
    assert not work_of(out).exists()
    return content(out), ended["calls"]


def test_twenty_kills_each_resumed_to_the_same_bytes(tmp_path, config, crashing, whole):
    files, calls = whole
    # How many calls there are depends a little on when the saver gets to run.
    moments: list[int | str] = [*random.Random(0).sample(range(1, calls * 3 // 4), 16)]
    moments += ["before fsync", "after fsync", "before rename", "after rename"]
    for number, moment in enumerate(moments):
        out = tmp_path / str(number)
        assert crashing(config, out, moment, options=OPTIONS)["status"] == signal.SIGKILL
        if out.exists():  # killed after it was published
            assert content(out) == files
        resumed = crashing(config, out, options=OPTIONS | {"threads": 1, "memory": 7_000_000})
        assert (resumed["status"], resumed["error"]) == (0, None)
        assert content(out) == files
        assert not work_of(out).exists()


def test_killed_again_and_again(out, config, crashing, whole):
    files, calls = whole
    deaths = 0
    while crashing(config, out, calls * 2 // 3, options=OPTIONS)["status"] == signal.SIGKILL:
        deaths += 1
        assert deaths < 10
    assert deaths
    assert content(out) == files


def test_a_resumed_merge_does_not_write_again_what_is_safe(tmp_path, out, crashing):
    changes = {"num_hidden_layers": 14, "vocab_size": 64}
    config = configuration(llama_family(tmp_path / "in", (BF16,) * 2, changes=changes))
    written = crashing(config, tmp_path / "whole", options=OPTIONS)["written"]
    ended = crashing(config, out, kill_after=int(0.8 * written), options=OPTIONS)
    assert ended["status"] == signal.SIGKILL
    resumed = crashing(config, out, options=OPTIONS)
    assert content(out) == content(tmp_path / "whole")
    assert 0 < resumed["written"] < written / 2


def test_no_room(out, config, crashing, whole):
    code, message = crashing(config, out, options=OPTIONS, file_limit=120_000)["error"]
    assert code == 1
    assert "no room left" in message
    assert "the same command resumes" in message
    assert not out.exists()
    assert crashing(config, out, options=OPTIONS)["error"] is None
    assert content(out) == whole[0]


# -- broken off


@contextmanager
def no_side_files() -> Iterator[None]:
    """A merge breaks when the side files are to be written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "write_side_files", Mock(side_effect=OSError("gone")))
        yield


@pytest.fixture
def interrupted(yml, out):
    """The folder of the work of an unfinished merge."""
    with no_side_files():
        result = cli("run", yml, out)
    assert result.exit_code == 1
    assert "gone; completed work is kept, and the same command resumes" in result.stderr
    assert work_of(out).exists()
    return work_of(out)


def just_before_the_journal(patch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Something that comes between the plan of a merge and its work."""
    plain = execute.Journal
    patch.setattr(execute, "Journal", lambda path: (happens(), plain(path))[1])


def refused(yml: Path, out: Path, *messages: str) -> None:
    """Nothing is announced that can't be done."""
    result = cli("run", yml, out)
    assert result.exit_code == 2
    assert "merging" not in result.stderr
    for message in messages:
        assert message in result.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("configuration", 'configuration: dtype was null, is "float32"'),
        ("source", "sources: {source} was"),
        ("device", 'device was "cuda", is "cpu"'),
        ("software", 'software: numba was "{numba}", is null'),
    ],
)
def test_what_makes_a_merge_another(
    yml, out, config, interrupted, other_source, monkeypatch, changed, message
):
    plain, journal = execute.version, interrupted / "journal"

    def version(package):
        if package == "numba":
            raise PackageNotFoundError(package)
        return plain(package)

    if changed == "configuration":
        write_yaml(yml, {**config, "dtype": "float32"})
    elif changed == "source":
        touch(other_source)
    elif changed == "device":
        journal.write_text(journal.read_text().replace('"device":"cpu"', '"device":"cuda"'))
    else:
        monkeypatch.setattr(execute, "version", version)
    message = message.format(source=other_source, numba=plain("numba"))
    refused(yml, out, "--no-resume starts over", message)
    assert cli("run", yml, out, "--no-resume").exit_code == 0


def test_a_source_that_changes_during_the_merge(out, config, other_source):
    with pytest.raises(FusechatError, match="was changed while it was being merged; the same"):
        execute.merge(config, out, progress=lambda tensor, nbytes: touch(other_source))
    assert not out.exists()


def test_what_was_made_from_a_source_that_changed_is_not_kept(out, config, expected, other_source):
    whole, before = other_source.read_bytes(), other_source.stat()

    def rewrite(tensor, nbytes):
        other_source.write_bytes(whole[: len(whole) // 4].ljust(len(whole), b"\0"))

    with pytest.raises(FusechatError):
        execute.merge(config, out, progress=rewrite, threads=1)
    other_source.write_bytes(whole)
    os.utime(other_source, ns=(before.st_atime_ns, before.st_mtime_ns))  # from a backup
    assert content(execute.merge(config, out)) == expected


def test_a_source_that_vanished(out, config, other_source):
    elsewhere = other_source.with_name("elsewhere")
    try:
        with pytest.raises(FusechatError, match=r"No such file.*the same command resumes"):
            execute.merge(config, out, started=lambda *_: other_source.rename(elsewhere))
    finally:
        elsewhere.rename(other_source)
    execute.merge(config, out)
    assert verify(config, out) == []


def test_ctrl_c(out, config):
    with pytest.raises(KeyboardInterrupt):
        execute.merge(config, out, progress=Mock(side_effect=KeyboardInterrupt))
    assert not out.exists()
    execute.merge(config, out)


def stopped_at(count: int, *arguments: Any, **options: Any) -> None:
    """A merge whose disk fails at the `count`-th note."""
    plain, seen = saving.Saver.note, 0

    def note(self, kind, name, value, nbytes=0):
        nonlocal seen
        plain(self, kind, name, value, nbytes)
        seen += 1
        if seen == count:
            raise OSError(5, "stop")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(saving, "SAVE_EVERY", 20_000)
        patched.setattr(saving.Saver, "note", note)
        with pytest.raises(FusechatError):
            execute.merge(*arguments, **options)


@pytest.mark.parametrize("method", ["linear", "varm"])
@pytest.mark.parametrize(
    ("shard_size", "full"), [(20_000, False), (20_000, True), (1 << 30, False)]
)
def test_a_lost_shard_is_made_again(tmp_path, out, config, monkeypatch, method, shard_size, full):
    """Also where the first start after the loss found the disk full."""
    models = [model | {"parameters": {"weight": 0.5}} for model in config["models"]]
    config = config | {"merge_method": method, "models": models}
    if method == "linear":
        config = {key: config[key] for key in ("merge_method", "models")}
    options: dict[str, Any] = {"shard_size": shard_size, "threads": 1}
    expected = content(execute.merge(config, tmp_path / "whole", **options))
    stopped_at(20, config, out, **options)
    min((work_of(out) / "model").iterdir()).unlink()
    if full:
        with monkeypatch.context() as patched:
            no_room = OSError(errno.ENOSPC, "No space left on device")
            patched.setattr(saving, "reserve", Mock(side_effect=no_room))
            with pytest.raises(FusechatError, match="no room left"):
                execute.merge(config, out, **options)
    assert content(execute.merge(config, out, **options)) == expected


def test_a_selection_with_ties_goes_on_with_other_memory(tmp_path, out):
    def coarse(label, tensors):
        for name, tensor in tensors.items():
            tensors[name] = (tensor.float() * 4).round().div(4).to(BF16)

    paths = llama_family(tmp_path / "in", (BF16,) * 3, changes={"vocab_size": 40_000}, edit=coarse)
    config = configuration(paths, "fusechat_sce", parameters={"select_topk": 0.3})
    expected = content(execute.merge(config, tmp_path / "whole", threads=1))
    stopped_at(8, config, out, threads=1, memory=9_000_000)
    done = Journal(work_of(out) / "journal")
    assert any(0 < elements < 40_000 * 32 for elements in done.done.elements.values())
    done.close()
    assert content(execute.merge(config, out, threads=1)) == expected  # its report as well


def test_an_adapter_scaled_otherwise_is_another_merge(tmp_path, out):
    base, target = llama_family(tmp_path / "in", (BF16,) * 2)
    adapter = write_adapter(tmp_path / "adapter")
    config = configuration([base, f"{base}+{adapter}", target])
    execute.merge(config, out)
    execute.merge(config, out)  # finished
    change_json(adapter / "adapter_config.json", lora_alpha=400)
    with pytest.raises(RequestError, match=IN_USE):
        execute.merge(config, out)


# -- the disk, and the notes on it


def test_saving_falls_behind(out, config, expected, monkeypatch):
    """Every note is worth more than two saves: each waits for the disk."""
    monkeypatch.setattr(saving, "SAVE_EVERY", 1)
    assert content(execute.merge(config, out)) == expected


def test_a_disk_that_fails_when_it_is_to_be_sure(out, config, expected, monkeypatch):
    failed = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    with monkeypatch.context() as patch:
        patch.setattr(saving, "SAVE_EVERY", 1)
        patch.setattr(saving.ShardFiles, "sync", failed)
        with pytest.raises(FusechatError, match="Input/output error; completed work is kept"):
            execute.merge(config, out)
    assert failed.call_count == 1  # what it lost, a second one would not tell
    assert not out.exists()
    journal = Journal(work_of(out) / "journal")
    assert not journal.done.elements
    journal.close()
    assert content(execute.merge(config, out)) == expected


def test_a_journal_cut_short_is_believed_up_to_there(tmp_path):
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


def test_a_journal_that_its_last_holder_removed_just_now(tmp_path, monkeypatch):
    path, plain, removed = tmp_path / "work" / "journal", fcntl.flock, []

    def flock(descriptor, how):
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


# -- finished, and what else may lie where a merge is to be written


def test_events_for_programs(yml, out):
    result = cli("run", yml, out, "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["plan", "done"]
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["bytes"] == progress[-1]["of"]
    assert result.stderr.count("\r") == 0


def test_a_finished_merge_is_tidied_up_after_but_not_a_running_one(yml, out):
    def finished(tidy):
        again = cli("run", yml, out)
        assert again.exit_code == 0
        assert "nothing to do" in again.stderr
        assert (out / "model.safetensors").stat().st_mtime_ns == stamp
        assert work_of(out).exists() is not tidy

    assert cli("run", yml, out).exit_code == 0
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    running = Journal(work_of(out) / "journal")
    finished(tidy=False)
    running.close()
    running.path.unlink()  # the first to go, where it was killed just then
    (work_of(out) / "model").mkdir()
    finished(tidy=True)


def test_a_second_run_is_refused(yml, out):
    holder = Journal(work_of(out) / "journal")
    refused(yml, out, "another fusechat-merge is writing here now")
    holder.close()
    assert cli("run", yml, out).exit_code == 0


def test_out_in_use_is_kept_until_the_new_model_is_complete(yml, out):
    out.mkdir()
    (out / "precious").write_text("x")
    refused(yml, out, IN_USE)
    assert not work_of(out).exists()
    with no_side_files():
        assert cli("run", yml, out, "--overwrite").exit_code == 1
    assert [p.name for p in out.iterdir()] == ["precious"]
    assert cli("run", yml, out, "--overwrite").exit_code == 0
    assert not (out / "precious").exists()
    assert (out / "model.safetensors").exists()
    assert not work_of(out).exists()


def test_an_unfinished_merge_is_kept_while_out_is_in_use(yml, out, interrupted, monkeypatch):
    before = content(interrupted)
    with monkeypatch.context() as patch:
        just_before_the_journal(patch, lambda: (out / "precious").mkdir(parents=True))
        refused(yml, out, IN_USE)
    assert content(interrupted) == before
    assert cli("run", yml, out, "--overwrite").exit_code == 0


def test_another_merge_that_finished_in_the_meantime_is_kept(tmp_path, out, config, monkeypatch):
    other = execute.merge(config, tmp_path / "other")
    just_before_the_journal(monkeypatch, lambda: other.exists() and other.rename(out))
    with pytest.raises(RequestError, match=IN_USE):
        execute.merge({**config, "dtype": "float32"}, out)
    assert not work_of(out).exists()
    out.rename(other)
    execute.merge(config, out)  # the same merge: finished
    assert verify(config, out) == []
    assert not work_of(out).exists()


def test_what_came_into_out_during_the_merge_is_kept(out, config):
    def someone_else(tensor, nbytes):
        out.mkdir(exist_ok=True)
        (out / "precious").touch()

    with pytest.raises(FusechatError, match="not empty.*completed work is kept"):
        execute.merge(config, out, progress=someone_else)
    assert [p.name for p in out.iterdir()] == ["precious"]


@pytest.mark.parametrize("planted", ["journal", "model/model.safetensors"])
def test_links_in_the_place_of_the_work_are_not_followed(tmp_path, yml, out, interrupted, planted):
    elsewhere = (interrupted / planted).rename(tmp_path / "elsewhere")
    (interrupted / planted).symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    result = cli("run", yml, out)
    assert result.exit_code == 1
    assert "Error: " in result.stderr
    assert elsewhere.read_bytes() == before
    assert not out.exists()


def test_a_link_in_the_place_of_the_whole_work_is_not_followed(tmp_path, yml, out):
    precious = tmp_path / "elsewhere" / "model" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    work_of(out).symlink_to(tmp_path / "elsewhere")
    refused(yml, out, "Error: ", "remove it")
    assert precious.exists()
    assert not out.exists()


def test_another_users_work_folder_in_a_shared_place(tmp_path, yml, out, interrupted, monkeypatch):
    tmp_path.chmod(0o1777)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        refused(yml, out, "another user; remove it")
    assert cli("run", yml, out).exit_code == 0
