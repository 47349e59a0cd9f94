"""The command line; most commands run targets of the workflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kv_transition.errors import UserError
from kv_transition.run.cache_commands import app as cache_app
from kv_transition.run.cache_commands import check_device
from kv_transition.studies import registry

if TYPE_CHECKING:
    from kv_transition.settings import Settings

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__import__("kv_transition").__doc__)
app.add_typer(cache_app, name="cache")

Config = Annotated[Path, typer.Option("--config", "-c", help="Experiment file.")]
Set = Annotated[list[str], typer.Option("--set", help="Change one key, such as model.device=cuda.")]
Cores = Annotated[str | None, typer.Option(help="Number of cores; default: all, or the profile's.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would run.")]
Profile = Annotated[Path | None, typer.Option(help="Snakemake profile, such as one for a cluster.")]
Sdm = Annotated[
    str | None,
    typer.Option("--sdm", "--software-deployment-method", help="conda: run each phase in its own environment."),
]

DEFAULT = Path("config/config.yaml")


COMMANDS = {
    "prepare": "Download or generate the examples, build prompts, and bin them by length.",
    "run": "Run every job that uses the model: cells, observations, perplexity, conversations, the harness.",
    "score": "Score the answers and label failures.",
    "analyze": "Compute estimates, comparisons, the transition zone and the figures.",
    "all": "Run everything, from the data set to the report.",
    "export": "Write the tables as CSV, JSON and SQLite.",
} | {study.command: study.help for study in registry.studies() if study.command}
"""commands in addition to the report; each command includes those before it"""

# Last rules of the commands of every experiment; the rules of a study are in its `study.STUDY`.
_UNTIL = {"report": ["report", "exports"], "export": ["exports"]}


def _command(step: str, doc: str) -> None:
    def command(
        config: Config = DEFAULT,
        set_: Set = [],  # noqa: B006, typer needs a list as the default
        cores: Cores = None,
        dry_run: DryRun = False,
        profile: Profile = None,
        sdm: Sdm = None,
    ) -> None:
        raise typer.Exit(_snakemake(step, config, set_, cores, dry_run, profile, sdm))

    app.command(name=step, help=doc)(command)


for _step, _doc in COMMANDS.items():
    _command(_step, _doc)


@app.command()
def report(
    config: Config = DEFAULT,
    set_: Set = [],  # noqa: B006
    cores: Cores = None,
    dry_run: DryRun = False,
    profile: Profile = None,
    sdm: Sdm = None,
    partial: Annotated[bool, typer.Option("--partial", help="Report only the finished cells; run no job.")] = False,
) -> None:
    """Write report.md, report.html and the exports."""
    if not partial:
        raise typer.Exit(_snakemake("report", config, set_, cores, dry_run, profile, sdm))
    settings = _checked(config, set_)
    from kv_transition.outputs.partial import write_partial

    with _refusing():
        typer.echo(write_partial(settings))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Results folder of an experiment.")],
    b: Annotated[Path, typer.Argument(help="Results folder of another experiment with the same examples.")],
    output: Annotated[Path, typer.Option(help="Folder for report.md, report.html and the differences.")],
) -> None:
    """Compare two experiments: paired differences with intervals."""
    from kv_transition.outputs.compare import compare as write_comparison

    with _refusing():
        write_comparison(str(a), str(b), str(output))
    typer.echo(output / "report.html")


@app.command()
def leaderboard(
    sources: Annotated[list[Path], typer.Argument(help="Results folders, or leaderboard.json files.")],
    output: Annotated[Path, typer.Option(help="Folder for leaderboard.json and leaderboard.html.")] = Path("."),
) -> None:
    """Write several experiments as one sortable table."""
    from kv_transition.outputs.leaderboard import PAGE
    from kv_transition.outputs.leaderboard import leaderboard as write_leaderboard

    with _refusing():
        write_leaderboard([str(source) for source in sources], str(output))
    typer.echo(output / PAGE)


@app.command()
def where(
    file: Annotated[str, typer.Argument(help="A file of the experiment, such as report.html.")],
    config: Config = DEFAULT,
    set_: Set = [],  # noqa: B006
) -> None:
    """Print the path of a file of the experiment."""
    from kv_transition.paths import Paths

    settings = _checked(config, set_)
    typer.echo(Path(Paths(settings.output.dir, settings.experiment).file(file)).resolve())


@app.command()
def check(config: Config = DEFAULT, set_: Set = []) -> None:  # noqa: B006
    """Check an experiment file without running anything."""
    from kv_transition import preflight
    from kv_transition.plan.work import work

    settings = _checked(config, set_)
    with _refusing():
        preflight.check(settings)
        warn(preflight.too_long(settings))
        found = work(settings)
    jobs = ", ".join(f"{len(item.jobs)} {item.name}" for item in found.items)
    typer.echo(f"{config} is valid: {'at most ' if settings.adaptive.enabled else ''}{jobs}")


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free port.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen at; the default accepts only this machine.")
    ] = "127.0.0.1",
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests; default: the value of --model.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the hub repository.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; the cells of an experiment use 1.")] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of prompt tokens per forward pass.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Maximum number of tokens of prompt and answer.")
    ] = None,
    prefill_gb: Annotated[float, typer.Option(min=0, help="Memory for stored prefills, in GB.")] = 4.0,
    statistics: Annotated[
        str, typer.Option(help="Attention statistics of every prefill: all, none, or names.")
    ] = "all",
    policy_file: Annotated[
        list[str], typer.Option(help="File path/to/policy.py that requests may name as a kind.")
    ] = [],  # noqa: B006
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key that requests need.")
    ] = None,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Maximum size of a request, in MB.")] = 8.0,
    queue: Annotated[int, typer.Option(min=1, help="Maximum number of waiting requests.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Maximum number of answers that are decoded together.")] = 8,
) -> None:
    """Serve a model over an OpenAI-compatible API; each request names its policy and budget."""
    with _refusing():
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"--dtype: {dtype!r} is not allowed; choose one of float32, bfloat16, float16")
        check_device(device)
        try:
            from kv_transition.serve.command import serve as run
        except ImportError as error:
            raise UserError(f"{error.name} is not installed; install this project with its extra: serve") from None
        run(
            model,
            host=host,
            port=port,
            name=name,
            revision=revision,
            dtype=dtype,
            device=device,
            threads=threads,
            chunk_tokens=chunk_tokens,
            max_length=max_length,
            prefill_gb=prefill_gb,
            statistics=statistics,
            policy_files=policy_file,
            api_key_env=api_key_env,
            max_body_mb=max_body_mb,
            queue=queue,
            batch=batch,
        )


@app.command()
def plan(
    config: Config = DEFAULT,
    set_: Set = [],  # noqa: B006
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Load the model and measure its speed briefly.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in seconds and bytes.")] = False,
) -> None:
    """Print the time, memory and disk space that an experiment needs, and what is already done."""
    settings = _checked(config, set_)
    from kv_transition.plan import table, work
    from kv_transition.plan.model_size import model_size
    from kv_transition.plan.speed import speed

    with _refusing():
        size = model_size(settings.model)
        known = speed(settings, size, calibrate)
        found = work.summary(work.work(settings, known.answer_tokens if known else None), known, size)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    table.show(settings, found, Console())


@app.command()
def doctor(config: Config = DEFAULT, set_: Set = []) -> None:  # noqa: B006
    """Check this machine for an experiment; exit with status 1 if it cannot run here."""
    settings = _checked(config, set_)
    from rich.console import Console

    from kv_transition.doctor import examine, screen

    findings = list(examine(settings))
    screen(settings, findings, Console())
    raise typer.Exit(any(finding.state == "fail" for finding in findings))


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files."""
    import yaml

    from kv_transition.settings import json_schema

    typer.echo(yaml.safe_dump(json_schema(), sort_keys=False, width=120), nl=False)


@contextmanager
def _refusing() -> Iterator[None]:
    """Print a UserError as one sentence and exit with status 2."""
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


def _rules(step: str, settings: Settings) -> list[str]:
    """Return the rules at which Snakemake stops; an empty list: it runs to the end.

    Raises UserError if the experiment lacks the section of this command.
    """
    asked = [study for study in registry.studies() if step in study.rules]
    rules = _UNTIL.get(step, []) + [rule for study in asked if study.there(settings) for rule in study.rules[step]]
    if asked and not rules:
        raise UserError(f"{step}: {asked[0].lacking}")
    # In an adaptive experiment the looks decide which cells run, so the rule cell alone would not run all of them.
    return ["score" if rule == "cell" and settings.adaptive.enabled else rule for rule in rules]


def _check_machine(profile: Path | None, sdm: str | None) -> None:
    """Raise UserError for an option that Snakemake would only refuse with a traceback."""
    from importlib.util import find_spec

    if sdm not in (None, "conda"):
        raise UserError(f"--sdm: {sdm!r} is not allowed; this project has environments for conda only")
    if sdm and not shutil.which("conda"):
        raise UserError("--sdm conda: conda is not installed; install it, or omit --sdm to use this environment")
    if profile is None:
        return
    file = next((f for f in (profile, *profile.glob("config.*yaml")) if f.is_file()), None)
    if file is None:
        raise UserError(f"--profile: there is no {profile}/config.yaml; this project has {', '.join(_profiles())}")
    from kv_transition.yaml_text import read_yaml

    said = read_yaml(file, "profile") or {}
    executor = str((said.get("executor") if isinstance(said, dict) else None) or "local")
    plugin = f"snakemake_executor_plugin_{executor.replace('-', '_')}"
    if executor not in ("local", "dryrun", "touch") and find_spec(plugin) is None:
        raise UserError(f"--profile {profile}: {plugin} is not installed; pip install '.[cluster]'")
    if executor == "slurm" and not shutil.which("sbatch"):
        raise UserError(
            f"--profile {profile}: there is no Slurm here (sbatch); run it on a login node, or omit --profile"
        )


def _profiles() -> list[str]:
    return sorted(str(file.parent) for file in Path("profiles").glob("*/config.yaml"))


def _snakemake(
    step: str,
    config: Path,
    assignments: list[str],
    cores: str | None,
    dry_run: bool,
    profile: Path | None,
    sdm: str | None,
) -> int:
    settings = _checked(config, assignments)  # an error is one sentence here, and a traceback in Snakemake
    from kv_transition import preflight

    with _refusing():
        until = _rules(step, settings)
        preflight.check_cores(cores)
        _check_machine(profile, sdm)
        preflight.check(settings)
        if not dry_run:
            warn(preflight.unlock(settings, config))
            warn(preflight.mend_times(settings))
        outdated = preflight.outdated(settings, rename=not dry_run)
        warn(preflight.too_long(settings))
    command = [sys.executable, "-m", "snakemake", "--configfile", str(config)]
    command += ["--logger", "rich", "--quiet", "rules", "host", "reason"]
    if profile:
        command += ["--workflow-profile", str(profile)]
    if cores or not profile:
        command += ["--cores", cores or "all"]
    if sdm:
        command += ["--software-deployment-method", sdm]
    if assignments:
        command += ["--config", f"set={json.dumps(assignments)}"]
    if dry_run:
        command += ["--dry-run"]
    if step == "analyze":
        command += ["--omit-from", "report", "exports"]
    if until:
        command += ["--until", *until]
    if outdated:
        command += ["--forcerun", *outdated]
    return subprocess.call(command, env=os.environ | {preflight.CHECKED: "1"})


def warn(sentence: str | None) -> None:
    """Print a sentence that does not stop the command."""
    if sentence:
        typer.echo(f"note: {sentence}", err=True)
