"""Generated parts of pages: between `<!-- generated: NAME -->` and `<!-- end -->` stands what NAME gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


def fill(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """The text of a page with every generated part made anew.

    Raises:
        KeyError: the page names a part that nobody makes.
    """

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{parts[match[2]]()}{match[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)", replace, page, flags=re.DOTALL)
