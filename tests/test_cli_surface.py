"""The command line as a user meets it: what answers at once, what is printed where, exit codes, refusals."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import write_chats

from qlora_phi3 import __version__
from qlora_phi3.data.read import MAX_PROBLEMS
from qlora_phi3.endings import FAULT
from qlora_phi3.recipe_file import list_recipes, load_recipe

COMMAND = (sys.executable, "-m", "qlora_phi3")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)  # as an installed package: compiled once, not at every call
HEAVY = ("torch", "transformers", "peft", "trl", "datasets")
FAST_SECONDS = 0.7
FAST_TRIES = 4

FAST: dict[str, tuple[str, ...]] = {
    "help": ("--help",),
    "version": ("--version",),
    "list": ("recipe",),
    "list as JSON": ("recipe", "--json"),
    "plan": ("plan", "phi3-mini-chat-8gb"),
    "plan for a card as JSON": ("plan", "phi3-mini-chat-8gb", "--vram", "8GiB", "--json"),
    "dry run": ("recipe", "quickstart", "--dry-run"),
    "dry run as JSON": ("recipe", "phi3-mini-chat-8gb", "--dry-run", "--json"),
    "dry run of an unknown base": ("recipe", "quickstart", "--dry-run", "model.base=someone/phi3"),
    "show": ("recipe", "quickstart", "--show"),
    "show as JSON": ("recipe", "quickstart", "--show", "--json"),
    "help of the doctor": ("doctor", "--help"),
    "help of export": ("export", "--help"),
    "schema": ("schema",),
    "schema as Markdown": ("schema", "--markdown"),
}

Answer = subprocess.CompletedProcess[str]


def command(*arguments: str, cwd: Path | None = None) -> Answer:
    """Run the command line as a user does."""
    return subprocess.run(
        (*COMMAND, *arguments), capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=120
    )


SEVERAL = """
import contextlib, io, json, sys, traceback
from qlora_phi3.cli import main

answers = []
for arguments in json.load(sys.stdin):
    sys.argv = ["qlora-phi3", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = 1
            traceback.print_exc()
    heavy = [name for name in HEAVY if name in sys.modules]
    answers.append([code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(answers))
""".replace("HEAVY", repr(HEAVY))


def several(commands: Iterable[Sequence[str]], cwd: Path) -> list[tuple[Answer, list[str]]]:
    """Run commands one after the other in one process, since importing torch takes seconds.

    Each answer comes with the heavy modules that were imported by then.
    """
    lines = json.dumps([list(one) for one in commands])
    done = subprocess.run(
        (sys.executable, "-c", SEVERAL),
        input=lines,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [(Answer([], *answer), heavy) for *answer, heavy in json.loads(done.stdout)]


def output(*arguments: str, cwd: Path | None = None) -> str:
    """What a command that succeeds prints on stdout."""
    done = command(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_refused(done: Answer, *words: str, lines: int = 1) -> None:
    """One message a problem on stderr, nothing on stdout, exit code 2."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr and FAULT not in done.stderr
    assert len(done.stderr.splitlines()) == lines, done.stderr
    assert [word for word in words if word not in done.stderr] == []


# What answers at once


@pytest.mark.parametrize("name", ["help", "plan for a card as JSON", "dry run as JSON"])
def test_answers_at_once(name: str) -> None:
    """In the processor's seconds: on a quiet machine those of the clock, on a busy one our share.

    Even those are more where a neighbour shares the core: the fastest of a few runs counts.
    """
    seconds: list[float] = []
    while not seconds or (min(seconds) >= FAST_SECONDS and len(seconds) < FAST_TRIES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = command(*FAST[name])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert done.stdout and not done.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < FAST_SECONDS, seconds


def test_what_answers_at_once_imports_nothing_heavy(tmp_path: Path) -> None:
    answers = dict(zip(FAST, several(FAST.values(), cwd=tmp_path), strict=True))
    assert {name: heavy for name, (_, heavy) in answers.items() if heavy} == {}
    assert {name: done.returncode for name, (done, _) in answers.items() if done.returncode} == {}
    assert [name for name, (done, _) in answers.items() if not done.stdout or done.stderr] == []


# What is printed


def test_version() -> None:
    assert output("--version") == f"{__version__}\n"


def test_help_names_every_command_and_where_to_begin() -> None:
    text = output("--help")
    assert "recipe quickstart" in text
    assert [
        word for word in ("recipe", "doctor", "report", "schema", "--version") if f"\n  {word} " not in text
    ] == []


def test_the_list_has_every_recipe_uncut() -> None:
    text = output("recipe")
    assert [path.stem for path in list_recipes() if path.stem not in text] == []
    assert "…" not in text


def test_the_list_as_json() -> None:
    rows = json.loads(output("recipe", "--json"))
    assert [row["name"] for row in rows] == [path.stem for path in list_recipes()]
    assert all(set(row) == {"name", "description", "smallest_card_gib"} for row in rows)


def test_a_terminal_without_the_letters_of_a_recipe_is_answered(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nname: r\ndescription: 日本 é\ndata: {train: {path: a.jsonl}}\n", encoding="utf-8"
    )
    poor = {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0"}
    line = (*COMMAND, "recipe", "r.yaml", "--show")
    done = subprocess.run(line, capture_output=True, cwd=tmp_path, env=ENVIRONMENT | poor, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u65e5\\u672c \xe9" in done.stdout


def test_a_dry_run_prints_the_plan_uncut() -> None:
    text = output("recipe", "phi3-mini-chat-8gb", "--dry-run")
    assert "the recipe is valid" in text and "smallest card: 4 GB" in text
    assert "the least it can do with: 3.33 GiB: " in text and "plan NAME --parts" in text
    assert "…" not in text


def test_a_dry_run_as_json() -> None:
    found = json.loads(output("recipe", "phi3-mini-chat-8gb", "--dry-run", "--json", "adapter.rank=8"))
    assert set(found) == {"recipe", "plan", "smallest_card_gib", "base_checked", "rows_looked_at"}
    assert found["base_checked"]
    assert found["recipe"]["adapter"]["rank"] == 8
    assert found["plan"]["peak_bytes"] == max(phase["peak_bytes"] for phase in found["plan"]["phases"])


@pytest.mark.parametrize("base", ["someone/phi3", "someone/a-very-long-name-" + "x" * 60])
def test_a_dry_run_of_an_unknown_hub_id_has_no_plan_yet(base: str) -> None:
    text = output("recipe", "quickstart", "--dry-run", f"model.base={base}")
    assert "its base is not checked" in text and "the recipe is valid" not in text
    assert f"no memory plan yet: whether {base} is a Phi-3, and of which sizes, is known once " in text
    found = json.loads(output("recipe", "quickstart", "--dry-run", "--json", f"model.base={base}"))
    assert (found["plan"], found["smallest_card_gib"], found["base_checked"]) == (None, None, False)


def test_a_dry_run_plans_a_local_folder(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    (answer, heavy), *_ = several([["recipe", str(write_recipe()), "--dry-run", "--json"]], cwd=tmp_path)
    assert heavy == []
    assert json.loads(answer.stdout)["plan"]["micro_batch"] == 2


def test_show_prints_what_runs_the_same(tmp_path: Path) -> None:
    shown = tmp_path / "shown.yaml"
    shown.write_text(output("recipe", "quickstart", "--show", "train.epochs=3"))
    assert load_recipe(shown) == load_recipe(list_recipes()[0].parent / "quickstart.yaml", ["train.epochs=3"])
    as_json = json.loads(output("recipe", "quickstart", "--show", "--json", "train.epochs=3"))
    assert as_json == load_recipe(shown).model_dump(mode="json")


def test_schema() -> None:
    assert json.loads(output("schema"))["title"] == "Recipe"
    table = output("schema", "--markdown")
    assert table.splitlines()[0].startswith("| key | default")
    assert table.endswith("|\n")  # and no empty line after it


def test_the_console_script_is_the_same() -> None:
    script = Path(sys.executable).with_name("qlora-phi3")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout == output("--help")


def test_no_arguments_print_the_help() -> None:
    done = command()
    assert "Usage: qlora-phi3" in done.stdout + done.stderr


# A whole run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Path:
    """A folder with a recipe, its data, and things that stand in the way."""
    place = tmp_path_factory.mktemp("cli")
    write_chats(place / "chats.jsonl")
    (place / "tiny.yaml").write_text(
        f"version: 1\nname: tiny\nmodel: {{base: {checkpoints('gqa')}}}\nadapter: {{rank: 4}}\n"
        "data:\n  train: {path: chats.jsonl}\n  eval: {path: chats.jsonl, limit: 2}\n  max_length: 128\n"
        "train: {max_steps: 2, effective_batch: 2, micro_batch: 2}\nevaluate: {max_new_tokens: 4}\n"
    )
    (place / "full").mkdir()
    (place / "full" / "notes.txt").touch()
    (place / "run").mkdir()
    (place / "run" / "recipe.yaml").touch()
    (place / "nothing").mkdir()
    (place / "empty").mkdir()
    rows = [
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [',
        '{"text": "a"}',
    ]
    (place / "bad.jsonl").write_text("\n".join(rows))
    (place / "many.jsonl").write_text("\n".join(["{"] * (MAX_PROBLEMS + 5)))
    (place / "empty.jsonl").write_text("\n")
    (place / "cut.parquet").write_bytes(b"PAR1 and no more")
    (place / "bars.csv").write_text("prompt|completion\na|b\n")
    return place


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path]:
    """What a run with --json said, and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "new" / "run"
    done = command("recipe", "tiny.yaml", "--json", "--out", str(folder), cwd=place)
    assert done.returncode == 0, done.stderr
    return done, folder


def test_a_run_prints_one_json_document_and_progress_on_stderr(finished: tuple[Answer, Path]) -> None:
    done, folder = finished
    found = json.loads(done.stdout)
    assert found.pop("folder") == str(folder)
    assert found == json.loads((folder / "report.json").read_text())
    assert "train 2/2" in done.stderr and "Traceback" not in done.stderr
    assert "Warning" not in done.stderr  # of libraries: nothing that a user can act on


def test_a_lost_report_is_made_again(finished: tuple[Answer, Path]) -> None:
    _, folder = finished
    report = folder / "report.html"
    before = report.read_bytes()
    report.unlink()
    (answer, heavy), *_ = several([["report", str(folder)]], cwd=folder)
    assert (answer.returncode, answer.stdout, answer.stderr, heavy) == (0, f"{report}\n", "", [])
    assert report.read_bytes() == before


# Refusals that need no torch


@dataclass(frozen=True)
class Refused:
    arguments: Sequence[str]
    words: Sequence[str]
    lines: int = 1
    more: Sequence[str] = field(default=("--out", "a/b"))


AT_ONCE = {
    "unknown name": Refused(["quikstart"], ["quikstart: no recipe of this name. Did you mean 'quickstart'?"]),
    "unknown path": Refused(["mine.yaml"], ["mine.yaml: no such file.", "List the recipes"]),
    "folder": Refused(["full"], ["full: no recipe of this name."]),
    "override without value": Refused(
        ["tiny.yaml", "train.epochs"],
        ["command line: 'train.epochs' is not key=value.", "train.learning_rate=1e-4"],
    ),
    "override of an unknown key": Refused(
        ["tiny.yaml", "train.epoch=1"],
        ["command line: train.epoch: unknown key. Did you mean 'epochs'?"],
    ),
    "all problems at once": Refused(
        ["tiny.yaml", "train.epochs=0", "adapter.targets=[q_prj]", "model.quantization=nf5"],
        ["train.epochs", "adapter.targets", "'q_prj'", "model.quantization", "Did you mean 'nf4'?"],
        lines=3,
    ),
    "two places that are missing": Refused(
        ["tiny.yaml", "data.train.path=no.jsonl", "data.eval.path=none.jsonl"],
        ["/no.jsonl: no such file.", "/none.jsonl: no such file.", "In its folder: "],
        lines=2,
    ),
    "no such model folder": Refused(
        ["tiny.yaml", "model.base=./nowhere"], ["/nowhere: no such folder.", "hub id"]
    ),
    "model folder without weights": Refused(
        ["tiny.yaml", "model.base=./full"], ["/full: holds no *.safetensors."]
    ),
    "no such built-in model": Refused(
        ["quickstart", "model.base=builtin:smollm2"],
        ["builtin:smollm2: there is no such built-in model", "Use builtin:smollm2-135m."],
    ),
    "out below a file": Refused(
        ["tiny.yaml"],
        ["chats.jsonl/a/b: cannot be made: ", "/chats.jsonl is a file.", "--out"],
        more=["--out", "chats.jsonl/a/b"],
    ),
    "out is a file": Refused(
        ["tiny.yaml"], ["chats.jsonl: is a file.", "--out"], more=["--out", "chats.jsonl"]
    ),
    "out is another run": Refused(["tiny.yaml"], ["run: holds another run.", "--out"], more=["--out", "run"]),
    "out is not empty": Refused(["tiny.yaml"], ["full: is not empty.", "--out"], more=["--out", "full"]),
    "out has too long a name": Refused(
        ["tiny.yaml"], ["cannot be used: File name too long.", "--out"], more=["--out", "x" * 300]
    ),
}


@pytest.mark.parametrize("case", AT_ONCE.values(), ids=AT_ONCE)
def test_refused_at_once(place: Path, case: Refused) -> None:
    before = listing(place)
    check_refused(command("recipe", *case.arguments, *case.more, cwd=place), *case.words, lines=case.lines)
    assert listing(place) == before


def test_a_dry_run_refuses_the_same_without_torch(place: Path) -> None:
    before = listing(place)
    commands = [["recipe", *case.arguments, *case.more, "--dry-run"] for case in AT_ONCE.values()]
    for (answer, heavy), case in zip(several(commands, cwd=place), AT_ONCE.values(), strict=True):
        check_refused(answer, *case.words, lines=case.lines)
        assert heavy == []
    assert listing(place) == before


BEYOND = {
    # a recipe with overrides: words of the one message; tiny.yaml's base has 512 positions
    "another architecture": (
        ["quickstart", "model.base=microsoft/Phi-3-small-8k-instruct"],
        ["model.base: "],
    ),
    "a misspelt name": (
        ["quickstart", "model.base=microsoft/Phi-3-mini-instruct"],
        ["Did you mean microsoft/"],
    ),
    "no revision": (["phi3-mini-chat-8gb", "model.revision=../.."], ["'../..' is no commit, branch or tag."]),
    "rows beyond a known base": (
        ["phi3-mini-chat-8gb", "data.max_length=8192"],
        ["command line: data.max_length: 8192 is beyond the 4096 positions of microsoft/", "Set it to 4096"],
    ),
    "rows beyond a folder's": (
        ["tiny.yaml", "data.max_length=2048"],
        ["data.max_length: 2048 is beyond the 512 positions of /", "Set it to 512 or less"],
    ),
    "answers beyond a folder's": (
        ["tiny.yaml", "evaluate.metrics=[exact_match]", "evaluate.max_new_tokens=512"],
        ["evaluate.max_new_tokens: 512 leaves no room for a prompt in the 512 positions of /"],
    ),
    "a rank above a matrix": (
        ["quickstart", "adapter.rank=9999"],
        ["adapter.rank: 9999 is above 192, the smaller side of k.", "192 or less"],
    ),
    "more layers than a folder's": (
        ["tiny.yaml", "train.kept_layers=3"],
        ["train.kept_layers: 3 is more than"],
    ),
    "a revision of a folder": (["tiny.yaml", "model.revision=main"], ["'main' is for a model on the hub; /"]),
    "the head for vLLM": (
        ["tiny.yaml", "adapter.targets=[q, lm_head]", "export=[vllm]"],
        ["command line: export: vllm adapts neither embedding nor head of Phi-3, and lm_head is trained."],
    ),
    "a tied head for llama.cpp": (
        ["quickstart", "adapter.targets=[q, lm_head]", "export=[gguf-lora]"],
        ["export: gguf-lora cannot adapt lm_head alone"],
    ),
    "a rank that vLLM does not serve": (
        ["phi3-mini-chat-8gb", "adapter.rank=256", "export=[vllm]"],
        ["export: vllm takes ranks up to 512, and 768 is saved."],
    ),
    "a kind that no run can make": (["tiny.yaml", "export=[gguf:q4_k_m]"], ["llama-quantize", "gguf:q8_0"]),
    "a rank above a folder's": (["tiny.yaml", "adapter.rank=33"], ["adapter.rank: 33 is above 32, "]),
    "an adapter that is not there": (
        ["tiny.yaml", "adapter.init=none"],
        ["adapter.init: /", "/none: no such file or folder."],
    ),
    "a metric twice": (["tiny.yaml", "evaluate.metrics=[loss, loss]"], ["evaluate.metrics: ", "twice"]),
}


def test_nothing_that_cannot_run_is_planned_or_called_valid(place: Path) -> None:
    ways = (["plan"], ["recipe", "--dry-run"], ["recipe"], ["doctor"])
    commands = [[way[0], *arguments, *way[1:]] for way in ways for arguments, _ in BEYOND.values()]
    before = listing(place)
    for (answer, heavy), (_, words) in zip(
        several(commands, cwd=place), list(BEYOND.values()) * len(ways), strict=True
    ):
        check_refused(answer, *words)
        assert heavy == []
    assert listing(place) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dri-run"], "No such option: --dri-run"),
        (["recipe", "quickstart", "--dri-run"], "No such option: --dri-run (Possible options: --dry-run)"),
        (["recip"], "No such command 'recip'. Did you mean 'recipe'?"),
        (["report"], "Missing argument"),
    ],
)
def test_what_the_command_line_does_not_know(arguments: list[str], message: str) -> None:
    check_refused(command(*arguments), message, "--help", lines=4)  # after the usage and an empty line


LONG = "x" * 300
UNUSUAL = {
    # arguments of `recipe`: words of the one message
    (LONG,): "cannot be looked up: File name too long.",
    (f"{LONG}/a.yaml",): "cannot be looked up: File name too long.",
    ("loop/a.yaml",): "cannot be looked up: ",
    ("tiny.yaml", f"model.base=./{LONG}"): "cannot be looked up: File name too long.",
    ("tiny.yaml", f"adapter.init={LONG}"): "cannot be looked up: File name too long.",
    ("tiny.yaml", f"model.base=org/{LONG}"): "is neither a hub id nor a folder.",
    ("\x1b[31mred",): r"\x1b[31mred: no recipe of this name.",
    ("\x1b]0;title\x07.yaml",): r"\x1b]0;title\x07.yaml: no such file.",
    ("gnp\u202elmay.yaml",): r"gnp\u202elmay.yaml: no such file.",
    ("a\nb.yaml",): r"a\nb.yaml: no such file.",
    ("tiny.yaml", 'model.base="./\\e[2J"'): r"/\x1b[2J: no such folder.",
    ("tiny.yaml", 'model.base="a/\\e[2J"'): r"is neither a hub id nor a folder.",
    ("tiny.yaml", 'adapter.init="./\\e[2J"'): r"/\x1b[2J: no such file or folder.",
    ("tiny.yaml", "train.\x1b[2J=1"): r"'train.\x1b[2J=1' is not key=value.",
    ("tiny.yaml", f"train.{'y' * 100_000}=1"): "unknown key.",
    (
        "tiny.yaml",
        f"description={'y' * 100_000}",
        f"model.quantization={'z' * 100_000}",
    ): "zzz... is not allowed.",
}


def test_unusual_names_are_told_in_one_plain_line(place: Path) -> None:
    (place / "loop").symlink_to("loop")
    commands = [["recipe", *arguments, "--dry-run"] for arguments in UNUSUAL]
    for (answer, _), words in zip(several(commands, place), UNUSUAL.values(), strict=True):
        check_refused(answer, words)
        assert answer.stderr.removesuffix("\n").isprintable() and len(answer.stderr) < 3000
    (place / "loop").unlink()


ELSEWHERE = {
    # what is typed: the whole of one message's beginning, and words of its remedy
    ("train", "x.yaml"): ("train: the command is `recipe`.", "Write `recipe NAME` to train"),
    ("trian", "x.yaml"): ("trian: the command is `recipe`.", "Write `recipe NAME` to train"),
    ("Chat", "runs/x"): ("Chat: is not available yet.", "`export RUN --to ollama`"),
    ("evaluate", "runs/x", "--data", "y"): ("evaluate: is not available yet.", "evaluate.metrics"),
    ("serve",): ("serve: is not available yet.", "docs/export.md"),
    ("merge", "runs/x"): ("merge: the command is `export`.", "Write `export RUN --to merged`"),
    ("resume", "runs/x"): ("resume: is not available yet.", "adapter.init=RUN/adapter"),
    ("quickstart",): ("quickstart: is a recipe.", "Write `recipe quickstart`"),
    ("mine.yaml", "--dry-run"): ("mine.yaml: is a recipe.", "Write `recipe mine.yaml`"),
    ("recipe", "quickstart", "--train.epochs=3"): ("--train.epochs: is no option", "Write train.epochs=3, "),
    ("plan", "quickstart", "--train.epochs", "3"): ("--train.epochs: is no option", "Write train.epochs=3, "),
    ("doctor", "quickstart", "--epochs", "--json"): ("--epochs: is no option", "Write train.epochs=VALUE, "),
    ("recipe", "quickstart", "--lora-r=8"): ("--lora-r: is no option", "Write adapter.rank=8, "),
    ("recipe", "quickstart", "--train.lr=8"): ("--train.lr: is no option", "Write train.learning_rate=8, "),
}


def test_commands_and_options_of_other_tools_are_answered(tmp_path: Path) -> None:
    for (answer, heavy), words in zip(several(ELSEWHERE, tmp_path), ELSEWHERE.values(), strict=True):
        check_refused(answer, *words)
        assert answer.stderr.startswith(words[0]) and "schema" not in answer.stderr
        assert heavy == []


@pytest.mark.parametrize("module", ["qlora_phi3", "bench"])
def test_a_python_without_our_packages_is_told_apart(module: str, tmp_path: Path) -> None:
    """As after a forgotten `activate`: no site-packages."""
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        (sys.executable, "-S", "-m", module, "--help"),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=environment,
    )
    check_refused(done, "qlora_phi3: the package ", f" is not installed in this Python ({sys.executable}).")
    assert "activate`." in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a"], "--out: is for one recipe, and none was named. Write `recipe NAME` before it."),
        (["--dry-run"], "--dry-run: is for one recipe"),
        (["quickstart", "--show", "--dry-run"], "--dry-run --show: do not go together. Give one of them."),
        (["quickstart", "--show", "--out", "a"], "--out --show: do not go together."),
        (["quickstart", "--copy-to", "a.yaml", "--dry-run"], "--dry-run --copy-to: do not go together."),
    ],
)
def test_no_option_is_passed_over(place: Path, arguments: list[str], message: str) -> None:
    before = listing(place)
    check_refused(command("recipe", *arguments, cwd=place), message)
    assert listing(place) == before


# Refusals that only the run itself can tell

LATE = {
    "malformed rows": Refused(
        ["tiny.yaml", "data.train.path=bad.jsonl"],
        [
            "/bad.jsonl:2: has no assistant turn: nothing to train on.",
            "/bad.jsonl:3: not valid JSON",
            "/bad.jsonl:4: has no `messages` (found keys 'text').",
        ],
        lines=3,
    ),
    "many malformed rows": Refused(
        ["tiny.yaml", "data.train.path=many.jsonl"],
        ["/many.jsonl:20: not valid JSON", "and 5 more rows with problems."],
        lines=MAX_PROBLEMS + 1,
    ),
    "malformed held-out rows": Refused(
        ["tiny.yaml", "data.eval={path: bad.jsonl}"], ["/bad.jsonl:2: ", "/bad.jsonl:4: "], lines=3
    ),
    "a Parquet file cut off": Refused(
        ["tiny.yaml", "data.train.path=cut.parquet"],
        ["/cut.parquet: not a whole Parquet file: ", "Write or download the file again."],
    ),
    "a CSV with bars": Refused(
        ["tiny.yaml", "data.train.path=bars.csv"],
        ["/bars.csv:2: has no format that is known (found keys 'prompt|completion')."],
    ),
    "no rows": Refused(["tiny.yaml", "data.train.path=empty.jsonl"], ["/empty.jsonl: holds no rows."]),
    "rows too long": Refused(
        ["tiny.yaml", "data.max_length=8"], ["all 12 rows are longer than data.max_length 8."]
    ),
    "an empty folder": Refused(
        ["tiny.yaml", "data.train.path=empty.jsonl"], ["holds no rows."], more=["--out", "nothing"]
    ),
    "a folder that cannot be written": Refused(
        ["tiny.yaml"], ["/proc/a/b: cannot be written to", "--out"], more=["--out", "/proc/a/b"]
    ),
    "as JSON": Refused(
        ["tiny.yaml", "data.train.path=empty.jsonl"], ["holds no rows."], more=["--out", "a", "--json"]
    ),
}


@pytest.fixture(scope="module")
def late(place: Path) -> dict[str, Answer]:
    """The answers to LATE, once it is known that nothing was left behind."""
    before = listing(place)
    answers = several([["recipe", *case.arguments, *case.more] for case in LATE.values()], cwd=place)
    assert listing(place) == before  # `nothing` was there, stays and stays empty
    return {name: answer for name, (answer, _) in zip(LATE, answers, strict=True)}


@pytest.mark.parametrize("name", LATE)
def test_refused_by_the_run(late: dict[str, Answer], name: str) -> None:
    loading = [line for line in late[name].stderr.splitlines() if line.startswith(("loading", "training"))]
    assert loading == []  # refused before the model is loaded
    check_refused(late[name], *LATE[name].words, lines=LATE[name].lines)


# Copies and reports


def test_a_copy_runs_from_anywhere(tmp_path: Path) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    there.mkdir()
    elsewhere.mkdir()
    done = command("recipe", "quickstart", "--copy-to", "mine.yaml", cwd=there)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "wrote mine.yaml\n")
    assert "# The offline quickstart" in (there / "mine.yaml").read_text()
    assert "quickstart: the recipe is valid" in output(
        "recipe", "../there/mine.yaml", "--dry-run", cwd=elsewhere
    )


def test_a_copy_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("precious")
    done = command("recipe", "quickstart", "--copy-to", "mine.yaml", cwd=tmp_path)
    check_refused(done, "mine.yaml: exists already.")
    assert (tmp_path / "mine.yaml").read_text() == "precious"


def test_a_copy_says_its_path_as_json(tmp_path: Path) -> None:
    text = output("recipe", "quickstart", "--copy-to", "mine.yaml", "--json", "train.epochs=2", cwd=tmp_path)
    assert json.loads(text) == {"path": "mine.yaml"}
    assert load_recipe(tmp_path / "mine.yaml").train.epochs == 2


@pytest.mark.parametrize("run", ["nowhere", "full", "chats.jsonl", "chats.jsonl/below"])
def test_a_report_needs_the_folder_of_a_run(place: Path, run: str) -> None:
    before = listing(place)
    done = command("report", run, cwd=place)
    check_refused(done, f"{run}: holds no report.json. Give the folder of a finished run.")
    assert listing(place) == before
