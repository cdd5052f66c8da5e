"""Forward passes run in 16 bits only where the CPU multiplies 16-bit matrices faster than float32 ones."""

import platform

import pytest
import torch

from llmsparse import device
from llmsparse.device import forward_dtype

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    def pretend(machine, amx=False, amx_fp16=False, native=False, avx512_bf16=False, vendor="GenuineIntel"):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: amx_fp16, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
        monkeypatch.setattr(device, "_cpu_facts", lambda: {"vendor_id": vendor})
        monkeypatch.setattr(platform, "processor", lambda: "x86_64")
        for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda: native)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    return pretend


def test_avx512_bf16_of_intel_is_no_reason_to_leave_float32(processor):
    processor("x86_64", native=True, avx512_bf16=True)
    assert forward_dtype("auto", torch.bfloat16, CPU) == torch.float32
    assert forward_dtype("auto", torch.float16, CPU) == torch.float32


def test_avx512_bf16_of_amd_runs_bfloat16_alone(processor, monkeypatch):
    processor("x86_64", avx512_bf16=True, vendor="AuthenticAMD")
    assert forward_dtype("auto", torch.bfloat16, CPU) == torch.bfloat16
    assert forward_dtype("auto", torch.float16, CPU) == torch.float32
    processor("x86_64", vendor="AuthenticAMD")
    assert forward_dtype("auto", torch.bfloat16, CPU) == torch.float32
    processor("AMD64", avx512_bf16=True, vendor=None)  # Windows has no /proc/cpuinfo
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD")
    assert forward_dtype("auto", torch.bfloat16, CPU) == torch.bfloat16


def test_amx_runs_the_dtypes_that_it_has(processor):
    processor("AMD64", amx=True)
    assert forward_dtype("auto", torch.bfloat16, CPU) == torch.bfloat16
    assert forward_dtype("auto", torch.float16, CPU) == torch.float32
    processor("x86_64", amx=True, amx_fp16=True)
    assert forward_dtype("auto", torch.float16, CPU) == torch.float16


@pytest.mark.parametrize("native", [True, False])
def test_arm_runs_what_it_has_instructions_for(processor, native):
    processor("aarch64", native=native)
    assert forward_dtype("auto", torch.bfloat16, CPU) == (torch.bfloat16 if native else torch.float32)


def test_what_is_asked_for_is_what_runs(processor):
    processor("x86_64")
    assert forward_dtype("bfloat16", torch.float32, CPU) == torch.bfloat16
    assert forward_dtype("auto", torch.float32, CPU) == torch.float32
