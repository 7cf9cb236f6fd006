"""What people type that is no command or option of ours, and what there is instead.

Owns the names of commands that other tools have, and recipe keys written as options. Refuses them in words;
all else is the command line's library's.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Final

from typer.core import TyperCommand, TyperGroup

from .errors import MAX_SHOWN, InputError
from .recipe_file import list_recipes
from .recipe_words import dotted_key

_NOT_YET: Final = "is not available yet."
_INSTEAD: Final = {
    "train tune run start launch sft qlora lora fine-tune finetune": (
        "the command is `recipe`.",
        "Write `recipe NAME` to train; `recipe` alone lists the names.",
    ),
    "chat talk ask generate infer inference predict complete prompt cli": (
        _NOT_YET,
        "The README.md beside a trained adapter has the lines that load it; `export RUN --to ollama` makes a "
        "model to talk to: docs/export.md.",
    ),
    "serve server api deploy host webui gradio": (
        _NOT_YET,
        "Write `export RUN --to merged` for vLLM, or `--to ollama`: docs/export.md.",
    ),
    "evaluate eval test score metrics": (
        _NOT_YET,
        "A run evaluates: name held-out rows in data.eval, and evaluate.metrics, in its recipe.",
    ),
    "resume continue": (
        _NOT_YET,
        "Write `recipe NAME adapter.init=RUN/adapter`: a new run goes on from a trained adapter.",
    ),
    "compare diff": (_NOT_YET, "Every run folder has a report.html and a report.json."),
    "merge convert quantize save": (
        "the command is `export`.",
        "Write `export RUN --to merged`, or another target: docs/export.md.",
    ),
    "push upload publish": ("the command is `export`.", "Write `export RUN --to hub --repo you/name`."),
    "check validate lint inspect preview dataset data": (
        "the command is `doctor`.",
        "Write `doctor NAME` for a recipe's rows, `recipe NAME --dry-run` for its keys.",
    ),
    "memory estimate vram size": ("the command is `plan`.", "Write `plan NAME --vram 8GiB`."),
    "list ls recipes show": ("the command is `recipe`.", "Write `recipe` to list the recipes."),
    "init new create copy edit config": (
        "the command is `recipe`.",
        "Write `recipe NAME --copy-to mine.yaml` for one to edit.",
    ),
    "env info version": ("is no command.", "Write `--version`, or `doctor` to check this machine."),
    "keys options docs": ("the command is `schema`.", "Write `schema --markdown` for all keys."),
    "bench benchmark": ("is a program of its own.", "Write `python -m bench`, in a checkout."),
    "help": ("is no command.", "Write `--help`, or `recipe --help`."),
}
INSTEAD: Final = {name: told for names, told in _INSTEAD.items() for name in names.split()}
"""Name of a command elsewhere -> reason and remedy."""


class Commands(TyperGroup):
    """The commands, and an answer to those that there are not."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        typed = args[0]
        if typed not in self.commands:
            close = difflib.get_close_matches(typed.lower(), (*INSTEAD, *self.commands), n=1, cutoff=0.8)
            told = INSTEAD.get(close[0]) if close else None
            if typed.endswith((".yaml", ".yml")) or typed in {path.stem for path in list_recipes()}:
                told = "is a recipe.", f"Write `recipe {typed}`, or plan or doctor before it."
            if told is not None:
                raise InputError(typed, *told)
        return super().resolve_command(ctx, args)


class TakesKeys(TyperCommand):
    """A command with overrides, which some write as options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
        for i, text in enumerate(args):
            found = re.fullmatch(r"--([A-Za-z_][\w.-]*)(?:=(.*))?", text, re.DOTALL)
            if found is None or text.partition("=")[0] in own:
                continue
            key, value = dotted_key(found[1]), found[2]
            if key is not None:
                following = args[i + 1] if len(args) > i + 1 and not args[i + 1].startswith("-") else "VALUE"
                remedy = f"Write {key}={(following if value is None else value)[:MAX_SHOWN]}, without dashes."
                raise InputError(f"--{found[1]}", "is no option, but a key of the recipe.", remedy)
        return super().parse_args(ctx, args)
