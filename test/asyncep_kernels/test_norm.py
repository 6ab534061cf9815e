"""The RMSNorm kernel against its reference, and the hook against SGLang's operator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_kernels.norm import cpu, reference
from asyncep_kernels.workspace import Workspace

# One rounding to the dtype, at the size of the value.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=0, max_size=2),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_norm_and_sum_are_as_in_fp32(outer: list[int], size: int, dtype: torch.dtype, add: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(*outer, size, generator=generator).to(dtype) * 5 for _ in range(2))
    weight = torch.rand(size, generator=generator).to(dtype)
    before = x.clone()
    found, summed = cpu.rms_norm(x, weight, 1e-6, residual if add else None, workspace=Workspace())
    exact, exact_sum = reference.rms_norm(x, weight, 1e-6, residual if add else None)
    torch.testing.assert_close(found, exact, rtol=TOLERANCE[dtype], atol=1e-6)
    assert torch.equal(x, before)
    if summed is None or exact_sum is None:
        assert summed is None
        assert exact_sum is None
    else:
        assert torch.equal(summed, exact_sum)


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        cpu.rms_norm(torch.zeros(3, 4), torch.zeros(5), 1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.rms_norm(torch.zeros(3, 4), torch.zeros(4), 1e-6, torch.zeros(2, 4))
