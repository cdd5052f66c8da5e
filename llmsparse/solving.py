"""One block of a run: its weights are solved, trained together if asked, rounded, and its outputs go on."""

from typing import Any

from llmsparse.block import Block
from llmsparse.reconstruct import reconstruct
from llmsparse.work import Work


def solve_block(work: Work, block: Block) -> list[dict[str, Any]]:
    """Solve and write ``block``; the stream's hidden states become its outputs. Returns a record for each weight."""
    job, processes = work.job, work.processes
    desk = work.desk([w for w in block.weights if w.name in job.patterns], block.views)
    trained, apart = job.reconstruction, job.recipe.order == "together"
    with work.phases("forward"):
        if trained or (job.follows_dense and not job.crosses):
            block.aim()
        if apart:
            for name, statistics in block.observe(desk.kinds, processes, job.crosses).items():
                desk.solve(name, statistics)
        else:
            block.settle(desk.kinds, desk.solve, processes, keep=trained is not None, cross=job.crosses)
        if trained:
            with work.phases("reconstruct"):
                outcome = reconstruct(block, desk.masks, trained, processes, job.recipe.seed)
            desk.retake(block, outcome)
        if trained and job.grid:
            block.settle(desk.rounding_kinds, desk.round, processes)
        elif trained or apart:
            block.run()
    return desk.finish(block.name, job.tensors(block.index))
