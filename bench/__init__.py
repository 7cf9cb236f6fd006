"""Measurements: each case in its own process, methods by turns, results in bench/results/<machine>/."""
