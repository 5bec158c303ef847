"""Measurements: ``nox -s bench -- <case>``."""
