"""Strangers' days: commands, signals and damage in random order, and after each step what must hold.

Here a short part with fixed choices; `make strangers MINUTES=30` goes on with new ones.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from world import DAMAGES, SIGNALS, Interlude, Pause, World, destroy

ALWAYS = ("main", "invoke", "drop_unwritten")
FUNCTIONS = {
    "recipe": "load_recipe claim _make sign check_folder write_inputs write_text reserve check fetch "
    "unfinished publish _prune attach training_step _save release restore save complete _evaluate_tuned "
    "_report write render close _note_speed note _exported export_all _export _take_place show "
    "_print_json remove stopped saved",
    "export": "export_all open_source check unfinished _remove_dead _export write describe _take_place",
    "report": "rebuild render write_text",
    "look": "load_recipe check_files check_recipe check fetch publish show_parts",
}
"""Functions of ours near which something is at stake, by command."""

CHANGES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "rank": ("adapter.rank=8",),
    "unevaluated": ("data.eval=null", "evaluate.metrics=[]"),
    "three steps": ("train.max_steps=3", "train.eval_every=1"),
    "not a number": ("train.learning_rate=1e30", "train.max_grad_norm=1e30"),
    "exports": ("export=[adapter, merged]",),
    "exports loralib": ("export=[loralib]",),
    "lora": ("model.quantization=none",),
    "json": ("--json",),
    "wrong": ("train.epochz=2", "adapter.rank=four"),
}
TARGETS: dict[str, tuple[str, ...]] = {
    "merged": ("merged", "--no-gate"),
    "adapter": ("adapter", "--layout", "split", "--no-gate"),
    "loralib": ("loralib", "--no-gate"),
    "vllm": ("vllm",),
    "mlx": ("mlx", "--no-gate"),
}
LOOKS: dict[str, tuple[str, ...]] = {
    "doctor": ("doctor", "r.yaml"),
    "samples": ("doctor", "r.yaml", "--samples", "2"),
    "plan": ("plan", "r.yaml", "--parts"),
    "dry run": ("recipe", "r.yaml", "--dry-run"),
    "show": ("recipe", "r.yaml", "--show"),
    "fits": ("plan", "r.yaml", "--vram", "8GiB"),
}
OUTS = (None, "o1", "o1", "o2", "deep/o3", "empty")

numbers = st.integers(0, 9999)
KINDS = ("none", "none", "signal", "signal", "signal", "twice", "kill", "kill", "damage", "beside")


def interruptions(command: str) -> st.SearchStrategy[tuple[Any, ...]]:
    """Whether and where something happens meanwhile."""
    calls = st.one_of(st.integers(0, 25), st.integers(0, 25), st.integers(0, 1500))
    moments = st.tuples(st.sampled_from([*ALWAYS, *FUNCTIONS[command].split()]), calls)
    signals, hows = st.sampled_from(sorted(SIGNALS)), st.sampled_from(sorted(DAMAGES))
    return st.tuples(st.sampled_from(KINDS), moments, moments, signals, numbers, hows)


def is_free(folder: Path) -> bool:
    """Whether a run may have it."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


class Machine(RuleBasedStateMachine):
    """One stranger's day."""

    say: Callable[[str], None] = staticmethod(lambda _: None)
    num_commands = 0

    def __init__(self) -> None:
        super().__init__()
        self.num_damages = 0
        self._folder = tempfile.TemporaryDirectory(prefix="strangers-")
        self.world = World(Path(self._folder.name), type(self).say)
        (self.world.work / "empty").mkdir()

    def teardown(self) -> None:
        Machine.num_commands += self.world.num_commands
        self._folder.cleanup()

    @rule(out=st.sampled_from(OUTS), change=st.sampled_from(sorted(CHANGES)), how=interruptions("recipe"))
    def train(self, out: str | None, change: str, how: tuple[Any, ...]) -> None:
        words, place = self._train(out, CHANGES[change])
        fine = self.world.is_pristine() and (out is None or is_free(self.world.work / out))
        ended = self.world.execute(words, place, self._pauses(how))
        if fine and how[0] == "none" and change not in ("not a number", "wrong"):
            assert ended.returncode == 0, ended

    @precondition(lambda self: self.world.runs())
    @rule(number=numbers, out=st.sampled_from(OUTS), how=interruptions("recipe"))
    def go_on(self, number: int, out: str | None, how: tuple[Any, ...]) -> None:
        adapter = self._run(number) / "adapter"
        words, place = self._train(out, (f"adapter.init={adapter.relative_to(self.world.work)}",))
        self.world.execute(words, place, self._pauses(how))

    @precondition(lambda self: self.world.runs())
    @rule(
        number=numbers,
        form=st.sampled_from(sorted(TARGETS)),
        force=st.booleans(),
        how=interruptions("export"),
    )
    def export(self, number: int, form: str, force: bool, how: tuple[Any, ...]) -> None:
        run = self._run(number)
        place = run / "exports" / form
        whole = self.world.is_whole(run) and self.world.is_pristine() and (force or not place.exists())
        words = ("export", str(run.relative_to(self.world.work)), "--to", *TARGETS[form])
        words += ("--force",) if force else ()
        ended = self.world.execute(words, str(place.relative_to(self.world.work)), self._pauses(how))
        if whole and how[0] == "none" and (not place.exists() or (place / "export.json").is_file()):
            assert ended.returncode == 0, ended

    @precondition(lambda self: self.world.runs())
    @rule(number=numbers, how=interruptions("report"))
    def report(self, number: int, how: tuple[Any, ...]) -> None:
        run = self._run(number)
        whole = self.world.is_whole(run)
        name = str(run.relative_to(self.world.work))
        ended = self.world.execute(("report", name), name, self._pauses(how))
        if whole and how[0] == "none" and not (run / "report.html").is_dir():
            assert ended.returncode == 0, ended

    @rule(what=st.sampled_from(sorted(LOOKS)), how=interruptions("look"))
    def look(self, what: str, how: tuple[Any, ...]) -> None:
        self.world.execute(LOOKS[what], None, self._pauses(how))

    @precondition(lambda self: self.num_damages < 2)
    @rule(number=numbers, how=st.sampled_from(sorted(DAMAGES)))
    def damage(self, number: int, how: str) -> None:
        """Not more than two between commands: what all is in ruins refuses everything."""
        self.num_damages += 1
        self.world.damage(number, how)

    @precondition(lambda self: not self.world.is_pristine())
    @rule()
    def mend(self) -> None:
        self.num_damages = 0
        self.world.mend()

    @precondition(lambda self: self.world.runs())
    @rule(number=numbers)
    def remove_run(self, number: int) -> None:
        run = self._run(number)
        if run != self.world.work:
            destroy(run)

    def _run(self, number: int) -> Path:
        runs = self.world.runs()
        return runs[number % len(runs)]

    def _train(self, out: str | None, more: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
        words = ("recipe", "r.yaml", *more, *(("--out", out) if out else ()))
        return words, out or "runs/tiny"

    def _pauses(self, how: tuple[Any, ...]) -> list[Pause]:
        self.num_damages = 0
        kind, first, second, signal, number, damage = how
        world = self.world
        send: Interlude = lambda child: world.send(child, signal)  # noqa: E731
        meddle: Interlude = lambda child: world.meddle(child, lambda: world.damage(number, damage))  # noqa: E731
        words, place = self._train(OUTS[number % len(OUTS)], ())
        other = world.beside(lambda: world.execute(words, place, []))
        return {
            "none": [],
            "signal": [Pause(*first, send)],
            "twice": [Pause(*first, send), Pause(*second, send)],
            "kill": [Pause(*first, world.kill)],
            "damage": [Pause(*first, meddle)],
            "beside": [Pause(*first, other)],
        }[kind]


SHORT = settings(
    max_examples=4,
    stateful_step_count=6,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_strangers_days() -> None:
    run_state_machine_as_test(Machine, settings=SHORT)
