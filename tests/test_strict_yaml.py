"""YAML text becomes plain values by the rules of YAML 1.2; everything doubtful is refused with its line."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from qlora_phi3.errors import RecipeError
from qlora_phi3.strict_yaml import MAX_DEPTH, MAX_DIGITS, dotted_path, dump, parse, parse_value


def problems_of(text: str) -> list[str]:
    """What `parse` refuses, whether it can go on or not."""
    try:
        return [str(problem) for problem in parse(text, "r.yaml").problems]
    except RecipeError as error:
        return [str(problem) for problem in error.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("+3", 3),
        ("-3", -3),
        ("012", 12),
        ("9" * MAX_DIGITS, 10**MAX_DIGITS - 1),
        ("2e-4", 2e-4),
        ("2E4", 2e4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5e+1", -5.0),
        ("1.0", 1.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("NULL", None),
        ("[1, a, 2e-4]", [1, "a", 2e-4]),
        ("{a: {b: []}, c: no}", {"a": {"b": []}, "c": "no"}),
    ],
)
def test_values(text: str, value: Any) -> None:
    for found in (parse_value(text, "command line"), parse(f"key: {text}\n", "r.yaml").values["key"]):
        assert found == value
        assert type(found) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(parse_value(".nan", "command line"))


WORDS = "no yes on off y N tRUE nUll inf nan e5 + . = << 1_000 0x10 0o10 1:30 2026-01-01 1.2.3 8GiB 1e --1 ٣"


@pytest.mark.parametrize("text", WORDS.split())
def test_text_stays_text(text: str) -> None:
    assert parse_value(text, "command line") == text


@pytest.mark.parametrize("text", ["'2e-4'", '"2e-4"', "'null'", "'true'", '"12"'])
def test_quoted_is_text(text: str) -> None:
    assert parse_value(text, "command line") == text[1:-1]


NESTED = """\
# a comment
a: 1

b:
  c: [x,
      y]
  d:
    - {e: 2}
    - z
"""


def test_every_key_and_item_has_its_line() -> None:
    document = parse(NESTED, "r.yaml")
    assert document.values == {"a": 1, "b": {"c": ["x", "y"], "d": [{"e": 2}, "z"]}}
    assert {dotted_path(path): line for path, line in document.lines.items()} == {
        "a": 2,
        "b": 4,
        "b.c": 5,
        "b.c[0]": 5,
        "b.c[1]": 6,
        "b.d": 7,
        "b.d[0]": 8,
        "b.d[0].e": 8,
        "b.d[1]": 9,
    }


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + NESTED,
        NESTED.replace("\n", "\r\n"),
        "---\n" + NESTED.replace("# a comment\n", "") + "...\n",
        "%YAML 1.2\n---\n" + NESTED.removeprefix("# a comment\n\n"),
    ],
    ids=["byte order mark", "CRLF", "document markers", "directive"],
)
def test_file_formats_of_other_editors(text: str) -> None:
    assert parse(text, "r.yaml").values == parse(NESTED, "r.yaml").values


@pytest.mark.parametrize("text", ["\ufeffa: 1\nb: 2\n", "a: 1\r\nb: 2\r\n"])
def test_lines_do_not_shift(text: str) -> None:
    assert parse(text, "r.yaml").lines == {("a",): 1, ("b",): 2}


def test_order_of_keys_is_kept() -> None:
    assert list(parse("z: 1\na: 2\nm: 3\n", "r.yaml").values) == ["z", "a", "m"]


def test_duplicates_keep_the_first_and_are_all_named() -> None:
    document = parse("a: 1\nb:\n  c: 2\n  d: 3\n  c: 4\na: 5\nb: {c: 6}\nc: 7\n", "r.yaml")
    assert document.values == {"a": 1, "b": {"c": 2, "d": 3}, "c": 7}
    assert [str(problem) for problem in document.problems] == [
        "r.yaml:5: b.c: the key stands twice, first in line 3. Keep one.",
        "r.yaml:6: a: the key stands twice, first in line 1. Keep one.",
        "r.yaml:7: b: the key stands twice, first in line 2. Keep one.",
    ]


ANCHOR = "anchors and aliases are not supported. Write the value out."
TAG = "tags are not supported. Remove the part that begins with `!`."


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("a: 1\nb: &x 2\n", [f"r.yaml:2: b: {ANCHOR}"]),
        ("a: &x {b: 1}\nc: [*x]\n", [f"r.yaml:1: a: {ANCHOR}", f"r.yaml:2: c[0]: {ANCHOR}"]),
        ("a: *nowhere\n", [f"r.yaml:1: a: {ANCHOR}"]),
        ("a: &x [*x]\n", [f"r.yaml:1: a: {ANCHOR}"]),
        ("&x a: 1\n", [f"r.yaml:1: {ANCHOR}"]),
        ("a: 1\n*x : 2\n", [f"r.yaml:2: {ANCHOR}"]),
        ("&x\na: 1\n", [f"r.yaml:1: {ANCHOR}"]),
        ("a: !!str 3\n", [f"r.yaml:1: a: {TAG}"]),
        ("a: ! 3\n", [f"r.yaml:1: a: {TAG}"]),
        ("a: !mine 3\n", [f"r.yaml:1: a: {TAG}"]),
        ("a: !!python/object/apply:os.system [ls]\n", [f"r.yaml:1: a: {TAG}"]),
        ("a: !!set {b}\n", [f"r.yaml:1: a: {TAG}"]),
        ("a: !!binary aGk=\n", [f"r.yaml:1: a: {TAG}"]),
        ("!!str a: 1\n", [f"r.yaml:1: {TAG}"]),
        ("a: 1\n3: b\n", ["r.yaml:2: a key must be plain text, not '3'. Mend or remove it."]),
        ("null: b\n", ["r.yaml:1: a key must be plain text, not 'null'. Mend or remove it."]),
        ("a: {true: b}\n", ["r.yaml:1: a: a key must be plain text, not 'true'. Mend or remove it."]),
        ("? [a]\n: b\n", ["r.yaml:1: a key must be plain text, not a list or a mapping. Mend or remove it."]),
        ('"\\e[31m": b\n', ["r.yaml:1: a key must be plain text, not '\\x1b[31m'. Mend or remove it."]),
        ('"\\ud800": b\n', ["r.yaml:1: a key must be plain text, not '\\ud800'. Mend or remove it."]),
        ("a\u00a0: b\n", ["r.yaml:1: a key must be plain text, not 'a\\xa0'. Mend or remove it."]),
        (f"a: {'9' * 5000}\n", ["r.yaml:1: a: is a number of more than 30 digits. Quote it if it is text."]),
        ('a: "\\0"\n', ["r.yaml:1: a: holds a character that no file can hold. Remove it."]),
        ('a: ["\\udfff"]\n', ["r.yaml:1: a[0]: holds a character that no file can hold. Remove it."]),
    ],
)
def test_refused_contents(text: str, problems: list[str]) -> None:
    assert problems_of(text) == problems


def test_what_is_refused_has_no_value_and_the_rest_is_read() -> None:
    document = parse("a: !!int 3\nb: {c: 1, d: &x 2}\ne: 4\n", "r.yaml")
    assert document.values == {"a": None, "b": {"c": 1, "d": None}, "e": 4}
    assert document.refused == {("a",), ("b", "d")}


def test_a_merge_key_is_a_key_like_any_other() -> None:
    assert parse("<<: {a: 1}\nb: 2\n", "r.yaml").values == {"<<": {"a": 1}, "b": 2}


def test_a_billion_laughs_stay_unexpanded() -> None:
    laughs = ["a0: &a0 [ha, ha]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert problems_of("\n".join(laughs)) == [f"r.yaml:{i + 1}: a{i}: {ANCHOR}" for i in range(30)]


NO_MAPPING = "holds no mapping of keys to values. Start it with `version: 1`."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", f"r.yaml: {NO_MAPPING}"),
        ("# only\n# comments\n", f"r.yaml: {NO_MAPPING}"),
        ("- a\n- b\n", f"r.yaml: {NO_MAPPING}"),
        ("text\n", f"r.yaml: {NO_MAPPING}"),
        ("null\n", f"r.yaml: {NO_MAPPING}"),
        ("*x\n", f"r.yaml: {NO_MAPPING}"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not valid YAML: expected a single document * Keep one."),
        ("a:\n\tb: 1\n", "r.yaml:2: not valid YAML: * character '\\t' * Use spaces instead of the tab."),
        (
            "a: 1\nb: c: d\n",
            "r.yaml:2: not valid YAML: mapping values are not allowed here. Quote the text *",
        ),
        ("a: 1\n  b: 2\n", "r.yaml:2: not valid YAML: mapping values are not allowed here. *indentation."),
        (
            "a: {}\n  b: 2\n",
            "r.yaml:2: not valid YAML: *from line 1 expected <block end>* Mend the indentation.",
        ),
        ("a: @b\n", "r.yaml:1: not valid YAML: * character '@' * Quote the text."),
        ("a: 1\nb: 'x\n\n", "r.yaml:4: not valid YAML: * from line 2 * Close the quote."),
        ("a: {b: 1\nc: 2\n", "r.yaml:2: not valid YAML: * from line 1 *"),
        ("a: [1,\n", "r.yaml:2: not valid YAML: * Close the bracket."),
        ("a: 1\nb: \x00\n", "r.yaml:2: the character U+0000 cannot stand in YAML. Remove it."),
        ("a: \x1b[31m\n", "r.yaml:1: the character U+001B cannot stand in YAML. Remove it."),
        ('a: "\\UFFFFFFFF"\n', "r.yaml: not valid YAML: * Mend it."),
        ("%YAML 2.0\n---\na: 1\n", "r.yaml:1: not valid YAML: found incompatible YAML document *"),
    ],
)
def test_what_is_no_mapping_or_no_yaml(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    parts = problem.split("*")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(parts[0])
    assert message.endswith(parts[-1])
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    "text",
    ["a: " + "[" * 10_000 + "]" * 10_000, "a: " + "[" * 10_000, "{a: " * 10_000, "- " * 10_000],
    ids=["closed lists", "open lists", "mappings", "dashes"],
)
def test_deep_nesting_is_a_message(text: str) -> None:
    with pytest.raises(RecipeError, match=f"nested more than {MAX_DEPTH} deep"):
        parse(text, "r.yaml")
    with pytest.raises(RecipeError, match=r"^command line: a\.b: .*nested more than"):
        parse_value(text.removeprefix("a: "), "command line", ("a", "b"))


def test_nesting_up_to_the_limit_is_read() -> None:
    depth = MAX_DEPTH - 2  # the mapping and the innermost value count too
    text = "[" * depth + "1" + "]" * depth
    assert str(parse(f"a: {text}", "r.yaml").values["a"]) == text
    assert problems_of(f"a: [{text}]")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("&x 3", f"command line: a.b: {ANCHOR}"),
        ("!!int 3", f"command line: a.b: {TAG}"),
        ("{c: 1, c: 2}", "command line: a.b.c: the key stands twice. Keep one."),
        ("[*x]", f"command line: a.b[0]: {ANCHOR}"),
        ("\x00", "command line: a.b: the character U+0000 cannot stand in YAML. Remove it."),
    ],
)
def test_refused_values_name_their_key(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_value(text, "command line", ("a", "b"))
    assert str(caught.value) == problem


LOOKS_LIKE_ANOTHER = ["null", "~", "", "true", "2e-4", "012", "09", ".inf", "0.", "+1", *WORDS.split()]
STRUCTURE = ["a: b", "#x", "a #b", "- a", "-", "[a]", "{a", "a,b", "...", "---"]
MARKS = ["&a", "*a", "!a", "@a", "%a", "|", ">", "? a", "`a`"]
QUOTES = ["'", '"', "it's", "\"a\" and 'b'", "\\"]
SPACES = [" a ", "a\nb\n", "\n", "a\tb", "\u2028", "a\x85b", "\ufeff", "\xa0", "x " * 200, "a\r\nb"]
UNICODE = ["ü 漢 😀", "\x1b[0m", "e\u0301"]
NUMBERS = [0, -7, 10**20, 0.1, 2e-4, 1e-07, 1e22, -0.0, True, False, None]
NESTS = [[], {}, [[], {}], {"no": {"2e-4": ["on"]}}]


@pytest.mark.parametrize(
    "value", [*LOOKS_LIKE_ANOTHER, *STRUCTURE, *MARKS, *QUOTES, *SPACES, *UNICODE, *NUMBERS, *NESTS]
)
def test_dumped_values_read_back_equal(value: Any) -> None:
    text = dump({"z": value, "a": [value]})
    found = parse(text, "r.yaml").values
    assert repr(found) == repr({"z": value, "a": [value]})
    assert yaml.safe_load(text) == found  # a YAML 1.1 reader agrees
