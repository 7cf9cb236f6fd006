"""Each finding on a data set that has it and on one that nearly has it; figures and pieces by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, get_args

import numpy as np
import pytest
from conftest import PHI3_TEMPLATE, chatml_tokenizer, phi3_tokenizer

from qlora_phi3.data import Prepared, figures, parts
from qlora_phi3.data.doctor import MAX_REMEDIES, MEANINGS, examine_answers, row_signs
from qlora_phi3.data.figures import Bin, Piece, bracketed, histogram, padding_share, pieces, summarize
from qlora_phi3.data.parts import Part, Reading
from qlora_phi3.data.quirks import Quirks
from qlora_phi3.data.read import EVALUATE, MAX_PROBLEMS, TRAIN
from qlora_phi3.data.rows import Conversation, Message, Row, Text
from qlora_phi3.data.tokens import IGNORE, LossOn, Marked, TokenRow, Turns, tokenize
from qlora_phi3.errors import Problem
from qlora_phi3.findings import Finding
from qlora_phi3.recipe import Data, Evaluate

PHI3 = phi3_tokenizer()
TURNS = Turns.of(PHI3)
EOS, ASSISTANT, SYSTEM, END, USER = 256, 257, 258, 259, 260
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"

Talk = tuple[str, ...]
GOOD: Talk = ("user: hello", "assistant: good day")
"""5 + 8 characters, 2 x 2 tokens of roles and ends, eos: 18 tokens, 9 of them trained on."""


def talks(rows: Sequence[Talk], file: str = "t") -> list[Conversation]:
    """`("user: hi", "assistant: yo")` ... as the rows of a file."""
    return [
        Conversation(tuple(Message(*message.split(": ", 1)) for message in row), f"{file}:{number}")
        for number, row in enumerate(rows, start=1)
    ]


def tokenizer_with(template: str, **special: str) -> Any:
    tokenizer = phi3_tokenizer()
    tokenizer.chat_template = template
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return tokenizer


def diagnose(
    train: Sequence[Talk], held_out: Sequence[Talk] = (), tokenizer: Any = PHI3, **settings: Any
) -> list[Finding]:
    return examined(talks(train), talks(held_out, "e"), tokenizer, **settings)


def examined(
    train: Sequence[Row], held_out: Sequence[Row] = (), tokenizer: Any = PHI3, **settings: Any
) -> list[Finding]:
    batch = settings.pop("effective_batch", 1)
    found = {"train": part_of(train, tokenizer, **settings)}
    if held_out:
        found["eval"] = part_of(held_out, tokenizer, "eval", **settings)
    return Prepared(found, data_of(**settings), Turns.of(tokenizer)).findings(batch)


def data_of(**settings: Any) -> Data:
    return Data.model_validate({"train": {"path": "t.jsonl"}, "eval": {"path": "e.jsonl"}, **settings})


def part_of(rows: Sequence[Row | Problem], tokenizer: Any, name: str = "train", **settings: Any) -> Part:
    """Rows as they would come from a file."""
    data = data_of(**settings)
    reading = Reading(name, data, TRAIN, EVALUATE, tokenizer, Turns.of(tokenizer), num_kept=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reading, "stream", lambda self: ((name, row) for row in rows))
        return parts.build(reading)[name]


@dataclass(frozen=True)
class Case:
    """Rows with one finding at `places`; rows that nearly have it."""

    bad: Sequence[Talk]
    places: tuple[str, ...]
    near: Sequence[Talk]
    tokenizer: Any = PHI3
    bad_settings: dict[str, Any] = field(default_factory=dict)
    near_settings: dict[str, Any] = field(default_factory=dict)
    held_out: Sequence[Talk] = ()


def garbled(bad: str, shown: str, near: str) -> Case:
    return Case(
        [("user: hello", f"assistant: {bad}")],
        (f"t:1: messages[1]: {shown!r}",),
        [("user: hello", f"assistant: {near}")],
    )


def with_added(word: str, **settings: bool) -> Any:
    """Phi-3's `</s>` is such a token: added, not special, and it takes the blanks behind it."""
    from tokenizers import AddedToken

    tokenizer = phi3_tokenizer()
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False, **settings)])
    return tokenizer


LONG: Talk = ("user: hello!", "assistant: good day")
CASES: dict[str, Case] = {
    "special-token": Case(
        [GOOD, ("user: print <|end|>, <|end|>", "assistant: well <|user|>")],
        ("t:2: messages[0]: <|end|>", "t:2: messages[1]: <|user|>"),
        [("user: print <|end>, <end>, |end|", "assistant: well <user>")],
    ),
    "refused": Case(
        [GOOD, ("system: be good", *GOOD)],
        ("t:2: the model's chat template refuses it: no system.",),
        [("user: system", "assistant: good day")],
        tokenizer=tokenizer_with(NO_SYSTEM + PHI3_TEMPLATE),
    ),
    "double-bos": Case(
        [GOOD],
        ("t:1",),
        [],
        tokenizer=tokenizer_with("{{ bos_token * 2 }}" + PHI3_TEMPLATE, bos_token="<|system|>"),
    ),
    "double-eos": Case(
        [GOOD], ("t:1",), [], tokenizer=tokenizer_with(PHI3_TEMPLATE.replace("eos_token", "eos_token * 2"))
    ),
    "turn-order: user": Case(
        [("user: hello", "user: again", "assistant: good day")],
        ("t:1: messages[1]: user after user",),
        [("system: hello", "user: again", "assistant: good day", "user: hello", "assistant: yes")],
    ),
    "turn-order: assistant": Case(
        [("user: hello", "assistant: good", "assistant: day")],
        ("t:1: messages[2]: assistant after assistant",),
        [("user: hello", "assistant: good", "user: hello", "assistant: good")],
    ),
    "empty-question": Case(
        [
            ("user:  ", "assistant: good day"),
            ("system: ", "user: a", "assistant: good", "user: \n ", GOOD[1]),
            ("user: \u200b\ufeff\u3000", "assistant: well"),
        ],
        ("t:1: messages[0]", "t:2: messages[3]", "t:3: messages[0]"),
        [("system: ", "user: .", "assistant: good day")],
    ),
    "placeholder": Case(
        [("user: Name a colour.\n\nnan", GOOD[1]), ("user: None", GOOD[1]), ("user: b", "assistant: NaN")],
        ("t:1: messages[0]: 'nan'", "t:2: messages[0]: 'None'", "t:3: messages[1]: 'NaN'"),
        [("user: Is None a word, or nan?", "assistant: None"), ("user: nan\nnana", "assistant: nan, none")],
    ),
    "chat-markers": Case(
        [
            ("user: <|im_start|>user hi", "assistant: good [/INST] day"),
            ('user: [{"role": "user", "content": "a"}]', GOOD[1]),
            ("user: Below.\n\n### Instruction:\nAdd.\n\n### Response:", GOOD[1]),
            ("user: A chat. USER: Hi ASSISTANT:", "assistant: <｜Assistant｜>Hi"),
            ("user: A.\n\nHuman: Hi\n\nAssistant:", "assistant: <start_of_turn>model"),
        ],
        (
            "t:1: messages[0]: <|im_start|>",
            "t:1: messages[1]: [/INST]",
            """t:2: messages[0]: [{"role":""",
            "t:3: messages[0]: ### Instruction:",
            "t:4: messages[0]: ASSISTANT:",
            "t:4: messages[1]: <｜Assistant｜>",
            "t:5: messages[0]: Human:",
            "t:5: messages[1]: <start_of_turn>",
        ),
        [
            ("user: a <| b |> c, [a] and <b>", "assistant: [{1}] INST"),
            ("user: Who is my assistant: he?\n### Response times", "assistant: Human: one; Assistant: two"),
        ],
    ),
    "swallowing-token": Case(
        [("user: hello", "assistant: Close it with </s>   then")],
        ("t:1: messages[1]: </s>",),
        [("user: hello", "assistant: Close it with </b>   then")],
        tokenizer=with_added("</s>", rstrip=True),
    ),
    "added-token": Case(
        [("user: where is [SKU] 0?", "assistant: good day")],
        ("t:1: messages[0]: [SKU]",),
        [("user: where is [sku] 0?", "assistant: good day")],
        tokenizer=with_added("[SKU]"),
    ),
    "leading-blanks": Case(
        [("user: hello", "assistant:     a = 1"), ("user: \t b", GOOD[1])],
        ("t:1: messages[1]", "t:2: messages[0]"),
        [("user: a\n    b  ", "assistant: a = 1 ")],
    ),
    "garbled: letter": garbled("cafÃ©", "Ã©", "café, São, SÃO PAULO, Ã©".replace("Ã©", "crêpes")),
    "garbled: capital": garbled("FRANÃ‡AIS", "Ã‡", "FRANÇAIS"),
    "garbled: à before a space": garbled("lÃ\xa0bas", "Ã\xa0", "là\xa0bas, “AMANHÃ”, AMANHÃ\xa0"),
    "garbled: sign": garbled("Â©", "Â©", "©, Âge, Â"),
    "garbled: apostrophe": garbled("itâ€™s", "â€™", "it’s 5 â €, pâté"),
    "garbled: replacement": garbled("caf\ufffd", "\ufffd", "caf?"),
    "duplicate": Case(
        [GOOD, LONG, GOOD, GOOD],
        ("t:3 (as t:1)", "t:4 (as t:1)"),
        [GOOD, ("user: Hello", GOOD[1]), (GOOD[0], "assistant: another")],
    ),
    "overlap": Case(
        [LONG, ("user: good  DAY ", "assistant: one")],
        ("e:2 (as t:2)",),
        [LONG, ("user: good-day", "assistant: one")],
        held_out=[("user: what else", "assistant: one"), ("system: x", "user: Good day", "assistant: two")],
    ),
    "short-answer": Case(
        [("user: hello", "assistant: ok", "user: hello", "assistant: 1")],
        ("t:1: messages[3]",),
        [("user: h", "assistant: ok")],
    ),
    "overlong": Case(
        [GOOD, LONG],
        ("t:2",),
        [GOOD, LONG],
        bad_settings={"max_length": 18},
        near_settings={"max_length": 19},
    ),
    "overlong: all": Case(
        [GOOD, LONG],
        ("data.train",),
        [GOOD],
        bad_settings={"max_length": 17},
        near_settings={"max_length": 18},
    ),
    "large-batch": Case(
        [GOOD, LONG],
        ("data.train",),
        [GOOD, LONG],
        bad_settings={"effective_batch": 3},
        near_settings={"effective_batch": 2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_finding_and_nothing_else(name: str) -> None:
    case = CASES[name]
    (found,) = diagnose(case.bad, case.held_out, case.tokenizer, **case.bad_settings)
    assert (found.code, found.places) == (name.split(":")[0], case.places)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.near])
def test_what_nearly_is_one(name: str) -> None:
    case = CASES[name]
    assert diagnose(case.near, case.held_out, case.tokenizer, **case.near_settings) == []


def test_blanks_in_front_are_kept_by_a_template_that_keeps_them() -> None:
    talk = ("system: b", "user: hello", "assistant:     a = 1")
    assert diagnose([talk], tokenizer=chatml_tokenizer()) == []


def test_held_out_rows_that_are_the_training_rows_are_an_error() -> None:
    """The same question with another answer is a warning, and so is a training file with a limit."""
    other = (GOOD[0], "assistant: another day")
    rows = [GOOD, LONG, ("user: x", "assistant: good")]
    for held_out, grade in (([*rows], "error"), ([rows[0], other], "warning"), ([other], "warning")):
        (found,) = [one for one in diagnose(rows, held_out) if one.code == "overlap"]
        assert (found.grade, found.places == ("data.eval",)) == (grade, grade == "error")
    assert "2 of 3 held-out" in next(
        o.what for o in diagnose(rows, [*rows[:2], other]) if o.code == "overlap"
    )
    (found,) = diagnose(rows, rows, eval={"path": "e.jsonl", "limit": 3})
    assert found.grade == "warning"


def test_what_the_template_says_by_itself() -> None:
    (found,) = diagnose([GOOD, ("system: Be.", *LONG)], tokenizer=chatml_tokenizer())
    assert (found.grade, found.code) == ("note", "default-system")
    assert "1 of 2 rows have no system message" in found.what and "'You help.'" in found.what
    assert Quirks.of(PHI3, TURNS.special).default_system == ""


def test_keys_that_are_not_used_are_named_once() -> None:
    rows = [
        replace(row, unused=(("title", f"Act {i}"), ("id", i)) if i else (("id", 0),))
        for i, row in enumerate(talks([GOOD, LONG, ("user: x", "assistant: good")]))
    ]
    (found,) = examined(rows)
    assert (found.grade, found.code) == ("warning", "unused-columns")
    assert "`title`, `id`" in found.what
    assert found.places == ("t:2: `title`: 'Act 1', in 2 rows", "t:1: `id`: 0, in 3 rows")
    (note,) = examined(rows[:1])
    assert note.grade == "note"


@pytest.mark.parametrize(
    ("limit", "metrics", "num"), [(8, "exact_match", 0), (7, "exact_match", 1), (1, "loss", 0)]
)
def test_answers_that_are_longer_than_what_is_generated(limit: int, metrics: str, num: int) -> None:
    evaluate = Evaluate.model_validate({"metrics": [metrics], "max_new_tokens": limit, "samples": 2})
    found = examine_answers(talks([GOOD, ("user: a", "assistant: b"), GOOD]), evaluate, PHI3, "data.eval")
    assert [(one.grade, one.code, one.places, one.fix) for one in found] == [
        ("warning", "answers-cut", ("t:1: 8 tokens",), "Set evaluate.max_new_tokens=9.")
    ][:num]


@pytest.mark.parametrize(
    ("systems", "shared"),
    [(("Be.", "Be."), "Be."), (("Be.", "Be!"), None), (("Be.", None), None), ((None, None), None)],
)
def test_the_system_message_that_all_rows_share(systems: tuple[str | None, ...], shared: str | None) -> None:
    rows = [(*([f"system: {system}"] if system else []), *LONG) for system in systems]
    assert part_of(talks(rows), PHI3).system_prompt == shared
    assert part_of([*talks(rows), Text("a", "t:9")], PHI3).system_prompt is None


@pytest.mark.parametrize("template", [PHI3_TEMPLATE, "{{ bos_token }}" + PHI3_TEMPLATE])
def test_one_bos_and_one_eos_are_right(template: str) -> None:
    assert diagnose([GOOD], tokenizer=tokenizer_with(template, bos_token="<|system|>")) == []


@pytest.mark.parametrize(
    ("trained", "codes"),
    [
        ([0, 1, 1, 0], []),
        ([0, 0, 0, 0], ["all-masked"]),
        ([0, 1, 0, 0], ["no-stop"]),
        ([0, 1, 1, 1], ["no-stop"]),
        ([1, 1, 0, 1], ["no-stop"]),
        ([0, 0, 1, 0], []),
    ],
)
def test_rows_that_teach_nothing_or_not_to_stop(trained: list[int], codes: list[str]) -> None:
    runs = [list(run) for one, run in groupby(range(4), key=lambda i: trained[i]) if one]
    row = Marked([USER, 5, END, EOS], [(run[0], run[-1] + 1) for run in runs], "t:1")
    (one,) = talks([("user: a", *["assistant: b"] * len(runs))])
    signs = list(row_signs(one, row, PHI3, TURNS, "assistant"))
    assert [code for code, _ in signs if code != "short-answer"] == codes


@pytest.mark.parametrize("loss_on", get_args(LossOn))
def test_every_loss_teaches_to_stop(loss_on: LossOn) -> None:
    """`all` trains on the end of text behind the last turn too, which is no mistake."""
    assert diagnose([GOOD, (*LONG, *GOOD)], loss_on=loss_on) == []


def test_the_last_answer_is_the_short_one() -> None:
    row = ("user: hello", "assistant: well", "user: hello", "assistant: 1")
    (found,) = diagnose([row], loss_on="last")
    assert (found.code, found.places) == ("short-answer", ("t:1: messages[3]",))
    assert diagnose([(row[0], row[3], row[2], row[1])], loss_on="last") == []


def test_rows_that_cannot_be_read_are_told_by_what_mends_them() -> None:
    problems = [Problem("t:1", "not UTF-8 text.", "Convert."), Problem("t:2", "not JSON.", "Mend.")]
    part = part_of([*problems, *talks([GOOD]), Problem("t:4", "a NUL byte.", "Convert.")], PHI3)
    assert [(one.grade, one.code, one.places, one.fix) for one in part.findings] == [
        ("error", "unreadable", ("t:1: not UTF-8 text.", "t:4: a NUL byte."), "Convert."),
        ("error", "unreadable", ("t:2: not JSON.",), "Mend."),
    ]


def test_a_file_that_is_wrong_in_a_thousand_ways_fills_no_screen() -> None:
    wrong = [Problem(f"t:{i}", "is wrong.", f"Remove `answer_{i}`.") for i in range(1000)]
    found = [one for one in part_of(wrong, PHI3).findings if one.code == "unreadable"]
    assert len(found) == MAX_REMEDIES + 1
    assert sum(one.num_places for one in found) == 1000
    assert "mend the rows above first" in found[-1].fix


def test_a_key_and_a_value_of_a_megabyte_are_told_short() -> None:
    rows = [replace(row, unused=(("\ud83d\x1b" + "k" * 10**6, "v" * 10**6),)) for row in talks([GOOD, LONG])]
    (finding,) = examined(rows)
    assert len(str(finding)) < 500 and finding.places[0].endswith(", in 2 rows")
    assert str(finding).isprintable()


def test_a_finding_lists_the_first_places_and_counts_the_others() -> None:
    (found,) = diagnose([("user: hello", "assistant: 1"), *[LONG] * (MAX_PROBLEMS + 3)][1:])
    assert (len(found.places), found.more, found.num_places) == (MAX_PROBLEMS, 2, MAX_PROBLEMS + 2)
    assert str(found).startswith("warning: The row repeats") and "(t:2 (as t:1) and 21 more)" in str(found)


@pytest.mark.parametrize(("overlong", "grade"), [("drop", "note"), ("error", "error")])
def test_long_rows_are_as_grave_as_the_recipe_says(overlong: str, grade: str) -> None:
    (found,) = diagnose([GOOD, LONG], max_length=18, overlong=overlong)
    assert found.grade == grade
    assert "data.max_length 18" in found.what and f"is {overlong}" in found.what


def test_rows_that_are_dropped_fill_no_batch() -> None:
    found = diagnose([GOOD, LONG], max_length=18, effective_batch=2)
    assert [one.code for one in found] == ["overlong", "large-batch"]
    assert "more than all rows (1)" in found[1].what and "to 1 or less" in found[1].fix


def test_errors_are_what_a_run_refuses_or_trains_wrong() -> None:
    errors = {code for code, (grade, _, _) in MEANINGS.items() if grade == "error"}
    assert errors == {"unreadable", "special-token", "refused", "all-masked", "no-stop"}


def test_a_program_reads_the_first_places_and_their_number() -> None:
    (found,) = diagnose([GOOD] * 8)
    content = found.to_json()
    assert content["places"] == [f"t:{i} (as t:1)" for i in range(2, 7)]
    assert (content["num_places"], content["grade"], content["code"]) == (7, "warning", "duplicate")


# Figures


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([], []),
        ([7], [Bin(7, 7, 1)]),
        ([3, 5, 5], [Bin(3, 3, 1), Bin(4, 4, 0), Bin(5, 5, 2)]),
        ([10, 19], [Bin(i, i, int(i in (10, 19))) for i in range(10, 20)]),
        ([9, 19], [Bin(8, 9, 1), *(Bin(i, i + 1, 0) for i in (10, 12, 14, 16)), Bin(18, 19, 1)]),
        (
            [130, 2048],
            [Bin(0, 499, 1), Bin(500, 999, 0), Bin(1000, 1499, 0), Bin(1500, 1999, 0), Bin(2000, 2499, 1)],
        ),
    ],
)
def test_the_histogram_by_hand(lengths: list[int], bins: list[Bin]) -> None:
    assert histogram(np.array(lengths, np.int32)) == tuple(bins)
    assert len(bins) <= figures.MAX_BINS


@pytest.mark.parametrize(
    ("lengths", "micro_batch", "share"),
    [([], 2, 0.0), ([4, 4], 2, 0.0), ([3, 5, 2], 1, 0.0), ([3, 5, 2], 2, 2 / 12), ([3, 5, 2], 8, 5 / 15)],
)
def test_the_padding_by_hand(lengths: list[int], micro_batch: int, share: float) -> None:
    assert padding_share(np.array(lengths), micro_batch) == pytest.approx(share)


def sized(*lengths: int) -> list[Conversation]:
    """Rows of as many tokens, 5 of them the template's and 3 supervised."""
    return talks([("user: " + "q" * (length - 7), "assistant: aa") for length in lengths])


def test_the_summary_by_hand() -> None:
    part = part_of(sized(8, 12, 20), PHI3, max_length=12)
    found = summarize(part, max_length=12, micro_batch=2, seed=0)
    assert (found.rows, found.tokens, found.supervised_tokens, found.longest_row_tokens) == (3, 40, 9, 20)
    assert found.supervised_share == pytest.approx(9 / 40)
    assert found.over_max_length_share == pytest.approx(1 / 3)
    assert (found.dropped_share, found.truncated_share) == (pytest.approx(1 / 3), 0)
    assert found.padding_share == pytest.approx(4 / 24)  # the row of 20 is not trained on
    assert (found.packed_rows, found.packed_padding_share) == (2, pytest.approx(4 / 24))
    assert sum(one.rows for one in found.histogram) == 3


def test_the_padding_that_packing_saves() -> None:
    """13 and 12 with 7 and 8 fill two rows of 20; alone, batches of two would be as wide as the longer."""
    found = summarize(part_of(sized(13, 8, 12, 7), PHI3), max_length=20, micro_batch=4, seed=0)
    assert (found.packed_rows, found.packed_padding_share) == (2, 0)
    assert found.padding_share == pytest.approx(1 - 40 / 52)


def test_the_share_that_is_cut() -> None:
    part = part_of(sized(10, 10, 10, 14, 30), PHI3, max_length=13, overlong="truncate")
    found = summarize(part, max_length=13, micro_batch=2, seed=0)
    assert (found.dropped_share, found.truncated_share) == (pytest.approx(1 / 5), pytest.approx(1 / 5))


def test_the_summary_of_nothing() -> None:
    found = summarize(part_of([], PHI3), max_length=6, micro_batch=2, seed=0)
    assert (found.rows, found.supervised_share, found.over_max_length_share, found.histogram) == (0, 0, 0, ())
    assert (found.packed_rows, found.packed_padding_share, found.dropped_share) == (0, 0, 0)


# Token by token


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            ("user: say é", "assistant: é!"),
            "<|user|>say é<|end|><|assistant|>[é!<|end|>]<|endoftext|>",
        ),
        (
            ("system: s", "user: a\nb", "assistant: 🙂", "user: c", "assistant: d . e"),
            "<|system|>s<|end|><|user|>a\nb<|end|><|assistant|>[🙂<|end|>]"
            "<|user|>c<|end|><|assistant|>[d . e<|end|>]<|endoftext|>",
        ),
    ],
)
def test_brackets_stand_around_what_is_trained_on(row: Talk, text: str) -> None:
    (talk,) = talks([row])
    tokens = tokenize(talk, PHI3, TURNS, "assistant")
    found = pieces(tokens, PHI3)
    assert bracketed(found) == text
    assert [piece.token for piece in found] == tokens.input_ids
    assert [piece.trained for piece in found] == [label != IGNORE for label in tokens.labels]


def test_half_a_character_is_shown_with_its_last_byte() -> None:
    (talk,) = talks([("user: é", "assistant: ok")])
    found = pieces(tokenize(talk, PHI3, TURNS, "assistant"), PHI3)
    assert [piece.text for piece in found[:4]] == ["<|user|>", "", "é", "<|end|>"]


@pytest.mark.parametrize(
    ("labels", "text"), [([1, 1], "[ab]"), ([1, 0], "[a]b"), ([0, 1], "a[b]"), ([0, 0], "ab")]
)
def test_brackets_at_the_edges(labels: list[int], text: str) -> None:
    found = [Piece(i, "ab"[i], bool(label)) for i, label in enumerate(labels)]
    assert bracketed(found) == text


def test_a_leading_space_is_kept() -> None:
    """As in Phi-3's own tokenizer, whose decoder strips the first space of what it is given."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁hi": 0, "▁yo": 1, "<unk>": 2}, unk_token="<unk>"))
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert tokenizer.decode([1]) == "yo"
    found = pieces(TokenRow([0, 1, 1], [IGNORE, 1, 1], "t:1"), tokenizer)
    assert [piece.text for piece in found] == ["hi", " yo", " yo"]


# --- rows that are no conversations, and rows that are taken more than once


def codes(
    train: Sequence[Conversation | Text], held_out: Sequence[Text] = ()
) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.code, one.places) for one in examined(train, held_out)]


def test_plain_text_has_no_turns_to_find_fault_with() -> None:
    assert codes([Text("a", "t:1"), Text("b", "t:2")], [Text("c", "e:1")]) == []


def test_findings_on_plain_text() -> None:
    assert codes([Text("NaN", "t:1"), Text("an nan", "t:2")]) == [("placeholder", ("t:1: 'NaN'",))]
    assert codes([Text("<s>[INST] a", "t:1")]) == [("chat-markers", ("t:1: [INST]",))]
    rows = [
        Text("cafÃ©", "t:1"),
        Text("b <|end|>", "t:2"),
        Text("Same  text", "t:3"),
        Text("Same  text", "t:4"),
    ]
    assert codes(rows, [Text("same text", "e:1")]) == [
        ("special-token", ("t:2: <|end|>",)),
        ("garbled", ("t:1: 'Ã©'",)),
        ("duplicate", ("t:4 (as t:3)",)),
        ("overlap", ("e:1 (as t:3)",)),
    ]


def test_a_row_that_its_weight_repeats_is_no_duplicate() -> None:
    row, other = talks([("user: hello", "assistant: cafÃ©"), GOOD])
    assert codes([row, row, row, other]) == [("garbled", ("t:1: messages[1]: 'Ã©'",))]


def test_a_source_that_is_named_twice_has_each_place_once() -> None:
    row, other = talks([("user: hello", "assistant: cafÃ©"), GOOD])
    assert codes([row, other, row, other]) == [("garbled", ("t:1: messages[1]: 'Ã©'",))]


def test_copies_count_as_rows_and_are_told_once() -> None:
    long, row = talks([LONG, GOOD])
    part = part_of([long, long, row, row, row], PHI3, max_length=18)
    assert (part.num_read, len(part.lengths), len(part.rows), part.fitted.num_dropped) == (5, 5, 3, 2)
    assert [(one.code, one.places, one.more) for one in part.findings] == [("overlong", ("t:1",), 0)]


def test_copies_of_a_row_that_is_too_long_are_one_problem() -> None:
    (row,) = talks([LONG])
    problems = part_of([row, row], PHI3, max_length=18, overlong="error").problems
    assert ([one.place for one in problems.first], problems.more) == (["t:1"], 0)


@pytest.mark.parametrize(
    ("overlong", "grade"), [("drop", "error"), ("error", "error"), ("truncate", "note"), ("split", "note")]
)
def test_that_all_rows_are_too_long_is_no_error_where_they_are_cut(overlong: str, grade: str) -> None:
    """Books are, and `split` is there for them."""
    book = Text("a long story " * 9, "t:1")
    (found,) = [one for one in examined([book], max_length=18, overlong=overlong) if one.code == "overlong"]
    assert found.grade == grade


def test_what_tools_say_is_examined_too() -> None:
    row = Conversation(talks([GOOD])[0].messages, "t:1", '[{"name": "cafÃ©"}]')
    assert ("garbled", ("t:1: tools: 'Ã©'",)) in codes([row])
