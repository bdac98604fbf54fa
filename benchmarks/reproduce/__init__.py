"""The paper's tables again, for someone who has the published weights: `python benchmarks/reproduce TABLE -m MODEL`."""
