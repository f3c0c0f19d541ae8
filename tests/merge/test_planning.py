"""What a plan says, and every problem that it finds before a weight is read."""

from __future__ import annotations

import json
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusechat_merge import passes, stream
from fusechat_merge.cli import main
from fusechat_merge.errors import ConfigError
from fusechat_merge.merge_plan import Plan
from fusechat_merge.planning import plan

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
    assert result.exit_code == 0
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
        (truncated, "t0: model.safetensors: 'model.norm.weight' ends at byte"),
        (quantised, "its weights are quantised (gptq); merge the original checkpoint, or write"),
        (quantised_to_8_bits, "its weights are quantised (F8_E4M3)"),
        (pickled, "its weights are pickled (pytorch_model.bin), which can run code; convert it"),
        (no_config, "t0: config.json can't be read"),
        (gone, "t0: no such folder"),
    ],
)
def test_problems_of_models(
    tmp_path: Path, paths: list[Path], damage: Callable[[list[Path]], None], message: str
) -> None:
    damage(paths)
    problems = plan(configuration(paths)).problems
    assert any(message in problem for problem in problems), problems
    with pytest.raises(ConfigError) as caught:
        stream.merge(configuration(paths), tmp_path / "out")
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


def test_unknown_method_names_the_nearest(paths: list[Path]) -> None:
    problems = plan(configuration(paths, "tiess")).problems
    assert any("unknown merge_method 'tiess' (did you mean 'ties'?)" in p for p in problems)


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
    for out, message in [(paths[1], "holds one of the models"), (file, "is a file")]:
        with pytest.raises(ConfigError, match=message):
            stream.merge(config, out)
    monkeypatch.setattr(Plan, "output_bytes", 1 << 60)
    with pytest.raises(ConfigError, match=r"has room for [\d.]+ GB, the merged model takes"):
        stream.merge(config, tmp_path / "out")


class _Hub(SimpleHTTPRequestHandler):
    """The little of the hub's interface that its own client needs here, with byte ranges."""

    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/api/models/"):
            self._api()
            return
        _, _, name, _, _, file = self.path.split("?")[0].split("/", 5)
        path = Path(self.directory) / name / file
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        body, code, headers = path.read_bytes(), 200, {"X-Repo-Commit": "c" * 40, "ETag": '"e"'}
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
        files = [{"rfilename": file.name, "size": file.stat().st_size} for file in folder.iterdir()]
        body = {"id": f"o/{name}", "sha": "c" * 40, "siblings": files, "private": False}
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
    from fusechat_merge.checkpoint import Folder, HubRepository, read_checkpoint

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["filler"] = torch.zeros(1 << 20)

    rewrite(paths[0], widen)
    remote = read_checkpoint(HubRepository("o/base"), "o/base")
    local = read_checkpoint(Folder(paths[0]), "o/base")
    assert remote.tensors == local.tensors
    assert remote.folder is None
    ranges = [r for path, r in hub if "safetensors" in path]
    assert ranges == ["bytes=0-65535"]


def test_a_model_that_the_hub_does_not_have(hub: list[tuple[str, str | None]]) -> None:
    problems = plan({"merge_method": "linear", "models": [{"model": "o/none"}]}).problems
    assert any("o/none: no folder of this name, and not to be had" in p for p in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: 2024-13-45", "month must be in 1..12"),
        ("merge_method: !!bool x", "can't be read as YAML"),
        ("merge_method: !!timestamp x", "can't be read as YAML"),
        ("merge_method: !!float x", "could not convert string to float"),
        ("a: " + "[" * 3000, "recursion"),
        ("a: b\n  c: d", "line 2, column 4"),
        ("a: !!python/object/apply:os.mkdir [made]", "could not determine a constructor"),
    ],
)
def test_text_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    yml = tmp_path / "merge.yml"
    yml.write_text(text)
    result = CliRunner().invoke(main, ["plan", str(yml)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "can't be read as YAML" in result.stderr


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
