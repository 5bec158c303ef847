"""The templates in the real web page: ``nox -s screenshots``."""
