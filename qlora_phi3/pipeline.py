"""A run, from recipe to report: reads top to bottom as the story of a fine-tune."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from . import (
    __version__,
    adapters,
    data,
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
from .errors import FitError, InputError, Problem, RecipeError, RunError
from .meter import Meter
from .progress import Display
from .recipe import Recipe, Source
from .recipe_file import dump_recipe
from .units import format_bytes, parse_bytes


def run(
    recipe: Recipe, out: Path | None = None, display: Display | None = None
) -> tuple[report.RunReport, Path]:
    """Fine-tune as the recipe says, into `out` (default: runs/<name>/<UTC time>).

    Raises:
        InputError: recipe, data, model or folder cannot be used -> nothing is left behind.
        RunError: the training failed -> the folder keeps what was measured until then.
        FitError: memory did not suffice, and `memory.on_oom` could or should not help -> likewise.
    """
    display = display or Display()
    _one_process()
    data.check_files(recipe.data)
    with run_folder.create(out or run_folder.default(recipe)) as folder:
        try:
            done = _run(recipe, folder, display)
        except FitError as error:
            raise _with_plan(error, folder) from None
        except RuntimeError as error:
            if not ladder.ran_out(error):
                raise
            found = FitError(str(folder), f"out of memory: {weights.first_line(error)}")
            raise _with_plan(found, folder) from None
    return _exported(done, recipe, folder, display), folder


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
        left = [target for target in wanted if target not in {one.target for one in made}]
        remedy = f"Then `export {folder} {' '.join(f'--to {target}' for target in left)}`."
        missing = "only its exports are missing" if not made else f"{len(left)} of its exports are missing"
        rest = Problem(str(folder), f"the run is whole, {missing}.", remedy)
        raise RunError.of((*error.problems, rest)) from None
    finally:
        if made:
            folders = [one.to_json() | {"folder": f"exports/{one.folder.name}"} for one in made]
            done = replace(done, exports=folders)
            report.write(done, folder)
    return done


def _run(recipe: Recipe, folder: Path, display: Display) -> report.RunReport:
    device = model.device_for_run()
    meter = Meter(device.type)

    tokenizer = model.load_tokenizer(weights.locate_tokenizer(recipe.model, display.say))
    splits, findings = data.check(recipe, tokenizer)
    for finding in findings:
        display.say(str(finding))
    checkpoint = weights.locate(recipe.model, display.say)
    recipe_checks.check_base(recipe, checkpoint.geometry)
    engine, why = native.choose(recipe, checkpoint.config, device)
    recipe, plan, notes = settle(recipe.settled(engine=engine), checkpoint, splits, device, display.say)
    write_inputs(recipe, plan, folder)
    adapting = _Adapting(recipe, folder, display)
    evaluation = adapting.evaluation(phases.answer_tokens(recipe, checkpoint.geometry))
    notes += [finding.note for finding in findings if finding.code != "overlong"]  # `_notes` counts them

    display.say(f"loading {recipe.model.base} ({recipe.model.quantization}) on {device.type}")
    with meter.phase("load"):
        base = model.load(checkpoint, recipe.model, device, attention.register(), display.say)
        torch.manual_seed(recipe.train.seed)
        tuned = adapters.attach(base, recipe)
        resident = residency.install(base.model, recipe)
    process.give_back()
    for row in adapters.trained_table(tuned):
        display.say(f"training {row.describe()}")

    measured: dict[str, evaluate.Measured] = {}
    if splits.eval is not None and recipe.evaluate.compare_base:
        with meter.phase("evaluate base"), tuned.disable_adapter():
            measured["base"] = _measure("base", tuned, base, splits, recipe, display, evaluation)

    with meter.phase("train"):
        trained, calibration = trainer.train(
            tuned,
            base,
            splits.train,
            recipe,
            folder,
            meter=meter,
            display=display,
            resident=resident,
            held_out_loss=_held_out_loss(tuned, splits, recipe, evaluation.rows),
            adapted=adapting.settle,
        )

    process.give_back()
    if splits.eval is not None:
        with meter.phase("evaluate tuned"):
            measured["tuned"] = _measure("tuned", tuned, base, splits, recipe, display, evaluation)
        write_json(folder / "eval.json", {name: found.to_json() for name, found in measured.items()})

    with meter.phase("save"):
        adapters.save(tuned, base, folder / "adapter")

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
        data=_data_json(splits, recipe),
        training=asdict(trained),
        metrics={name: found.metrics for name, found in measured.items()},
        memory={
            "predicted": plan.to_json(),
            "measured": meter.to_json(),
            "calibration": calibration.to_json(),
            "adapted": [event.to_json() for event in adapting.events],
        },
        recipe=adapting.recipe.model_dump(mode="json"),
        notes=[*notes, *calibration.notes(), *map(str, adapting.events)],
    )
    report.write(done, folder)
    _note_speed(done, adapting.recipe, display)
    return done


def _note_speed(done: report.RunReport, recipe: Recipe, display: Display) -> None:
    """For later plans of this base on this computer; a few steps say little."""
    tokens, steps = done.training["num_tokens"], done.training["num_steps"]
    if steps < speeds.LEAST_STEPS:
        return
    row_tokens = tokens // (steps * recipe.train.effective_batch)
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
    folder: Path
    display: Display
    events: list[ladder.Adapted] = field(default_factory=list)

    def settle(self, event: ladder.Adapted, recipe: Recipe) -> None:
        """Training goes on with `recipe`."""
        self.recipe = recipe
        _write_recipe(recipe, self.folder)
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


def _with_plan(error: FitError, folder: Path) -> FitError:
    """The error, and the part of the plan that it is about, where there is one."""
    path = folder / "plan.json"
    if not path.exists():
        return error
    plan = json.loads(path.read_text(encoding="utf-8"))
    fullest = max(plan["phases"], key=lambda phase: phase["peak_bytes"])
    parts = ", ".join(f"{part['name']} {format_bytes(part['bytes'])}" for part in fullest["parts"])
    reason = f"predicted {format_bytes(fullest['peak_bytes'])} of tensors in {fullest['name']}: {parts}."
    return FitError.of((*error.problems, Problem(str(path), reason)))


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


def write_inputs(recipe: Recipe, plan: memory.Plan, folder: Path) -> None:
    """The settled recipe and the prediction, before anything is trained."""
    _write_recipe(recipe, folder)
    write_json(folder / "plan.json", plan.to_json())


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    num_rows = min(settings.samples, len(splits.eval.rows))
    with display.steps(f"evaluate {which}", num_rows) as steps:
        found = evaluate.measure(
            tuned,
            base.tokenizer,
            splits.eval,
            settings,
            splits.turns.end,
            batch_rows=evaluation.rows,
            batch_tokens=evaluation.tokens,
            done=lambda count: steps.update(count, "answers"),
        )
    display.say(f"{which}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items()))
    return found


def _held_out_loss(tuned: Any, splits: data.Splits, recipe: Recipe, at_once: ladder.Halving) -> Any:
    if splits.eval is None or recipe.train.eval_every is None:
        return None
    rows = splits.eval.rows[: recipe.evaluate.samples]
    return lambda: evaluate.mean_loss(tuned, rows, at_once)


def _notes(recipe: Recipe, splits: data.Splits, device: torch.device) -> list[str]:
    notes = []
    if device.type == "cpu" and recipe.train.optimizer.startswith("paged"):
        notes.append("optimizer states stay where they are on a CPU; paging needs CUDA")
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
    elif len(splits.eval.rows) < recipe.evaluate.samples:
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


def _source_json(used_for: str | int, source: Source) -> list[dict[str, Any]]:
    """What a source was, for others: files by name and hash, hub data sets by id and revision."""
    known = {"used_for": "training rows" if used_for == "train" else "held-out rows"}
    if source.is_hub:
        return [{**known, "name": source.path, "split": source.split, "revision": source.revision}]
    files = data.files_of(Path(source.path))
    return [{**known, "name": path.name, "sha256": data.sha256(path)} for path in files]


def _data_json(splits: data.Splits, recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = {"train": splits.train.to_json(), "eval": None, "eval_samples": 0}
    found["sources"] = [
        one for path, source in recipe.data.sources() for one in _source_json(path[1], source)
    ]
    if splits.eval is not None:
        samples = min(recipe.evaluate.samples, len(splits.eval.rows))
        found |= {"eval": splits.eval.to_json(), "eval_samples": samples}
    return found
