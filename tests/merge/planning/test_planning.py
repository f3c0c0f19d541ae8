"""What a plan says, and every problem that it finds before a weight is read."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusechat_common.errors import RequestError
from fusechat_merge.cli import main
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
from fusechat_merge.planning import planner
from fusechat_merge.planning.plan import Plan
from fusechat_merge.planning.planner import plan

BF16 = torch.bfloat16
Family = Callable[..., list[Path]]


def configuration(paths: list[Path], method: str = "varm", **settings: Any) -> dict[str, Any]:
    base, *targets = map(str, paths)
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": target} for target in targets],
        **settings,
    }


@pytest.fixture
def paths(tmp_path: Path, llama_family: Family) -> list[Path]:
    return llama_family(tmp_path / "in", (BF16,) * 3)


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_figures(tmp_path: Path, paths: list[Path]) -> None:
    yml = tmp_path / "merge.yml"
    yml.write_text(yaml.safe_dump(configuration(paths, out_dtype="float32")))
    result = CliRunner().invoke(main, ["plan", str(yml), "--json", "--shard-size", "100KB"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    tensors = load_file(paths[0] / "model.safetensors")
    count = sum(t.numel() for t in tensors.values())
    assert found["parameters"] == count
    assert found["tensors"] == len(tensors)
    assert found["input_bytes"] == 3 * 2 * count
    assert 4 * count < found["output_bytes"] <= 4 * count + 4096 * len(found["shards"])
    assert sum(shard["bytes"] for shard in found["shards"]) == found["output_bytes"]
    assert found["problems"] == []
    assert found["left_out"] == found["merged_by_name"] == found["copied_from_base"] == []
    assert CliRunner().invoke(
        main, ["run", str(yml), str(tmp_path / "out"), "--shard-size", "100KB"]
    ).exit_code == 0  # fmt: skip
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert sizes == {shard["name"]: shard["bytes"] for shard in found["shards"]}


def test_outputs_follow_the_order_of_the_base_files(paths: list[Path]) -> None:
    planned = plan(configuration(paths))
    assert [o.name for o in planned.outputs] == list(planned.models[str(paths[0])].tensors)


def test_the_memory_bound_holds_all_buffers(paths: list[Path]) -> None:
    outputs = plan(configuration(paths)).outputs
    for memory in (5 << 20, 20 << 20, 256 << 20):
        for threads in (1, 2, 16):
            assert passes.divide(outputs, memory, threads).total <= memory
    with pytest.raises(ValueError, match="--memory: at least 4MiB is needed"):
        passes.divide(outputs, 1 << 20, 2)


def missing_tensor(paths: list[Path]) -> None:
    rewrite(paths[1], lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))


def other_shape(paths: list[Path]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(paths[1], lambda t: t.update({name: t[name][:5].clone()}))


def other_vocabulary(paths: list[Path]) -> None:
    name = "model.embed_tokens.weight"
    rewrite(paths[1], lambda t: t.update({name: t[name][:5].clone()}))


def buffer_of_other_dtype(paths: list[Path]) -> None:
    name = "model.norm.weight"
    rewrite(paths[1], lambda t: t.update({name: t[name].long()}))


def other_architecture(paths: list[Path]) -> None:
    set_config(paths[1], architectures=["MistralForCausalLM"], model_type="mistral")


def truncated(paths: list[Path]) -> None:
    file = paths[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def quantised(paths: list[Path]) -> None:
    set_config(paths[1], quantization_config={"quant_method": "gptq"})


def quantised_to_8_bits(paths: list[Path]) -> None:
    name = "model.norm.weight"
    rewrite(paths[1], lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))


def pickled(paths: list[Path]) -> None:
    (paths[1] / "model.safetensors").rename(paths[1] / "pytorch_model.bin")


def no_config(paths: list[Path]) -> None:
    (paths[1] / "config.json").unlink()


def unknown_architecture(paths: list[Path]) -> None:
    set_config(paths[1], architectures=["FooForCausalLM"], model_type="foo")


def more_layers(paths: list[Path]) -> None:
    set_config(paths[1], num_hidden_layers=5)


def pointer_of_git_lfs(paths: list[Path]) -> None:
    (paths[1] / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid")


def without_what_an_index_lists(paths: list[Path]) -> None:
    index = {"metadata": {}, "weight_map": [1]}
    (paths[1] / "model.safetensors.index.json").write_text(json.dumps(index))


def index_too_long(paths: list[Path]) -> None:
    (paths[1] / "model.safetensors.index.json").touch()
    os.truncate(paths[1] / "model.safetensors.index.json", MAX_HEADER + 1)


def config_too_long(paths: list[Path]) -> None:
    os.truncate(paths[1] / "config.json", MAX_HEADER + 1)


def config_that_is_a_pipe(paths: list[Path]) -> None:
    (paths[1] / "config.json").unlink()
    os.mkfifo(paths[1] / "config.json")


def a_file(paths: list[Path]) -> None:
    gone(paths)
    paths[1].touch()


def gone(paths: list[Path]) -> None:
    paths[1].rename(paths[1].with_name("elsewhere"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_tensor, "t0: lacks model.layers.0.mlp.up_proj.weight, which its architecture"),
        (other_shape, "up_proj.weight: shapes don't fit: [48, 32] in "),
        (other_vocabulary, "bring the vocabularies together: tokenizer: {source: base}"),
        (buffer_of_other_dtype, "model.norm.weight: numbers and whole numbers mixed"),
        (other_architecture, "the models have different architectures; --allow-crimes tries"),
        (other_architecture, "MistralForCausalLM in "),
        (unknown_architecture, "t0: config.json: The checkpoint you are trying to load has"),
        (more_layers, "the models have different numbers of layers (2 in "),
        (pointer_of_git_lfs, "t0: model.safetensors: is Git LFS's pointer to the file"),
        (truncated, "t0: model.safetensors: 'model.norm.weight' ends at byte"),
        (quantised, "its weights are quantised (gptq); merge the original checkpoint, or write"),
        (quantised_to_8_bits, "its weights are quantised (F8_E4M3)"),
        (pickled, "its weights are pickled (pytorch_model.bin), which can run code; convert it"),
        (no_config, "t0: config.json can't be read"),
        (gone, "t0: no such folder"),
        (a_file, "t0: a model is a folder, this is a file"),
        (config_that_is_a_pipe, "t0: config.json can't be read (config.json is not a regular"),
        (config_too_long, "t0: config.json can't be read (100000001 bytes is too long)"),
        (index_too_long, "index.json: 100000001 bytes is too long for an index"),
        (without_what_an_index_lists, "weight_map must map tensor names to file names"),
    ],
)
def test_problems_of_models(
    tmp_path: Path, paths: list[Path], damage: Callable[[list[Path]], None], message: str
) -> None:
    damage(paths)
    problems = plan(configuration(paths)).problems
    assert any(message in problem for problem in problems), problems
    with pytest.raises(RequestError) as caught:
        execute.merge(configuration(paths), tmp_path / "out")
    assert caught.value.problems == tuple(problems)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]  # touched nothing


def test_many_tensors_with_one_problem_make_one_line(paths: list[Path]) -> None:
    (problem,) = plan(configuration(paths, "linear")).problems
    assert "Missing required parameter weight for" in problem
    assert problem.endswith("(the same for 20 more)")


def test_every_problem_at_once(tmp_path: Path, paths: list[Path]) -> None:
    truncated(paths)
    quantised([paths[1], paths[2]])
    yml = tmp_path / "merge.yml"
    yml.write_text(
        yaml.safe_dump(
            configuration(paths, base_mode=1, parameters={"granularty": "layer"}, dtype="bf16")
        )
    )
    result = CliRunner().invoke(main, ["plan", str(yml), "--json"])
    assert result.exit_code == 2
    problems = json.loads(result.stdout)["problems"]
    assert len(problems) == 5
    text = "\n".join(problems)
    for part in ("'base_mode'", "'bf16'", "granularty", "truncated", "gptq"):
        assert part in text
    assert result.stderr.count("Error:") == 1
    in_words = CliRunner().invoke(main, ["plan", str(yml)])
    assert (in_words.exit_code, in_words.stdout, in_words.stderr) == (2, "", result.stderr)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: varm\n\tmodels: []", "merge.yml, line 2, column 1: a tab; indent with"),
        ("models: [{model: a}\nx: 1", "merge.yml, line 2, column 1: can't be read as YAML"),
        ("models: []\nmodels: []", "merge.yml: 'models' stands twice, in line 1 and in line 2"),
        ("models: [{model: a, model: b}]", "'model' stands twice, in line 1 and in line 1"),
        ("- merge_method: varm", "a mergekit configuration is a YAML mapping with merge_method"),
        ("? [a, b]\n: 1", "merge.yml, line 1, column 3: can't be read as YAML (while construct"),
        ("a: 1\n---\nb: 1", "merge.yml, line 2, column 1: a second document begins"),
        ("merge_method: varm".encode("utf-16"), "merge.yml: is no text in UTF-8; save it"),
        (None, "merge.yml: is a folder; name the YAML file"),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    yml = tmp_path / "merge.yml"
    with pytest.raises(RequestError, match="merge.yml: no such file"):
        plan(yml)
    if text is None:
        yml.mkdir()
    else:
        yml.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError) as caught:
        plan(yml)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_merge_keys_of_yaml_are_no_repetition(tmp_path: Path, paths: list[Path]) -> None:
    yml = tmp_path / "merge.yml"
    yml.write_text(
        f"merge_method: varm\nbase_model: {paths[0]}\nmodels:\n"
        f"- &a {{model: {paths[1]}, parameters: {{weight: 2}}}}\n- {{<<: *a, model: {paths[2]}}}\n"
    )
    assert plan(yml).problems == []


@pytest.mark.parametrize(
    ("models", "parameters", "message"),
    [
        (
            [{"model": "a", "weight": 2}],
            {},
            "unknown key 'weight' at models[0]; a parameter stands",
        ),
        ([{"model": "a", "parameter": {}}], {}, "at models[0] (did you mean 'parameters'?)"),
        (
            [{"model": "a"}],
            {"lambda": [{"filtr": "mlp", "value": 1}, {"value": 0}]},
            "unknown key 'filtr' at parameters.lambda[0] (did you mean 'filter'?)",
        ),
        (
            [{"model": "a"}],
            {"lambda": [{"filter": ["mlp"], "value": 1}]},
            "parameters.lambda: takes a value, a list of numbers (a gradient), or filters",
        ),
        (
            [{"model": "a", "parameters": {"weight": None}}],
            {},
            "models[0].parameters.weight: has no value; write one or leave the key out",
        ),
        (["a"], {}, "models[0]: 'a' stands alone; write - model: a"),
        ({"a": {}}, {}, "models: should be a list; write - model: NAME for each"),
        (3, {}, "models: should be a list"),
    ],
)
def test_a_key_or_value_in_the_wrong_form(models: Any, parameters: Any, message: str) -> None:
    config = {"merge_method": "varm", "base_model": "b", "models": models, "parameters": parameters}
    try:
        problems = plan(config).problems
    except RequestError as error:
        problems = list(error.problems)
    (found,) = (p for p in problems if "no folder of this name" not in p)
    assert message in found


def test_a_target_is_named_once_and_is_not_the_base(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, target, _ = paths
    monkeypatch.chdir(base.parent)
    found = plan(configuration([base, target, Path("t0")])).problems
    assert found == ["models[1]: t0 is there already; name a target once"]
    found = plan(configuration([base, target, Path("base")])).problems
    assert found == [f"models[1]: base is the base_model {base}; leave it out"]
    found = plan(configuration([base, base])).problems
    assert found == [f"models: name a target beside the base_model {base}"]
    assert plan(configuration([base, base, target])).problems == []  # mergekit's examples do


def test_a_filter_that_no_tensor_meets(paths: list[Path]) -> None:
    filters = [{"filter": "self_atn", "value": 1.0}, {"filter": "*", "value": 0.0}]
    (problem,) = plan(configuration(paths, parameters={"lambda": filters})).problems
    assert problem == (
        "parameters.lambda: no tensor's name has the filter 'self_atn' in it"
        " (did you mean 'self_attn'?)"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("~/t0", "~/t0: no such folder; ~ stands for nothing in a YAML, write the path in full"),
        ("./t0", "./t0: no such folder; relative paths start at "),
        ("x" * 300, "no folder of this name, and not available from the hub"),
    ],
)
def test_where_models_are_looked_for(model: str, message: str) -> None:
    (problem,) = plan({"merge_method": "linear", "models": [{"model": model}]}).problems
    assert message in problem


def test_a_missing_tokenizer_is_named(paths: list[Path]) -> None:
    problems = plan(configuration(paths, tokenizer={"source": "base"})).problems
    assert [p.split(":")[0] for p in problems] == [str(path) for path in paths]
    assert "its tokenizer can't be loaded, which merging tokenizers needs" in problems[0]


def test_unknown_method_names_the_nearest(paths: list[Path]) -> None:
    (problem,) = plan(configuration(paths, "vram")).problems
    assert "(did you mean 'varm'?)" in problem
    problems = plan(configuration(paths, "tiess")).problems
    assert any("unknown merge_method 'tiess' (did you mean 'ties'?)" in p for p in problems)
    (problem,) = plan(configuration(paths, "VaRM")).problems
    assert "(did you mean 'varm'?)" in problem


@pytest.mark.parametrize("method", ["slerp", "model_stock"])
def test_what_mergekit_refuses_is_refused(paths: list[Path], method: str) -> None:
    number = 3 if method == "slerp" else 2
    assert plan(configuration(paths[:number], method, parameters={"t": 0.5})).problems


def test_zero_weights_are_refused(paths: list[Path]) -> None:
    problems = plan(configuration(paths, parameters={"weight": 0})).problems
    assert any("weight" in problem and " 0" in problem for problem in problems)


def test_no_room_and_bad_places(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(paths)
    file = tmp_path / "file"
    file.write_text("")
    for out, message in [
        (paths[1], "holds one of the models"),
        (file, "is a file"),
        (file / "out", f"{file} is a file, no folder; name another"),
        (file / "deep" / "out", f"{file} is a file, no folder; name another"),
    ]:
        with pytest.raises(RequestError, match=message):
            execute.merge(config, out)
    monkeypatch.setattr(Plan, "output_bytes", 1 << 60)
    with pytest.raises(RequestError, match=r"has room for [\d.]+ GB, the merged model takes"):
        execute.merge(config, tmp_path / "out")


class _Hub(SimpleHTTPRequestHandler):
    """The little of the hub's interface that its own client needs here, with byte ranges."""

    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
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

    def _api(self) -> None:
        name = self.path.split("?")[0].split("/")[4]
        folder = Path(self.directory) / name
        if not folder.is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        body: Any
        files = [{"rfilename": file.name, "size": file.stat().st_size} for file in folder.iterdir()]
        body = {"id": f"o/{name}", "sha": "c" * 40, "siblings": files, "private": False}
        if "/tree/" in self.path:
            body = [f | {"type": "file", "path": f["rfilename"], "oid": "0"} for f in files]
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str | None]]]:
    import huggingface_hub.constants as constants

    _Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, directory=str(tmp_path / "in")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield _Hub.requests
    server.shutdown()
    server.server_close()


def test_a_model_on_the_hub_is_planned_from_its_headers(
    paths: list[Path], hub: list[tuple[str, str | None]]
) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["filler"] = torch.zeros(1 << 20)

    rewrite(paths[0], widen)
    remote = read_checkpoint(HubRepository("o/base"), "o/base")
    local = read_checkpoint(Folder(paths[0]), "o/base")
    assert remote.tensors == local.tensors
    assert remote.folder is None
    ranges = [r for path, r in hub if "safetensors" in path]
    assert ranges == ["bytes=0-65535"]


def test_models_of_the_hub_are_fetched_to_be_merged(
    tmp_path: Path, paths: list[Path], hub: list[tuple[str, str | None]]
) -> None:
    yml, local = tmp_path / "merge.yml", tmp_path / "local.yml"
    models = {"merge_method": "varm", "base_model": "o/base", "models": [{"model": "o/t0"}]}
    yml.write_text(yaml.safe_dump(models))
    planned = plan(yml)
    assert planned.problems == []
    assert all(model.folder is None for model in planned.models.values())
    result = CliRunner().invoke(main, ["run", str(yml), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    local.write_text(yaml.safe_dump(configuration(paths[:2])))
    CliRunner().invoke(main, ["run", str(local), str(tmp_path / "local")])
    merged = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert merged == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert verify(yml, tmp_path / "out") == []
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    execute.merge(yml, tmp_path / "out")  # finished
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    hub.clear()
    assert plan(yml).problems == []  # from the cache
    assert [path for path, _ in hub if "safetensors" in path] == []


def test_a_hub_that_breaks_off(
    tmp_path: Path, paths: list[Path], hub: list[tuple[str, str | None]]
) -> None:
    remote = HubRepository("o/base")
    file = paths[0] / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes((1 << 20).to_bytes(8, "little") + b"{")  # fewer bytes than it had announced
    remote._sizes[file.name] = 1 << 21
    message = "o: model.safetensors: could only read 1 of 1048576 header bytes"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(remote, "o")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"o: model.safetensors: can't be read \(.*404"):
        read_checkpoint(remote, "o")
    remote._sizes[file.name] = None
    with pytest.raises(CheckpointError, match="the hub gives no size for model.safetensors"):
        read_checkpoint(remote, "o")
    file.write_bytes(whole)
    (paths[0] / "model.safetensors.index.json").touch()
    remote = HubRepository("o/base")
    (paths[0] / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"o: model.safetensors.index.json: can't be read \("):
        read_checkpoint(remote, "o")
    paths[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="o/t0: no folder of this name, and can't be fetched"):
        download_model("o/t0")
    with pytest.raises(CheckpointError, match="o/t0@v2: no folder of this name, and can't be"):
        download_model("o/t0", "v2")


def test_a_folder_that_may_not_be_listed(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(folder: Folder) -> set[str]:
        raise PermissionError(13, "Permission denied", str(folder.folder))

    monkeypatch.setattr(Folder, "names", names)
    problems = plan(configuration(paths)).problems
    assert len(problems) == 3
    assert problems[0].startswith(f"{paths[0]}: can't be read ([Errno 13] Permission denied")


def test_a_model_that_the_hub_does_not_have(hub: list[tuple[str, str | None]]) -> None:
    problems = plan({"merge_method": "linear", "models": [{"model": "o/none"}]}).problems
    assert any("o/none: no folder of this name, and not available" in p for p in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: 2024-13-45", "month must be in 1..12"),
        ("merge_method: !!bool x", "can't be read as YAML ("),
        ("merge_method: !!timestamp x", "can't be read as YAML ("),
        ("merge_method: !!float x", "could not convert string to float"),
        ("a: " + "[" * 3000, "recursion"),
        ("a: b\n  c: d", "line 2, column 4"),
        ("a: !!python/object/apply:os.mkdir [made]", "could not determine a constructor"),
    ],
)
def test_text_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    yml = tmp_path / "merge.yml"
    yml.write_text(text)
    result = CliRunner().invoke(main, ["plan", str(yml), "--json"])
    assert result.exit_code == 2
    assert message in result.stderr
    (problem,) = json.loads(result.stdout)["problems"]
    assert message in problem


def test_a_name_of_two_lines_is_told_in_one(paths: list[Path], tmp_path: Path) -> None:
    config = configuration(paths)
    config["models"][1]["model"] = "x\ny"
    yml = tmp_path / "merge.yml"
    yml.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(main, ["plan", str(yml)])
    assert result.stderr.startswith("Error: x y: no folder of this name")
    assert result.stderr.count("\n") == 1


def test_a_name_that_can_be_no_path(paths: list[Path]) -> None:
    config = configuration(paths)
    config["models"][1]["model"] = "/" + "x" * 300
    (problem,) = plan(config).problems
    assert problem.endswith("xxx: no such folder")


def test_a_config_that_mergekit_stumbles_over(paths: list[Path]) -> None:
    set_config(paths[0], architectures={"a": 1})
    (problem,) = plan(configuration(paths)).problems
    assert problem.startswith("a model's config.json or the YAML is not as mergekit needs it (")


def test_a_config_nested_too_deeply(paths: list[Path]) -> None:
    (paths[0] / "config.json").write_text("[" * 100_000)
    (problem,) = plan(configuration(paths)).problems
    assert "config.json can't be read (maximum recursion depth" in problem


def test_without_the_hub_its_cache_is_used(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    for name, folder in zip(("base", "one"), paths, strict=False):
        cached = tmp_path / "cache" / f"models--o--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("c" * 40)
        (cached / "snapshots" / ("c" * 40)).mkdir(parents=True)
        for file in folder.iterdir():
            (cached / "snapshots" / ("c" * 40) / file.name).symlink_to(file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    planned = plan({"merge_method": "varm", "base_model": "o/base", "models": [{"model": "o/one"}]})
    assert planned.problems == []
    assert all(model.folder is not None for model in planned.models.values())
    planned = plan({"merge_method": "linear", "models": [{"model": "o/none"}]})
    assert any("o/none: no folder of this name, and not available" in p for p in planned.problems)


def test_side_files_that_are_links_out_of_the_model(tmp_path: Path, paths: list[Path]) -> None:
    (tmp_path / "secret").write_text("x")
    (paths[0] / "notes.txt").symlink_to(tmp_path / "secret")
    (paths[0] / "LICENSE").symlink_to("config.json")
    (problem,) = plan(configuration(paths)).problems
    assert "notes.txt: links to " in problem
    assert "put the file itself there" in problem


def test_side_files_of_a_hub_cache_are_links(tmp_path: Path, paths: list[Path]) -> None:
    repository = tmp_path / "models--a--b"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").mkdir()
    snapshot = paths[0].rename(repository / "snapshots" / "0123")
    for file in list(snapshot.iterdir()):
        blob = file.rename(repository / "blobs" / file.name)
        file.symlink_to(Path("..") / ".." / "blobs" / blob.name)
    assert plan(configuration([snapshot, *paths[1:]])).problems == []


def test_tokenizer_settings_that_are_no_json(paths: list[Path]) -> None:
    (paths[0] / "tokenizer_config.json").write_text("{")
    (problem,) = plan(configuration(paths, chat_template="chatml")).problems
    assert "side files can't be read (Expecting property name" in problem


def test_a_slice_of_more_layers_than_can_be(paths: list[Path]) -> None:
    source = {"model": str(paths[0]), "layer_range": [0, 1 << 63]}
    config = {"merge_method": "passthrough", "slices": [{"sources": [source]}]}
    (problem,) = plan(config).problems
    assert problem == f"layer_range [0, {1 << 63}]: {paths[0]} has not so many layers"


def test_the_plan_in_words(tmp_path: Path, paths: list[Path]) -> None:
    layer = "model.layers.0.self_attn."
    for folder in paths:
        rewrite(folder, lambda t: t.update({layer + "q_proj.bias": torch.ones(32, dtype=BF16)}))
    rewrite(paths[0], lambda t: t.update({"extra": torch.ones(3, dtype=torch.int64)}))
    rewrite(paths[1], lambda t: t.update({"odd": torch.ones(3)}))
    yml = tmp_path / "merge.yml"
    yml.write_text(yaml.safe_dump(configuration(paths)))
    result = CliRunner().invoke(main, ["plan", str(yml), "--shard-size", "150KB"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    numel = sum(t.numel() for t in load_file(paths[0] / "model.safetensors").values())
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


def test_the_memory_of_mergekits_tasks_is_planned(tmp_path: Path, paths: list[Path]) -> None:
    yml = tmp_path / "merge.yml"
    largest = 1100 * 32

    def peak(**settings: Any) -> int:
        yml.write_text(
            yaml.safe_dump(configuration(paths, "ties", parameters={"weight": 1}, **settings))
        )
        return json.loads(CliRunner().invoke(main, ["plan", str(yml), "--json"]).stdout)[
            "peak_memory_bytes"
        ]

    assert peak() > execute._START_UP + 3 * 2 * largest  # at least its three inputs
    assert peak(dtype="float32") >= peak() + 3 * 4 * largest  # and what they are converted to


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--memory", "lots", "'lots' is no size; write 256MiB or 5GB"),
        ("--memory", "5 miles", "'5 miles' is no size"),
        ("--shard-size", "0.5", "'0.5' is too small"),
        ("--memory", "1MiB", "--memory: at least 4MiB is needed"),
    ],
)
def test_sizes_that_are_refused(
    tmp_path: Path, paths: list[Path], option: str, value: str, message: str
) -> None:
    yml = tmp_path / "merge.yml"
    yml.write_text(yaml.safe_dump(configuration(paths)))
    for command in (["plan", str(yml)], ["run", str(yml), str(tmp_path / "out")]):
        result = CliRunner().invoke(main, [*command, option, value])
        assert result.exit_code == 2
        assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_configuration_of_mergekits_own(paths: list[Path]) -> None:
    settings = configuration(paths, dtype="float32")
    theirs = MergeConfiguration.model_validate(settings)
    before = theirs.model_dump()
    planned = plan(theirs)
    assert planned.outputs == plan(settings).outputs
    assert theirs.model_dump() == before
    assert plan(MergeConfiguration.model_validate(configuration(paths, "vram"))).problems


def test_tensors_that_the_index_does_not_list_are_left_out(paths: list[Path]) -> None:
    weight_map = dict.fromkeys(load_file(paths[1] / "model.safetensors"), "model.safetensors")
    rewrite(paths[1], lambda t: t.update({"stray": torch.ones(3)}))
    index = paths[1] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    planned = plan(configuration(paths))
    assert planned.problems == []
    (left,) = planned.left_out
    assert (left.model, left.tensor) == (str(paths[1]), "stray")
    assert left.reason == "it lies in model.safetensors, but the index doesn't place it there"


def test_an_error_that_nobody_expected(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    yml = tmp_path / "merge.yml"
    yml.write_text(yaml.safe_dump(configuration(paths)))
    monkeypatch.setattr(planner, "read_model", lambda *_: 1 / 0)
    result = CliRunner().invoke(main, ["plan", str(yml)])
    assert result.exit_code == 1
    assert result.stderr == "Error: ZeroDivisionError: division by zero (--debug shows where)\n"
    for command in (["--debug", "plan", str(yml)], ["plan", str(yml), "--debug"]):
        told = CliRunner().invoke(main, command).stderr
        assert told.startswith("Traceback ")
        assert told.endswith(result.stderr)


def test_a_value_of_another_type(paths: list[Path]) -> None:
    with pytest.raises(RequestError, match="dtype: should be a valid string"):
        plan(configuration(paths, dtype=16))
