"""The mlx layout in mlx-lm itself, its only consumer; skipped where it is not installed.

`pip install mlx mlx-cpu mlx-lm` brings it to Linux, mlx-lm alone to a Mac.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import FAMILY, IDS, adapter, geometry_of, logits, phi3_model

from qlora_phi3.export.consumers import own_mlx_folder
from qlora_phi3.layouts import Layout, convert, write_adapter

mlx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
own_mlx_folder()


def mlx_logits(model: Any) -> torch.Tensor:
    return torch.tensor(model(mlx.array(IDS.tolist())).tolist())


def as_microsoft_writes_it(folder: Path) -> None:
    """mlx-lm knows neither `rope_parameters`, transformers 5's key, nor what is in it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    partial = {"partial_rotary_factor": rope.get("partial_rotary_factor", 1.0)}
    path.write_text(json.dumps({**config, **partial, "rope_theta": rope["rope_theta"], "rope_scaling": None}))


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize(
    ("layout", "names", "settings"),
    [
        ("fused", (), {}),
        ("fused", (), {"use_rslora": True}),
        ("fused", (), {"rank_pattern": {"o_proj": 7}, "alpha_pattern": {"o_proj": 14}}),
        ("unfused", (), {}),
        ("unfused", ("q_proj", "v_proj", "down_proj"), {}),
    ],
    ids=str,
)
def test_it_computes_what_transformers_and_peft_do(
    tmp_path: Path, kind: str, layout: Layout, names: tuple[str, ...], settings: dict[str, Any]
) -> None:
    """Pairs of one rank, or of several, as those of separate projections are beside o_proj's."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model
    from peft import PeftModel

    model = phi3_model(kind)
    sizes = geometry_of(model)
    tensors, config = adapter(sizes, *names, layout=layout, **settings)
    tensors = {key: 0.1 * tensor for key, tensor in tensors.items()}
    write_adapter(tmp_path / "peft", *convert(tensors, config, "split", sizes))
    write_adapter(tmp_path / "mlx", *convert(tensors, config, "mlx", sizes))
    model.save_pretrained(tmp_path / "base")
    as_microsoft_writes_it(tmp_path / "base")
    theirs, _ = load_model(tmp_path / "base")
    untrained = logits(model)
    torch.testing.assert_close(mlx_logits(theirs), untrained, rtol=1e-4, atol=1e-5)
    theirs = load_adapters(theirs, str(tmp_path / "mlx"))
    tuned = logits(PeftModel.from_pretrained(model, tmp_path / "peft"))
    torch.testing.assert_close(mlx_logits(theirs), tuned, rtol=1e-4, atol=1e-5)
    assert (tuned - untrained).abs().max() > 0.1


COMPILED = """
from qlora_phi3.export.consumers import own_mlx_folder
own_mlx_folder()
import mlx.core as mx
print(float(mx.compile(lambda x: mx.exp(x) * 2 + 1)(mx.array([0.0]))[0]))
"""


def test_a_temporary_folder_that_others_have_used(tmp_path: Path) -> None:
    """Where mlx would compile there is something that is not ours; for root a file stands for that."""
    (tmp_path / "mlx").write_text("another user's")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.stdout == "3.0\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mlx"]
