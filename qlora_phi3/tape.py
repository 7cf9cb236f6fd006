"""Bytes alive while a replay runs. No torch."""

from __future__ import annotations


class Tape:
    """Bytes alive while operations run one after another, and where they were most."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.stage = self.fullest = ""

    def new(self, *sizes: int) -> int:
        self.now += sum(sizes)
        if self.now > self.peak:
            self.peak, self.fullest = self.now, self.stage
        return sum(sizes)

    def free(self, *sizes: int) -> None:
        self.now -= sum(sizes)

    def passing(self, *sizes: int) -> None:
        """What is gone when the operation is done."""
        self.free(self.new(*sizes))
