"""The `method` section: which weights move. One class per method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_ft.config.activations import ActivationMethod
from raytune_ft.config.section import Fraction, Positive, Section


class FullMethod(Section):
    """Every weight moves."""

    name: Literal["full"]


class LoraMethod(Section):
    """Low-rank adapters on a frozen base (arXiv 2106.09685), through PEFT."""

    name: Literal["lora"] = "lora"
    rank: Positive = Field(16, description="columns of A, rows of B")
    alpha: Annotated[float, Field(gt=0)] = Field(
        32.0, description="the delta is scaled by alpha / rank (alpha / sqrt(rank) with rslora)"
    )
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear, or endings of module names such as q_proj"
    )
    dropout: Fraction = Field(0.0, description="on the adapter's input")
    rslora: bool = Field(False, description="rank-stabilised scaling (arXiv 2312.03732)")
    dora: bool = Field(False, description="weight-decomposed LoRA (arXiv 2402.09353)")


MethodConfig = Annotated[FullMethod | LoraMethod | ActivationMethod, Field(discriminator="name")]
