"""Errors, files, devices, memory, arguments: what every package uses."""
