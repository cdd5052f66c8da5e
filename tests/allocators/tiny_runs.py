"""What tests of allocators share: quick options, and a run."""

from llmsparse import plugins
from llmsparse.prune import prune
from tests.pruned import SMALL

QUICK = ("allocate.generations=3", "allocate.offspring=3", "allocate.fitness=2")
DIVIDING = [name for name in plugins.names("allocators") if name != "uniform"]


def settings(allocator):
    return {"allocate": allocator, "set": QUICK if allocator == "search" else ()}


def run(source, out, text, **options):
    report = prune(source, out, calibration=text, **{**SMALL, **options})
    return report, {w["name"]: w for w in report["weights"]}
