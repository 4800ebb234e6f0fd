"""The command line: parse, call one function, print. Exit codes as in `errors`."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand

from raytune_ft.config.environment import grow_segments
from raytune_ft.errors import CheckpointError, Interrupted, RaytuneFtError
from raytune_ft.records import as_json
from raytune_ft.report import tables
from raytune_ft.report import terminal as show

if TYPE_CHECKING:
    from raytune_ft.promote.promote import Promotion
    from raytune_ft.train.report import Reporter

app = typer.Typer(
    name="raytune-ft",
    help="A YAML file in, a merged and evaluated model out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
checkpoints = typer.Typer(
    help="List, verify and prune the checkpoints of a run or a sweep.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(checkpoints, name="checkpoints")
data = typer.Typer(
    help="Check, measure and show the data of a config. No model is loaded, only its tokenizer.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data, name="data")
PROGRAM = "raytune-ft"
INTERRUPTED = "interrupted; a run continues with --resume"
# typer may bundle its own click, which exports this class only through its subclasses.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")

File = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Replace values of the file."),
]
Resume = Annotated[
    Literal["yes", "auto"] | None,
    typer.Option(
        "--resume",
        metavar="[auto]",
        help="Continue the run of that name. auto: begin it, or continue what was begun.",
    ),
]


def _duration(text: str) -> float:
    from raytune_ft.config.search_space import duration_s

    return duration_s(text, "--wait-lock")


WaitLock = Annotated[
    float | None,
    typer.Option(
        "--wait-lock",
        metavar="DURATION",
        parser=_duration,
        help="Wait for a run that another process drives, such as 90s, 3m or 1h.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Address = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="URL",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        help="The dashboard of the cluster's head, such as http://HEAD:8265.",
    ),
]
JobName = Annotated[
    str, typer.Argument(metavar="NAME", help="The name of a run, or a submission id.")
]
TrustRun = Annotated[
    bool,
    typer.Option("--trust-run", help="Run Python code that only the saved config names."),
]
Where = Annotated[
    str, typer.Argument(metavar="DIR", help="A run, a sweep, or s3://bucket/prefix/NAME.")
]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def plan(
    file: File,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Plan for this many nodes and fewer.")
    ] = None,
    per_node: Annotated[
        int | None,
        typer.Option("--per-node", min=1, help="Workers on each node; 8 with --accelerator."),
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator",
            help="Plan for this GPU, such as H100 or A100-80G, one for each worker.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check a config and show what it would do, what it needs and what else would fit.

    Starts nothing. Memory and time are for this machine, or for --nodes and --accelerator.

    Example: raytune-ft plan jobs/quickstart.yaml train.lr=1e-4

    Example: raytune-ft plan jobs/quickstart.yaml --nodes 1 --accelerator H100
    """
    from raytune_ft.plan.make import Asked, make_plan
    from raytune_ft.plan.text import describe

    asked = Asked(nodes, per_node, accelerator)
    print(describe(make_plan(file, overrides or (), show.tell, asked)))


@app.command()
def schema(
    reference: Annotated[
        bool, typer.Option("--reference", help="Every key with its type, default and meaning.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of the config, for editors.

    Example: raytune-ft schema > config.schema.json
    """
    if reference:
        from raytune_ft.config.reference import keys

        for key in keys():
            default = "must be written" if key.default is None else f"default {key.default}"
            about = f"\n    {key.description}" if key.description else ""
            print(f"{key.dotted}: {key.type}; {default}{about}")
        return
    from raytune_ft.config.schema import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


class _Resumable(TyperCommand):
    """Typer has no option whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_value(args))


def _with_value(arguments: Sequence[str]) -> list[str]:
    """A bare `--resume` as `--resume=yes`, since no other argument after it is its value."""
    return [
        "--resume=yes" if each == "--resume" and after != "auto" else each
        for each, after in pairwise([*arguments, ""])
    ]


def _resume(written: str | None) -> bool | Literal["auto"]:
    return "auto" if written == "auto" else written == "yes"


@app.command(cls=_Resumable)
def train(
    file: File,
    overrides: Overrides = None,
    resume: Resume = None,
    wait_lock: WaitLock = None,
    debug: Debug = False,
) -> None:
    """Train one run. A search section is ignored.

    Example: raytune-ft train jobs/quickstart.yaml name=first train.lr=1e-3

    Example: raytune-ft train jobs/quickstart.yaml --resume auto --wait-lock 3m
    """
    from raytune_ft import app as run

    with ExitStack() as stack:
        done = run.train(
            file,
            overrides or (),
            _resume(resume),
            show.tell,
            lambda total: _reporter(total, stack),
            wait_s=wait_lock,
        )
    if done.result is None:
        return
    result = done.result
    facts: dict[str, Any] = {"status": result.status}
    if result.base is not None:
        facts["base eval loss"] = result.base["eval_loss"]
    if result.best is not None:
        facts["best eval loss"] = result.best.eval_loss
        facts["best checkpoint"] = done.path / (result.best.checkpoint or "")
    for note in result.notes:
        show.tell(note)
    show.print_facts({**facts, "run": done.path})


@app.command(cls=_Resumable)
def sweep(
    file: File,
    overrides: Overrides = None,
    resume: Resume = None,
    wait_lock: WaitLock = None,
    trust_run: TrustRun = False,
    debug: Debug = False,
) -> None:
    """Search over the space of a config, then promote the best trial.

    Example: raytune-ft sweep jobs/quickstart.yaml search.trials=12

    Example: raytune-ft sweep jobs/quickstart.yaml --resume auto --wait-lock 3m
    """
    from raytune_ft import app as run

    how = _resume(resume)
    done = run.sweep(file, overrides or (), how, show.tell, wait_s=wait_lock, trust_run=trust_run)
    best = done.result.get("best")
    name = best["trial"] if best else None
    show.print_table(tables.trials(done.result["trials"], name, done.metric))
    if done.promotion is not None:
        _show_promotion(done.promotion)
    show.tell(f"sweep: {done.path}")


@app.command()
def promote(
    directory: Annotated[Path, typer.Argument(metavar="SWEEP_OR_RUN_DIR")],
    again: Annotated[
        bool, typer.Option("--again", help="Promote again; the earlier result is kept.")
    ] = False,
    resume: Annotated[
        Literal["auto"] | None,
        typer.Option(
            "--resume",
            metavar="auto",
            help="auto: promote it, or leave an earlier promotion as it is.",
        ),
    ] = None,
    wait_lock: WaitLock = None,
    trust_run: TrustRun = False,
    debug: Debug = False,
) -> None:
    """Merge, evaluate and export the best trial of a sweep, or a run.

    Example: raytune-ft promote runs/quickstart
    """
    from raytune_ft import app as run

    path, once = directory.absolute(), resume == "auto"
    if promotion := run.promote(path, again, show.tell, once, wait_lock, trust_run):
        _show_promotion(promotion)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR")],
    config: Annotated[Path, typer.Option("--config", metavar="CONFIG", help="A YAML file.")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Measure any model directory on the test data of a config.

    Example: raytune-ft evaluate runs/quickstart/promoted/model --config jobs/quickstart.yaml
    """
    from raytune_ft import app as run

    facts = run.evaluate(model, config, overrides or (), show.tell)
    show.print_facts(facts)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR")],
    config: Annotated[Path, typer.Option("--config", metavar="CONFIG", help="A YAML file.")],
    overrides: Overrides = None,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, help="Completions of each prompt; default: sampling.n."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The samples, one object a line.")
    ] = Path("samples.jsonl"),
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", metavar="FILE", help="Also write preferences, best against worst."),
    ] = None,
    best: Annotated[
        Path | None,
        typer.Option("--best", metavar="FILE", help="Also write the best answers, to train on."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Answer these, not the config's data."),
    ] = None,
    split: Annotated[
        Literal["test", "validation"] | None,
        typer.Option("--split", help="Of the config's data; default: test where there is one."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Let a model answer prompts, score the answers, and make training data of them.

    The rewards of the config score. A command that was interrupted goes on where it stopped.

    Example: raytune-ft sample runs/quickstart/promoted/model --config jobs/quickstart.yaml --n 4

    Example: raytune-ft sample builtin:tiny --config c.yaml --pairs pairs.jsonl rewards=[gsm8k]
    """
    from raytune_ft import app as run

    changes = [*(overrides or ()), *([] if n is None else [f"sampling.n={n}"])]
    try:
        done = run.sample(model, config, changes, out, pairs, best, prompts, split, show.tell)
    except KeyboardInterrupt:
        raise Interrupted(f"{out} was interrupted; the same command continues it") from None
    facts: dict[str, Any] = {"prompts": done.prompts, "samples": done.samples}
    if done.kept:
        facts["of an earlier command"] = done.kept
    facts["ended"] = f"{done.ended / max(1, done.samples):.1%}"
    for name, mean in done.means.items():
        facts[f"mean {name}"] = mean
        if name in done.missing:
            facts[f"without {name}"] = done.missing[name]
    if done.best is not None:
        facts |= {"best": done.best, "mean of the best": done.best_mean, "cut short": done.best_cut}
    if done.pairs is not None:
        facts |= {"pairs": done.pairs, "ties": done.ties, "prompts without scores": done.unscored}
    for note in done.notes:
        show.tell(note)
    files = ", ".join(str(file) for file in (out, pairs, best) if file is not None)
    show.print_facts({**facts, "written": files})


@app.command()
def fetch(
    file: File,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Fetch to every node of this Ray cluster."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Download the models and data sets of a config from the hub, ahead of time.

    Example: raytune-ft fetch jobs/quickstart.yaml
    """
    from raytune_ft.fetch import fetch_all

    rows = fetch_all(file, overrides or (), address, show.tell)
    if rows:
        show.print_table(tables.downloads(rows))
    else:
        show.tell("nothing is needed of the hub: all models and data are on this machine")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="SWEEP_OR_RUN_DIR")],
    debug: Debug = False,
) -> None:
    """Write report.html of a run or a sweep, one file for a browser, and print a summary.

    Example: raytune-ft report runs/quickstart
    """
    from raytune_ft.report.collect import collect
    from raytune_ft.report.write import headline, write_report

    path = write_report(directory.absolute())
    facts = collect(directory.absolute())
    verdict = headline(facts)
    for line in (verdict["title"], *verdict["lines"]):
        show.tell(line)
    if facts.promoted is not None:
        show.print_table(tables.candidates(facts.promoted))
        show.print_table(tables.figures(facts.promoted))
    if facts.is_sweep:
        show.print_table(tables.trials(facts.result["trials"], facts.best, facts.metric))
    if (used := tables.usage(facts.trials)) is not None:
        show.print_table(used)
    show.tell(f"report: {path}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Or a checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET")],
    kind: Annotated[str, typer.Option("--format", help="hf, adapter or gguf.")] = "hf",
    base: Annotated[
        str | None, typer.Option("--base", help="Fold an adapter into this model.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest size of a weights file.")
    ] = "5GB",
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push-to",
            metavar="OWNER/NAME",
            help="Also upload it to a private repository of the hub.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a model or a checkpoint as a Hugging Face directory, a PEFT adapter or a GGUF file.

    Example: raytune-ft export runs/quickstart/promoted/model out --dtype bfloat16
    """
    from raytune_ft.merge import export as make

    made = make.export(source, target, kind, base, dtype, max_shard_size, show.tell)
    show.tell(f"written: {made}")
    if push_to is not None:
        show.tell(f"pushed: {make.push(made, push_to)}")


@app.command()
def submit(
    file: File,
    address: Address,
    overrides: Overrides = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show the log until the job has ended.")
    ] = True,
    retry: Annotated[
        int,
        typer.Option(
            "--retry", min=0, help="Continue this often after the driver or the head has died."
        ),
    ] = 0,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", "--submission-id", help="Submission id; by default the name of the run."
        ),
    ] = None,
    command: Annotated[
        str | None,
        typer.Option("--command", help="train or sweep; by default sweep if there is a search."),
    ] = None,
    cluster_paths: Annotated[
        bool,
        typer.Option(
            "--cluster-paths",
            help="Model and data are on the cluster: absolute paths are its own, and the job "
            "checks what is there.",
        ),
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Use a cluster that is open to other machines."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Check a config here, run it as a job of a Ray cluster, and end with its exit code.

    The config and the files that it names are packed, and nothing else. A second submit of the
    same run attaches to its live job. Ctrl-C detaches: the job goes on.

    Example: raytune-ft submit jobs/quickstart.yaml storage=/mnt/runs --address http://head:8265

    Example: raytune-ft submit big.yaml --address http://head:8265 --cluster-paths --retry 3
    """
    from raytune_ft.submit import submit as jobs

    asked = jobs.Asked(address, name, command, follow, retry, cluster_paths, insecure)
    jobs.submit(file, overrides or (), asked, show.raw, show.tell)


@app.command()
def status(
    address: Address,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Default: all.")] = None,
    debug: Debug = False,
) -> None:
    """Show a job, or all jobs of a cluster; of a job that waits, why.

    Example: raytune-ft status gsm8k --address http://head:8265
    """
    from raytune_ft.ray_backend.jobs import JobCluster
    from raytune_ft.submit import submit as jobs

    cluster = JobCluster(address)
    if name is None:
        show.print_table(jobs.all_jobs(cluster))
    else:
        show.print_facts(jobs.status(cluster, name))


@app.command()
def logs(
    name: JobName,
    address: Address,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job has ended; with its exit code.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print the log of a job.

    Example: raytune-ft logs gsm8k --follow --address http://head:8265
    """
    from raytune_ft.ray_backend.jobs import JobCluster
    from raytune_ft.submit import submit as jobs

    jobs.logs(JobCluster(address), name, follow, show.raw, show.tell)


@app.command()
def stop(name: JobName, address: Address, debug: Debug = False) -> None:
    """Ask a job to save a checkpoint and to end; wait until it has.

    Example: raytune-ft stop gsm8k --address http://head:8265
    """
    from raytune_ft.ray_backend.jobs import JobCluster
    from raytune_ft.submit import submit as jobs

    jobs.stop(JobCluster(address), name, show.tell)


@app.command()
def doctor(
    file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML file, to check its storage.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
            help="Every node of this cluster: HOST:PORT of its head or `auto`, on a machine of "
            "the cluster; the URL of its dashboard, from anywhere.",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="A cluster without a token is no defect.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check this machine, or every node of a cluster, before anything is spent on it.

    Prints one table with remedies. Exit code 1 where a defect is found, 0 for warnings only.

    Example: raytune-ft doctor

    Example: raytune-ft doctor jobs/quickstart.yaml storage=/mnt/runs --address auto

    Example: raytune-ft doctor jobs/quickstart.yaml storage=/mnt/runs --address http://head:8265
    """
    from raytune_ft.doctor import examine
    from raytune_ft.doctor.findings import table

    if address and address.startswith(("http://", "https://")):
        examine.doctor_as_job(address, file, overrides or (), insecure, show.raw, show.tell)
        return
    joined = None if address == "local" else address
    rows = examine.doctor(file, overrides or (), joined, insecure, show.tell)
    show.print_table(table(rows))
    for line in examine.verdict(rows, file is not None):
        show.tell(line)


@data.command()
def check(file: File, overrides: Overrides = None, debug: Debug = False) -> None:
    """Read every row: counts, the causes of bad rows, splits, duplicates and overlaps.

    Exit code 2 where `train` would refuse the data. The tokens are kept for the run.

    Example: raytune-ft data check jobs/quickstart.yaml
    """
    from raytune_ft import data_view

    found = data_view.view(file, overrides or (), show.tell)
    for table in data_view.checked(found):
        show.print_table(table)
    for line in data_view.remarks(found):
        show.tell(line)


@data.command()
def stats(file: File, overrides: Overrides = None, debug: Debug = False) -> None:
    """Show the lengths of the examples, and what `data.max_length` cuts.

    Example: raytune-ft data stats jobs/quickstart.yaml data.max_length=256
    """
    from raytune_ft import data_view

    for line in data_view.measured(data_view.view(file, overrides or (), show.tell)):
        show.tell(line)


@data.command()
def preview(
    file: File,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "train",
    start: Annotated[int, typer.Option("--start", min=0, help="The first example.")] = 0,
    count: Annotated[int, typer.Option("--count", min=1, help="How many examples.")] = 3,
    debug: Debug = False,
) -> None:
    """Show examples as the model sees them; what carries loss is green, in a log within [[ ]].

    Example: raytune-ft data preview jobs/quickstart.yaml --split validation --count 1
    """
    from raytune_ft import data_view

    found = data_view.view(file, overrides or (), show.tell)
    for number in range(start, min(start + count, max(len(found.split(split)), start + 1))):
        show.tell(f"{split} {number}")
        show.print_pieces(data_view.pieces(found, split, number))


@checkpoints.command("list")
def list_(where: Where, debug: Debug = False) -> None:
    """Show every checkpoint with its step, metrics and size, and what refers to it.

    Example: raytune-ft checkpoints list runs/quickstart
    """
    from raytune_ft.checkpoints.manage import listed

    show.print_table(tables.checkpoints(listed(where)))


@checkpoints.command()
def verify(where: Where, debug: Debug = False) -> None:
    """Read every byte of every checkpoint. Damaged ones are moved aside and named (exit code 1).

    Example: raytune-ft checkpoints verify runs/quickstart
    """
    from raytune_ft.checkpoints.manage import verified

    rows = verified(where, show.tell)
    damaged = [row for row in rows if row.error]
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(rows)} checkpoints are damaged")
    show.tell(f"{len(rows)} checkpoints are intact")


@checkpoints.command()
def prune(
    where: Where,
    keep_last: Annotated[
        int | None,
        typer.Option("--keep-last", min=1, help="Default: the value in the run's config."),
    ] = None,
    keep_best: Annotated[
        int | None,
        typer.Option("--keep-best", min=1, help="Default: the value in the run's config."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be deleted.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Delete the checkpoints that neither the run's settings nor these options keep.

    A checkpoint that a result names is always kept.

    Example: raytune-ft checkpoints prune runs/quickstart --keep-last 1 --dry-run
    """
    from raytune_ft.checkpoints.manage import pruned

    for path in pruned(where, keep_last, keep_best, dry_run, show.tell):
        show.tell(f"{'would delete' if dry_run else 'deleted'} {path}")


def main(*command: str) -> NoReturn:
    """The console script. The scripts in jobs/ pass the name of their command."""
    if not sys.warnoptions:  # users of this program cannot act on deprecations inside libraries
        warnings.simplefilter("ignore")
    for library in ("HF_HUB", "TRANSFORMERS"):  # nor on retries: a failure ends in one line
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    grow_segments()
    sys.exit(run_command([*command, *sys.argv[1:]]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error is one line on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a locale without UTF-8 must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(list(arguments), prog_name=PROGRAM, standalone_mode=False)
        if code == Interrupted.exit_code:  # typer's own answer to a KeyboardInterrupt
            return _fail(INTERRUPTED, code)
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx else PROGRAM
        message = error.format_message().rstrip(".?").replace(". Did you mean", "; did you mean")
        return _fail(f"{message}; see `{where} --help`", 2)
    except RaytuneFtError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _fail(error, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(INTERRUPTED, Interrupted.exit_code)
    except BrokenPipeError:  # `raytune-ft schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that fills up, a directory that vanishes
        if "--debug" in arguments:
            traceback.print_exc()
        return _fail(error, 1)


def _fail(error: object, code: int) -> int:
    print(show.error_line(error), file=sys.stderr, flush=True)
    return code


def _reporter(total_examples: int, stack: ExitStack) -> Reporter:
    if not sys.stdout.isatty():
        return show.LineReporter(total_examples)
    bar = show.BarReporter(total_examples)
    stack.enter_context(bar.progress)
    return bar


def _show_promotion(promotion: Promotion) -> None:
    measured = as_json(promotion.evaluation)
    show.print_table(tables.candidates(measured))
    show.print_table(tables.figures(measured))
    for sample in promotion.samples:
        show.tell(f"prompt:    {show.one_line(sample.prompt)}")
        show.tell(f"  expected {show.one_line(sample.reference)}")
        show.tell(f"  base     {show.one_line(sample.base)}")
        show.tell(f"  promoted {show.one_line(sample.promoted)}")
    show.tell(f"{promotion.model.name}: {promotion.model}")
