"""``attention="auto"``: a method for the model, the tokens, the steps and the device at hand, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..plan.simulate import computed_share
from ..processors import (
    ATTENTION,
    BlockRoutingAttnProcessor,
    CompensatedAttnProcessor,
    SparseAttnProcessor,
    StaticAttnProcessor,
    processor_by_name,
)
from ..report import ChoiceReport
from .estimate import Estimate, estimate
from .lookup import AUTO, ModelFacts, complete, layered

if TYPE_CHECKING:
    from ..clock import StepState
    from ..controls import SiteInfo
    from ..install import RootInstallation
    from ..layout import TokenLayout

PAYS = 1.15
"""Sampling must become this much faster, by estimate, or it stays dense: less is not worth any loss."""
FEW_STEPS = 10
"""Below, a warm-up takes too great a part of the steps, and models distilled to so few forgive less."""
LONG_SIDE = 256
"""Tokens along both sides of an image from which on neighborhoods come into question, as published (FLUX.1 at 4K).

Not on CPUs, where the tests inside of blocks make them slower than dense attention."""
RADIAL_FRAMES, RADIAL_FRAMES_CPU = 24, 12
"""Frames of tokens from which on radial attention comes into question: of n frames it keeps the first one and those
next to each other, which is 4 / n of all pairs, and it must keep less than compensated attention computes."""
USUAL_DENSITY = 0.25
"""Of methods whose density depends on what they find."""
AGENT_TOKENS = 4096
"""Tokens of a UNet's largest self-attention from which on AgentSD is published: 64x64, 512 pixels."""


@dataclass(frozen=True)
class Situation:
    """What the choice depends on.

    Attributes:
        facts: about the model.
        layout: of the root's tokens.
        is_unet: whether the model is a UNet, whose levels have other numbers of tokens.
        tokens: the most that one self- or joint attention has.
        width: heads times head dimension of that attention.
        layers: how many such attention modules there are.
        steps: of the generation; None if nobody says.
        device: type of the device, such as ``"cuda"``.
        sites: heads and head dimension of each of these modules.
    """

    facts: ModelFacts
    layout: TokenLayout
    is_unet: bool
    tokens: int
    width: int
    layers: int
    steps: int | None
    device: str
    sites: Mapping[SiteInfo, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        recipe: the method; None for dense attention.
        method: its name, or ``"dense"``.
        reason: why, for people.
        preset: the preset that its settings come from, with its source; None without one.
    """

    recipe: SparseAttnProcessor | None
    method: str
    reason: str
    preset: str | None = None


@dataclass(frozen=True)
class Chosen:
    """A choice and when it was made.

    Attributes:
        generation: at whose first call.
        situation: that it was made for.
        choice: what was chosen.
    """

    generation: int
    situation: Situation
    choice: Choice

    def report(self) -> ChoiceReport:
        """In plain values."""
        recipe = None if self.choice.recipe is None else repr(self.choice.recipe)
        return ChoiceReport(self.choice.method, self.choice.reason, recipe, self.choice.preset)


class AutoAttnProcessor(SparseAttnProcessor):
    """Stands for the method that is chosen at the first call of every generation, when the tokens are known.

    Args:
        presets: whether the method gets the settings published for the model, see :func:`.lookup.complete`.
        usual: settings that the method gets if it has them, before those of a preset.
        dense_steps: sampling steps that stay dense; None for what the method or its preset says.
        dense_layers: layers that stay dense; likewise.
        backend: kernel backend of whatever is chosen.

    Raises:
        ValueError: for settings outside these.
    """

    def __init__(
        self,
        *,
        presets: bool = True,
        usual: Mapping[str, Any] | None = None,
        dense_steps: int | float | None = None,
        dense_layers: int | Collection[int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dense_steps=dense_steps, dense_layers=dense_layers, backend=backend)
        if not isinstance(presets, bool):
            raise ValueError(f"presets is True or False; got {presets!r}")
        self.presets, self.usual = presets, dict(usual or {})
        known = {name for kind in ATTENTION.values() for name in kind().settings()}
        foreign = sorted(set(self.usual) - known)
        if foreign:
            raise ValueError(f"no method has a setting {foreign[0]!r}, which usual names")
        given = {"dense_steps": dense_steps, "dense_layers": dense_layers}
        plain = self.schedule.settings()
        self._given = {name: plain[name] for name, value in given.items() if value is not None}

    def for_situation(self, situation: Situation) -> Choice:
        """The method for what is at hand; the same for the same."""
        offers = decide(situation)
        if isinstance(offers, str):
            return Choice(None, "dense", offers)
        if offers == ("agent",):
            return self._agent(situation)
        found, refused = [], []
        for method in offers:
            recipe, preset = self._build(method, situation)
            try:
                found.append((_estimate(recipe, method, situation), method, recipe, preset))
            except ValueError as error:  # its settings do not fit this grid
                refused.append(f"not {method}: {error}")
        if not found:
            return Choice(None, "dense", "; ".join(refused))
        best, method, recipe, preset = max(found, key=lambda one: one[0].speedup)
        others = [*(f"{name} {one.speedup:.2f}x" for one, name, _, _ in found if name != method), *refused]
        reason = best.describe() + (f"; {' and '.join(others)}" if others else "")
        if best.speedup < PAYS:
            return Choice(None, "dense", f"{method} would not pay ({PAYS}x is wanted): {reason}")
        return Choice(recipe, method, reason, preset)

    def settings(self) -> dict[str, Any]:
        """Every constructor argument by name."""
        own = {"presets": self.presets, "usual": dict(self.usual), "backend": self.backend}
        return own | {"dense_steps": None, "dense_layers": None} | self._given

    def _agent(self, situation: Situation) -> Choice:
        """Agent attention, unless the UNet attends at none of the levels that its settings reach."""
        recipe, preset = self._build("agent", situation)
        try:
            recipe.check_sites(situation.sites)
        except ValueError as error:
            return Choice(None, "dense", f"agent: {error}")
        return Choice(recipe, "agent", _why_agent(situation), preset)

    def _build(self, method: str, situation: Situation) -> tuple[SparseAttnProcessor, str | None]:
        has = ATTENTION[method]().settings()
        usual = {name: value for name, value in self.usual.items() if name in has}
        given = layered(method, usual, self._given | {"backend": self.backend})
        preset = AUTO if self.presets else None
        completed = complete(method, given, situation.facts, preset, situation.layout.grid)
        return processor_by_name(method, **completed.settings), completed.describe()


def auto_processor(settings: Mapping[str, Any], preset: str | None = AUTO) -> AutoAttnProcessor:
    """Builds it as ``accelerate(pipe, attention="auto")`` does.

    Raises:
        ValueError: for settings that belong to one method, or a preset of one.
    """
    if preset not in (AUTO, None):
        raise ValueError(f'preset={preset!r} belongs to one method; with attention="auto" it is "auto" or None')
    own = AutoAttnProcessor().settings()
    foreign = sorted(set(settings) - set(own))
    if foreign:
        raise ValueError(f'{foreign[0]} belongs to one method; attention="auto" takes {", ".join(own)}')
    return AutoAttnProcessor(**{"presets": preset is not None} | dict(settings))


def decide(situation: Situation) -> tuple[str, ...] | str:
    """The methods that come into question, or the reason why none does.

    Whether one of them pays is another question, see :func:`.estimate.estimate`.
    """
    tokens, steps, layout = situation.tokens, situation.steps, situation.layout
    if steps is None:
        return "nobody says how many steps there are; call clock.set_step(step, steps) before each call of the model"
    if steps < FEW_STEPS:
        return f"{steps} steps are too few for a dense warm-up; name a method to have it all the same"
    if situation.is_unet:
        if tokens < layout.length:
            return "agent attention is published for UNets that attend at the full resolution of the latent"
        if tokens < AGENT_TOKENS:
            return f"agent attention is published from {AGENT_TOKENS:,} tokens on, and here are {tokens:,} at most"
        return ("agent",)
    if layout.padding:
        return f"{layout.padding} padding tokens cannot be told from others"
    if layout.grid[0] == 1:
        is_long = min(layout.grid[1:]) >= LONG_SIDE
        return ("block_routing", "neighborhood") if is_long and situation.device != "cpu" else ("block_routing",)
    frames = RADIAL_FRAMES_CPU if situation.device == "cpu" else RADIAL_FRAMES
    accepts_radial = layout.visual[0] == 0 and not layout.references
    return ("compensated", "radial") if accepts_radial and layout.grid[0] >= frames else ("compensated",)


def situation_of(
    installed: RootInstallation, state: StepState, facts: ModelFacts, kinds: Collection[str]
) -> Situation:
    """What there is to know at a call of a root, before it runs."""
    sites: dict[Any, TokenLayout] = {
        module: site.layout or state.layout for module, site in installed.sites.items() if site.info.kind in kinds
    }
    largest = max(sites, key=lambda module: sites[module].length)
    return Situation(
        facts=facts,
        layout=state.layout,
        is_unet="down_blocks" in installed.family.block_lists,
        tokens=sites[largest].length,
        width=largest.inner_dim,
        layers=len(sites),
        steps=state.steps,
        device=installed.device.type,
        sites=installed.heads_of(kinds),
    )


def _estimate(recipe: SparseAttnProcessor, method: str, situation: Situation) -> Estimate:
    steps, layers = situation.steps, situation.layers
    assert steps is not None  # else nothing would be offered
    sparse_layers = sum(not recipe.schedule.is_dense(steps - 1, steps, layer) for layer in range(layers))
    sparse_steps = steps - recipe.schedule.dense_step_count(steps)
    return estimate(
        method,
        tokens=situation.tokens,
        width=situation.width,
        density=_density(recipe, situation),
        dense_share=1 - sparse_steps / steps * sparse_layers / layers,
        device=situation.device,
    )


def _density(recipe: SparseAttnProcessor, situation: Situation) -> float:
    """Computed pairs over all pairs: counted where they follow from the layout, else what is to be expected."""
    layout = situation.layout
    if isinstance(recipe, StaticAttnProcessor):
        recipes = Counter(recipe.for_site(site) for site in situation.sites) or Counter([recipe])
        device = torch.device("cpu")
        shares = [computed_share(each.build_plan(layout, device)) * count for each, count in recipes.items()]
        return sum(shares) / recipes.total()
    part = _expected_density(recipe, layout.length)
    shown = (layout.length - layout.text_tokens) / layout.length
    if isinstance(recipe, CompensatedAttnProcessor) and recipe.tau is not None:
        return part * shown**2 + 1 - shown**2
    return part * shown + 1 - shown  # a budget is one of all blocks, those of the text among them; its rows are whole


def _expected_density(recipe: SparseAttnProcessor, tokens: int) -> float:
    if isinstance(recipe, CompensatedAttnProcessor):
        if recipe.tau is None:
            kept = float(recipe.density or 0)
        else:
            kept = math.erfc(recipe.tau / math.sqrt(2)) / 2  # the tail of Gaussian scores
        return min(1.0, kept + 3 * recipe.block / tokens + 1 / recipe.block)  # its neighbors, and all the means
    assert isinstance(recipe, BlockRoutingAttnProcessor)  # no other is offered
    if recipe.select != "top_k":
        return USUAL_DENSITY  # known only when it has searched
    return min(1.0, recipe.amount * recipe.block / tokens if isinstance(recipe.amount, int) else recipe.amount)


def _why_agent(situation: Situation) -> str:
    return (
        f"{situation.tokens:,} tokens in the largest self-attention of a UNet; published from {AGENT_TOKENS:,} on "
        "(AgentSD, 1.70x on an RTX 4090), not estimated for this device"
    )
