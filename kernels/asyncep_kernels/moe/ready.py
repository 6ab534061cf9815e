"""Which experts have arrived: what a kernel waits for when it starts before the gather has ended."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Ready(NamedTuple):
    """Flags in the device's memory that whoever copies experts raises, each after the copies it stands for.

    A flag only grows. It is at least ``epoch`` once the experts it stands for may be read; the writer must order
    the flag after the data for every observer (a copy engine's stream does, `cuStreamWriteValue32` behind the
    copies). The writer must not need the processors that the waiting kernel occupies: copy engines and peers do not,
    a copying kernel on the same device does and may wait for ever.
    """

    flags: torch.Tensor
    """``(n,)`` int32."""
    flag_of: torch.Tensor
    """``(E,)`` int32: the flag of each expert; -1 for one that is there from the start."""
    order: torch.Tensor
    """``(E,)`` int32, a permutation of the experts: those that are there first, then as they are to arrive."""
    epoch: int
    """What a flag must have reached. Below 2**31."""
    status: torch.Tensor
    """``(1,)`` int32, 0: becomes 1 when some expert did not arrive within ``limit`` looks; the output is then void."""
    limit: int = 1 << 25
    """Looks at a flag before a program gives up; some 20 s on an H100. A peer's death must not hang this device."""

    def await_expert(self, expert: int) -> bool:
        """Looks until the expert is there; False, with ``status`` set, after ``limit`` looks. For flags on a CPU."""
        flag = int(self.flag_of[expert])
        if flag < 0:
            return True
        for _ in range(self.limit):
            if int(self.flags[flag]) >= self.epoch:
                return True
        self.status.fill_(1)
        return False

    def check(self) -> None:
        """To be called once the outputs are there. Waits for the device.

        Raises:
            TimeoutError: some expert had not arrived.
        """
        if int(self.status[0]):
            late = [i for i, flag in enumerate(self.flags.tolist()) if flag < self.epoch]
            raise TimeoutError(f"experts did not arrive: flags {late} below epoch {self.epoch}")


def make_ready(
    flag_of: list[int], epoch: int, device: torch.device | str = "cpu", *, limit: int | None = None
) -> Ready:
    """Flags at 0 for experts whose flags are ``flag_of``; those of lower flags are expected first."""
    order = sorted(range(len(flag_of)), key=lambda expert: (flag_of[expert], expert))
    ready = Ready(
        torch.zeros(max(1, max(flag_of, default=0) + 1), dtype=torch.int32, device=device),
        torch.tensor(flag_of, dtype=torch.int32, device=device),
        torch.tensor(order, dtype=torch.int32, device=device),
        epoch,
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    return ready if limit is None else ready._replace(limit=limit)
