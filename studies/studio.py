"""
What the page of demo.py does, without the page: think aloud, paint an edited plan, compare.

    ask       references, an instruction, a seed and a Sampler; checked before anything is computed
    thoughts  the plan as far as it is written, token by token
    stages    the picture at some steps of the flow: what x is heading for, x - t v, then x itself
    compare   the same prompt and noise: without a plan, with it, and by another checkpoint
    group     what GRPO sees: members with plans of their own (RID), rewards and advantages

A plan comes back from the page as a caption and a relation for each reference. It is written in the
grammar again and given to the model in place of its own, so the picture follows the edited words.
Whatever a person can get wrong is a UserError of one sentence. Left out: the page.

    studio = Studio({"stage 2": engine}, clip, options)
    *_, text = studio.thoughts(ask)
    *_, (_, picture) = studio.stages(ask, text)
"""

from dataclasses import dataclass, replace

from PIL import Image

import iccot
from engine import PAINTING, THINKING, Branch, Engine, Group, Request, Sampler, Thinking
from grpo import advantages, roll_out
from reward import Clip, group_rewards
from runtime.config import UserError
from runtime.processes import generator
from toy.judge import judge
from vision import open_image

SHOWN = 8  # pictures on the way, at most


@dataclass(frozen=True)
class Ask:
    """What a person asks for. references: PIL RGB."""

    references: tuple
    instruction: str
    seed: int
    sampler: Sampler
    temperature: float = 0.0  # of the plan; 0 is greedy


def so_far(text: str, references: int, most: int) -> list[str]:
    """The caption and `most` relations of a plan that is still being written, "" for what lacks."""
    names = ["out_caption", *(f"relation_{i}" for i in range(1, most + 1))]
    fields = []
    for name in names[: references + 1]:
        _, begun, rest = text.partition(f"<{name}>")
        fields.append(rest.partition("<")[0].strip() if begun else "")
    return fields + [""] * (most - references)


class Studio:
    """Some checkpoints and a CLIP.

    engines: {name: Engine}; the first is asked, the others stand beside it in `compare`. clip: that
    of the reward, None for no agreement and no groups. members: a grpo.Config, whose picture_side
    paints as large as the last reference.
    """

    def __init__(self, engines: dict[str, Engine], clip: Clip | None, *, members, max_references):
        self.engines, self.clip, self.members = engines, clip, members
        self.max_references = max_references

    @property
    def engine(self) -> Engine:
        return next(iter(self.engines.values()))

    def read(self, paths) -> tuple:
        """The pictures of some files, PIL RGB; UserError for too many, or one that is none.

        None is an empty place: nothing behind the last picture, a gap before it.
        """
        paths = list(paths)
        while paths and paths[-1] is None:
            paths.pop()
        if len(paths) > self.max_references:
            raise UserError(
                f"{len(paths)} references, this model takes at most {self.max_references}; "
                f"take some away"
            )
        pictures = []
        for i, path in enumerate(paths, 1):
            if path is None:
                raise UserError(f"reference {i} is missing; drop one there, or move the next up")
            try:
                pictures.append(open_image(path))
            except ValueError:  # its words name a file that nobody knows
                raise UserError(
                    f"reference {i} cannot be read as a picture; take another PNG, JPEG or WebP, "
                    f"of at most {Image.MAX_IMAGE_PIXELS * 2:,} pixels"
                ) from None
        return tuple(pictures)

    def request(self, ask: Ask) -> Request:
        """The Request of an Ask; UserError if it asks for nothing."""
        if not ask.instruction.strip():
            raise UserError("the instruction is empty: say what to draw")
        return Request(ask.references, ask.instruction, self._grid(ask.references))

    def _grid(self, references):
        """(h, w) latent tokens: the members' side, or like the last reference."""
        shape, side = self.engine.model.config, self.members.picture_side
        if side or not references:
            side = side or shape.latent_side * shape.token_pixels
            return shape.picture_grid(side, side)
        width, height = shape.image_rule.size(*references[-1].size)
        return height // shape.token_pixels, width // shape.token_pixels

    def _prompt(self, engine, request):
        try:
            return engine.prompt(request.references, request.instruction, request.system)
        except ValueError as error:  # <image> at a wrong place, a word that cannot be written
            raise UserError(str(error)) from None

    def thoughts(self, ask: Ask):
        """The text of the plan, longer with every token."""
        request = self.request(ask)
        engine, eos = self.engine, self.engine.layout.eos
        how = dict(generators=[generator(ask.seed, THINKING)])
        thinking = Thinking(self.members.max_plan_tokens, ask.temperature)
        for tokens in engine.tokens([self._prompt(engine, request)], thinking, **how):
            (row,) = tokens.tolist()
            written = [token for token in row if token >= 0]
            yield engine.tokenizer.decode(written[: written.index(eos)] if eos in row else written)

    def write(self, caption: str, relations: list[str], references: int) -> str:
        """The text of an edited plan; UserError if it does not parse."""
        fields = {"the caption": caption}
        fields |= {f"the line of reference {i + 1}": relations[i] for i in range(references)}
        for name, text in fields.items():
            if not text.strip():
                raise UserError(f"{name} is empty: write it, or let the model think again")
        try:
            plan = iccot.ICCoT(caption.strip(), tuple(x.strip() for x in relations[:references]))
            text = iccot.render(plan)
            iccot.parse(text, references)
        except iccot.PlanError as error:
            raise UserError(f"the plan does not parse: {error}") from None
        return text

    def stages(self, ask: Ask, text: str, engine: Engine | None = None):
        """Paint the plan `text`, "": straight from the prompt. (steps done, PIL), the last is x."""
        request = self.request(ask)
        engine = engine or self.engine
        plan = self.encode(engine, text)
        start = engine.start(request.grid, generator(ask.seed, PAINTING))
        group = Group(self._prompt(engine, request), request.grid, (Branch(plan, (start,)),))
        steps = ask.sampler.num_timesteps - 1
        every = -(-steps // SHOWN)
        for k, (x, estimate) in enumerate(engine.steps([group], ask.sampler), 1):
            if k % every == 0 or k == steps:
                yield k, engine.pictures([x if k == steps else estimate], [request.grid])[0]

    def encode(self, engine, text):
        """The token ids of a plan, None for "". UserError for words that the tokenizer lacks."""
        try:
            return engine.tokenizer.encode(text) if text else None
        except ValueError as error:
            raise UserError(f"the plan cannot be written: {error}") from None

    def agreement(self, image, caption: str) -> float | None:
        """100 * cosine of picture and caption; None without a CLIP."""
        if self.clip is None or not caption.strip():
            return None
        return float(self.clip.clip_out([image], [caption])[0])

    def verdict(self, image, caption: str, truth=None) -> str:
        """What can be said of a picture: agreement with its plan; PF, SC where truth is known."""
        found = self.agreement(image, caption)
        words = [] if found is None else [f"CLIP agreement with the plan {found:.1f}"]
        if truth is not None:
            one = judge(image, truth)
            words.append(f"PF {one.pf:.1f}, SC {one.sc:.1f} of 10, against the example's truth")
        return "; ".join(words)

    def compare(self, ask: Ask, text: str, *, caption: str, truth=None):
        """[(PIL, words)]: without a plan and with it, then the other checkpoints, one noise."""
        asked, *others = self.engines
        rows = [(asked, "", "no plan"), (asked, text, "this plan")]
        rows += [(name, text, f"this plan, {name}") for name in others]
        found = []
        for name, plan, words in rows:
            *_, (_, image) = self.stages(ask, plan, self.engines[name])
            found.append((image, f"{words}. {self.verdict(image, caption, truth)}"))
            yield list(found)

    def group(self, ask: Ask):
        """[(PIL, words)]: members that plan for themselves, the best first; UserError."""
        if self.clip is None:
            raise UserError("rewards need a CLIP: start the page with --clip")
        request = self.request(ask)
        (height, width), unit = request.grid, self.engine.model.config.token_pixels
        if height != width:
            raise UserError("groups are painted square, as in training: start with --square")
        members = replace(self.members, seed=ask.seed, picture_side=height * unit)
        rollout = roll_out(self.engine, [request], [0], members, 0)
        reward = group_rewards(self.clip, rollout.images, rollout.captions, groups=1)  # (1, G)
        images, _ = advantages(reward, members)
        rows = zip(rollout.images, rollout.captions, reward[0].tolist(), images.tolist())
        words = "reward {:.3f}, advantage {:+.2f}: {}"
        ordered = sorted(rows, key=lambda row: -row[2])
        return [
            (image, words.format(r, a, caption or "its plan does not parse"))
            for image, caption, r, a in ordered
        ]
