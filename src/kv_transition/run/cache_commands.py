"""The commands `python -m kv_transition cache create|continue`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kv_transition.errors import UserError
from kv_transition.parsing import read_text

app = typer.Typer(no_args_is_help=True, help="Save a compressed cache and continue from it.")

Model = Annotated[str, typer.Option(help="Model folder or hub id.")]
Revision = Annotated[str | None, typer.Option(help="Commit of the hub repository.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]


@app.command()
def create(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text file to prefill.")],
    policy: Annotated[str, typer.Option(help="Kind of the policy that decides which entries are kept.")],
    budget: Annotated[str, typer.Option(help="Kept entries: a fraction such as 0.2, or tokens such as t128.")],
    output: Annotated[Path, typer.Option(help="File to write the cache to.")],
    option: Annotated[list[str], typer.Option(help="Hyper-parameter of the policy, such as window=16.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Seed of a random policy.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    revision: Revision = None,
    device: Device = "auto",
) -> None:
    """Prefill a text, compress it to the budget and save the cache."""

    def run() -> None:
        from kv_transition.budget import Budget
        from kv_transition.policies.catalog import is_press, resolve

        # errors are reported before a model is loaded
        kept = Budget.parse(budget) if budget[:1] in ("r", "t") else Budget.of_fraction(budget, "--budget")
        kind, hyper_parameters = resolve(policy, _options(option))
        if is_press(kind):
            raise UserError(
                f"--policy: {kind} compresses only during the prefill of a prompt; choose a policy of this project"
            )
        content = _read(text)

        from kv_transition.engines.local import LocalEngine
        from kv_transition.run import cache

        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"--dtype: {dtype!r} is not allowed; choose one of float32, bfloat16, float16")
        check_device(device)
        engine = LocalEngine.from_pretrained(model, revision=revision, dtype=dtype, device=device)
        made = cache.create(engine, content, kind, hyper_parameters, kept, seed=seed)
        cache.save(engine, made, output)
        typer.echo(
            f"{output}: {made.state.entries:g} of {made.state.length} entries per KV head, {made.state.nbytes} bytes",
            err=True,
        )

    _one_sentence(run)


@app.command("continue")
def continue_(
    cache_file: Annotated[Path, typer.Argument(metavar="CACHE", help="A file written by `cache create`.")],
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text that is read after the cached text.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of the answer in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of sampling; 0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    revision: Revision = None,
    device: Device = "auto",
) -> None:
    """Read a prompt after a saved cache and print the answer."""

    def run() -> None:
        from kv_transition.cache import file

        dtype = file.read_facts(cache_file).get("dtype", "float32")

        from kv_transition.engines.local import LocalEngine
        from kv_transition.run import cache

        check_device(device)
        engine = LocalEngine.from_pretrained(model, revision=revision, dtype=dtype, device=device)
        said, _ = cache.continue_from(
            engine, cache.load(engine, cache_file), prompt, max_tokens, temperature=temperature, seed=seed
        )
        typer.echo(said)

    _one_sentence(run)


def check_device(device: str) -> None:
    """Raise UserError for a device that torch does not know by that name."""
    if not re.fullmatch(r"cpu|auto|cuda(:\d+)?", device):
        raise UserError(f"--device: {device!r} is not allowed; choose one of cpu, cuda, auto")


def _options(given: list[str]) -> dict[str, object]:
    from kv_transition.yaml_text import parse_yaml

    options = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise UserError(f"--option: {each!r} is not of the form name=value, such as window=16")
        options[name] = parse_yaml(value, f"--option {name}")
    return options


def _read(path: Path) -> str:
    try:
        return read_text(path, "text file")
    except UserError as error:
        raise UserError(f"--text: {error}") from None


def _one_sentence(run: Callable[[], None]) -> None:
    try:
        run()
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
