"""
From references and an instruction to a plan and a picture, on one path for everybody.

Sampling, evaluation, benchmarks, the strips of a training run, final tables and GRPO's rollouts all
go through the same four steps (docs/BAGEL.md §11-12):

    prompt    reference pictures and texts in one document; BAGEL's order is pictures, instruction
    think     decode an IC-CoT after the prompt, a token at a time           (KV cache, branches)
    paint     x ~ N(0, 1);  for t, t' in the time grid:  x <- x - v (t - t')     (rectified flow)
              v = guided mix of the velocities of all guidance contexts             (flow.guide)
    picture   latents -> codec -> PIL

Members of a group share their prompt: its keys and values are computed once (`prefill`) and every
member is a branch. The guidance contexts are branches and documents of the same pack, so one
forward pass serves all of them (`lay_out`):

    document 1    pictures | {noise: no_text} | instruction | branch a plan: plan {noise: full}
    document 2    texts {noise: no_image}

The contexts are those of the official inferencer: "no_text" is what stands before the last text (if
a picture stands last, the whole prompt without the plan), "no_image" all texts but the plan. GRPO's
update packs its trees with the same function, so rollout and update compute the same thing.

    engine = Engine(*load_model("out/toy-grpo"))                     # of runtime/pretrained.py
    request = engine.request(sample, side=32)
    result, = engine.generate([request], sampler=Sampler(7, 10.0), thinking=Thinking(72), batch=50,
                              seeds=[(0,)])
    again = replace(request, plan=iccot.render(edited))              # paints a plan of one's own

Letters: sequence.py. Left out: top-k and beam search; answers about pictures (see `Prompt.vae`).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from tqdm import tqdm

import flow
import iccot
from model import Cache, UnifiedModel
from runtime.processes import generator
from sequence import Layout, Packed, Sequence
from vision import Reference, to_pil, unpatchify

MAX_DECODED = 1024 * 1024  # pixels that the codec decodes at a time: bounds the memory
THINKING, PAINTING = 1, 2  # purposes of the random numbers of a request
CACHED = 3  # velocities that one is extrapolated from: a parabola
LOOK = {"cuda": 8}  # tokens between two looks at which plans have ended; elsewhere every token


# --------------------------------------------------------------------------------------------------
# what is asked for


@dataclass(frozen=True)
class Request:
    """One picture to make. references: PIL RGB; grid: (h, w) latent tokens of the picture.

    system: a text in front of everything (iccot.GENERATION_SYSTEM_PROMPT).
    plan: the text to paint; "": what the model thinks.
    """

    references: tuple[Image.Image, ...]
    instruction: str
    grid: tuple[int, int]
    system: str = ""
    plan: str = ""


@dataclass(frozen=True)
class Result:
    """One picture made. Painted without a plan, `text` is "" and `plan` None."""

    text: str  # what the model wrote
    plan: iccot.ICCoT | None  # what could be read from it
    problems: list[str]  # what could not
    valid: bool  # whether it parses strictly
    image: Image.Image

    def record(self) -> dict:
        """What the model wrote, for the JSON file beside the picture."""
        plan = iccot.to_record(self.plan) if self.plan else None
        return {"text": self.text, "plan": plan, "problems": self.problems}


@dataclass(frozen=True)
class Thinking:
    """How plans are decoded. temperature 0 is greedy; top_p 1 draws from all tokens."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_plan_tokens={self.max_tokens}: expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a probability above 0 and up to 1")


@dataclass(frozen=True)
class Sampler:
    """How pictures are painted. A grid of `num_timesteps` points is one evaluation less (BAGEL)."""

    num_timesteps: int
    timestep_shift: float
    text_guidance: float = 1.0  # 1: off
    image_guidance: float = 1.0  # acts only when text_guidance does
    guidance_interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0
    cache_interval: int = 1  # steps to a pass of the model; in the others v is extrapolated

    def __post_init__(self):
        flow.time_grid(self.num_timesteps, self.timestep_shift)  # ValueError unless it is one
        if self.cache_interval < 1:
            raise ValueError(f"cache_interval={self.cache_interval}: expected 1 (off) or more")
        if not math.isfinite(self.text_guidance) or not math.isfinite(self.image_guidance):
            raise ValueError(
                f"text_guidance={self.text_guidance}, image_guidance={self.image_guidance}: "
                f"expected numbers; 1 is off"
            )

    @property
    def contexts(self) -> tuple[str, ...]:
        """What the velocity is asked with: everything; without text; without pictures."""
        if self.text_guidance <= 1:
            return ("full",)
        return ("full", "no_text", "no_image") if self.image_guidance > 1 else ("full", "no_text")

    @property
    def guidance(self) -> flow.Guidance:
        return flow.Guidance(self.text_guidance, self.image_guidance, self.renorm, self.renorm_min)


# --------------------------------------------------------------------------------------------------
# the tree of a prompt


@dataclass(frozen=True)
class Prompt:
    """What stands before the plan: references (vision.Reference) and texts (token ids) in order."""

    items: tuple[Reference | list, ...]
    vae: bool = True  # false: pictures go through the eye alone (docs/BAGEL.md §12)

    def write(self, sequence: Sequence) -> None:
        for item in self.items:
            if is_text(item):
                sequence.text(item)
            else:
                sequence.image(item, vae=self.vae)

    def hollow(self) -> "Prompt":
        """The same places without the patches: for packs that leave the prompt out (`cut`)."""
        items = (x if is_text(x) else replace(x, patches=x.patches[:, :0]) for x in self.items)
        return Prompt(tuple(items), self.vae)

    def __len__(self) -> int:
        """Tokens in a packed sequence."""
        return sum(len(item) + 2 * is_text(item) for item in self.items)

    @property
    def texts(self) -> tuple[list, ...]:
        return tuple(item for item in self.items if is_text(item))


def is_text(item) -> bool:
    """Whether an item of a prompt is a text."""
    return isinstance(item, list | tuple)


@dataclass(frozen=True)
class Noised:
    """A noised picture x (T, C) at a flow time."""

    x: torch.Tensor
    timestep: float


@dataclass(frozen=True)
class Branch:
    """A plan (token ids; None: paint without one) and the noised pictures that stand behind it."""

    plan: list | None
    noised: tuple[Noised, ...]


@dataclass(frozen=True)
class Group:
    """One prompt, the (h, w) token grid of all its pictures, and its branches."""

    prompt: Prompt
    grid: tuple[int, int]
    branches: tuple[Branch, ...]


def lay_out(
    layout: Layout, groups: list[Group], contexts: tuple[str, ...], *, loss: bool = False
) -> tuple[Packed, dict[str, torch.Tensor]]:
    """One pack for all guidance contexts of some groups. loss: the plans predict their tokens.

    Returns the pack, and for each context the rows of its noised tokens among all noised tokens,
    picture by picture in the order of the branches.
    """
    sequence, rows = Sequence(layout), {name: [] for name in contexts}

    def leaves(name, group, branches):
        if name in rows:
            for branch in branches:
                for noised in branch.noised:
                    begin = sequence.noised_tokens
                    rows[name].append(torch.arange(begin, begin + len(noised.x)))
                    sequence.noise(noised.x, group.grid, noised.timestep)

    for group in groups:
        prompt = group.prompt
        cut = len(prompt.items) - is_text(prompt.items[-1])
        with sequence.document():
            Prompt(prompt.items[:cut], prompt.vae).write(sequence)
            leaves("no_text", group, group.branches)
            Prompt(prompt.items[cut:]).write(sequence)
            for branch in group.branches:
                with sequence.branch():
                    if branch.plan is not None:
                        sequence.text(branch.plan, loss)
                    leaves("full", group, [branch])
        if "no_image" in rows:
            with sequence.document(extra=True):
                Prompt(prompt.texts).write(sequence)
                leaves("no_image", group, group.branches)
    return sequence.pack(), {name: torch.cat(parts) for name, parts in rows.items()}


def canvas_of(
    packed: Packed, rows: dict[str, torch.Tensor]
) -> tuple[Packed, dict[str, torch.Tensor]]:
    """Of what `lay_out` gives, the noised pictures of some contexts alone, and their rows."""
    image = packed.image_of_token()  # (M,)
    kept = torch.cat([image[index] for index in rows.values()])
    with_markers = torch.tensor(packed.noised_lengths, device=image.device) + 2  # (images,)
    chosen = torch.isin(torch.repeat_interleave(with_markers), kept)
    place = torch.isin(image, kept).cumsum(0) - 1  # (M,) among the tokens that are kept
    canvas = packed.select(packed.rows_of("noised")[chosen])
    return canvas, {name: place[index] for name, index in rows.items()}


def guided(
    v: torch.Tensor,
    rows: dict[str, torch.Tensor],
    t: torch.Tensor,
    *,
    sampler: Sampler,
    image_of_token: torch.Tensor,
    images: int,
) -> torch.Tensor:
    """The velocity (I * T, C) that the sampler follows, from those of all contexts v (M, C).

    t: one time, or one a token; outside the guidance interval the conditional velocity counts.
    """
    v = {name: v[index] for name, index in rows.items()}  # (I * T, C) of each context
    active = flow.guidance_active(t, sampler.guidance_interval)
    if "no_text" not in v or not bool(active.any()):
        return v["full"]
    mixed = flow.guide(
        v["full"],
        v["no_text"],
        v.get("no_image"),
        guidance=sampler.guidance,
        image_of_token=image_of_token,
        images=images,
    )
    return mixed if active.ndim == 0 else torch.where(active[:, None], mixed, v["full"])


# --------------------------------------------------------------------------------------------------
# randomness


def draw_noise(lengths: list[int], channels: int, generators: list) -> torch.Tensor:
    """Standard normal (sum of lengths, C) on the CPU, a picture from each generator."""
    pairs = zip(lengths, generators, strict=True)
    return torch.cat([torch.randn(n, channels, generator=generator) for n, generator in pairs])


def choose(logits: torch.Tensor, thinking: Thinking, uniform: torch.Tensor | None) -> torch.Tensor:
    """The next token of each row, (B, vocabulary) -> (B,), where the logits are.

    uniform: (B,) of [0, 1); the token is where the cumulated probabilities exceed its number. Not
    needed where decoding is greedy. Cumulated in the type of `uniform`, float64 where there is one:
    at 152,064 tokens, rounding in float32 is as large as the probability of most of them.
    """
    if thinking.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / thinking.temperature).softmax(-1)
    if thinking.top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        behind = ordered.cumsum(-1) - ordered >= thinking.top_p  # likelier ones make up top_p
        probabilities = probabilities.scatter(-1, index, ordered.masked_fill(behind, 0))
    ends = probabilities.to(uniform.dtype).cumsum(-1)  # (B, vocabulary)
    # below the last end, or rounding could lead to a token that cannot come
    uniform = uniform.clamp_max(1 - torch.finfo(uniform.dtype).eps)
    token = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True).squeeze(1)
    return token.clamp_max(logits.shape[-1] - 1)  # of weights that are not finite: any token


# --------------------------------------------------------------------------------------------------
# the engine


class Engine:
    """A model and its tokenizer, ready to think and paint. It changes neither."""

    def __init__(self, model: UnifiedModel, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.layout = model.config.layout(tokenizer)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def request(self, sample, side: int) -> Request:
        """A request for a sample (anything with references and an instruction).

        side: pixels of the square picture, before the codec's resize rule.
        """
        grid = self.model.config.picture_grid(side, side)
        return Request(tuple(sample.references), sample.instruction, grid)

    def prompt(self, references, instruction: str, system: str = "") -> Prompt:
        """Pictures (PIL), then the instruction: BAGEL's order; or as `iccot.arranged` says.

        Pictures are resized as in BAGEL's inferencer.
        """
        items = []
        for item in [system] * bool(system) + iccot.arranged(references, instruction):
            if isinstance(item, str):
                items.append(self.tokenizer.encode(item))
            else:
                items.append(self.model.encode_reference(item, as_inferencer=True))
        return Prompt(tuple(items))

    @torch.no_grad()
    def prefill(self, prompts: list[Prompt]) -> Cache:
        """Keys and values of the prompts alone: a Cache for `think` and `paint` to take over."""
        sequence = Sequence(self.layout)
        for prompt in prompts:
            with sequence.document():
                prompt.write(sequence)
        packed = sequence.pack().to(self.device)
        cache = Cache(self.model, len(packed))
        if len(packed):
            self.model.fill(packed, cache)
        return cache

    def think(
        self,
        prompts: list[Prompt],
        thinking: Thinking,
        *,
        count: int = 1,
        generators: list | None = None,
        prefix: Cache | None = None,
    ) -> tuple[list[list[int]], list[bool]]:
        """Decode plans for each prompt, all together; the arguments are those of `tokens`.

        Returns the token ids of each plan, prompt by prompt, and whether it ended with eos in time:
        two lists of B.
        """
        *_, tokens = self.tokens(
            prompts, thinking, count=count, generators=generators, prefix=prefix
        )
        rows, eos = tokens.tolist(), self.layout.eos
        plans = [row[: row.index(eos)] if eos in row else row for row in rows]
        return plans, [eos in row for row in rows]

    @torch.no_grad()
    def tokens(
        self,
        prompts: list[Prompt],
        thinking: Thinking,
        *,
        count: int = 1,
        generators: list | None = None,
        prefix: Cache | None = None,
    ) -> Iterator[torch.Tensor]:
        """Decode `count` plans for each prompt, all together: what is written, token by token.

        Yields (B, max_tokens), B = prompts * count, -1 where nothing stands yet; behind the eos of
        a plan anything may stand. generators: one a plan, so that what a plan becomes does not
        depend on its company; not needed where decoding is greedy. prefix: what `prefill` gave for
        these prompts.
        """
        prefix = self.prefill(prompts) if prefix is None else prefix
        sequence = Sequence(self.layout)
        for prompt in prompts:
            with sequence.document():
                prompt.hollow().write(sequence)
                for _ in range(count):
                    with sequence.branch():
                        sequence.reserve(thinking.max_tokens)
        packed = sequence.pack().to(self.device)
        cache = Cache(self.model, len(packed))
        cache.take_over(packed.rows_of("given"), prefix)
        uniform = None
        if thinking.temperature:  # (B, max_tokens) of [0, 1), drawn on the CPU
            rows = [
                torch.rand(thinking.max_tokens, generator=each, dtype=torch.float64)
                for each in generators
            ]
            wide = torch.float32 if self.device.type == "mps" else torch.float64
            uniform = torch.stack(rows).to(self.device, wide)
        slots = torch.tensor(sequence.reserved, device=self.device)  # (B,) of the first tokens
        last, eos = torch.full_like(slots, self.layout.bos), self.layout.eos
        tokens = slots.new_full((len(slots), thinking.max_tokens), -1)
        open_rows = torch.arange(len(slots), device=self.device)
        # rows that have ended leave; on a GPU every few tokens, so that the host need not wait
        look = LOOK.get(self.device.type, 1)
        for step in range(thinking.max_tokens):
            hidden, _ = self.model(packed.decoding(slots[open_rows] + step, last), cache)  # (B, W)
            logits = self.model.lm_head(hidden).float()  # (B, vocabulary)
            last = choose(logits, thinking, None if uniform is None else uniform[open_rows, step])
            tokens[open_rows, step] = last
            yield tokens
            if (step + 1) % look == 0:
                going = (tokens[open_rows, step + 1 - look : step + 1] != eos).all(1)
                open_rows, last = open_rows[going], last[going]
                if not len(open_rows):
                    break

    @torch.no_grad()
    def paint(
        self,
        groups: list[Group],
        sampler: Sampler,
        *,
        step: Callable | None = None,
        prefix: Cache | None = None,
    ) -> torch.Tensor:
        """Paint a picture for each branch. Returns x (I * T, C), their final latents in order.

        groups: each branch holds one `Noised`, the noise that its picture starts from.
        `step(k, x, v, t=, t_next=) -> x` replaces the Euler step (GRPO's window of SDE steps).
        prefix: what `prefill` gave for the prompts of these groups.
        """
        if prefix is not None:
            groups = [replace(group, prompt=group.prompt.hollow()) for group in groups]
        noise = [
            start.x for group in groups for branch in group.branches for start in branch.noised
        ]
        x = torch.cat(noise).to(self.device)  # (I * T, C)
        lengths = torch.tensor([len(x) for x in noise], device=self.device)  # (I,)
        velocity = self._velocity(groups, sampler, lengths, prefix=prefix)
        grid = flow.time_grid(sampler.num_timesteps, sampler.timestep_shift)
        active = flow.guidance_active(grid, sampler.guidance_interval).tolist()
        if len(sampler.contexts) == 1:
            active = [False] * len(grid)
        past = []  # (t, v) of the last passes of the model
        for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
            if k and active[k] != active[k - 1]:
                past = []
            if len(past) < CACHED or k % sampler.cache_interval == 0:
                v = velocity(x, t, active[k])  # (I * T, C)
                past = [*past, (t, v)][-CACHED:]
            else:
                v = flow.extrapolate([time for time, _ in past], [v for _, v in past], t)
            if step is None:
                x = flow.euler_step(x, v, t, t_next=t_next)
            else:
                x = step(k, x, v, t=t, t_next=t_next)
        return x

    def _velocity(self, groups, sampler, lengths, *, prefix):
        """A function (x, t, whether guidance is active) -> the velocity that the sampler follows.

        x and it (I * T, C), lengths (I,). What is given is computed here and cached; guidance
        contexts only where they are asked for.
        """
        packed, rows = lay_out(self.layout, groups, sampler.contexts)
        packed = packed.to(self.device)
        rows = {name: index.to(self.device) for name, index in rows.items()}
        image_of_token = torch.repeat_interleave(lengths)  # (I * T,)
        cache, canvases = self._fill(packed, prefix), {}

        def velocity(x, t, active):
            if active not in canvases:
                contexts = sampler.contexts if active else ("full",)
                canvases[active] = canvas_of(packed, {name: rows[name] for name in contexts})
            canvas, asked = canvases[active]
            token = torch.cat([*asked.values()]).argsort() % len(x)  # (M,) of x
            canvas.latents = x[token]  # (M, C)
            canvas.timesteps = torch.full_like(canvas.timesteps, t)
            v = self.model.velocity(canvas, self.model(canvas, cache)[1])  # (M, C)
            return guided(
                v, asked, t, sampler=sampler, image_of_token=image_of_token, images=len(lengths)
            )

        return velocity

    def _fill(self, packed: Packed, prefix: Cache | None) -> Cache:
        """A cache of all that is given: prompts from `prefix` if it is there, the rest computed."""
        cache, given = Cache(self.model, len(packed)), packed.rows_of("given")
        if prefix is not None:
            cache.take_over(packed.rows_of("given", packed.shared & ~packed.extra), prefix)
            given = packed.rows_of("given", ~packed.shared | packed.extra)
        if len(given):
            self.model.fill(packed.select(given), cache)
        return cache

    def pictures(self, tokens: list[torch.Tensor], grids: list[tuple[int, int]]) -> list:
        """Latent tokens (T, C) of some pictures, and their grids -> PIL RGB.

        Neighbours of one size are decoded together, up to MAX_DECODED pixels at a time.
        """
        config, decoded = self.model.config, []
        for (h, w), same in itertools.groupby(zip(grids, tokens), lambda pair: pair[0]):
            latents = [unpatchify(picture, (h, w), config.latent_patch) for _, picture in same]
            at_once = max(1, MAX_DECODED // (h * w * config.token_pixels**2))
            for part in torch.stack(latents).split(at_once):  # (B, c, h, w)
                decoded += [to_pil(image) for image in self.model.codec.decode(part)]
        return decoded

    def generate(
        self,
        requests: list[Request],
        *,
        sampler: Sampler,
        thinking: Thinking | None,
        batch: int,
        seeds: list[tuple[int, ...]],
        step: Callable | None = None,
    ) -> list[Result]:
        """Plans and pictures for all requests.

        thinking: None paints straight from the prompts. batch: requests at a time, bounds the
        memory. seeds: for each request the numbers that its plan and its noise depend on, whatever
        its company and whoever asks. step: as in `paint`.
        """
        results = []
        for begin in tqdm(range(0, len(requests), batch), disable=None, desc="paint", leave=False):
            part, numbers = requests[begin : begin + batch], seeds[begin : begin + batch]
            prompts = [self.prompt(r.references, r.instruction, r.system) for r in part]
            plans = [self.tokenizer.encode(r.plan) if r.plan else None for r in part]
            ask = [i for i, plan in enumerate(plans) if plan is None and thinking is not None]
            prefix = self.prefill(prompts) if len(ask) == len(part) else None
            if ask:
                generators = [generator(*numbers[i], THINKING) for i in ask]
                written, _ = self.think(
                    [prompts[i] for i in ask], thinking, generators=generators, prefix=prefix
                )
                for i, plan in zip(ask, written):
                    plans[i] = plan
            groups = []
            for request, prompt, plan, seed in zip(part, prompts, plans, numbers):
                start = self.start(request.grid, generator(*seed, PAINTING))
                groups.append(Group(prompt, request.grid, (Branch(plan, (start,)),)))
            x = self.paint(groups, sampler, step=step, prefix=prefix)
            del prefix  # the codec needs memory too
            latents = x.split([r.grid[0] * r.grid[1] for r in part])  # (T, C) each
            images = self.pictures(latents, [r.grid for r in part])
            results += map(self._result, part, plans, images)
        return results

    def start(self, grid: tuple[int, int], generator: torch.Generator) -> Noised:
        """The noise that a picture of this grid starts from."""
        channels = self.model.config.token_channels
        return Noised(draw_noise([grid[0] * grid[1]], channels, [generator]), 1.0)

    def _result(self, request: Request, plan: list | None, image: Image.Image) -> Result:
        references = len(request.references)
        if plan is None:
            return Result("", None, [], False, image)
        text = self.tokenizer.decode(plan)
        read, problems = iccot.salvage(text, references)
        return Result(text, read, problems, iccot.is_valid(text, references), image)
