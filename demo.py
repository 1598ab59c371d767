"""
A page where one sees the plan and steers the picture: python demo.py, then a browser.

    references + instruction   think   plan: caption, a line a reference; every field can be edited
    plan                       paint   the picture, step by step, and how well it agrees
                               compare without a plan, and by the checkpoint `before`
                               group   what GRPO sees: members, rewards, advantages

One request is computed at a time, the others wait in a queue. The page is served to this machine
alone (127.0.0.1); nothing is sent anywhere. What it does is in studies/studio.py; this file is
buttons. It needs Gradio: pip install -r requirements-optional.txt
Left out: accounts, a public address, keeping what was made.

    python demo.py --checkpoint out/toy-grpo --before out/toy-sft
    python demo.py --config full --checkpoint out/full-grpo
"""

import base64
import errno
import html
import socket
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

import grpo
import iccot
from engine import Engine, Sampler, Thinking
from reward import Clip, source_of
from runtime import processes
from runtime.config import UserError, exit_on_user_error, parse
from runtime.quantised import load_quantised
from studies.pictures import fitted
from studies.studio import Ask, Studio, so_far
from toy.tasks import Drawn
from vision import to_png

try:
    import gradio as gr
except ImportError:  # said in main
    gr = None

SIDE = 384  # pixels on the page that small pictures are enlarged to
STYLE = """
.gradio-container { max-width: 1200px !important; margin: auto; }
.pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 12px; }
.cards figure { margin: 0; }
.cards img { width: 100%; image-rendering: pixelated; border-radius: 6px; }
.cards figcaption { font-size: 13px; line-height: 1.35; }
.line { align-items: center; }
"""
PENDING = 16  # requests that may wait


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model, or owner/name on Hugging Face
    before: str = ""  # another one that stands beside it in the comparison: stage 1
    clip_name: str = "ViT-L-14"  # open_clip architecture of the reward's CLIP; toys: toy
    clip: str = "openai"  # its weights: an open_clip tag, a file, a folder; "": no agreement
    max_references: int = 4
    max_plan_tokens: int = 1000
    num_timesteps: int = 50  # grid points, to begin with; one more than model evaluations
    timestep_shift: float = 3.0
    text_guidance: float = 4.0  # to begin with; 1: off
    image_guidance: float = 1.5
    group_size: int = 8  # members that the button Group rolls out
    std_floor: float = 0.003  # of their rewards, as in grpo.py
    square: bool = False  # the largest square, not as large as the last reference
    examples: int = 0  # toy prompts at one click, of 32 * examples pixels; 0: none
    port: int = 7860
    max_upload_mb: int = 20  # of a picture
    dtype: str = "auto"  # of the weights: float32, bfloat16; auto: bfloat16 on a GPU
    weights: Literal["full", "int8", "nf4"] = "full"  # of the experts, for cards that are too small
    device: str = "auto"  # cuda, mps or cpu; auto: the first of them that is there
    threads: int = 0  # CPU threads; 0 measures
    config: str = ""  # name of the preset

    def __post_init__(self):
        _ = self.sampler, self.members, Thinking(self.max_plan_tokens)  # check their own values
        if self.max_references < 1:
            raise ValueError(f"max_references={self.max_references}: expected at least 1")
        if not 0 < self.port < 65536:
            raise ValueError(f"port={self.port}: expected a number from 1 to 65535")

    @property
    def sampler(self):
        guidance = self.text_guidance, self.image_guidance
        return Sampler(self.num_timesteps, self.timestep_shift, *guidance)

    @property
    def members(self):
        return grpo.Config(
            group_size=self.group_size,
            max_plan_tokens=self.max_plan_tokens,
            num_timesteps=self.num_timesteps,
            timestep_shift=self.timestep_shift,
            std_floor=self.std_floor,
            pictures_at_once=self.group_size if self.examples else 1,
        )


# fmt: off
TOY = dict(
    clip_name="toy", clip="out/toy-clip-reward", max_plan_tokens=72, num_timesteps=7,
    timestep_shift=10.0, text_guidance=1.0, image_guidance=1.0, std_floor=0.02, square=True,
    examples=1,
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


@contextmanager
def said_on_the_page():
    """A person's mistake becomes a message on the page, which keeps what was typed."""
    try:
        yield
    except UserError as error:
        words = as_words(error)
    except torch.OutOfMemoryError:
        words = "the GPU's memory is too small for this: take fewer or smaller references"
    else:
        return
    raise gr.Error(words, duration=12, print_exception=False)


def as_words(message):
    """For a message on the page, which would take tags of a plan for HTML."""
    return html.escape(str(message), quote=False)


@dataclass(frozen=True)
class Asked:
    """What stands on the page when a button is pressed."""

    ask: Ask
    truth: object | None  # of a toy example that nobody changed
    caption: str
    relations: list


class Page:
    """The components of one page, and what their buttons do."""

    def __init__(self, studio: Studio, config: Config):
        self.studio, self.config = studio, config
        self.most = studio.max_references
        self.examples = None
        if config.examples:
            self.examples = Drawn("held_out", 0, max(2, self.most), config.examples)

    # ---------------------------------------------------------------------- what stands on it

    def build(self):
        """The gr.Blocks."""
        with gr.Blocks(title="Re-Align", analytics_enabled=False) as blocks:
            gr.Markdown(
                "## Re-Align: see the plan, steer the picture\n"
                "The model writes what the picture will show and what each reference is for, then "
                "paints that. Edit the plan and paint again."
            )
            self.truth = gr.State(None)  # the toy sample on the page, while nobody changed it
            with gr.Row():
                with gr.Column(min_width=340):
                    self._ask()
                with gr.Column(min_width=340):
                    self._answer()
            self._wire()
        return blocks

    def _ask(self):
        if self.examples is not None:
            with gr.Row():
                words = [f"Example, {n} reference{'s' * (n > 1)}" for n in range(1, self.most + 1)]
                shown = range(min(4, self.most))
                self.example = [gr.Button(words[n], size="sm", min_width=80) for n in shown]
        self.number = gr.State(0)
        self.instruction = gr.Textbox(
            label="Instruction",
            lines=2,
            max_length=2000,
            elem_id="instruction",
            placeholder='"image 1" names the first reference',
        )
        with gr.Row():
            self.think = gr.Button("Think and paint", variant="primary", elem_id="think")
            self.paint = gr.Button("Paint this plan", elem_id="paint")
        self.caption = gr.Textbox(
            label="Plan: what the picture shows", lines=2, max_length=4000, elem_id="caption"
        )
        self.rows, self.pictures, self.relations, self.up = [], [], [], []
        for i in range(self.most):
            with gr.Row(visible=i == 0, elem_classes="line") as row:
                self._reference(i)
            self.rows.append(row)
        with gr.Accordion("Seed, steps, guidance", open=False):
            config = self.config
            self.seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
            self.steps = slider("Steps", 1, 100, value=config.num_timesteps - 1, step=1)
            self.text = slider("Text guidance; 1: off", 1, 10, value=config.text_guidance)
            self.image = slider("Image guidance; 1: off", 1, 4, value=config.image_guidance)
            self.heat = slider("Temperature of the plan; 0: the likeliest", 0, 2, value=0)

    def _reference(self, i):
        """A reference, and what the plan says of it."""
        picture = gr.Image(
            label=f"Reference {i + 1}",
            type="filepath",
            format="png",
            sources=["upload", "clipboard"],
            height=150,
            scale=1,
            min_width=120,
            elem_classes="pixels",
            elem_id=f"reference-{i + 1}",
            buttons=[],
        )
        picture.preprocess = path_of  # Gradio would open it, and say nothing where it cannot
        self.pictures.append(picture)
        with gr.Column(scale=2, min_width=160):
            words = dict(label=f"Plan: what reference {i + 1} is for", lines=2, max_length=2000)
            self.relations.append(gr.Textbox(elem_id=f"relation-{i + 1}", **words))
            self.up.append(gr.Button("Move up", size="sm", visible=i > 0))

    def _answer(self):
        self.picture = gr.Image(
            label="Picture",
            interactive=False,
            format="png",
            height=SIDE + 20,
            elem_classes="pixels",
            elem_id="picture",
            buttons=["download", "fullscreen"],
        )
        self.words = gr.Markdown("Nothing painted yet.", elem_id="words")
        with gr.Row():
            self.compare = gr.Button("Compare", elem_id="compare")
            self.group = gr.Button("Group", elem_id="group")
        gr.Markdown(
            "*Compare* paints this prompt from the same noise without a plan"
            f"{' and by stage 1' if self.config.before else ''}; *Group* shows what GRPO sees: "
            f"{self.config.group_size} plans and pictures, their rewards and advantages."
        )
        self.cards = gr.HTML(elem_id="cards")

    def _wire(self):
        """Which button does what. Inputs stand in one order everywhere: see `_asked`."""
        inputs = [self.instruction, self.seed, self.steps, self.text, self.image, self.heat]
        plan = [self.truth, self.caption, *self.relations]
        everything = [*inputs, *self.pictures, *plan]
        alone = dict(concurrency_id="engine", concurrency_limit=1, show_progress="minimal")
        written = [self.caption, *self.relations]
        shown = [self.picture, self.words]
        self.think.click(self.on_think, everything, written, api_name="think", **alone).success(
            self.on_paint, everything, shown, **alone
        )
        self.paint.click(self.on_paint, everything, shown, api_name="paint", **alone)
        self.compare.click(self.on_compare, everything, self.cards, api_name="compare", **alone)
        self.group.click(self.on_group, everything, self.cards, api_name="group", **alone)
        for picture in self.pictures:
            picture.change(self.on_references, self.pictures, self.rows, show_progress="hidden")
        for i in range(1, self.most):
            pair = [self.pictures[i - 1], self.pictures[i]]
            pair += [self.relations[i - 1], self.relations[i]]
            swap = dict(show_progress="hidden", api_name=False)
            self.up[i].click(swapped, pair, pair, **swap)
        for i, button in enumerate(self.example if self.examples is not None else ()):
            fills = [self.number, self.truth, self.instruction, *self.pictures, *written]
            button.click(self.with_references(i + 1), self.number, fills, api_name=False)

    # ---------------------------------------------------------------------- what it does

    def _asked(self, values):
        """The Asked of the values of `everything`."""
        instruction, seed, steps, text, image, heat, *rest = values
        paths, (example, caption, *relations) = rest[: self.most], rest[self.most :]
        references = self.studio.read(paths)
        sampler = replace(
            self.config.sampler,
            num_timesteps=int(steps) + 1,
            text_guidance=text,
            image_guidance=image,
        )
        if isinstance(seed, bool) or seed is None or not 0 <= seed < 2**62:
            raise UserError("the seed must be a whole number from 0 on")
        ask = Ask(references, instruction or "", int(seed), sampler, heat)
        same = example and instruction == example.instruction and references == example.references
        return Asked(ask, example.truth if same else None, caption or "", relations)

    def text_of(self, asked):
        """The plan in the fields."""
        return self.studio.write(asked.caption, asked.relations, len(asked.ask.references))

    def on_think(self, *values):
        """The plan as it is written, into its fields."""
        with said_on_the_page():
            ask = self._asked(values).ask
            self.studio.request(ask)  # UserError for what is wrong with it
            text, count = "", len(ask.references)
            for text in self.studio.thoughts(ask):
                yield so_far(text, count, self.most)
            plan, problems = iccot.salvage(text, count)
            if problems:
                words = f"The plan does not parse: {problems[0]}. What could be read is shown."
                gr.Warning(as_words(words))
            if plan is not None:
                yield [plan.caption, *plan.relations, *[""] * (self.most - count)]

    def on_paint(self, *values):
        """The picture of the plan in the fields, every few steps, and a verdict."""
        with said_on_the_page():
            asked = self._asked(values)
            text, image = self.text_of(asked), None
            steps = asked.ask.sampler.num_timesteps - 1
            for done, image in self.studio.stages(asked.ask, text):
                yield fitted(image, SIDE), f"step {done} of {steps}"
            verdict = self.studio.verdict(image, asked.caption, asked.truth)
            yield (
                image if max(image.size) > SIDE else fitted(image, SIDE),
                verdict or f"{steps} steps",
            )

    def on_compare(self, *values):
        """Cards of the same prompt and noise without a plan, and by the other checkpoint."""
        with said_on_the_page():
            asked = self._asked(values)
            text = self.text_of(asked)
            how = dict(caption=asked.caption, truth=asked.truth)
            for rows in self.studio.compare(asked.ask, text, **how):
                yield cards(rows)

    def on_group(self, *values):
        """Cards of a group's members."""
        with said_on_the_page():
            return cards(self.studio.group(self._asked(values).ask))

    def on_references(self, *paths):
        """One row more than there are references."""
        last = max((i for i, path in enumerate(paths) if path), default=-1)
        return [gr.update(visible=i <= last + 1) for i in range(self.most)]

    def with_references(self, count):
        """A function: the next held-out prompt with so many references, into the fields."""

        def fill(number):
            while len((sample := self.examples[number]).references) != count:
                number += 1
            blank = [None] * (self.most - count)
            plan = [""] * (1 + self.most)
            values = [number + 1, sample, sample.instruction, *sample.references, *blank, *plan]
            return values

        return fill


def slider(label, low, high, *, value, step=0.1):
    """One that reaches as far as the value of the command."""
    return gr.Slider(min(low, value), max(high, value), value, step=step, label=label)


def path_of(payload):
    """The file of an upload, unopened: vision.open_image opens it, and says what is wrong."""
    return payload.path if payload else None


def cards(rows):
    """[(PIL, words)] as HTML, each with its words below."""
    found = []
    for image, words in rows:
        data = base64.b64encode(to_png(fitted(image, SIDE))).decode()
        picture = f'<img src="data:image/png;base64,{data}" alt="{html.escape(words)}">'
        found.append(f"<figure>{picture}<figcaption>{html.escape(words)}</figcaption></figure>")
    return f'<div class="cards">{"".join(found)}</div>'


def swapped(*values):
    """Two references and their two lines, exchanged: (first, second, its line, the other's)."""
    return [values[i] for i in (1, 0, 3, 2)]


# --------------------------------------------------------------------------------------------------
# the command


def open_studio(config):
    """The checkpoints and the CLIP; UserError and the like for what is missing."""
    place = processes.placed(config.device, config.dtype)
    names = {"this checkpoint": config.checkpoint}
    if config.before:
        names["before"] = config.before
    how = dict(kind=config.weights)
    engines = {name: Engine(*load_quantised(path, *place, **how)) for name, path in names.items()}
    shape, side = next(iter(engines.values())).model.config, 0
    if config.square:
        side = shape.latent_side * shape.token_pixels
    clip = None
    if config.clip:
        clip = Clip(source_of(config.clip_name, config.clip), str(place[0]))
    members = replace(config.members, picture_side=side)
    return Studio(engines, clip, members=members, max_references=config.max_references)


def check_port(port):
    """UserError if somebody listens there already."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(
                f"port {port} of this machine cannot be used ({error.strerror}); choose another "
                f"one with --port"
            ) from None


def serve(config, studio, block=True):
    """Build the page and serve it; returns the gr.Blocks once it answers, unless it blocks."""
    blocks = Page(studio, config).build()
    blocks.queue(max_size=PENDING, default_concurrency_limit=4)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    print(f"demo: http://127.0.0.1:{config.port} (ends with Ctrl-C)", flush=True)
    blocks.launch(
        server_name="127.0.0.1",
        server_port=config.port,
        share=False,
        quiet=True,
        css=STYLE,
        theme=theme,
        footer_links=[],
        max_file_size=config.max_upload_mb * 2**20,
        prevent_thread_lock=not block,
        ssr_mode=False,
    )
    return blocks


@exit_on_user_error(ValueError)
def main(config):
    if gr is None:
        raise UserError("the page needs Gradio: pip install -r requirements-optional.txt")
    check_port(config.port)
    studio = open_studio(config)
    processes.choose_threads(config.threads)
    serve(config, studio)


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
