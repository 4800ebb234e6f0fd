"""A trained run becomes a plain model directory with figures and a card, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ft import app
from raytune_ft.checkpoints.store import CheckpointFacts, CheckpointStore
from raytune_ft.config.load import apply_overrides, dump_yaml, load_config
from raytune_ft.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LockHeld,
    MergeError,
    StorageError,
)
from raytune_ft.evaluate.context import Continuation
from raytune_ft.evaluate.evaluate import Job, Measured, run_job, run_samples
from raytune_ft.locks import locked
from raytune_ft.promote import candidates
from raytune_ft.promote import promote as promote_module
from raytune_ft.promote.promote import Measurer, promote
from raytune_ft.report.write import write_report
from raytune_ft.strategy import Strategy
from tests.support.checkpoints import commit
from tests.support.trained import TEST, Train, write_rows


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def best_checkpoint(run: Path) -> Path:
    best = json.loads((run / "result.json").read_text())["best"]
    return run / str(best["checkpoint"])


def tamper_with_best(run: Path, scale: float) -> None:
    """A sound checkpoint of a worse model in the place of the best one."""
    path = best_checkpoint(run)
    store = CheckpointStore(path.parent)
    manifest = store.verify(path)
    saved = shutil.copytree(path, run / "saved")
    shutil.rmtree(path)

    def write(folder: Path) -> None:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        weights = load_file(folder / "adapter_model.safetensors")
        worse = {name: scale * tensor for name, tensor in weights.items()}
        save_file(worse, folder / "adapter_model.safetensors", {"format": "pt"})

    commit(
        store,
        manifest.step,
        write,
        CheckpointFacts(manifest.examples, manifest.config_sha256, "lora", manifest.eval_loss),
    )


def test_the_promoted_model_is_base_and_adapter(run_dir: Path, inputs: Path) -> None:
    promotion = promote(run_dir)
    assert promotion.path == run_dir / "promoted"
    model = AutoModelForCausalLM.from_pretrained(promotion.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(promotion.model)
    base = AutoModelForCausalLM.from_pretrained(inputs / "base")
    combined = PeftModel.from_pretrained(base, best_checkpoint(run_dir)).eval()
    ids = tokenizer(["say a\naa", "say h\nhh"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (model(ids).logits - combined(ids).logits).abs().max() <= 1e-4
    # It speaks by itself: end token, chat template and all.
    prompt = tokenizer("say c\n", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=9)[0, 6:]
    assert tokenizer.decode(said) == "cc</s>"
    assert "role" in tokenizer.chat_template
    for sample in promotion.samples:
        assert sample.promoted == sample.reference != sample.base
    assert len(promotion.samples) == 3


def test_evaluation_json_is_the_contract(run_dir: Path) -> None:
    promotion = promote(run_dir)
    content = json.loads((run_dir / "promoted/evaluation.json").read_text())
    assert content.keys() >= {"split", "examples", "base", "promoted", "looks", "verdict"}
    assert (content["split"], content["examples"], content["looks"]) == ("test", TEST, 1)
    metrics = {"eval_loss", "perplexity", "token_accuracy", "exact_match"}
    assert content["base"].keys() == content["promoted"].keys() == metrics
    assert content["differences"].keys() == metrics
    assert content["promoted"]["eval_loss"] < 0.5 * content["base"]["eval_loss"]
    assert content["promoted"]["exact_match"] > 0.8 > content["base"]["exact_match"]
    low, high = content["differences"]["eval_loss"]["interval"]
    assert low < content["promoted"]["eval_loss"] - content["base"]["eval_loss"] < high < 0
    assert promotion.better
    assert content["verdict"].startswith("promoted is better than base (eval_loss ")
    # Both candidates were compared on validation, and every example's scores are kept.
    names = [candidate["name"] for candidate in content["candidates"]]
    assert (names, content["winner"], content["tied"]) == (["base", "trained"], "trained", False)
    lines = (run_dir / "promoted/scores.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {(row["split"], row["candidate"]) for row in rows} == {
        (split, name) for split in ("validation", "test") for name in names
    }
    tested = [row for row in rows if (row["split"], row["candidate"]) == ("test", "trained")]
    assert [row["example"] for row in tested] == list(range(TEST))
    share = sum(row["exact_match"] for row in tested) / TEST
    assert share == pytest.approx(content["promoted"]["exact_match"])


def test_the_card_says_where_the_model_comes_from(run_dir: Path, inputs: Path) -> None:
    promotion = promote(run_dir)
    card = ModelCard.load(run_dir / "promoted/README.md")
    assert card.data.library_name == "transformers"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == promotion.evaluation.promoted
    result = json.loads((run_dir / "result.json").read_text())
    digests = [
        subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True)
        for file in (
            inputs / "base/model.safetensors",
            inputs / "train.jsonl",
            inputs / "test.jsonl",
        )
    ]
    expected = [digest.stdout.split()[0] for digest in digests]
    expected += [result["config_sha256"], torch.__version__, "2.60", "| seed | 0 |"]
    expected.append(f"{result['best']['examples']} examples")
    for fact in [*expected, "from_pretrained", "allowed: 1.0e-04", promotion.evaluation.verdict]:
        assert fact in card.text, fact
    assert str(inputs) not in card.text  # the directories of this machine are nobody's business


def test_promoting_again_keeps_the_earlier_one_and_counts_looks(run_dir: Path) -> None:
    promote(run_dir)
    first = files(run_dir / "promoted")
    with pytest.raises(StorageError, match=r"promoted exists, .*write --again"):
        promote(run_dir)
    assert files(run_dir / "promoted") == first
    said: list[str] = []
    assert promote(run_dir, again=True, tell=said.append).evaluation.looks == 2
    assert "the earlier promoted is kept as promoted-1" in said
    assert promote(run_dir, again=True).evaluation.looks == 3
    assert files(run_dir / "promoted-1") == first
    assert sorted(path.name for path in run_dir.glob("promoted*")) == [
        "promoted",
        "promoted-1",
        "promoted-2",
    ]


def test_without_test_data_validation_is_measured_once_and_marked(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(job: Job, strategy: Strategy) -> Measured:
        jobs.append((Path(job.model.path).name, job.split))
        return run_job(job, strategy)

    def say(job: Job, strategy: Strategy) -> tuple[Continuation, ...]:
        asked.append((Path(job.model.path).name, job.samples))
        return run_samples(job, strategy)

    jobs: list[tuple[str, str]] = []
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(promote_module, "run_job", count)
    monkeypatch.setattr(promote_module, "run_samples", say)
    run = train("no-test", "data.test=null")
    promotion = promote(run)
    assert jobs == [("base", "validation"), ("no-test", "validation")]
    assert asked == [("base", 3), ("model", 3)]
    assert promotion.evaluation.split == "validation"
    assert promotion.evaluation.examples == 24
    assert len(promotion.samples) == 3
    candidates = {one.name: one.figures for one in promotion.evaluation.candidates}
    assert promotion.evaluation.promoted == candidates["no-test"]
    assert promotion.evaluation.base == candidates["base"]
    assert "these examples also selected the model" in (run / "promoted/README.md").read_text()


@pytest.mark.parametrize(("scale", "tied"), [(-3.0, False), (0.0, True)])
def test_what_is_not_better_than_the_base_is_not_promoted(
    run_dir: Path, inputs: Path, scale: float, tied: bool
) -> None:
    """An adapter that makes it worse, and one that is not applied at all."""
    tamper_with_best(run_dir, scale)
    said: list[str] = []
    promotion = promote(run_dir, tell=said.append)
    assert not promotion.better
    assert (promotion.trial, promotion.check) == (None, None)
    found = load_file(promotion.model / "model.safetensors")
    base = load_file(inputs / "base/model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in found.items())
    assert ("trained has exactly the scores of base: it changes nothing" in said) == tied
    content = json.loads((run_dir / "promoted/evaluation.json").read_text())
    assert content["winner"] == "base"
    assert content["verdict"].startswith("the base is kept: no candidate is better on validation")
    assert content["base"] == content["promoted"]
    assert content["verdict"] in (run_dir / "promoted/README.md").read_text()


def test_a_candidate_without_a_finite_figure_loses_and_is_reported(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(own: Measurer, *arguments: Any) -> list[Measured]:
        base, *others = measured(own, *arguments)
        for one in others:
            one.scores["eval_loss"].columns[0][3] = math.nan
        return [base, *others]

    measured = Measurer._measured
    monkeypatch.setattr(Measurer, "_measured", broken)
    done = promote(run_dir)
    assert done.evaluation.winner == "base"
    content = json.loads((run_dir / "promoted/evaluation.json").read_text())
    assert [row["figures"]["eval_loss"] is None for row in content["candidates"]] == [False, True]
    assert "eval_loss of trained is not finite" in content["verdict"]
    assert "| trained | not finite | - | - |" in (run_dir / "promoted/README.md").read_text()
    scores = (run_dir / "promoted/scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["eval_loss"] for line in scores].count(None) == 1
    said = write_report(run_dir).read_text()
    assert "not finite" in said


@pytest.mark.parametrize("overrides", [["method.rslora=true"], ["method.dora=true"]])
def test_other_adapters(train: Train, overrides: list[str]) -> None:
    promotion = promote(train("-".join(overrides).replace("=", "-"), *overrides))
    assert promotion.better
    assert promotion.check is not None
    assert promotion.check.written_difference <= 1e-4


def test_a_full_fine_tune(train: Train) -> None:
    run = train("full", "method.name=full", "train.lr=3e-3")
    promotion = promote(run)
    assert promotion.better
    found = load_file(promotion.model / "model.safetensors")
    trained = load_file(best_checkpoint(run) / "state/model.safetensors")
    assert trained.keys() == found.keys()
    assert all(torch.equal(found[name], trained[name]) for name in found)


def test_a_sweep_promotes_its_best_trial(train: Train, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    records = []
    for name, lr in (("t0", "3e-3"), ("t1", "1e-2")):
        run = train(f"sweep-{name}", f"train.lr={lr}")
        shutil.copytree(run, sweep / "trials" / name)
        best = json.loads((run / "result.json").read_text())["best"]["eval_loss"]
        records.append(
            {
                "id": name,
                "params": {"train.lr": float(lr)},
                "status": "completed",
                "eval_loss": best,
            }
        )
    shutil.copy(sweep / "trials/t0/config.yaml", sweep / "config.yaml")
    with (sweep / "config.yaml").open() as file:
        text = file.read().replace("search: null\n", "")
    text = text.replace("search:\n", "") + "\nsearch: {space: {train.lr: {choice: [3e-3, 1e-2]}}}\n"
    (sweep / "config.yaml").write_text(text)
    (sweep / "result.json").write_text(
        json.dumps({"status": "completed", "best": {"trial": "t1"}, "trials": records})
    )
    promotion = promote(sweep)
    assert (promotion.trial, promotion.path) == ("t1", sweep / "promoted")
    card = (sweep / "promoted/README.md").read_text()
    assert "| trial | t1 |" in card
    assert "| train.lr | 0.01 |" in card
    # The best checkpoint breaks: the other trial goes, and the test data is seen once more.
    (best_checkpoint(sweep / "trials/t1") / "adapter_model.safetensors").write_bytes(b"")
    said: list[str] = []
    second = promote(sweep, again=True, tell=said.append)
    assert (second.trial, second.evaluation.looks) == ("t0", 2)
    assert "t1 is passed over" in said[0]


def test_a_sweep_that_searches_seeds_is_measured_on_its_own_split(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial's seed would draw another validation split, with rows that the trial trained on."""
    sweep = tmp_path / "sweep"
    run = train("seeded", "seed=7")
    shutil.copytree(run, sweep / "trials" / "t0")
    config = (run / "config.yaml").read_text().replace("seed: 7", "seed: 0")
    (sweep / "config.yaml").write_text(config.replace("name: seeded", "name: the-sweep"))
    best = json.loads((run / "result.json").read_text())["best"]["eval_loss"]
    record = {"id": "t0", "params": {"seed": 7}, "status": "completed", "eval_loss": best}
    (sweep / "result.json").write_text(json.dumps({"status": "completed", "trials": [record]}))
    seeds = []
    prepare = promote_module.prepare_data

    def recording(data: Any, tokenizer: Any, seed: int, *rest: Any) -> Any:
        seeds.append(seed)
        return prepare(data, tokenizer, seed, *rest)

    monkeypatch.setattr(promote_module, "prepare_data", recording)
    promote(sweep)
    assert seeds == [0]
    assert "# the-sweep" in (sweep / "promoted/README.md").read_text()


def test_a_refused_fold_measures_nothing_and_leaves_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MergeError("differs")

    def measured(*_: object) -> None:
        raise AssertionError("the test split was read")

    before = names(run_dir)
    monkeypatch.setattr(candidates, "fold", refuse)
    monkeypatch.setattr(Measurer, "_measured", measured)
    with pytest.raises(MergeError):
        promote(run_dir)
    assert names(run_dir) - before <= {".promoted.lock"}


def test_a_broken_best_checkpoint_of_a_run_is_refused(run_dir: Path) -> None:
    (best_checkpoint(run_dir) / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        promote(run_dir)
    assert not (run_dir / "promoted").exists()


@pytest.mark.stress
def test_a_kill_while_promoting_leaves_the_earlier_promotion(run_dir: Path) -> None:
    promote(run_dir)
    first = files(run_dir / "promoted")
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from raytune_ft.promote import promote as module\n"
        "module.model_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "module.promote(Path(sys.argv[1]), again=True)\n"
    )
    command = [sys.executable, "-c", code, str(run_dir)]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (run_dir / ".promoted.new/evaluation.json").exists()  # it was well under way
    assert files(run_dir / "promoted") == first
    assert not list(run_dir.glob("promoted-*"))
    assert promote(run_dir, again=True).evaluation.looks == 2
    assert not (run_dir / ".promoted.new").exists()


def test_two_promotions_at_once_are_refused(run_dir: Path) -> None:
    with locked(run_dir / ".promoted.lock", "", ""):
        with pytest.raises(StorageError, match=r"promoted by another process; .*--wait-lock"):
            promote(run_dir)
        with pytest.raises(LockHeld, match="promoted by another process"):
            promote(run_dir, wait_s=0.2)


def test_once_promotes_and_then_leaves_it(run_dir: Path) -> None:
    (run_dir / ".promoted.new").mkdir()  # a kill leaves it
    (run_dir / ".promoted.new" / "rubbish").touch()
    assert app.promote(run_dir, again=False, tell=print, once=True) is not None
    first, told = files(run_dir / "promoted"), list[str]()
    assert "rubbish" not in first
    assert app.promote(run_dir, again=False, tell=told.append, once=True) is None
    assert files(run_dir / "promoted") == first
    assert "--again" in told[0]


def test_no_room_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted without root")
    try:
        small = shutil.copytree(run_dir, disk / "run")
        room = os.statvfs(disk)
        filler = room.f_bavail * room.f_frsize - 50_000
        assert filler > 0
        (disk / "filler").write_bytes(bytes(filler))
        with pytest.raises(StorageError, match=r"promoted cannot be written .*No space left"):
            promote(small, cache_dir=tmp_path / "cache")
        assert names(small) - names(run_dir) == {".promoted.lock"}
        (disk / "filler").unlink()
        assert promote(small, cache_dir=tmp_path / "cache").better
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_test_data_of_the_run_is_what_is_measured(train: Train, tmp_path: Path) -> None:
    other = tmp_path / "test.jsonl"
    write_rows(other, 10, 7)
    run = train("other-test", f"data.test.path={other}")
    assert promote(run).evaluation.examples == 10


def test_a_run_that_was_moved_writes_where_it_is_now(run_dir: Path, trained: Path) -> None:
    shutil.rmtree(trained.parent / ".cache")
    promote(run_dir)
    assert names(run_dir.parent) == {"trained", ".cache"}
    assert not (trained.parent / ".cache").exists()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train", r"data\.train with 215 examples .* run began with, 216 examples .*; bring back"),
        ("test", r"data\.test with 29 examples .* is not what the run began with, 30 examples"),
    ],
)
def test_data_that_changed_are_refused_before_anything_is_measured(
    train: Train, inputs: Path, tmp_path: Path, split: str, message: str
) -> None:
    rows = shutil.copy(inputs / f"{split}.jsonl", tmp_path / f"{split}.jsonl")
    run = train(f"changed-{split}", f"data.{split}.path={rows}")
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=message):
        promote(run)
    assert not (run / "promoted").exists()
    rows.write_text("".join(lines))
    assert promote(run).evaluation.looks == 1


def test_merges_compete_with_the_best_trial(train: Train, tmp_path: Path) -> None:
    """All that `auto` tries are candidates on validation; the test split is measured twice only."""
    sweep = tmp_path / "sweep"
    records = []
    for name, lr in (("t0", "8e-3"), ("t1", "1e-2")):
        run = train(f"merged-{name}", f"train.lr={lr}", f"seed={name[1]}")
        shutil.copytree(run, sweep / "trials" / name)
        loss = json.loads((run / "result.json").read_text())["best"]["eval_loss"]
        records.append({"id": name, "params": {}, "status": "completed", "eval_loss": loss})
    (sweep / "result.json").write_text(json.dumps({"status": "completed", "trials": records}))
    text = (sweep / "trials/t0/config.yaml").read_text()
    assert "merge: best" in text
    (sweep / "config.yaml").write_text(text.replace("merge: best", "merge: auto"))
    promotion = promote(sweep)
    content = json.loads((sweep / "promoted/evaluation.json").read_text())
    names = [row["name"] for row in content["candidates"]]
    best = min(records, key=lambda record: record["eval_loss"])["id"]
    wise = [f"wise_ft-{alpha}" for alpha in (0.2, 0.4, 0.6, 0.8)]
    merges = ["uniform_soup", "greedy_soup", "task_arithmetic"]
    assert names == ["base", best, *wise, *merges]
    soup = next(row for row in content["candidates"] if row["name"] == "uniform_soup")
    assert sorted(soup["settings"]["trials"]) == ["t0", "t1"]
    figures = {row["name"]: row["figures"]["eval_loss"] for row in content["candidates"]}
    assert figures["wise_ft-0.2"] < figures["base"]
    assert len(set(figures.values())) >= 8  # every candidate is a model of its own
    assert content["winner"] in names
    assert content["examples"] == TEST
    lines = (sweep / "promoted/scores.jsonl").read_text().splitlines()
    tested = {row["candidate"] for row in map(json.loads, lines) if row["split"] == "test"}
    assert tested == {"base", content["winner"]}
    assert names_of_folders(sweep / "promoted") == {"model"}
    assert promotion.better


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of what it wrote itself
def test_a_merge_that_wins_is_also_an_adapter(
    train: Train, tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner is forced here: what it is made of is what counts."""
    sweep = tmp_path / "sweep"
    records = []
    for name, lr in (("t0", "8e-3"), ("t1", "1e-2")):
        run = train(f"factored-{name}", f"train.lr={lr}", f"seed={name[1]}")
        shutil.copytree(run, sweep / "trials" / name)
        loss = json.loads((run / "result.json").read_text())["best"]["eval_loss"]
        records.append({"id": name, "params": {}, "status": "completed", "eval_loss": loss})
    (sweep / "result.json").write_text(json.dumps({"status": "completed", "trials": records}))
    text = (sweep / "trials/t0/config.yaml").read_text()
    text = text.replace("merge: best", "merge: uniform_soup").replace(
        "adapter_rank:", "adapter_rank: 8"
    )
    (sweep / "config.yaml").write_text(text)
    decide = promote_module.decide
    monkeypatch.setattr(
        promote_module, "decide", lambda *facts: replace(decide(*facts), winner="uniform_soup")
    )
    promotion = promote(sweep)
    assert promotion.trial is None
    merged = AutoModelForCausalLM.from_pretrained(promotion.model)
    base = AutoModelForCausalLM.from_pretrained(inputs / "base")
    adapted = PeftModel.from_pretrained(base, promotion.path / "adapter").eval()
    ids = AutoTokenizer.from_pretrained(promotion.model)("say a", return_tensors="pt")["input_ids"]
    with torch.no_grad():  # two adapters of rank 4 are one of rank 8
        assert (merged(ids).logits - adapted(ids).logits).abs().max() <= 1e-4
    assert "uniform_soup" in (promotion.path / "README.md").read_text()


def test_auto_passes_over_what_cannot_be_merged(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MergeError("weights that are not finite")

    monkeypatch.setattr(candidates, "merge", refuse)
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("merge: best", "merge: auto"))
    said: list[str] = []
    promotion = promote(run_dir, tell=said.append)
    assert "wise_ft-0.2 is passed over: weights that are not finite" in said
    assert "uniform_soup needs two sound trials, and there is one" in said
    assert [row.name for row in promotion.evaluation.candidates] == ["base", "trained"]
    (run_dir / "config.yaml").write_text(text.replace("merge: best", "merge: wise_ft"))
    with pytest.raises(MergeError):  # what is asked for by name is not left out
        promote(run_dir, again=True)


def names_of_folders(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_dir()}


def test_the_card_says_what_is_known_of_licences_and_of_other_data(
    run_dir: Path, inputs: Path, tmp_path: Path
) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "a text that is general"}\n{"text": "another one"}\n')
    base = Path(shutil.copytree(inputs / "base", tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    text = (run_dir / "config.yaml").read_text()
    text = text.replace(f"{inputs}/base", str(base))
    text = text.replace("retention:", f"retention: {{path: {general}, format: text}}")
    (run_dir / "config.yaml").write_text(text)
    promotion = promote(run_dir)
    assert promotion.evaluation.promoted["retention_kl"] > 0
    card = ModelCard.load(run_dir / "promoted/README.md")
    assert card.data.license == "mit"
    assert "| licence of base | mit |" in card.text
    assert "| licence of data.train | not known |" in card.text
    # Figures of the general set are no results on the test data.
    named = {result.metric_type for result in card.data.eval_results}
    assert named == {"eval_loss", "perplexity", "token_accuracy", "exact_match"}
    assert "KL from the base on the general set" in card.text


def test_code_that_only_the_saved_config_names_is_not_run(run_dir: Path, tmp_path: Path) -> None:
    """Who can write into the storage can write config.yaml."""
    evil = tmp_path / "evil.py"
    evil.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "def score(prompt, reference, generated):\n    return 1.0\n"
    )
    file, metric = run_dir / "config.yaml", f"{evil}:score"
    config = apply_overrides(load_config(file), {"promote.metrics": ["loss", metric]})
    file.write_text(dump_yaml(config))
    with pytest.raises(ConfigError, match=r"evil\.py:score .* names.*; .*--trust-run"):
        promote(run_dir)
    assert not (tmp_path / "ran").exists()
    assert not (run_dir / "promoted").exists()
    named = promote(run_dir, code=[f"promote.metrics={metric}"], samples=0)
    assert named.evaluation.promoted["score"] == 1.0
    assert promote(run_dir, again=True, code=None, samples=0).evaluation.promoted["score"] == 1.0
    assert (tmp_path / "ran").exists()
