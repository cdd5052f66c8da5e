"""What tests of whole runs share: options for tiny models, and what an output holds."""

import json
import os

from safetensors.torch import load_file

from llmsparse.sha256 import file_sha256

SMALL = {"samples": 6, "sequence_length": 32}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def tensors(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def hashes(folder):
    return {f.name: file_sha256(f) for f in sorted(folder.glob("*.safetensors"))}


def read_report(folder):
    return json.loads((folder / "report.json").read_text())
