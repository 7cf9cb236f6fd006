"""A run, from recipe to report: reads top to bottom as the story of a fine-tune."""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

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
from .calibration import Calibration
from .engine import attention, native, residency
from .errors import FitError, InputError, Problem, RunError, StopError, shown
from .interrupts import WAITING, Interrupted, Interrupts, watched
from .meter import Meter
from .metrics_log import MetricsLog
from .progress import Display
from .recipe import Recipe
from .recipe_file import dump_recipe
from .settle import settle
from .watch import Trained

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
    # a signal takes effect where something waits for it, and never in the middle of making or clearing files
    with watched() as interrupts, interrupts.deferred():
        try:
            with run_folder.claim(out, recipe.name, interrupts.ignored) as place:
                done = _run(recipe, place, display, interrupts)
            done = _exported(done, recipe, place.path, display, interrupts)
            interrupts.check()
            return done, place.path
        except Interrupted as asked:
            raise endings.stopped(asked, place) from None
        except StopError:  # it says itself what is saved
            raise
        except InputError as error:
            if place is None or not place.training_began:
                raise
            raise RunError.of((*error.problems, endings.kept(place))) from None
        except (FitError, RunError) as error:
            raise endings.with_bearings(error, place) from None
        except Exception as error:
            told = endings.no_memory if ladder.ran_out(error) else endings.explained
            raise endings.with_bearings(told(error, recipe.name), place) from None


def _exported(
    done: report.RunReport, recipe: Recipe, folder: Path, display: Display, interrupts: Interrupts
) -> report.RunReport:
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
        with interrupts.at_once():
            export.export_all(folder, wanted, say=display.say, finished=made.append)
    except (InputError, RunError, FitError) as error:
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
    remedy = f"Then `export {shlex.quote(str(folder))} {' '.join(f'--to {target}' for target in left)}`."
    missing = "only its exports are missing" if not made else f"{len(left)} of its exports are missing"
    return Problem(str(folder), f"the run is whole, {missing}.", remedy)


@dataclass
class _Ready:
    """All that a run has before its first step."""

    recipe: Recipe
    plan: memory.Plan
    engine: dict[str, str]
    splits: data.Splits
    base: model.Base
    tuned: Any
    resident: residency.Residency | None
    meter: Meter
    adapting: _Adapting
    evaluation: _Evaluation
    notes: list[str]
    measured: dict[str, evaluate.Measured] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Planned steps."""
        return trainer.num_steps(self.recipe, len(self.splits.train.rows))


def _run(
    recipe: Recipe, place: run_folder.RunFolder, display: Display, interrupts: Interrupts
) -> report.RunReport:
    with interrupts.at_once():
        ready = _prepare(recipe, place, display)
        if ready.splits.eval is not None and recipe.evaluate.compare_base:
            with ready.meter.phase("evaluate base"), ready.tuned.disable_adapter():
                ready.measured["base"] = _measure("base", ready, display)
    interrupts.check()
    place.training_began = True
    log = MetricsLog(place.path / "metrics.jsonl", place.is_ours)
    with interrupts.deferred(WAITING):
        trained, calibration = _train(ready, place, display, log, interrupts)
        with ready.meter.phase("save"):
            trouble: BaseException | None = _save(ready, place, log, display)
    process.give_back()
    during = "saving"
    if ready.splits.eval is not None and interrupts.asked is None:
        during = "answering held-out rows"
        trouble = _evaluate_tuned(ready, display, interrupts) or trouble
    if interrupts.asked is not None:
        how_far = f"{trained.num_steps} of {ready.num_steps} steps"
        ready.notes.append(f"stopped by {interrupts.asked.name} after {how_far}")
    if log.trouble is not None:
        ready.notes.append(f"metrics.jsonl lacks lines: {log.trouble.strerror or log.trouble}")
    ready.notes += ready.splits.changed()
    done = _report(ready, trained, calibration)
    if ready.measured:
        found = {name: one.to_json() for name, one in ready.measured.items()}
        place.write_json("eval.json", found)
    report.write(done, place.path)
    if interrupts.asked is not None:
        raise endings.saved(interrupts.asked, place, trained.num_steps, ready.num_steps, during)
    if trouble is not None:
        raise trouble
    _note_speed(done, ready.adapting.recipe, display)
    return done


def _prepare(recipe: Recipe, place: run_folder.RunFolder, display: Display) -> _Ready:
    """Rows, plan, base and adapters; disk space for what will be saved is reserved."""
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
    export.check_base(recipe.export, checkpoint, place.path)
    engine, why = native.choose(recipe, checkpoint.config, device)
    recipe, plan, notes = settle(recipe.settled(engine=engine), checkpoint, splits, device, display.say)
    write_inputs(recipe, plan, place)
    told = ("overlong", "answers-cut")  # notes.py counts the one, `evaluate.reservations` the other
    notes += [finding.note for finding in findings if finding.code not in told]
    steps = trainer.num_steps(recipe, len(splits.train.rows))
    if recipe.train.warmup >= max(1, steps):
        notes.append(f"all {steps} steps are warm-up (train.warmup): the learning rate is never reached")
        display.say(f"warning: {notes[-1]}")

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
    adapting = _Adapting(recipe, place, display)
    evaluation = adapting.evaluation(phases.answer_tokens(recipe, checkpoint.geometry, plan.pass_tokens))
    chosen = {"name": recipe.train.engine, "reason": why}
    return _Ready(recipe, plan, chosen, splits, base, tuned, resident, meter, adapting, evaluation, notes)


def _train(
    ready: _Ready, place: run_folder.RunFolder, display: Display, log: MetricsLog, interrupts: Interrupts
) -> tuple[Trained, Calibration]:
    with ready.meter.phase("train"):
        return trainer.train(
            ready.tuned,
            ready.base,
            ready.splits.train,
            ready.recipe,
            place.path,
            meter=ready.meter,
            display=display,
            resident=ready.resident,
            held_out_loss=_held_out_loss(ready),
            adapted=ready.adapting.settle,
            log=log,
            stop=lambda: interrupts.asked is not None,
        )


def _evaluate_tuned(ready: _Ready, display: Display, interrupts: Interrupts) -> BaseException | None:
    """What kept the tuned model from being measured, if anything did: it costs its metrics, not the run."""
    try:
        with interrupts.at_once(), ready.meter.phase("evaluate tuned"):
            ready.measured["tuned"] = _measure("tuned", ready, display)
        ready.notes += evaluate.reservations(ready.measured["tuned"], ready.recipe.evaluate)
    except (Interrupted, Exception) as error:
        ready.notes.append(f"the tuned model was not evaluated to the end: {weights.first_line(error)}")
        return error
    return None


def _report(ready: _Ready, trained: Trained, calibration: Calibration) -> report.RunReport:
    now = datetime.datetime.now(datetime.timezone.utc)
    rows = adapters.trained_table(ready.tuned)
    return report.RunReport(
        name=ready.recipe.name,
        description=ready.recipe.description,
        toolkit_version=__version__,
        finished_utc=now.isoformat(timespec="seconds"),
        engine=ready.engine,
        machine=report.machine(ready.meter.device),
        versions=report.versions(),
        base=ready.base.checkpoint.provenance.to_json(),
        parameters=asdict(model.ParameterCounts.of(ready.tuned)),
        trained=[row.to_json() for row in rows],
        data=_data_json(ready),
        training=asdict(trained),
        metrics={name: found.metrics for name, found in ready.measured.items()},
        memory={
            "predicted": ready.plan.to_json(),
            "measured": ready.meter.to_json(),
            "calibration": calibration.to_json(),
            "adapted": [event.to_json() for event in ready.adapting.events],
        },
        recipe=ready.adapting.recipe.model_dump(mode="json"),
        notes=[*ready.notes, *trained.notes(), *calibration.notes(), *map(str, ready.adapting.events)],
    )


def _save(ready: _Ready, place: run_folder.RunFolder, log: MetricsLog, display: Display) -> RunError | None:
    """Save the adapter, in another folder where the run's can no longer be written: then the error says so.

    Raises:
        RunError: there is no place to save it.
    """
    wanted, moved = place.path, None
    place.release()
    try:
        place.restore()
        adapters.save(ready.tuned, ready.base, place.path / "adapter")
    except Exception as error:  # whatever a library makes of this place: another may do, training again costs
        display.say(f"{wanted} cannot be written: {weights.first_line(error)}")
        try:
            place.move()
            adapters.save(ready.tuned, ready.base, place.path / "adapter")
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
        self.place.keep_text("recipe.yaml", dump_recipe(recipe))
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


def write_inputs(recipe: Recipe, plan: memory.Plan, place: run_folder.RunFolder) -> None:
    """The settled recipe and the prediction, before anything is trained."""
    place.plan = plan.to_json()
    place.write_text("recipe.yaml", dump_recipe(recipe))
    place.write_json("plan.json", place.plan)


_LAUNCHED: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _one_process() -> None:
    """Refuse to be one of several; what a launcher tells the only one would have libraries look for others.

    Raises:
        InputError: WORLD_SIZE is above 1, or no number.
    """
    told = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if not (told.isascii() and told.isdecimal()):
        raise InputError("WORLD_SIZE", f"{shown(told)} is no number of processes.", "Unset it.")
    if told.lstrip("0") not in ("", "1"):
        reason = "several processes are not available yet."
        raise InputError("WORLD_SIZE", reason, "Start it with plain python, without torchrun or accelerate.")
    for name in [*os.environ]:
        if name in _LAUNCHED or name.startswith("ACCELERATE_"):
            del os.environ[name]


def _measure(which: str, ready: _Ready, display: Display) -> evaluate.Measured:
    splits, recipe = ready.splits, ready.recipe
    assert splits.eval is not None
    settings = recipe.evaluate
    scored = len(splits.eval.rows) if {"loss", "perplexity"} & set(settings.metrics) else 0
    total = scored + min(settings.num_answered, len(splits.eval.conversations))
    with display.steps(f"evaluate {which}", total) as steps:
        found = evaluate.measure(
            ready.tuned,
            ready.base.tokenizer,
            splits.eval,
            settings,
            splits.turns.end,
            batch_rows=ready.evaluation.rows,
            batch_tokens=ready.evaluation.tokens,
            seed=recipe.train.seed,
            scored=lambda count: steps.update(count, "rows"),
            done=lambda count: steps.update(scored + count, "rows and answers"),
        )
    display.say(f"{which}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items()))
    return found


def _held_out_loss(ready: _Ready) -> Callable[[], float] | None:
    if ready.splits.eval is None or ready.recipe.train.eval_every is None:
        return None
    rows = evaluate.scored_rows(ready.splits.eval, ready.recipe.train.seed)
    return lambda: evaluate.mean_loss(ready.tuned, rows, ready.evaluation.rows)


def _data_json(ready: _Ready) -> dict[str, Any]:
    splits, recipe, measured = ready.splits, ready.recipe, ready.measured
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
