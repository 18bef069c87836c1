"""Evaluation: generation, judges, and the measures of one subject."""
