"""A reward model scores as plain transformers does, and as it did in its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from raytune_ft.config.rewards import RewardModel
from raytune_ft.errors import ConfigError
from raytune_ft.files import read_json
from raytune_ft.rewards.base import Broken, Group, Score, Working
from raytune_ft.rewards.model import of_model
from raytune_ft.rewards.pool import started
from tests.support.models import VOCABULARY, save_character_tokenizer


def configured(path: Path, **keys: Any) -> RewardModel:
    return RewardModel.model_validate({"name": "model", "label": "rm", "path": str(path), **keys})


def group(prompt: Any, *completions: str) -> Group:
    turns = prompt if isinstance(prompt, list) else None
    text = None if turns else prompt
    ids = [[1]] * len(completions)
    return Group("r:1", str(prompt).strip(), "", completions, ids, {}, turns, text)


def numbers(config: RewardModel, *groups: Group) -> list[Any]:
    scores = of_model(config).scores(groups)
    return [one for one in scores if not isinstance(one, Working)]


def test_scores_are_those_of_transformers_and_of_training(
    reward_run: Path, preferences: Path
) -> None:
    path = reward_run / "promoted" / "model"
    rows = [json.loads(line) for line in (preferences / "pairs_test.jsonl").open()]
    groups = []
    for row in rows:
        answers = (row["chosen"], row["rejected"])
        texts = [one if isinstance(one, str) else one[0]["content"] for one in answers]
        groups.append(group(row["prompt"], *texts))
    with started([configured(path, batch_tokens=100)]) as rewards:
        found = [[one["rm"] for one in each] for each in rewards.score(groups)]
    assert torch.tensor(found).std() > 0.1

    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for row, (chosen, rejected) in zip(rows, found, strict=True):
        for answer, score in ((row["chosen"], chosen), (row["rejected"], rejected)):
            if isinstance(answer, str):
                ids = [
                    *tokenizer(row["prompt"] + "\n")["input_ids"],
                    *tokenizer(answer, add_special_tokens=False)["input_ids"],
                    tokenizer.eos_token_id,
                ]
            else:
                ids = tokenizer.apply_chat_template(
                    row["prompt"] + answer, tokenize=True, return_dict=False
                )
            plain = model(torch.tensor([ids])).logits.item()
            assert score == pytest.approx(plain, abs=1e-5)

    # The margins that promotion measured with the objective of the training.
    lines = [json.loads(line) for line in (reward_run / "promoted" / "scores.jsonl").open()]
    measured = [
        line["reward_margin"]
        for line in lines
        if line["split"] == "test" and line["candidate"] == "rm"
    ]
    assert [a - b for a, b in found] == pytest.approx(measured, abs=1e-5)


def test_what_cannot_be_read_has_no_score(reward_run: Path) -> None:
    config = configured(reward_run / "promoted" / "model", max_length=12)
    long, short, blank = numbers(config, group("say a", "a" * 20, "ab"), group("say a", ""))
    assert isinstance(long, Score)
    assert long.value is None
    assert long.why.startswith("too long: ")
    assert isinstance(short, float)
    assert isinstance(blank, float)  # as many tokens as the end of an answer has
    with started([config]) as rewards:
        assert [one["rm"] for one in rewards.score([group("say a", "a" * 20, "ab")])[0]] == [
            None,
            pytest.approx(short),
        ]
        assert rewards.processes[0].tally.missing == {"too long": 1}


def test_an_answer_does_not_depend_on_its_batch(reward_run: Path) -> None:
    path = reward_run / "promoted" / "model"
    texts = ["a" * n for n in range(1, 30)]
    together = numbers(configured(path), *(group("say a", text) for text in texts))
    alone = numbers(configured(path, batch_tokens=1), group("say a", *texts))
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_tokenizer_that_pads_with_its_end_token(tmp_path: Path) -> None:
    """transformers then reads the token before the end, in batches too."""
    path = _saved(tmp_path / "eos", LlamaForSequenceClassification, pad_token_id=1)
    scores = numbers(configured(path), group("say a", "ab", "abcdefgh"))
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for answer, score in zip(("ab", "abcdefgh"), scores, strict=True):
        ids = tokenizer(f"say a\n{answer}")["input_ids"] + [tokenizer.eos_token_id]
        assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)


def test_an_encoder_and_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
        initializer_range=0.3,
    )
    path = tmp_path / "bert"
    BertForSequenceClassification(config).eval().bfloat16().save_pretrained(path)
    save_character_tokenizer(path)
    short, long = numbers(configured(path, dtype="float32"), group("a", "b", "bcdefghij"))
    assert [short, long] == pytest.approx(
        [
            numbers(configured(path, dtype="float32"), group("a", text))[0]
            for text in ("b", "bcdefghij")
        ],
        abs=1e-5,
    )
    assert numbers(configured(path), group("a", "b"))[0] == pytest.approx(short, abs=0.05)


def _saved(path: Path, kind: Any, **keys: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.2,
        **{"num_labels": 1, **keys},
    )
    kind(config).save_pretrained(path)
    save_character_tokenizer(path)
    return path


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    classifier = _saved(tmp_path / "sms", LlamaForSequenceClassification, num_labels=3)
    _saved(tmp_path / "causal", LlamaForCausalLM)
    headless = _saved(tmp_path / "headless", LlamaForSequenceClassification)
    settings = read_json(headless / "config.json")
    base = AutoModelForCausalLM.from_pretrained(headless)
    base.model.save_pretrained(headless)
    (headless / "config.json").write_text(json.dumps(settings))
    pickled = _saved(tmp_path / "pickled", LlamaForSequenceClassification)
    (pickled / "model.safetensors").rename(tmp_path / "weights.safetensors")
    torch.save({}, pickled / "pytorch_model.bin")
    coded = _saved(tmp_path / "coded", LlamaForSequenceClassification)
    settings = read_json(coded / "config.json")
    map = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
    text = json.dumps({**settings, "model_type": "own", "auto_map": map})
    (coded / "config.json").write_text(text)
    train = "train one with train.objective: reward"
    for path, rule, remedy in (
        (classifier, "has 3 labels, and a reward is one number", train),
        (tmp_path / "causal", "has no head for whole answers, and so gives no reward", train),
        (headless, "has no score.weight in its files, and so no trained head", train),
        (pickled, "cannot be loaded", "write a model with safetensors weights"),
        (coded, "cannot be", "write a model"),
        (tmp_path / "nowhere", "does not exist", "write an existing model directory"),
    ):
        with pytest.raises(ConfigError) as raised:
            of_model(configured(path))
        assert raised.value.value == f"rewards.rm.path={path}"
        assert rule in raised.value.rule
        assert remedy in raised.value.remedy
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError) as told, started([configured(path)]):
        pass
    assert str(told.value) == str(raised.value)  # through the process of the reward


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    path = _saved(tmp_path / "plain", LlamaForSequenceClassification)
    chat = group([{"role": "user", "content": "a"}], "b")
    with pytest.raises(Broken, match="cannot read the prompts: needs a chat template"):
        numbers(configured(path), chat)
