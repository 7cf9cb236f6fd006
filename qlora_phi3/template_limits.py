"""Chat templates that may take the machine: recognised by their syntax, and run in a child process first.

Owns which templates are simple, so that their work is bounded by the row they render, and the limits of the
others' probes: seconds, memory, characters. A template is a program of whoever made the base.

Not covered: one that is not simple, and explodes on rows alone that are unlike the probes; and on Windows,
where a process has no such limits, memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import lru_cache
from typing import Any, Final

from .errors import ModelError

SECONDS: Final = 3
"""Of computing."""
PATIENCE: Final = 30
"""Seconds for the child in all, on a busy machine, and where a process has no limit of its own."""
MAX_BYTES: Final = 512 * 2**20
MAX_CHARACTERS: Final = 1_000_000
"""Of what is rendered of 64 short turns; known templates add less than 5,000."""

MAX_NESTED: Final = 2
"""Loops in loops of a simple template."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS: Final = _words(
    "abs capitalize count d default e escape first float int items last length list lower map reject"
    " rejectattr safe select selectattr string title tojson trim upper"
)
_FUNCTIONS: Final = _words("namespace raise_exception strftime_now")
_METHODS: Final = _words(
    "capitalize endswith get isdigit items keys lower lstrip rsplit rstrip split startswith strip title upper"
    " values"
)
_SIMPLE: Final = _words(
    "Add And Assign Break Compare Concat CondExpr Const Continue Dict ExprStmt Filter For Getattr Getitem If"
    " Keyword List Name NSRef Neg Not Operand Or Output Pair Slice Sub Template TemplateData Test Tuple"
)
"""Kinds of nodes that take as long as what they are given is large."""

_GENERATION: Final = re.compile(r"({%-?\s*)(end)?generation(\s*-?%})")
"""transformers' own tag around what an assistant says."""

_PROBE: Final = """
import json, sys
asked = json.load(sys.stdin)
sys.path[:] = asked["path"]
try:
    import resource
except ImportError:
    pass
else:
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"],) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (asked["bytes"],) * 2)
import jinja2, jinja2.ext, jinja2.sandbox

def refuse(message):
    raise jinja2.TemplateError(message)

def dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
)
environment.filters["tojson"] = dumps
environment.globals |= {"raise_exception": refuse, "strftime_now": str}
longest = 0
try:
    template = environment.from_string(asked["template"])
    for given in asked["probes"]:
        try:
            longest = max(longest, sum(map(len, template.generate(**given))))
        except MemoryError:
            raise
        except Exception:
            pass
except MemoryError:
    longest = -1
except Exception:
    pass
print(longest)
"""
"""transformers 5.23's environment, as far as a template needs it to explode; its own import takes seconds."""


def check(template: str, place: str) -> None:
    """Refuse a chat template that takes endless time or memory on short conversations.

    Raises:
        ModelError: it does.
    """
    problem = _problem(template)
    if problem is not None:
        reason = f"the chat template {problem} on short conversations."
        raise ModelError(place, reason, "Use the template of the base's own maker, or mend it.")


@lru_cache(maxsize=16)
def _problem(template: str) -> str | None:
    plain = _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", template)
    return None if is_simple(plain) else _explosion(plain)


def is_simple(template: str) -> bool:
    """Whether its work is bounded by what it renders; false where that is not plain to see.

    A template that cannot be parsed is simple: it is refused where it is first used.
    """
    import jinja2
    from jinja2.ext import loopcontrols

    try:
        tree = jinja2.Environment(extensions=[loopcontrols]).parse(template)
        assignments = tree.find_all(jinja2.nodes.Assign)
        assigned = frozenset(name for one in assignments for name in _names(one.target))
        return _is_simple(tree, assigned, 0)
    except (jinja2.TemplateError, RecursionError):
        return True


def _is_simple(node: Any, assigned: frozenset[str], depth: int) -> bool:
    import jinja2

    nodes = jinja2.nodes
    if isinstance(node, nodes.For):
        depth += 1
        if node.recursive or depth > MAX_NESTED or (depth > 1 and not _names(node.iter)):
            return False
    elif isinstance(node, nodes.Assign):
        if sum(name in assigned for name in _names(node.node)) > 1:  # x ~ x: doubled as often as it stands
            return False
    elif isinstance(node, nodes.Filter):
        if node.name not in _FILTERS:
            return False
    elif isinstance(node, nodes.Call):
        if not _is_simple_call(node.node):
            return False
    elif isinstance(node, nodes.Mod):  # of numbers, not "%999999999d"
        return isinstance(node.left, nodes.Getattr) and isinstance(node.right, nodes.Const)
    elif type(node).__name__ not in _SIMPLE:
        return False
    return all(_is_simple(child, assigned, depth) for child in node.iter_child_nodes())


def _is_simple_call(called: Any) -> bool:
    import jinja2

    if isinstance(called, jinja2.nodes.Name):
        return called.name in _FUNCTIONS
    return isinstance(called, jinja2.nodes.Getattr) and called.attr in _METHODS


def _names(node: Any) -> list[str]:
    """Every name that an expression reads, as often as it does."""
    import jinja2

    kinds = (jinja2.nodes.Name, jinja2.nodes.NSRef)
    own = [node.name] if isinstance(node, kinds) else []
    return own + [found.name for found in node.find_all(kinds)]


def _explosion(template: str) -> str | None:
    """What a template does in a process of its own that it must not; None where it ends as it should."""
    asked = {
        "path": [one for one in sys.path if one],  # "" would be a folder of the user's
        "template": template,
        "probes": list(_probes()),
        "seconds": SECONDS,
        "bytes": MAX_BYTES,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except OSError:  # no process can be had
        return None
    except subprocess.TimeoutExpired:
        return f"takes more than {SECONDS} seconds"
    if done.returncode < 0:
        return f"takes more than {SECONDS} seconds or {MAX_BYTES // 2**20} MiB"
    words = done.stdout.split()
    if done.returncode or not words:  # not the template's doing: no jinja2 there, say
        return None
    longest = int(words[-1])
    if longest < 0:
        return f"takes more than {MAX_BYTES // 2**20} MiB"
    return f"renders {longest:,} characters" if longest > MAX_CHARACTERS else None


def _probes() -> list[dict[str, Any]]:
    """A question, its answer, and a talk of many turns; with a tool and without."""
    asked, answered = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
    tool = {"type": "function", "function": {"name": "f", "description": "1", "parameters": {}}}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>", "unk_token": "<u>"}
    talks = ([asked], [asked, answered], [{"role": "system", "content": "3"}, asked, answered])
    long = [one | {"content": "word " * 40} for _ in range(32) for one in (asked, answered)]
    return [
        {**tokens, "messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        for messages in (*talks, long)
        for tools in (None, [tool])
        for prompt in (True, False)
    ]
