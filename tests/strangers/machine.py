"""The machine of test_machine.py with new choices, until the minutes are over: `make strangers MINUTES=30`.

Each round has a seed, which is printed; `--seed N` repeats that round, and shows each step. A violation is
not made smaller, which would take hours: a round is short.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from hypothesis import seed, settings  # noqa: E402
from hypothesis.stateful import get_state_machine_test  # noqa: E402
from test_machine import SHORT, Machine  # noqa: E402


def one_round(number: int, examples: int, steps: int) -> str:
    """What went wrong, or nothing."""
    wanted = settings(SHORT, max_examples=examples, stateful_step_count=steps, derandomize=False)
    try:
        seed(number)(get_state_machine_test(Machine, settings=wanted))()
    except Exception:
        return traceback.format_exc()
    return ""


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    Machine.say = staticmethod(_say if asked.seed is not None else lambda _: None)  # type: ignore[method-assign]
    begun, wrong, rounds = time.monotonic(), 0, 0
    write = sys.stdout.write
    while True:
        number = asked.seed if asked.seed is not None else secrets.randbelow(10**6)
        found = one_round(number, asked.examples, asked.steps)
        rounds, wrong = rounds + 1, wrong + bool(found)
        minutes = (time.monotonic() - begun) / 60
        write(f"seed {number}: {'VIOLATED' if found else 'held'}; {minutes:.1f} min, ")
        write(f"{rounds} rounds, {Machine.num_commands} commands, {wrong} violations\n")
        if found:
            write(f"{found}\nAgain: python {sys.argv[0]} --seed {number}\n")
        sys.stdout.flush()
        if asked.seed is not None or minutes >= asked.minutes:
            sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
