"""Writes the quickstart data set: short messy customer messages and the strict JSON order each one means.

Owns the vocabulary, the wording and the seeded draw. Every message is first written with its values marked,
`{color:grey}`, so that the row knows which characters support which value; typos and letter case come after.
Uses the standard library only, and of `random.Random` only `random`, `choice` and `randrange`, so that a seed
gives the same bytes on every Python from 3.10. Refuses to guess: a message that a careful person could read
in two ways is a bug in the tables below.

    python recipes/data/orders/generate.py [--out DIR] [--seed N] [--train N] [--heldout N]
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

SEED = 20240
NUM_TRAIN = 480
NUM_HELDOUT = 128
NUM_WORDS = range(4, 46)  # accepted length of a message

SYSTEM = "Write the order as JSON with item, quantity, color, customer, city, express; null if not said."


@dataclass(frozen=True)
class Order:
    """What a message means; the order of the fields is the order of the JSON keys."""

    item: str
    quantity: int | None
    color: str | None
    customer: str | None
    city: str | None
    express: bool


@dataclass(frozen=True)
class Row:
    """A message, its meaning, and where each value stands in it: `message[slice(*spans["color"])]`."""

    message: str
    order: Order
    spans: dict[str, tuple[int, int]]
    layout: str
    request: str


class Words(NamedTuple):
    """A vocabulary: what both files may use, and what only the held-out file uses."""

    shared: tuple[str, ...]
    reserved: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """How often a file draws a value, and a wording, from the reserved half of its vocabulary."""

    reserved_values: float
    reserved_wording: float


TRAIN = Split(reserved_values=0.0, reserved_wording=0.0)
HELDOUT = Split(reserved_values=0.2, reserved_wording=0.28)


def split_list(text: str) -> tuple[str, ...]:
    """The comma-separated entries of a table."""
    return tuple(entry.strip() for entry in text.split(","))


# No item is also a color, sold in pairs or plural only; none contains another one.
ITEMS = Words(
    split_list(
        "mug, desk lamp, backpack, notebook, water bottle, umbrella, pillow, blanket, towel, candle, "
        "teapot, vase, picture frame, wall clock, alarm clock, chair, stool, bookshelf, rug, curtain, "
        "basket, bucket, lunch box, cutting board, frying pan, kettle, toaster, plate, bowl, spoon, tray, "
        "apron, scarf, belt, wallet, t-shirt, hoodie, jacket, raincoat, tent, sleeping bag, yoga mat, "
        "bike helmet, dog leash, plant pot, watering can, toothbrush, hairbrush, phone case, keyboard, "
        "mouse pad, stapler, tote bag, suitcase"
    ),
    split_list("mirror, ladder, pencil case, garden table, camera bag, tablecloth, hammer, lantern"),
)
IRREGULAR_PLURALS = {"bookshelf": "bookshelves", "scarf": "scarves"}

COLORS = split_list(
    "red, blue, green, yellow, black, white, gray, pink, purple, brown, orange, beige, turquoise, navy"
)
COLOR_SPELLINGS = {"gray": ("gray", "grey", "grey")}

# First names that are no city, color, month or everyday word.
NAMES = Words(
    split_list(
        "Priya, Tom, Anna, Ben, Olivia, Liam, Emma, Noah, Mia, Lucas, Elena, Marco, Yuki, Kenji, Mei, "
        "Ravi, Anita, Arjun, Deepa, Omar, Layla, Yusuf, Fatima, Amina, Kwame, Zainab, Chidi, Ngozi, Thabo, "
        "Nadia, Ivan, Olga, Dmitri, Katya, Piotr, Agata, Lars, Ingrid, Sven, Astrid, Björn, Mikkel, Freya, "
        "José, Camila, Diego, Lucia, Mateo, Pablo, Carmen, Rafael, Beatriz, Thiago, Chloe, Amelie, Pierre, "
        "Giulia, Francesca, Stefan, Greta, Klaus, Heidi, Tariq, Samir, Daniel, Hannah, Kevin, Laura"
    ),
    split_list("Oliver, Megan, Jessica, Susan, Simon, Julia, Maria, Anton, Karim, Nina, Hugo, Erik"),
)
# Invented, so that no full name is a known person's.
LAST_NAMES = split_list(
    "Brennick, Dunmoor, Fairwick, Ketteridge, Lorrick, Mendrano, Norrick, Okandu, Pellworth, Quillby, "
    "Ravessi, Sandreau, Tanabara, Ulvander, Vossberg, Zarnovic"
)
# Cities that are no first name (Paris, Sydney, Austin ...) and no everyday word (Nice, Bath, Cork ...).
CITIES = Words(
    split_list(
        "London, Berlin, Madrid, Lisbon, Rome, Prague, Warsaw, Budapest, Dublin, Oslo, Stockholm, "
        "Copenhagen, Amsterdam, Brussels, Zürich, Munich, Hamburg, Barcelona, Athens, Istanbul, Cairo, "
        "Nairobi, Lagos, Cape Town, Dubai, Mumbai, Delhi, Singapore, Bangkok, Hanoi, Jakarta, Seoul, "
        "Tokyo, Osaka, Shanghai, Melbourne, Toronto, Montreal, Boston, Chicago, Seattle, Miami, New York, "
        "Buenos Aires"
    ),
    split_list("Vienna, Helsinki, Vancouver, Glasgow, Manila, Ottawa, Kyoto, Leeds"),
)

UNITS = split_list(
    "zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, "
    "fifteen, sixteen, seventeen, eighteen, nineteen"
)
TENS = {20: "twenty", 30: "thirty", 40: "forty"}
SPECIAL_NUMBERS = {2: "a couple of", 6: "half a dozen", 12: "a dozen", 24: "two dozen"}
COMMON_NUMBERS = (2, 2, 2, 3, 3, 4, 4, 5, 6, 6, 7, 8, 9, 10, 12, 12, 15, 20, 24)

# A layout names the parts of a message; `|` ends a sentence. The name, the city and the deadline have parts
# beside the goods (name, to, town, rush) and parts that speak for themselves (who, sign, place, when).
LAYOUTS = Words(
    (
        "hello core to rush | chat | sign",
        "hello who | core to rush | chat",
        "hello | core to | chat | when | sign",
        "core to rush | chat | sign",
        "core | place | when | sign",
        "hello core | chat | place | when | sign",
        "hello who | place | core | when | chat",
        "hello who | chat | core to | when | chat",
        "place | core rush | who",
        "who | place | core rush",
        "when | core to | sign",
        "hello who | chat | when | core to",
        "core rush | who | place | chat",
        "hello | chat | core | when | place | sign",
        "hello who | chat | place | chat | core | when | chat",
        "goods town rush name",
        "goods name town rush",
    ),
    (
        "hello | chat | when | who | place | core",
        "when | who | core | place",
        "hello core rush | place | chat | who",
        "name town goods rush",
    ),
)
REQUESTS = Words(
    split_list(
        "can i get, could i get, can i order, can you send me, could you ship, can u send, i'd like, "
        "i'd like to order, i would like to buy, i want, i want to order, i need, need, we need, pls send, "
        "please send me, i'll take, gimme, put me down for, looking to buy, wanna order, order:"
    ),
    split_list(
        "would you mind sending, my order would be, is it possible to get, hoping to get, time to order, "
        "what i need is, kindly ship, i wish to purchase"
    ),
)
FIELD_OF_PART = {
    "to": "city",
    "place": "city",
    "town": "city",
    "who": "customer",
    "name": "customer",
    "sign": "customer",
    "rush": "express",
    "when": "express",
}
PHRASES: dict[str, tuple[str, ...]] = {
    "hello": ("hi", "hey", "hello", "hi,", "hey,", "hello,", "hi there", "good morning,", "hey there", ""),
    "to": ("to {city}", "to {city}", "delivered to {city}", "for delivery to {city}"),
    "place": (
        "i'm in {city}",
        "i live in {city}",
        "ship to {city}",
        "it goes to {city}",
        "delivery to {city} please",
        "my address is in {city}",
        "city: {city}",
    ),
    "town": ("{city}", "to {city}"),
    "who": (
        "this is {customer}",
        "{customer} here",
        "my name is {customer}",
        "i'm {customer}",
        "the name is {customer}",
    ),
    "name": ("{customer}", "name {customer}"),
    "sign": (
        "- {customer}",
        "thx, {customer}",
        "thanks, {customer}",
        "cheers, {customer}",
        "regards, {customer}",
    ),
    "sign without customer": ("thanks", "thx", "cheers", "thank you", ""),
    "chat": split_list(
        "love your shop, it's a gift, it's for the office, it's for a party, hope you are well, "
        "great store btw, found you online, let me know the total, can i pay by card, "
        "send the invoice by mail, gift wrap if possible, sorry for the typos lol, "
        "my friend told me about you, been looking for this everywhere, "
        "my neighbor showed me your page and i really like it, "
        "we just moved in and the place still looks a bit empty, "
        "i hope the box fits through our narrow door, "
        "please check that nothing is scratched before you pack it"
    ),
    "distractor": (
        "my number is 555-01{two_digits}",
        "call me on 555-01{two_digits} if needed",
        "my last order was #48{two_digits}1",
        "order #73{two_digits}6 arrived fine btw",
        "we talked on {day} march",
        "last year i bought {other_item} from you",
    ),
}
EXPRESS: dict[tuple[str, bool], tuple[str, ...]] = {
    ("rush", True): split_list("asap, by tomorrow, with express shipping, with overnight delivery"),
    ("rush", False): split_list("no rush"),
    ("when", True): split_list(
        "it's urgent, need it by tomorrow, express delivery please, overnight shipping please, "
        "i need this asap"
    ),
    ("when", False): split_list("no rush, take your time"),
}
QUESTION = re.compile(r"\b(can i|can u|can you|could i|could you|would you|is it possible)\b")


def pick(rng: Random, words: Words, reserved_share: float) -> str:
    """One entry, from the reserved half with the given probability."""
    return rng.choice(words.reserved if rng.random() < reserved_share else words.shared)


def draw_quantity(rng: Random) -> int | None:
    """1 to 48 with small and round numbers more often, or None."""
    kind = rng.random()
    if kind < 0.13:
        return None
    if kind < 0.38:
        return 1
    return rng.choice(COMMON_NUMBERS) if kind < 0.80 else rng.randrange(2, 49)


def draw_customer(rng: Random, split: Split) -> str:
    """A first name, every fifth time with a last name."""
    first = pick(rng, NAMES, split.reserved_values)
    return f"{first} {rng.choice(LAST_NAMES)}" if rng.random() < 0.2 else first


def draw_order(rng: Random, split: Split) -> Order:
    """The meaning of a row, drawn before its wording."""
    return Order(
        item=pick(rng, ITEMS, split.reserved_values),
        quantity=draw_quantity(rng),
        color=rng.choice(COLORS) if rng.random() < 0.68 else None,
        customer=draw_customer(rng, split) if rng.random() < 0.72 else None,
        city=pick(rng, CITIES, split.reserved_values) if rng.random() < 0.75 else None,
        express=rng.random() < 0.4,
    )


def mark(field: str, text: str) -> str:
    """Text that states the value of a field; `render` takes the mark out again."""
    return f"{{{field}:{text}}}"


def plural(item: str) -> str:
    """The plural of an item of the tables above."""
    if item in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[item]
    return item + ("es" if item.endswith(("s", "x", "sh", "ch")) else "s")


def article(word: str) -> str:
    """`a` or `an`, by the first letter, which decides for every word in the tables."""
    return "an" if word[0] in "aeiou" else "a"


def number_word(number: int) -> str:
    """`twenty-four` for 24; up to 49."""
    if number < len(UNITS):
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return TENS[tens * 10] + (f"-{UNITS[unit]}" if unit else "")


def quantity_before(rng: Random, number: int, next_word: str) -> str:
    """A quantity as it is said before the item."""
    if number == 1:
        return article(next_word) if rng.random() < 0.7 else rng.choice(("one", "1", "a single"))
    if number in SPECIAL_NUMBERS and rng.random() < 0.5:
        return SPECIAL_NUMBERS[number]
    return rng.choice((str(number), str(number), number_word(number), number_word(number), f"{number}x"))


def quantity_after(rng: Random, number: int) -> str:
    """A quantity as it is said after the item."""
    return (
        f"x{number}"
        if number == 1
        else rng.choice((f"x{number}", f"x {number}", f"({number})", f"{number} pcs"))
    )


def item_and_color(rng: Random, order: Order, noun: str) -> str:
    """`red mugs`, `mugs in red` or `mugs in red, not blue`, marked."""
    item = mark("item", noun)
    if order.color is None:
        return item
    color = mark("color", rng.choice(COLOR_SPELLINGS.get(order.color, (order.color,))))
    kind = rng.random()
    if kind < 0.06:
        return f"{item} in {color}, not {rng.choice([c for c in COLORS if c != order.color])},"
    if kind < 0.3:
        return f"{item} in {color}"
    return f"{color} {item}"


def goods(rng: Random, order: Order) -> str:
    """Quantity, color and item in one noun phrase, marked; without a quantity always a bare plural."""
    noun = order.item if order.quantity == 1 else plural(order.item)
    phrase = item_and_color(rng, order, noun)
    if order.quantity is None:
        return rng.choice(("", "some ", "some ")) + phrase
    if not phrase.endswith(",") and rng.random() < 0.2:
        return f"{phrase} {mark('quantity', quantity_after(rng, order.quantity))}"
    next_word = phrase[phrase.index(":") + 1 :]
    return f"{mark('quantity', quantity_before(rng, order.quantity, next_word))} {phrase}"


def distractor(rng: Random) -> str:
    """A sentence with a number, a date or an item that is no part of the order."""
    other = rng.choice(ITEMS.shared)
    return rng.choice(PHRASES["distractor"]).format(
        two_digits=rng.randrange(10, 100), day=rng.randrange(2, 29), other_item=f"{article(other)} {other}"
    )


def chat(rng: Random, order: Order) -> str:
    """Small talk, seldom a distractor, often nothing."""
    kind = rng.random()
    if kind < 0.1:
        return distractor(rng)
    return rng.choice(PHRASES["chat"]) if kind < 0.6 else ""


def deadline(rng: Random, part: str, express: bool) -> str:
    """How the message asks for speed, or, sometimes, says that there is no need; marked."""
    if not express and rng.random() < 0.75:
        return ""
    comma = ", " if part == "rush" and not express else ""
    return comma + mark("express", rng.choice(EXPRESS[part, express]))


def part_text(rng: Random, part: str, request: str, order: Order) -> str:
    """The marked text of one part of a layout; empty where the order has no such value."""
    if part in ("core", "goods"):
        return f"{request} {goods(rng, order)}".lstrip()
    if part == "chat":
        return chat(rng, order)
    field = FIELD_OF_PART.get(part)
    if field is None:
        return rng.choice(PHRASES[part])
    if field == "express":
        return deadline(rng, part, order.express)
    value = getattr(order, field)
    if value is None:
        return rng.choice(PHRASES["sign without customer"]) if part == "sign" else ""
    return rng.choice(PHRASES[part]).format(**{field: mark(field, value)})


def sentence(rng: Random, parts: str, request: str, order: Order) -> str:
    """The parts of one sentence, joined; lists of bare values take commas."""
    joiner = ", " if "goods" in parts else " "
    texts = [part_text(rng, part, request, order) for part in parts.split()]
    return re.sub(r",(\s*,)+", ",", joiner.join(filter(None, texts)).replace(" ,", ",")).strip(" ,")


def compose(rng: Random, layout: str, request: str, order: Order) -> str:
    """The whole message, marked, in lower case apart from names, with its punctuation."""
    separator = rng.choice((". ", ". ", ". ", "! ", ", ", " ... "))
    texts = [sentence(rng, parts, request, order) for parts in layout.split(" | ")]
    *first, last = filter(None, dict.fromkeys(texts))
    end = end_mark(last, rng.choice((".", "", ""))).rstrip()
    return ("".join(text + end_mark(text, separator) for text in first) + last + end).replace(", - ", " - ")


def end_mark(text: str, otherwise: str) -> str:
    """What follows a sentence: a question mark where it asks, unless the writer uses commas or nothing."""
    return "? " if otherwise.strip(" ,") and QUESTION.search(text) else otherwise


def misspell(rng: Random, word: str) -> str:
    """One slip inside a word: letters swapped, one doubled, or a vowel lost; first and last letter stay."""
    place = rng.randrange(1, len(word) - 2)
    kind = rng.random()
    if kind < 0.5:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind < 0.75 or word[place] not in "aeiou" or len(word) < 6:
        return word[: place + 1] + word[place:]
    return word[:place] + word[place + 1 :]


def add_typos(rng: Random, text: str, rate: float) -> str:
    """Text with that share of its longer words misspelled."""
    return re.sub(
        r"(?<![\w-])[a-z]{5,}(?![\w-])",
        lambda word: harmless(misspell(rng, word[0]), word[0]) if rng.random() < rate else word[0],
        text,
    )


def harmless(slip: str, word: str) -> str:
    """The slip, or the word itself where the slip would be a number: `there` gives `three`."""
    return word if slip in UNITS else slip


def render(rng: Random, marked: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """Take the marks out of a message and add its typos; also where each value then stands."""
    rate = 0.07 if rng.random() < 0.4 else 0.0
    text, spans = "", {}
    for literal, field, surface in re.findall(r"([^{]*)(?:\{(\w+):([^}]*)\})?", marked):
        text += add_typos(rng, literal, rate)
        value = add_typos(rng, surface, rate) if field in ("item", "color") else surface
        if field:
            spans[field] = (len(text), len(text) + len(value))
        text += value
    return text, spans


def recase(rng: Random, text: str) -> str:
    """The message in the letter case of its writer; the length stays."""
    kind = rng.random()
    if kind < 0.04:
        return text.upper()
    if kind < 0.4:
        return text.lower()
    if kind < 0.6:
        return text
    text = re.sub(r"\bi\b", "I", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda start: start[0].upper(), text)


def draw_row(rng: Random, split: Split) -> Row:
    """One row; its message may still be too short, too long or a repetition."""
    order = draw_order(rng, split)
    layout = pick(rng, LAYOUTS, split.reserved_wording)
    request = "" if "goods" in layout else pick(rng, REQUESTS, split.reserved_wording)
    marked = compose(rng, layout, request, order)
    if rng.random() < 0.4:
        marked = marked.replace("'", "")
    text, spans = render(rng, marked)
    return Row(recase(rng, text), order, spans, layout, request)


def normalized(message: str) -> str:
    """A message without case, punctuation and space: two messages alike in this count as the same."""
    return "".join(filter(str.isalnum, message.lower()))


def draw_rows(rng: Random, split: Split, seen: set[str]) -> Iterator[Row]:
    """Endless rows of accepted length whose messages are new; adds them to `seen`."""
    while True:
        row = draw_row(rng, split)
        key = normalized(row.message)
        if key not in seen and len(row.message.split()) in NUM_WORDS:
            seen.add(key)
            yield row


def generate(seed: int, num_train: int, num_heldout: int) -> tuple[list[Row], list[Row]]:
    """The rows of both files; no message is in both."""
    seen: set[str] = set()
    train = list(islice(draw_rows(Random(seed), TRAIN, seen), num_train))
    heldout = list(islice(draw_rows(Random(seed + 1), HELDOUT, seen), num_heldout))
    return train, heldout


def as_line(row: Row) -> str:
    """The row as the line of JSON that training reads."""
    answer = json.dumps(asdict(row.order), ensure_ascii=False)
    turns = (("system", SYSTEM), ("user", row.message), ("assistant", answer))
    return json.dumps(
        {"messages": [{"role": role, "content": text} for role, text in turns]}, ensure_ascii=False
    )


def write(path: Path, rows: list[Row]) -> None:
    """Write the rows as UTF-8 JSON lines, with the same line ends on every system."""
    path.write_bytes("".join(as_line(row) + "\n" for row in rows).encode())


def main() -> None:
    """Write `train.jsonl` and `heldout.jsonl`."""
    parser = argparse.ArgumentParser(description="Write the quickstart data set.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder (default: beside this file)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s")
    parser.add_argument(
        "--train", type=int, default=NUM_TRAIN, help="rows in train.jsonl (default: %(default)s)"
    )
    parser.add_argument(
        "--heldout", type=int, default=NUM_HELDOUT, help="rows in heldout.jsonl (default: %(default)s)"
    )
    options = parser.parse_args()
    train, heldout = generate(options.seed, options.train, options.heldout)
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "train.jsonl", train)
    write(options.out / "heldout.jsonl", heldout)


if __name__ == "__main__":
    main()
