"""A simulator of prefill on Mixture-of-Experts models: devices, links, strategies, and the router's real policy.

`docs/internals/simulator.md` has the model, its formulas and their sources. Pure Python; no torch, no SGLang.
"""

from __future__ import annotations

from asyncep.sim.deployment import Deployment, Settings, deploy
from asyncep.sim.engine import Result, frontend, simulate, simulate_routed
from asyncep.sim.errors import DataError, DoesNotFit, SimulationError
from asyncep.sim.hardware import Cluster, Device, Link, cluster, link, machine, model_config
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies.registry import BASELINES, NAMES
from asyncep.sim.work import Batch, Model

__all__ = [
    "BASELINES",
    "NAMES",
    "Batch",
    "Cluster",
    "DataError",
    "Deployment",
    "Device",
    "DoesNotFit",
    "ExpertSkew",
    "Link",
    "Model",
    "Result",
    "Settings",
    "SimulationError",
    "cluster",
    "deploy",
    "frontend",
    "link",
    "machine",
    "model_config",
    "simulate",
    "simulate_routed",
]
