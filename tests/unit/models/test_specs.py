"""What is known of GPUs and models before anything is measured."""

import pytest

from pals_ray.models.specs import (
    GPUS,
    MODELS,
    Parallelism,
    SpecFileError,
    UnknownSpecError,
    find_gpu,
    find_model,
    read_table,
)


@pytest.mark.parametrize("name", sorted(GPUS))
def test_every_gpu_is_consistent_and_cites_a_source(name):
    gpu = GPUS[name]
    assert gpu.idle_bare_w <= gpu.idle_context_w < gpu.max_limit_w
    assert gpu.min_limit_w < gpu.default_limit_w <= gpu.max_limit_w
    assert 0 < gpu.min_sm_clock_mhz < gpu.max_sm_clock_mhz
    assert gpu.dense_fp8_flops_per_s >= gpu.dense_bf16_flops_per_s
    assert "datasheet" in gpu.source


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_cites_a_source_and_its_parts_add_up(name):
    model = MODELS[name]
    assert model.source
    assert model.shared_params + model.expert_params == pytest.approx(model.total_params)
    assert 0 < model.shared_params <= model.active_params <= model.total_params
    assert (model.active_params == model.total_params) == (not model.is_moe)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM"),
        ("b200", "B200"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
    ],
)
def test_gpus_are_found_by_the_names_that_nvml_gives(asked, found):
    assert find_gpu(asked).name == found


@pytest.mark.parametrize("asked", ["NVIDIA H100 PCIe", "RTX 4090", "NVIDIA RTX A6000", ""])
def test_an_unknown_gpu_is_refused_with_the_known_ones(asked):
    with pytest.raises(UnknownSpecError, match="H100-SXM"):
        find_gpu(asked)


def test_models_are_found_with_organisation_and_variant_and_fp8_only_when_asked():
    assert find_model("Qwen/Qwen3-30B-A3B-Instruct-2507").name == "Qwen3-30B-A3B"
    assert find_model("meta-llama/Llama-3.1-405B-Instruct-FP8").weight_bytes == 1.0
    assert find_model("meta-llama/Llama-3.1-405B-Instruct").weight_bytes == 2.0


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("openai-community/gpt2", "GPT-2"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7B"),
        ("mistralai/Mistral-7B-v0.1", "Mistral-7B"),
        ("allenai/OLMoE-1B-7B-0924", "OLMoE-1B-7B"),
        ("Qwen/Qwen1.5-MoE-A2.7B", "Qwen1.5-MoE-A2.7B"),
        ("deepseek-ai/deepseek-moe-16b-base", "DeepSeek-MoE-16B"),
        ("microsoft/Phi-3.5-MoE-instruct", "Phi-3.5-MoE"),
        ("mistralai/Mixtral-8x7B-v0.1", "Mixtral-8x7B"),
    ],
)
def test_every_model_of_pals_is_known_by_its_published_name(asked, found):
    assert find_model(asked).name == found


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(UnknownSpecError, match="Mixtral-8x7B"):
        find_model("gpt-5")


def test_a_group_has_as_many_gpus_as_its_wider_parallelism():
    assert Parallelism(4, 1).num_gpus == 4
    assert Parallelism(1, 8).num_gpus == 8


def test_a_row_with_a_missing_or_unknown_key_is_refused_naming_file_and_row():
    with pytest.raises(SpecFileError, match=r"gpus\.json, row 1 \(V100-SXM2\): .*colour"):
        read_table("gpus.json", lambda colour, **row: row)
    with pytest.raises(SpecFileError, match=r"gpus\.json, row 1 \(V100-SXM2\): .*unexpected keyword argument"):
        read_table("gpus.json", lambda name: name)
