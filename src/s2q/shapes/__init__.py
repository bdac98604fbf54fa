"""The embedded reference models: scenes and their captions, an analytic detector, shipped weights."""
