"""Shared test utilities: backends, comparisons that explain a failure, seeds, covering arrays."""
