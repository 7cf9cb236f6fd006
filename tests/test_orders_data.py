"""The quickstart data set is what its generator writes, and every label follows from its message.

The checks read messages with tables of their own (numbers, cues for speed, edit distance), not with the
generator's, and run over another seed besides the committed files, so that rare draws are seen too.
"""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "recipes" / "data" / "orders"
KEYS = ["item", "quantity", "color", "customer", "city", "express"]

NUMBER_WORDS = {
    word: number
    for number, word in enumerate(
        [
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ],
        start=1,
    )
} | {"thirty": 30, "forty": 40}
PHRASED_NUMBERS = {
    "a": 1,
    "an": 1,
    "a single": 1,
    "a couple of": 2,
    "half a dozen": 6,
    "a dozen": 12,
    "two dozen": 24,
}
FAST = re.compile(r"\b(asap|express|overnight|hurry|urgent|fast|tomorrow|rush|soon)\b")
NOT_FAST = re.compile(r"no rush|take your time")
OTHER_NUMBERS = re.compile(
    r"555-01\d\d|#\d{5}|\d{1,2} m\w+h"
)  # phone, order, date (the month may be misspelled)


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("orders_generate", FOLDER / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generator = load_generator()
TRAIN, HELDOUT = generator.generate(generator.SEED, generator.NUM_TRAIN, generator.NUM_HELDOUT)
MORE = [row for part in generator.generate(1, 400, 400) for row in part]
ROWS = [*TRAIN, *HELDOUT, *MORE]


def read(name: str) -> list[list[dict[str, str]]]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


FILES = {name: read(name) for name in ("train", "heldout")}
CHATS = [chat for chats in FILES.values() for chat in chats]


def messages(name: str) -> list[str]:
    return [chat[1]["content"] for chat in FILES[name]]


def orders(name: str) -> list[dict[str, Any]]:
    return [json.loads(chat[2]["content"]) for chat in FILES[name]]


def surface(row: Any, field: str) -> str:
    """What the message says for a field, in lower case."""
    return str(row.message[slice(*row.spans[field])]).lower()


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def mentions(message: str, names: tuple[str, ...]) -> set[str]:
    """The names that stand in a message as whole words."""
    return {name for name in names if re.search(rf"\b{re.escape(name.lower())}\b", message.lower())}


def number_said(text: str) -> int:
    """The number that a wording states, read without the generator's help."""
    if text in PHRASED_NUMBERS:
        return PHRASED_NUMBERS[text]
    digits = re.fullmatch(r"(?:x ?)?\(?(\d+)\)?(?:x| pcs)?", text)
    return int(digits[1]) if digits else sum(NUMBER_WORDS[part] for part in text.split("-"))


def edit_distance(a: str, b: str) -> int:
    """Inserted, dropped, replaced and swapped letters between two words."""
    before, last = list(range(len(b) + 1)), list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def item_distance(said: str, item: str) -> int:
    return min(edit_distance(said, item), edit_distance(said, generator.plural(item)))


ITEMS = (*generator.ITEMS.shared, *generator.ITEMS.reserved)
NAMES = (*generator.NAMES.shared, *generator.NAMES.reserved)
CITIES = (*generator.CITIES.shared, *generator.CITIES.reserved)
COLOR_WORDS = (*generator.COLORS, "grey")


def newly_worded() -> list[Any]:
    """The held-out rows with a layout or a way to ask that no training row has."""
    layouts, requests = {row.layout for row in TRAIN}, {row.request for row in TRAIN}
    return [row for row in HELDOUT if row.layout not in layouts or row.request not in requests]


# The files


def test_running_the_generator_rewrites_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "generate.py", "--out", tmp_path], check=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_seed_and_sizes_can_be_chosen(tmp_path: Path) -> None:
    sizes = ["--train", "7", "--heldout", "3"]
    for seed in ("1", "2"):
        command = [sys.executable, FOLDER / "generate.py", "--out", tmp_path / seed, "--seed", seed, *sizes]
        subprocess.run(command, check=True)
    texts = [(tmp_path / seed / "train.jsonl").read_text(encoding="utf-8") for seed in ("1", "2")]
    assert texts[0] != texts[1]
    assert [text.count("\n") for text in texts] == [7, 7]
    assert (tmp_path / "1" / "heldout.jsonl").read_text(encoding="utf-8").count("\n") == 3


def test_row_counts() -> None:
    assert {name: len(chats) for name, chats in FILES.items()} == {"train": 480, "heldout": 128}


def test_every_row_is_system_user_assistant_with_one_short_instruction() -> None:
    assert {tuple(turn["role"] for turn in chat) for chat in CHATS} == {("system", "user", "assistant")}
    (instruction,) = {chat[0]["content"] for chat in CHATS}
    assert len(instruction.split()) <= 30
    assert all(key in words(instruction) for key in KEYS)


def test_no_message_occurs_twice_even_without_case_and_punctuation() -> None:
    bare = Counter(re.sub(r"[\W_]", "", chat[1]["content"].lower()) for chat in CHATS)
    assert [message for message, count in bare.items() if count > 1] == []


def test_a_message_drawn_before_is_passed_over() -> None:
    seen: set[str] = set()
    first, again = (
        {row.message for row in islice(generator.draw_rows(Random(5), generator.TRAIN, seen), 20)}
        for _ in range(2)
    )
    assert len(first) == len(again) == 20
    assert not first & again


def test_messages_are_one_tidy_line() -> None:
    untidy = re.compile(r"\n|  |^\W|, -|\s$|[{}]| [,.?!](?!\.)|,[,.?!]|\? ?\.|\.{4}")
    assert [row.message for row in ROWS if untidy.search(row.message)] == []


def test_the_readme_shows_real_rows_and_true_counts() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"```text\n(.+)\n(.+)\n```", readme)
    assert len(shown) >= 3
    assert set(shown) <= {(chat[1]["content"], chat[2]["content"]) for chat in CHATS}
    for name, rows in (("train", TRAIN), ("heldout", HELDOUT)):
        lengths = [len(row.message.split()) for row in rows]
        mean = sum(lengths) / len(lengths)
        assert f"| `{name}.jsonl` | {len(rows)} | {mean:.1f}, {min(lengths)} to {max(lengths)} |" in readme
    assert f"{len(newly_worded())} of the 128 held-out rows" in readme


# The answers


def test_every_answer_is_strict_json_on_one_line_with_the_keys_in_order() -> None:
    for chat in CHATS:
        answer = chat[2]["content"]
        pairs = json.loads(answer, object_pairs_hook=list)
        assert [key for key, _ in pairs] == KEYS
        assert answer == json.dumps(dict(pairs), ensure_ascii=False)


@pytest.mark.parametrize("name", FILES)
def test_values_have_their_types_and_canonical_spelling(name: str) -> None:
    for order in orders(name):
        assert order["item"] in ITEMS
        assert order["quantity"] is None or (type(order["quantity"]) is int and 1 <= order["quantity"] <= 48)
        assert order["color"] is None or order["color"] in generator.COLORS
        assert order["city"] is None or order["city"] in CITIES
        assert order["customer"] is None or re.fullmatch(r"[A-Z]\w+( [A-Z]\w+)?", order["customer"])
        assert type(order["express"]) is bool


# What the message supports


def test_spans_cover_whole_words_and_do_not_overlap() -> None:
    for row in ROWS:
        ends = sorted(row.spans.values())
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ends)), row
        for start, stop in ends:
            assert not re.match(r"\w\w", row.message[max(start - 1, 0) : start + 1] if start else ""), row
            assert not re.match(r"\w\w", row.message[stop - 1 : stop + 1]), row


def test_exactly_the_values_that_are_not_null_stand_in_the_message() -> None:
    for row in ROWS:
        for field in KEYS[:-1]:
            assert (field in row.spans) == (getattr(row.order, field) is not None), (field, row)


def test_customer_and_city_are_spelled_as_in_the_message() -> None:
    for row in ROWS:
        for field in {"customer", "city"} & row.spans.keys():
            assert surface(row, field) == getattr(row.order, field).lower()


def test_the_quantity_said_is_the_quantity_labelled() -> None:
    for row in ROWS:
        if row.order.quantity is not None:
            assert number_said(surface(row, "quantity")) == row.order.quantity, row


def test_the_quantity_stands_beside_the_item_or_its_color() -> None:
    for row in ROWS:
        if row.order.quantity is not None:
            start, stop = row.spans["quantity"]
            others = [row.spans[field] for field in ("item", "color") if field in row.spans]
            assert min(min(abs(a - stop), abs(b - start)) for a, b in others) == 1, row


def test_a_message_states_no_second_quantity() -> None:
    for row in ROWS:
        start, stop = row.spans.get("quantity", (0, 0))
        rest = OTHER_NUMBERS.sub("", (row.message[:start] + row.message[stop:]).lower())
        assert not re.search(r"\d", rest), row
        assert not {*NUMBER_WORDS, "dozen", "couple"} & set(words(rest)), row


def test_without_a_quantity_the_item_is_plural() -> None:
    for row in ROWS:
        if row.order.quantity is None:
            assert surface(row, "item").endswith("s"), row


def test_a_misspelled_item_is_still_nearest_to_the_right_item() -> None:
    for row in ROWS:
        distances = {item: item_distance(surface(row, "item"), item) for item in ITEMS}
        best = min(distances.values())
        assert [item for item, distance in distances.items() if distance == best] == [row.order.item], row
        assert best <= len(row.order.item.split()), row


def test_a_misspelled_color_is_still_nearest_to_the_right_color() -> None:
    for row in ROWS:
        if row.order.color is not None:
            said = surface(row, "color").replace("grey", "gray")
            distances = {color: edit_distance(said, color) for color in generator.COLORS}
            nearest = [color for color, d in distances.items() if d == min(distances.values())]
            assert nearest == [row.order.color] and distances[nearest[0]] <= 1, row


def test_another_color_is_named_only_to_rule_it_out() -> None:
    for row in ROWS:
        start, stop = row.spans.get("color", (0, 0))
        others = mentions(row.message[:start] + row.message[stop:], COLOR_WORDS)
        assert all(f"not {other}" in row.message.lower() for other in others), row


def test_another_item_is_named_only_as_an_earlier_purchase() -> None:
    for row in ROWS:
        start, stop = row.spans["item"]
        others = mentions(row.message[:start] + "#" + row.message[stop:], ITEMS)
        assert all(re.search(rf"last \w+ i \w+ an? {other}\b", row.message.lower()) for other in others), row


@pytest.mark.parametrize(("field", "names"), [("customer", NAMES), ("city", CITIES)])
def test_a_message_names_no_other_person_or_city(field: str, names: tuple[str, ...]) -> None:
    for row in ROWS:
        value = getattr(row.order, field) or ""
        assert mentions(row.message, names) == mentions(value, names), row


def test_express_is_true_exactly_where_the_message_asks_for_speed() -> None:
    for row in ROWS:
        said = NOT_FAST.sub("", row.message.lower())
        assert bool(FAST.search(said)) == row.order.express, row


# Held out


def test_committed_rows_are_the_rows_checked_here() -> None:
    assert messages("train") == [row.message for row in TRAIN]
    assert messages("heldout") == [row.message for row in HELDOUT]


def test_three_in_ten_heldout_rows_are_worded_as_no_train_row_is() -> None:
    new = newly_worded()
    assert 0.3 <= len(new) / len(HELDOUT) <= 0.6
    for row in new:
        if row.request in generator.REQUESTS.reserved:
            assert not any(row.request in message.lower() for message in messages("train"))


@pytest.mark.parametrize(
    ("field", "vocabulary"), [("item", "ITEMS"), ("customer", "NAMES"), ("city", "CITIES")]
)
def test_reserved_words_are_held_out(field: str, vocabulary: str) -> None:
    reserved = getattr(generator, vocabulary).reserved
    forms = reserved + tuple(generator.plural(word) for word in reserved)
    assert not any(mentions(message, forms) for message in messages("train"))
    held = [order for order in orders("heldout") if mentions(order[field] or "", reserved)]
    assert len(held) >= 12
    assert len({order[field].split()[0] for order in held}) >= 6


# Variety


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("field", ["quantity", "color", "customer", "city"])
def test_each_field_that_may_be_null_is_null_sometimes(name: str, field: str) -> None:
    values = [order[field] for order in orders(name)]
    assert 0.05 <= values.count(None) / len(values) <= 0.45


@pytest.mark.parametrize("name", FILES)
def test_express_is_balanced_and_false_is_sometimes_said(name: str) -> None:
    values = [order["express"] for order in orders(name)]
    assert 0.25 <= sum(values) / len(values) <= 0.55
    denied = sum(bool(NOT_FAST.search(message.lower())) for message in messages(name))
    assert 0.05 <= denied / len(values) <= 0.3


@pytest.mark.parametrize("name", FILES)
def test_lengths_spread_around_a_short_mean(name: str) -> None:
    lengths = sorted(len(message.split()) for message in messages(name))
    assert 4 <= lengths[0] <= 6 and 30 <= lengths[-1] <= 45
    assert 13 <= sum(lengths) / len(lengths) <= 20
    assert lengths[len(lengths) // 10] <= 9 and lengths[-len(lengths) // 10] >= 20


@pytest.mark.parametrize(("name", "least"), [("train", 5), ("heldout", 1)])
@pytest.mark.parametrize(
    "form",
    [
        r"an?|a single",
        r"\d+",
        r"\d+x|x ?\d+",
        r"\(\d+\)|\d+ pcs",
        r"[a-z]{3,}(-[a-z]+)?",
        r".*dozen",
        r"a couple of",
    ],
    ids=["article", "digits", "times", "after the item", "word", "dozen", "couple"],
)
def test_numbers_are_said_in_many_ways(name: str, least: int, form: str) -> None:
    rows = {"train": TRAIN, "heldout": HELDOUT}[name]
    said = [surface(row, "quantity") for row in rows if "quantity" in row.spans]
    assert sum(bool(re.fullmatch(form, text)) for text in said) >= least


def test_train_uses_the_whole_shared_vocabulary() -> None:
    assert {row.order.item for row in TRAIN} == set(generator.ITEMS.shared)
    assert {row.order.color for row in TRAIN} == {*generator.COLORS, None}
    assert len({row.order.customer.split()[0] for row in TRAIN if row.order.customer}) >= 60
    assert len({row.order.city for row in TRAIN}) >= 40


def test_some_words_are_misspelled_but_not_many() -> None:
    tables = [*generator.REQUESTS.shared, *generator.REQUESTS.reserved]
    tables += [phrase for phrases in generator.PHRASES.values() for phrase in phrases]
    tables += [phrase for phrases in generator.EXPRESS.values() for phrase in phrases]
    tables += [*ITEMS, *map(generator.plural, ITEMS), *COLOR_WORDS, *NUMBER_WORDS, *PHRASED_NUMBERS]
    tables += [*NAMES, *generator.LAST_NAMES, *CITIES, "some in x pcs"]
    known = {form for text in tables for word in words(text) for form in (word, word.replace("'", ""))}
    wrong = [[w for w in words(row.message) if w not in known and not re.search(r"\d|-", w)] for row in TRAIN]
    assert 0.1 <= sum(bool(found) for found in wrong) / len(TRAIN) <= 0.4
    assert max(map(len, wrong)) <= 5
    values = [
        row for row in TRAIN if surface(row, "item") not in {row.order.item, generator.plural(row.order.item)}
    ]
    assert 0.01 <= len(values) / len(TRAIN) <= 0.12


@pytest.mark.parametrize(
    ("low", "high", "has"),
    [
        (0.02, 0.12, str.isupper),
        (0.20, 0.60, str.islower),
        (0.20, 0.60, lambda text: text[0].isupper() and not text.isupper()),
        (0.05, 0.30, lambda text: re.search(r"555|#\d|\d march|last year", text.lower())),
        (0.01, 0.10, lambda text: re.search(r", not \w+\b(?<!urgent)", text.lower())),
        (0.01, 0.12, lambda text: re.search(r"\bgrey\b", text.lower())),
    ],
    ids=["capitals", "lower case", "sentence case", "distractor", "ruled-out color", "grey"],
)
def test_shares_of_case_and_special_forms(low: float, high: float, has: Any) -> None:
    share = sum(bool(has(message)) for message in messages("train")) / len(TRAIN)
    assert low <= share <= high
