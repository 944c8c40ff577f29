"""How vLLM is imported, which interfaces it must provide, and everything that rankup replaces in it.

No other module changes vLLM. The replacements rely on internals of the versions in `TESTED_VERSIONS`. With another version
`import_vllm` logs a warning, and missing attributes (`require`) or other parameters (`replaceable`) are an error at start.

| replaced | by | why |
|---|---|---|
| LoRA wrapper class | `dense_lora.py` | vLLM's copies the adapter once per token on CPU, and is wrong on the LM head |
| LoRA buffers of some layers | `lora_slices.join_slices` | vLLM has several pairs for one projection of transformers |
| compiling transformers' classes | nothing | it would change the class that the trainer's model is made of |
| rotary embedding, CPU | `cpu_ops.flat_rotary` | vLLM's kernel is wrong for queries of three dimensions |
| experts' kernels, CPU | those without LoRA | with LoRA vLLM takes Triton's for experts, which have no adapter here |
| kernels of norms, CPU | `cpu_ops.rms_norm`, ... | vLLM has kernels but registers them for GPUs only |
| sampling of tokens, CPU | `cpu_ops.sample` | vLLM's takes a tenth of a decoding step of 64 sequences |
| sampling of tokens, CUDA | `cuda_ops.sample` | vLLM's launches a kernel for each sequence with a seed |
| `apply` of adapted layers, CPU | `cpu_ops.dense_apply` | vLLM's takes a dozen Python calls and a product per part of q/k/v |
| usage of the memory pool, CUDA | `usage_counted_anew`, during a start | a closed engine's weights may still have users |
| addresses of LoRA buffers | `clear()` when an engine is closed | vLLM keeps them by address for the life of the process |
| returning experts, CPU | `routed_experts.V1Recorder` | vLLM's model runner V1 does not record what routers choose |
| repacking of linear weights, CPU | nothing: a mark skips it | the trainer reads the original layout |
| garbage collections, CPU | one collection per start and one per close | each walks all objects of the process: 0.4 s |
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from . import cpu_ops, cuda_ops, lora_slices
from .installed_vllm import TESTED_VERSIONS, replaceable, require, vllm_version, working_versions
from .layer_names import widths_in_vllm
from .routed_experts import V1Recorder
from .text_models import register_text_model

if TYPE_CHECKING:
    from torch import nn

MODEL_RUNNERS = {
    "v1": ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.cpu_model_runner"),
    "v2": ("vllm.v1.worker.gpu.model_runner",),
}
"""The modules of vLLM's model runners."""

logger = logging.getLogger("rankup")


def is_installed() -> bool:
    """Whether either distribution of vLLM is installed."""
    try:
        vllm_version()
    except ValueError:
        return False
    return True


def use_separate_cache(local_rank: int) -> None:
    """Give a worker, but for the first of a machine, a folder of its own for what vLLM compiles. Before vLLM is imported.

    vLLM writes the list of its compiled graphs in place, and under the same name in every process that is not part of a tensor
    parallel group: a worker could read the half that another has written. The caches of Triton, Inductor and FlashInfer need
    nothing: they rename complete files, or lock.
    """
    if local_rank == 0:
        return
    of_user = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "vllm")
    root = Path(os.environ.get("VLLM_CACHE_ROOT", of_user)).expanduser()
    os.environ["VLLM_CACHE_ROOT"] = str(root / f"worker_{local_rank}")


def import_vllm() -> ModuleType:
    """Import vLLM with its engine in this process, and only errors in its log.

    vLLM offers no arguments for these, only environment variables. They are set here and in `choose_model_runner` and nowhere
    else; here unless the caller's environment has them already.

    Raises:
        ValueError: vLLM is not installed, or the environment puts its engine into another process.
    """
    version = vllm_version()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise ValueError(
            "rankup shares memory with vLLM's engine: unset VLLM_ENABLE_V1_MULTIPROCESSING, or set it to 0"
        )
    import vllm

    if not version.startswith(TESTED_VERSIONS):
        logger.warning("vLLM %s is untested; %s", version, working_versions())
    return vllm


def choose_model_runner(runner: Literal["v1", "v2"], *, on_cpu: bool) -> None:
    """Choose the model runner of the engines that are started from now on, whatever the environment says.

    vLLM itself would choose V2 on CUDA. With V1 on both devices, tests on one say something about the other.

    Raises:
        ValueError: there is no such runner on this device.
    """
    from vllm import envs

    if on_cpu and runner == "v2":
        raise ValueError("rollout.model_runner: v2 needs a GPU, as it samples with Triton kernels: use v1 on CPU")
    require(envs, "disable_envs_cache", purpose="choose the model runner")()  # an earlier engine has enabled it
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if runner == "v2" else "0"


def check_model_runner(engine: Any, runner: Literal["v1", "v2"]) -> None:
    """Whether an engine has the model runner that was chosen. vLLM deprecates V1.

    Raises:
        ValueError: it has another one.
    """
    owner = engine
    for name in ("model_executor", "driver_worker", "worker", "model_runner"):
        owner = require(owner, name, purpose="choose the model runner")
    module = type(owner).__module__
    if module not in MODEL_RUNNERS[runner]:
        raise ValueError(
            f"vLLM {vllm_version()} started with {module}, although rollout.model_runner is {runner}; {working_versions()}"
        )


@contextmanager
def lora_wrapper_replaced(qualname: str | None) -> Iterator[None]:
    """Replace the class that multiplies with adapters (`qualname`, an import path) in engines built within this context.

    The choice is a method of vLLM's platform class, not an argument of the engine. The method is restored afterwards; an engine
    keeps the class that it was built with. None: vLLM's class.
    """
    if qualname is None:
        yield
        return
    from vllm.platforms import current_platform

    platform_class = type(current_platform)
    replaceable(platform_class, "get_punica_wrapper", (), purpose="choose how adapters are multiplied")
    original = vars(platform_class).get("get_punica_wrapper")  # the classmethod object; None: inherited, as on CUDA
    platform_class.get_punica_wrapper = classmethod(lambda cls: qualname)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        if original is None:
            del platform_class.get_punica_wrapper
        else:
            platform_class.get_punica_wrapper = original


@contextmanager
def lora_slices_joined(model_path: str) -> Iterator[None]:
    """Within it, engines are built with one pair of LoRA buffers for each of transformers' projections."""
    from vllm.lora.model_manager import LoRAModelManager

    original = replaceable(LoRAModelManager, "_create_lora_modules", ("self",), purpose="arrange LoRA buffers")

    def create(self: LoRAModelManager) -> None:
        original(self)
        purpose = "arrange LoRA buffers"
        layers, packed = (require(self, name, purpose=purpose) for name in ("modules", "packed_modules_mapping"))
        lora_slices.join_slices(layers, packed, lambda: widths_in_vllm(self.model, model_path))

    LoRAModelManager._create_lora_modules = create
    try:
        yield
    finally:
        LoRAModelManager._create_lora_modules = original


@contextmanager
def transformers_classes_unchanged() -> Iterator[None]:
    """Leave transformers' classes as they are in engines built within this context.

    For models that vLLM has no code for (SmolLM3, OLMo 3, Seed-OSS) it takes transformers', and marks the decoder's class for
    compilation: no model of that class can then be made without vLLM's configuration. Its CUDA graphs do not depend on it.
    """
    from vllm.model_executor.models.transformers.base import Base

    original = replaceable(Base, "_decorate_for_torch_compile", ("self",), purpose="serve models by transformers' code")
    Base._decorate_for_torch_compile = lambda self: None
    try:
        yield
    finally:
        Base._decorate_for_torch_compile = original


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """Let engines built within this context rotate positions exactly, and compute experts, on CPU."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as experts
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    parameters = ("self", "positions", "query", "key")
    rotary = replaceable(RotaryEmbedding, "forward_cpu", parameters, purpose="rotate positions")
    name = "select_unquantized_moe_backend"  # as this module has imported it
    select = replaceable(experts, name, ("moe_config",), purpose="compute experts")
    RotaryEmbedding.forward_cpu = cpu_ops.flat_rotary(rotary)
    setattr(experts, name, lambda moe_config: select(dataclasses.replace(moe_config, is_lora_enabled=False)))
    try:
        yield
    finally:
        RotaryEmbedding.forward_cpu = rotary
        setattr(experts, name, select)


@contextmanager
def experts_returned_by_v1() -> Iterator[None]:
    """Let engines with the model runner V1 be built that return experts; see `record_experts`. vLLM requires V2 for it."""
    from vllm.config import VllmConfig

    name = "_verify_aux_output_compatibility"
    original = replaceable(VllmConfig, name, ("self",), purpose="return the experts that it chose")
    setattr(VllmConfig, name, lambda self: None)
    try:
        yield
    finally:
        setattr(VllmConfig, name, original)


def record_experts(engine: Any) -> V1Recorder:
    """Let this engine, which has the model runner V1, return the experts that its routers choose.

    Raises:
        ValueError: the installed vLLM lacks something, or cannot record the routers of this model.
    """
    from vllm.distributed.aux_output_connector import worker

    purpose = "return the experts that it chose"
    runner = engine
    for name in ("model_executor", "driver_worker", "worker", "model_runner"):
        runner = require(runner, name, purpose=purpose)
    replaceable(runner, "execute_model", ("scheduler_output", "intermediate_tensors"), purpose=purpose)
    replaceable(runner, "sample_tokens", ("grammar_output",), purpose=purpose)
    make = require(worker, "get_aux_output_connector", purpose=purpose)
    parts = {name: require(runner, name, purpose=purpose) for name in ("model", "vllm_config", "kv_cache_config")}
    return V1Recorder(runner, make(**parts))


@contextmanager
def replaced_in_new_engines(lora_wrapper: str | None, model_path: str, *, on_cpu: bool) -> Iterator[None]:
    """All replacements that engines need while they are built: see the functions above."""
    register_text_model(model_path)
    with ExitStack() as stack:
        stack.enter_context(lora_wrapper_replaced(lora_wrapper))
        stack.enter_context(lora_slices_joined(model_path))
        stack.enter_context(transformers_classes_unchanged())
        if on_cpu:
            stack.enter_context(cpu_kernels())
            stack.enter_context(experts_returned_by_v1())
        yield


@contextmanager
def existing_objects_frozen() -> Iterator[None]:
    """Collect garbage once, then exclude what exists from the collections of a start. vLLM collects three times meanwhile.

    vLLM freezes all objects too once an engine is built, and unfreezes them when it is shut down.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    except BaseException:
        gc.unfreeze()  # what a failed start leaves behind must not stay in memory
        raise


@contextmanager
def collections_skipped() -> Iterator[None]:
    """Ignore requests to collect garbage. vLLM collects while it shuts down, but its engine is garbage only afterwards."""
    original, gc.collect = gc.collect, lambda generation=2: 0
    try:
        yield
    finally:
        gc.collect = original


def cpu_norms() -> dict[str, list[str]]:
    """Register vLLM's kernels for norms on CPU too (`vllm.ir`); returns the engine argument that selects them."""
    import_vllm()
    import torch
    from vllm import ir
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    provider = "rankup_cpu"
    for name, function, takes in (
        ("rms_norm", cpu_ops.rms_norm, cpu_ops.takes_rms_norm),
        ("fused_add_rms_norm", cpu_ops.fused_add_rms_norm, cpu_ops.takes_fused_add_rms_norm),
    ):
        op = require(ir.ops, name, purpose="select kernels for norms")
        require(torch.ops._C, name, purpose="compute norms")
        if provider not in op.impls:
            op.register_impl(provider, supports_args=takes, inplace=name.startswith("fused"))(function)
    return {"rms_norm": [provider], "fused_add_rms_norm": [provider]}


def replace_sampler(engine: Any, *, on_cpu: bool) -> None:
    """Let this engine sample tokens with `cpu_ops.sample`, or else with `cuda_ops.sample`.

    Raises:
        ValueError: the engine's sampler is elsewhere or has other parameters.
    """
    purpose = "choose how tokens are sampled"
    owner = engine
    for name in ("model_executor", "driver_worker", "worker", "model_runner", "sampler", "topk_topp_sampler"):
        owner = require(owner, name, purpose=purpose)
    assert owner.logprobs_mode == "processed_logprobs", "`sample` returns the log-probabilities that it sampled from"
    replaceable(owner, "forward", ("logits", "generators", "k", "p"), purpose=purpose)
    owner.forward = cpu_ops.sample if on_cpu else cuda_ops.sample


def replace_cpu_layers(model: nn.Module) -> None:
    """Let adapted linear layers compute with `cpu_ops.dense_apply`. This moves their LoRA buffers: find slots afterwards."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers import linear

    # A subclass that a model defines may do more than multiply, so it is left alone.
    known = {
        require(linear, name, purpose="recognize its linear layers")
        for name in ("QKVParallelLinear", "MergedColumnParallelLinear", "ColumnParallelLinear", "RowParallelLinear")
    }
    for layer in model.modules():
        if isinstance(layer, BaseLinearLayerWithLoRA) and type(layer.base_layer) in known and layer.tp_size == 1:
            replaceable(layer, "apply", ("x", "bias"), purpose="compute adapted layers")
            layer.apply = cpu_ops.dense_apply(layer)


@contextmanager
def usage_counted_anew(allocator: Any) -> Iterator[None]:
    """Let vLLM's memory pool count within this context only what is allocated in it. It asserts that it is empty at a start.

    See `kv_cache.beside_earlier_pools`.
    """
    replaceable(allocator, "get_current_usage", (), purpose="start a second engine")
    allocations = require(allocator, "pointer_to_data", purpose="start a second engine")
    earlier = list(allocations.values())  # some are freed meanwhile
    allocator.get_current_usage = lambda: sum(
        data.handle[1] for data in allocations.values() if not any(data is one for one in earlier)
    )
    try:
        yield
    finally:
        del allocator.get_current_usage


def forget_lora_pointers() -> None:
    """Clear the tables in which vLLM's LoRA kernels keep strides and addresses of buffers, by the buffers' addresses.

    vLLM never clears them. An engine that is started later, at the same addresses but with other shapes, would compute with the
    strides of this one; and the tables keep buffers in memory.
    """
    from vllm.lora.ops.triton_ops import utils

    for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        require(utils, name, purpose="close an engine").clear()


def keep_linear_weights(model: nn.Module) -> None:
    """Keep linear weights in their original layout. To be called after loading, before vLLM processes the weights.

    On CPU vLLM repacks weights for oneDNN and drops the originals. It skips layers with this mark, which it sets itself for a
    layer whose weight is read elsewhere (`kv_b_proj`); they multiply with torch. On other devices the mark has no effect.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    for layer in model.modules():
        if isinstance(layer, LinearBase) and isinstance(layer.quant_method, UnquantizedLinearMethod):
            layer._cpu_skip_gemm_dispatch = True  # type: ignore[assignment]
