"""What the simulator raises on purpose."""

from __future__ import annotations


class SimulationError(Exception):
    """Base of the simulator's errors."""


class DataError(SimulationError, ValueError):
    """A device, link, model or calibration says something it cannot; the message names file and field."""


class DoesNotFit(SimulationError, ValueError):
    """The model does not fit the devices' memory in the layout asked for; the message has the bytes."""
