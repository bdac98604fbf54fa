"""Evaluation: generating videos, measuring them against full precision, and saying how sure the figures are."""
