"""Other toolkits, each by its own documented interface, in its own environment; nothing here imports ours."""
