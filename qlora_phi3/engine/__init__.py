"""Our own parts of the training path; each is compared with stock transformers and PEFT in its tests."""
