"""The image pipelines before training: stock parts, the promised sizes, and text that reaches the denoiser whole."""

from __future__ import annotations

import pytest
import torch

from dit_accel.shapes.recipes import sd3, sd15
from dit_accel.shapes.recipes.image_vae import LATENT_CHANNELS, SHRINK, build_image_vae
from dit_accel.shapes.recipes.text import (
    CLIP_LENGTH,
    build_clip_projection_encoder,
    build_clip_tokenizer,
    build_t5_tokenizer,
    build_umt5_encoder,
)
from dit_accel.shapes.world import ObjectWords, SceneWords, grammar_words

RECIPES = {"sd3": sd3, "sd15": sd15}
PROMPT = "a small striped red circle and a blue square on a gradient black background"


@pytest.fixture(scope="module", params=RECIPES)
def pipe(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    made = RECIPES[request.param].build_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def sample(pipe):
    noise = torch.Generator().manual_seed(0)
    return pipe(PROMPT, height=64, width=48, num_inference_steps=2, generator=noise, output_type="pt").images


def denoiser(pipe):
    return pipe.components.get("transformer") or pipe.unet


def test_a_saved_folder_is_a_stock_pipeline_that_paints_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    image = sample(loaded)
    assert image.shape == (1, 3, 64, 48)
    assert torch.equal(image, sample(pipe))
    assert not [name for name, part in loaded.components.items() if type(part).__module__.startswith("dit_accel")]


def test_default_images_have_as_many_tokens_as_promised():
    attended = {}

    def note(name):
        def hook(_module, arguments, keywords):
            attended[name] = keywords.get("hidden_states", arguments[0] if arguments else None).shape[1]

        return hook

    transformer, unet = sd3.build_transformer(), sd15.build_unet()
    transformer.transformer_blocks[0].register_forward_pre_hook(note("sd3"), with_kwargs=True)
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.register_forward_pre_hook(
        note("sd15"), with_kwargs=True
    )
    latents = torch.zeros(1, LATENT_CHANNELS, transformer.config.sample_size, unet.config.sample_size)
    with torch.no_grad():
        text = torch.zeros(1, 8, 128)
        transformer(latents, text, text[:, 0], timestep=torch.ones(1))
        unet(latents, 1, text)
    assert attended == {"sd3": 1024, "sd15": 4096}
    assert latents.shape[-1] * SHRINK == 256


def test_both_pipelines_leave_room_for_the_video_model_in_40_megabytes():
    total = 0
    for recipe in RECIPES.values():
        made = recipe.build_pipeline()
        for name, part in made.components.items():
            if isinstance(part, torch.nn.Module):
                width = 4 if name.startswith("text") else 2  # bytes of a number, as exported
                total += width * sum(value.numel() for value in part.state_dict().values())
    assert 18e6 < total < 28e6


def test_heads_are_of_sizes_that_kernels_serve(pipe):
    heads = [module for name, module in denoiser(pipe).named_modules() if name.endswith(("attn", "attn1", "attn2"))]
    sizes = {module.inner_dim // module.heads for module in heads}
    assert heads and sizes <= {32, 64}


@pytest.mark.parametrize("build", [build_clip_tokenizer, lambda: build_t5_tokenizer(256)])
def test_every_word_is_known_and_no_other(build):
    tokenizer = build()
    words = grammar_words()
    tokens = tokenizer(" ".join(words), add_special_tokens=False).input_ids
    assert len(set(tokens)) == len(words) and tokenizer.unk_token_id not in tokens
    assert tokenizer.unk_token_id in tokenizer("a red hippopotamus").input_ids


def test_the_longest_sentence_fits_and_a_longer_one_keeps_its_end():
    tokenizer = build_clip_tokenizer()
    item = ObjectWords("red", "circle", "small", "striped", "diagonally")
    longest = SceneWords((item, item._replace(color="blue"), item._replace(color="green")), "black", True).prompt
    assert len(tokenizer(longest).input_ids) <= CLIP_LENGTH == tokenizer.model_max_length
    cut = tokenizer(longest * 3, truncation=True, max_length=CLIP_LENGTH).input_ids
    assert len(cut) == CLIP_LENGTH and cut[-1] == tokenizer.eos_token_id and cut[0] == tokenizer.bos_token_id


def test_clip_pools_at_the_end_of_the_sentence():
    torch.manual_seed(0)
    tokenizer, encoder = build_clip_tokenizer(), build_clip_projection_encoder(32, 2).eval()
    tokens = tokenizer([PROMPT, ""], padding="max_length", max_length=CLIP_LENGTH, return_tensors="pt").input_ids
    end = (tokens == tokenizer.eos_token_id).int().argmax(1)
    assert end.tolist() == [len(PROMPT.split()) + 1, 1]
    with torch.no_grad():
        out = encoder(tokens)
        pooled = encoder.text_projection(out.last_hidden_state[torch.arange(2), end])
    assert torch.equal(out.text_embeds, pooled)


def test_umt5_reads_the_order_of_words_and_not_the_masked_ones():
    torch.manual_seed(0)
    tokenizer, encoder = build_t5_tokenizer(512), build_umt5_encoder().eval()
    with torch.no_grad():
        short = tokenizer(["red blue circle", "blue red circle"], return_tensors="pt")
        texts = encoder(**short).last_hidden_state
        long = tokenizer(["red blue circle"], padding="max_length", max_length=512, return_tensors="pt")
        padded = encoder(**long).last_hidden_state
    assert not torch.allclose(texts[0, 2], texts[1, 2], atol=1e-3)
    assert torch.allclose(padded[0, : texts.shape[1]], texts[0], atol=1e-5)


def test_the_autoencoder_shrinks_by_four_and_both_pipelines_share_its_form(pipe):
    vae = build_image_vae()
    assert {name: v.shape for name, v in vae.state_dict().items()} == {
        name: v.shape for name, v in pipe.vae.state_dict().items()
    }
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 32)).latent_dist.mode()
        assert latents.shape == (1, LATENT_CHANNELS, 16, 8)
        assert vae.decode(latents).sample.shape == (1, 3, 64, 32)
    assert 0.5e6 < sum(value.numel() for value in vae.parameters()) < 1.5e6


def test_sd15_starts_from_noise_that_holds_nothing_of_the_image():
    scheduler = sd15.build_scheduler()
    scheduler.set_timesteps(20)
    assert int(scheduler.timesteps[0]) == sd15.TRAIN_TIMESTEPS - 1 and int(scheduler.timesteps[-1]) > 0
    assert float(scheduler.alphas_cumprod[-1]) == 0
    weak = (scheduler.alphas_cumprod[scheduler.timesteps] < 1 / 26).float().mean()  # noise 5 times the image
    assert 0.35 < float(weak) < 0.5


def test_sd3_starts_from_noise_and_ends_in_small_steps():
    scheduler = sd3.build_scheduler()
    scheduler.set_timesteps(20)
    assert float(scheduler.sigmas[0]) == 1 and float(scheduler.sigmas[-1]) == 0
    assert float((scheduler.sigmas > 0.9).float().mean()) > 0.3
