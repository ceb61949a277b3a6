"""tools/measuring/profiling.py: kernels have a kind, and what a step is made of adds up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval

from cfpretrain.base.config import ModelConfig
from tools.measuring import profiling

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("backward_kv_kernel", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("triton_per_fused_native_layer_norm_3", "fused by the compiler"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
            "optimizer",
        ),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>", "normalisation"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "copies"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "sums"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("something else", "others"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert profiling.kind_of(name) == kind


def test_kernels_that_overlap_count_once() -> None:
    assert profiling._union([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (6.0, 6.5)]) == 5.0
    assert profiling._union([]) == 0.0


def event(
    name: str, begin: float, end: float, device: DeviceType = DeviceType.CPU, named: bool = False, thread: int = 1
) -> Any:
    return SimpleNamespace(
        name=name,
        thread=thread,
        time_range=Interval(begin, end),
        device_type=device,
        is_user_annotation=named,
        self_cpu_time_total=1.0,
    )


def test_events_of_a_gpu_are_summarised() -> None:
    gpu = DeviceType.CUDA
    found = profiling.summarise(
        [
            event("_forward_kernel", 0.0, 9.0, gpu),  # of the step before
            event("the measured step", 10.0, 100.0),
            event("the measured step", 20.0, 130.0, gpu, named=True),
            event("## Call CompiledFxGraph", 20.0, 60.0, gpu, named=True),
            event("cudaLaunchKernel", 11.0, 12.0),
            event("cudaStreamSynchronize", 80.0, 99.0),
            event("cudaEventSynchronize", 30.0, 60.0, thread=2),  # of an EMA in host memory
            event("cudaDeviceSynchronize", 101.0, 130.0),  # the profiler's own
            event("nvjet_tst_128x256", 20.0, 60.0, gpu),
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 50.0, 70.0, gpu),
            event("Memcpy HtoD (Pinned -> Device)", 70.0, 80.0, gpu),
            event("backward_kv_kernel", 110.0, 130.0, gpu),  # launched in the step
        ],
        on_gpu=True,
    )
    assert found["device_seconds"] == pytest.approx(80e-6)
    assert (found["num_launches"], found["num_synchronisations"]) == (3, 1)
    wanted = {"matrix products": 40, "communication": 20, "attention": 20, "copies": 10}
    assert found["shares"] == pytest.approx({kind: of / 90 for kind, of in wanted.items()})


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    a = torch.randn(200, 200)
    found = profiling.profile(lambda: (a @ a).relu_().sum(), CPU)
    assert found["device_seconds"] > 0
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["matrix products"] > 0
    assert (found["num_launches"], found["num_synchronisations"]) == (0, 0)
    assert "aten::mm" in capsys.readouterr().out


@pytest.mark.slow
def test_kernels_of_a_compiled_block_are_counted() -> None:
    model = ModelConfig(latent_size=4, width=32, depth=2, num_heads=2, num_cond_tokens=4, num_classes=10)
    counted = profiling.count_kernels(model, "sdpa", CPU)
    assert counted["generated"] >= 2  # a forward and a backward
    assert (counted["graphs"], counted["graph_breaks"]) == (1, 0)
