"""Checks over several keys of the data section. They refuse and never rewrite."""

from __future__ import annotations

from collections import Counter

from raytune_ft.config.data import DataConfig, MixedSource, NamedSource, SourceConfig, listed
from raytune_ft.config.explain import shown_value
from raytune_ft.errors import ConfigError

SPLITS = ("train", "validation", "test")


def check_data(data: DataConfig) -> None:
    """Every rule over sources, mixture and curriculum. Raises ConfigError."""
    for split in SPLITS:
        _check_names(split, getattr(data, split))
    _check_shares(data)
    curriculum = data.curriculum
    if curriculum is not None and (curriculum.by == "column") != (curriculum.column is not None):
        raise ConfigError(
            f"data.curriculum.column={shown_value(curriculum.column)}",
            f"does not go with data.curriculum.by={curriculum.by}",
            "write by: column and the column's name, or neither",
        )


def check_apart(data: DataConfig) -> None:
    """What is chosen on is not what is measured in the end. Raises ConfigError."""
    measured = [_content(source) for source in listed(data.test)]
    for split in ("validation", "train"):
        for source in listed(getattr(data, split)):
            if _content(source) in measured:
                raise ConfigError(
                    f"data.test={shown_value(source.path)}",
                    f"is data.{split} too, and selecting on the test set is refused",
                    "write another source, or none",
                )


def _content(source: SourceConfig) -> dict[str, object]:
    return source.model_dump(include=set(SourceConfig.model_fields))


def _check_names(split: str, written: object) -> None:
    if not isinstance(written, list):
        return
    if not written:
        raise ConfigError(f"data.{split}=[]", "names no source", "write at least one")
    named = [source for source in written if isinstance(source, NamedSource)]
    name, count = Counter(source.called for source in named).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"data.{split}: {name}",
            f"is the name of {count} sources",
            f"write a name of its own for each, for example name: {name}-2",
        )


def _check_shares(data: DataConfig) -> None:
    sources = data.train if isinstance(data.train, list) else []
    weights = [source.weight for source in sources]
    epochs = [source.epochs for source in sources]
    mixture = data.mixture
    if mixture is not None and len(sources) < 2:
        raise ConfigError(
            f"data.mixture={shown_value(mixture.model_dump())}",
            "is of several sources, and data.train has one",
            "delete data.mixture, or write a list of sources",
        )
    has_weights, has_epochs = (
        any(w is not None for w in weights),
        any(e is not None for e in epochs),
    )
    if has_weights and has_epochs:
        _refuse_both(sources)
    if has_weights and None in weights:
        name = sources[weights.index(None)].called
        raise ConfigError(
            f"data.train.{name}",
            "has no weight, and other sources have",
            "write one for every source, 0 for one that is measured and not trained on",
        )
    for key, shares in (("weight", weights), ("epochs", epochs)):
        if shares and all(share == 0 for share in shares):
            raise ConfigError(
                f"data.train: {key}=0 of every source",
                "leaves nothing to train on",
                f"write a {key} above 0 for at least one",
            )
    if mixture is None:
        return
    written = "weight" if has_weights else "epochs" if has_epochs else None
    if mixture.temperature is not None and written:
        raise ConfigError(
            f"data.mixture.temperature={mixture.temperature:g}",
            f"decides on shares, and so does {written} of data.train",
            "write one of the two",
        )
    if mixture.examples != "total" and has_epochs:
        raise ConfigError(
            f"data.mixture.examples={mixture.examples}",
            "decides on the length of a pass, and so do the epochs of data.train",
            "write weights, or delete data.mixture.examples",
        )


def _refuse_both(sources: list[MixedSource]) -> None:
    one = next(source for source in sources if source.epochs is not None)
    other = next(source for source in sources if source.weight is not None)
    raise ConfigError(
        f"data.train.{one.called}.epochs={one.epochs:g}",
        f"does not go with data.train.{other.called}.weight={other.weight:g}",
        "write weights for all sources or epochs, not both",
    )
