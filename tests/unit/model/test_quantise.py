"""When bitsandbytes is imported, and what is said where it is needed and absent."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from raytune_ft.config.methods import QloraMethod
from raytune_ft.config.schema import Config
from raytune_ft.errors import ModelError
from raytune_ft.model.quantise import check_backend, skip_unused_bitsandbytes


def config(method: str, **search: object) -> Config:
    data = {"train": {"path": "rows.jsonl"}}
    return Config.model_validate(
        {"name": "run", "data": data, "method": {"name": method}, **search}
    )


def test_bitsandbytes_is_importable_only_for_a_base_in_4_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    skip_unused_bitsandbytes(config("lora"))
    with pytest.raises(ImportError):
        importlib.import_module("bitsandbytes")
    skip_unused_bitsandbytes(config("qlora"))
    assert "bitsandbytes" not in sys.modules
    skip_unused_bitsandbytes(config("lora"))
    space = {"method.name": {"choice": ["lora", "qlora"]}}
    skip_unused_bitsandbytes(config("lora", search={"trials": 4, "space": space}))
    assert "bitsandbytes" not in sys.modules
    loaded = ModuleType("bitsandbytes")
    monkeypatch.setitem(sys.modules, "bitsandbytes", loaded)
    skip_unused_bitsandbytes(config("lora"))
    assert sys.modules["bitsandbytes"] is loaded  # it may be in use


def test_without_bitsandbytes_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytune_ft.model.quantise.find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"not installed here; pip install 'raytune-ft\[quantize\]'"
    ):
        check_backend(QloraMethod(name="qlora"))
