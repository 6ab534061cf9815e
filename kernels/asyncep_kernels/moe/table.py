"""Where the experts of one layer lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from asyncep_kernels.moe.quant import Format, scale_shape


class ExpertTable(NamedTuple):
    """The experts of one layer, entry e being expert e.

    Each field is one stacked tensor or a sequence of tensors, each wherever it lies (this rank's store, a slot of
    gathered weights, another mapping). Entries are only read; read-only mappings serve.
    """

    w13: torch.Tensor | Sequence[torch.Tensor]
    """``(2 * inter, hidden)`` each: the gate projection's rows, then the up projection's."""
    w2: torch.Tensor | Sequence[torch.Tensor]
    """``(hidden, inter)`` each: the down projection."""
    w13_scale: torch.Tensor | Sequence[torch.Tensor] | None = None
    """fp32, of `asyncep_kernels.moe.quant.scale_shape` with two parts each; for e4m3 and int8 weights."""
    w2_scale: torch.Tensor | Sequence[torch.Tensor] | None = None
    """Likewise, with one part."""

    def entries(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Both sides' weights as sequences of per-expert tensors."""
        return _entries(self.w13), _entries(self.w2)

    def scales(self) -> tuple[Sequence[torch.Tensor] | None, Sequence[torch.Tensor] | None]:
        """Both sides' scales likewise; None for plain weights."""
        return (
            None if self.w13_scale is None else _entries(self.w13_scale),
            None if self.w2_scale is None else _entries(self.w2_scale),
        )

    @property
    def format(self) -> Format:
        """How the weights are stored."""
        return Format.of(self.w13[0].dtype)


def _entries(side: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return side.unbind(0) if isinstance(side, torch.Tensor) else side


def check(hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: ExpertTable) -> None:
    """Checks what every implementation of ``moe`` relies on, without looking at the contents of a tensor.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_routing(hidden, topk_ids, topk_weights)
    if len(experts.w13) == 0 or len(experts.w13) != len(experts.w2):
        raise ValueError(f"{len(experts.w13)} entries of w13, {len(experts.w2)} of w2")
    w13, w2 = experts.w13[0], experts.w2[0]
    width = hidden.shape[1]
    if w13.shape != (2 * w2.shape[1], width) or w2.shape[0] != width:
        raise ValueError(f"w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} do not fit hidden size {width}")
    if w13.dtype != w2.dtype or (experts.format is Format.PLAIN and hidden.dtype != w13.dtype):
        raise ValueError(f"dtypes differ: hidden {hidden.dtype}, w13 {w13.dtype}, w2 {w2.dtype}")
    for name, side, weight, parts in (("w13", experts.w13_scale, w13, 2), ("w2", experts.w2_scale, w2, 1)):
        found = None if side is None else (len(side), *side[0].shape)
        want = None
        if experts.format is not Format.PLAIN:
            want = (len(experts.w13), *scale_shape((weight.shape[0], weight.shape[1]), experts.format, parts))
        if found != want:
            raise ValueError(f"{name}_scale is {found}, want {want} for {weight.dtype} weights")


def check_routing(hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
    """Checks what does not depend on the experts.

    Raises:
        ValueError: shapes do not fit together.
    """
    if hidden.dim() != 2 or topk_ids.dim() != 2 or topk_ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and topk_ids {tuple(topk_ids.shape)}: want (T, H) and (T, K)")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights {tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)} differ")
