"""Quality of other tools on an embedded model, each by its own code, on the prompts and noise of the recipes.

    pip install sdnq torchao bitsandbytes optimum-quanto gguf comfy-kitchen auto-round
    python benchmarks/peers.py [-m shapes-cogvideox] [-p torchao-w4a8 ...] [--prompts 32] [--seeds 2]

Records are as those of ``embedded_quality.py``, in ``results/peers/MODEL/NAME.json``; a peer whose file exists is
skipped. ``--seconds`` only measures again, on a quiet machine, how long the peers with a record take to quantize.
"""

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from environment import environment
from records import rounded_metrics, write_record

from s2q.common.versions import package_versions
from s2q.comparison.peers import ALL_PEERS, cost_of_peer, find_peers, load_with_peer
from s2q.evaluation.measure import judge_model, run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.summary import summarise
from s2q.models import resolve_model
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_prompts

RESULTS = Path(__file__).parent / "results" / "peers"
logger = logging.getLogger("peers")


def main() -> None:
    """Measure the peers that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default=EMBEDDED_NAMES[0], choices=EMBEDDED_NAMES)
    parser.add_argument("-p", "--peer", action="append", help="of s2q.comparison.peers; default: every installed one")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seconds", action="store_true", help="measure the seconds of existing records again")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    folder, source = RESULTS / arguments.model, resolve_model(arguments.model)
    peers = {folder / f"{peer.name}.json": peer for peer in find_peers(arguments.peer or [ALL_PEERS])}
    if arguments.seconds:
        for path, peer in peers.items():
            if path.exists():
                record = json.loads(path.read_text()) | {"quantize_seconds": _seconds(cost_of_peer(peer, source))}
                write_record(path, record)
                logger.info("%s %s: %g s", arguments.model, peer.label, record["quantize_seconds"])
        return
    wanted = [peer for path, peer in peers.items() if not path.exists()]
    if not wanted:
        return
    settings = EvaluationSettings(dtype="float32")
    captions = embedded_prompts(arguments.model, split="held-out", count=arguments.prompts)
    reference = run_reference(source, prompts=captions, seeds=range(arguments.seeds), settings=settings)
    for peer in wanted:
        cost = cost_of_peer(peer, source)
        pipe = load_with_peer(peer, source, dtype=settings.dtype)
        result = summarise(judge_model(source, reference, pipe=pipe))
        result["videos"] = rounded_metrics(result["videos"])
        described = {"model": peer.label, "width": peer.width, "does": peer.does, "storage": cost["storage"]}
        record = result | described | {"quantize_seconds": _seconds(cost)} | environment()
        record["versions"] |= package_versions((peer.package,))
        write_record(folder / f"{peer.name}.json", record)
        error = result["metrics"]["velocity_relative_error"]["mean"]
        logger.info("%s %s: velocity error %.2e in %.1f s", arguments.model, peer.label, error, cost["seconds"])


def _seconds(cost: Mapping[str, Any]) -> float:
    return round(cost["seconds"], 2)


if __name__ == "__main__":
    main()
