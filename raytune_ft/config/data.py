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
    format: Literal["prompt_completion", "messages", "text"] = "prompt_completion"
    prompt: str = Field("prompt", description="column of the prompt, for prompt_completion")
    completion: str = Field("completion", description="column of the completion, likewise")
    messages: str = Field("messages", description="column of the chat turns, for messages")
    text: str = Field("text", description="column of the document, for text")
    split: str | None = Field(None, description="split of a hub or saved data set, such as train")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    columns: list[str] | None = Field(
        None, description="column names of a .csv or .tsv file without a header line"
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
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="more unusable rows than this and the run refuses to start"
    )
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="several examples to a row; auto packs where a probe of the built model "
        "shows that it changes nothing, true refuses where it would",
    )
