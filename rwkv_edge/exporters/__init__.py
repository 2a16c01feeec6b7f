"""Targets: one F each, and writing its files."""
