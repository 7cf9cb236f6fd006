"""JSON inside data files, read strictly, with a reason and a remedy for all that is not JSON.

Refuses an object that names a key twice, which Python's own reader answers with the last value and no word.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import DataError, shown
from ..json_files import DECODER, RepeatedKey


def parse(text: str, place: str, remedy: str, what: str = "") -> Any:
    """What `text` says; `what` begins the reason where it is not JSON.

    Raises:
        DataError: it is not JSON, or names a key twice.
    """
    return decoded(partial(DECODER.decode, text), place, remedy, what)


def decoded(decode: Callable[[], Any], place: str, remedy: str, what: str = "") -> Any:
    """What `decode` returns, and every way in which JSON can be wrong as a DataError."""
    try:
        return decode()
    except RepeatedKey as error:
        raise repeated(error, place) from None
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        reason = f"{what}not valid JSON: {error.msg.removesuffix(' at')} at {where}."
        raise DataError(place, reason, remedy) from None
    except (RecursionError, ValueError) as error:  # ValueError: Python reads 4300 digits at most
        why = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise DataError(place, f"{what}not valid JSON: {why}.", remedy) from None


def repeated(error: RepeatedKey, place: str) -> DataError:
    """What is said of a key that stands twice."""
    reason = f"names the key {shown(error.args[0])} twice in one object: only one of the two would be read."
    return DataError(place, reason, "Keep the right one, or give the other a name of its own.")
