"""Engines that run independent tasks."""
