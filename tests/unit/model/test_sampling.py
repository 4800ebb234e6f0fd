"""Completions are those of the probabilities, and a row is what it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from raytune_ft.config.sampling import SamplingConfig
from raytune_ft.model import sampling
from raytune_ft.model.load import set_up
from raytune_ft.model.sampling import (
    Request,
    Requests,
    Said,
    choose,
    numbers_of,
    probabilities,
    sample,
    sample_groups,
)
from tests.support.families import save_tiny_family
from tests.support.models import VOCABULARY, save_tiny, save_tiny_llama, true_float64

T1 = SamplingConfig(temperature=1.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _loaded(save_tiny_llama(tmp_path_factory.mktemp("llama")))


def _loaded(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def _prompts(count: int, seed: int = 0, lengths: tuple[int, int] = (1, 24)) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCABULARY, int(rng.integers(*lengths))).tolist() for _ in range(count)]


def test_draws_follow_the_softmax() -> None:
    torch.manual_seed(0)
    logits_V = torch.randn(50) * 2
    draws = 100_000
    numbers_B = torch.from_numpy(np.random.default_rng(0).random(draws))
    hot = SamplingConfig(temperature=1.3)
    tokens_B, _ = choose(logits_V.expand(draws, -1), numbers_B, hot)
    expected_V = (logits_V.double() / 1.3).softmax(-1).numpy() * draws
    found_V = np.bincount(tokens_B.numpy(), minlength=50)
    assert stats.chisquare(found_V, expected_V).pvalue > 1e-3


@pytest.mark.parametrize(
    ("settings", "support"),
    [
        (SamplingConfig(top_k=3), {0, 1, 2}),
        (SamplingConfig(top_p=0.79), {0, 1}),
        (SamplingConfig(top_p=0.81), {0, 1, 2}),
        (SamplingConfig(min_p=0.21), {0, 1, 2}),
        (SamplingConfig(min_p=0.15), {0, 1, 2, 3}),
        (SamplingConfig(top_k=4, top_p=0.85, min_p=0.5), {0, 1}),
        (SamplingConfig(temperature=0.0), {0}),
    ],
)
def test_filters_leave_what_they_say(settings: SamplingConfig, support: set[int]) -> None:
    shares_V = torch.tensor([0.5, 0.3, 0.12, 0.08, 0.0]).clamp(min=1e-9)
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    numbers_B = torch.linspace(0, 1, 5001, dtype=torch.float64)[:-1]
    logits_BV = shares_V[shuffled].log().expand(len(numbers_B), -1)
    tokens_B, _ = choose(logits_BV, numbers_B, settings)
    assert {int(shuffled[token]) for token in tokens_B.unique()} == support
    if settings.temperature > 0:
        kept = probabilities(logits_BV[:1], settings)[0]
        assert {int(shuffled[i]) for i in kept.nonzero()} == support


def test_numbers_at_the_ends_take_tokens_that_have_a_probability() -> None:
    logits_BV = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]]).expand(2, -1)
    numbers_B = torch.tensor([0.0, np.nextafter(1, 0)], dtype=torch.float64)
    tokens_B, near_B = choose(logits_BV, numbers_B, T1)
    assert tokens_B.tolist() == [1, 2]
    assert near_B[1]


def _wave(model: Any, requests: list[Request], **changes: Any) -> list[Said]:
    given: dict[str, Any] = {"settings": T1, "ends": [1], "seed": 5} | changes
    return sample(model, requests, 24, **given)


def test_groups_of_different_sizes_are_what_each_says_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five models that happen to be the same one; one of them is asked nothing."""
    with true_float64():
        model = _loaded(save_tiny("llama", tmp_path), torch.float64)
        prompts = _prompts(12)
        asked = [
            Requests([Request(ids, place) for place, ids in enumerate(prompts)], 12, seed=5),
            Requests([Request(prompts[0], 3, sample) for sample in range(4)], 24, seed=5),
            Requests([], 24),
            Requests([Request(prompts[7])], 3, seed=6),
            Requests([Request(ids, place) for place, ids in enumerate(prompts)], 12, seed=7),
        ]
        given: dict[str, Any] = {"settings": T1, "ends": [1, *range(20, 40)]}
        alone = [sample_groups(model, [each], **given)[0] for each in asked]
        together = sample_groups(model, asked, **given)
        monkeypatch.setattr(sampling, "BATCH_TOKENS", {"cpu": 300})
        in_small_batches = sample_groups(model, asked, **given)
    assert [len(one) for one in together] == [12, 4, 0, 1, 12]
    assert together == alone
    assert in_small_batches == alone
    assert {said.ended for said in together[0]} == {True, False}


def test_models_with_as_many_rows_over_fewer_prompts(tmp_path: Path) -> None:
    with true_float64():
        model = _loaded(save_tiny("llama", tmp_path), torch.float64)
        prompts = _prompts(4, lengths=(9, 10))
        each = [Request(ids, place) for place, ids in enumerate(prompts)]
        twice = [Request(prompts[p], p, sample) for p in range(2) for sample in range(2)]
        asked = [Requests(each, 12), Requests(twice, 12)]
        alone = [sample_groups(model, [one], settings=T1)[0] for one in asked]
        assert sample_groups(model, asked, settings=T1) == alone


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_a_row_alone_is_the_row_among_others(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with true_float64():
        model = _loaded(save_tiny(family, tmp_path), torch.float64)
        set_up(model, "float64")
        requests = [Request(ids, place) for place, ids in enumerate(_prompts(64))]
        together = _wave(model, requests)
        alone = [_wave(model, [requests[i]])[0] for i in (0, 17, 63)]
        monkeypatch.setattr(sampling, "BATCH_TOKENS", {"cpu": 300})
        in_small_batches = _wave(model, requests[::-1])[::-1]
    assert alone == [together[i] for i in (0, 17, 63)]
    assert in_small_batches == together
    assert len({said.ids for said in together}) > 60
    assert any(said.ended for said in together)


def test_in_float32_rows_differ_after_near_ties_alone(llama: Any) -> None:
    requests = [Request(ids, place) for place, ids in enumerate(_prompts(64))]
    together = _wave(llama, requests)
    for i, request in enumerate(requests):
        alone = _wave(llama, [request])[0]
        assert alone.ids == together[i].ids or together[i].near_ties + alone.near_ties > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_samples_that_share_a_pass_are_those_of_passes_of_their_own(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with true_float64():
        model = _loaded(save_tiny(family, tmp_path), torch.float64)
        requests = [
            Request(ids, place, number)
            for place, ids in enumerate(_prompts(5))
            for number in range(4)
        ]
        read = []
        model.register_forward_pre_hook(
            lambda module, arguments, options: read.append(options["input_ids"].shape),
            with_kwargs=True,
        )
        shared = _wave(model, requests)
        assert read[0][0] == 5
        monkeypatch.setattr(sampling, "_is_indexed", lambda base: False)
        assert _wave(model, requests) == shared


def test_samples_of_a_prompt_differ_and_come_again(llama: Any) -> None:
    requests = [Request([5, 6, 7], 3, number) for number in range(8)]
    first, again = _wave(llama, requests), _wave(llama, requests)
    assert len({said.ids for said in first}) == 8
    assert first == again
    assert first != _wave(llama, requests, seed=6)
    assert first != _wave(llama, [Request(one.prompt, 4, one.sample) for one in requests])


def test_the_numbers_of_a_token_do_not_depend_on_the_limit() -> None:
    request = Request([2], 3, 1)
    assert np.array_equal(numbers_of(0, request, 10), numbers_of(0, request, 99)[:10])


# Sliding windows, recurrent states, a bias instead of positions, a cache with states of its own.
KINDS = ["llama", "gemma3_text", "gpt2", "mamba", "falcon_h1", "bloom", "deepseek_v4"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_greedy_is_that_of_generate(kind: str, tmp_path: Path) -> None:
    model = _loaded(save_tiny_family(kind, tmp_path))
    prompts = _prompts(6, lengths=(4, 10))
    prompts[0] = [7] * 9
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=12, eos_token_id=[1, 40], pad_token_id=1
    )
    ids_BS, mask_BS = sampling._padded(prompts, 1, torch.device("cpu"))
    made_BS = model.generate(input_ids=ids_BS, attention_mask=mask_BS)[:, 9:]
    said = sample(model, [Request(ids) for ids in prompts], 12, ends=[1, 40], pad=1)
    assert [one.ids for one in said] == [_cut(row, (1, 40)) for row in made_BS]


def _cut(row_L: Tensor, ends: tuple[int, ...]) -> tuple[int, ...]:
    ids = row_L.tolist()
    stop = next((i + 1 for i, one in enumerate(ids) if one in ends), len(ids))
    return tuple(ids[:stop])


def test_ended_and_truncated_are_told_apart(llama: Any) -> None:
    prompt = [5, 6, 7]
    free = sample(llama, [Request(prompt)], 6)[0]
    assert len(free.ids) == 6
    assert not free.ended
    second, last = free.ids[1], free.ids[5]
    # Several end tokens; one that comes first ends the row, and is its last token.
    first_of = min(free.ids.index(second), free.ids.index(last))
    said = sample(llama, [Request(prompt)], 6, ends=[second, last])[0]
    assert said.ended
    assert said.ids == free.ids[: first_of + 1]
    assert said.answer == free.ids[:first_of]
    # An end token that is the very last one within the limit has ended the row; padding that
    # equals the end token is not mistaken for one.
    at = free.ids.index(last)
    said = sample(llama, [Request(prompt)], at + 1, ends=[last], pad=last)[0]
    assert said.ended
    cut = sample(llama, [Request(prompt)], at, ends=[last], pad=last)[0] if at else said
    assert not cut.ended or at == 0


def test_positions_limit_a_row(llama: Any) -> None:
    said = sample(llama, [Request([5] * 250), Request([5] * 256), Request([])], 24)
    assert [len(one.ids) for one in said] == [6, 0, 24]
