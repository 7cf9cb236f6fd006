"""Rows as public data sets and programs write them: each is read as it is meant, or refused with a way on.

The rows are made up; their keys are those of what they are named after. What is read is checked down to the
text that is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt
from conftest import phi3_tokenizer

from qlora_phi3.data.formats import detect
from qlora_phi3.data.parts import Part
from qlora_phi3.data.sources import rows_of
from qlora_phi3.data.splits import prepare
from qlora_phi3.data.tokens import IGNORE
from qlora_phi3.recipe import Data, Source

TEMPLATE = (
    "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + ('user' if message.role == 'tool' else message.role) + '|>' }}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
"""One that shows tools, calls and results, so that no shape is refused for its base."""
TOKENIZER = phi3_tokenizer()
TOKENIZER.chat_template = TEMPLATE


@dataclass(frozen=True)
class Read:
    """A shape that is read: its format, what is said, `*` where it is trained on, and codes of findings.

    A `suffix` other than jsonl: `rows` is the file's text.
    """

    rows: Any
    format: str
    said: tuple[str, ...]
    found: tuple[str, ...] = ()
    suffix: str = "jsonl"
    named: str = "auto"


@dataclass(frozen=True)
class Refused:
    """A shape that is refused, with words of the reason and the way on."""

    rows: Any
    words: tuple[str, ...]
    suffix: str = "jsonl"


def chat(*said: str, keys: tuple[str, str] = ("role", "content"), **more: Any) -> list[dict[str, Any]]:
    """`user: hi` ... as messages."""
    return [dict(zip(keys, one.split(": ", 1), strict=True)) | more for one in said]


def shares(*said: str, **more: Any) -> list[dict[str, Any]]:
    return chat(*said, keys=("from", "value"), **more)


QA = ("user: Where?", "*assistant: In Bern.")
SQA = ("system: Be brief.", *QA)
TWICE = (*QA, "user: Sure?", "*assistant: Yes, sure.")
HG = ("human: Where?", "gpt: In Bern.")
UA = ("user: Where?", "assistant: In Bern.")
LONG = "The council of the town meets on the first Monday of every month, in the hall."
SUM = ("user: " + LONG, "*assistant: It meets monthly.")
WEATHER = {"name": "weather", "description": "Of a city", "parameters": {"type": "object", "properties": {}}}
CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'
CALLING = (
    "user: Rain?",
    '*assistant: weather{"city": "Bern"}',
    "tool: no",
    "*assistant: It is dry.",
)

SHAPES: dict[str, Read | Refused] = {
    # --- instructions
    "alpaca": Read(
        {
            "instruction": "Where?",
            "input": "",
            "output": "In Bern.",
            "text": "Below is a task.\n\n### Instruction:\nWhere?\n\n### Response:\nIn Bern.",
        },
        "alpaca",
        QA,
        ("unused-columns",),
    ),
    "alpaca with input": Read(
        {"instruction": "Shorten.", "input": "A b c.", "output": "A."},
        "alpaca",
        ("user: Shorten.\n\nA b c.", "*assistant: A."),
    ),
    "alpaca with its marker for no input": Read(
        {"instruction": "Where?", "input": "<noinput>", "output": "In Bern."},
        "alpaca",
        ("user: Where?\n\n<noinput>", "*assistant: In Bern."),
        ("placeholder",),
    ),
    "alpaca of pandas": Read(
        "instruction,input,output\nWhere?,nan,In Bern.\n",
        "alpaca",
        ("user: Where?\n\nnan", "*assistant: In Bern."),
        ("placeholder",),
        suffix="csv",
    ),
    "alpaca with NaN": Read(
        '{"instruction": "Where?", "input": NaN, "output": "In Bern."}', "alpaca", QA, suffix="jsonl"
    ),
    "alpaca without an answer": Refused(
        {"instruction": "Where?", "input": "", "output": ""}, ("output: the assistant says nothing.",)
    ),
    "dolly": Read(
        {"instruction": "Where?", "context": "", "response": "In Bern.", "category": "open_qa"},
        "alpaca",
        QA,
        ("unused-columns",),
    ),
    "dolly with context": Read(
        {
            "instruction": "Where?",
            "context": "It is in Bern.",
            "response": "In Bern.",
            "category": "closed_qa",
        },
        "alpaca",
        ("user: Where?\n\nIt is in Bern.", "*assistant: In Bern."),
        ("unused-columns",),
    ),
    "python codes": Read(
        {
            "instruction": "Where?",
            "input": "",
            "output": "In Bern.",
            "prompt": "Below is an instruction.\n### Instruction:\nWhere?\n### Output:\nIn Bern.",
        },
        "alpaca",
        QA,
        ("unused-columns",),
    ),
    "self-instruct seeds": Refused(
        {"id": "t", "instruction": "Where?", "instances": [{"input": "", "output": "In Bern."}]},
        ("has no format that is known", "Write each of `instances` as a row of its own"),
    ),
    "wizardlm": Read({"instruction": "Where?", "output": "In Bern."}, "alpaca", QA),
    "evol code": Read({"instruction": "Where?", "response": "In Bern."}, "alpaca", QA),
    "llama-factory alpaca": Read(
        {
            "instruction": "Sure?",
            "input": "",
            "output": "Yes, sure.",
            "system": "Be brief.",
            "history": [["Where?", "In Bern."]],
        },
        "alpaca",
        ("system: Be brief.", *TWICE),
    ),
    "llama-factory's empty history": Read(
        {"instruction": "Where?", "input": "", "output": "In Bern.", "system": "", "history": []},
        "alpaca",
        QA,
    ),
    "a history of texts": Refused(
        {"instruction": "Sure?", "output": "Yes.", "history": ["Where?", "In Bern."]},
        ("history is not a list of questions with their answers", '[["question", "answer"], ...]'),
    ),
    "chatglm": Read(
        {"prompt": "Sure?", "response": "Yes, sure.", "history": [["Where?", "In Bern."]]},
        "prompt-completion",
        TWICE,
    ),
    "natural instructions": Read(
        {"definition": "Say where.", "inputs": "Where?", "targets": "In Bern.", "id": "task1"},
        "prompt-completion",
        QA,
        ("unused-columns",),
    ),
    "flan": Read(
        {"inputs": "Where?", "targets": "In Bern.", "task": "qa"},
        "prompt-completion",
        QA,
        ("unused-columns",),
    ),
    "metamath": Read(
        {"query": "Where?", "response": "In Bern.", "type": "GSM", "original_question": "Where is it?"},
        "prompt-completion",
        QA,
        ("unused-columns",),
    ),
    "orca": Read(
        {"id": "flan.1", "system_prompt": "Be brief.", "question": "Where?", "response": "In Bern."},
        "prompt-completion",
        SQA,
        ("unused-columns",),
    ),
    "orca math": Read({"question": "Where?", "answer": "In Bern."}, "prompt-completion", QA),
    "gsm8k": Read(
        {"question": "3 + 4?", "answer": "It is <<3+4=7>>7.\n#### 7"},
        "prompt-completion",
        ("user: 3 + 4?", "*assistant: It is <<3+4=7>>7.\n#### 7"),
    ),
    "numina": Read(
        {
            "source": "amc",
            "problem": "Where?",
            "solution": "In Bern.",
            "messages": chat(*UA),
        },
        "messages",
        QA,
        ("unused-columns",),
    ),
    "competition math": Refused(
        {"problem": "3 + 4?", "solution": "It is 7.", "answer": "7", "level": "1"},
        ("has no format that is known", "the answer to train on (of `solution`, `answer`)"),
    ),
    "openthoughts": Read(
        {"system": "Think.", "conversations": shares("user: 3 + 4?", "assistant: <think>7</think> 7")},
        "sharegpt",
        ("system: Think.", "user: 3 + 4?", "*assistant: <think>7</think> 7"),
    ),
    "r1 distilled": Refused(
        {"question": "3 + 4?", "reasoning": "Three and four.", "answer": "7"},
        ("`reasoning` would be left out", "put it into `answer`, in front"),
    ),
    "a line of thought in a message": Refused(
        {
            "messages": [
                *chat("user: 3 + 4?"),
                {"role": "assistant", "content": "7", "reasoning_content": "Sum."},
            ]
        },
        ("messages[1]: 'reasoning_content' is not available", "Put what it says into content"),
    ),
    "magpie": Read(
        {
            "uuid": "u",
            "model": "llama",
            "instruction": "Where?",
            "response": "In Bern.",
            "conversations": shares(*HG),
            "task_category": "Facts",
            "llama_guard_2": "safe",
            "min_neighbor_distance": 0.4,
        },
        "sharegpt",
        QA,
        ("unused-columns",),
    ),
    # --- conversations
    "oasst tree": Refused(
        {"message_id": "a", "parent_id": None, "text": "Where?", "role": "prompter", "lang": "en"},
        ("`message_id` and `role` would be left out", "Write a conversation as one row"),
    ),
    "guanaco": Read(
        {"text": "### Human: Where?### Assistant: In Bern."},
        "text",
        ("*text: ### Human: Where?### Assistant: In Bern.",),
        ("chat-markers",),
    ),
    "ultrachat 200k": Read(
        {"prompt": "Where?", "prompt_id": "p", "messages": chat(*UA)}, "messages", QA, ("unused-columns",)
    ),
    "ultrachat": Refused({"id": "0", "data": ["Where?", "In Bern."]}, ("has no format that is known",)),
    "no robots": Read(
        {"prompt": "Where?", "prompt_id": "p", "messages": chat(*UA), "category": "Open QA"},
        "messages",
        QA,
        ("unused-columns",),
    ),
    "tulu": Read(
        {"id": "t", "messages": chat(*UA), "dataset": "flan", "source": "x"},
        "messages",
        QA,
        ("unused-columns",),
    ),
    "smoltalk": Read(
        {"messages": chat("system: Be brief.", *UA), "source": "x"}, "messages", SQA, ("unused-columns",)
    ),
    "sharegpt": Read({"id": "s", "conversations": shares(*HG)}, "sharegpt", QA, ("unused-columns",)),
    "sharegpt with roles": Read({"conversations": chat(*UA)}, "sharegpt", QA),
    "messages with from": Read({"messages": shares(*HG)}, "messages", QA),
    "sharegpt of vicuna": Read(
        {"conversations": [*shares(*HG), {"from": "human", "value": "Bye.", "markdown": None}]},
        "sharegpt",
        (*QA, "user: Bye."),
    ),
    "sharegpt that begins with gpt": Refused(
        {"conversations": shares("gpt: Hello.", *HG)},
        ("begins with the assistant", "Are user and assistant swapped"),
    ),
    "openhermes": Read(
        {
            "conversations": shares(*HG),
            "system_prompt": None,
            "source": "airoboros",
            "category": None,
            "skip_prompt_formatting": False,
        },
        "sharegpt",
        QA,
        ("unused-columns",),
    ),
    "slimorca": Read(
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "Where?", "weight": 0.0},
                {"from": "gpt", "value": "In Bern.", "weight": 1.0},
            ]
        },
        "sharegpt",
        SQA,
    ),
    "weight 0": Read(
        {
            "messages": [
                *chat("user: Where?"),
                {"role": "assistant", "content": "In Rome.", "weight": 0},
                *chat("user: No.", "assistant: In Bern."),
            ]
        },
        "messages",
        ("user: Where?", "assistant: In Rome.", "user: No.", "*assistant: In Bern."),
    ),
    "every weight 0": Refused({"messages": chat(*UA, weight=0)}, ("every answer has the weight 0",)),
    "half a weight": Refused(
        {"messages": chat(*UA, weight=0.5)}, ("messages[0]: weight is 0.5", "Write 1 or 0")
    ),
    "lima": Refused({"conversations": ["Where?", "In Bern."], "source": "wiki"}, ("is text, not an object",)),
    "capybara": Read(
        {
            "source": "x",
            "conversation": [
                {"input": "Where?", "output": "In Bern."},
                {"input": "Sure?", "output": "Yes, sure."},
            ],
        },
        "sharegpt",
        TWICE,
        ("unused-columns",),
    ),
    "lmsys chats": Read(
        {
            "conversation_id": "c",
            "model": "m",
            "conversation": chat(*UA),
            "turn": 1,
            "language": "en",
            "redacted": False,
        },
        "sharegpt",
        QA,
        ("unused-columns",),
    ),
    "wildchat": Read(
        {
            "conversation_hash": "c",
            "conversation": chat(
                *UA, language="en", toxic=False, redacted=False, country="CH", turn_identifier=7
            ),
        },
        "sharegpt",
        QA,
        ("unused-columns",),
    ),
    "airoboros": Read(
        {"id": "a", "system": "Be brief.", "category": "qa", "conversations": shares(*HG)},
        "sharegpt",
        SQA,
        ("unused-columns",),
    ),
    "llama-factory sharegpt": Read(
        {"conversations": shares(*HG), "system": "Be brief.", "tools": "[]"}, "sharegpt", SQA
    ),
    "two system messages": Refused(
        {"system": "Be long.", "messages": chat("system: Be brief.", *UA)},
        ("and another one beside it", "Keep one"),
    ),
    "names of speakers": Refused(
        {"messages": [{"role": "user", "name": "Ada", "content": "Where?"}, *chat("assistant: In Bern.")]},
        ("messages[0]: 'name' is not available", 'Write who speaks into content ("Ada: ...")'),
    ),
    "messages as JSON text": Read({"messages": json.dumps(chat(*UA))}, "messages", QA),
    "messages as pandas writes them": Read(
        'messages\n"' + str(chat(*UA)) + '"\n', "messages", QA, suffix="csv"
    ),
    "messages as numpy prints them": Refused(
        "messages\n\"[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]\"\n",
        ("messages is not valid JSON", "write it with json.dumps"),
        suffix="csv",
    ),
    "an object of lists": Read(
        {"messages": {"role": ["user", "assistant"], "content": ["Where?", "In Bern."]}}, "messages", QA
    ),
    "an object of uneven lists": Refused(
        {"messages": {"role": ["user"], "content": ["Where?", "In Bern."]}},
        ("lists that are not equally long",),
    ),
    "a bare list of messages": Read(chat(*UA), "messages", QA),
    "a message a line": Refused(
        {"role": "user", "content": "Where?"}, ("has no format that is known", "A message is no row")
    ),
    # --- APIs
    "openai fine-tuning": Read(
        {"messages": chat("system: Be brief.", *UA), "tools": [], "parallel_tool_calls": False},
        "messages",
        SQA,
        ("unused-columns",),
    ),
    "openai calls": Read(
        {
            "messages": [
                {"role": "user", "content": "Rain?"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "no"},
                {"role": "assistant", "content": "It is dry."},
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
        "messages",
        CALLING,
    ),
    "openai's first functions": Read(
        {
            "messages": [
                {"role": "user", "content": "Rain?"},
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "weather", "arguments": '{"city": "Bern"}'},
                },
                {"role": "function", "name": "weather", "content": "no"},
                {"role": "assistant", "content": "It is dry."},
            ],
            "functions": [WEATHER],
        },
        "messages",
        CALLING,
    ),
    "openai developer": Read({"messages": chat("developer: Be brief.", *UA)}, "messages", SQA),
    "openai preferences": Refused(
        {
            "input": {"messages": chat("user: Where?")},
            "preferred_output": chat("assistant: In Bern."),
            "non_preferred_output": chat("assistant: No."),
        },
        ("has no format that is known",),
    ),
    "openai's oldest": Read(
        {"prompt": "Where?", "completion": " In Bern."},
        "prompt-completion",
        ("user: Where?", "*assistant:  In Bern."),
        ("leading-blanks",),
    ),
    "anthropic": Read({"system": "Be brief.", "messages": chat(*UA)}, "messages", SQA),
    "anthropic parts": Read(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Bern"}}
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "no"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "It is dry."}]},
            ]
        },
        "messages",
        CALLING,
    ),
    "bedrock": Read(
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "Be brief."}],
            "messages": [
                {"role": "user", "content": [{"text": "Where?"}]},
                {"role": "assistant", "content": [{"text": "In Bern."}]},
            ],
        },
        "messages",
        SQA,
        ("unused-columns",),
    ),
    "gemini": Read(
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Where?"}]},
                {"role": "model", "parts": [{"text": "In Bern."}]},
            ],
        },
        "messages",
        SQA,
    ),
    "cohere": Read(
        {"messages": chat("System: Be brief.", "User: Where?", "Chatbot: In Bern.")}, "messages", SQA
    ),
    "parts that run together": Refused(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                *chat("assistant: c"),
            ]
        },
        ("several parts of text without a blank", "Join them"),
    ),
    "pictures in parts": Refused(
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                *chat("assistant: A cat."),
            ]
        },
        ("a part of type 'image', and only parts of text can be read",),
    ),
    "pictures beside": Refused(
        {"images": ["a.png"], "messages": chat("user: <image> What?", "assistant: A cat.")},
        ("`images` would be left out", "that is no text"),
    ),
    # --- functions
    "glaive": Refused(
        {"system": "SYSTEM: Be brief.", "chat": "USER: Rain?\n\n\nASSISTANT: No. <|endoftext|>"},
        ("`chat` is a conversation as one text",),
    ),
    "hermes functions": Read(
        {
            "id": "h",
            "conversations": shares(
                "system: Call them.",
                "human: Rain?",
                f"gpt: <tool_call>\n{CALL}\n</tool_call>",
                "tool: no",
                "gpt: Dry.",
            ),
            "tools": json.dumps([{"type": "function", "function": WEATHER}]),
            "category": "Weather",
        },
        "sharegpt",
        (
            "system: Call them.",
            "user: Rain?",
            f"*assistant: <tool_call>\n{CALL}\n</tool_call>",
            "tool: no",
            "*assistant: Dry.",
        ),
        ("unused-columns",),
    ),
    "llama-factory calls": Read(
        {
            "conversations": shares(
                "human: Rain?", f"function_call: {CALL}", "observation: no", "gpt: It is dry."
            ),
            "tools": json.dumps([WEATHER]),
        },
        "sharegpt",
        CALLING,
    ),
    "a call that is no JSON": Refused(
        {
            "conversations": shares(
                "human: Rain?", "function_call: weather(Bern)", "observation: no", "gpt: Dry."
            )
        },
        ("conversations[1]: the call is not valid JSON",),
    ),
    "toolace": Read(
        {
            "system": "You may call [weather].",
            "conversations": shares(
                "user: Rain?", "assistant: [weather(Bern)]", "tool: no", "assistant: Dry."
            ),
        },
        "sharegpt",
        (
            "system: You may call [weather].",
            "user: Rain?",
            "*assistant: [weather(Bern)]",
            "tool: no",
            "*assistant: Dry.",
        ),
    ),
    "xlam": Refused(
        {"id": 1, "query": "Rain?", "answers": f"[{CALL}]", "tools": json.dumps([WEATHER])},
        ("Rename `query` to `prompt` and `answers` to `completion`",),
    ),
    "schemas by another name": Refused(
        {"messages": chat(*UA), "available_tools": [WEATHER]},
        ("`available_tools` would be left out", "Name it `tools`"),
    ),
    # --- questions about texts
    "squad": Refused(
        {
            "id": "1",
            "title": "Bern",
            "context": LONG,
            "question": "When?",
            "answers": {"text": ["Monday"], "answer_start": [9]},
        },
        ("has no format that is known", "Rename `question` to `prompt` and `answers` to `completion`"),
    ),
    "squad, renamed": Refused(
        {"context": LONG, "prompt": "When?", "completion": "On Monday."},
        ("`context` would be left out", "Put it into `prompt`"),
    ),
    "boolq": Refused(
        {"question": "Does it meet?", "passage": LONG, "answer": True}, ("answer is true, not text",)
    ),
    "choices": Refused(
        {"question": "Which?", "choices": ["a", "b"], "answer": "a"},
        ("`choices` would be left out", "Put it into `question`"),
    ),
    "samsum": Refused(
        {"id": "1", "dialogue": "Ann: Hi\nBob: Yo", "summary": "They greet."},
        ("Rename `dialogue` to `prompt` and `summary` to `completion`",),
    ),
    "cnn dailymail": Refused(
        {"article": LONG, "highlights": "Monthly.", "id": "1"},
        ("Rename `article` to `prompt` and `highlights` to `completion`",),
    ),
    "xsum": Refused(
        {"document": LONG, "summary": "Monthly.", "id": "1"},
        ("Rename `document` to `prompt` and `summary` to `completion`",),
    ),
    "billsum": Refused(
        {"text": LONG, "summary": "Monthly.", "title": "Act 1"},
        ("`summary` would be left out", "rename `text` to `prompt` and `summary` to `completion`"),
    ),
    "billsum, renamed": Read({"prompt": LONG, "completion": "It meets monthly."}, "prompt-completion", SUM),
    # --- labels
    "imdb": Refused({"text": LONG, "label": 1}, ("`label` would be left out (1)", "If only `text` is meant")),
    "imdb as text": Read(
        {"text": LONG, "label": 1}, "text", (f"*text: {LONG}",), ("unused-columns",), named="text"
    ),
    "ag news": Refused({"text": LONG, "label": 2}, ("`label` would be left out",)),
    "sst2": Refused(
        {"idx": 0, "sentence": "good film", "label": 1},
        ("Rename `sentence` to `prompt` and `label` to `completion`",),
    ),
    "spam": Refused(
        "Category,Message\nham,hello\n",
        ("Rename `Message` to `prompt` and `Category` to `completion`",),
        suffix="csv",
    ),
    # --- preferences
    "hh-rlhf": Refused(
        {
            "chosen": "\n\nHuman: Where?\n\nAssistant: In Bern.",
            "rejected": "\n\nHuman: Where?\n\nAssistant: No.",
        },
        ("is a preference (chosen and rejected) without the question", "Write it as `prompt`"),
    ),
    "ultrafeedback": Refused(
        {
            "prompt": "Where?",
            "chosen": chat(*UA),
            "rejected": chat("user: Where?", "assistant: No."),
            "score_chosen": 9.0,
        },
        ("is a preference (chosen and rejected)",),
    ),
    "kto": Refused(
        {"prompt": "Where?", "completion": "No.", "label": False},
        ("`label` would be left out (False)", "keep only those"),
    ),
    # --- TRL, axolotl
    "trl messages": Read(
        {"prompt": chat(*UA, "user: Sure?"), "completion": chat("assistant: Yes, sure.")},
        "prompt-completion",
        ("user: Where?", "assistant: In Bern.", "user: Sure?", "*assistant: Yes, sure."),
    ),
    "trl text": Read({"prompt": "Where?", "completion": "In Bern."}, "prompt-completion", QA),
    "axolotl input_output": Refused(
        {"segments": [{"label": False, "text": "<s>Where?"}, {"label": True, "text": "In Bern.</s>"}]},
        ("has no format that is known", "`segments` holds text that is rendered already"),
    ),
    "axolotl train": Read(
        {"conversations": [*shares("human: Where?"), {"from": "gpt", "value": "In Bern.", "train": True}]},
        "sharegpt",
        QA,
    ),
    # --- plain text
    "fineweb": Read(
        {
            "text": LONG,
            "id": "u",
            "dump": "CC",
            "url": "x",
            "date": "d",
            "file_path": "f",
            "language": "en",
            "language_score": 0.9,
            "token_count": 9,
        },
        "text",
        (f"*text: {LONG}",),
        ("unused-columns",),
    ),
    "tiny stories": Read({"text": LONG}, "text", (f"*text: {LONG}",)),
    "wikitext": Refused({"text": ""}, ("text is empty",)),
    "a page": Refused(
        {"title": "Bern", "content": LONG}, ("If it is plain text, rename `content` to `text`",)
    ),
    "rendered for another base": Read(
        {"text": "<s>[INST] Where? [/INST] In Bern.</s>"},
        "text",
        ("*text: <s>[INST] Where? [/INST] In Bern.</s>",),
        ("chat-markers",),
    ),
    "rendered for this base": Refused(
        {"text": "<|user|>Where?<|end|><|assistant|>In Bern.<|end|>"},
        ("contains the special token '<|user|>'", "the template is applied for you"),
    ),
    "a document": Read(f"{LONG}\n", "text", (f"*text: {LONG}\n",), suffix="txt"),
    # --- translations, spreadsheets, files
    "opus": Refused(
        {"id": "0", "translation": {"de": "Wo?", "en": "Where?"}},
        ("Write the text of `de` as `prompt` and that of `en` as `completion`",),
    ),
    "spreadsheet": Read("Question;Answer\nWhere?;In Bern.\n", "prompt-completion", QA, suffix="csv"),
    "spreadsheet with an index": Read(
        ",Prompt,Completion\n0,Where?,In Bern.\n", "prompt-completion", QA, ("unused-columns",), suffix="csv"
    ),
    "tab-separated": Read("prompt\tcompletion\nWhere?\tIn Bern.\n", "prompt-completion", QA, suffix="tsv"),
    "a ragged spreadsheet": Refused(
        "prompt,completion\nWhere, then?,In Bern.\n",
        ("has 3 cells, the header names 2", "Put a cell"),
        suffix="csv",
    ),
    "lines in .json": Read(
        '{"prompt": "Where?", "completion": "In Bern."}\n', "prompt-completion", QA, suffix="json"
    ),
    "a list in .jsonl": Read('[{"prompt": "Where?", "completion": "In Bern."}]', "prompt-completion", QA),
    "pandas by columns": Refused(
        '{"prompt": {"0": "Where?"}, "completion": {"0": "In Bern."}}',
        ("a table as pandas writes it", 'orient="records"'),
        suffix="json",
    ),
    "rows under a key": Refused(
        '{"version": "2", "data": [{"prompt": "Where?", "completion": "In Bern."}]}',
        ("with its rows under 'data'", "Write the list alone"),
        suffix="json",
    ),
    "Python's rows": Refused(
        "{'prompt': 'Where?', 'completion': None}\n", ("not valid JSON", "write it with json.dumps")
    ),
    "lists of columns": Refused('["Where?", "In Bern."]\n', ("has no format that is known (found a list)",)),
    "a key twice": Refused(
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        ("names the key 'content' twice in one object",),
    ),
    "a held-out row": Refused(
        {"prompt": "Where?", "completion": "In Bern.", "split": "test"},
        ("`split` says 'test'", "Give each split a file"),
    ),
}
"""Name of the shape -> what it is, and what becomes of it."""
READ = [name for name, shape in SHAPES.items() if isinstance(shape, Read)]
REFUSED = [name for name in SHAPES if name not in READ]


def write(folder: Path, shape: Read | Refused) -> Path:
    path = folder / f"rows.{shape.suffix}"
    text = shape.rows if isinstance(shape.rows, str) else json.dumps(shape.rows) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def part_of(path: Path, format_: str = "auto") -> Part:
    data = Data(train=Source(path=str(path), format=format_), max_length=4096)  # type: ignore[arg-type]
    return prepare(data, TOKENIZER).parts["train"]


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    assert isinstance(shape, Read)
    path = write(tmp_path, shape)
    part = part_of(path, shape.named)
    assert part.problems.first == []
    [row] = part.rows
    if shape.format != "text":
        [talk] = part.conversations
        assert [f"{message['role']}: {_said(message)}" for message in talk.to_template()] == [
            one.removeprefix("*") for one in shape.said
        ]
    expected = "".join(one.split(": ", 1)[1] + END[shape.format] for one in shape.said if one[0] == "*")
    trained = TOKENIZER.decode([label for label in row.labels if label != IGNORE])
    expected = (
        expected[1:] if shape.format == "text" else expected.strip()
    )  # nothing predicts the first token
    assert trained == expected
    assert tuple(one.code for one in part.findings if one.code != "short-answer") == shape.found
    [(place, value), *_] = rows_of([path])
    if shape.named == "auto" and not isinstance(value, list):
        assert detect(value, place) == shape.format


END = dict.fromkeys(("messages", "sharegpt", "alpaca", "prompt-completion"), "<|end|>") | {
    "text": "<|endoftext|>"
}


def _said(message: dict[str, Any]) -> str:
    calls = (call["function"] for call in message.get("tool_calls", []))
    return message["content"] + "".join(f"{one['name']}{json.dumps(one['arguments'])}" for one in calls)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    assert isinstance(shape, Refused)
    path = write(tmp_path, shape)
    problem = part_of(path).problems.first[0]
    assert problem.place.startswith(str(path))
    assert [word for word in shape.words if word not in str(problem)] == []


BY_COMMAND = (
    "alpaca",
    "magpie",
    "r1 distilled",
    "glaive",
    "pandas by columns",
    "a key twice",
    "spreadsheet",
    "anthropic",
    "numina",
    "imdb",
    "opus",
    "trl text",
    "weight 0",
)


@pytest.mark.parametrize("name", BY_COMMAND)
def test_commands_say_the_same(tmp_path: Path, checkpoints: Callable[[str], Path], name: str) -> None:
    shape = SHAPES[name]
    path = write(tmp_path, shape)
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nname: r\nmodel: {{base: {checkpoints('gqa')}}}\n"
        f"data:\n  train: {{path: {path.name}}}\n  max_length: 128\n"
    )
    told = attempt("doctor", "r.yaml", "--samples", "1", cwd=tmp_path)
    dry = attempt("recipe", "r.yaml", "--dry-run", cwd=tmp_path)
    if isinstance(shape, Refused):
        assert told.returncode == dry.returncode == 2
        found = told.stdout.replace("\n  -> ", " ")
        assert [word for word in shape.words if word not in found or word not in dry.stderr] == []
    else:
        assert (told.returncode, dry.returncode) == (0, 0), told.stdout + dry.stderr
        assert "[In Bern.<|end|>]" in told.stdout and "all 1 row looked at" in dry.stdout


def test_the_table_is_long_enough() -> None:
    assert len(SHAPES) >= 80 and {
        shape.format for shape in SHAPES.values() if isinstance(shape, Read)
    } == set(END)
