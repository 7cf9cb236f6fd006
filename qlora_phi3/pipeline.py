"""A run, from recipe to report: reads top to bottom as the story of a fine-tune."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError

from . import (
    __version__,
    adapters,
    data,
    endings,
    evaluate,
    export,
    ladder,
    memory,
    model,
    phases,
    process,
    recipe_checks,
    report,
    run_folder,
    speeds,
    trainer,
    weights,
)
from .engine import attention, native, residency
from .errors import FitError, InputError, Problem, QloraError, RecipeError, RunError, StopError
from .interrupts import WAITING, Interrupted, Interrupts
from .meter import Meter
from .metrics_log import MetricsLog
from .progress import Display
from .recipe import Recipe
from .recipe_file import dump_recipe
from .units import format_bytes, parse_bytes

SPARE_BYTES: Final = 16 * 2**20
"""Disk space beside the adapter's weights: tokenizer, answers, report; Phi-3's tokenizer has 3.5 MB."""


def run(
    recipe: Recipe, out: Path | None = None, display: Display | None = None
) -> tuple[report.RunReport, Path]:
    """Fine-tune as the recipe says, into `out` (default: runs/<name>/<UTC time>).

    What ends a run before the first step leaves nothing behind; from then on nothing is removed, and the
    adapter is saved before anything else is done with it.

    Raises:
        InputError: recipe, data, model or folder cannot be used.
        RunError: the run failed, or something of it could not be written.
        FitError: memory did not suffice, and `memory.on_oom` could or should not help.
        StopError: the process was asked to end, by Ctrl-C, SIGTERM or SIGHUP.
    """
    display = display or Display()
    _one_process()
    data.check_files(recipe.data)
    place: run_folder.RunFolder | None = None
    with Interrupts().watched() as interrupts:
        try:
            with run_folder.claim(out, recipe.name) as place:
                done = _run(recipe, place, display, interrupts)
            return _exported(done, recipe, place.path, display), place.path
        except Interrupted as asked:
            raise endings.stopped(asked, place) from None
        except InputError as error:
            if place is None or not place.training_began:
                raise
            raise RunError.of((*error.problems, endings.kept(place))) from None
        except (FitError, RunError) as error:
            raise endings.with_bearings(error, place) from None
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or ladder.ran_out(error)):
                raise
            found = FitError(recipe.name, f"out of memory: {weights.first_line(error)}")
            raise endings.with_bearings(found, place) from None
        except OSError as error:
            raise endings.with_bearings(endings.failed(error, recipe.name), place) from None


def _exported(done: report.RunReport, recipe: Recipe, folder: Path, display: Display) -> report.RunReport:
    """The report with what was exported, once the run's own models are gone.

    Raises:
        RunError: an export failed; whatever its reason, the run is whole and stays.
    """
    wanted = [target for target in recipe.export if target != "adapter"]  # which a run always has
    if not wanted:
        return done
    process.give_back()
    made: list[export.Exported] = []
    try:
        export.export_all(folder, wanted, say=display.say, finished=made.append)
    except (InputError, RunError) as error:
        raise RunError.of((*error.problems, _unexported(folder, wanted, made))) from None
    except Interrupted as asked:
        stop = Problem(str(folder), f"stopped by {asked.name}.")
        raise StopError.of((stop, _unexported(folder, wanted, made))) from None
    finally:
        if made:
            folders = [one.to_json() | {"folder": f"exports/{one.folder.name}"} for one in made]
            done = replace(done, exports=folders)
            report.write(done, folder)
    return done


def _unexported(folder: Path, wanted: list[str], made: list[export.Exported]) -> Problem:
    left = [target for target in wanted if target not in {one.target for one in made}]
    remedy = f"Then `export {folder} {' '.join(f'--to {target}' for target in left)}`."
    missing = "only its exports are missing" if not made else f"{len(left)} of its exports are missing"
    return Problem(str(folder), f"the run is whole, {missing}.", remedy)


def _run(
    recipe: Recipe, place: run_folder.RunFolder, display: Display, interrupts: Interrupts
) -> report.RunReport:
    device = model.device_for_run()
    meter = Meter(device.type)

    tokenizer_folder = weights.locate_tokenizer(recipe.model, display.say)
    before = weights.stamps(tokenizer_folder)
    tokenizer = model.load_tokenizer(tokenizer_folder)
    splits, findings = data.check(recipe, tokenizer)
    for finding in findings:
        display.say(str(finding))
    checkpoint = weights.locate(recipe.model, display.say, tokenizer_folder)
    recipe_checks.check_base(recipe, checkpoint.geometry)
    engine, why = native.choose(recipe, checkpoint.config, device)
    recipe, plan, notes = settle(recipe.settled(engine=engine), checkpoint, splits, device, display.say)
    write_inputs(recipe, plan, place)
    adapting = _Adapting(recipe, place, display)
    evaluation = adapting.evaluation(phases.answer_tokens(recipe, checkpoint.geometry, plan.pass_tokens))
    told = ("overlong", "answers-cut")  # `_notes` counts the one, `evaluate.reservations` the other
    notes += [finding.note for finding in findings if finding.code not in told]

    display.say(f"loading {recipe.model.base} ({recipe.model.quantization}) on {device.type}")
    with meter.phase("load"):
        base = model.load(checkpoint, recipe.model, device, attention.register(), display.say)
        weights.check_unchanged(checkpoint, before)
        torch.manual_seed(recipe.train.seed)
        tuned = adapters.attach(base, recipe)
        resident = residency.install(base.model, recipe)
    process.give_back()
    for line in adapters.summarize(adapters.trained_table(tuned)):
        display.say(f"training {line}")
    place.reserve(adapters.saved_bytes(tuned) + SPARE_BYTES)

    measured: dict[str, evaluate.Measured] = {}
    if splits.eval is not None and recipe.evaluate.compare_base:
        with meter.phase("evaluate base"), tuned.disable_adapter():
            measured["base"] = _measure("base", tuned, base, splits, recipe, display, evaluation)

    with interrupts.deferred():  # from here on a signal waits until what there is has been written
        interrupts.check()
        place.training_began = True
        log = MetricsLog(place.path / "metrics.jsonl")
        with interrupts.deferred(WAITING):
            with meter.phase("train"):
                trained, calibration = trainer.train(
                    tuned,
                    base,
                    splits.train,
                    recipe,
                    place.path,
                    meter=meter,
                    display=display,
                    resident=resident,
                    held_out_loss=_held_out_loss(tuned, splits, recipe, evaluation.rows),
                    adapted=adapting.settle,
                    log=log,
                    stop=lambda: interrupts.asked is not None,
                )
            with meter.phase("save"):
                trouble: BaseException | None = _save(tuned, base, place, log, display)

        process.give_back()
        planned = trainer.num_steps(recipe, len(splits.train.rows))
        during = "saving"
        if splits.eval is not None and interrupts.asked is None:
            during = "answering held-out rows"
            try:
                with interrupts.at_once(), meter.phase("evaluate tuned"):
                    measured["tuned"] = _measure("tuned", tuned, base, splits, recipe, display, evaluation)
                notes += evaluate.reservations(measured["tuned"], recipe.evaluate)
            except (Interrupted, QloraError, RuntimeError, MemoryError, OSError) as error:
                trouble = trouble or error
                notes.append(f"the tuned model was not evaluated to the end: {weights.first_line(error)}")
        if interrupts.asked is not None:
            notes.append(f"stopped by {interrupts.asked.name} after {trained.num_steps} of {planned} steps")
        if log.trouble is not None:
            notes.append(f"metrics.jsonl lacks lines: {log.trouble.strerror or log.trouble}")
        notes += splits.changed()

        done = report.RunReport(
            name=recipe.name,
            description=recipe.description,
            toolkit_version=__version__,
            finished_utc=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            engine={"name": recipe.train.engine, "reason": why},
            machine=report.machine(device.type),
            versions=report.versions(),
            base=checkpoint.provenance.to_json(),
            parameters=asdict(model.ParameterCounts.of(tuned)),
            trained=[row.to_json() for row in adapters.trained_table(tuned)],
            data=_data_json(splits, recipe, measured),
            training=asdict(trained),
            metrics={name: found.metrics for name, found in measured.items()},
            memory={
                "predicted": plan.to_json(),
                "measured": meter.to_json(),
                "calibration": calibration.to_json(),
                "adapted": [event.to_json() for event in adapting.events],
            },
            recipe=adapting.recipe.model_dump(mode="json"),
            notes=[*notes, *trained.notes(), *calibration.notes(), *map(str, adapting.events)],
        )
        if measured:
            place.write_json("eval.json", {name: found.to_json() for name, found in measured.items()})
        report.write(done, place.path)
    if interrupts.asked is not None:
        raise endings.saved(interrupts.asked, place, trained.num_steps, planned, during)
    if trouble is not None:
        raise trouble
    _note_speed(done, adapting.recipe, display)
    return done


def _save(
    tuned: Any, base: model.Base, place: run_folder.RunFolder, log: MetricsLog, display: Display
) -> RunError | None:
    """Save the adapter, in another folder where the run's can no longer be written: then the error says so.

    Raises:
        RunError: there is no place to save it.
    """
    wanted, moved = place.path, None
    place.release()
    try:
        place.restore()
        adapters.save(tuned, base, place.path / "adapter")
    except (OSError, SafetensorError) as error:
        display.say(f"{wanted} cannot be written: {weights.first_line(error)}")
        try:
            place.move()
            adapters.save(tuned, base, place.path / "adapter")
        except (OSError, SafetensorError) as last:
            reason = f"the adapter cannot be written here or elsewhere: {weights.first_line(last)}."
            raise RunError(str(place.path), reason, "Free some space, and train again.") from None
        moved = endings.elsewhere(wanted, place, error)
    log.complete(place.path / "metrics.jsonl")
    return moved


def _note_speed(done: report.RunReport, recipe: Recipe, display: Display) -> None:
    """For later plans of this base on this computer; a few steps say little."""
    tokens, steps = done.training["num_tokens"], done.training["num_steps"]
    if steps < speeds.LEAST_STEPS:
        return
    row_tokens = tokens // done.training["num_rows"]
    reached = done.training["tokens_per_second"]
    try:
        speeds.note(speeds.Speed.of(recipe, done.machine, reached, row_tokens, done.finished_utc))
    except OSError as error:
        display.say(f"the tokens/s are not noted for later plans: {error}")


def settle(
    recipe: Recipe,
    checkpoint: weights.Checkpoint,
    splits: data.Splits,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Recipe, memory.Plan, list[str]]:
    """Replace `auto` by what fits and say so, predict its memory, and note what a user should know."""
    row_tokens = max(split.longest for split in (splits.train, splits.eval) if split is not None)
    known = splits.train.rows.fullest_step(recipe.train.effective_batch)
    usable, kind = memory.usable_bytes(allowed_bytes(recipe, device)), device_kind(device)
    way = memory.Ways(recipe, checkpoint.geometry, known=known, device=kind).fastest(usable)
    notes = []
    chosen_host = recipe.memory.host == "auto" and bool(way.host)
    if chosen_host or "auto" in (recipe.train.activations, recipe.train.micro_batch):
        notes.append(way.of(usable))
        say(notes[0])
    recipe = recipe.settled(**way.keys)
    plan = memory.predict(
        recipe,
        checkpoint.geometry,
        micro_batch=way.micro_batch,
        row_tokens=row_tokens,
        known=known,
        device=kind,
    )
    _hold_to_budget(recipe, plan, device)
    return recipe, plan, notes + _notes(recipe, splits, device)


@dataclass(frozen=True)
class _Evaluation:
    """How much is evaluated at once: rows whose loss is measured, tokens of prompts and answers."""

    rows: ladder.Halving
    tokens: ladder.Halving


@dataclass
class _Adapting:
    """What changed where memory ran out: said, kept for the report, in training written into the recipe."""

    recipe: Recipe
    place: run_folder.RunFolder
    display: Display
    events: list[ladder.Adapted] = field(default_factory=list)

    def settle(self, event: ladder.Adapted, recipe: Recipe) -> None:
        """Training goes on with `recipe`."""
        self.recipe = recipe
        self.place.write_text("recipe.yaml", dump_recipe(recipe))
        self._note(event)

    def evaluation(self, answer_tokens: int) -> _Evaluation:
        """Begins with the micro batch and `answer_tokens`; what had to be halved once stays so."""
        return _Evaluation(
            self._halving(int(self.recipe.train.micro_batch), "rows"),
            self._halving(answer_tokens, "tokens of prompts and answers"),
        )

    def _halving(self, size: int, unit: str) -> ladder.Halving:
        if self.recipe.memory.on_oom == "fail":
            return ladder.Halving(size)

        def told(smaller: int, said: str) -> None:
            self._note(ladder.Adapted("evaluation", f"{smaller} {unit} at once", said))

        return ladder.Halving(size, told)

    def _note(self, event: ladder.Adapted) -> None:
        self.events.append(event)
        self.display.say(str(event))


def device_kind(device: torch.device) -> Literal["cuda", "cpu"]:
    return "cuda" if device.type == "cuda" else "cpu"


def free_bytes(device: torch.device) -> int:
    """Memory that a run may use now: free on the GPU, or available to the process on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def allowed_bytes(recipe: Recipe, device: torch.device) -> int:
    """Memory that a run may use: what is free, and no more than the budget leaves beside context or imports.

    Raises:
        RecipeError: the budget is more than the device has.
    """
    free = free_bytes(device)
    if recipe.memory.budget == "auto":
        return free
    budget, total = parse_bytes(recipe.memory.budget), total_bytes(device)
    if budget > total:
        reason = f"{recipe.memory.budget} is more than the {format_bytes(total)} of this {device.type}."
        raise RecipeError("memory.budget", reason, "Lower it, or write auto.")
    on_cpu = memory.IMPORTS_BYTES + memory.HEAP_BYTES
    beside = memory.CONTEXT_BYTES if device.type == "cuda" else on_cpu
    return min(free, budget - beside)


def total_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of the computer."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    import psutil

    return int(psutil.virtual_memory().total)


def _hold_to_budget(recipe: Recipe, plan: memory.Plan, device: torch.device) -> None:
    """Refuse a plan above the budget, and let CUDA's allocator refuse what the plan did not foresee.

    Raises:
        FitError: the plan needs more than the budget.
    """
    if recipe.memory.budget == "auto":
        return
    budget = parse_bytes(recipe.memory.budget)
    if plan.needed_bytes > budget:
        reason = f"the run needs {format_bytes(plan.needed_bytes)}, the budget is {recipe.memory.budget}."
        raise FitError("memory.budget", reason, "The plan command's --vram says which keys to change.")
    if device.type == "cuda":
        share = (budget - memory.CONTEXT_BYTES) / total_bytes(device)
        torch.cuda.set_per_process_memory_fraction(share, device)


def write_inputs(recipe: Recipe, plan: memory.Plan, place: run_folder.RunFolder) -> None:
    """The settled recipe and the prediction, before anything is trained."""
    place.plan = plan.to_json()
    place.write_text("recipe.yaml", dump_recipe(recipe))
    place.write_json("plan.json", place.plan)


def _one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        reason = "several processes are not available yet."
        raise InputError("WORLD_SIZE", reason, "Start it with plain python, without torchrun or accelerate.")


def _measure(
    which: str,
    tuned: Any,
    base: model.Base,
    splits: data.Splits,
    recipe: Recipe,
    display: Display,
    evaluation: _Evaluation,
) -> evaluate.Measured:
    assert splits.eval is not None
    settings = recipe.evaluate
    scored = len(splits.eval.rows) if {"loss", "perplexity"} & set(settings.metrics) else 0
    total = scored + min(settings.num_answered, len(splits.eval.conversations))
    with display.steps(f"evaluate {which}", total) as steps:
        found = evaluate.measure(
            tuned,
            base.tokenizer,
            splits.eval,
            settings,
            splits.turns.end,
            batch_rows=evaluation.rows,
            batch_tokens=evaluation.tokens,
            seed=recipe.train.seed,
            scored=lambda count: steps.update(count, "rows"),
            done=lambda count: steps.update(scored + count, "rows and answers"),
        )
    display.say(f"{which}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items()))
    return found


def _held_out_loss(tuned: Any, splits: data.Splits, recipe: Recipe, at_once: ladder.Halving) -> Any:
    if splits.eval is None or recipe.train.eval_every is None:
        return None
    rows = evaluate.scored_rows(splits.eval, recipe.train.seed)
    return lambda: evaluate.mean_loss(tuned, rows, at_once)


def _notes(recipe: Recipe, splits: data.Splits, device: torch.device) -> list[str]:
    notes = []
    optimizer, chosen = recipe.train.optimizer, "optimizer" in recipe.train.model_fields_set
    if device.type == "cpu" and optimizer.startswith("paged") and chosen:
        notes.append(f"{optimizer}: on a CPU optimizer states stay where they are; paging needs CUDA")
    if device.type == "cpu" and recipe.train.activations == "offload":
        notes.append("layer inputs are copied and gain nothing by it on a CPU; offloading them needs CUDA")
    if device.type == "cpu" and recipe.memory.host:
        parts = " and ".join(recipe.memory.host)
        notes.append(f"{parts} in host memory: a CPU has no other, nothing is gained; it needs CUDA")
    rows, batch = len(splits.train.rows), recipe.train.effective_batch
    notes += _overlong_notes(splits.train, "training", recipe)
    if splits.eval is not None:
        notes += _overlong_notes(splits.eval, "held-out", recipe)
    if rows % batch:
        notes.append(f"the last step of an epoch has {rows % batch} rows instead of {batch}")
    if splits.eval is None:
        notes.append("data.eval is null: nothing was evaluated")
    elif recipe.evaluate.compares_answers and len(splits.eval.rows) < recipe.evaluate.samples:
        notes.append(
            f"only {len(splits.eval.rows)} held-out rows for evaluate.samples {recipe.evaluate.samples}"
        )
    return notes


def _overlong_notes(split: data.Split, which: str, recipe: Recipe) -> list[str]:
    """A sentence for each thing that happened to rows longer than data.max_length."""
    dropped, longer = split.num_dropped, "longer than data.max_length"
    notes = []
    if dropped and recipe.data.overlong == "drop":
        notes.append(f"{dropped} {which} rows were {longer} and dropped")
    elif dropped:
        what = "rows or exchanges" if recipe.data.overlong == "split" else "rows"
        notes.append(f"{dropped} {which} {what} were {longer} and dropped: no room for an answer to train on")
    if split.num_truncated:
        notes.append(f"{split.num_truncated} {which} rows were {longer} and truncated: their end is missing")
    if split.num_split:
        notes.append(f"{split.num_split} {which} rows were {longer} and split between turns")
    return notes


def _data_json(splits: data.Splits, recipe: Recipe, measured: dict[str, evaluate.Measured]) -> dict[str, Any]:
    found: dict[str, Any] = {"train": splits.train.to_json(), "eval": None, "eval_samples": 0}
    found["system_prompt"] = splits.train.system_prompt
    found["sources"] = splits.sources_json()
    if splits.eval is not None:
        rows = len(splits.eval.rows)
        answers = max((len(found.samples) for found in measured.values()), default=0)
        during = len(evaluate.scored_rows(splits.eval, recipe.train.seed))
        on = {"loss": rows, "answers": answers, "while_training": during if recipe.train.eval_every else 0}
        compared = answers if recipe.evaluate.compares_answers else rows
        found |= {"eval": splits.eval.to_json(), "eval_samples": compared, "measured_on": on}
    return found
