"""The command line: each command is a target of the workflow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kv_transition.errors import UserError
from kv_transition.run.cache_commands import app as cache_app

if TYPE_CHECKING:
    from kv_transition.settings import Settings

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__import__("kv_transition").__doc__)
app.add_typer(cache_app, name="cache")

Config = Annotated[Path, typer.Option("--config", "-c", help="Experiment file.")]
Set = Annotated[list[str], typer.Option("--set", help="Change one key, such as model.device=cuda.")]
Cores = Annotated[str, typer.Option(help="Cores to use.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would run.")]
Profile = Annotated[Path | None, typer.Option(help="Snakemake profile, for a cluster.")]

DEFAULT = Path("config/config.yaml")


class Step(StrEnum):
    """What can be asked for; each step includes those before it."""

    prepare = "prepare"
    run = "run"
    score = "score"
    analyze = "analyze"
    report = "report"
    all = "all"


# The rules at which each step ends.
_UNTIL = {
    Step.prepare: ["prepare"],
    Step.run: ["cell"],
    Step.score: ["score"],
    Step.analyze: ["plots"],
    Step.report: ["report", "exports"],
    Step.all: [],
}


def _command(step: Step, doc: str) -> None:
    def command(
        config: Config = DEFAULT,
        set_: Set = [],  # noqa: B006, typer's way to say a list
        cores: Cores = "all",
        dry_run: DryRun = False,
        profile: Profile = None,
    ) -> None:
        raise typer.Exit(_snakemake(step, config, set_, cores, dry_run, profile))

    app.command(name=step.value, help=doc)(command)


for _step, _doc in {
    Step.prepare: "Fetch or generate the examples, make prompts, bin them by length.",
    Step.run: "Run every cell of the grid.",
    Step.score: "Score the answers and label failures.",
    Step.analyze: "Estimate, compare, find the transition zone, draw.",
    Step.all: "Everything, from the data set to the report.",
}.items():
    _command(_step, _doc)


@app.command()
def report(
    config: Config = DEFAULT,
    set_: Set = [],  # noqa: B006
    cores: Cores = "all",
    dry_run: DryRun = False,
    profile: Profile = None,
    partial: Annotated[bool, typer.Option("--partial", help="Of the cells that are there; run nothing.")] = False,
) -> None:
    """Write report.md, report.html and the exports."""
    if not partial:
        raise typer.Exit(_snakemake(Step.report, config, set_, cores, dry_run, profile))
    settings = _checked(config, set_)
    from kv_transition.report.partial import write_partial

    with _refusing():
        typer.echo(write_partial(settings))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Results folder of an experiment.")],
    b: Annotated[Path, typer.Argument(help="Results folder of another one over the same examples.")],
    output: Annotated[Path, typer.Option(help="Folder for report.md, report.html and the differences.")],
) -> None:
    """Compare two experiments: paired differences with intervals."""
    from kv_transition.report.compare import compare as write_comparison

    with _refusing():
        write_comparison(str(a), str(b), str(output))
    typer.echo(output / "report.html")


@app.command()
def where(
    file: Annotated[str, typer.Argument(help="A file of the experiment, such as report.html.")],
    config: Config = DEFAULT,
    set_: Set = [],  # noqa: B006
) -> None:
    """Say where a file of the experiment lies."""
    from kv_transition.paths import Paths

    settings = _checked(config, set_)
    typer.echo(Path(Paths(settings.output.dir, settings.experiment).file(file)).resolve())


@app.command()
def check(config: Config = DEFAULT, set_: Set = []) -> None:  # noqa: B006
    """Check an experiment file without running anything."""
    from kv_transition import specs

    settings = _checked(config, set_)
    n = len(specs.cells(settings)) * settings.binning.n_bins * len(settings.tasks)
    if settings.adaptive.enabled:
        typer.echo(f"{config} is fine: at most {n * len(settings.adaptive.shards)} cells")
    else:
        typer.echo(f"{config} is fine: {n} cells")


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files."""
    import yaml

    from kv_transition.settings import json_schema

    typer.echo(yaml.safe_dump(json_schema(), sort_keys=False, width=120), nl=False)


@contextmanager
def _refusing() -> Iterator[None]:
    """Bad input becomes one sentence and status 2."""
    try:
        yield
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


def _checked(config: Path, assignments: list[str]) -> Settings:
    from kv_transition import settings as settings_module
    from kv_transition import specs

    with _refusing():
        settings = settings_module.load(config, assignments)
        specs.check(settings)
        return settings


def _snakemake(
    step: Step, config: Path, assignments: list[str], cores: str, dry_run: bool, profile: Path | None
) -> int:
    settings = _checked(config, assignments)  # one sentence now, rather than Snakemake's traceback later
    # Where looks decide which cells run, the first cells are not the last.
    until = ["score"] if step is Step.run and settings.adaptive.enabled else _UNTIL[step]
    command = [sys.executable, "-m", "snakemake", "--configfile", str(config)]
    command += ["--logger", "rich", "--quiet", "rules", "host", "reason"]
    command += ["--workflow-profile", str(profile)] if profile else ["--cores", cores]
    if assignments:
        command += ["--config", f"set={json.dumps(assignments)}"]
    if dry_run:
        command += ["--dry-run"]
    if until:
        command += ["--until", *until]
    return subprocess.call(command)
