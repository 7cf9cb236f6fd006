"""A trained adapter in the forms that other programs read, each proven to compute what was trained.

Owns the order of an export: check everything, write beside the place, gate, rename. A folder with a target's
name is whole and gated. Knows nothing of torch until something is exported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..errors import FitError, InputError, RunError
from ..units import format_bytes
from . import card, destination
from .options import BELONGS, TARGETS, Options, Say, check

if TYPE_CHECKING:
    from ..weights import Checkpoint
    from .gates import Gates
    from .source import Source

__all__ = ["BELONGS", "TARGETS", "Exported", "Options", "check", "check_base", "export", "export_all"]


@dataclass(frozen=True)
class Exported:
    """One finished export. `files`: bytes by path inside `folder`; `details`: what its target says of it,
    the merge report under "merge"; `parity`: what the gate found."""

    target: str
    folder: Path
    files: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}

    def __str__(self) -> str:
        return f"{self.target}  {self.folder}  {format_bytes(sum(self.files.values()))}"


def check_base(targets: Sequence[str], checkpoint: Checkpoint, run: Path) -> None:
    """Refuse, before a training, what one of its exports could not be made of, or would have no room.

    Raises:
        ModelError: llama.cpp cannot repeat the base's tokenizer or rotary embedding, or Ollama its template.
        OutputError: the run's disk has no room for all of them.
    """
    wanted = [target for target in targets if target != "adapter"]  # which a run always has
    if not wanted:
        return
    from . import stops
    from .table import base_bytes, check_base_for

    stops.named_by(checkpoint)
    for target in wanted:
        check_base_for(target, checkpoint)
    destination.check_room([(run / "exports", base_bytes(target, checkpoint)) for target in wanted])


def export(
    run: Path,
    target: str,
    *,
    out: Path | None = None,
    force: bool = False,
    options: Options | None = None,
    say: Say = lambda _: None,
) -> Exported:
    """Export a run's or a folder's adapter to one target, by default into the run's `exports/<target>`.

    Raises:
        InputError: the adapter, target or place cannot be used -> nothing is left behind.
        RunError: the gate found a difference, or the disk did not take or give back what was written.
        FitError: memory did not suffice.
    """
    return export_all(run, [target], out=out, force=force, options=options, say=say)[0]


def export_all(
    run: Path,
    targets: Sequence[str],
    *,
    out: Path | None = None,
    force: bool = False,
    options: Options | None = None,
    say: Say = lambda _: None,
    finished: Callable[[Exported], None] = lambda _: None,
) -> list[Exported]:
    """Export to several targets, all of them checked before the first is written.

    `finished` is told each as soon as it is there, for one that comes later may fail.

    Raises:
        InputError: as `export`; or `out` for several targets.
        RunError, FitError: as `export`.
    """
    options = options or Options()
    with _told(", ".join(targets), run):
        source, places = _checked(run, targets, out, force, options, say)
    from . import hub
    from .gates import Gates

    gates, done = Gates(source, say), list[Exported]()
    try:
        for target, folder in places.items():
            with _told(target, folder):
                done.append(_export(source, target, folder, force, options, gates, say))
            finished(done[-1])
        if "hub" in targets:
            done.append(hub.push(source, places.get(options.what), options, say))
            finished(done[-1])
    except BaseException:
        for one in done:
            say(f"whole all the same: {one}")
        wanted = [*places, *(["hub"] if "hub" in targets else [])]
        if untried := wanted[len(done) + 1 :]:
            say(f"not tried: {', '.join(untried)}")
        raise
    return done


def _checked(
    run: Path, targets: Sequence[str], out: Path | None, force: bool, options: Options, say: Say
) -> tuple[Source, dict[str, Path]]:
    """The source, and the place of each target that is written: all that can be told before anything is.

    Raises:
        InputError: as `export_all`.
    """
    if out is not None and len([target for target in targets if target != "hub"]) != 1:
        raise InputError("--out", f"is for one target; these are {', '.join(targets)}.", "Leave it out.")
    from . import context, hub
    from .source import open_source
    from .table import target_of

    check(targets, {"repo": options.repo} if "hub" in targets else {})
    source = open_source(run, say)
    if source.other_template:
        say(context.OTHER_TEMPLATE)
    assert source.stop_ids, "a chat template without an end of turn is refused when it is read"
    written = [target for target in targets if target != "hub"]
    places = {
        target: destination.real(out or destination.folder_of(source.run, source.folder, target))
        for target in written
    }
    for folder in places.values():
        destination.clear(folder)
        destination.check(folder, force)
    destination.check_apart(places)
    if "hub" in targets:
        hub.check_first(source, places.get(options.what), options)
    for target in places:
        target_of(target).check(source, options)
    sizes = [(folder, target_of(target).num_bytes(source, options)) for target, folder in places.items()]
    beside = [target_of(target).gate_bytes(source, options) for target in places if options.gate]
    destination.check_room(sizes, max(beside, default=0))
    return source, places


@contextmanager
def _told(target: str, folder: Path) -> Iterator[None]:
    """Have the system's and the libraries' errors told; the unfinished export is gone then.

    Raises:
        FitError: memory did not suffice.
        RunError: a file that cannot be read or written.
    """
    from safetensors import SafetensorError

    from ..ladder import ran_out
    from ..weights import first_line

    nothing = "Nothing is left of this export."
    try:
        yield
    except OSError as error:
        place = os.fsdecode(error.filename) if error.filename is not None else str(folder)
        raise RunError(f"{target}: {place}", f"{error.strerror or error}.", nothing) from None
    except SafetensorError as error:
        reason = f"a safetensors file cannot be read or written: {first_line(error)}."
        raise RunError(f"{target}: {folder}", reason, nothing) from None
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or ran_out(error)):
            raise
        remedy = f"{nothing} Close other programs; --no-gate needs less."
        raise FitError(f"{target}: {folder}", "out of memory.", remedy) from None


def _export(
    source: Source, target: str, folder: Path, force: bool, options: Options, gates: Gates, say: Say
) -> Exported:
    from ..layouts.files import give_usual_modes
    from . import context
    from .gates import summary
    from .source import licence_name
    from .table import target_of

    say(f"exporting {target} to {folder}")
    with destination.unfinished(folder, force=force) as partial:
        details = target_of(target).write(source, partial, options, say)
        details |= {"stop_ids": source.stop_ids, "stop_tokens": source.stop_tokens}
        parity = gates.check(target, partial, folder, details, wanted=options.gate)
        say(summary(parity))
        about = card.About(
            *(target, source.name, source.base_name, details, parity, licence_name(source)),
            limits=context.limits_of(
                source,
                target,
                details.get("context"),
                [one["prompt"] for one in parity.get("other_texts", ())],
            ),
        )
        files.write_text(partial / "README.md", card.render(source.report, about))
        content = {"target": target, "details": details, "files": destination.files_of(partial)}
        destination.describe(partial, content)
        give_usual_modes(partial)
        found = destination.files_of(partial)
    return Exported(target, folder, found, details, parity)
