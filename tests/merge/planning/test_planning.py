"""What a plan says, and every problem that it finds before a weight is read."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file

from fusechat_common.errors import RequestError
from fusechat_merge.engine import execute, passes
from fusechat_merge.engine.verify import verify
from fusechat_merge.inputs.checkpoint import (
    MAX_HEADER,
    CheckpointError,
    Folder,
    HubRepository,
    download_model,
    read_checkpoint,
)
from fusechat_merge.planning.plan import Plan
from fusechat_merge.planning.planner import plan
from tests.support.merging import change_json, cli, configuration, rewrite, write_yaml

BF16 = torch.bfloat16
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def test_figures(tmp_path, paths):
    yml = write_yaml(tmp_path / "merge.yml", configuration(paths, out_dtype="float32"))
    result = cli("plan", yml, "--json", "--shard-size", "100KB")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    tensors = load_file(paths[0] / WEIGHTS)
    count = sum(t.numel() for t in tensors.values())
    assert found["parameters"] == count
    assert found["tensors"] == len(tensors)
    assert found["input_bytes"] == 3 * 2 * count
    assert 4 * count < found["output_bytes"] <= 4 * count + 4096 * len(found["shards"])
    assert sum(shard["bytes"] for shard in found["shards"]) == found["output_bytes"]
    assert found["problems"] == []
    assert found["left_out"] == found["merged_by_name"] == found["copied_from_base"] == []
    assert cli("run", yml, tmp_path / "out", "--shard-size", "100KB").exit_code == 0
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert sizes == {shard["name"]: shard["bytes"] for shard in found["shards"]}


def test_order_of_the_base_files_and_the_memory_of_all_buffers(paths):
    planned = plan(configuration(paths))
    outputs = planned.outputs
    assert [o.name for o in outputs] == list(planned.models[str(paths[0])].tensors)
    for memory in (5 << 20, 20 << 20, 256 << 20):
        for threads in (1, 2, 16):
            assert passes.divide(outputs, memory, threads).total <= memory
    with pytest.raises(ValueError, match="--memory: at least 4MiB is needed"):
        passes.divide(outputs, 1 << 20, 2)


UP, EMBEDDING, NORM = (
    f"model.{name}.weight" for name in ("layers.0.mlp.up_proj", "embed_tokens", "norm")
)


def shortened(name):
    return lambda t0: rewrite(t0, lambda t: t.update({name: t[name][:5].clone()}))


def converted(dtype):
    return lambda t0: rewrite(t0, lambda t: t.update({NORM: t[NORM].to(dtype)}))


def config(**changes):
    return lambda t0: change_json(t0 / "config.json", **changes)


def written(file, content):
    return lambda t0: (t0 / file).write_text(content)


def too_long(file):
    def damage(t0):
        (t0 / file).touch()
        os.truncate(t0 / file, MAX_HEADER + 1)

    return damage


def of_the_base(damage):
    return lambda t0: damage(t0.with_name("base"))


def replaced(path, make):
    """Something else, or nothing, in the place of a file or folder."""
    path.rename(path.parent.with_name(f"{path.parent.name}-{path.name}"))
    make(path)


def truncated(t0):
    os.truncate(t0 / WEIGHTS, (t0 / WEIGHTS).stat().st_size - 1)


quantised = config(quantization_config={"quant_method": "gptq"})
MISTRAL = config(architectures=["MistralForCausalLM"], model_type="mistral")
GIT_LFS = "version https://git-lfs.github.com/spec/v1\noid"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t0: rewrite(t0, lambda t: t.pop(UP)), f"t0: lacks {UP}, which its architecture"),
        (shortened(UP), "up_proj.weight: shapes don't fit: [48, 32] in "),
        (shortened(EMBEDDING), "bring the vocabularies together: tokenizer: {source: base}"),
        (converted(torch.int64), "model.norm.weight: numbers and whole numbers mixed"),
        (converted(torch.float8_e4m3fn), "its weights are quantised (F8_E4M3, "),
        (MISTRAL, "the models have different architectures; --allow-crimes tries"),
        (MISTRAL, "MistralForCausalLM in "),
        (config(architectures=["FooForCausalLM"], model_type="foo"),
         "t0: config.json: The checkpoint you are trying to load has"),
        (config(num_hidden_layers=5), "the models have different numbers of layers (2 in "),
        (written(WEIGHTS, GIT_LFS), "t0: model.safetensors: is Git LFS's pointer to the file"),
        (truncated, "t0: model.safetensors: 'model.norm.weight' ends at byte"),
        (quantised, "its weights are quantised (gptq), which can't be read here; merge the"),
        (lambda t0: (t0 / WEIGHTS).rename(t0 / "pytorch_model.bin"),
         "its weights are pickled (pytorch_model.bin), which can run code; convert it"),
        (lambda t0: (t0 / "config.json").unlink(), "t0: config.json can't be read"),
        (lambda t0: replaced(t0, str), "t0: no such folder"),
        (lambda t0: replaced(t0, Path.touch), "t0: a model is a folder, this is a file"),
        (lambda t0: replaced(t0 / "config.json", os.mkfifo),
         "t0: config.json can't be read (config.json is not a regular"),
        (too_long("config.json"), "t0: config.json can't be read (100000001 bytes is too long)"),
        (too_long(INDEX), "index.json: 100000001 bytes is too long for an index"),
        (written(INDEX, '{"metadata": {}, "weight_map": [1]}'),
         "weight_map must map tensor names to file names"),
        (of_the_base(config(architectures={"a": 1})),
         "a model's config.json or the YAML is not as mergekit needs it ("),
        (of_the_base(written("config.json", "[" * 100_000)),
         "config.json can't be read (maximum recursion depth"),
        (of_the_base(written("tokenizer_config.json", "{")),
         "side files can't be read (Expecting property name"),
    ],
)  # fmt: skip
def test_problems_of_models(tmp_path, paths, damage, message):
    damage(paths[1])
    before = sorted(tmp_path.iterdir())
    settings = configuration(paths, chat_template="chatml")
    problems = plan(settings).problems
    assert any(message in problem for problem in problems), problems
    with pytest.raises(RequestError) as caught:
        execute.merge(settings, tmp_path / "out")
    assert caught.value.problems == tuple(problems)
    assert sorted(tmp_path.iterdir()) == before  # touched nothing


def test_every_problem_at_once(tmp_path, paths):
    truncated(paths[1])
    quantised(paths[2])
    settings = {"base_mode": 1, "parameters": {"granularty": "layer"}, "dtype": "bf16"}
    yml = write_yaml(tmp_path / "merge.yml", configuration(paths, **settings))
    result = cli("plan", yml, "--json")
    assert result.exit_code == 2
    problems = json.loads(result.stdout)["problems"]
    assert len(problems) == 5
    text = "\n".join(problems)
    for part in ("'base_mode'", "'bf16'", "granularty", "truncated", "gptq"):
        assert part in text
    assert result.stderr.count("Error:") == 1
    in_words = cli("plan", yml)
    assert (in_words.exit_code, in_words.stdout, in_words.stderr) == (2, "", result.stderr)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("merge_method: varm\n\tmodels: []", "merge.yml, line 2, column 1: a tab; indent with"),
        ("models: [{model: a}\nx: 1", "merge.yml, line 2, column 1: can't be read as YAML"),
        ("models: []\nmodels: []", "merge.yml: 'models' stands twice, in line 1 and in line 2"),
        ("models: [{model: a, model: b}]", "'model' stands twice, in line 1 and in line 1"),
        ("- merge_method: varm", "a mergekit configuration is a YAML mapping with merge_method"),
        ("? [a, b]\n: 1", "merge.yml, line 1, column 3: can't be read as YAML (while construct"),
        ("a: 1\n---\nb: 1", "merge.yml, line 2, column 1: a second document begins"),
        ("merge_method: varm".encode("utf-16"), "merge.yml: is no text in UTF-8; save it"),
        (Path.mkdir, "merge.yml: is a folder; name the YAML file"),
        (str, "merge.yml: no such file"),
        ("merge_method: 2024-13-45", "month must be in 1..12"),
        ("merge_method: !!bool x", "can't be read as YAML ("),
        ("merge_method: !!timestamp x", "can't be read as YAML ("),
        ("merge_method: !!float x", "could not convert string to float"),
        ("a: " + "[" * 3000, "recursion"),
        ("a: b\n  c: d", "line 2, column 4"),
        ("a: !!python/object/apply:os.mkdir [made]", "could not determine a constructor"),
    ],
)
def test_what_is_no_configuration(tmp_path, content, message):
    yml = tmp_path / "merge.yml"
    if callable(content):
        content(yml)
    else:
        yml.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError) as caught:
        plan(yml)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    result = cli("plan", yml, "--json")
    assert result.exit_code == 2
    assert message in result.stderr
    if not callable(content):
        (problem,) = json.loads(result.stdout)["problems"]
        assert message in problem


def test_merge_keys_of_yaml_are_no_repetition(tmp_path, paths):
    yml = tmp_path / "merge.yml"
    yml.write_text(
        f"merge_method: varm\nbase_model: {paths[0]}\nmodels:\n"
        f"- &a {{model: {paths[1]}, parameters: {{weight: 2}}}}\n- {{<<: *a, model: {paths[2]}}}\n"
    )
    assert plan(yml).problems == []


SLICE = "slices: [{{sources: [{{model: base, layer_range: [0, {}]}}]}}]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("models: [{model: t0, weight: 2}]", "unknown key 'weight' at models[0]; a parameter"),
        ("models: [{model: t0, parameter: {}}]", "at models[0] (did you mean 'parameters'?)"),
        ("parameters: {lambda: [{filtr: mlp, value: 1}, {value: 0}]}",
         "unknown key 'filtr' at parameters.lambda[0] (did you mean 'filter'?)"),
        ("parameters: {lambda: [{filter: [mlp], value: 1}]}",
         "parameters.lambda: takes a value, a list of numbers (a gradient), or filters"),
        ("parameters: {lambda: [{filter: self_atn, value: 1}, {filter: '*', value: 0}]}",
         "parameters.lambda: no tensor's name has the filter 'self_atn' in it"
         " (did you mean 'self_attn'?)"),
        ("parameters: {weight: 0}", "weight: every target's is 0 for "),
        ("models: [{model: t0, parameters: {weight: null}}]",
         "models[0].parameters.weight: has no value; write one or leave the key out"),
        ("models: [t0]", "models[0]: 't0' stands alone; write - model: t0"),
        ("models: {t0: {}}", "models: should be a list; write - model: NAME for each"),
        ("models: 3", "models: should be a list"),
        ("models: [{model: t0}, {model: ./t0}]", "models[1]: ./t0 is there already; name a"),
        ("models: [{model: t0}, {model: ./base}]", "models[1]: ./base is the base_model base; l"),
        ("models: [{model: base}, {model: base}]", "models: name a target beside the base_mode"),
        ("models: [{model: ~/t0}]", "~/t0: no such folder; ~ stands for nothing in a YAML, write"),
        ("models: [{model: ./t9}]", "./t9: no such folder; relative paths start at "),
        ("models: [{model: %s}]" % ("x" * 300), "no folder of this name, and not available from"),
        ("models: [{model: /%s}]" % ("x" * 300), "xxx: no such folder"),
        ("merge_method: vram", "(did you mean 'varm'?)"),
        ("merge_method: VaRM", "(did you mean 'varm'?)"),
        ("merge_method: tiess", "unknown merge_method 'tiess' (did you mean 'ties'?)"),
        ("{merge_method: slerp, parameters: {t: 0.5}}", "requires exactly 2 inputs"),
        ("{merge_method: model_stock, models: [{model: t0}]}", "at least"),
        ("merge_method: linear", "Missing required parameter weight for"),
        ("merge_method: linear", "(the same for 20 more)"),
        (f"{{merge_method: passthrough, models: null, {SLICE.format(1 << 63)}}}",
         f"layer_range [0, {1 << 63}]: base has not so many layers"),
        ("dtype: 16", "dtype: should be a valid string"),
    ],
)  # fmt: skip
def test_problems_of_configurations(paths, monkeypatch, changes, message):
    monkeypatch.chdir(paths[0].parent)
    settings = configuration(["base", "t0", "t1"]) | yaml.safe_load(changes)
    try:
        (problem,) = plan({k: v for k, v in settings.items() if v is not None}).problems
    except RequestError as error:
        (problem,) = error.problems
    assert message in problem


def test_the_base_may_stand_among_the_models(paths):
    base, target, _ = paths
    assert plan(configuration([base, base, target])).problems == []  # mergekit's examples do


def test_a_missing_tokenizer_is_named(paths):
    problems = plan(configuration(paths, tokenizer={"source": "base"})).problems
    assert [p.split(":")[0] for p in problems] == [str(path) for path in paths]
    assert "its tokenizer can't be loaded, which merging tokenizers needs" in problems[0]


def test_no_room_and_bad_places(tmp_path, paths, monkeypatch):
    config = configuration(paths)
    file = tmp_path / "file"
    file.write_text("")
    for out, message in [
        (paths[1], "holds one of the models"),
        (file, "is a file"),
        (file / "out", f"{file} is not a folder but a file; name another"),
        (file / "deep" / "out", f"{file} is not a folder but a file; name another"),
    ]:
        with pytest.raises(RequestError, match=message):
            execute.merge(config, out)
    monkeypatch.setattr(Plan, "output_bytes", 1 << 60)
    with pytest.raises(RequestError, match=r"has room for [\d.]+ GB, the merged model takes"):
        execute.merge(config, tmp_path / "out")


class _Hub(SimpleHTTPRequestHandler):
    """The little of the hub's interface that its own client needs here, with byte ranges."""

    requests: list

    def do_GET(self):
        self.requests.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/api/models/"):
            self._api()
            return
        if self.path.startswith("/api/"):
            self._send(404, b"", {})
            return
        _, _, name, _, _, file = self.path.split("?")[0].split("/", 5)
        path = Path(self.directory) / name / file
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        body, code, headers = path.read_bytes(), 200, {"X-Repo-Commit": "c" * 40}
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body, code = body[int(first) : int(last) + 1], 206
        self._send(code, body, headers)

    do_HEAD = do_GET  # noqa: N815

    def _api(self):
        name = self.path.split("?")[0].split("/")[4]
        folder = Path(self.directory) / name
        if not folder.is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = [{"rfilename": file.name, "size": file.stat().st_size} for file in folder.iterdir()]
        body = {"id": f"o/{name}", "sha": "c" * 40, "siblings": files, "private": False}
        if "/tree/" in self.path:
            body = [f | {"type": "file", "path": f["rfilename"], "oid": "0"} for f in files]
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, code, body, headers):
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """(path, range) of each request to a hub that gives the models below tmp_path/in."""
    _Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, directory=str(tmp_path / "in")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield _Hub.requests
    server.shutdown()
    server.server_close()


def test_a_model_on_the_hub_is_planned_from_its_headers(paths, hub):
    rewrite(paths[0], lambda t: t.update(filler=torch.zeros(1 << 20)))
    remote = read_checkpoint(HubRepository("o/base"), "o/base")
    local = read_checkpoint(Folder(paths[0]), "o/base")
    assert remote.tensors == local.tensors
    assert remote.folder is None
    assert [r for path, r in hub if "safetensors" in path] == ["bytes=0-65535"]


def test_models_of_the_hub_are_fetched_to_be_merged(tmp_path, paths, hub):
    yml = write_yaml(tmp_path / "merge.yml", configuration(["o/base", "o/t0"]))
    planned = plan(yml)
    assert planned.problems == []
    assert all(model.folder is None for model in planned.models.values())
    result = cli("run", yml, tmp_path / "out")
    assert result.exit_code == 0, result.output
    local = execute.merge(configuration(paths[:2]), tmp_path / "local")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (local / WEIGHTS).read_bytes()
    assert verify(yml, tmp_path / "out") == []
    stamp = (tmp_path / "out" / WEIGHTS).stat().st_mtime_ns
    execute.merge(yml, tmp_path / "out")  # finished
    assert (tmp_path / "out" / WEIGHTS).stat().st_mtime_ns == stamp
    hub.clear()
    assert plan(yml).problems == []  # from the cache
    assert [path for path, _ in hub if "safetensors" in path] == []


def test_a_hub_that_breaks_off(tmp_path, paths, hub):
    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(remote, "o")

    remote = HubRepository("o/base")
    file, index = paths[0] / WEIGHTS, paths[0] / INDEX
    whole = file.read_bytes()
    file.write_bytes((1 << 20).to_bytes(8, "little") + b"{")  # fewer bytes than it had announced
    remote._sizes[file.name] = 1 << 21
    refused("o: model.safetensors: could only read 1 of 1048576 header bytes")
    file.unlink()
    refused(r"o: model.safetensors: can't be read \(.*404")
    remote._sizes[file.name] = None
    refused("the hub gives no size for model.safetensors")
    file.write_bytes(whole)
    index.touch()
    remote = HubRepository("o/base")
    index.unlink()
    refused(r"o: model.safetensors.index.json: can't be read \(")
    paths[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="o/t0: no folder of this name, and can't be fetched"):
        download_model("o/t0")
    with pytest.raises(CheckpointError, match="o/t0@v2: no folder of this name, and can't be"):
        download_model("o/t0", "v2")


def test_a_folder_that_may_not_be_listed(paths, monkeypatch):
    def names(folder):
        raise PermissionError(13, "Permission denied", str(folder.folder))

    monkeypatch.setattr(Folder, "names", names)
    problems = plan(configuration(paths)).problems
    assert len(problems) == 3
    assert problems[0].startswith(f"{paths[0]}: can't be read ([Errno 13] Permission denied")


def assert_not_on_the_hub():
    problems = plan({"merge_method": "linear", "models": [{"model": "o/none"}]}).problems
    assert any("o/none: no folder of this name, and not available" in p for p in problems)


def test_a_model_that_the_hub_does_not_have(hub):
    assert_not_on_the_hub()


def test_without_the_hub_its_cache_is_used(paths, tmp_path, monkeypatch):
    for folder in paths:
        cached = tmp_path / f"models--o--{folder.name}"
        for part in ("refs", "snapshots", "blobs"):
            (cached / part).mkdir(parents=True)
        (cached / "refs" / "main").write_text("c" * 40)
        snapshot = folder.rename(cached / "snapshots" / ("c" * 40))
        for file in list(snapshot.iterdir()):
            blob = file.rename(cached / "blobs" / file.name)
            file.symlink_to(Path("..") / ".." / "blobs" / blob.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    planned = plan(configuration([snapshot, "o/base", "o/t0"]))  # a folder of the cache as well
    assert planned.problems == []
    assert all(model.folder is not None for model in planned.models.values())
    assert_not_on_the_hub()


def test_side_files_that_are_links_out_of_the_model(tmp_path, paths):
    (tmp_path / "secret").write_text("x")
    (paths[0] / "notes.txt").symlink_to(tmp_path / "secret")
    (paths[0] / "LICENSE").symlink_to("config.json")
    (problem,) = plan(configuration(paths)).problems
    assert "notes.txt: links to " in problem
    assert "put the file itself there" in problem


def test_the_plan_in_words(tmp_path, paths):
    layer = "model.layers.0.self_attn."
    for folder in paths:
        rewrite(folder, lambda t: t.update({layer + "q_proj.bias": torch.ones(32, dtype=BF16)}))
    rewrite(paths[0], lambda t: t.update(extra=torch.ones(3, dtype=torch.int64)))
    rewrite(paths[1], lambda t: t.update(odd=torch.ones(3)))
    yml = write_yaml(tmp_path / "merge.yml", configuration(paths))
    result = cli("plan", yml, "--shard-size", "150KB")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    numel = sum(t.numel() for t in load_file(paths[0] / WEIGHTS).values())
    assert lines[:4] == [
        "method       varm",
        f"parameters   {numel:,} in 23 tensors",
        "reads        0.001 GB",
        "writes       0.000 GB",
    ]
    assert lines[4].startswith("             model-00001-of-00002.safetensors  0.000 GB")
    assert lines[6].startswith("peak memory  about ")
    assert lines[7:] == [
        f"the architecture doesn't know, merged by name: {layer}q_proj.bias",
        "the architecture doesn't know, copied from the base: extra",
        f"left out: {paths[1]}: odd (the architecture doesn't know it and the base has no such"
        " tensor)",
    ]


def test_the_memory_of_mergekits_tasks_is_planned(tmp_path, paths):
    def peak(**settings):
        config = configuration(paths, "ties", parameters={"weight": 1}, **settings)
        result = cli("plan", write_yaml(tmp_path / "merge.yml", config), "--json")
        return json.loads(result.stdout)["peak_memory_bytes"]

    largest = 1100 * 32
    assert peak() > execute._START_UP + 3 * 2 * largest  # at least its three inputs
    assert peak(dtype="float32") >= peak() + 3 * 4 * largest  # and what they are converted to


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--memory", "lots", "'lots' is not a size; write 256MiB or 5GB"),
        ("--memory", "5 miles", "'5 miles' is not a size"),
        ("--shard-size", "0.5", "'0.5' is too small"),
        ("--memory", "1MiB", "--memory: at least 4MiB is needed"),
    ],
)
def test_sizes_that_are_refused(tmp_path, paths, option, value, message):
    yml = write_yaml(tmp_path / "merge.yml", configuration(paths))
    for command in (["plan", yml], ["run", yml, tmp_path / "out"]):
        result = cli(*command, option, value)
        assert result.exit_code == 2
        assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_configuration_of_mergekits_own(paths):
    settings = configuration(paths, dtype="float32")
    theirs = MergeConfiguration.model_validate(settings)
    before = theirs.model_dump()
    assert plan(theirs).outputs == plan(settings).outputs
    assert theirs.model_dump() == before
    assert plan(MergeConfiguration.model_validate(configuration(paths, "vram"))).problems


def test_tensors_that_the_index_does_not_list_are_left_out(paths):
    weight_map = dict.fromkeys(load_file(paths[1] / WEIGHTS), WEIGHTS)
    rewrite(paths[1], lambda t: t.update(stray=torch.ones(3)))
    (paths[1] / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    planned = plan(configuration(paths))
    assert planned.problems == []
    (left,) = planned.left_out
    assert (left.model, left.tensor) == (str(paths[1]), "stray")
    assert left.reason == "it lies in model.safetensors, but the index doesn't place it there"
