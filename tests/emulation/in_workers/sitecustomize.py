"""Emulated GPUs in processes that a test starts: Python imports this first if PYTHONPATH has its folder."""

from emulation import emulator

emulator.install_if_possible()
if emulator.is_installed():
    emulator.use_references()
