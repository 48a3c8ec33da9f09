"""Quantities, verdicts and the statistics between them; evidence."""
