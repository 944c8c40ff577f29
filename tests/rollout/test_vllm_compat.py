"""The parts of vLLM that rankup needs exist in the installed version, and errors name missing ones."""

import gc
import importlib.util
import os
import types

import pytest

from rankup.rollout import vllm_compat


def test_an_error_names_the_missing_attribute_its_purpose_and_working_versions():
    owner = types.SimpleNamespace(present=1)
    assert vllm_compat.require(owner, "present", purpose="test") == 1
    with pytest.raises(
        ValueError, match=r"vLLM 0\.32\.\d+ has no SimpleNamespace\.lora_manager.*find the adapter.*0\.32\.\*"
    ):
        vllm_compat.require(owner, "lora_manager", purpose="find the adapter")


def test_a_function_with_other_parameters_is_not_replaced():
    owner = types.SimpleNamespace(forward=lambda logits, generators: None)
    assert vllm_compat.replaceable(owner, "forward", ("logits", "generators"), purpose="test") is owner.forward
    message = r"SimpleNamespace\.forward of vLLM 0\.32\.\d+ has the parameters .* to sample; versions that work"
    with pytest.raises(ValueError, match=message):
        vllm_compat.replaceable(owner, "forward", ("logits", "generators", "k", "p"), purpose="sample")


def test_the_installed_version_is_one_that_was_tested():
    assert vllm_compat.vllm_version().startswith(vllm_compat.TESTED_VERSIONS)


def test_an_engine_in_another_process_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="unset VLLM_ENABLE_V1_MULTIPROCESSING"):
        vllm_compat.import_vllm()


@pytest.mark.engine
def test_vllm_still_has_both_model_runners_and_their_switch(monkeypatch: pytest.MonkeyPatch):
    """If this fails, vLLM has removed the deprecated model runner V1: use V2 on CUDA (docs/log.md, 2026-11-30)."""
    vllm_compat.import_vllm()
    from vllm.config import VllmConfig

    for module in [*vllm_compat.MODEL_RUNNERS["v1"], *vllm_compat.MODEL_RUNNERS["v2"]]:
        assert importlib.util.find_spec(module) is not None, module
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    vllm_compat.choose_model_runner("v1", on_cpu=False)
    assert VllmConfig().use_v2_model_runner is False
    vllm_compat.choose_model_runner("v2", on_cpu=False)
    assert vllm_envs().VLLM_USE_V2_MODEL_RUNNER is True
    with pytest.raises(ValueError, match=r"rollout\.model_runner: v2 needs a GPU"):
        vllm_compat.choose_model_runner("v2", on_cpu=True)


def vllm_envs() -> types.ModuleType:
    from vllm import envs

    return envs


@pytest.mark.engine
def test_an_engine_has_the_model_runner_that_was_chosen(make_engine):
    engine = make_engine()._engine
    vllm_compat.check_model_runner(engine, "v1")
    with pytest.raises(ValueError, match=r"started with vllm\.v1\.worker\.cpu_model_runner, although .* is v2"):
        vllm_compat.check_model_runner(engine, "v2")


@pytest.mark.engine
def test_the_wrapper_is_replaced_only_while_an_engine_is_built():
    vllm_compat.import_vllm()
    from vllm.platforms import current_platform

    before = current_platform.get_punica_wrapper()
    with pytest.raises(RuntimeError, match="stop"), vllm_compat.lora_wrapper_replaced("some.where.Else"):
        assert current_platform.get_punica_wrapper() == "some.where.Else"
        raise RuntimeError("stop")
    assert current_platform.get_punica_wrapper() == before


def test_a_platform_that_inherits_its_wrapper_has_it_again_afterwards(monkeypatch):
    from vllm import platforms

    class Derived(type(platforms.current_platform)):
        """As on CUDA: the method is that of a base class."""

    monkeypatch.setattr(platforms, "_current_platform", Derived())
    with vllm_compat.lora_wrapper_replaced("some.where.Else"):
        assert platforms.current_platform.get_punica_wrapper() == "some.where.Else"
    assert "get_punica_wrapper" not in vars(Derived)
    assert platforms.current_platform.get_punica_wrapper() != "some.where.Else"


@pytest.mark.engine
def test_addresses_of_buffers_are_forgotten():
    vllm_compat.import_vllm()
    from vllm.lora.ops.triton_ops import utils

    utils._LORA_A_PTR_DICT[(1, 2)] = utils._LORA_B_PTR_DICT[(3,)] = ()
    vllm_compat.forget_lora_pointers()
    assert not utils._LORA_A_PTR_DICT and not utils._LORA_B_PTR_DICT


def test_a_memory_pool_counts_only_what_is_new_during_a_start():
    def data(size: int):
        return types.SimpleNamespace(handle=(0, size))

    class Allocator:
        def __init__(self) -> None:
            self.pointer_to_data = {1: data(5), 2: data(9)}

        def get_current_usage(self) -> int:
            return sum(one.handle[1] for one in self.pointer_to_data.values())

    allocator = Allocator()
    with vllm_compat.usage_counted_anew(allocator):
        assert allocator.get_current_usage() == 0
        del allocator.pointer_to_data[1]  # a view of the closed engine's weights
        assert allocator.get_current_usage() == 0
        allocator.pointer_to_data[1] = data(7)
        assert allocator.get_current_usage() == 7
    assert allocator.get_current_usage() == 16 and "get_current_usage" not in vars(allocator)


def test_collections_are_as_before_after_a_failed_start():
    collect = gc.collect
    with pytest.raises(RuntimeError, match="stop"), vllm_compat.existing_objects_frozen():
        assert gc.get_freeze_count() > 0
        with vllm_compat.collections_skipped():
            assert gc.collect() == 0 and gc.collect is not collect
            raise RuntimeError("stop")
    assert gc.get_freeze_count() == 0 and gc.collect is collect


@pytest.mark.parametrize(
    ("environment", "local_rank", "root"),
    [
        ({}, 0, None),
        ({}, 2, "~/.cache/vllm/worker_2"),
        ({"XDG_CACHE_HOME": "/cache"}, 1, "/cache/vllm/worker_1"),
        ({"VLLM_CACHE_ROOT": "/of/user"}, 1, "/of/user/worker_1"),
        ({"VLLM_CACHE_ROOT": "/of/user"}, 0, "/of/user"),
    ],
)
def test_workers_of_a_machine_have_caches_of_their_own(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], local_rank: int, root: str | None
) -> None:
    for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    vllm_compat.use_separate_cache(local_rank)
    assert os.environ.get("VLLM_CACHE_ROOT") == (root and os.path.expanduser(root))
