# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A registered model that takes images."""

import image_model
import pytest
import torch
from image_model import IMAGE, drawing, log_probs

from vllm import ModelRegistry, SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)


@pytest.fixture
def model_dir(tmp_path):
    return image_model.save_model(tmp_path)


def check(llm, prompts):
    """Served tokens and their log-probs, against the module by itself."""
    model = image_model.trained()
    outputs = llm.generate(
        [
            {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
            if images
            else {"prompt_token_ids": ids}
            for ids, images in prompts
        ],
        GREEDY,
    )
    for (_, images), output in zip(prompts, outputs, strict=True):
        prompt = list(output.prompt_token_ids)
        tokens = list(output.outputs[0].token_ids)
        expected = log_probs(model, prompt + tokens, images)[len(prompt) - 1 : -1]
        assert tokens == expected.argmax(-1).tolist()
        steps = zip(output.outputs[0].logprobs, tokens, strict=True)
        served = torch.tensor([step[token].logprob for step, token in steps])
        torch.testing.assert_close(
            served,
            expected.gather(1, torch.tensor(tokens)[:, None])[:, 0],
            atol=1e-4,
            rtol=0,
        )
    return outputs


@pytest.mark.engine
def test_images_of_several_sizes_in_other_processes(start):
    ModelRegistry.register_model(
        "ImageModel", lambda *_: image_model.ImageModel(), multimodal=image_model.IMAGES
    )
    llm = start(processes=True)
    prompts = [
        ([1, IMAGE, 5], [drawing(0)]),
        ([1, 2, 3], []),
        ([7, IMAGE, 9, IMAGE, 4], [drawing(1, 1, 3), drawing(2, 3, 4)]),
    ]
    check(llm, prompts)
