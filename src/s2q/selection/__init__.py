"""Salient data selection: scores of candidates, and the rules that choose among them."""
