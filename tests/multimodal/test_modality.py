# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A registered model that takes images."""

import asyncio
import dataclasses

import image_model
import pytest
import torch
from image_model import IMAGE, IMAGES, MAX_PATCHES, ImageModel, drawing, log_probs
from PIL import Image
from torch import nn

from vllm import AsyncEngineArgs, ModelRegistry, SamplingParams
from vllm.config import ModelConfig
from vllm.distributed.weight_sync import WeightSync
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.callable_model.checks import check_takes_embeddings
from vllm.model_executor.models.callable_model.multimodal import check_embeds
from vllm.multimodal.modality import Modality
from vllm.v1.engine.async_llm import AsyncLLM

GREEDY = SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
TOLERANCE = 1e-4


@pytest.fixture
def model_dir(tmp_path):
    return image_model.save_model(tmp_path)


def register(multimodal=IMAGES, build=lambda vllm_config, context: ImageModel()):
    ModelRegistry.register_model("ImageModel", build, multimodal=multimodal)


def serve(llm, prompts, model=None):
    """Outputs, of which tokens and log-probs are those of the module by itself."""
    model = model or image_model.trained()
    outputs = llm.generate(
        [
            {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
            if images
            else {"prompt_token_ids": ids}
            for ids, images in prompts
        ],
        GREEDY,
        use_tqdm=False,
    )
    for (_, images), output in zip(prompts, outputs, strict=True):
        prompt = list(output.prompt_token_ids)
        tokens = list(output.outputs[0].token_ids)
        own = log_probs(model, prompt + tokens, images)[len(prompt) - 1 : -1]
        assert tokens == own.argmax(-1).tolist()
        steps = zip(output.outputs[0].logprobs, tokens, strict=True)
        served = torch.tensor([step[token].logprob for step, token in steps])
        torch.testing.assert_close(served, own.amax(-1), atol=TOLERANCE, rtol=0)
    return outputs


def other_eyes():
    model = image_model.trained()
    with torch.no_grad():
        for parameter in model.eyes.parameters():
            parameter.neg_()
    return model


PROMPTS = [
    ([1, IMAGE, 5], [drawing(0)]),
    ([1, 2, 3], []),
    ([7, IMAGE, 9, IMAGE, 4], [drawing(1, 1, 3), drawing(2, 4, 6)]),
    ([*range(30), IMAGE, IMAGE], [drawing(3, 2, 5), drawing(0)]),
]


@pytest.mark.engine
@pytest.mark.parametrize("size", [1, 2])
def test_images_in_other_processes(start, size):
    """Several in a prompt and of several sizes, in chunks smaller than an image."""
    register()
    llm = start(
        processes=True,
        tensor_parallel_size=size,
        max_num_batched_tokens=16,
        max_num_seqs=4,
    )
    outputs = serve(llm, PROMPTS)
    assert [len(output.prompt_token_ids) for output in outputs] == [6, 3, 30, 44]


@pytest.mark.engine
def test_images_are_embedded_once_and_tell_prefixes_apart(start):
    register(dataclasses.replace(IMAGES, limit=2))
    llm = start(block_size=32, enable_prefix_caching=True)
    ImageModel.seen = 0
    first = [(list(range(40)) + [IMAGE] + list(range(40)), [drawing(4, 4, 4)])]
    other = [(first[0][0], [drawing(5, 4, 4)])]
    serve(llm, first)
    assert ImageModel.seen == 1
    (again,) = serve(llm, first)
    assert again.num_cached_tokens == 64
    assert ImageModel.seen == 1
    (differs,) = serve(llm, other)
    assert differs.num_cached_tokens == 32  # those before the image
    assert ImageModel.seen == 2

    def refused(sentence, ids, images):
        with pytest.raises((ValueError, VLLMValidationError), match=sentence):
            serve(llm, [(ids, images)])

    refused("At most 2 image", [IMAGE] * 3, [drawing(0)] * 3)
    refused(
        rf"becomes {MAX_PATCHES + 1} tokens, and the largest that the model was",
        [IMAGE],
        [drawing(0, 1, MAX_PATCHES + 1)],
    )
    refused("expected 2 placeholders", [1, IMAGE, 2], [drawing(0), drawing(1)])


@pytest.mark.engine
def test_an_update_of_the_eyes_reaches_images_that_were_seen_before(start):
    register()
    llm = start()
    serve(llm, PROMPTS)
    model = other_eyes()
    sync = WeightSync(model, llm)
    sync.update()
    sync.close()
    serve(llm, PROMPTS, model)


@pytest.mark.engine
def test_a_running_request_sees_its_image_anew(model_dir):
    """Each token is of one version, and so is the image that it is computed from."""
    register()
    model = other_eyes()

    async def run():
        options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}
        options |= {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 24}
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(str(model_dir), **options))
        sync = WeightSync(model, engine, mode="keep", timeout=60)
        params = SamplingParams(
            temperature=0, max_tokens=80, ignore_eos=True, detokenize=False
        )
        ids, images = PROMPTS[0]
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
        update = None
        async for output in engine.generate(prompt, params, request_id="0"):
            if update is None and len(output.outputs[0].token_ids) >= 5:
                update = asyncio.create_task(asyncio.to_thread(sync.update))
        await update
        sync.close()
        engine.shutdown()
        return output

    output = asyncio.run(run())
    prompt = list(output.prompt_token_ids)
    tokens = torch.tensor(output.outputs[0].token_ids)
    spans = output.outputs[0].weight_versions
    assert [span.version for span in spans] == ["default", "1"]
    first, images = spans[0].end, PROMPTS[0][1]
    assert 5 <= first < 80
    for of, part in (
        (image_model.trained(), slice(first)),
        (model, slice(first, None)),
    ):
        own = log_probs(of, prompt + tokens.tolist(), images)[len(prompt) - 1 : -1]
        assert torch.equal(tokens[part], own.argmax(-1)[part])


class WithoutEyes(nn.Module):
    def forward(self, input_ids, positions): ...


class WithFewerTokens(ImageModel):
    def embed_multimodal(self, pixels):
        return [rows[1:] for rows in super().embed_multimodal(pixels)]


@pytest.mark.engine
def test_embeddings_that_are_not_what_was_said(start):
    register(build=lambda vllm_config, context: WithFewerTokens())
    with pytest.raises(ValueError) as raised:
        start()
    assert (
        f"embedded one image as [[{MAX_PATCHES - 1}, 64]]; expected [[{MAX_PATCHES}, "
        "64]]" in str(raised.value)
    )


def test_what_a_module_lacks_is_named():
    module = WithoutEyes()
    with pytest.raises(TypeError, match=r"Add embed_multimodal\(self, \*\*tensors\)"):
        check_embeds("M", module, (IMAGES,))
    with pytest.raises(TypeError) as raised:
        check_takes_embeddings("M", module, frozenset(), "it has images")
    assert "embed_input_ids(self, input_ids)" in str(raised.value)
    assert "inputs_embeds=None to forward" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"name": "picture"}, ValueError),
        ({"placeholder": None}, TypeError),
        ({"process": 3}, TypeError),
        ({"num_tokens": 0}, ValueError),
        ({"num_tokens": "many"}, TypeError),
        ({"largest": Image.new("RGB", (8, 8))}, TypeError),
    ],
)
def test_what_is_said_is_checked(change, error):
    said = {
        field.name: getattr(IMAGES, field.name) for field in dataclasses.fields(IMAGES)
    }
    with pytest.raises(error, match=next(iter(change)).removesuffix("s")):
        Modality(**said | change)


@pytest.mark.parametrize("said", ["image", [IMAGES, "image"], [IMAGES, IMAGES]])
def test_what_is_registered_is_modalities(said):
    with pytest.raises((TypeError, ValueError), match="ImageModel: multimodal "):
        register(said)


@pytest.mark.parametrize(
    "process", [lambda image: image, lambda image: {"pixels": [1]}, lambda image: {}]
)
def test_what_process_returns_is_checked(process):
    with pytest.raises(TypeError, match="process of image returned"):
        dataclasses.replace(IMAGES, process=process).tensors(drawing(0))


@pytest.mark.parametrize("kind", ["whisper", "t5"])
def test_encoder_decoders_are_refused(tmp_path, kind):
    from transformers import T5Config, WhisperConfig

    config = WhisperConfig() if kind == "whisper" else T5Config()
    config.architectures = ["ImageModel"]
    config.save_pretrained(tmp_path)
    register()
    with pytest.raises(ValueError, match="ImageModel: .*encoder-decoder"):
        ModelConfig(str(tmp_path), skip_tokenizer_init=True)
