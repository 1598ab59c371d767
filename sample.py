"""
From the command line: references and an instruction to a plan and a picture (engine.py).

Each picture gets its plan beside it as JSON. Several seeds, or prompts from a file, go into a
folder, one after the other; pictures that are there already are not painted again.

    python sample.py --checkpoint out/toy-grpo --ref a.png --ref b.png --prompt "Put them together."
    python sample.py --checkpoint out/toy-grpo --prompts prompts.jsonl --seeds 4 --out pictures
    python sample.py --checkpoint out/toy-grpo --prompt "A man in red." --steps_picture steps.png

A line of prompts.jsonl: {"prompt": "Put them together.", "ref": ["a.png", "b.png"], "key": "here"}
Left out: pages to click on, top-k, beam search.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from PIL import Image
from tqdm import tqdm

import flow
import iccot
from engine import Engine, Request, Sampler, Thinking
from runtime import accountant, files, processes
from runtime.config import UserError, exit_on_user_error, parse
from runtime.pretrained import shape_of
from runtime.quantised import load_quantised
from studies.pictures import evenly, save_path
from vision import open_image

FIELDS = {"prompt": str, "ref": list, "key": (str, int)}  # of a line of a file of prompts
LINE = '{"prompt": "...", "ref": ["a.png"], "key": "..."}'
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
STEPS = 9  # of --steps_picture, at most


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model, or owner/name on Hugging Face
    ref: tuple[str, ...] = ()  # reference pictures: --ref a.png --ref b.png
    prompt: str = ""  # the instruction; "image 1" names a reference, <image> places it
    prompts: str = ""  # in place of both: a file of JSON lines {"prompt", "ref", "key"}
    out: str = "picture.png"  # file to write; a folder for several prompts or seeds
    steps_picture: str = ""  # a PNG of the way from noise to the picture; of one picture alone
    seeds: int = 1  # pictures of each prompt, with the seeds seed, seed + 1, ...
    plan: bool = True  # write an IC-CoT first; false paints straight from the prompt
    max_plan_tokens: int = 1000
    temperature: float = 0.0  # of the plan; 0 is greedy
    top_p: float = 1.0  # draw from the likeliest tokens of this total probability; 1: all
    system_prompt: bool = False  # BAGEL's request to think first; for weights not trained here
    num_timesteps: int = 50  # grid points; one more than model evaluations
    timestep_shift: float = 3.0
    text_guidance: float = 4.0  # 1: off; these four as in BAGEL's gen_image (evaluate.py: editing)
    image_guidance: float = 1.5
    guidance_low: float = 0.4  # guidance acts at times above this
    renorm: Literal["global", "channel", "text_channel"] = "global"  # see flow.guide
    cache_interval: int = 1  # denoising steps to a pass of the model; the others extrapolate
    size: str = ""  # 512x384: width, height; square: the largest; else as the last reference
    weights: Literal["full", "int8", "nf4"] = "full"  # of the experts, for cards that are too small
    device: str = "auto"  # cuda, mps or cpu; auto: the first of them that is there
    seed: int = 0
    threads: int = 0  # CPU threads; 0: PyTorch's own number
    config: str = ""  # name of the preset
    memory: str = ""  # 1x80: print what every phase would hold of a GPU of 80 GB, and stop

    def __post_init__(self):
        _ = self.sampler, self.thinking  # ValueError for what cannot be drawn
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: expected at least 1")
        if not re.fullmatch(r"|square|\d{1,5}x\d{1,5}", self.size):
            raise ValueError(f"size={self.size}: expected square, or pixels as 512x384")
        if self.steps_picture and (self.prompts or self.seeds > 1):
            raise ValueError("--steps_picture shows one picture; leave --prompts and --seeds out")
        if self.steps_picture and not self.steps_picture.lower().endswith(".png"):
            raise ValueError(f"steps_picture={self.steps_picture}: expected a name with .png")
        if self.prompts and (self.prompt or self.ref):
            raise ValueError(
                "--prompts brings prompts and references from a file; leave --prompt and --ref out"
            )

    @property
    def sampler(self):
        return Sampler(
            self.num_timesteps,
            self.timestep_shift,
            self.text_guidance,
            self.image_guidance,
            guidance_interval=(self.guidance_low, 1.0),
            renorm=self.renorm,
            cache_interval=self.cache_interval,
        )

    @property
    def thinking(self):
        return Thinking(self.max_plan_tokens, self.temperature, self.top_p) if self.plan else None

    def work(self, shape):
        """What is painted at once, for --memory."""
        references = max(len(job.references) for job in jobs(self))
        largest = shape.latent_side * shape.token_pixels
        side = max(map(int, re.findall(r"\d+", self.size)), default=largest)
        return SimpleNamespace(
            batch=1,
            max_references=references,
            side=side,
            sampler=self.sampler,
            thinking=self.thinking,
        )


# fmt: off
TOY = dict(
    max_plan_tokens=72, num_timesteps=7, timestep_shift=10.0, text_guidance=1.0, image_guidance=1.0,
    size="square",
)
PRESETS = {
    "toy": TOY,
    "smoke": TOY | dict(checkpoint="out/smoke-grpo"),
    "small": TOY | dict(checkpoint="out/small-grpo"),
    "rehearsal": dict(checkpoint="out/rehearsal-grpo", num_timesteps=5),
    "full": dict(checkpoint="out/full-grpo"),
}
# fmt: on


@dataclass(frozen=True)
class Job:
    """One picture to paint."""

    prompt: str
    references: tuple[str, ...]  # paths
    seed: int
    out: Path


def jobs(config):
    """All pictures that are asked for, in order; several go into a folder."""
    if not config.prompts and config.seeds == 1:
        return [Job(config.prompt, config.ref, config.seed, Path(config.out))]
    folder = Path(config.out)
    if folder.suffix.lower() in PICTURES:
        folder = folder.with_suffix("")
    prompts = {"picture": (config.prompt, config.ref)}
    if config.prompts:
        prompts = read_prompts(Path(config.prompts))
    seeds = range(config.seed, config.seed + config.seeds)
    return [
        Job(prompt, references, seed, folder / f"{key}-{seed}.png")
        for key, (prompt, references) in prompts.items()
        for seed in seeds
    ]


def read_prompts(path):
    """{key: (prompt, paths of the references)}; relative paths are meant from the file's folder."""
    if not path.is_file():
        raise UserError(f"file of prompts not found: {path}")
    prompts = {}
    for number, line in files.lines_of(path):
        record = {"prompt": None, "ref": [], "key": f"{number:04d}"}
        try:
            record |= files.object_of(line)
            for name, value in record.items():
                if not isinstance(value, FIELDS.get(name, ())) or value == "":
                    raise ValueError(f"its {name} is {json.dumps(value)}")
            key, references = str(record["key"]), [str(path.parent / r) for r in record["ref"]]
            files.check_name(key, "its key")
            if key in prompts:
                raise ValueError(f"keys name files, so they must differ; {key!r} comes twice")
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error}; expected {LINE}") from None
        prompts[key] = record["prompt"], tuple(references)
    if not prompts:
        raise UserError(f"{path} holds no prompts; expected a line for each, {LINE}")
    return prompts


def request_of(config, shape, job):
    """The engine.Request of a job, after everything a person can get wrong was checked."""
    if not job.prompt.strip():
        raise UserError("--prompt is empty; say what to draw")
    if job.out.suffix.lower() not in PICTURES:
        raise UserError(f"--out {job.out}: expected a file name that ends in .png, .jpg or .webp")
    iccot.arranged(job.references, job.prompt)  # ValueError for <image> at a wrong place
    references = tuple(open_image(path) for path in job.references)
    grid, unit = (shape.latent_side, shape.latent_side), shape.token_pixels
    if "x" in config.size:
        width, height = map(int, config.size.split("x"))
        grid = (height // unit, width // unit)
        if width % unit or height % unit or not all(0 < n <= shape.latent_side for n in grid):
            largest = shape.latent_side * unit
            raise UserError(f"--size={config.size}: expected multiples of {unit} up to {largest}")
    elif references and not config.size:
        grid = shape.picture_grid(*references[-1].size)
    for path in (job.out, Path(config.steps_picture)):
        files.check_writable(path.parent)
    system = iccot.GENERATION_SYSTEM_PROMPT if config.plan and config.system_prompt else ""
    return Request(references, job.prompt, grid, system)


def paint(engine, job, config):
    """Make one picture; its plan (if there shall be one) is printed and kept beside it."""
    request = request_of(config, engine.model.config, job)
    shown, way = evenly(config.num_timesteps - 1, STEPS), []

    def noted(k, x, v, *, t, t_next):
        if k in shown:
            way.append((f"t = {t:.3f}", x, flow.estimates(x, v, t)[0]))
        return flow.euler_step(x, v, t, t_next=t_next)

    (result,) = engine.generate(
        [request],
        sampler=config.sampler,
        thinking=config.thinking,
        batch=1,
        seeds=[(job.seed,)],
        step=noted if config.steps_picture else None,
    )
    about = {"prompt": job.prompt, "references": list(job.references), "seed": job.seed}
    if config.plan:
        print_plan(result)
        about = result.record() | about
    text = json.dumps(about, ensure_ascii=False, indent=1)
    files.write_text(job.out.with_suffix(".json"), text + "\n")
    with files.published(job.out) as hidden:
        result.image.save(hidden, Image.registered_extensions()[job.out.suffix.lower()])
    print(f"picture    {job.out}")
    if config.steps_picture:
        grids = [request.grid] * len(way)
        rows = {
            "x_t": engine.pictures([x for _, x, _ in way], grids),
            "what the model takes it for: x_t - t v": engine.pictures([x for *_, x in way], grids),
        }
        save_path(config.steps_picture, [title for title, *_ in way], rows)
        print(f"steps      {config.steps_picture}")


def print_plan(result):
    """The IC-CoT as a person reads it, or the raw text."""
    if result.plan is None:
        print(f"plan       unreadable: {result.text}")
        return
    print(f"caption    {result.plan.caption}")
    for i, relation in enumerate(result.plan.relations, 1):
        print(f"relation {i} {relation}")
    for problem in result.problems:
        print(f"problem    {problem}")


def main(config):
    """All pictures that are asked for; every mistake is found before the first is painted."""
    with exit_on_user_error(ValueError):
        if config.memory:
            default = PRESETS.get(config.config, {}).get("checkpoint", Config.checkpoint)
            shape = shape_of(config.checkpoint, config.config, default)
            accountant.dry_run(accountant.walk_painting, config, shape)
            return
        todo, place = jobs(config), processes.placed(config.device, "auto")
        engine = Engine(*load_quantised(config.checkpoint, *place, kind=config.weights))
        for job in todo:
            request_of(config, engine.model.config, job)
    processes.choose_threads(config.threads)
    several = bool(config.prompts) or config.seeds > 1
    left = [job for job in todo if not (several and job.out.is_file())]
    if len(left) < len(todo):
        there = f"{len(todo) - len(left)} of {len(todo)} pictures are there"
        print(f"{there} and stay; another --out paints anew")
    for job in tqdm(left, disable=None if several else True, desc="sample"):
        paint(engine, job, config)


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
