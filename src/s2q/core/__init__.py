"""Floor 0: what a code, a scale and a packed byte are; errors, seeds and safe file writing. Imports no other floor."""
