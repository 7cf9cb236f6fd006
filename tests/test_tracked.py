"""tracked.py: live tensors are counted once each, by category, and their peak."""

from __future__ import annotations

import pytest
import torch

from qlora_phi3.tracked import TrackedBytes

KIB = 1024


def test_peak_and_what_is_left() -> None:
    with TrackedBytes() as tracked:
        kept = torch.zeros(256)
        passing = torch.zeros(512)
        del passing
        assert tracked.now["activations"] == KIB
    assert tracked.peak_bytes == 3 * KIB
    assert kept.view(16, 16).untyped_storage().nbytes() == KIB


def test_views_are_counted_once() -> None:
    with TrackedBytes() as tracked:
        whole = torch.zeros(256)
        parts = whole.chunk(4)
    assert tracked.peak_bytes == KIB
    assert len(parts) == 4


def test_claimed_tensors_change_their_category() -> None:
    weight = torch.zeros(256)
    tracked = TrackedBytes()
    tracked.claim("weights", [weight])
    tracked.start()
    with tracked:
        made = weight + 1
        tracked.claim("gradients", [made])
        more = made + 1
    assert tracked.at_peak == {"weights": KIB, "gradients": KIB, "activations": KIB}
    del made, more
    assert +tracked.now == {"weights": KIB}


def test_gradients_of_a_backward_are_seen() -> None:
    weight = torch.zeros(256, requires_grad=True)
    tracked = TrackedBytes()
    tracked.claim("weights", [weight])
    with tracked:
        (weight * 2).sum().backward()
        assert weight.grad is not None
        tracked.claim("gradients", [weight.grad])
    assert tracked.now["gradients"] == KIB


def test_temporaries_of_a_4_bit_product_count() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(256, 512, False, compute_dtype=torch.float32, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(torch.randn(512, 256), requires_grad=False, quant_type="nf4").to("cpu")
    linear.support_avx512bf16_for_cpu = False
    with TrackedBytes() as tracked:
        linear(torch.randn(1, 256))
    assert tracked.peak_bytes >= 4 * 512 * 256
