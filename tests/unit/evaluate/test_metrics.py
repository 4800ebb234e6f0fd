"""Every metric against a plain computation of it, on a real model's own words."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.config.objectives import CALIBRATION_ERROR
from raytune_ft.config.schema import ModelConfig, PromoteConfig
from raytune_ft.data.formats.classification import TARGET
from raytune_ft.data.formats.example import DESIRABLE
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, DataError, RunFailed
from raytune_ft.evaluate.columns import retention
from raytune_ft.evaluate.context import Subject, prompt_of, runner_of
from raytune_ft.evaluate.evaluate import measure
from raytune_ft.evaluate.generate import choose_backend, until
from raytune_ft.evaluate.metrics import extracted
from raytune_ft.evaluate.scores import Scores
from raytune_ft.model.load import load_tokenizer
from raytune_ft.model.objectives.classification import Classification
from raytune_ft.model.sampling import stop_tokens
from raytune_ft.promote.promote import promote, save_tokenizer

GSM8K = re.compile(r"####\s*(\S+)")


@pytest.fixture(scope="module")
def model(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A promoted model that says a letter twice."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("metrics") / "trained"))
    return ModelConfig(path=str(promote(run, samples=0).model))


def rows(model: ModelConfig, pairs: list[tuple[str, str]]) -> TokenizedSplit:
    tokenizer = load_tokenizer(model)
    examples = []
    for prompt, completion in pairs:
        ids = np.array(
            [*tokenizer(f"{prompt}\n{completion}")["input_ids"], tokenizer.eos_token_id], np.int32
        )
        examples.append((ids, np.arange(len(ids)) > len(prompt)))
    return TokenizedSplit.from_examples(examples)


def scores(
    model: ModelConfig, pairs: list[tuple[str, str]], train: list[str] | None = None, **keys: object
) -> dict[str, Scores]:
    split = rows(model, pairs)
    source = rows(model, [("x", label) for label in train]) if train else split
    settings = PromoteConfig.model_validate(keys)
    return measure(Subject(model, load_tokenizer(model), split, source, settings))


PAIRS = [("say a", "aa"), ("say b", "bb"), ("say c", "cd"), ("say hh", "h"), ("say d", "dd")]


def test_batched_continuations_are_those_of_each_prompt_alone(model: ModelConfig) -> None:
    mixed = [*PAIRS, ("please say e", "ee"), ("f", "ff"), ("you must say a letter: say g", "gg")]
    split = rows(model, mixed)
    tokenizer = load_tokenizer(model)
    subject = Subject(model, tokenizer, split, split, PromoteConfig(max_new_tokens=8))
    plain = AutoModelForCausalLM.from_pretrained(model.path).eval()
    for (prompt, _), found in zip(mixed, subject.continuations, strict=True):
        ids = tokenizer(prompt + "\n", return_tensors="pt")
        said = plain.generate(**ids, max_new_tokens=8, do_sample=False)
        said = said[0, ids["input_ids"].shape[1] :]
        alone = tokenizer.decode(said, skip_special_tokens=True).strip()
        assert (found.prompt, found.generated) == (prompt, alone)


def test_answers(model: ModelConfig) -> None:
    found = scores(model, PAIRS, metrics=["answer"], answer="^(..)")
    assert found["answer_exact_match"].columns[0].tolist() == [1, 1, 0, 0, 1]
    assert found["answer_exact_match"].value == 0.6
    # Here only the first letter counts.
    found = scores(model, PAIRS, metrics=["answer"], answer="^(.)")
    assert found["answer_exact_match"].columns[0].tolist()[:3] == [1, 1, 1]
    with pytest.raises(DataError, match="finds no answer in any of 5 references"):
        scores(model, PAIRS, metrics=["answer"])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is\n#### 18", "18"),
        ("####1,234", "1234"),
        ("#### 70,000.\n#### 3", "70000"),
        ("#### -3.5 apples", "-3.5"),
        ("18", None),
    ],
)
def test_extracted_answers(text: str, answer: str | None) -> None:
    assert extracted(GSM8K, text) == answer


def test_rouge_is_that_of_rouge_score(model: ModelConfig) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    found = scores(model, PAIRS, metrics=["rouge"])
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(want, 2 * prompt[-1])["rougeL"].fmeasure for prompt, want in PAIRS]
    assert found["rougeL"].columns[0].tolist()[:3] == expected[:3] == [1.0, 1.0, 0.0]
    assert {"rouge1", "rouge2", "rougeL", "eval_loss"} <= found.keys()


def test_classification(model: ModelConfig) -> None:
    pairs = [("say a", "aa"), ("say b", "bb"), ("say c", "aa"), ("say a", "zz")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sklearn", None)  # no extra installs it
        found = scores(model, pairs, train=["aa", "bb", "cc", "aa"], metrics=["classification"])
    assert found["accuracy"].columns[0].tolist() == [1, 1, 0, 0]
    _, *classes = (column.argmax(1) for column in found["macro_f1"].columns)
    guessed, wanted = classes
    assert (guessed.tolist(), wanted.tolist()) == ([0, 1, 2, 0], [0, 1, 0, 3])
    from sklearn.metrics import f1_score

    assert found["macro_f1"].value == pytest.approx(f1_score(wanted, guessed, average="macro"))
    # The confidence is a softmax over the log-probabilities of plain transformers.
    plain = AutoModelForCausalLM.from_pretrained(model.path).eval()
    tokenizer = load_tokenizer(model)
    logs = []
    for label in ("aa", "bb", "cc"):
        ids = torch.tensor([[*tokenizer(f"say a\n{label}")["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = plain(ids).logits[0].log_softmax(-1)
        logs.append(sum(logp[i - 1, ids[0, i]] for i in range(6, 9)))
    confidence = torch.stack(logs).softmax(0).max().item()
    # It is right, so that its gap in the bin of the confidence is confidence - 1.
    gaps = found["calibration_error"].columns[0][0]
    assert gaps[int(confidence * 10)] == gaps.sum() == pytest.approx(confidence - 1, abs=1e-5)
    labels = [f"{a}{b}" for a in "abcdefghijkl" for b in "abcdefghi"]
    with pytest.raises(DataError, match="over 100 different completions"):
        scores(model, pairs, train=labels, metrics=["classification"])


def test_calibration_error() -> None:
    def error(confidences: list[float], right: list[int]) -> float:
        chances = torch.tensor([[each, 1 - each] for each in confidences], dtype=torch.float64)
        target = torch.eye(2)[[1 - each for each in right]]
        columns = Classification("single_label", (1.0, 1.0)).columns_of(
            chances.log(), {TARGET: target}
        )
        return CALIBRATION_ERROR.of(
            {"gaps": columns["gaps"].sum(0).numpy(), "examples": len(right)}
        )

    # The last bin holds 0.95, 0.95 and 1.0: |2.9 - 2| / 5; the sixth |1.1 - 1| / 5.
    found = error([0.95, 0.95, 0.55, 0.55, 1.0], [1, 0, 1, 0, 1])
    assert found == pytest.approx((0.9 + 0.1) / 5)
    assert error([1.0] * 4, [1] * 4) == 0


def test_a_function_of_ones_own(model: ModelConfig, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "def same_length(prompt, reference, generated):\n"
        "    return len(reference) == len(generated)\n"
        "def broken(prompt, reference, generated):\n"
        "    return 1 / 0\n"
    )
    with pytest.raises(ConfigError, match=r"no function of own\.py, which has same_length, broken"):
        scores(model, PAIRS, metrics=[f"{file}:other"])
    assert not (tmp_path / "ran").exists()
    found = scores(model, PAIRS, metrics=[f"{file}:same_length"])["same_length"]
    assert found.columns[0].tolist()[:3] == [1, 1, 1]
    with pytest.raises(RunFailed, match="ZeroDivisionError"):
        scores(model, PAIRS, metrics=[f"{file}:broken"])


def test_an_undesirable_answer_is_no_reference(model: ModelConfig) -> None:
    good = np.array([[1], [0], [0], [1], [1]], np.float32)
    split = replace(rows(model, PAIRS), columns={DESIRABLE: good})
    settings = PromoteConfig.model_validate({"metrics": ["rouge"]})
    found = measure(Subject(model, load_tokenizer(model), split, split, settings))["rougeL"]
    every = scores(model, PAIRS, metrics=["rouge"])["rougeL"].columns[0]
    assert every[1] == 1.0  # which counts where it is a reference
    assert found.value == every[[0, 3, 4]].mean()
    assert found.known is not None
    assert found.known.tolist() == [True, False, False, True, True]


def test_a_local_task_of_the_harness(model: ModelConfig, tmp_path: Path) -> None:
    documents = [{"question": f"say {letter}", "answer": letter * 2} for letter in "abcz"]
    documents[2]["answer"] = "bb"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    task = tmp_path / "say.yaml"
    task.write_text(
        "task: say_twice\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'target_delimiter: "\\n"\n'
        'doc_to_choice: ["aa", "bb", "cc"]\n'
        "doc_to_target: \"{{['aa', 'bb', 'cc', 'zz'].index(answer) % 3}}\"\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    found = scores(model, PAIRS, metrics=[f"lm_eval:{task}"])["say_twice/acc"]
    assert found.columns[0].tolist()[:3] == [1, 1, 0]
    assert len(found.columns[0]) == 4
    with pytest.raises(ConfigError, match="names a file that does not exist"):
        scores(model, PAIRS, metrics=[f"lm_eval:{tmp_path}/absent.yaml"])


def test_retention_is_the_divergence_from_the_base(model: ModelConfig, inputs: Path) -> None:
    base = ModelConfig(path=str(inputs / "base"))
    tokenizer = load_tokenizer(base)
    split = rows(base, [("a text", "that is general"), ("b", "another one")])
    old, new = runner_of(base, tokenizer), runner_of(model, tokenizer)
    found = retention(new, old, split)
    kl = loss = count = 0.0
    for i in range(2):
        ids, mask = (torch.from_numpy(array.copy()) for array in split.example(i))
        keep = mask[1:]
        with torch.no_grad():
            p, q = (
                one.model(ids[None].long()).logits[0, :-1].log_softmax(-1) for one in (old, new)
            )
        kl += float((p.exp() * (p - q)).sum(-1)[keep].sum())
        loss -= float(q.gather(1, ids[1:, None].long())[:, 0][keep].sum())
        count += int(keep.sum())
    assert found["retention_kl"].value == pytest.approx(kl / count, rel=1e-4)
    assert found["retention_kl"].value > 0.01
    assert found["retention_loss"].value == pytest.approx(loss / count, rel=1e-5)
    assert retention(old, old, split)["retention_kl"].value == pytest.approx(0, abs=1e-7)


def test_vllm_is_refused_where_it_is_not() -> None:
    assert choose_backend("auto") == "transformers"
    with pytest.raises(ConfigError, match=r"promote\.generation=vllm needs a GPU"):
        choose_backend("vllm")


def test_the_chat_template_of_training_is_that_of_evaluation(inputs: Path, tmp_path: Path) -> None:
    """What is continued is what the template writes to prompt the assistant, token by token."""
    model = ModelConfig(path=str(inputs / "base"))
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [
        [{"role": "user", "content": f"say {c}"}, {"role": "assistant", "content": c * 2}]
        for c in "abcd"
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    source = SourceConfig(path=str(file), format="messages")
    data = DataConfig(train=source, validation=0.5, test=source)
    prepared = prepare_data(data, tokenizer, 0, tmp_path / "cache")
    assert prepared.test is not None
    for i, each in enumerate(turns):
        rendered = tokenizer.apply_chat_template(
            each[:1], tokenize=True, add_generation_prompt=True, return_dict=True
        )
        prompt = prompt_of(prepared.test, i)
        assert list(prompt.ids) == rendered["input_ids"]
        assert tokenizer.decode(prompt.reference).startswith(each[1]["content"])
    # And the template goes along with the model.
    save_tokenizer(tokenizer, tmp_path / "model", prepared.report)
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved.chat_template == tokenizer.chat_template


def test_an_answer_ends_with_what_ended_trained_turns(tmp_path: Path) -> None:
    """The tokenizer's EOS is another token than the one that the template writes behind a turn."""
    model = ModelConfig(path="builtin:tiny")
    tokenizer = load_tokenizer(model)
    end = tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.bos_token
    assert isinstance(end, int)
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "aa"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    source = SourceConfig(path=str(file), format="messages", chat_template=str(template))
    data = DataConfig(train=source, validation=source)
    report = prepare_data(data, tokenizer, 0, tmp_path / "cache").report
    assert report.turn_ends == ["</s>"]
    ends = stop_tokens(tokenizer, model, report)
    assert set(ends) == {end, tokenizer.eos_token_id}
    assert until([5, end, 7], ends) == [5]
    target = tmp_path / "model"
    target.mkdir()
    (target / "generation_config.json").write_text('{"eos_token_id": 77}')
    save_tokenizer(tokenizer, target, report)
    saved = GenerationConfig.from_pretrained(target)
    assert saved.eos_token_id == [77, tokenizer.eos_token_id, end]
    assert AutoTokenizer.from_pretrained(target).chat_template == template.read_text()
