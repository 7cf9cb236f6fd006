"""Exports to what people serve with: one file per target, and the gate that proves each of them."""
