"""bench/engine.py: each way comes to the same loss, and the table has them in the order of the steps."""

from __future__ import annotations

from typing import Any

import pytest

from bench import engine, engine_table

ROW: dict[str, Any] = {"rows": 8, "tokens": 800, "peak_bytes": 2**20, "linear_flops": 6.0, "commit": "abc"}


def test_the_table_is_in_the_order_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(engine.WAYS)
    seconds = {name: 8.0 / (n + 1) for n, name in enumerate(names)}
    measured = [ROW | {"way": name, "seconds": [seconds[name]], "versions": {}} for name in reversed(names)]
    old = [ROW | {"way": name, "seconds": [99.0], "versions": {}} for name in (names[2], "of old")]
    monkeypatch.setattr(engine_table, "by_machine", lambda case: {"here": [*old, *measured]})
    lines = [line.split("|") for line in engine_table.engine().splitlines() if "MiB" in line]
    assert [line[1].strip() for line in lines] == names
    assert [line[3].strip() for line in lines] == [f"{n + 1:.2f}x" for n in range(len(names))]


@pytest.mark.slow
def test_all_ways_come_to_the_same_loss() -> None:
    made = engine.Pass(2)
    found = {name: made.counted(name) for name in engine.WAYS}
    losses = [one["loss"] for one in found.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2e-2)  # bfloat16, in another order
    stock, ours = found["transformers + PEFT, recompute"], found["reference, recompute"]
    assert made.padded["input_ids"].numel() > made.tokens
    assert stock["linear_flops"] == pytest.approx(
        6 * made.padded["input_ids"].numel() / made.tokens, rel=1e-3
    )
    assert ours["linear_flops"] == 6 and found["native, keep"]["linear_flops"] == 4
    assert stock["peak_bytes"] > ours["peak_bytes"] > found["native, recompute"]["peak_bytes"]
    config = made.model.get_base_model().config
    assert config._attn_implementation != "sdpa", "ours is back"
