from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from raytune_ft.config.data import FORMATS, SourceConfig
from raytune_ft.data.formats import Encoder, Example, describe_example, encode_rows
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import DataError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say one é."},
    {"role": "assistant", "content": "one é"},
    {"role": "user", "content": "one é"},
    {"role": "assistant", "content": "again 日本"},
]


def encode(
    tokenizer: PreTrainedTokenizerBase, format: str, *values: dict[str, Any], separator: str = "\n"
) -> list[Example | BadRow]:
    rows = [Row(f"row {i}", value) for i, value in enumerate(values)]
    source = SourceConfig.model_validate({"path": "a.jsonl", "format": format})
    return list(encode_rows(Encoder.of(tokenizer), source, separator, rows))


def encode_one(
    tokenizer: PreTrainedTokenizerBase, format: str, value: dict[str, Any], separator: str = "\n"
) -> Example:
    (example,) = encode(tokenizer, format, value, separator=separator)
    assert isinstance(example, Example), example
    return example


def labels(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    text: str = tokenizer.decode(example.ids[example.mask].tolist())
    return text


def gsm8k(shared_dir: Path, count: int) -> list[dict[str, str]]:
    with (shared_dir / "data" / "gsm8k" / "train.jsonl").open() as file:
        rows = [json.loads(next(file)) for _ in range(count)]
    return [{"prompt": row["question"], "completion": row["answer"]} for row in rows]


@pytest.fixture(params=["tiny", "stories"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


def test_prompt_and_completion_meet_at_an_exact_boundary(
    tokenizer: PreTrainedTokenizerBase, shared_dir: Path
) -> None:
    rows = gsm8k(shared_dir, 200)
    for row, example in zip(rows, encode(tokenizer, "prompt_completion", *rows), strict=True):
        assert isinstance(example, Example)
        boundary = int(np.flatnonzero(example.mask)[0])
        assert not example.mask[:boundary].any()
        assert example.mask[boundary:].all()
        assert example.ids[0] == tokenizer.bos_token_id
        assert example.ids[-1] == tokenizer.eos_token_id
        assert example.ids[:boundary].tolist() == tokenizer(row["prompt"] + "\n")["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        assert example.ids[boundary:-1].tolist() == completion
        assert labels(tokenizer, example) == row["completion"] + tokenizer.eos_token


def test_the_separator_belongs_to_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "x", "completion": "y"}
    example = encode_one(tokenizer, "prompt_completion", row, separator=" ### ")
    assert labels(tokenizer, example) == "y" + tokenizer.eos_token
    context = tokenizer.decode(example.ids[~example.mask][1:].tolist())
    assert context == "x ### "


def test_all_of_a_text_carries_loss_but_its_first_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = encode_one(tokenizer, "text", {"text": "To be, or not"})
    assert example.ids[0] == tokenizer.bos_token_id
    assert example.mask.tolist() == [False] + [True] * (len(example.ids) - 1)
    assert labels(tokenizer, example) == "To be, or not" + tokenizer.eos_token


def test_without_bos_of_its_own_none_is_added(tiny: PreTrainedTokenizerBase) -> None:
    tiny.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    example = encode_one(tiny, "text", {"text": "To be"})
    assert example.ids[0] != tiny.bos_token_id
    assert not example.mask[0]
    assert example.mask[1:].all()


def test_an_eos_that_the_tokenizer_adds_itself_is_not_doubled(
    tiny: PreTrainedTokenizerBase,
) -> None:
    special = [("<s>", tiny.bos_token_id), ("</s>", tiny.eos_token_id)]
    tiny.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    assert tiny("a")["input_ids"][-1] == tiny.eos_token_id
    example = encode_one(tiny, "prompt_completion", {"prompt": "x", "completion": "y"})
    assert example.ids.tolist().count(tiny.eos_token_id) == 1
    assert example.ids.tolist().count(tiny.bos_token_id) == 1
    assert example.ids[-1] == tiny.eos_token_id


def test_a_tokenizer_without_eos_goes_without(tiny: PreTrainedTokenizerBase) -> None:
    tiny.eos_token = None
    example = encode_one(tiny, "prompt_completion", {"prompt": "x", "completion": "y"})
    assert labels(tiny, example) == "y"


def test_the_marked_template_gives_loss_to_assistant_turns_only(
    tiny: PreTrainedTokenizerBase,
) -> None:
    example = encode_one(tiny, "messages", {"messages": CHAT})
    assert example.ids.tolist() == tiny.apply_chat_template(CHAT)["input_ids"]
    assert labels(tiny, example) == "one é</s>again 日本</s>"
    assert example.ids.tolist().count(tiny.bos_token_id) == 1


def test_without_marks_the_same_tokens_are_found(tiny: PreTrainedTokenizerBase) -> None:
    marked = encode_one(tiny, "messages", {"messages": CHAT})
    tiny.chat_template = re.sub(r"\{%-? *(end)?generation *-?%\}\n", "", tiny.chat_template)
    assert "generation %}" not in tiny.chat_template
    unmarked = encode_one(tiny, "messages", {"messages": CHAT})
    assert unmarked.ids.tolist() == marked.ids.tolist()
    assert unmarked.mask.tolist() == marked.mask.tolist()


def test_an_ordinary_template_gives_loss_to_what_follows_its_header(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    example = encode_one(tokenizer, "messages", {"messages": CHAT})
    # stories260k, as SentencePiece once did, begins whatever follows a special token with a space.
    said = labels(tokenizer, example).replace("</s> ", "</s>")
    assert said == "one é</s>\nagain 日本</s>\n"
    assert example.ids.tolist() == tokenizer.apply_chat_template(CHAT)["input_ids"]


def test_a_prompt_that_opens_more_than_the_header_is_no_obstacle(
    tiny: PreTrainedTokenizerBase,
) -> None:
    tiny.chat_template = CHATML.replace("<|assistant|>\n", "<|assistant|>\n<think>")
    example = encode_one(tiny, "messages", {"messages": CHAT[:3]})
    assert labels(tiny, example) == "one é</s>\n"
    assert example.notes == ("longer_prompt",)


@pytest.mark.parametrize(
    ("turns", "learnt"),
    [
        ("auto", ["again 日本!</s>\n", "one é!</s>\n"]),
        ("split", ["one é!</s>\n", "again 日本!</s>\n"]),
        ("last", ["again 日本!</s>\n"]),
        ("all", ["one é</s>\nagain 日本!</s>\n"]),
    ],
)
def test_a_turn_that_is_rewritten_later_is_learnt_as_the_model_is_shown_it(
    tiny: PreTrainedTokenizerBase, turns: str, learnt: list[str]
) -> None:
    tiny.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' }}"
    )
    source = SourceConfig.model_validate({"path": "a", "format": "messages", "turns": turns})
    (example,) = encode_rows(Encoder.of(tiny), source, "\n", [Row("row 0", {"messages": CHAT})])
    assert isinstance(example, Example)
    assert [labels(tiny, one) for one in (example, *example.others)] == learnt
    assert ("own_example" in example.notes) == (turns in ("auto", "split"))


def test_without_a_chat_template_messages_are_refused(stories: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="does not have; write chat_template: chatml"):
        encode(stories, "messages", {"messages": CHAT})


def test_a_conversation_that_the_template_refuses_is_a_bad_row(
    tiny: PreTrainedTokenizerBase,
) -> None:
    odd = [{"role": "oracle", "content": "x"}, {"role": "assistant", "content": "y"}]
    bad, good = encode(tiny, "messages", {"messages": odd}, {"messages": CHAT})
    assert isinstance(bad, BadRow)
    assert (bad.origin, bad.cause) == ("row 0", "template")
    assert "unknown role: oracle" in bad.detail
    assert isinstance(good, Example)


def test_a_conversation_without_assistant_is_a_bad_row(tiny: PreTrainedTokenizerBase) -> None:
    (bad,) = encode(tiny, "messages", {"messages": CHAT[:2]})
    assert isinstance(bad, BadRow)
    assert bad.cause == "no_trained_turn"


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("", "empty"),
        (" \n", "empty"),
        (None, "empty"),
        (3, "wrong_type"),
        (["x"], "wrong_type"),
        ("half \ud800", "bad_encoding"),
    ],
)
@pytest.mark.parametrize("column", ["prompt", "completion", "text"])
def test_a_value_that_is_no_text_is_bad_and_leaves_the_others_in_place(
    tiny: PreTrainedTokenizerBase, column: str, value: Any, cause: str
) -> None:
    format = "text" if column == "text" else "prompt_completion"
    good = {"prompt": "x", "completion": "y", "text": "z"}
    first, bad, last = encode(tiny, format, good, good | {column: value}, good)
    assert isinstance(bad, BadRow)
    assert (bad.origin, bad.cause) == ("row 1", cause)
    assert isinstance(first, Example)
    assert isinstance(last, Example)
    assert (first.origin, last.origin) == ("row 0", "row 2")
    assert first.ids.tolist() == last.ids.tolist()


@pytest.mark.parametrize(
    ("turns", "cause"),
    [
        ([], "empty"),
        (None, "empty"),
        ("text", "wrong_type"),
        (["text"], "wrong_type"),
        ([{"role": "user"}], "empty"),
        ([{"from": "human", "value": "x"}], "wrong_type"),
        ([{"role": "user", "content": "\ud800"}], "bad_encoding"),
        ("\udcff", "bad_encoding"),
    ],
)
def test_messages_that_are_no_turns_are_bad(
    tiny: PreTrainedTokenizerBase, turns: Any, cause: str
) -> None:
    (bad,) = encode(tiny, "messages", {"messages": turns})
    assert isinstance(bad, BadRow)
    assert bad.cause == cause


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "auto"])
def test_no_format_labels_the_first_token(tiny: PreTrainedTokenizerBase, format: str) -> None:
    row: dict[str, Any] = {"prompt": "x", "completion": "y", "text": "z", "label": "l"}
    row["messages"] = CHAT
    row |= {"rationale": "r", "instruction": "x", "output": "y", "chosen": "c", "rejected": "d"}
    row["conversations"] = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    if format == "unpaired":
        row["label"] = True
    example = encode_one(tiny, format, row)
    assert example.ids.dtype == np.int32
    assert example.mask.dtype == np.bool_
    assert len(example.ids) == len(example.mask)
    assert not any(mask[0] for _, mask in example.sequences)
    assert example.mask.any() or example.labels == ("l",) or FORMATS[format].prompts


@pytest.mark.parametrize("format", ["prompt_completion", "messages"])
def test_a_described_example_is_the_whole_example(
    tiny: PreTrainedTokenizerBase, format: str
) -> None:
    row = {"prompt": "What é", "completion": "日本 it is", "messages": CHAT}
    example = encode_one(tiny, format, row)
    split = TokenizedSplit.from_examples([(example.ids, example.mask)])
    pieces = describe_example(split, 0, tiny)
    assert "".join(text for text, _ in pieces) == tiny.decode(example.ids.tolist())
    said = [text for text, is_label in pieces if is_label]
    expected = (
        ["日本 it is</s>"] if format == "prompt_completion" else ["one é</s>", "again 日本</s>"]
    )
    assert said == expected
