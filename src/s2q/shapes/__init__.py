"""The embedded reference models: procedural captioned videos, an analytic detector, trainers, shipped weights."""
