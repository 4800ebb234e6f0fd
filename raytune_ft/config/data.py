"""The `data` section: what is trained on and measured on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_ft.config.section import Section


class SourceConfig(Section):
    """Where rows come from and which of their columns make an example."""

    path: str = Field(
        min_length=1,
        description=".jsonl, .json, .csv, .tsv, .parquet, .txt (a line is a row), a folder saved "
        "by datasets, or a hub id",
    )
    format: Literal["prompt_completion", "messages", "text", "classification", "rationale"] = (
        "prompt_completion"
    )
    prompt: str = Field(
        "prompt", description="column of the prompt, for prompt_completion and rationale"
    )
    completion: str = Field("completion", description="column of the completion, likewise")
    rationale: str = Field("rationale", description="column of the reasons, for rationale")
    rationale_until: str | None = Field(
        None,
        description="rationale: a regular expression in place of that column; what stands before "
        "its last match in the completion is the rationale, what follows it the answer",
    )
    messages: str = Field("messages", description="column of the chat turns, for messages")
    tools: str | None = Field(
        None, description="messages: column of the tools that the chat template is given"
    )
    train_on: Annotated[list[str], Field(min_length=1)] = Field(
        ["assistant"], description="messages: roles whose turns carry loss"
    )
    text: str = Field("text", description="column of the document, for text and classification")
    text_pair: str | None = Field(
        None, description="classification: column of a second text, such as a hypothesis"
    )
    label: str = Field(
        "label",
        description="classification: column of the label, of a list of labels, or of numbers",
    )
    rows: Literal["lines", "file"] = Field(
        "lines", description="of a .txt file: each line, or the file as one document"
    )
    weight: str | None = Field(
        None, description="column of a number of at least 0 by which an example counts"
    )
    split: str | None = Field(None, description="split of a hub or saved data set, such as train")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    columns: list[str] | None = Field(
        None, description="column names of a .csv or .tsv file without a header line"
    )


class ChunkConfig(Section):
    """Documents over `data.max_length` are cut into several examples, and none of it is lost."""

    overlap: Annotated[int, Field(ge=0)] = Field(
        0,
        description="tokens of the chunk before that a chunk begins with, to be seen and not "
        "learnt again",
    )


class DataConfig(Section):
    """What is trained on, what is measured on, and how rows become tokens."""

    train: SourceConfig
    validation: Annotated[float, Field(gt=0, lt=1)] | SourceConfig = Field(
        0.05, description="a fraction of train, drawn once by seed, or a source like train"
    )
    test: SourceConfig | None = Field(None, description="measured by promotion alone, once")
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="tokens of one example")
    separator: str = Field("\n", description="between prompt and completion")
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="what happens to rows over max_length; truncate cuts the end"
    )
    chunk: ChunkConfig | None = Field(
        None, description="format: text; cut long documents into chunks, which clm does by itself"
    )
    problem: Literal["single_label", "multi_label", "regression"] = Field(
        "single_label", description="classification: one label a row, any number, or numbers"
    )
    labels: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="classification: the labels in their order; null sorts those of train"
    )
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="more unusable rows than this and the run refuses to start"
    )
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="several examples to a row; auto packs where a probe of the built model "
        "shows that it changes nothing, true refuses where it would",
    )
