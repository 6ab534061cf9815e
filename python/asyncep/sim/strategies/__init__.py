"""How a model is spread over devices: one file for each way of keeping time."""

from __future__ import annotations

from asyncep.sim.strategies.base import Executor, Outcome
from asyncep.sim.strategies.coupled import CollectiveGather, DataParallelExperts
from asyncep.sim.strategies.independent import OneSidedGather
from asyncep.sim.strategies.single import ExpertParallel, PipelineParallel, TensorParallel

__all__ = [
    "CollectiveGather",
    "DataParallelExperts",
    "Executor",
    "ExpertParallel",
    "OneSidedGather",
    "Outcome",
    "PipelineParallel",
    "TensorParallel",
]
