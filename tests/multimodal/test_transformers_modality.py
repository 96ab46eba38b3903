# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Transformers' own vision-language models, unchanged, with their processors."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from image_model import drawing
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.models.callable_model.checks import check_positions
from vllm.multimodal.transformers_modality import images_of_processor
from vllm.transformers_utils.config import uses_mrope

GREEDY = SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
IMAGE = 127
SIDE = 16


def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word `t<i>`, and the last one is `<image>`."""
    vocab = {f"t{i}": i for i in range(IMAGE)} | {"<image>": IMAGE}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, extra_special_tokens={"image_token": "<image>"}
    )


def processor() -> LlavaProcessor:
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def largest() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE))


@pytest.fixture
def llava(tmp_path):
    """A directory with a small LLaVA of random weights, and the model."""
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    eyes = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=4,
        projection_dim=32,
    )
    config = LlavaConfig(text_config=text, vision_config=eyes, image_token_index=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.save_pretrained(tmp_path / "llava")  # under its published names
    tokenizer().save_pretrained(tmp_path / "llava")
    return tmp_path / "llava", model


@pytest.mark.engine
def test_llava_by_a_lambda(llava, start):
    model_dir, model = llava
    images = images_of_processor(processor(), largest)
    ModelRegistry.register_model(
        "LlavaForConditionalGeneration",
        lambda vllm_config, context: LlavaForConditionalGeneration(
            vllm_config.model_config.hf_config
        ),
        multimodal=images,
    )
    llm = start(model=str(model_dir), skip_tokenizer_init=False, processes=True)
    shown = [drawing(0, 3, 3), drawing(1, 2, 4)]
    text = "t1 <image> t5 <image> t7"
    (output,) = llm.generate(
        {"prompt": text, "multi_modal_data": {"image": shown}}, GREEDY
    )
    tokens = list(output.outputs[0].token_ids)
    inputs = processor()(text=text, images=shown, return_tensors="pt")
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
    expected = logits.log_softmax(-1)[-len(tokens) - 1 : -1]
    assert tokens == expected.argmax(-1).tolist()
    steps = zip(output.outputs[0].logprobs, tokens, strict=True)
    served = torch.tensor([step[token].logprob for step, token in steps])
    torch.testing.assert_close(served, expected.amax(-1), atol=1e-4, rtol=0)


def qwen_vl_config(rope: dict) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 128,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | rope,
        },
        vision_config={
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "depth": 1,
            "num_heads": 2,
        },
        image_token_id=IMAGE,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


@pytest.mark.parametrize(
    ("rope", "multimodal", "found"),
    [
        ({"mrope_section": [4, 6, 6]}, False, "mrope_section"),
        ({}, True, "get_rope_index"),
        ({}, False, None),  # of text alone, all axes are equal
    ],
)
def test_positions_of_several_axes_are_refused(rope, multimodal, found):
    config = qwen_vl_config(rope)
    with torch.device("meta"):
        module = Qwen2_5_VLForConditionalGeneration(config)
    model_config = SimpleNamespace(
        uses_mrope=uses_mrope(config), is_multimodal_model=multimodal
    )
    expected = (
        nullcontext() if found is None else pytest.raises(ValueError, match=found)
    )
    with expected:
        check_positions("Qwen2_5_VL", module, model_config)
    module.supports_mrope = True
    module.get_mrope_input_positions = lambda tokens, features: None
    check_positions("Qwen2_5_VL", module, model_config)


@pytest.mark.engine
def test_a_qwen_vl_by_a_lambda_is_refused_at_start(llava, start):
    model_dir, _ = llava
    config = qwen_vl_config({"mrope_section": [4, 6, 6]})
    config.save_pretrained(model_dir)
    ModelRegistry.register_model(
        "Qwen2_5_VLForConditionalGeneration",
        lambda vllm_config, context: Qwen2_5_VLForConditionalGeneration(
            vllm_config.model_config.hf_config
        ),
        multimodal=images_of_processor(processor(), largest),
    )
    with pytest.raises(ValueError, match="M-RoPE.*SupportsMRoPE"):
        start(model=str(model_dir), skip_tokenizer_init=False)
