# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Transformers' own vision-language models, unchanged, with their processors."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)

from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.models.callable_model.checks import check_positions
from vllm.model_executor.models.callable_model.mrope import (
    PositionsOfSeveralAxes,
    check_types,
)
from vllm.model_executor.models.callable_model.multimodal import rows_of
from vllm.multimodal.modality import Modality
from vllm.multimodal.transformers_modality import images_of_processor
from vllm.transformers_utils.config import uses_mrope

GREEDY = SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
VIDEO, IMAGE = 126, 127
SIDE = 16
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word `t<i>`; the last ones are `<video>` and `<image>`."""
    vocab = {f"t{i}": i for i in range(VIDEO)} | {"<video>": VIDEO, "<image>": IMAGE}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
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
    text = LlamaConfig(**TEXT)
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
    inputs = processor()(text=text, images=shown, return_tensors="pt")
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    check(output, model, pixel_values=inputs["pixel_values"])


def check(output, model, **inputs) -> None:
    """Greedy tokens and their log-probs are those of the model by itself.

    Args:
        output: Of an engine.
        model: Takes `input_ids`, and tensors.
        **inputs: Tensors, or functions of `input_ids`.

    """
    tokens = list(output.outputs[0].token_ids)
    ids = torch.tensor([output.prompt_token_ids + tokens])
    given = {key: one(ids) if callable(one) else one for key, one in inputs.items()}
    with torch.no_grad():
        logits = model(input_ids=ids, **given).logits[0]
    expected = logits.log_softmax(-1)[-len(tokens) - 1 : -1]
    assert tokens == expected.argmax(-1).tolist()
    steps = zip(output.outputs[0].logprobs, tokens, strict=True)
    served = torch.tensor([step[token].logprob for step, token in steps])
    torch.testing.assert_close(served, expected.amax(-1), atol=1e-4, rtol=0)


def qwen_vl_config(rope: dict) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | rope},
        vision_config={
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "depth": 1,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


MROPE = {"mrope_section": [4, 6, 6]}


def qwen3_vl_config() -> Qwen3VLConfig:
    """The first two of three decoder layers add features of an image."""
    text = qwen_vl_config({"mrope_section": [6, 5, 5]}).text_config.to_dict()
    del text["model_type"], text["layer_types"]
    return Qwen3VLConfig(
        text_config=text | {"num_hidden_layers": 3, "head_dim": 32},
        vision_config={
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "depth": 3,
            "num_heads": 2,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.3,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        architectures=["Qwen3VLForConditionalGeneration"],
    )


CHUNKS, COMPILED = {"max_num_batched_tokens": 16}, {"enforce_eager": False}
QWENS = {
    "2.5": (Qwen2_5_VLForConditionalGeneration, lambda: qwen_vl_config(MROPE)),
    "3": (Qwen3VLForConditionalGeneration, qwen3_vl_config),
}


@pytest.mark.parametrize(
    ("rope", "multimodal", "method", "found"),
    [
        (MROPE, False, None, "mrope_section"),
        ({}, True, "get_rope_index", "get_rope_index"),  # vLLM would not ask
        ({}, False, "get_rope_index", None),  # of text alone, all axes are equal
    ],
)
def test_positions_of_several_axes_are_refused(rope, multimodal, method, found):
    config = qwen_vl_config(rope)
    with torch.device("meta"):
        module = Qwen2_5_VLForConditionalGeneration(config)
    if method is None:
        module = module.model.language_model
    model_config = SimpleNamespace(
        uses_mrope=uses_mrope(config), is_multimodal_model=multimodal
    )
    expected = (
        nullcontext() if found is None else pytest.raises(ValueError, match=found)
    )
    with expected:
        assert not check_positions("Qwen2_5_VL", module, model_config)
    module.supports_mrope = True
    module.get_mrope_input_positions = lambda tokens, features: None
    assert check_positions("Qwen2_5_VL", module, model_config)


def test_kinds_that_get_rope_index_does_not_know_are_refused():
    check_types("Qwen", torch.nn.Identity(), ["image", "video"])
    with pytest.raises(ValueError, match="positions of audio; expected image or video"):
        check_types("Qwen", torch.nn.Identity(), ["image", "audio"])


def patches(image: Image.Image) -> dict[str, torch.Tensor]:
    """As Qwen's processor makes them, which without torchvision cannot be built."""
    size = {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
    processor = Qwen2VLImageProcessorPil(patch_size=4, size=size)
    return dict(processor(image, return_tensors="pt"))


def merged_patches(tensors: Mapping[str, torch.Tensor]) -> int:
    return int(tensors["image_grid_thw"].prod()) // 4


QWEN_IMAGES = Modality(
    "image",
    placeholder="<image>",
    process=patches,
    num_tokens=merged_patches,
    largest=lambda: Image.new("RGB", (2 * SIDE, 2 * SIDE)),
)


def saved(
    model_cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    folder: Path,
    multimodal: Any,
    seed: int = 0,
) -> PreTrainedModel:
    """A model of random weights in `folder`, which is registered by a lambda."""
    torch.manual_seed(seed)
    model = model_cls(config).eval()
    model.config.architectures = [model_cls.__name__]
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    ModelRegistry.register_model(
        model_cls.__name__,
        lambda vllm_config, context: model_cls(vllm_config.model_config.hf_config),
        multimodal=multimodal,
    )
    return model


def types_of(ids: torch.Tensor) -> torch.Tensor:
    """As Transformers numbers them: text, images, videos."""
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("version", "options"),
    [
        pytest.param("2.5", {}, id="2.5"),
        pytest.param("2.5", CHUNKS, id="2.5-chunks"),
        pytest.param("2.5", COMPILED, id="2.5-compiled", marks=pytest.mark.slow),
        pytest.param("3", {}, id="3", marks=pytest.mark.slow),
        pytest.param("3", CHUNKS, id="3-chunks"),
        pytest.param("3", CHUNKS | COMPILED, id="3-chunks-compiled"),
    ],
)
def test_qwen_vl_by_a_lambda(tmp_path, start, version, options):
    """Tokens of an image have positions of three axes, as the module computes them.

    In the newer one decoder layers add features of the image, too.
    """
    model_cls, config = QWENS[version]
    model = saved(model_cls, config(), tmp_path, QWEN_IMAGES)
    llm = start(model=str(tmp_path), skip_tokenizer_init=False, **options)
    compiles = not options.get("enforce_eager", True)
    assert llm.apply_model(lambda m: m.do_not_compile) == [not compiles]
    # Grids of 2 x 2, of 4 x 2 and of 2 x 4 tokens, and a prompt of text alone.
    shown = [Image.new("RGB", size, "red") for size in ((16, 16), (16, 32), (32, 16))]
    prompts = [
        {
            "prompt": "t1 <image> t5 t6 <image> t7 <image> t8 t9",
            "multi_modal_data": {"image": shown},
        },
        {"prompt": "t3 t4 t5"},
    ]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    made = [patches(image) for image in shown]
    images = {key: torch.cat([one[key] for one in made]) for key in made[0]}
    for output, inputs in zip(outputs, [images, {}], strict=True):
        assert output.prompt_token_ids.count(IMAGE) == (4 + 8 + 8 if inputs else 0)
        check(output, model, mm_token_type_ids=types_of, **inputs)


def video_patches(video: np.ndarray) -> dict[str, torch.Tensor]:
    """Two frames of 4 x 4 pixels each, in the order in which 2 x 2 are merged."""
    frames, height, width, _ = video.shape
    grid = (frames // 2, height // 4, width // 4)
    pixels = torch.from_numpy(video).float() / 255  # [frames, height, width, 3]
    # [t, 2, h / 2, 2, 4, w / 2, 2, 4, 3] -> [patches, 3 x 2 x 4 x 4]
    parts = pixels.view(grid[0], 2, grid[1] // 2, 2, 4, grid[2] // 2, 2, 4, 3)
    rows = parts.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).flatten(5).flatten(0, 4)
    return {"pixel_values_videos": rows, "video_grid_thw": torch.tensor(grid)[None]}


QWEN_VIDEOS = Modality(
    "video",
    placeholder="<video>",
    process=video_patches,
    num_tokens=lambda tensors: int(tensors["video_grid_thw"].prod()) // 4,
    largest=lambda: np.zeros((2, SIDE, SIDE, 3), dtype=np.uint8),
)


@pytest.mark.engine
@pytest.mark.parametrize("version", ["2.5", pytest.param("3", marks=pytest.mark.slow)])
def test_a_video_beside_an_image(tmp_path, start, version):
    """The newer Qwen has text between any two frames, which says when they are."""
    model_cls, config = QWENS[version]
    model = saved(model_cls, config(), tmp_path, [QWEN_IMAGES, QWEN_VIDEOS])
    llm = start(model=str(tmp_path), skip_tokenizer_init=False, **CHUNKS)
    video = np.random.default_rng(0).integers(0, 256, (4, 8, 16, 3), dtype=np.uint8)
    image = Image.new("RGB", (16, 32), "red")
    clips = {"2.5": [video], "3": [video[:2], video[2:]]}[version]
    (output,) = llm.generate(
        {
            "prompt": f"t1 {'t8 <video>' * len(clips)} t5 t6 <image> t7",
            "multi_modal_data": {"image": image, "video": clips},
        },
        GREEDY,
        use_tqdm=False,
    )
    assert output.prompt_token_ids.count(VIDEO) == 4
    inputs = patches(image) | video_patches(video)
    check(output, model, mm_token_type_ids=types_of, **inputs)


MELS, FRAMES = 4, 16


def spectra(samples: np.ndarray) -> dict[str, torch.Tensor]:
    """Any numbers, as many as Voxtral takes at a time: `[chunks, mels, frames]`."""
    return {"input_features": torch.from_numpy(samples).float().view(-1, MELS, FRAMES)}


@pytest.mark.engine
def test_voxtral_by_a_lambda(tmp_path, start):
    """Sounds of several lengths."""
    config = VoxtralConfig(
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_mel_bins": MELS,
            "max_source_positions": FRAMES // 2,
            "initializer_range": 0.3,
        },
        text_config={"model_type": "llama"} | TEXT,
        audio_token_id=IMAGE,
        architectures=["VoxtralForConditionalGeneration"],
    )
    chunk = MELS * FRAMES
    sounds = Modality(
        "audio",
        placeholder=IMAGE,
        process=spectra,
        num_tokens=lambda tensors: 2 * len(tensors["input_features"]),
        largest=lambda: np.zeros(3 * chunk, dtype=np.float32),
    )
    # With this seed its answer has no token of sound.
    model = saved(VoxtralForConditionalGeneration, config, tmp_path, sounds, seed=1)
    llm = start(model=str(tmp_path), skip_tokenizer_init=False)
    random = np.random.default_rng(0)
    played = [random.standard_normal(n * chunk).astype(np.float32) for n in (1, 3)]
    (output,) = llm.generate(
        {
            "prompt_token_ids": [1, IMAGE, 5, 6, IMAGE, 7],
            "multi_modal_data": {"audio": played},
        },
        GREEDY,
        use_tqdm=False,
    )
    assert output.prompt_token_ids.count(IMAGE) == 2 + 6
    heard = torch.cat([spectra(sound)["input_features"] for sound in played])
    check(output, model, input_features=heard)


def test_positions_of_the_largest_input_are_tried():
    with torch.device("meta"):
        module = Qwen3VLForConditionalGeneration(qwen3_vl_config())
    asked = PositionsOfSeveralAxes()
    asked.module = module
    for frames in (2, 4):
        tensors = video_patches(np.zeros((frames, SIDE, SIDE, 3), dtype=np.uint8))
        one_pair = frames == 2
        why = r"8 tokens of one video, .*'video_grid_thw': \[1, 3\].*every two frames"
        with nullcontext() if one_pair else pytest.raises(ValueError, match=why):
            asked.try_positions("video", 2 * frames, tensors)


def test_features_that_no_layer_adds_are_refused():
    rows = torch.zeros(1, 4, 8)  # [images, tokens, hidden]
    features = SimpleNamespace(pooler_output=rows, deepstack_features=None)
    assert rows_of(features).shape == (4, 8)
    level = torch.ones(4, 8)
    features.deepstack_features = [level, [2 * level]]
    assert rows_of(features, 2)[0].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    with pytest.raises(TypeError, match="of 2 layers; expected as many .* add them: 0"):
        rows_of(features)
    features.deepstack_features = [(3, [level]), (5, [level])]  # Granite's form
    with pytest.raises(TypeError, match="deepstack_features of 2 layers"):
        rows_of(features, 2)
