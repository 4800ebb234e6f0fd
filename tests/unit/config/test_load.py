"""YAML and overrides to a Config, and every mistake to one line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_ft.config.data import SourceConfig
from raytune_ft.config.execution import variants
from raytune_ft.config.load import apply_overrides, dump_yaml, expand_env, load_config
from raytune_ft.config.methods import FullMethod, LoraMethod
from raytune_ft.config.reference import keys
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError, InputError, StorageError

TEXT = """
name: a
method: {name: lora, rank: 8}
data:
  train: {path: x.jsonl}
train: {lr: 1e-4, batch_size: 8}
"""
SEARCH = """
search:
  trials: 4
  space:
    train.lr: {log_uniform: [1e-5, 1e-3]}
"""
Write = Callable[[str], Path]
METHOD_NAMES = (
    "adapter, freeze, full, ia3, lora, loreft, oft, p_tuning, prefix, prompt, qlora or vera"
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_numbers_are_yaml_1_2(write: Write) -> None:
    config = load_config(write(TEXT))
    assert config.train.lr == 1e-4
    assert load_config(write(TEXT), ["train.lr=3e-5"]).train.lr == 3e-5
    assert load_config(write(TEXT), ["data.separator=yes"]).data.separator == "yes"


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("train.batch_size=4", lambda c: c.train.batch_size, 4),
        ("train.max_grad_norm=null", lambda c: c.train.max_grad_norm, None),
        ("data.packing=false", lambda c: c.data.packing, False),
        ("data.train.columns=[a, b]", lambda c: c.data.train.columns, ["a", "b"]),
        ("name=2024", lambda c: c.name, "2024"),
        ("model.revision=12345e7", lambda c: c.model.revision, "12345e7"),
        ("model.revision=null", lambda c: c.model.revision, None),
        ('data.separator=" | "', lambda c: c.data.separator, " | "),
        ("data.train.path=a: [b", lambda c: c.data.train.path, "a: [b"),
        ("data.train.path=[a.jsonl, b]", lambda c: c.data.train.path, ["a.jsonl", "b"]),
        ("train.early_stopping.patience=5", lambda c: c.train.early_stopping.patience, 5),
        ("data.validation.path=v.jsonl", lambda c: c.data.validation, SourceConfig(path="v.jsonl")),
        (
            "parallel.resources_per_worker.GPU=1",
            lambda c: c.parallel.resources,
            {"CPU": 1.0, "GPU": 1.0},
        ),
    ],
)
def test_override_has_the_type_of_its_key(
    write: Write, override: str, get: Callable[[Config], object], expected: object
) -> None:
    assert get(load_config(write(TEXT), [override])) == expected


def test_overrides_reach_the_search_space(write: Write) -> None:
    overrides = [
        "search.space.train.batch_size.choice=[4, 8]",
        "search.space.train.lr={uniform: [0.1, 0.2]}",
    ]
    config = load_config(write(TEXT + SEARCH), overrides)
    assert config.search is not None
    assert config.search.space["train.batch_size"].values == [4, 8]
    assert config.search.space["train.lr"].kind == "uniform"
    without = load_config(write(TEXT + SEARCH), [overrides[0], "search.space.train.lr=null"])
    assert without.search is not None
    assert list(without.search.space) == ["train.batch_size"]


def test_an_ignored_search_is_not_checked_either(write: Write) -> None:
    notices: list[str] = []
    path = write(TEXT + SEARCH.replace("train.lr", "train.lrr"))
    assert load_config(path, (), notices.append, ignore_search=True).search is None
    assert notices == ["the search section is ignored: this is one run, not a sweep"]


def test_switching_the_method_drops_the_other_methods_keys_and_says_so(write: Write) -> None:
    notices: list[str] = []
    config = load_config(write(TEXT), ["method.name=full"], notices.append)
    assert config.method == FullMethod(name="full")
    assert notices == ["method.name=full drops the file's method.rank"]
    assert apply_overrides(load_config(write(TEXT)), {"method.name": "full"}) == config


def test_switching_the_method_drops_its_lines_of_the_space_too(write: Write) -> None:
    notices: list[str] = []
    text = TEXT + SEARCH + "    method.rank: {choice: [4, 8]}\n"
    search = load_config(write(text), ["method.name=full"], notices.append).search
    assert search is not None
    assert list(search.space) == ["train.lr"]
    dropped = "method.rank, search.space.method.rank"
    assert notices == [f"method.name=full drops the file's {dropped}"]


def test_a_key_that_the_new_method_lacks_is_refused_when_it_is_an_override(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"method\.rank is not a key of method full"):
        load_config(write(TEXT), ["method.rank=4", "method.name=full"])


def test_the_method_has_a_default_name(write: Write) -> None:
    text = TEXT.replace("name: lora, ", "")
    assert load_config(write(text)).method == LoraMethod(rank=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: {name: lora, rnk: 8}", "method.rnk is not a key of method lora; did you mean"),
        ("learning_rate: 1", "learning_rate is not a key; did you mean train.lr?"),
        ("trian: {}", "trian is not a key; did you mean train?"),
        ("train: {rank: 8}", "train.rank is not a key; did you mean method.rank?"),
        ("train: {zzz: 8}", "train.zzz is not a key; the keys of train are objective, batch_size"),
        (
            "method: {name: lra}",
            f"method.name=lra is not {METHOD_NAMES}; did you mean lora",
        ),
        ("train: {lr: fast}", "train.lr=fast is not a number above 0; write one, or leave the key"),
        ("train: {lr: '1e-4'}", "train.lr='1e-4' is not a number above 0; write it without quotes"),
        ("train: {batch_size: 1.5}", "train.batch_size=1.5 is not a whole number above 0; write"),
        ("train: {batch_size: true}", "train.batch_size=true is not a whole number above 0;"),
        ("train: {lr: .nan}", "train.lr=nan is not a number above 0;"),
        ("train: {lr_schedule: cosin}", "did you mean cosine?"),
        ("train:", "train=null is not a section;"),
        ("train: {micro_tokens: -1}", "train.micro_tokens=-1 is not auto or a whole number above"),
        ("data: {train: {path: x}, validation: {pth: v}}", "did you mean data.validation.path?"),
        (
            "data: {train: {path: 3}}",
            "data.train.path=3 is not text that is not empty or a list of values; write it",
        ),
        ("data: {}", "data.train is missing; write a section `data.train` with at least path"),
        ("model: {path: x}\nmodel: {}", "config.yaml line 8 writes 'model' twice; delete one"),
        ("train: {lr: 1, lr: 2}", "writes 'lr' twice; delete one of the two"),
        ("a: [1", "line 8 is not YAML"),
        ("3: 4", "has the key 3, which is not text; quote it"),
        ("model: {path: !!python/name:os.system x}", "is not YAML"),
        (
            "storage: gs://bucket/runs",
            "is a URL, and not one of a bucket; write a directory, or s3",
        ),
        ("storage: https://me:hunter2@host/x", "storage holds a password, and the config is saved"),
        ("train: {batch_size: 4}\nparallel: {workers: 8}", "is smaller than parallel.workers=8; w"),
        (
            "parallel: {strategy: single, workers: 2}",
            "parallel.strategy=single runs in one process",
        ),
        ("parallel: {resources_per_worker: {CPU: 0}}", "CPU=0 gives a worker no CPU; write 1 or"),
        (
            "parallel: {resources_per_worker: {GPU: 2}}",
            "GPU=2 is more than a worker uses: each computes on one GPU; write GPU: 1, and as many",
        ),
        (
            "parallel: {workers: 2, resources_per_worker: {GPU: 0.5}}",
            "GPU=0.5 puts several of parallel.workers=2 on one GPU, which NCCL refuses; write GPU",
        ),
        ("parallel: {resources_per_worker: all}", "parallel.resources_per_worker=all is not "),
        ("method: {targets: []}", "method.targets=[] adapts nothing; write all-linear"),
        ("promote: {merge: tie}", "promote.merge=tie is not best, uniform_soup, greedy_soup, task"),
        (
            "promote: {max_shard_size: big}",
            "promote.max_shard_size=big is not a size; write for",
        ),
        ("parallel: {strategy: zero}", "parallel.strategy=zero is not auto, single, ddp, fsdp or"),
        ("parallel: {workers: [4, 2]}", "parallel.workers=[4, 2] is not [min, max] with min <= m"),
        ("parallel: {workers: [2]}", "workers=[2] is not a whole number above 0 or [min, max]"),
        (
            "parallel: {workers: [1, 64]}",
            "is smaller than parallel.workers=[1, 64]; write at",
        ),
        ("parallel: {workers: 4, replicas: 3}", "parallel.replicas=3 does not divide parallel.wor"),
        ("parallel: {workers: [2, 4], replicas: 2}", "needs a fixed number of workers, not parall"),
        (
            "parallel: {strategy: ddp, workers: 4, replicas: 2}",
            "replicas=2 is for fsdp",
        ),
        ("parallel: {strategy: fsdp, deepspeed: x.json}", "parallel.deepspeed=x.json is for deeps"),
        ("parallel: {strategy: ddp, offload: all}", "offload=all is not supported by ddp"),
        (
            "parallel: {strategy: fsdp, offload: optimizer}",
            "write parallel.strategy: deepspeed",
        ),
        (
            "parallel: {strategy: deepspeed, zero_stage: 2, offload: all}",
            "zero_stage=2 do",
        ),
        (
            "train: {precision: float64}\nparallel: {strategy: deepspeed}",
            "float64 is not supported by deepspeed",
        ),
        (
            "train: {precision: float64}\nparallel: {offload: optimizer}",
            "float64 is not supported by deepspeed",
        ),
        ("search: {trials: 2}", "search.space is missing; write a mapping with at least one key"),
    ],
)
def test_a_mistake_is_one_line_with_value_rule_and_remedy(
    write: Write, text: str, message: str
) -> None:
    section = text.split(":")[0]
    lines = [line for line in TEXT.strip().splitlines() if not line.startswith(section + ":")]
    if section == "data":
        lines = [line for line in lines if not line.startswith("  train")]
    kept = TEXT.strip().splitlines() if text.startswith("model: {path: x}") else lines
    with pytest.raises(ConfigError) as caught:
        load_config(write("\n".join([*kept, "", text]) + "\n"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


# Put together here, so that no scanner takes them for real ones.
TOKENS = [
    ("a token of Hugging Face", "hf_" + "Ab" * 17),
    ("a key of AWS", "AKIA" + "Q7" * 8),
    ("an API key", "sk-proj-" + "a-_9" * 10),
    ("an API key", "sk-" + "aB3" * 16),
    ("a token of GitHub", "ghp_" + "x1" * 18),
    ("a token of GitLab", "glpat-" + "z" * 20),
    ("a key of Google", "AIza" + "s_-9K" * 7),
    ("a token of PyPI", "pypi-AgE" + "x" * 60),
    ("a token of Slack", "xoxb-" + "1" * 12),
    ("a JSON web token", ".".join(["eyJ" + "h" * 12, "eyJ" + "p" * 12, "sig"])),
    ("a private key", f"-----BEGIN OPENSSH {'PRIVATE'} KEY-----\nb3BlbnNzaA=="),
]


@pytest.mark.parametrize(("what", "token"), TOKENS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.revision", "{}"),
        ("data.separator", "say {}"),
        ("tracking.project", "x/{}/y"),
        ("promote.answer", "({})"),
    ],
)
def test_a_token_is_refused_and_not_repeated(
    write: Write, key: str, value: str, what: str, token: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(TEXT), [f"{key}={json.dumps(value.format(token))}"])
    line = str(caught.value)
    assert line.startswith(f"{key} holds {what}, and the config is saved in the clear; write it as")
    assert token[4:] not in line


@pytest.mark.parametrize(("what", "token"), TOKENS)
def test_nor_where_the_value_is_wrong_in_another_way(write: Write, what: str, token: str) -> None:
    for text in (f"train.precision={json.dumps(token)}", token, f"{token}=1"):
        with pytest.raises(ConfigError) as caught:
            load_config(write(TEXT), [text])
        assert token[8:] not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "sk-learn-datasets-collection-v2-large",
        "task-" + "a" * 40,
        "hf_models/some-model",
        "0123456789abcdef0123456789abcdef01234567",
        "${HF_TOKEN}",
        "org/AKIAB-model",
    ],
)
def test_what_only_resembles_a_token_is_taken(write: Write, text: str) -> None:
    assert load_config(write(TEXT), [f"model.revision={text}"]).model.revision == text


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("train.lrr: {choice: [1]}", "search.space.train.lrr names no key of the config; did you"),
        ("parallel.workers: {choice: [1]}", "cannot be searched over: trials would not be compar"),
        ("data.test.path: {choice: [a]}", "cannot be searched over"),
        ("name: {choice: [a]}", "cannot be searched over"),
        ("train.early_stopping: {choice: [null]}", "names no key of the config"),
        ("train.batch_size: {uniform: [4, 8.5]}", "write int_uniform: [low, high], or choice"),
        ("train.batch_size: {choice: [8, 1]}", "train.batch_size=1 is smaller than parallel.work"),
        ("train.lr: {uniform: [-1, 1]}", "search.space.train.lr: train.lr=-1.0 is not a number ab"),
        ("train.lr: {uniform: [1, 1]}", "search.space.train.lr: uniform=[1.0, 1.0] is not [low"),
        ("train.lr: {choice: []}", "choice is empty; write at least one value"),
        ("train.lr: {coice: [1]}", "did you mean search.space.train.lr.choice?"),
        ("train: {lr: {choice: [1]}}", "write the key with its dots, `train.lr:`"),
        (
            "method.name: {choice: [full]}\n    method.rank: {choice: [4]}",
            "not a key of method full",
        ),
        (
            "method.name: {choice: [lora, ful]}",
            f"method.name=ful is not {METHOD_NAMES}; did you mean f",
        ),
    ],
)
def test_a_search_space_is_checked_by_putting_its_values_in_place(
    write: Write, space: str, message: str
) -> None:
    text = TEXT + f"parallel: {{workers: 2}}\nsearch:\n  space:\n    {space}\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert message in str(caught.value)


def test_methods_are_branches_of_a_space(write: Write) -> None:
    space = "method.name: {choice: [lora, full]}, method.rank: {choice: [4, 8]}"
    load_config(write(TEXT + f"search: {{space: {{{space}}}}}"))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            "{metric: eval_exact_match, mode: min, %s}",
            "search.mode=min looks for the worst eval_exact_match",
        ),
        ("{scheduler: {grace_examples: 101}, %s}", "is more than the 100 examples that a trial"),
    ],
)
def test_search_rules(write: Write, search: str, message: str) -> None:
    text = TEXT + "search: " + search % "space: {train.lr: {choice: [1.0]}}"
    with pytest.raises(ConfigError, match=message):
        load_config(write(text), ["train.max_examples=100"])


def test_dump_and_load_give_the_same_config(write: Write) -> None:
    config = resolve(load_config(write(TEXT + SEARCH), ["train.max_grad_norm=null"]))
    again = load_config(write(dump_yaml(config)))
    assert again == config
    assert resolve(again) == config
    for odd in ("1e-4", "yes", "null", "2024-01-01", "\n", " a: b # c", "'", "é\t\\n"):
        changed = apply_overrides(config, {"data.separator": odd})
        assert load_config(write(dump_yaml(changed))) == changed


def test_resolve_makes_paths_absolute_once(write: Write, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    overrides = ["data.test.path=org/set", "model.path=here", "data.train.path=sub/x.jsonl"]
    config = resolve(load_config(write(TEXT), overrides), cwd=tmp_path)
    assert config.storage == str(tmp_path / "runs")
    assert config.model.path == str(tmp_path / "here")
    assert config.data.train.path == str(tmp_path / "sub" / "x.jsonl")
    assert config.data.test is not None
    assert config.data.test.path == "org/set"
    assert resolve(config, cwd=Path("/elsewhere")) == config


@pytest.mark.parametrize(
    ("overrides", "strategy"),
    [
        ([], "single"),
        (["parallel.workers=2"], "ddp"),
        (["parallel.workers=2", "method.name=full"], "fsdp"),
        (["parallel.workers=2", "parallel.strategy=fsdp"], "fsdp"),
    ],
)
def test_resolve_chooses_the_strategy(write: Write, overrides: list[str], strategy: str) -> None:
    assert resolve(load_config(write(TEXT), overrides)).parallel.strategy == strategy


def test_a_relative_storage_in_a_job_goes_under_the_variable_or_is_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write(TEXT))
    monkeypatch.delenv("RAYTUNE_FT_STORAGE", raising=False)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(StorageError, match="set RAYTUNE_FT_STORAGE to one"):
        resolve(config)
    monkeypatch.setenv("RAYTUNE_FT_STORAGE", "/shared")
    assert resolve(config).storage == "/shared/runs"
    assert resolve(apply_overrides(config, {"storage": "/own"})).storage == "/own"


def test_environment_is_saved_unexpanded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "search.storage=postgresql://me:${STUDY_PASSWORD}@host/db"
    config = resolve(load_config(write(TEXT + SEARCH), [url]))
    assert "${STUDY_PASSWORD}" in dump_yaml(config)
    monkeypatch.delenv("STUDY_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match=r"search\.storage names \$\{STUDY_PASSWORD\}, which is"):
        expand_env(config)
    monkeypatch.setenv("STUDY_PASSWORD", "hunter2")
    search = expand_env(config).search
    assert search is not None
    assert search.storage == "postgresql://me:hunter2@host/db"


def test_the_trials_of_a_sweep_may_be_given_a_secret(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKER_PASSWORD", "hunter2")
    uri = "tracking.uri=http://me:${TRACKER_PASSWORD}@host"
    config = expand_env(load_config(write(TEXT + SEARCH), [uri]))
    assert [each.tracking.uri for each in variants(config)] == ["http://me:hunter2@host"]


def test_importing_config_costs_nothing() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'optuna', 'datasets', 'pyarrow', 'numpy'}"
    modules = "load, rules, identity, environment, reference"
    code = f"import sys; from raytune_ft.config import {modules}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


FRAGMENTS = [
    *"0123456789xyz[]{}:-?&*!|>'\"%@`#,=~\n\t\\",
    "<<: ",
    "!!int ",
    "!!bool ",
    "&a ",
    "*a",
    "---\n",
]
FRAGMENTS += ["!!binary ", "!!set ", "!!omap ", "!!python/name:os.system ", ".nan", "1e999", "\0"]
FRAGMENTS += ["1" * 5000, "[" * 300, "\u2028", "0o8", "2024-01-01", "${X}", "null", "\ud800"]


@pytest.mark.parametrize("seed", range(4))
def test_no_text_ends_in_anything_but_a_config_or_one_line(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "config.yaml"
    messages: list[str] = []
    accepted = 0
    for _ in range(60):
        text = list(TEXT + SEARCH)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(text))
            if rng.random() < 0.7:
                text.insert(at, rng.choice(rng.choice([FRAGMENTS, [*"123xyz "]])))
            else:
                del text[at : at + rng.randrange(1, 9)]
        path.write_bytes("".join(text).encode("utf-8", "surrogatepass"))
        try:
            config = resolve(load_config(path))
        except InputError as error:
            messages.append(str(error))
            continue
        accepted += 1
        path.write_text(dump_yaml(config))
        assert load_config(path) == config
    assert accepted > 0
    assert messages
    assert not [text for text in messages if "\n" in text or len(text) > 1000]


VALUES = ["1", "-1", "1e-4", "true", "null", "''", "[]", "{}", "[1, a]", "{a: 1}", ".nan", "auto"]
VALUES += ["{name: full}", "full", "{choice: [1, 2]}", "{choice: [{a: 1}, [1], null]}", "&x [*x]"]
VALUES += ["{uniform: [1, 2, 3]}", "{? [1] : 2}", "{1: 2}", "!!set {a}", "1" * 5000, "x" * 5000]
VALUES += ["postgres://a:b@c/d", "${NO_SUCH}", "s3://a/b", '"\\0"', "=", "[" * 300]
PLACES = [key.dotted.replace("KEY", "train.lr") for key in keys()]
PLACES += ["method", "data", "search", "search.space", "search.space.method.rank", "", "a..b", "."]
PLACES += ["search.space.", "search.space.method.name", "train.lr.x", "parallel", "model"]


@pytest.mark.parametrize("seed", range(4))
def test_no_override_ends_in_anything_but_a_config_or_one_line(write: Write, seed: int) -> None:
    rng = random.Random(seed)
    path = write(TEXT + SEARCH)
    messages: list[str] = []
    for _ in range(100):
        overrides = [
            f"{rng.choice(PLACES)}={rng.choice(VALUES)}" for _ in range(rng.choice([1, 2]))
        ]
        try:
            resolve(load_config(path, overrides))
        except InputError as error:
            messages.append(str(error))
    assert 0 < len(messages) < 100
    assert not [text for text in messages if "\n" in text or len(text) > 1000]
