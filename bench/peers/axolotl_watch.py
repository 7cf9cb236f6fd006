"""The watcher as a plugin of Axolotl's, which its config names."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from bench.peers.transformers_loop import Kept

WATCHES: list[Kept] = []
"""Of the runs of this process: Axolotl makes the plugin itself."""


class WatchPlugin(BasePlugin):
    """Adds the watcher to the trainer that Axolotl built."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        WATCHES.append(Kept("cpu" if trainer.args.use_cpu else "cuda"))
        return [WATCHES[-1]]
