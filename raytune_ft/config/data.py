"""The `data` section: what is trained on and measured on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field

from raytune_ft.config.section import NameIn, Positive, Section
from raytune_ft.format import some_of


@dataclass(frozen=True)
class Format:
    """How a source's rows are read.

    Attributes:
        implementation: loads the `data.formats.RowReader`: columns, checks, prompt and tokens.
        keys: keys of a source that other formats refuse.
        chat_template: the tokenizer's chat template writes the text of a row.
        documents: a row over `data.max_length` may be cut into chunks.
        labels: rows have labels, which become the targets of a classifier.
        partners: each example has a partner, its prompt with another answer.
        prompts: rows are prompts without an answer, and all of their columns are for rewards.
    """

    implementation: Callable[[], Any]
    keys: tuple[str, ...] = ()
    chat_template: bool = False
    documents: bool = False
    labels: bool = False
    partners: bool = False
    prompts: bool = False


def _prompt_completion() -> Any:
    from raytune_ft.data.formats.prompt_completion import PROMPT_COMPLETION

    return PROMPT_COMPLETION


def _chat() -> Any:
    from raytune_ft.data.formats.chat import CHAT

    return CHAT


def _auto() -> Any:
    raise AssertionError("`auto` becomes another format when the source is opened")


def _text() -> Any:
    from raytune_ft.data.formats.example import TEXT

    return TEXT


def _classification() -> Any:
    from raytune_ft.data.formats.classification import CLASSIFICATION

    return CLASSIFICATION


def _rationale() -> Any:
    from raytune_ft.data.formats.rationale import ANSWER_WITH_RATIONALE

    return ANSWER_WITH_RATIONALE


def _unpaired() -> Any:
    from raytune_ft.data.formats.unpaired import UNPAIRED

    return UNPAIRED


def _preference() -> Any:
    from raytune_ft.data.formats.preference import PREFERENCE

    return PREFERENCE


def _prompt() -> Any:
    from raytune_ft.data.formats.prompt import PROMPT

    return PROMPT


CHAT_TEMPLATES = ("chatml", "zephyr", "alpaca", "vicuna")
"""Chat templates of this package."""
CHAT_KEYS = ("tools", "train_on", "turns", "chat_template")

FORMATS: dict[str, Format] = {
    "prompt_completion": Format(_prompt_completion, keys=("tools", "turns", "chat_template")),
    "messages": Format(_chat, keys=CHAT_KEYS, chat_template=True),
    "sharegpt": Format(_chat, keys=CHAT_KEYS, chat_template=True),
    "alpaca": Format(_chat, keys=CHAT_KEYS, chat_template=True),
    "auto": Format(_auto, keys=CHAT_KEYS),
    "text": Format(_text, documents=True),
    "classification": Format(_classification, keys=("text_pair",), labels=True),
    "rationale": Format(_rationale, keys=("rationale_until",)),
    "preference": Format(_preference, keys=("tools", "chat_template", "margin")),
    "unpaired": Format(_unpaired, keys=("tools", "turns", "chat_template"), partners=True),
    "prompt": Format(_prompt, keys=("tools", "chat_template"), prompts=True),
}


Text = Annotated[str, Field(min_length=1)]


class SourceConfig(Section):
    """Where rows come from and which of their columns make an example."""

    path: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        description=".jsonl, .json, .csv, .tsv, .parquet or .txt (a line is a row), text also as "
        ".gz or .zst; a glob, a folder of such files, s3://bucket/prefix or another URL, or a list "
        "of these; a folder saved by datasets, or a hub id",
    )
    format: Annotated[str, NameIn(FORMATS)] = Field(
        "prompt_completion",
        description="how rows are read; auto finds it in the columns",
    )
    prompt: str = Field(
        "prompt",
        description="column of the prompt, for prompt, prompt_completion, rationale, preference "
        "and unpaired",
    )
    completion: str = Field(
        "completion",
        description="column of the completion, for prompt_completion, rationale and unpaired",
    )
    rationale: str = Field("rationale", description="column of the rationale, for rationale")
    rationale_until: str | None = Field(
        None,
        description="for rationale, a regular expression instead of that column: in the "
        "completion, the text before its last match is the rationale, the text after it the answer",
    )
    chosen: str = Field("chosen", description="for preference, column of the better answer")
    rejected: str = Field("rejected", description="for preference, column of the other answer")
    margin: str | None = Field(
        None,
        description="for preference, column of how much better the chosen answer is, a number that "
        "a reward model's margin has to exceed",
    )
    messages: str = Field(
        "messages",
        description="column of the chat turns, for messages and sharegpt (there `conversations` "
        "by default)",
    )
    tools: str | None = Field(
        "tools",
        description="for chats, column of the tools that the chat template gets, where a row has "
        "it; null leaves tools out",
    )
    train_on: Annotated[list[str], Field(min_length=1)] = Field(
        ["assistant"], description="for chats, the roles whose turns carry loss"
    )
    turns: Literal["auto", "all", "last", "split"] = Field(
        "auto",
        description="for chats, which turns are learnt where the chat template writes a turn "
        "differently once others follow (many cut its reasoning). auto: each as the model would be "
        "shown it, if need be in an example of its own; all: as the whole conversation has them; "
        "last: the last one; split: each in an example of its own",
    )
    chat_template: str | None = Field(
        None,
        description="for chats, a file with a Jinja template, or chatml, zephyr, alpaca or vicuna, "
        "in place of the tokenizer's; all sources share it, and the promoted model keeps it",
    )
    text: str = Field("text", description="column of the document, for text and classification")
    text_pair: str | None = Field(
        None, description="for classification, column of a second text, such as a hypothesis"
    )
    label: str = Field(
        "label",
        description="for classification, column of the label, of a list of labels, or of numbers; "
        "for unpaired, of true or false",
    )
    rows: Literal["lines", "file"] = Field(
        "lines", description="of a .txt file: each line is a row, or the whole file is one"
    )
    special_tokens: Literal["text", "control"] = Field(
        "text",
        description="what a special token is that a text of the rows spells: text, or the token "
        "itself, for rows that hold rendered prompts",
    )
    example_weight: str | None = Field(
        None, description="column of the example's weight in the loss, a number of at least 0"
    )
    split: str | None = Field(None, description="split of a hub or saved data set, such as train")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    revision: str | None = Field(
        None, description="commit, tag or branch of a hub data set; null is its newest commit"
    )
    columns: list[str] | None = Field(
        None, description="column names of a .csv or .tsv file without a header line"
    )

    @property
    def paths(self) -> list[str]:
        """Everything that `path` lists."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def shown(self) -> str:
        """`path` for messages: of a list, the first and how many others there are."""
        return some_of(self.paths, 1)


class ChunkConfig(Section):
    """Documents over `data.max_length` are cut into several examples, without dropping tokens."""

    overlap: Annotated[int, Field(ge=0)] = Field(
        0,
        description="tokens repeated from the previous chunk as context; they carry no loss",
    )


Share = Annotated[float, Field(ge=0)]


class NamedSource(SourceConfig):
    """One of several sources."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        description="name of the source in metrics; null is the name of its first file",
    )

    @property
    def called(self) -> str:
        """The written name, or that of the first path."""
        return self.name or name_of_path(self.paths[0])


class MixedSource(NamedSource):
    """One of several sources that are trained on together."""

    weight: Share | None = Field(
        None, description="its share of the mix is this over the sum of all weights"
    )
    epochs: Share | None = Field(
        None, description="how often a pass of the mix sees each of its examples; 1 by default"
    )


class MixtureConfig(Section):
    """How many examples of each source one pass of the mix holds."""

    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="a source of n examples has a share in proportion to n^(1/temperature): 1 "
        "keeps the proportions of the sources, a large value makes their shares equal",
    )
    examples: Literal["total", "shortest", "longest"] | Positive = Field(
        "total",
        description="length of one pass: total is the examples of all sources; shortest and "
        "longest end it when the first or the last source is used up; or a number",
    )


class CurriculumConfig(Section):
    """Which examples come first. Each source is ordered by itself, so that the mix is the same."""

    by: Literal["length", "column", "base_loss"] = Field(
        "length",
        description="what counts as difficult: many tokens, a high number in a column of the rows, "
        "or a high loss under the model before training",
    )
    column: str | None = Field(
        None, description="for by: column, the name of that column in every source"
    )
    order: Literal["easy_first", "hard_first"] = "easy_first"
    schedule: Literal["sort", "linear", "sqrt"] = Field(
        "sqrt",
        description="sort: every pass in order; linear and sqrt draw from a share of the examples "
        "that grows from start to all of them (arXiv 1903.09848)",
    )
    start: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="linear and sqrt: the share that the first step draws from"
    )
    until: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="linear and sqrt: the fraction of the run after which all are drawn from"
    )


class DataConfig(Section):
    """What is trained on, what is measured on, and how rows become tokens."""

    train: SourceConfig | list[MixedSource] = Field(
        description="a source, or a list of them that are trained on together"
    )
    validation: Annotated[float, Field(gt=0, lt=1)] | SourceConfig | list[NamedSource] = Field(
        0.05,
        description="a fraction of every source of train, drawn once by seed, or a source like "
        "train, or a list of them",
    )
    test: SourceConfig | list[NamedSource] | None = Field(
        None, description="a source or a list of them, which promotion measures once, at the end"
    )
    mixture: MixtureConfig | None = Field(
        None, description="how many examples of each source of train a pass holds"
    )
    curriculum: CurriculumConfig | None = Field(
        None, description="which examples of train come first; null shuffles them anew every epoch"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="most tokens of one example")
    separator: str = Field("\n", description="between prompt and completion")
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="what happens to rows over max_length; truncate cuts the end"
    )
    chunk: ChunkConfig | None = Field(
        None,
        description="for text, cut long documents into chunks; train.objective: clm always does",
    )
    problem: Literal["single_label", "multi_label", "regression"] = Field(
        "single_label",
        description="for classification: one label per row, any number of labels, or numbers",
    )
    labels: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="for classification, the labels in their order; null sorts those of train"
    )
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="largest share of unusable rows of a source with which the run starts"
    )
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="put several examples into one row; auto packs if a probe of the built model "
        "shows that its outputs stay the same, true refuses to start if they do not",
    )


def name_of_path(path: str) -> str:
    """The default name of a source: its file's name without the extension, or, of a glob such as
    `chats/*.jsonl`, that of the folder.
    """
    parts = (part.partition(".")[0] for part in reversed(PurePath(path).parts))
    names = (re.sub(r"[^A-Za-z0-9_-]+", "-", part).strip("-_") for part in parts)
    return next(filter(None, names), "source")


def called(items: Sequence[Any], name: str) -> dict[str, Any]:
    """The source of that name or number in a list as the file has it.

    Raises:
        KeyError: there is none; its argument lists the names that exist.
    """
    names = [
        str(item.get("name") or name_of_path(_first(item.get("path", ""))))
        if isinstance(item, dict)
        else ""
        for item in items
    ]
    numbered = [str(number) for number in range(len(items))]
    for keys in (names, numbered):
        if name in keys and isinstance(found := items[keys.index(name)], dict):
            return found
    raise KeyError(", ".join(filter(None, names)))


def _first(path: Any) -> str:
    return str(path[0]) if isinstance(path, list) and path else str(path)


def listed(sources: Any) -> Sequence[SourceConfig]:
    """The sources of a split; a fraction has none."""
    if isinstance(sources, SourceConfig):
        return [sources]
    return sources if isinstance(sources, list) else []


def source_configs(data: DataConfig) -> Mapping[str, SourceConfig]:
    """The sources that are read: `train`, or `train.NAME` where there are several."""
    found: dict[str, SourceConfig] = {}
    for split in ("train", "validation", "test"):
        written = getattr(data, split)
        for source in listed(written):
            name = f"{split}.{source.called}" if isinstance(source, NamedSource) else split
            found[name] = source
    return found


def source_names(data: DataConfig) -> tuple[str, ...]:
    """The names behind the numbers of the column `source`: those of train, then all others.

    Empty if no split has several sources.
    """
    several = [getattr(data, split) for split in ("train", "validation", "test")]
    if not any(isinstance(each, list) for each in several):
        return ()
    train = [name_of_path(data.train.paths[0])] if isinstance(data.train, SourceConfig) else []
    others = (each.called for some in several if isinstance(some, list) for each in some)
    return tuple(dict.fromkeys([*train, *others]))


def difficulty_column(data: DataConfig) -> str | None:
    """The column of the rows that the curriculum sorts by, if it does."""
    return data.curriculum.column if data.curriculum is not None else None


def chat_template_of(data: DataConfig) -> str | None:
    """The chat template that the sources name."""
    named = [source.chat_template for source in source_configs(data).values()]
    return next(filter(None, named), None)
