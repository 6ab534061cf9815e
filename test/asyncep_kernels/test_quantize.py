"""Quantisation of activations against its reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreter

from asyncep_kernels.quantize import reference

DTYPES = [torch.float8_e4m3fn, torch.int8]


def interpreted(x: torch.Tensor, dtype: torch.dtype, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = interpreter().call("asyncep_kernels.quantize.triton", "quantize", x, dtype, group)
    return q, scale


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 4), st.integers(1, 300), st.sampled_from([1, 24, 128, 1000]), st.integers(0, 2**31))
def test_numbers_and_scales_are_equal(dtype: torch.dtype, rows: int, width: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).bfloat16() * 10.0 ** float(torch.randint(-4, 5, (1,)))
    if rows:
        x[0] = 0.0
    q, scale = interpreted(x, dtype, group)
    exact, exact_scale = reference.quantize(x, dtype, group)
    assert torch.equal(q.float(), exact.float())
    assert torch.equal(scale, exact_scale)


def test_every_e4m3_number_and_what_lies_between() -> None:
    """Scale 1: the largest number is there. Halves go to even, small numbers are kept."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, between, -numbers, torch.nextafter(between, torch.tensor(500.0))])[None]
    q, scale = interpreted(x, torch.float8_e4m3fn, x.shape[1])
    assert scale.item() == 1.0
    assert torch.equal(q.float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_lost(dtype: torch.dtype) -> None:
    """Half a step: of 3 bits of fraction, or of 127 steps of the group's largest."""
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    back = reference.dequantize(*reference.quantize(x, dtype, 128), 128)
    largest = x.view(20, 2, 128).abs().amax(-1).repeat_interleave(128, dim=1)
    bound = x.abs() / 16 + largest / 448 / 1024 if dtype == torch.float8_e4m3fn else largest / 254 * 1.001
    assert ((back - x).abs() <= bound).all()
    assert (back != x).any()


def test_errors_name_what_does_not_fit() -> None:
    for quantize in (reference.quantize, interpreted):
        with pytest.raises(ValueError, match="want float8_e4m3fn or int8"):
            quantize(torch.zeros(2, 3), torch.bfloat16, 1)
        with pytest.raises(ValueError, match="group of at least 1"):
            quantize(torch.zeros(2, 3), torch.int8, 0)
