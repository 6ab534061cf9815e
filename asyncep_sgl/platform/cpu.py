"""The plain-CPU platform: SGLang's CPU device operations, registered out of tree so that no AMX path is taken."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform
from typing_extensions import override


class AnyCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc] # upstream is untyped
    """CPU through SGLang's torch-native code.

    It names itself out-of-tree (``OOT``) on purpose: with ``CPU`` SGLang calls sgl-kernel's AMX operators.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"

    @override
    def get_device(self, device_id: int = 0) -> str:
        # SGLang takes the device's type with str.split; the mixin's torch.device has none.
        return "cpu"

    @override
    def get_default_attention_backend(self) -> str:
        return "torch_native"

    @override
    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"
