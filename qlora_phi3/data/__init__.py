"""From the user's files to rows of tokens: read -> normalise -> template -> tokens and mask.

Owns what the model sees and what it is trained on. Every row that is left out is counted and reported.
"""

from .cache import sha256
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
    "files_of",
    "load",
    "prepare",
    "prompts",
    "sha256",
]
