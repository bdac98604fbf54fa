"""JSON records that s2q writes: paths of those in a model's folder, and the `schema_version` of each.

A version is raised when a reader of the old one would misread it.
"""

from pathlib import Path

RECORDS = Path("s2q")
CONVERSION_RECORD = RECORDS / "convert.json"
EXPORT_RECORD = RECORDS / "export.json"
REPORT = RECORDS / "report.json"

ALLOCATION_VERSION = 1  # s2q/allocation.json
BENCH_VERSION = 1  # what `s2q bench` writes
COMPARISON_VERSION = 1  # the files of `s2q compare`
CONVERSION_VERSION = 1  # s2q/convert.json, and what `s2q convert --json` prints
DEMO_VERSION = 1  # demo.json
DIAGNOSIS_VERSION = 1  # what `s2q doctor` prints
EVALUATION_VERSION = 1  # eval.json
EXPORT_VERSION = 1  # s2q/export.json, and what `s2q export --json` prints
GENERATION_VERSION = 1  # what `s2q generate` writes
INSPECTION_VERSION = 1  # what `s2q inspect` prints
MANIFEST_VERSION = 1  # s2q/manifest.json
PLAN_VERSION = 1  # what `s2q plan` prints
PUSH_VERSION = 1  # what `s2q push` prints
REPORT_VERSION = 1  # s2q/report.json
SELECTION_VERSION = 1  # s2q/selection.json
UI_VERSION = 1  # what `s2q ui --json` prints
VBENCH_VERSION = 1  # the record of videos made for VBench
VERSIONS_VERSION = 1  # what `s2q --version --json` prints
