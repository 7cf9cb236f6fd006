"""The command line: arguments in, one outcome out.

Owns commands, exit codes and how errors are printed. Whatever needs torch is imported inside the command
that needs it, so that everything else answers at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from . import (
    __version__,
    endings,
    fit,
    interrupts,
    meter,
    phi3,
    plan_text,
    process,
    progress,
    recipe_checks,
    speeds,
    weights,
)
from .commands import Commands, TakesKeys
from .errors import (
    FitError,
    InputError,
    ModelError,
    Problem,
    QloraError,
    is_folder,
    printable,
)
from .recipe import Recipe
from .recipe_file import copy_recipe, document_keys, dump_recipe, find_recipe, list_recipes, load_recipe
from .run_folder import check_folder, check_run


class _Commands(Commands):
    """The commands, whose errors reach `main`: typer would end some of them without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with interrupts.watched() as asked, asked.at_once():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise SystemExit(1) from None  # `| head` has seen enough, and wants to hear nothing
        except KeyboardInterrupt as stop:
            raise endings.ended(stop, ctx.invoked_subcommand or "qlora-phi3") from None
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise  # told already: ours, and those of the command line's library
            raise endings.explained(error, ctx.invoked_subcommand or "qlora-phi3") from None


app = typer.Typer(
    name="qlora-phi3",
    cls=_Commands,
    help="Fine-tune the Phi-3 family on consumer GPUs. Begin with `recipe quickstart`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]


def main(*, to_the_end: bool = False) -> None:
    """The command that `sys.argv` names; `to_the_end`: the process ends with it, and no signal disturbs that.

    Exits 0 done, 1 failed while running, 2 input refused, 3 stopped and saved, 4 does not fit in memory,
    128 and the signal's number where it was stopped with nothing to save.
    """
    if sys.stderr is not None:
        sys.stderr = progress.lossy(sys.stderr)  # what is only told may be lost, nothing else with it
    progress.forgive(sys.stdout)
    with interrupts.watched(to_the_end=to_the_end) as asked, asked.deferred():
        code = _end()
    sys.exit(code)


def _end() -> int | str | None:
    """Run the command, tell how it ended, and the exit code of that."""
    code: int | str | None = 0
    try:
        app(prog_name="qlora-phi3")
    except QloraError as error:
        code = error.exit_code
        told: set[str] = set()
        for problem in error.problems:  # of a wrong export's rows all have one remedy: once is enough
            print(replace(problem, remedy="") if problem.remedy in told else problem, file=sys.stderr)  # noqa: T201
            told.add(problem.remedy)
    except SystemExit as end:
        code = end.code
    except OSError as error:  # of a help or a version, which no command prints
        failure = endings.failed(error, "standard output")
        code = failure.exit_code
        print(failure, file=sys.stderr)  # noqa: T201
    lost = progress.drop_unwritten(sys.stdout)
    if lost is not None:
        code = code or 1
    if lost is not None and not isinstance(lost, BrokenPipeError):
        problem = Problem(
            "standard output", f"cannot be written: {lost.strerror}.", "What is in files is whole."
        )
        print(problem, file=sys.stderr)  # noqa: T201
    progress.drop_unwritten(sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(cls=TakesKeys)
def recipe(
    name: Annotated[
        str | None, typer.Argument(help="Name of a recipe, or path of a YAML file.", metavar="NAME|PATH")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, for example train.epochs=3.", metavar="KEY=VALUE"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run; default runs/NAME/TIME.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check it and predict its memory; run nothing.")
    ] = False,
    as_json: AsJson = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe with every key filled in.")] = False,
    copy_to: Annotated[Path | None, typer.Option(help="Write a copy to this path, for editing.")] = None,
) -> None:
    """Run a recipe: fine-tune, evaluate, save. Without a name: list the recipes."""
    options = {"--out": out, "--dry-run": dry_run, "--show": show, "--copy-to": copy_to}
    _check_options(name, [option for option, value in options.items() if value])
    if name is None:
        _list_recipes(as_json)
        return
    path = find_recipe(name)
    found = load_recipe(path, overrides or ())
    if copy_to is not None:
        copy_recipe(path, found if overrides else None, copy_to)
        typer.echo(printable(f"wrote {copy_to}"), err=True)
        if as_json:
            _print_json({"path": str(copy_to)})
    elif show:
        _print_json(found.model_dump(mode="json")) if as_json else typer.echo(dump_recipe(found), nl=False)
    elif dry_run:
        _dry_run(found, out, as_json)
    else:
        _run(found, out, as_json)


@app.command(cls=TakesKeys)
def plan(
    name: Annotated[
        str, typer.Argument(help="Name of a recipe, or path of a YAML file.", metavar="NAME|PATH")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it.", metavar="KEY=VALUE")] = None,
    vram: Annotated[
        str | None, typer.Option(help="A card's memory, 8GiB: does it fit, and if not, what to change.")
    ] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Print what the memory is made of, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict a recipe's memory, card by card. Exit code 4 when it does not fit --vram."""
    found = load_recipe(find_recipe(name), overrides or ())
    geometry = _sizes(found)
    if geometry is None:
        reason = "whether it is a Phi-3, and of which sizes, is known once its config.json is downloaded."
        raise ModelError(found.model.base, reason, "Run the recipe, or name a checkpoint that is here.")
    room = fit.room(vram) if vram is not None else None
    changes = fit.advise(found, geometry, room) if room is not None else ()
    on_card = fit.card(found, geometry, room / 1024**3) if room is not None else None
    predicted = fit.planned(found, geometry)
    if as_json:
        answer = (
            plan_text.answer_json(on_card, predicted, room or 0, changes) if on_card is not None else None
        )
        cards = [one.to_json() for one in _cards(found, geometry)]
        figures = {"plan": predicted.to_json(), "cards": cards, "vram": answer}
        measured = [speed.to_json() for speed in speeds.alike(found)]
        _print_json({"recipe": found.model_dump(mode="json"), **figures, "measured": measured})
    else:
        if vram is not None and on_card is not None:
            plan_text.show_answer(vram, on_card, geometry, predicted, changes)
        else:
            plan_text.show_cards(found, geometry, _cards(found, geometry))
        plan_text.show_least(found, geometry, predicted)
        plan_text.show_merge(predicted)
        plan_text.show_times(found)
        if parts:
            plan_text.show_parts(predicted)
        else:
            typer.echo("part by part: --parts")
    if changes != ():
        raise typer.Exit(FitError.exit_code)


def _cards(found: Recipe, geometry: phi3.Geometry) -> list[fit.Card]:
    """The usual ones, and the one that is here."""
    present = meter.card_bytes()
    sizes = [*fit.SHOWN_GIB, *([present / 1024**3] if present else [])]
    return [fit.card(found, geometry, gib) for gib in sizes]


@app.command(cls=TakesKeys)
def doctor(
    name: Annotated[
        str | None,
        typer.Argument(help="Recipe whose data to check; none: check this machine.", metavar="NAME|PATH"),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it.", metavar="KEY=VALUE")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Print the first N training rows, token by token.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or a recipe's rows and tokens. Exit code 2 when a run would go wrong."""
    if name is None:
        _check_options(None, ["--samples"] if samples is not None else [], "doctor")
        found = None
    else:
        found = load_recipe(find_recipe(name), overrides or ())
        _check(found, None)
    process.prepare()
    from . import checkup

    if found is None:
        result = checkup.check_machine()
    else:
        process.quiet()
        result = checkup.check_recipe(found, samples or 0, lambda text: typer.echo(text, err=True))
    _print_json(result.to_json()) if as_json else checkup.show(result, Console())
    if result.count("error"):
        raise typer.Exit(InputError.exit_code)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or an adapter's folder.")],
    to: Annotated[
        list[str],
        typer.Option(
            metavar="TARGET",
            help="adapter, loralib, mlx, vllm, merged, gguf:q8_0 (or another kind), gguf-lora, ollama, hub; "
            "may be given several times.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for it; default exports/TARGET of the run.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    layout: Annotated[str | None, typer.Option(help="adapter: fused, split or unfused.")] = None,
    merge_base: Annotated[
        str | None,
        typer.Option(
            help="merged, gguf, ollama: the weights to add it to; dequant (as NF4 gave them back in "
            "training), original, or auto: the nearer to the model as trained, measured."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="merged: bf16 or fp16.")] = None,
    kind: Annotated[str | None, typer.Option(help="ollama: the GGUF's kind; q8_0.")] = None,
    num_ctx: Annotated[
        int | None, typer.Option(min=1, help="ollama: context in tokens; 4096 or what the base has.")
    ] = None,
    repo: Annotated[str | None, typer.Option(help="hub: where to, you/name.")] = None,
    what: Annotated[str | None, typer.Option(help="hub: adapter or merged.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="hub: list the files, send none.")] = False,
    no_gate: Annotated[
        bool, typer.Option("--no-gate", help="Do not load it in its program afterwards, which takes memory.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter for other programs, and check that they compute what was trained."""
    from . import export as exports

    told = {"layout": layout, "merge_base": merge_base, "dtype": dtype, "kind": kind, "num_ctx": num_ctx}
    told |= {"repo": repo, "what": what, "dry_run": dry_run or None, "gate": False if no_gate else None}
    options = exports.check(to, {name: value for name, value in told.items() if value is not None})
    if not is_folder(run, ModelError):
        reason = "is no folder." if run.exists() else "no such folder."
        raise ModelError(str(run), reason, "Give a run folder, or the folder of an adapter.")
    check_run(run)
    process.quiet()

    def say(text: str) -> None:
        typer.echo(printable(text), err=True)

    done = exports.export_all(run, to, out=out, force=force, options=options, say=say)
    if as_json:
        _print_json({"exports": [one.to_json() for one in done]})
    else:
        for one in done:
            typer.echo(printable(str(one)))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Make report.html anew from what a run folder holds."""
    from .report import rebuild

    check_run(run)
    typer.echo(rebuild(run, lambda text: typer.echo(printable(text), err=True)))


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the keys as a table instead.")] = False,
) -> None:
    """Print the recipe's JSON schema, for editors that complete from it."""
    if markdown:
        typer.echo(document_keys(), nl=False)
    else:
        _print_json(Recipe.model_json_schema())


def _check_options(name: str | None, given: list[str], command: str = "recipe") -> None:
    """Refuse options that would be passed over in silence."""
    if name is None and given:
        raise InputError(
            given[0], "is for one recipe, and none was named.", f"Write `{command} NAME` before it."
        )
    if len(given) > 1 and given != ["--out", "--dry-run"]:
        raise InputError(" ".join(given), "do not go together.", "Give one of them.")


def _list_recipes(as_json: bool) -> None:
    rows = [(path.stem, load_recipe(path)) for path in list_recipes()]
    if as_json:
        found = [{"name": n, "description": r.description, "smallest_card_gib": _card(r)} for n, r in rows]
        _print_json(found)
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what for")
    table.add_column("smallest card*", no_wrap=True)
    for name, one in rows:
        card = _card(one)
        table.add_row(name, one.description, f"{card} GB" if card else "none")
    console = Console()
    console.print(table)
    console.print("* predicted GPU memory; see `recipe NAME --dry-run`. quickstart needs no GPU.")


def _card(found: Recipe) -> int | None:
    geometry = weights.known_geometry(found.model)
    return fit.smallest_card(found, geometry) if geometry is not None else None


def _check(found: Recipe, out: Path | None) -> phi3.Geometry | None:
    """Refuse what can be told without torch, before seconds pass on it; the base's sizes where known."""
    from .data.read import check_files

    check_files(found.data)
    if out is not None:
        check_folder(out)
    return _sizes(found)


def _sizes(found: Recipe) -> phi3.Geometry | None:
    """The base's sizes where they are known without a download; refused where the recipe asks for more."""
    if found.adapter.init is not None:
        recipe_checks.check_init(Path(found.adapter.init))
    geometry = weights.known_geometry(found.model)
    if geometry is not None:
        recipe_checks.check_base(found, geometry)
    return geometry


def _dry_run(found: Recipe, out: Path | None, as_json: bool) -> None:
    geometry = _check(found, out)
    from .data.look import lines, look

    looked = look(found.data, found.train, found.evaluate)
    plan = fit.planned(found, geometry) if geometry is not None else None
    if as_json:
        _print_json(
            {
                "recipe": found.model_dump(mode="json"),
                "plan": plan.to_json() if plan else None,
                "smallest_card_gib": _card(found),
                "base_checked": geometry is not None,
                "rows_looked_at": [one.to_json() for one in looked],
            }
        )
        return
    if plan is None or geometry is None:
        typer.echo(f"{found.name}: the recipe's keys are valid; its base is not checked; nothing was run")
        typer.echo(
            f"no memory plan yet: whether {found.model.base} is a Phi-3, and of which sizes, is known "
            "once its config.json is downloaded"
        )
        typer.echo(lines(looked))
        return
    typer.echo(f"{found.name}: the recipe is valid; nothing was run")
    plan_text.show_least(found, geometry, plan)
    card = _card(found)
    typer.echo(f"smallest card: {f'{card} GB' if card else 'none of the usual ones'} (predicted)")
    typer.echo("card by card: `plan NAME`; part by part: `plan NAME --parts`")
    typer.echo(lines(looked))


def _run(found: Recipe, out: Path | None, as_json: bool) -> None:
    _check(found, out)
    process.quiet()
    from . import pipeline, report
    from .progress import Display

    with interrupts.watched() as asked, asked.deferred():
        done, folder = pipeline.run(found, out, Display())
        try:
            with asked.at_once():
                if as_json:
                    _print_json(done.to_json() | {"folder": str(folder)})
                else:
                    report.show(done, folder, progress.Output())
                if sys.stdout is not None:
                    sys.stdout.flush()
        except OSError as error:
            raise endings.untold(error, folder) from None
        except interrupts.Interrupted as stop:
            raise endings.whole(stop, folder, "while its results were printed") from None


def _print_json(content: Any) -> None:
    text = json.dumps(content, indent=2)  # ASCII: whatever a file holds, and whatever the terminal can show
    typer.echo(text.replace("\x7f", "\\u007f"))
