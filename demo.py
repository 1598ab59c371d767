"""
A page where one sees the plan and steers the picture: python demo.py, then a browser.

    references + instruction   think   plan: caption, a line a reference; every field can be edited
    plan                       paint   the picture, and how well it agrees
                               compare without a plan, and by the checkpoint `before`
                               group   what GRPO sees: members, rewards, advantages

A plan comes back from the page as its fields. It is written in the grammar again and given to the
model in place of its own, so the picture follows the edited words. One request is computed at a
time, the others wait in a queue. The page is served to this machine alone (127.0.0.1); nothing is
sent anywhere. A `Studio` does the work, a `Page` has the buttons. It needs Gradio.
Left out: accounts, a public address, keeping what was made, the picture on its way (sample.py).

    python demo.py --checkpoint out/toy-grpo --before out/toy-sft
    python demo.py --config full --checkpoint out/full-grpo
"""

import base64
import html
import socket
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

import iccot
from engine import Engine, Request, Sampler, Thinking
from reward import Clip, group_rewards
from runtime import processes
from runtime.config import UserError, exit_on_user_error, parse
from runtime.quantised import load_quantised
from toy.judge import judge
from toy.tasks import Drawn
from vision import open_image, to_png

try:
    import gradio as gr
except ImportError:  # said in main
    gr = None

SIDE = 384  # pixels of a picture in a comparison or a group, at most
LARGEST = 20 * 2**20  # bytes of an uploaded picture
STYLE = """
.gradio-container { max-width: 1200px !important; margin: auto; }
.pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 12px; }
.cards figure { margin: 0; }
.cards img { width: 100%; image-rendering: pixelated; border-radius: 6px; }
.cards figcaption { font-size: 13px; line-height: 1.35; }
"""


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model, or owner/name on Hugging Face
    before: str = ""  # another one that stands beside it in the comparison: stage 1
    clip: str = "ViT-L-14:openai"  # the CLIP of the reward, see reward.Clip; "": no agreement
    max_references: int = 4
    max_plan_tokens: int = 1000
    num_timesteps: int = 50  # grid points; one more than model evaluations
    timestep_shift: float = 3.0
    text_guidance: float = 4.0  # 1: off
    image_guidance: float = 1.5
    group_size: int = 8  # members of a group
    std_floor: float = 0.003  # of their rewards, as in grpo.py
    square: bool = False  # the largest square, not as large as the last reference
    examples: int = 0  # toy prompts at one click, of 32 * examples pixels; 0: none
    port: int = 7860
    weights: Literal["full", "int8", "nf4"] = "full"  # of the experts, for cards that are too small
    device: str = "auto"  # cuda, mps or cpu; auto: the first of them that is there
    threads: int = 0  # CPU threads; 0: PyTorch's own number
    config: str = ""  # name of the preset

    def __post_init__(self):
        _ = self.sampler, Thinking(self.max_plan_tokens)  # check their own values
        if min(self.max_references, self.group_size - 1) < 1:
            raise ValueError(
                f"max_references={self.max_references}, group_size={self.group_size}: expected at "
                f"least 1 and 2"
            )
        if not 0 < self.port < 65536:
            raise ValueError(f"port={self.port}: expected a number from 1 to 65535")

    @property
    def sampler(self):
        guidance = self.text_guidance, self.image_guidance
        return Sampler(self.num_timesteps, self.timestep_shift, *guidance)


# fmt: off
TOY = dict(
    clip="out/toy-clip-reward", max_plan_tokens=72, num_timesteps=7, timestep_shift=10.0,
    text_guidance=1.0, image_guidance=1.0, std_floor=0.02, square=True, examples=1,
)
PRESETS = {
    "toy": TOY,
    "smoke": TOY | dict(checkpoint="out/smoke-grpo", clip="out/smoke-clip-reward", group_size=4),
    "small": TOY | dict(checkpoint="out/small-grpo", examples=2),
    "rehearsal": TOY | dict(
        checkpoint="out/rehearsal-grpo", clip="out/smoke-clip-reward", max_plan_tokens=256,
        timestep_shift=3.0, text_guidance=4.0, image_guidance=2.0, examples=16,
    ),
    "full": dict(checkpoint="out/full-grpo"),
}
# fmt: on


# --------------------------------------------------------------------------------------------------
# what the page does


@dataclass(frozen=True)
class Ask:
    """What stands on the page when a button is pressed. references: PIL RGB."""

    references: tuple
    instruction: str
    seed: int
    caption: str = ""  # of the plan in the fields
    relations: tuple[str, ...] = ()
    truth: object | None = None  # of a toy example that nobody changed

    def __post_init__(self):
        if not self.instruction.strip():
            raise UserError("the instruction is empty: say what to draw")


class Studio:
    """A checkpoint, the reward's CLIP and the checkpoint `before`, or None in place of these two.

    Whatever a person can get wrong is a ValueError of one sentence.
    """

    def __init__(self, engine: Engine, clip: Clip | None, before: Engine | None, config: Config):
        self.engine, self.clip, self.before, self.config = engine, clip, before, config

    def read(self, paths) -> tuple:
        """The pictures of some files, PIL RGB; None is an empty place, which nothing may follow."""
        pictures = []
        last = max((i for i, path in enumerate(paths, 1) if path), default=0)
        for i, path in enumerate(paths[:last], 1):
            if path is None:
                raise UserError(f"reference {i} is missing; drop a picture there")
            try:
                pictures.append(open_image(path))
            except ValueError:  # its words name a file that nobody knows
                raise UserError(
                    f"reference {i} cannot be read as a picture; take another PNG, JPEG or WebP"
                ) from None
        return tuple(pictures)

    def request(self, ask: Ask, plan: str) -> Request:
        """The engine.Request of an Ask. The picture is as large as the last reference."""
        shape = self.engine.model.config
        grid = (shape.latent_side, shape.latent_side)
        if ask.references and not self.config.square:
            grid = shape.picture_grid(*ask.references[-1].size)
        return Request(ask.references, ask.instruction, grid, plan=plan)

    def thoughts(self, ask: Ask):
        """The text of the plan, longer with every token."""
        engine, eos = self.engine, self.engine.layout.eos
        prompt = engine.prompt(ask.references, ask.instruction)
        for tokens in engine.tokens([prompt], Thinking(self.config.max_plan_tokens)):
            (row,) = tokens.tolist()
            written = [token for token in row if token >= 0]
            yield engine.tokenizer.decode(written[: written.index(eos)] if eos in row else written)

    def write(self, ask: Ask) -> str:
        """The text of the plan in the fields."""
        references = len(ask.references)
        fields = {"the caption": ask.caption}
        fields |= {f"the line of reference {i + 1}": ask.relations[i] for i in range(references)}
        for name, text in fields.items():
            if not text.strip():
                raise UserError(f"{name} is empty: write it, or let the model think again")
        caption, *relations = (text.strip() for text in fields.values())
        try:
            text = iccot.render(iccot.ICCoT(caption, tuple(relations)))
            iccot.parse(text, references)
        except iccot.PlanError as error:
            raise UserError(f"the plan does not parse: {error}") from None
        return text

    def paint(self, ask: Ask, plan: str, engine: Engine | None = None):
        """The picture of a plan, PIL; "": straight from the prompt."""
        (result,) = (engine or self.engine).generate(
            [self.request(ask, plan)],
            sampler=self.config.sampler,
            thinking=None,
            batch=1,
            seeds=[(ask.seed,)],
        )
        return result.image

    def verdict(self, image, ask: Ask) -> str:
        """What can be said of a picture: agreement with its plan; PF, SC where truth is known."""
        words = []
        if self.clip is not None and ask.caption.strip():
            agreement = float(self.clip.clip_out([image], [ask.caption])[0])
            words.append(f"CLIP agreement with the plan {agreement:.1f}")
        if ask.truth is not None:
            verdict = judge(image, ask.truth)
            scores = f"PF {verdict.pf:.1f}, SC {verdict.sc:.1f} of 10"
            words.append(f"{scores}, against the example's truth")
        return "; ".join(words)

    def compare(self, ask: Ask):
        """[(PIL, words)]: without a plan and with it, then by `before`, from the same noise."""
        text = self.write(ask)
        rows = [(self.engine, "", "no plan"), (self.engine, text, "this plan")]
        if self.before is not None:
            rows.append((self.before, text, "this plan, before"))
        cards = []
        for engine, plan, words in rows:
            image = self.paint(ask, plan, engine)
            cards.append((image, f"{words}. {self.verdict(image, ask)}"))
        return cards

    def group(self, ask: Ask):
        """[(PIL, words)]: members that plan for themselves, the best first, as GRPO sees them."""
        if self.clip is None:
            raise UserError("rewards need a CLIP: start the page with --clip")
        config, members = self.config, range(self.config.group_size)
        results = self.engine.generate(
            [self.request(ask, "")] * len(members),
            sampler=replace(config.sampler, text_guidance=1.0),
            thinking=Thinking(config.max_plan_tokens, temperature=1.0),
            batch=len(members) if config.examples else 1,
            seeds=[(ask.seed, i) for i in members],
        )
        images = [result.image for result in results]
        captions = [result.plan.caption if result.valid else "" for result in results]
        (reward,) = group_rewards(self.clip, images, captions, groups=1)  # (G,)
        spread = reward.std(correction=0).clamp_min(config.std_floor)
        advantage = (reward - reward.mean()) / spread
        return [
            (
                images[i],
                f"reward {reward[i]:.3f}, advantage {advantage[i]:+.2f}: "
                f"{captions[i] or 'its plan does not parse'}",
            )
            for i in reward.argsort(descending=True).tolist()
        ]


def so_far(text: str, references: int, most: int) -> list[str]:
    """The caption and `most` relations of a plan that is still being written, "" for what lacks."""
    fields = []
    for name in ("out_caption", *(f"relation_{i}" for i in range(1, references + 1))):
        _, begun, rest = text.partition(f"<{name}>")
        fields.append(rest.partition("<")[0].strip() if begun else "")
    return fields + [""] * (most - references)


# --------------------------------------------------------------------------------------------------
# the page


@contextmanager
def said_on_the_page():
    """A person's mistake becomes a message on the page, which keeps what was typed."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError) as error:
        words = html.escape(str(error), quote=False)  # the page would take a plan's tags for HTML
        if isinstance(error, torch.OutOfMemoryError):
            words = "the GPU's memory is too small for this: take fewer or smaller references"
        raise gr.Error(words, duration=12, print_exception=False) from None


class Page:
    """The components of one page, and what their buttons do."""

    def __init__(self, studio: Studio):
        self.studio, self.config = studio, studio.config
        self.most = self.config.max_references

    def build(self):
        """The gr.Blocks."""
        with gr.Blocks(title="Re-Align", analytics_enabled=False) as blocks:
            gr.Markdown(
                "## Re-Align: see the plan, steer the picture\n"
                "The model writes what the picture will show and what each reference is for, then "
                "paints that. Edit the plan and paint again."
            )
            with gr.Row():
                with gr.Column(min_width=340):
                    inputs, plan, think, paint = self._question()
                with gr.Column(min_width=340):
                    shown, cards, compare, group = self._answer()
            alone = dict(concurrency_id="engine", concurrency_limit=1, show_progress="minimal")
            thought = think.click(self.on_think, inputs, plan, api_name="think", **alone)
            thought.success(self.on_paint, inputs, shown, **alone)
            paint.click(self.on_paint, inputs, shown, api_name="paint", **alone)
            compare.click(self.on_compare, inputs, cards, api_name="compare", **alone)
            group.click(self.on_group, inputs, cards, api_name="group", **alone)
        return blocks

    def _question(self):
        """What a person gives: inputs in the order of `asked`, fields of the plan, two buttons."""
        number, truth = gr.State(0), gr.State(None)
        instruction = gr.Textbox(
            label="Instruction",
            lines=2,
            elem_id="instruction",
            placeholder='"image 1" names the first reference',
        )
        with gr.Row():
            think = gr.Button("Think and paint", variant="primary", elem_id="think")
            paint = gr.Button("Paint this plan", elem_id="paint")
        caption = gr.Textbox(label="Plan: what the picture shows", lines=2, elem_id="caption")
        pictures, relations = [], []
        for i in range(1, self.most + 1):
            with gr.Row():
                picture = gr.Image(
                    label=f"Reference {i}",
                    type="filepath",
                    format="png",
                    sources=["upload", "clipboard"],
                    height=150,
                    scale=1,
                    min_width=120,
                    elem_classes="pixels",
                    elem_id=f"reference-{i}",
                )
                picture.preprocess = path_of
                pictures.append(picture)
                label = f"Plan: what reference {i} is for"
                relations.append(gr.Textbox(label=label, lines=2, scale=2, elem_id=f"relation-{i}"))
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
        plan = [caption, *relations]
        if self.config.examples:
            example = gr.Button("Example", size="sm", elem_id="example")
            filled = [number, truth, instruction, *pictures, *plan]
            example.click(self.on_example, number, filled, api_name=False)
        return [instruction, seed, *pictures, truth, *plan], plan, think, paint

    def _answer(self):
        """What the page gives: (picture and words, cards, two buttons)."""
        picture = gr.Image(
            label="Picture",
            interactive=False,
            format="png",
            height=SIDE + 20,
            elem_classes="pixels",
            elem_id="picture",
        )
        words = gr.Markdown("Nothing painted yet.", elem_id="words")
        with gr.Row():
            compare = gr.Button("Compare", elem_id="compare")
            group = gr.Button("Group", elem_id="group")
        gr.Markdown(
            "*Compare* paints this prompt from the same noise without a plan"
            f"{' and by stage 1' if self.config.before else ''}; *Group* shows what GRPO sees: "
            f"{self.config.group_size} plans and pictures, their rewards and advantages."
        )
        return [picture, words], gr.HTML(elem_id="cards"), compare, group

    def asked(self, values):
        """The Ask of the values of all inputs."""
        instruction, seed, *rest = values
        paths, (example, caption, *relations) = rest[: self.most], rest[self.most :]
        references = self.studio.read(paths)
        if seed is None:
            raise UserError("the seed is empty: write a number")
        same = example and instruction == example.instruction and references == example.references
        truth = example.truth if same else None
        return Ask(references, instruction, int(seed), caption, tuple(relations), truth)

    def on_think(self, *values):
        """The plan as it is written, into its fields."""
        with said_on_the_page():
            ask, text = self.asked(values), ""
            count = len(ask.references)
            for text in self.studio.thoughts(ask):
                yield so_far(text, count, self.most)
            if not iccot.is_valid(text, count):
                gr.Warning("The plan does not parse. What could be read is shown.")

    def on_paint(self, *values):
        """The picture of the plan in the fields, and a verdict."""
        with said_on_the_page():
            ask = self.asked(values)
            image = self.studio.paint(ask, self.studio.write(ask))
            return image, self.studio.verdict(image, ask) or "Painted."

    def on_compare(self, *values):
        """Cards of the same prompt and noise without a plan, and by the other checkpoint."""
        with said_on_the_page():
            return cards(self.studio.compare(self.asked(values)))

    def on_group(self, *values):
        """Cards of a group's members."""
        with said_on_the_page():
            return cards(self.studio.group(self.asked(values)))

    def on_example(self, number):
        """The next held-out prompt of the toy world, into the fields."""
        examples = Drawn("held_out", 0, max(2, self.most), self.config.examples)
        while len((sample := examples[number]).references) > self.most:
            number += 1
        blank = [None] * (self.most - len(sample.references))
        plan = [""] * (1 + self.most)
        return [number + 1, sample, sample.instruction, *sample.references, *blank, *plan]


def path_of(payload):
    """The file of an upload, unopened: vision.open_image opens it, and says what is wrong."""
    return payload.path if payload else None


def cards(rows):
    """[(PIL, words)] as HTML, each with its words below."""
    figures = []
    for image, words in rows:
        image.thumbnail((SIDE, SIDE))
        data, words = base64.b64encode(to_png(image)).decode(), html.escape(words)
        picture = f'<img src="data:image/png;base64,{data}" alt="{words}">'
        figures.append(f"<figure>{picture}<figcaption>{words}</figcaption></figure>")
    return f'<div class="cards">{"".join(figures)}</div>'


# --------------------------------------------------------------------------------------------------
# the command


def open_studio(config):
    """The checkpoints and the CLIP; UserError and the like for what is missing."""
    device, dtype = processes.placed(config.device, "auto")
    engine = Engine(*load_quantised(config.checkpoint, device, dtype, kind=config.weights))
    clip = before = None
    if config.clip:
        clip = Clip(config.clip, str(device))
    if config.before:
        before = Engine(*load_quantised(config.before, device, dtype, kind=config.weights))
    return Studio(engine, clip, before, config)


def serve(config, studio, block=True):
    """Build the page and serve it; returns the gr.Blocks once it answers, unless it blocks."""
    blocks = Page(studio).build()
    print(f"demo: http://127.0.0.1:{config.port} (ends with Ctrl-C)", flush=True)
    blocks.launch(
        server_name="127.0.0.1",
        server_port=config.port,
        share=False,
        quiet=True,
        css=STYLE,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        max_file_size=LARGEST,
        prevent_thread_lock=not block,
        ssr_mode=False,
    )
    return blocks


@exit_on_user_error(ValueError)
def main(config):
    """Serve the page until Ctrl-C."""
    if gr is None:
        raise UserError("the page needs Gradio: pip install -r requirements-optional.txt")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", config.port)) == 0:
            raise UserError(f"--port {config.port} of this machine is taken; choose another one")
    studio = open_studio(config)
    processes.choose_threads(config.threads)
    serve(config, studio)


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
