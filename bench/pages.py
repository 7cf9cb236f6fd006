"""Generated parts of pages: between `<!-- generated: NAME -->` and `<!-- end -->` stands what NAME gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

PART: Final = re.compile(r"(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)", re.DOTALL)


def fill(page: str, parts: Mapping[str, Callable[[], str]], *, partly: bool = False) -> str:
    """The text of a page with every generated part made anew; `partly`: those of others stay as they are.

    Raises:
        KeyError: the page names a part that nobody makes.
    """

    def replace(match: re.Match[str]) -> str:
        if partly and match[2] not in parts:
            return match[0]
        return f"{match[1]}\n{parts[match[2]]()}{match[3]}"

    return PART.sub(replace, page)
