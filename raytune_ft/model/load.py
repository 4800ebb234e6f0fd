"""Load a base model and attach the method to it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from peft.tuners._buffer_dict import BufferDict
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from raytune_ft.config.methods import METHODS, LoraMethod, MethodConfig
from raytune_ft.config.paths import BUILTIN, is_hub_model
from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError, first_line
from raytune_ft.files import read_json, sha256_of
from raytune_ft.layout import MODEL_INDEX
from raytune_ft.model import experts, hub
from raytune_ft.model.heads import PROBLEM_TYPES, Head, draw_head, label_weights, train_head
from raytune_ft.model.lengths import forget_longest
from raytune_ft.model.methods import attach, leave_casts_to_autocast
from raytune_ft.model.quantise import keep_as_rounded, quantisation_of
from raytune_ft.tensors.read import open_model
from raytune_ft.tensors.write import DTYPES


def set_up(base: nn.Module, precision: str) -> None:
    """Set a model to eval mode and to a precision; its weights may be on the meta device."""
    base.eval()
    if precision == "float64":  # fused products of experts have no float64 kernel
        base.set_experts_implementation("eager")  # type: ignore[operator]
    if precision == "bfloat16":
        experts.multiply_in_autocast()
        stay_in_bfloat16(base)


def stay_in_bfloat16(model: nn.Module) -> None:
    """Cast what autocast leaves in float32 because weights are: the output of embeddings, and of
    RMS norms of bfloat16, so that the residual stream has one dtype under every strategy.
    """

    def narrow(module: nn.Module, arguments: Any, output: Any) -> Any:
        return output.to(torch.bfloat16) if isinstance(output, torch.Tensor) else output

    def narrow_again(module: nn.Module, arguments: Any, output: Any) -> Any:
        given = arguments[0].dtype if arguments else None
        return narrow(module, arguments, output) if given == torch.bfloat16 else output

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(narrow)
        elif type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(narrow_again)


if not torch.cuda.is_available():  # else DeepSpeed prints a line when transformers imports it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
disable_progress_bar()  # one bar per worker and load

_HASHED = (".safetensors", ".json", ".model", ".jinja")
_READ = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    MODEL_INDEX,
)
_POINTER = b"version https://git-lfs"
_AGAIN = "download it again"
_COMMIT = re.compile(r"[0-9a-f]{40}")
Precision = Literal["float32", "bfloat16", "float64"]


def resolve_model_path(path: str) -> str:
    """The directory or hub id behind `model.path`.

    Raises:
        ModelError: an unknown `builtin:` name, or a local path without a config.json.
    """
    if path.startswith(BUILTIN):
        directory = Path(str(resources.files("raytune_ft.model"))) / path.removeprefix(BUILTIN)
        if not (directory / "config.json").is_file():
            raise ModelError(f"model.path={path}", "is not a built-in model", "write builtin:tiny")
        return str(directory)
    directory = Path(path).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelError(
                f"model.path={path}",
                "is a directory without a config.json",
                "write a directory that save_pretrained made",
            )
        return str(directory)
    if not is_hub_model(path):
        raise ModelError(
            f"model.path={path}",
            "does not exist",
            "write an existing model directory, a hub id such as org/name, or builtin:tiny",
        )
    return path


def check_files(model: ModelConfig) -> None:
    """Check what lies on this machine of a model: that no file is a pointer, damaged or of a kind
    that these libraries do not read. Of weights only the headers are read.

    Raises:
        ModelError: names the file.
    """
    folder = folder_here(model)
    if folder is None:
        return
    for file in sorted(folder.iterdir()):
        if file.suffix not in _HASHED or not file.is_file():
            continue
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                rule = "is a pointer of Git LFS and not the file itself"
                raise ModelError(str(file), rule, "run `git lfs pull` in its directory")
        if file.name in _READ:
            try:
                content = json.loads(file.read_bytes())
            except ValueError as error:
                raise ModelError(str(file), f"is not JSON ({error})", _AGAIN) from error
            if not isinstance(content, dict):
                raise ModelError(str(file), "is not a JSON object", _AGAIN)
    local = Path(resolve_model_path(model.path)).is_dir()  # a cache may lack what is fetched later
    if local and any(folder.glob("*.safetensors")):  # `plan` needs no weights
        open_model(folder).__exit__()


def folder_here(model: ModelConfig) -> Path | None:
    """The directory of a model; for a hub id that of the cache, None where it is not there."""
    path = resolve_model_path(model.path)
    if Path(path).is_dir():
        return Path(path)
    cached = try_to_load_from_cache(path, "config.json", revision=hub.revision_of(model))
    return Path(cached).parent if isinstance(cached, str) else None


_DRAFTS = "drafts tokens from the states of another model"
_MUSIC = "writes music"
UNSUPPORTED = {
    "blt": "reads bytes in patches that a further model chooses",
    "cpmant": "lets every token see the whole row",
    "doge": "chooses keys from a whole row, and so from the tokens that it has to predict",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
    "prophetnet": "predicts several tokens at each position",
    "reformer": "trains with random hashes only",
    "rwkv": "rescales its own weights as it runs",
    "xlnet": "predicts the tokens of a row in a random order",
}
"""Kinds of models that transformers has as causal language models and that are refused, and why;
tests/e2e/test_model_families.py tries all of them."""


def load_model_config(model: ModelConfig, head: Head | None = None) -> Any:
    """The model's own configuration, with the labels of `head` in it.

    Raises:
        ModelError: the model cannot be found or read, is not a causal language model, or has no
            classification head in transformers.
    """
    path = resolve_model_path(model.path)
    try:
        config = AutoConfig.from_pretrained(path, **_hub_options(model))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path={model.path}",
            f"cannot be read ({first_line(error)})",
            "write a model directory, or a hub id that this machine can reach "
            "(without a network: download it elsewhere and write its directory)",
        ) from error
    except (TypeError, LookupError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(
            f"model.path={model.path}",
            f"has a config.json that transformers does not take "
            f"({first_line(error.__cause__ or error)})",
            "write a model that transformers loads, or correct the file",
        ) from error
    native = type(config) in auto_class(head)._model_mapping
    if getattr(config, "auto_map", None) and not model.trust_remote_code:
        if not native:
            raise ModelError(
                f"model.path={model.path}",
                "would run Python code of its own (auto_map in its config.json)",
                "write model.trust_remote_code: true if you have read that code",
            )
        del config.auto_map  # the class of transformers runs instead
    if head is not None:
        head.describe(config)
        if native:
            return config
        raise ModelError(
            f"model.path={model.path}",
            f"is a {config.model_type} model, which has no classification head in transformers",
            "write an encoder such as BERT, or a decoder such as Llama, Qwen or GPT-2",
        )
    _check_causal(model, config)
    return config


def _check_causal(model: ModelConfig, config: Any) -> None:
    """Raises ModelError for a kind of model that cannot be trained to predict the next token."""
    kind = config.model_type
    native = type(config) in AutoModelForCausalLM._model_mapping
    if not native and not hasattr(config, "auto_map"):
        raise ModelError(
            f"model.path={model.path}",
            f"is a {kind} model, which is not a causal language model",
            "write a decoder such as Llama, Qwen or GPT-2, or train.objective: classification",
        )
    if native and kind in UNSUPPORTED:
        raise ModelError(
            f"model.path={model.path}",
            f"is a {kind} model, which {UNSUPPORTED[kind]}",
            "write a model of another kind, see docs/models.md",
        )
    switch = "causal" if hasattr(config, "causal") else "is_decoder"
    reads_both_ways = (
        type(config) in AutoModelForMaskedLM._model_mapping or kind == "bert-generation"
    )
    if reads_both_ways and not config.is_encoder_decoder and not getattr(config, switch, False):
        raise ModelError(
            f"model.path={model.path}",
            f"is a {kind} model, an encoder: a token sees the tokens that it has to predict",
            f'write "{switch}": true in its config.json, or train.objective: classification',
        )


def auto_class(head: Head | None) -> Any:
    """The class that loads a model or builds it from its configuration."""
    return AutoModelForCausalLM if head is None else AutoModelForSequenceClassification


def disk_dtype(model: ModelConfig, head: Head | None = None) -> torch.dtype:
    """The dtype of a model's weights on disk: that of its configuration, else of its first file.

    Raises:
        ModelError: the model is quantised, or has no floating-point weights in safetensors.
    """
    config = load_model_config(model, head)
    text_config = config.get_text_config()
    if getattr(text_config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.path={model.path}",
            "holds quantised weights, which cannot be trained or folded into",
            "write the model that it was quantised from",
        )
    dtype = text_config.dtype or config.dtype or _first_dtype(base_folder(model))
    if isinstance(dtype, torch.dtype):
        return dtype
    raise ModelError(
        f"model.path={model.path}",
        "names no dtype in its config.json",
        'add "dtype": "float32" (or bfloat16) to it',
    )


def base_folder(model: ModelConfig) -> Path:
    """The directory of a base; for a hub id, the directory that its files are downloaded to."""
    path = resolve_model_path(model.path)
    if Path(path).is_dir():
        return Path(path)
    return hub.snapshot(model, hub.revision_of(model))


def own_dtypes(model: ModelConfig) -> dict[str, torch.dtype]:
    """The dtypes of the tensors in a model's files; none where those are not on this machine."""
    folder = folder_here(model)
    if folder is None or not any(folder.glob("*.safetensors")):
        return {}
    with open_model(folder) as tensors:
        return {name: tensors.dtype(name) for name in tensors.shapes}


def _first_dtype(directory: Path) -> torch.dtype | None:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                dtype = DTYPES.get(tensors.get_slice(name).get_dtype())
                if dtype is not None and dtype.is_floating_point:
                    return dtype
    return None


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    path, options = resolve_model_path(model.path), _hub_options(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # the libraries promise no class for what they do not know
        _refuse_newer(model)
        raise ModelError(
            f"model.path={model.path}",
            f"has no tokenizer that can be read ({first_line(error)})",
            "write a model directory with its tokenizer files",
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _refuse_newer(model: ModelConfig) -> None:
    """Raises ModelError for a tokenizer.json that the installed library does not read."""
    folder = folder_here(model)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # as above
        raise ModelError(
            str(folder / "tokenizer.json"),
            f"is not read by tokenizers {version('tokenizers')} ({first_line(error)})",
            f"update tokenizers, or {_AGAIN}",
        ) from error


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token, else any other, since padding has no effect."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def load_base(
    model: ModelConfig,
    dtype: torch.dtype,
    head: Head | None = None,
    quantisation: dict[str, Any] | None = None,
) -> nn.Module:
    """The pretrained model with its weights in `dtype`, from safetensors only.

    A task head that the files lack, or have for other labels, is drawn from its seed. One for the
    same labels in another order is put in order.

    Raises:
        ModelError: a file or a weight is missing, or the weights are not in safetensors files.
    """
    config = load_model_config(model, head)
    text_config = config.get_text_config()
    if head is not None and text_config.pad_token_id is None:  # heads find the last token by it
        text_config.pad_token_id = pad_token(load_tokenizer(model))
    attention = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    try:
        with _without_report():
            base, loading = auto_class(head).from_pretrained(
                resolve_model_path(model.path),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=head is not None,
                **attention,
                **(quantisation or {}),
                **_hub_options(model),
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model.path={model.path}",
            f"cannot be loaded ({first_line(error)})",
            "write a model with safetensors weights",
        ) from error
    assert isinstance(base, nn.Module)
    forget_longest(base)
    missing = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    if head is not None:  # each process would draw its own values
        new = {name for name in missing if _is_of_head(base, name)}
        new |= _fit_head(base, model, head)
        draw_head(base, sorted(new), head.seed)
        missing -= new
    if missing:
        raise ModelError(
            f"model.path={model.path}",
            f"lacks {len(missing)} of its weights, among them {min(missing)}",
            "write a model directory with all of them",
        )
    return base


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers prints a table of the weights that files lack; what it says is checked here, or
    is a head that is drawn.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)  # a higher level would make transformers print other things
    try:
        yield
    finally:
        logger.removeFilter(is_error)


@torch.no_grad()
def _fit_head(base: nn.Module, model: ModelConfig, head: Head) -> set[str]:
    """Put the rows of the base's own head in the order of the labels; the weights to be drawn
    instead, with room for their values, where it has none for these labels.
    """
    written = written_head(model)
    rows = None if written is None else head.rows_in(written)
    if rows == list(range(len(head.labels))):
        return set()
    weights = label_weights(base)
    for name, dim in weights.items():
        old = base.get_parameter(name)
        value = torch.empty_like(old, device="cpu" if old.is_meta else old.device)
        if rows is not None:
            value.copy_(_of_file(model, name).index_select(dim, torch.tensor(rows)))
        owner, _, last = name.rpartition(".")
        setattr(base.get_submodule(owner), last, nn.Parameter(value))
    return set(weights) if rows is None else set()


def _of_file(model: ModelConfig, name: str) -> torch.Tensor:
    """A weight of the head, which has the same name in the files."""
    with open_model(base_folder(model)) as files:
        if name in files.shapes:
            return files.whole(name)
    raise ModelError(
        f"model.path={model.path}",
        f"has no {name} in its files, whose rows are to be put in the order of the labels",
        "write data.labels in the order of the model's id2label",
    )


def written_head(model: ModelConfig) -> Head | None:
    """The head that a model's config.json describes; None where it has none."""
    config = AutoConfig.from_pretrained(resolve_model_path(model.path), **_hub_options(model))
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        return None
    problems = {theirs: ours for ours, theirs in PROBLEM_TYPES.items()}
    usual = "regression" if config.num_labels == 1 else "single_label"
    labels = tuple(config.id2label[number] for number in sorted(config.id2label))
    return Head(problems.get(config.problem_type, usual), labels)


def head_notes(model: ModelConfig, head: Head | None) -> tuple[str, ...]:
    """What `plan` and a run say of the base's own head, where it is not taken as it is."""
    written = None if head is None else written_head(model)
    if head is None or written is None:
        return ()
    rows = head.rows_in(written)
    if rows == list(range(len(head.labels))):
        return ()
    theirs, ours = (", ".join(labels[:12]) for labels in (written.labels, head.labels))
    if rows is None:
        return (f"the base has a head for {theirs}; one for {ours} is drawn anew",)
    return (f"the head of the base is for {theirs}; its rows are put in the order {ours}",)


def _is_of_head(base: Any, name: str) -> bool:
    """Whether a weight lies outside the backbone or in its pooler."""
    prefix = f"{base.base_model_prefix}."
    return not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")


def dtype_of(model: ModelConfig, method: MethodConfig, precision: Precision) -> torch.dtype:
    """The dtype that weights of the base are read in; those that train are not rounded first."""
    trained = METHODS[method.name].whole_model
    return master_dtype(precision) if trained else base_dtype(model, precision)


def base_dtype(model: ModelConfig, precision: Precision) -> torch.dtype:
    """The dtype of a frozen base in a run of this precision."""
    dtype: torch.dtype = getattr(torch, precision if model.dtype == "auto" else model.dtype)
    return dtype


def frozen_dtype(
    model: ModelConfig, method: MethodConfig, precision: Precision
) -> torch.dtype | None:
    """The dtype that frozen weights are held in; None where they are read in that dtype."""
    return base_dtype(model, precision) if METHODS[method.name].trains == "part" else None


def master_dtype(precision: Precision) -> torch.dtype:
    """The dtype of weights that train."""
    return torch.float64 if precision == "float64" else torch.float32


def build_model(
    model: ModelConfig,
    method: MethodConfig,
    precision: Precision,
    seed: int,
    head: Head | None = None,
) -> nn.Module:
    """The base with the method attached, ready to be wrapped by a strategy.

    Trained weights are held in float32 (float64 under float64), frozen ones as `model.dtype`
    says. The module stays in eval mode: dropout of the base is off, and the only noise is that of
    the method. New weights are drawn from `seed` alone.
    """
    quantisation = quantisation_of(method, getattr(torch, precision))
    base = load_base(model, dtype_of(model, method, precision), head, quantisation)
    keep_as_rounded(base)
    return apply_method(base, method, precision, seed, frozen_dtype(model, method, precision))


def apply_method(
    base: nn.Module,
    method: MethodConfig,
    precision: Precision,
    seed: int,
    frozen: torch.dtype | None = None,
) -> nn.Module:
    """Attach the method to a base, whose weights may be on the meta device; see `build_model`.

    Frozen weights are cast to `frozen`, if it is given.
    """
    set_up(base, precision)
    torch.manual_seed(seed)
    built = attach(base, method)
    train_head(built)
    if precision == "bfloat16":
        leave_casts_to_autocast(built)
    master = master_dtype(precision)
    for module in built.modules():
        if isinstance(module, BufferDict):  # values that trained weights are multiplied by
            module.to(master)
    for parameter in built.parameters():
        dtype = master if parameter.requires_grad else frozen or parameter.dtype
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return built


def build_frozen(model: ModelConfig, precision: Precision) -> nn.Module:
    """The base as `build_model` has it under an adapter, without the adapter.

    Raises:
        ModelError: see `load_base`.
    """
    return freeze(load_base(model, dtype_of(model, LoraMethod(), precision)), precision)


def freeze(base: nn.Module, precision: Precision) -> nn.Module:
    """Freeze a base, whose weights may be on the meta device; see `build_frozen`."""
    set_up(base, precision)
    return base.requires_grad_(False)


def check_pinned(model: ModelConfig, key: str = "model.path") -> None:
    """Check that the code of `trust_remote_code` is in a local directory or of one commit.

    A model's configuration may name code of another repository, which is then of that commit too.

    Raises:
        ModelError: the owner of the repository can change the code that is run.
    """
    if not model.trust_remote_code or _COMMIT.fullmatch(model.revision or ""):
        return
    folder = Path(resolve_model_path(model.path))
    if folder.is_dir() and not _names_code_elsewhere(folder):
        return
    raise ModelError(
        f"{key}={model.path}",
        f"runs code of the hub at {model.revision or 'main'} under model.trust_remote_code=true, "
        "and its owner may change that",
        "write the 40 digits of the commit that you have read as model.revision, or the directory "
        "of a copy with its code",
    )


def _names_code_elsewhere(folder: Path) -> bool:
    """Whether an `auto_map` names a class as `owner/name--file.Class`."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.is_file() and "--" in json.dumps(read_json(file).get("auto_map", {})):
            return True
    return False


def _hub_options(model: ModelConfig) -> dict[str, Any]:
    check_pinned(model)
    code = {"code_revision": model.revision} if model.trust_remote_code else {}
    revision = hub.revision_of(model)
    return {"revision": revision, "trust_remote_code": model.trust_remote_code, **code}


def base_file_hashes(model: ModelConfig) -> dict[str, str]:
    """File name -> sha256 of the base's weights, configuration and tokenizer."""
    directory, hashes = folder_here(model), dict[str, str]()
    for file in sorted(directory.iterdir()) if directory else ():
        if file.suffix in _HASHED and file.is_file():
            hashes[file.name] = sha256_of(file)
    return hashes
