"""What every strategy over several hosts needs: an exporter beside the front, and an answer while experts are away."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from asyncep_sgl.experts.group.link import link_environment
from asyncep_sgl.strategies.base import SideProcess, Strategy


class OverHosts(Strategy):
    """Experts may lie on other hosts, which may go away and come back."""

    def side_processes(self) -> Sequence[SideProcess]:
        """What other hosts read this host's experts through; it holds nothing that is not in the store."""
        if self.config.group.nodes == 1:
            return ()
        return (SideProcess("exporter", (sys.executable, "-m", "asyncep_sgl.experts.group.exporter")),)

    def environment(self, outside: Mapping[str, str]) -> Mapping[str, str]:
        """Where UCX listens."""
        group = self.config.group
        return link_environment(group.rendezvous, outside) if group.nodes > 1 else {}

    @property
    def may_stall(self) -> bool:
        """While another host is away."""
        return self.config.group.nodes > 1

    def gates(self) -> Sequence[tuple[type[Any], Mapping[str, Any]]]:
        """Refuses requests while experts are out of reach."""
        group = self.config.group
        if group.nodes == 1:
            return ()
        from asyncep_sgl.experts.group.view import ViewClient
        from asyncep_sgl.strategies.group_gate import GroupGate, GroupHealth, watch

        health = GroupHealth(group.nodes, group.copies, group.patience_seconds)
        watch(health, ViewClient(group.exporter_address))
        return ((GroupGate, {"health": health}),)
