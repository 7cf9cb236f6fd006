"""JSON inside data files, read strictly, with a reason and a remedy for all that is not JSON.

Refuses an object that names a key twice, which Python's own reader answers with the last value and no word.
Lists that Python wrote its own way, as tables hold them, are read too, as strictly.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from ..errors import DataError, shown
from ..json_files import DECODER, RepeatedKey, unique_object

_PYTHON: Final = re.compile(r"\s*[\[(]?\s*\{\s*(?:'|\"[^\"]*\"\s*:\s*(?:'|None|True|False))")
"""How a list of dicts begins that Python's str() wrote, and JSON does not."""
_MAX_PYTHON: Final = 2**20
"""Characters of such a list that are read; Python's parser takes a hundred times their memory."""
_PYTHON_S_WAY: Final = "This is how Python prints it: write it with json.dumps."


def parse(text: str, place: str, remedy: str, what: str = "") -> Any:
    """What `text` says; `what` begins the reason where it is not JSON.

    Raises:
        DataError: it is not JSON, or names a key twice.
    """
    return decoded(partial(DECODER.decode, text), place, remedy, what)


def parse_list(text: str, place: str, what: str) -> Any:
    """What the text of a table's cell says: JSON, or what str() made of a list, as pandas writes it.

    Raises:
        DataError: it is neither, or names a key twice.
    """
    if _PYTHON.match(text) and len(text) <= _MAX_PYTHON:
        try:
            return _value(ast.parse(text.strip(), mode="eval").body)
        except RepeatedKey as error:
            raise repeated(error, place) from None
        except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
            pass
    remedy = _PYTHON_S_WAY if _PYTHON.match(text) else "Write the list itself, or as JSON."
    return parse(text, place, remedy, what)


def _value(node: ast.expr) -> Any:
    """A literal's value; `ast.literal_eval` takes the last of a dict's equal keys without a word."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        if any(key is None for key in node.keys):
            raise ValueError("not a literal")
        pairs = [(_value(key), _value(one)) for key, one in zip(node.keys, node.values, strict=True) if key]
        return unique_object(pairs)
    return ast.literal_eval(node)


def decoded(decode: Callable[[], Any], place: str, remedy: str, what: str = "") -> Any:
    """What `decode` returns, and every way in which JSON can be wrong as a DataError."""
    try:
        return decode()
    except RepeatedKey as error:
        raise repeated(error, place) from None
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        reason = f"{what}not valid JSON: {error.msg.removesuffix(' at')} at {where}."
        if not what and _PYTHON.match(error.doc):
            remedy = _PYTHON_S_WAY
        raise DataError(place, reason, remedy) from None
    except (RecursionError, ValueError) as error:  # ValueError: Python reads 4300 digits at most
        why = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise DataError(place, f"{what}not valid JSON: {why}.", remedy) from None


def repeated(error: RepeatedKey, place: str) -> DataError:
    """What is said of a key that stands twice."""
    reason = f"names the key {shown(error.args[0])} twice in one object: only one of the two would be read."
    return DataError(place, reason, "Keep the right one, or give the other a name of its own.")
