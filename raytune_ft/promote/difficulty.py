"""How hard the base finds each training example, for `data.curriculum.by: base_loss`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from raytune_ft.config.schema import Config
from raytune_ft.data.base_loss import with_base_loss
from raytune_ft.data.order import Numbers
from raytune_ft.data.prepare import PreparedData
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.evaluate.context import engine_of
from raytune_ft.evaluate.token_scores import forced
from raytune_ft.model.load import load_tokenizer
from raytune_ft.promote.lineage import base_file_hashes


def rated(config: Config, data: PreparedData, tell: Callable[[str], None]) -> PreparedData:
    """The data with the losses that the curriculum goes by, where it goes by any.

    They are measured in this process, once for all runs over these data and this base.

    Raises:
        ModelError: the base cannot be loaded.
        StorageError: the losses cannot be kept.
    """
    curriculum, model = config.data.curriculum, config.model
    if curriculum is None or curriculum.by != "base_loss":
        return data

    def measure(split: TokenizedSplit) -> Numbers:
        tell(f"data.curriculum: the base's loss on {len(split):,} training examples")
        seen = forced(engine_of(model, load_tokenizer(model)), split)
        return seen.losses / seen.tokens

    facts = [model.path, model.revision] if not (files := base_file_hashes(model)) else files
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return with_base_loss(data, digest, measure)
