"""A working folder with a tiny base, data and recipes, commands in it, and what must hold after each.

Commands may be stopped at any call of a function of ours, by number: so a signal, another command or damage
comes at the same point again whenever the same numbers are drawn. No clock decides anything.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from attempts import check_told
from conftest import make_checkpoint, write_chats
from safetensors import safe_open
from warm import Ended, Moment, Running

import qlora_phi3

PACKAGE = str(Path(qlora_phi3.__file__).parent)
LIMIT_SECONDS = 60
LEAST_TICKS = 50
"""Of computing, that count: libraries' threads look about now and then while a command waits for ever."""
"""Computed by one command, which takes 1 to 10, or waited: beyond it, it hangs."""

SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
FINISHED = ("recipe.yaml", "plan.json", "metrics.jsonl", "report.json", "report.html", "adapter/README.md")
LEFTOVERS = (".unfinished", "unfinished-", ".partial", ".claim.json", ".reserve", ".replaced", "checkpoints")

RECIPE = """
version: 1
name: tiny
model: {base: ./base}
adapter: {rank: 4, alpha: 8}
data:
  train: {path: data/a.jsonl}
  eval: {path: data/b.jsonl, limit: 2}
  max_length: 128
train: {max_steps: 2, effective_batch: 4, micro_batch: 2, learning_rate: 1.0e-2, log_every: 1}
evaluate: {metrics: [loss, exact_match], samples: 2, max_new_tokens: 4}
"""

Interlude = Callable[[Running], None]
Snapshot = dict[str, str]


@dataclass(frozen=True)
class Pause:
    """The command stands still at `calls` calls of ours or from ours after the first of a function of that
    name; then `interlude` happens, and it goes on."""

    function: str
    calls: int
    interlude: Interlude


@dataclass
class Told:
    """What happened to a command from outside."""

    signals: list[str] = field(default_factory=list)
    killed: bool = False
    meddled: bool = False


def stop_at(environment: dict[str, str], stops: list[tuple[str, int]]) -> None:
    """In the child: its environment, and SIGSTOP at each of the moments in turn."""
    os.environ.update(environment)
    left, count = list(stops), [-1]
    ours: dict[str, bool] = {}

    def is_ours(frame: Any) -> bool:
        name = frame.f_code.co_filename
        if name not in ours:
            ours[name] = name.startswith(PACKAGE)
        return ours[name]

    def look(frame: Any, event: str, _: Any) -> None:
        if event not in ("call", "c_call"):
            return
        here = is_ours(frame)
        if count[0] < 0:
            if not (event == "call" and here and frame.f_code.co_name == left[0][0]):
                return
        elif not here and (event == "c_call" or frame.f_back is None or not is_ours(frame.f_back)):
            return
        count[0] += 1
        if count[0] >= left[0][1]:
            count[0] = -1
            left.pop(0)
            if not left:
                sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGSTOP)

    if left:
        sys.setprofile(look)


class Violation(AssertionError):
    """An invariant that does not hold."""


class World:
    """The folder, its commands, and what is known to have finished in it."""

    def __init__(self, root: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self.root, self.say = root, say
        self.work, self.cache = root / "work", root / "cache"
        self.environment = {"QLORA_PHI3_CACHE": str(self.cache), "HOME": str(root / "home")}
        self.environment |= {"TMPDIR": str(root / "tmp"), "XDG_CACHE_HOME": str(root / "home" / ".cache")}
        self.num_commands = 0
        self.codes: dict[int, int] = {}
        self.whole: dict[str, Snapshot] = {}
        for name in ("work", "home", "tmp"):
            (root / name).mkdir()
        shutil.copytree(_base(), root / "pristine" / "base")
        (root / "pristine" / "data").mkdir()
        write_chats(root / "pristine" / "data" / "a.jsonl")
        write_chats(root / "pristine" / "data" / "b.jsonl", 4)
        (root / "pristine" / "r.yaml").write_text(RECIPE)
        self.mend()

    # --- what is there

    def mend(self) -> None:
        """Base, data and recipe as they were at first."""
        for source in (self.root / "pristine").iterdir():
            destroy(self.work / source.name)
            _copy(source, self.work / source.name)

    def is_pristine(self) -> bool:
        return all(
            snapshot(one) == snapshot(self.work / one.name) for one in (self.root / "pristine").iterdir()
        )

    def runs(self) -> list[Path]:
        """Folders that hold an adapter or look like a run, whether finished or not."""
        found = {path.parent for name in ("adapter", "recipe.yaml") for path in self.work.rglob(name)}
        return sorted(found)

    def is_whole(self, run: Path) -> bool:
        """It finished, and nobody has meddled with it since."""
        known = self.whole.get(str(run.relative_to(self.work)))
        now = snapshot(run)
        return known is not None and all(now.get(name) == content for name, content in known.items())

    # --- commands

    def execute(self, words: tuple[str, ...], place: str | None, pauses: list[Pause]) -> Ended:
        """One command, whose exit and traces are checked; `place`: what it may write, in the folder."""
        before, told = snapshot(self.work), Told()
        read = [sums(self.work / "data")]
        shown = " ".join(words)
        self.say(f"{shown}  [{', '.join(f'{one.function}+{one.calls}' for one in pauses)}]")
        stops = [(one.function, one.calls) for one in pauses]
        accident = {
            "moment": Moment("qlora_phi3.cli:main"),
            "act": stop_at,
            "given": (self.environment, stops),
        }
        child = Running(words, self.work, **accident)
        for pause in pauses:
            if not _wait_until_stopped(child):
                break
            met = snapshot(self.work)
            self._told = told
            pause.interlude(child)
            before = patched(before, met, snapshot(self.work))
            read.append(sums(self.work / "data"))
            if child.process.pid is not None and not told.killed:
                os.kill(child.process.pid, signal.SIGCONT)
        ended = _wait(child, shown)
        self.num_commands += 1
        self.codes[ended.returncode] = self.codes.get(ended.returncode, 0) + 1
        self.say(f"  -> {ended.returncode} {told}")
        try:
            self._check(words, place, before, ended, told, read)
        except AssertionError as error:
            raise Violation(
                f"{shown}: {error}\n{told}\n{ended.stdout[-1500:]}\n{ended.stderr[-3000:]}"
            ) from None
        return ended

    def _check(
        self,
        words: tuple[str, ...],
        place: str | None,
        before: Snapshot,
        ended: Ended,
        told: Told,
        read: list[dict[str, str]],
    ) -> None:
        after = snapshot(self.work)
        killed = told.killed and ended.returncode == -signal.SIGKILL
        if ended.returncode < 0 and not killed and not ended.stderr:  # in its first milliseconds
            ended = replace(ended, returncode=128 - ended.returncode)
        if not killed:
            check_told(ended)
        gone = {name for name in before if name not in after and not _may_go(name, words, place, before)}
        changed = {name for name in before if name in after and before[name] != after[name]}
        changed = {name for name in changed if not _may_go(name, words, place, before)}
        if words[0] == "report":
            changed -= {f"{place}/report.html"}
        if words[0] == "export" and "--force" in words:
            gone = {name for name in gone if not name.startswith(f"{place}/")}
            changed = {name for name in changed if not name.startswith(f"{place}/")}
        assert not gone, f"lost {sorted(gone)}"
        assert not changed, f"changed {sorted(changed)}"
        made = {name for name in after if name not in before}
        if not told.meddled:
            places = [] if place is None else [place, self._behind(place)]
            strange = {name for name in made if not any(_belongs(name, one, killed) for one in places)}
            assert not strange, f"made {sorted(strange)}"
        left = [name for name in made if Path(name).name.startswith(LEFTOVERS) or ".partial" in name]
        if not killed:
            assert not left, f"left {sorted(left)}"
            dead = [path for path in self.cache.rglob("*unfinished-*")]
            assert not dead or ended.returncode or words[0] != "recipe" or "--dry-run" in words, (
                f"left {dead}"
            )
        for name in made:
            if Path(name).name == "adapter" and after[name] == "folder" and not told.meddled:
                check_adapter(self.work / name)
        if words[0] == "recipe" and place is not None and not killed:
            self._check_run(place, made, ended, told, read)
        if ended.returncode in SIGNALS.values():
            assert ended.returncode in {SIGNALS[name] for name in told.signals}, "no such signal was sent"
        assert ended.returncode != 4, "memory is not short here"
        if ended.returncode == 3:
            assert told.signals, "nobody stopped it"
        if words[0] == "export" and ended.returncode == 0:
            check_export(self.work / str(place))

    def _behind(self, place: str) -> str:
        """Where what is written to `place` goes: it may be a link to where it was moved."""
        return os.path.relpath((self.work / place).resolve(), self.work.resolve())

    def _check_run(
        self, place: str, made: set[str], ended: Ended, told: Told, read: list[dict[str, str]]
    ) -> None:
        code = ended.returncode
        adapters = [name for name in made if Path(name).name == "adapter" and "/exports/" not in name]
        if code == 2:
            assert not made or told.meddled, f"refused, and left {sorted(made)}"
        if code in SIGNALS.values():
            assert not adapters, f"exit code {code}, and an adapter is there"
        if code in (0, 3) and not told.meddled:
            assert len(adapters) == 1, f"adapters: {adapters}"
            if code == 3 and len(told.signals) > 1:  # the second stops at once: no report is made any more
                return
            folder = (self.work / adapters[0]).parent
            missing = [name for name in FINISHED if not (folder / name).is_file()]
            assert not missing, f"{folder} lacks {missing}"
            check_report(folder, read)
            self.whole[str(folder.relative_to(self.work))] = {
                name: content for name, content in snapshot(folder).items() if name != "report.html"
            }

    # --- what else happens

    def send(self, child: Running, name: str) -> None:
        self._told.signals.append(name)
        os.kill(child.process.pid or 0, getattr(signal, name))

    def kill(self, child: Running) -> None:
        self._told.killed = True
        child.process.kill()

    def beside(self, command: Callable[[], object]) -> Interlude:
        """Another command from start to end, while one stands still."""

        def go(child: Running) -> None:
            told = self._told
            command()
            self._told = told

        return go

    def meddle(self, child: Running, act: Callable[[], None]) -> None:
        self._told.meddled = True
        act()

    def damage(self, number: int, how: str) -> None:
        """Harm one of all the files and folders there are."""
        paths = [path for path in sorted(_walk(self.work)) if not path.name.startswith((".out-", ".err-"))]
        paths += sorted(_walk(self.cache))
        path = paths[number % len(paths)]
        self.say(f"{how} {path.relative_to(self.root)}")
        with suppress(OSError, IndexError):  # of an empty file no bit can be turned
            (destroy if path.is_fifo() else DAMAGES[how])(path)  # opening a pipe would wait for ever


def _may_go(name: str, words: tuple[str, ...], place: str | None, before: Snapshot) -> bool:
    """What killed commands left may be cleared by the next to the same place."""
    path = Path(name)
    if words[0] == "export":
        hidden = [part for part in path.parts if part.startswith(".")]
        return any(".unfinished-" in part or ".replaced-" in part for part in hidden)
    claimed = f"{place}/.claim.json" in before and f"{place}/metrics.jsonl" not in before
    return words[0] == "recipe" and claimed and str(path.parent) == place


def _belongs(name: str, place: str, killed: bool) -> bool:
    parents = {place, *map(str, Path(place).parents)}
    unfinished = f"{Path(place).parent}/.{Path(place).name}.unfinished-"
    return name in parents or name.startswith((f"{place}/", *([unfinished] if killed else [])))


# --- what must hold


def check_adapter(folder: Path) -> None:
    """It can be loaded, and all its numbers are finite."""
    assert json.loads((folder / "adapter_config.json").read_text())["r"], folder
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        assert names, folder
        bad = [name for name in names if not tensors.get_tensor(name).isfinite().all()]
    assert not bad, f"not finite: {bad}"


def check_report(folder: Path, read: list[dict[str, str]]) -> None:
    """The recorded hashes are of what was there to be read, and the log has every step."""
    report = json.loads((folder / "report.json").read_text())
    for source in report["data"]["sources"]:
        known = {one.get(source["name"]) for one in read}
        assert source["sha256"] in known, f"{source} was never there: {read}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, report["training"]["num_steps"] + 1)), steps


def check_export(folder: Path) -> None:
    """It is what it says of itself."""
    listed = json.loads((folder / "export.json").read_text())["files"]
    found = {name: (folder / name).stat().st_size for name in listed}
    assert found == listed, folder
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            assert all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys()), path  # noqa: SIM118


# --- files


def snapshot(root: Path) -> Snapshot:
    """What each path is, by its name in the folder."""
    return {str(path.relative_to(root)): _content(path) for path in _walk(root)}


def _walk(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        if os.path.lexists(root):
            yield root
        return
    for path in root.iterdir():
        if path.name.startswith((".out-", ".err-")):
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _content(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    if stat.S_ISLNK(status.st_mode):
        return f"link to {path.readlink()}"
    if not stat.S_ISREG(status.st_mode):
        return "other"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sums(folder: Path) -> dict[str, str]:
    return {path.name: _content(path) for path in _walk(folder)}


def patched(before: Snapshot, met: Snapshot, left: Snapshot) -> Snapshot:
    """`before`, had what changed from `met` to `left` been so all along."""
    found = {name: content for name, content in before.items() if name not in met or name in left}
    return found | {name: content for name, content in left.items() if met.get(name) != content}


def destroy(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@lru_cache
def _base() -> Path:
    """A tiny checkpoint, made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="strangers-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_checkpoint(folder / "base")


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    destroy(path)
    make(path)


def _link(path: Path) -> None:
    moved = path.with_name(f"{path.name}.moved")
    path.rename(moved)
    path.symlink_to(moved)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "delete": destroy,
    "empty": lambda path: path.write_bytes(b""),
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flip": _flip,
    "text": lambda path: path.write_text("\x1b[31m{}\n"),
    "json": lambda path: path.write_text("[" * 5000),
    "rename": lambda path: path.rename(path.with_name(f"{path.name} (copy)")),
    "folder": lambda path: _replace(path, Path.mkdir),
    "file": lambda path: _replace(path, Path.touch),
    "link": _link,
    "dangling": lambda path: _replace(path, lambda one: one.symlink_to("nowhere")),
    "loop": lambda path: _replace(path, lambda one: one.symlink_to(one.name)),
    "pipe": lambda path: _replace(path, os.mkfifo),
}


# --- children


def _state(child: Running) -> tuple[str, int]:
    """Running, sleeping or stopped, and the clock ticks that it has computed."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[11]) + int(fields[12])
    return "", 0


def _wait_until_stopped(child: Running) -> bool:
    """False where it ends before it comes there, or seems to wait for something."""
    hanging = _Hanging(child)
    while child.process.is_alive():
        if _state(child)[0] == "T":
            return True
        if hanging.is_so():
            return False
        time.sleep(0.005)
    return False


def _wait(child: Running, shown: str) -> Ended:
    hanging = _Hanging(child)
    while child.process.is_alive():
        child.process.join(1)
        if hanging.is_so():
            child.process.kill()
            child.process.join()
            raise Violation(f"{shown}: hangs")
    return child.wait()


class _Hanging:
    """Whether a command computes without end, or has long computed nothing: a busy machine is no hang."""

    def __init__(self, child: Running) -> None:
        self._child, self._ticks, self._since = child, 0, time.monotonic()

    def is_so(self) -> bool:
        state, ticks = _state(self._child)
        if ticks - self._ticks >= LEAST_TICKS or state == "R":
            self._ticks, self._since = ticks, time.monotonic()
        computed = ticks / os.sysconf("SC_CLK_TCK")
        return computed > LIMIT_SECONDS or time.monotonic() - self._since > LIMIT_SECONDS
