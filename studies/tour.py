"""
One prompt of the toy world through the whole system: the numbers and pictures of docs/TOUR.md.

    python -m studies.tour --checkpoint out/toy-sft --clip out/toy-clip-reward

`measure` follows a held-out prompt: tokens, the packed sequence, both losses of stage 1, the plan
token by token, the path of the flow, SDE steps beside it, one group of GRPO with its rewards and
advantages, and the gradient step that it makes. Everything is done by the functions that train and
sample; what is drawn here is only what they gave. What was found is written to docs/tour/ as
numbers.json and pictures, from which `studies.tour_page` writes the page.

The options of the group are those of grpo.py's preset toy. Letters: sequence.py. Left out: any
other prompt's way.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageChops, ImageDraw

import flow
import grpo
import iccot
import rollouts
import tree
from engine import Branch, Engine, Group, Noised, Thinking, lay_out
from objective import advantages
from reward import Clip, embed_groups, rewards_of
from runtime import files, processes
from runtime.config import exit_on_user_error, parse
from runtime.pretrained import load_model
from runtime.processes import generator
from runtime.state import TrainingState
from sequence import Sequence
from studies import pictures, tour_page
from studies.masks import runs_of, save_masks
from studies.metrics import HeldOut
from toy.judge import judge
from vision import transform

NUMBER = 4  # of the held-out prompt; docs/tour/words.md speaks of it
SCORED_AT = 0.7  # time of the noised target in the pack of stage 1
WINDOW = (1, 4)  # steps of the flow that are made stochastic: first, one past the last


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-sft"  # of stage 1, a toy
    clip: str = "out/toy-clip-reward"  # the reward's CLIP
    out: str = "docs"  # folder of TOUR.md and tour/


PRESETS = {"default": {}}
TOY = grpo.Config(config="toy", **grpo.PRESETS["toy"])
# without the KL to stage 1, which is zero before the first step
OPTIONS = replace(TOY, prompts_per_step=1, groups_at_once=1, kl_beta=0.0)


@dataclass(frozen=True)
class Tour:
    """What all stations share."""

    engine: Engine
    clip: Clip
    sample: iccot.Sample
    settings: grpo.Config
    folder: Path  # of the pictures

    @property
    def prompt(self):
        return self.engine.prompt(self.sample.references, self.sample.instruction)

    @property
    def grid(self):
        return self.engine.model.config.picture_grid(*[self.settings.picture_side] * 2)

    @property
    def start(self):
        """The noise that the pictures of the path start from."""
        return self.engine.start(self.grid, generator(self.settings.seed, NUMBER))

    def pictures(self, latents):
        """PIL of latents (T, C) each."""
        return self.engine.pictures(list(latents), [self.grid] * len(latents))

    def verdict(self, image):
        """{PF, SC, Overall} of a picture."""
        found = judge(image, self.sample.truth)
        return {"PF": found.pf, "SC": found.sc, "Overall": found.overall}


def measure(tour, prompts):
    """All numbers of the page, as JSON takes them; draws the pictures into tour.folder.

    prompts: of the whole step.
    """
    tour.folder.mkdir(parents=True, exist_ok=True)
    plan = tour.engine.think([tour.prompt], Thinking(tour.settings.max_plan_tokens))[0][0]
    found = {"prompt": of_prompt(tour), "pack": of_pack(tour), "plan": of_plan(tour, plan)}
    found |= {"path": of_path(tour, plan), "sde": of_sde(tour, plan)}
    rollout = rollouts.roll_out(tour.engine, [tour.sample], [NUMBER], config=tour.settings, step=0)
    reward = reward_of(tour, rollout.images, rollout.captions, groups=1)  # (1, G)
    advantage = advantages(reward, tour.settings)
    found["group"] = of_group(tour, rollout, reward.flatten(), advantage=advantage[0])
    found["step"] = of_step(tour, rollout, advantage)
    found["whole"] = of_whole_step(tour, HeldOut(count=prompts).samples())
    return found | {"settings": of_settings(tour)}


def of_settings(tour):
    """What the words say of options."""
    first, last = WINDOW
    names = ("first", "second", "third", "fourth", "fifth", "sixth")
    return {
        "shift": tour.settings.timestep_shift,
        "noise_level": tour.settings.noise_level,
        "window": f"{names[first]} to {names[last - 1]}",
        "values": tour.grid[0] * tour.grid[1] * tour.engine.model.config.token_channels,
        "toy_steps": TOY.steps,
        "command": "python -m studies.tour --checkpoint out/toy-sft --clip out/toy-clip-reward",
    }


# --------------------------------------------------------------------------------------------------
# stage 1: tokens, pack, losses


def of_prompt(tour):
    """The references as tokens."""
    prompt, shown, titles = tour.prompt, [], []
    references = [item for item in prompt.items if not isinstance(item, list)]
    for i, (image, one) in enumerate(zip(tour.sample.references, references), 1):
        for what, (h, w) in (("latents", one.latent_grid), ("ViT", one.patch_grid)):
            shown.append(with_grid(image, (h, w)))
            titles.append(f"image {i}: {h} x {w} {what}")
    shown.append(with_grid(tour.sample.target, tour.grid))
    titles.append(f"target: {tour.grid[0]} x {tour.grid[1]} latents")
    pictures.save_path(tour.folder / "prompt.png", titles, {"": shown}, side=160)
    return {
        "task": tour.sample.task,
        "instruction": tour.sample.instruction,
        "instruction_tokens": len(prompt.texts[-1]),
        "references": [
            {
                "size": list(image.size),
                "latents": list(one.latents.shape),
                "patches": list(one.patches.shape),
            }
            for image, one in zip(tour.sample.references, references)
        ],
        "true_plan": iccot.render(tour.sample.plan),
    }


def with_grid(image, grid, side=160):
    """A picture enlarged to a square, cut by lines into its (h, w) tokens."""
    image = image.resize((side, side), Image.Resampling.NEAREST)
    pen, (h, w) = ImageDraw.Draw(image), grid
    for i in range(1, h):
        pen.line((0, i * side // h, side, i * side // h), fill=(255, 0, 255))
    for i in range(1, w):
        pen.line((i * side // w, 0, i * side // w, side), fill=(255, 0, 255))
    return image


@torch.no_grad()
def of_pack(tour):
    """The sequence on which stage 1 would train: its runs, and both losses."""
    model, tokenizer = tour.engine.model, tour.engine.tokenizer
    plan = tokenizer.encode(iccot.render(tour.sample.plan))
    clean, grid = model.to_latents(transform(tour.sample.target, model.config.image_rule))
    noise = tour.start.x  # (T, C)
    x_t = flow.interpolate(clean, noise, SCORED_AT)
    group = Group(tour.prompt, grid, (Branch(plan, (Noised(x_t, SCORED_AT),)),))
    packed, _ = lay_out(tour.engine.layout, [group], ("full",), loss=True)
    save_masks(tour.folder / "mask.png", {"": packed}, tour.engine.layout)
    und, gen = model(packed)
    v = model.velocity(packed, gen)
    error = flow.velocity_mse(v, flow.velocity(clean, noise))
    runs = runs_of(packed, tour.engine.layout)
    positions = packed.positions.tolist()
    return {
        "N": len(packed),
        "runs": [
            {
                "name": run.name,
                "rows": [run.begin, run.end],
                "positions": [positions[run.begin], positions[run.end - 1]],
            }
            for run in runs
        ],
        "t": SCORED_AT,
        "ce": model.cross_entropy(und, packed).mean().item(),
        "ce_tokens": len(packed.labels),
        "mse": error.item(),
    }


# --------------------------------------------------------------------------------------------------
# the plan


@torch.no_grad()
def of_plan(tour, plan):
    """The greedy plan, a probability for each of its tokens, and its best rival."""
    model, sequence = tour.engine.model, Sequence(tour.engine.layout)
    with sequence.document():
        tour.prompt.write(sequence)
        sequence.text(plan, loss=True)
    packed = sequence.pack()
    und, _ = model(packed)
    p = model.lm_head(und[packed.label_rows]).float().softmax(-1)  # (labels, vocabulary)
    best, rivals = p.topk(2)  # (labels, 2)
    tokens, decode = [], tour.engine.tokenizer.decode
    for i, label in enumerate(packed.labels.tolist()):
        rival = int(rivals[i, 1] if rivals[i, 0] == label else rivals[i, 0])
        text = "end" if label == tour.engine.layout.eos else decode([label])
        other = "end" if rival == tour.engine.layout.eos else decode([rival])
        tokens.append([text, p[i, label].item(), other, p[i, rival].item()])
    save_tokens(tour.folder / "plan.png", tokens)
    text = decode(plan)
    read, problems = iccot.salvage(text, len(tour.sample.references))
    return {
        "text": text,
        "tokens": tokens,
        "caption": read.caption if read else None,
        "relations": list(read.relations) if read else [],
        "problems": problems,
    }


def save_tokens(path, tokens, width=900):
    """Tokens in reading order, their probability below; the less certain, the darker."""
    line, boxes, x, y = 2 * pictures.LINE + 3 * pictures.PAD, [], pictures.PAD, pictures.PAD
    for text, p, *_ in tokens:
        size = max(30, round(7.2 * len(text)) + 8)
        if x + size > width:
            x, y = pictures.PAD, y + line
        boxes.append((x, y, size, text, p))
        x += size + 2
    sheet, write = pictures.sheet_of(width, y + line)
    pen = ImageDraw.Draw(sheet)
    for x, y, size, text, p in boxes:
        shade = tuple(round(255 - (255 - c) * min(1, 2 * (1 - p))) for c in (230, 120, 30))
        pen.rectangle((x, y, x + size, y + line - 6), fill=shade)
        write((x + 3, y + 2), text)
        write((x + 3, y + 2 + pictures.LINE), f"{p:.2f}", pictures.GREY)
    pictures.save_png(sheet, path)


# --------------------------------------------------------------------------------------------------
# the flow


def painted(tour, plan, noise=None):
    """[(t, x_t, x_0 as the model takes it)] of each step and the final latents.

    noise: a generator; the steps of WINDOW are stochastic with it.
    """
    seen, first, last = [], *WINDOW

    def step(k, x, v, *, t, t_next):
        about = {"t": float(t), "x": x, "estimate": flow.estimates(x, v, t)[0]}
        seen.append(about)
        if noise is None or not first <= k < last:
            return flow.euler_step(x, v, t, t_next=t_next)
        drawn = torch.randn(x.shape, generator=noise)  # (T, C)
        x, mean, std = flow.sde_step(
            x, v, t, t_next=t_next, sde=tour.settings.transition, noise=drawn
        )
        one = dict(image_of_token=torch.zeros(len(x), dtype=torch.long), images=1)
        about |= {"std": float(std), "log_prob": flow.log_prob(x, mean, std, **one).item()}
        return x

    group = Group(tour.prompt, tour.grid, (Branch(plan, (tour.start,)),))
    return seen, tour.engine.paint([group], tour.settings.sampler, step=step)


def of_path(tour, plan):
    """The Euler steps from noise to the picture."""
    seen, final = painted(tour, plan)
    estimates = tour.pictures([one["estimate"] for one in seen])
    rows = {
        "x_t": tour.pictures([one["x"] for one in seen]),
        "x_t - t v: where it heads": estimates,
    }
    pictures.save_path(tour.folder / "path.png", titles_of(seen), rows)
    steps = []
    for one, image in zip(seen, estimates):
        off = (one["estimate"] - final).square().mean().sqrt().item()
        steps.append({"t": one["t"], "off": off} | tour.verdict(image))
    return {"steps": steps}


def of_sde(tour, plan):
    """The same path with noise in some steps, twice, beside the ODE."""
    (ode, _), rows, found = painted(tour, plan), {}, []
    rows["ODE"] = tour.pictures([one["estimate"] for one in ode])
    for i in (1, 2):
        noise = generator(tour.settings.seed, NUMBER, i)
        seen, final = painted(tour, plan, noise)
        rows[f"SDE, noise {i}"] = tour.pictures([one["estimate"] for one in seen])
        keys = ("t", "std", "log_prob")
        steps = [{key: one[key] for key in keys} for one in seen if "std" in one]
        found.append({"steps": steps} | tour.verdict(tour.pictures([final])[0]))
    pictures.save_path(tour.folder / "sde.png", titles_of(ode), rows)
    return {"runs": found}


def titles_of(seen):
    return [f"t = {one['t']:.3f}" for one in seen]


# --------------------------------------------------------------------------------------------------
# stage 2: the group and its step


def of_group(tour, rollout, reward, *, advantage):
    """The members of a group: plan, picture, reward, advantage."""
    members, cards, true = [], [], tour.sample.plan.caption
    for i, image in enumerate(rollout.images):
        r, a, caption = reward[i].item(), advantage[i].item(), rollout.captions[i]
        members.append({"caption": caption, "reward": r, "advantage": a} | tour.verdict(image))
        colour = pictures.BETTER if a > 0 else pictures.WORSE
        words = [(f"{i + 1}: reward {r:.3f}", pictures.BLACK), (f"advantage {a:+.2f}", colour)]
        said = caption or "a plan that does not parse"
        right = pictures.GREY if caption == true else pictures.WORSE
        cards.append((image, words + [(said, right)]))
    save_cards(tour.folder / "group.png", cards)
    std = reward.std(correction=0).item()
    return {"members": members, "mean": reward.mean().item(), "std": std, "true_caption": true}


def save_cards(path, cards, *, across=4, side=216):
    """Pictures with words below, so many in a row."""
    cell, width = side + 3 * pictures.PAD, int(side / pictures.LETTER)
    cards = [(image, pictures.wrapped(words, width)) for image, words in cards]
    high = side + 4 * pictures.PAD + pictures.LINE * max(len(lines) for _, lines in cards)
    sheet, write = pictures.sheet_of(across * cell, -(-len(cards) // across) * high)
    for i, (image, lines) in enumerate(cards):
        y, x = divmod(i, across)
        left, top = x * cell + pictures.PAD, y * high + pictures.PAD
        sheet.paste(pictures.mosaic([image], side), (left, top))
        for n, (line, colour) in enumerate(lines):
            write((left, top + side + pictures.PAD + n * pictures.LINE), line, colour)
    pictures.save_png(sheet, path)


def of_step(tour, rollout, advantage):
    """One step of AdamW on the group: what it does to likelihoods and pictures of its members."""
    model, settings, members = tour.engine.model, tour.settings, range(len(rollout.images))
    group = tree.plant(tour.engine.layout, rollout, 0, config=settings)
    before = likelihoods(model, group, settings)  # (I,)
    with a_step(tour, rollout, advantage) as found:
        moved = likelihoods(model, group, settings) - before  # (I,)
        images = repainted(tour, rollout, [NUMBER])
    whose = torch.cat([batch.members for batch in group.batches])  # (I,)
    save_step(tour.folder / "step.png", rollout.images, images)
    return {
        "lr": settings.lr,
        "clip_range": found["clip_range"],
        "scores": settings.scores,
        "tokens": [len(group.prompt), sum(len(batch.packed) for batch in group.batches)],
        "loss": found["loss"],
        "grad_norm": found["grad_norm"],
        "log_ratio": [moved[whose == i].mean().item() for i in members],
        "reward_after": reward_of(tour, images, rollout.captions, groups=1).flatten().tolist(),
        "verdicts_after": [tour.verdict(image) for image in images],
    }


def of_whole_step(tour, samples):
    """The same of as many prompts as a step of the preset has, all of them together."""
    count, numbers = len(samples), list(range(len(samples)))
    config = replace(tour.settings, prompts_per_step=count, groups_at_once=count)
    whole = replace(tour, settings=config)
    rollout = rollouts.roll_out(tour.engine, samples, numbers, config=config, step=0)
    reward = reward_of(tour, rollout.images, rollout.captions, groups=count)  # (P, G)
    with a_step(whole, rollout, advantages(reward, config)):
        images = repainted(whole, rollout, numbers)
    after = reward_of(tour, images, rollout.captions, groups=count)  # (P, G)

    def overall(pictures):
        truths = [one.truth for one in samples for _ in range(config.group_size)]
        return [judge(picture, truth).overall for picture, truth in zip(pictures, truths)]

    return {
        "prompts": count,
        "reward": [reward.nanmean().item(), after.nanmean().item()],
        "better": int((after.nanmean(1) > reward.nanmean(1)).sum()),
        "Overall": [sum(overall(of)) / len(of) for of in (rollout.images, images)],
    }


@contextmanager
def a_step(tour, rollout, advantage):
    """Inside, the weights are those after a step of AdamW on the rollout; yields grpo's numbers."""
    trained = dict(tour.engine.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    rates = dict(lr=tour.settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    state = TrainingState(trained, torch.optim.AdamW(trained.values(), **rates), {})
    learner = grpo.Learner(tour.engine, state, anchor=None)
    found, _ = grpo.update(learner, rollout, advantage, config=tour.settings)
    yield found
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name])


def reward_of(tour, images, captions, *, groups):
    """(groups, G) of these pictures under their own captions."""
    return rewards_of(*embed_groups(tour.clip, images, captions, groups=groups))


@torch.no_grad()
def likelihoods(model, group, settings):
    """log p of each scored picture of a group, (I,), by the present weights."""
    prefix = model.keys_and_values(group.prompt)
    found = [tree.policy(model, prefix, batch, config=settings) for batch in group.batches]
    return torch.cat([policy.log_prob for policy in found])


def repainted(tour, rollout, numbers):
    """The pictures of all plans from the same noise, by the present weights."""
    settings, groups, each = tour.settings, [], tour.settings.plans_per_group
    how = dict(config=settings, same=settings.same_start)
    starts = rollouts.generators(rollouts.STARTS, numbers, settings.group_size, **how)
    for i, prompt in enumerate(rollout.prompts):
        how = dict(starts=starts[i], grid=rollout.grid)
        plans = rollout.plans[i * each : (i + 1) * each]
        groups.append(rollouts.group_of(tour.engine, prompt, plans, **how))
    x = tour.engine.paint(groups, settings.sampler)  # (P * G * T, C)
    return tour.pictures(x.view(len(rollout.images), -1, x.shape[1]))  # (P * G, T, C)


def save_step(path, before, after):
    """Pictures of all members before and after the step, and eight times their difference."""
    gaps = [
        ImageChops.difference(a, b).point(lambda x: min(255, 8 * x)) for a, b in zip(before, after)
    ]
    rows = {"before": before, "after": after, "difference, 8 times": gaps}
    pictures.save_path(path, [f"member {i}" for i in range(1, len(before) + 1)], rows, side=100)


@exit_on_user_error()
def main(config):
    """Measure, draw, and write the page."""
    processes.choose_threads(0)
    sample = HeldOut(count=NUMBER + 1).samples()[NUMBER]
    files.check_writable(Path(config.out) / "tour")
    engine = Engine(*load_model(config.checkpoint, torch.device("cpu"), torch.float32))
    clip = Clip("toy", config.clip)
    folder = Path(config.out) / "tour"
    numbers = measure(Tour(engine, clip, sample, OPTIONS, folder), TOY.prompts_per_step)
    files.write_text(folder / "numbers.json", files.to_json(numbers, indent=1) + "\n")
    tour_page.write(config.out)
    print(f"wrote {config.out}/TOUR.md")


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
