"""The `sampling` section: how `raytune-ft sample` draws completions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raytune_ft.config.section import Positive, Section


class SamplingConfig(Section):
    """How completions are drawn. Nothing here changes what is trained."""

    n: Positive = Field(8, description="completions of each prompt")
    max_new_tokens: Positive = Field(256, description="longest completion")
    temperature: Annotated[float, Field(ge=0)] = Field(
        1.0, description="logits are divided by it; 0 takes the likeliest token"
    )
    top_k: Positive | None = Field(None, description="only this many of the likeliest tokens")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="only the likeliest tokens that together have this probability"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="only tokens with this share of the likeliest one's probability"
    )
