"""What families say about blocks, against what hooks on the blocks of real models see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from dit_accel import Family
from dit_accel.families import (
    BlockStreams,
    block_arguments,
    family_of,
    modulated_input,
    pack_streams,
    read_streams,
    streams_of,
    unpack_streams,
)
from dit_accel.layout import TokenLayout

from ..conftest import build_tiny_wan
from ..seams.conftest import build_cogvideox, build_hunyuan, build_image_subject, build_subject, build_video_subject


@dataclass
class Model:
    """A model that runs, and the module that its tokens enter behind the last block."""

    root: Any
    run: Callable[[], Any]
    exit: str
    text: bool = True


def from_pipeline(subject: Any, exit_path: str, text: bool = True) -> Model:
    return Model(subject.root, lambda: subject.run(num_inference_steps=1), exit_path, text)


def from_image(kind: str) -> Model:
    """HunyuanVideo's model for images, called as its pipeline would; the other parts of that are not needed."""
    torch.manual_seed(0)
    root = build_hunyuan(kind).root
    call = {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 10, 32),
        "encoder_attention_mask": (torch.arange(10) < 7).long()[None],
        "pooled_projections": torch.randn(1, 24),
        "guidance": torch.tensor([6000.0]),
    }
    return Model(root, lambda: root(**call).sample, "norm_out")


def wan_by_token() -> Model:
    """Wan 2.2 5B: a timestep for each token, 0 in the first frame, which is given."""
    root = build_subject(build_tiny_wan, "t2v").root
    timestep = torch.full((1, 12), 700.0)
    timestep[:, :4] = 0
    call = {
        "hidden_states": torch.randn(1, 16, 3, 4, 4),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(1, 16, 64),
    }
    return Model(root, lambda: root(**call).sample, "norm_out", text=False)


MODELS: dict[str, Callable[[], Model]] = {
    "wan": lambda: from_pipeline(build_subject(build_tiny_wan, "t2v"), "norm_out", text=False),
    "wan-i2v": lambda: from_pipeline(build_subject(build_tiny_wan, "i2v"), "norm_out", text=False),
    "wan-by-token": wan_by_token,
    "flux": lambda: from_pipeline(build_image_subject("flux"), "norm_out"),
    "sd3": lambda: from_pipeline(build_image_subject("sd3"), "norm_out"),
    "sd35": lambda: from_pipeline(build_image_subject("sd35"), "norm_out"),
    "hunyuan": lambda: from_pipeline(build_video_subject("hunyuan"), "norm_out"),
    "hunyuan-concat": lambda: from_image("latent_concat"),
    "hunyuan-replace": lambda: from_image("token_replace"),
    "cogvideox": lambda: from_pipeline(build_video_subject("cogvideox"), "norm_final"),
    "cogvideox1.5": lambda: from_pipeline(build_video_subject("cogvideox1.5"), "norm_final"),
}
FEED_FORWARDS = {"wan": 2, "flux": 2, "sd3": 3, "sd35": 3, "hunyuan": 2, "cogvideox": 2, "sd15": 4, "sdxl": 5}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]()


def blocks_of(root: Any) -> list[tuple[str, nn.Module]]:
    lists = family_of(root).block_lists
    return [(f"{name}.{i}", block) for name in lists for i, block in enumerate(getattr(root, name))]


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch(model: Model) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any]:
    """Streams by name before and after every block of the first call, and what is given to the exit."""
    before: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    left: list[Any] = []

    def note(streams: BlockStreams) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before.append(dict(zip(streams.names, read_streams(block, streams, args, kwargs), strict=True)))
            values = unpack_streams(streams, output)
            after.append(dict(zip(streams.names, values, strict=True)))
            packed = pack_streams(streams, values)
            assert type(packed) is type(output)
            parts, wanted = ((packed,), (output,)) if streams.bare else (packed, output)
            assert len(parts) == len(wanted) and all(a is b for a, b in zip(parts, wanted, strict=True))

        return hook

    family, blocks = family_of(model.root), blocks_of(model.root)
    handles = [block.register_forward_hook(note(streams_of(family, path)), with_kwargs=True) for path, block in blocks]
    leave = model.root.get_submodule(model.exit).register_forward_pre_hook(lambda _, args: left.append(args[0]))
    with hooked(*handles, leave):
        model.run()
    return before[: len(blocks)], after[: len(blocks)], left[0]


def test_what_leaves_a_block_is_what_enters_the_next(model):
    """By name, and the very tensors, so an order that is wrong on either side shows."""
    before, after, left = watch(model)
    names = {"hidden_states", "encoder_hidden_states"} if model.text else {"hidden_states"}
    assert len(before) > 1 and all(set(streams) == names for streams in before + after)
    for gone, come in zip(after, before[1:], strict=False):
        assert all(come[name] is gone[name] for name in names)
    assert torch.equal(left, after[-1]["hidden_states"])


def test_the_text_of_stable_diffusion_3_ends_in_its_last_block():
    before, after, _ = watch(MODELS["sd3"]())
    assert [streams["encoder_hidden_states"] is None for streams in before + after] == [False, False, False, True]


def test_a_block_that_passes_its_streams_on_is_no_block(model):
    """The model with one block less is the oracle."""
    path, block = blocks_of(model.root)[-2]
    streams = streams_of(family_of(model.root), path)
    name, index = path.split(".")
    shorter = copy.deepcopy(getattr(model.root, name))
    del shorter[int(index)]
    whole, full = model.run(), getattr(model.root, name)
    try:
        block.forward = lambda *args, **kwargs: pack_streams(streams, read_streams(block, streams, args, kwargs))
        passed = model.run()
        del block.forward
        setattr(model.root, name, shorter)
        assert torch.equal(model.run(), passed) and not torch.allclose(passed, whole)
    finally:
        setattr(model.root, name, full)
    assert torch.equal(model.run(), whole)


def signals(model: Model, module: nn.Module, note: Callable[..., Any]) -> tuple[dict[str, Any], Any]:
    """The modulated inputs of the first call by name, and what ``note(args, kwargs, output)`` takes from a module."""
    found: dict[str, Any] = {}
    wanted: list[Any] = []
    called: dict[str, Any] = {}
    root, family = model.root, family_of(model.root)

    def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
        called.update(signature(type(root).forward).bind_partial(root, *args, **kwargs).arguments)

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        if not found:
            for name in family.modulated:
                found[name] = modulated_input(family, root, called, block, args, kwargs, name)

    def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        wanted.append(note(args, kwargs, output))

    first = blocks_of(root)[0][1]
    with hooked(
        root.register_forward_pre_hook(begin, with_kwargs=True),
        first.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(see, with_kwargs=True),
    ):
        output = model.run()
    assert torch.equal(model.run(), output)  # looking changes nothing
    return found, wanted[0]


@pytest.mark.parametrize("name", ["flux", "sd3", "sd35", "hunyuan", "hunyuan-concat", "hunyuan-replace"])
def test_the_modulated_input_is_what_the_first_attention_gets(name):
    model = MODELS[name]()
    attention = blocks_of(model.root)[0][1].attn
    found, wanted = signals(model, attention, lambda args, kwargs, output: kwargs["hidden_states"])
    assert found.keys() == {"default"} and torch.equal(found["default"], wanted)


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox1.5"])
def test_cogvideox_looks_at_its_time_embedding(name):
    model = MODELS[name]()
    found, wanted = signals(model, model.root.time_embedding, lambda args, kwargs, output: output)
    assert found.keys() == {"default"} and torch.equal(found["default"], wanted)


def test_the_time_embedding_of_cogvideox_for_images_has_another_one_in_it():
    torch.manual_seed(0)
    root = build_cogvideox(joins_frames=True, offset=True).root
    rotary = tuple(torch.randn(72, 16) for _ in range(2))
    call = {
        "hidden_states": torch.randn(1, 6, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 10, 32),
        "timestep": torch.tensor([500.0]),
        "ofs": torch.tensor([2.0]),
        "image_rotary_emb": rotary,
    }
    model = Model(root, lambda: root(**call).sample, "norm_final")
    found, time = signals(model, root.time_embedding, lambda args, kwargs, output: output)
    _, offset = signals(model, root.ofs_embedding, lambda args, kwargs, output: output)
    assert torch.equal(found["default"], time + offset) and offset.any()


@pytest.mark.parametrize("name", ["wan", "wan-i2v", "wan-by-token"])
def test_wan_looks_at_its_time_embedding_or_the_projection_of_it(name):
    model = MODELS[name]()
    embedder = model.root.condition_embedder
    found, embedding = signals(model, embedder.time_embedder, lambda args, kwargs, output: output)
    assert found.keys() == {"default", "projection"} and torch.equal(found["default"], embedding)
    assert embedding.ndim == (3 if name == "wan-by-token" else 2)
    found, projection = signals(model, embedder.time_proj, lambda args, kwargs, output: output)
    assert torch.equal(found["projection"].flatten(-2), projection)


def test_the_time_embedding_of_wan_is_not_rounded():
    """Steps next to each other differ by less than bfloat16 tells apart; the embedder itself stays in float32."""
    root = build_subject(build_tiny_wan, "t2v").root.bfloat16()
    root.condition_embedder.time_embedder.float()
    first = blocks_of(root)[0][1]
    block = {"args": (torch.zeros(1, 4, 32, dtype=torch.bfloat16), None, None, None), "kwargs": {}}
    found = [
        modulated_input(family_of(root), root, {"timestep": torch.tensor([step])}, first, **block)
        for step in (500.0, 500.5)
    ]
    assert found[0].dtype == torch.float32 and not torch.equal(*found)


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_names_of_feed_forward_modules(name):
    """Exactly the modules of diffusers' class within the blocks; that of HunyuanVideo's refiner is no block's."""
    root = build_image_subject(name).root if name in ("sd15", "sdxl") else MODELS[name]().root
    family = family_of(root)
    inside = [
        (path, module)
        for path, module in root.named_modules()
        if path.startswith(tuple(f"{each}." for each in family.block_lists))
    ]
    wanted = [path for path, module in inside if isinstance(module, FeedForward)]
    assert [path for path, _ in inside if path.rpartition(".")[2] in family.mlp_names] == wanted
    assert len(wanted) == FEED_FORWARDS[name]


# ---- the functions, on a block of our own ---------------------------------------------------------------------------


class Block(nn.Module):
    """Takes two streams in one order and returns them in the other."""

    def forward(self, x, time, text=None, *rest, scale=1.0):
        return text, x


TWO = BlockStreams(("text", "x"))
X, TEXT = torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, 0, TEXT), {}),
        ((X,), {"time": 0, "text": TEXT}),
        ((), {"text": TEXT, "x": X, "time": 0}),
        ((X, 0, TEXT, 1, 2), {"scale": 3}),
    ],
)
def test_streams_are_read_however_they_are_given(args, kwargs):
    text, x = read_streams(Block(), TWO, args, kwargs)
    assert text is TEXT and x is X
    assert unpack_streams(TWO, Block()(*args, **kwargs)) == (TEXT, X)


def test_streams_that_are_left_out_are_none():
    assert read_streams(Block(), TWO, (X, 0), {}) == (None, X)
    assert block_arguments(Block(), (X, 0), {"scale": 3}) == {"x": X, "time": 0, "scale": 3}


def test_hooks_on_the_instance_do_not_matter():
    block = Block()
    block.forward = lambda *args, **kwargs: None
    assert read_streams(block, TWO, (X, 0, TEXT), {}) == (TEXT, X)


def test_one_stream_in_a_tuple_is_not_a_bare_one():
    for bare, output in ((False, (X,)), (True, X)):
        streams = BlockStreams(("x",), bare)
        assert unpack_streams(streams, output) == (X,)
        packed = pack_streams(streams, (X,))
        assert (packed is X) if bare else packed == (X,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockStreams(()), "one or more different parameters"),
        (lambda: BlockStreams(("x", "x")), "one or more different parameters"),
        (lambda: BlockStreams(("x", "text"), bare=True), "a bare tensor is one stream"),
        (lambda: pack_streams(TWO, (X,)), "1 values do not fill"),
        (lambda: unpack_streams(TWO, X), "a tuple of 2 tensors for text, x; got Tensor"),
        (lambda: unpack_streams(TWO, (X,)), "got tuple of Tensor"),
        (lambda: unpack_streams(TWO, (X, 3)), "got tuple of Tensor, int"),
        (lambda: unpack_streams(BlockStreams(("x",), bare=True), (X,)), "a tensor for x; got tuple"),
        (lambda: read_streams(Block(), BlockStreams(("y",)), (X, 0), {}), "no parameter y; .* x, time, text"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_families_that_say_nothing_are_refused():
    unet = build_image_subject("sd15").root
    with pytest.raises(ValueError, match=r"blocks in UNet2DConditionModel\.mid_block cannot be skipped.*nothing"):
        streams_of(family_of(unet), "mid_block")
    outside = Family("Mine", lambda root, arguments: TokenLayout.video_only((1, 1, 1)), lambda path, module: None, ())
    with pytest.raises(ValueError, match=r"Mine\.blocks cannot be skipped"):
        streams_of(outside, "blocks.0")
    with pytest.raises(ValueError, match=r"Mine has no modulated input 'default'.*it has: none"):
        modulated_input(outside, Block(), {}, Block(), (X, 0), {})
    flux = family_of(MODELS["flux"]().root)
    with pytest.raises(ValueError, match=r"'projection' to look at; it has: 'default'"):
        modulated_input(flux, Block(), {}, Block(), (X, 0), {}, "projection")
