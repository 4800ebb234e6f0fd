"""Which runs can share one process and one base with others."""

from __future__ import annotations

from raytune_ft.config.schema import Config, LoraMethod


def packable(config: Config) -> str | None:
    """None where runs like this one can be trained packed, else the reason why not."""
    method = config.method
    if not isinstance(method, LoraMethod):
        return f"method.name={method.name} moves the weights that packed runs share"
    if method.dora:
        return "method.dora=true normalises by the weights of each run's own sum"
    if method.dropout > 0:
        return f"method.dropout={method.dropout} draws noise that depends on the layout"
    return None
