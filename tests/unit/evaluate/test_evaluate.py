"""Metrics of a model directory against Hugging Face's own loss and generate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_ft.config.data import source_configs
from raytune_ft.config.objectives import TOKEN_FIGURES
from raytune_ft.config.schema import ModelConfig, PromoteConfig
from raytune_ft.data.processes import Made
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.data.tokenise import Work
from raytune_ft.evaluate.context import Subject, prompt_of, runner_of
from raytune_ft.evaluate.evaluate import evaluate_directory, measure
from raytune_ft.evaluate.workers import ThisProcess
from raytune_ft.model.load import load_tokenizer
from raytune_ft.promote.promote import promote
from raytune_ft.records import Tell
from raytune_ft.train.evaluation import evaluate
from tests.support.trained import TEST, config_of


def random_split(count: int, seed: int) -> TokenizedSplit:
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(rng.integers(4, 20))
        mask = np.arange(length) >= rng.integers(1, length)
        examples.append((rng.integers(0, 96, length).astype(np.int32), mask))
    return TokenizedSplit.from_examples(examples)


def figures(model: ModelConfig, split: TokenizedSplit) -> dict[str, float]:
    subject = Subject(model, load_tokenizer(model), split, split, PromoteConfig())
    return {name: scores.value for name, scores in measure(subject).items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_the_metrics_are_those_of_a_plain_loop(inputs: Path, weighted: bool) -> None:
    model = ModelConfig(path=str(inputs / "base"))
    split = random_split(25, 0)
    weights = np.arange(25) % 3 if weighted else np.ones(25)
    if weighted:
        split = replace(split, columns={"weight": weights[:, None].astype(np.float32)})
    found = figures(model, split)
    reference = AutoModelForCausalLM.from_pretrained(inputs / "base").eval()
    loss = counted = right = labels = exact = 0.0
    for i in range(len(split)):
        ids, mask = (torch.from_numpy(array.copy()) for array in split.example(i))
        targets = torch.where(mask, ids.long(), -100)
        with torch.no_grad():
            output = reference(ids[None].long(), labels=targets[None])
        count = int((targets[1:] != -100).sum())
        hits = output.logits[0, :-1].argmax(-1)[targets[1:] != -100] == targets[targets != -100]
        loss += weights[i] * output.loss.item() * count
        counted += weights[i] * count
        labels += count
        right += int(hits.sum())
        exact += bool(hits.all())
    assert found["eval_loss"] == pytest.approx(loss / counted, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss / counted), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(right / labels)
    assert found["exact_match"] == pytest.approx(exact / len(split))
    in_training = evaluate(runner_of(model, load_tokenizer(model)), split).figures
    for figure in TOKEN_FIGURES:
        if figure.trained:
            assert found[figure.promoted] == pytest.approx(in_training[figure.name]), figure


def test_exact_match_is_what_greedy_decoding_reproduces(run_dir: Path) -> None:
    """Compared example by example, with a model that is right on some of them only."""
    promoted = promote(run_dir, samples=0).model
    config = config_of(run_dir)
    model = ModelConfig(path=str(promoted))
    tokenizer = load_tokenizer(model)
    rows = []
    for text in ("say a\naa", "say b\nbb", "say c\ncd", "tell a\naa", "xyz\naa", "say hh\nhh"):
        ids = np.array([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], np.int32)
        rows.append((ids, np.arange(len(ids)) >= text.index("\n") + 1))
    split = TokenizedSplit.from_examples(rows)
    plain = AutoModelForCausalLM.from_pretrained(promoted).eval()
    reproduced = []
    for prompt in (prompt_of(split, i) for i in range(len(split))):
        prompt_BS = torch.tensor([prompt.ids])
        generated = plain.generate(
            prompt_BS,
            attention_mask=torch.ones_like(prompt_BS),
            max_new_tokens=len(prompt.reference),
            do_sample=False,
        )
        reproduced.append(tuple(generated[0, len(prompt.ids) :].tolist()) == prompt.reference)
    assert reproduced[:3] == [True, True, False]
    assert figures(model, split)["exact_match"] == sum(reproduced) / 6
    # And `evaluate MODEL_DIR` gives the figures of the promotion.
    name, count, metrics = evaluate_directory(promoted, config, run_dir.parent / "cache")
    assert (name, count) == ("test", TEST)
    assert metrics["eval_loss"] == pytest.approx(
        promote(run_dir, again=True, samples=0).evaluation.promoted["eval_loss"], rel=1e-6
    )


@dataclass(frozen=True)
class Recording(ThisProcess):
    """Remembers for what parts of the tokens were made."""

    made: list[str] = field(default_factory=list)

    def tokenise(self, work: Work, numbers: Sequence[int], tell: Tell) -> Made:
        self.made.extend(opened.label for opened, _ in work.sources)
        return super().tokenise(work, numbers, tell)


def test_workers_tokenise_the_data_and_the_retention(run_dir: Path, tmp_path: Path) -> None:
    config = config_of(run_dir)
    retention = config.promote.model_copy(update={"retention": config.data.test})
    workers = Recording(config.parallel)
    evaluate_directory(
        Path(config.model.path),
        config.model_copy(update={"promote": retention}),
        tmp_path,
        workers,
    )
    own = list(map("data.{}".format, source_configs(config.data)))
    assert workers.made == [*own, "data.train", "data.validation"]
    again = Recording(config.parallel)
    promote(run_dir, samples=0, workers_of=lambda config: again)
    assert again.made == own


def test_prompts_end_where_labels_begin() -> None:
    split = TokenizedSplit.from_examples(
        [
            (np.array([5, 6, 7], np.int32), np.array([True, True, True])),  # nothing to continue
            (np.array([1, 2, 3, 4, 9, 8], np.int32), np.array([0, 0, 1, 1, 0, 1], np.bool_)),
            (np.array([1, 2, 3], np.int32), np.array([0, 0, 1], np.bool_)),
        ]
    )
    nothing, first, second = (prompt_of(split, i) for i in range(3))
    assert (nothing.ids, nothing.reference) == ((), (5, 6, 7))
    assert (first.ids, first.reference) == ((1, 2), (3, 4))
    assert (second.ids, second.reference) == ((1, 2), (3,))
