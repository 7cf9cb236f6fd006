"""QLoRA for the Phi-3 family on consumer GPUs."""

__version__ = "0.1.0"
