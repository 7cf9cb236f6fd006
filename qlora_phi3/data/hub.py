"""Rows of a data set on the hub, streamed: nothing but the part that is read is downloaded.

Owns the way from org/name to rows, and how the hub's refusals are worded. Runs no code of a data set. One
look-up without retries comes first, so that a machine without network is told so in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import DataError, Problem
from ..recipe import Source
from .provenance import Record, SourceRead
from .sources import Row, first_line, without_nulls

TIMEOUT_SECONDS: Final = 10.0
"""Of the first look-up; `datasets` alone tries an unreachable hub for half a minute."""

_NETWORK: Final = "Check the network, or download the data set elsewhere and give its folder: ./name."


def rows_of(source: Source, record: Record | None = None) -> Iterator[Row]:
    """Rows of `source` in the data set's order; what cannot be read comes as a last Problem.

    `record` gets the commit that is read.
    """
    place = place_of(source)
    number = 0
    try:
        for row in _open(source, place, record):
            number += 1
            yield f"{place}: row {number}", without_nulls(row)
    except DataError as error:
        yield from ((problem.place, problem) for problem in error.problems)
    except Exception as error:  # any reader of `datasets`, and its HTTP library, raises what it likes
        where = f"{place}: row {number + 1}"
        yield where, Problem(where, f"cannot be read: {first_line(error)}.", _NETWORK)
    else:
        if not number:
            yield place, Problem(place, "holds no rows.", "Choose another split.")


def place_of(source: Source) -> str:
    """`org/name[split]`, or `org/name/subset[split]`."""
    subset = f"/{source.subset}" if source.subset else ""
    return f"{source.path}{subset}[{source.split}]"


def _open(source: Source, place: str, record: Record | None) -> Any:
    """The data set as an iterable, at the commit that the look-up found.

    Raises:
        DataError: unknown, refused, unreachable, or without that split or subset.
    """
    import datasets

    if Path(source.path).exists():
        reason = "is a folder here too, which would be read in the data set's place."
        raise DataError(place, reason, "Write ./org/name for the folder, or start from another one.")
    commit = _look_up(source, place)
    if record is not None:
        record(SourceRead(source.path, split=source.split, revision=commit or source.revision))
    try:
        return datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=commit, streaming=True
        )
    except Exception as error:  # ValueErrors, FileNotFoundErrors, HTTP errors: its message says what is wrong
        remedy = "Check split and subset; without data files that `datasets` knows it cannot be read."
        raise DataError(place, f"cannot be opened: {first_line(error)}.", remedy) from None


def _look_up(source: Source, place: str) -> str | None:
    """The commit that is the data set now, from one request."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        found = HfApi().dataset_info(source.path, revision=source.revision, timeout=TIMEOUT_SECONDS)
    except HFValidationError:
        remedy = "Write org/name, or ./folder for files."
        raise DataError(place, "is neither a hub id nor a file or folder.", remedy) from None
    except Exception as error:  # what its HTTP library raises is no OSError
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise DataError(place, *_explain(error, status)) from None
    return found.sha


def _explain(error: Exception, status: int | None) -> tuple[str, str]:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if status in (401, 403):
        # 401 is also its answer to an unknown name when nobody is logged in
        remedy = "Check the name; accept its terms on the hub and log in with `hf auth login`."
        return f"the hub refuses access (HTTP {status}): gated, private or no such data set.", remedy
    if status == 404:
        return "no such file or folder, and not on the hub, or no such revision.", "Check path and revision."
    why = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else first_line(error)
    return f"no such file or folder, and the hub cannot be reached: {why}.", _NETWORK
