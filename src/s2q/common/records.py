"""`schema_version` of each JSON record that s2q writes, raised when a reader of the old one would misread it."""

ALLOCATION_VERSION = 1  # s2q/allocation.json
BENCH_VERSION = 1  # what `s2q bench` writes
COMPARISON_VERSION = 1  # the files of `s2q compare`
DEMO_VERSION = 1  # demo.json
EVALUATION_VERSION = 1  # eval.json
EXPORT_VERSION = 1  # s2q/export.json, and what `s2q export --json` prints
GENERATION_VERSION = 1  # what `s2q generate` writes
INSPECTION_VERSION = 1  # what `s2q inspect` prints
MANIFEST_VERSION = 1  # s2q/manifest.json
PLAN_VERSION = 1  # what `s2q plan` prints
REPORT_VERSION = 1  # s2q/report.json
SELECTION_VERSION = 1  # s2q/selection.json
VBENCH_VERSION = 1  # the record of videos made for VBench
