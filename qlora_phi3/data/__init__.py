"""From the user's files to rows of tokens: read -> normalise -> template -> tokens and mask.

Owns what the model sees and what it is trained on. Every row that is left out is counted and reported.
The names below are imported at their first use: a recipe is checked before numpy is here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mix import draw
    from .read import check_files
    from .rows import Conversation
    from .sources import files_of
    from .splits import Prepared, Prompt, Split, Splits, check, load, prepare, prompts
    from .tokens import TokenRow

__all__ = [
    "Conversation",
    "Prepared",
    "Prompt",
    "Split",
    "Splits",
    "TokenRow",
    "check",
    "check_files",
    "draw",
    "files_of",
    "load",
    "prepare",
    "prompts",
]

_ROOMS = {
    "check_files": "read",
    "draw": "mix",
    "Conversation": "rows",
    "files_of": "sources",
    "TokenRow": "tokens",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOMS.get(name, 'splits')}", __name__), name)
