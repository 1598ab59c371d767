"""
Stage 2, reasoning-generation alignment: GRPO on the denoising steps, so that pictures match plans (paper section 5).

For each prompt a group of G members is sampled. With RID, reasoning-induced diversity, every member writes its own plan;
without it one plan serves the group. A member's reward compares its picture with its own caption:

    r_i = - || CLIP(picture_i) - CLIP(caption_i) ||_2                      an unparsable plan: the lowest r of its group
    A_i = (r_i - mean r) / max(std r, std_floor), clamped                  over the group; equal rewards give exactly 0
    ratio_ik = p_new(x_{k+1} | x_k) / p_old(x_{k+1} | x_k)                 for each step k of the SDE window, flow.log_prob
    L = mean_ik max(-A_i ratio_ik, -A_i clip(ratio_ik, 1 - eps, 1 + eps)) + kl_beta |v_new - v_reference|^2

Only a window of steps is stochastic, drawn anew every iteration; the others are ODE steps. Log-probabilities are means
over the D values of a picture, so eps = clip_kappa / sqrt(D) keeps its meaning at any resolution.

Rollout and update run over the same tree: prompt | branch a member: plan | leaf a step: x_k. p_old is evaluated by the
packs of the update before its first optimiser step, so the first ratio is exactly 1; its distance to the rollout's own
log-probability (KV cache, other shapes of matrix products) is logged as `mismatch`.

Differences from the paper: its SDE, clip, window and KL are unpublished; these are Flow-GRPO's (arXiv 2505.05470), with
the window of MixGRPO. Plan tokens get no policy gradient: the caption is the target, and easy captions would win.
Left out: more than one process, gradients split at the context.

    python grpo.py --config toy            trains the CLIPs and stage 1 first if they are missing; ends with a table
Run the same command again to resume.
"""

import copy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
import evaluate
import flow
import iccot
import run
from config import exit_on_user_error, parse
from kernels.attention import describe_backend
from pretrained import load_model, save_model
from reward import Clip, train_toy_clip
from sample import Sampler, make_prompt, paint, picture, think
from sequence import Sequence


@dataclass(frozen=True)
class Config:
    config: str = ""  # name of the preset; stage 1 is trained with the same one
    # data
    init: str = "out/full-sft"  # checkpoint of stage 1; the model's shape comes from it
    max_references: int = 4
    prompts_per_step: int = 8  # groups
    group_size: int = 32  # members of a group (paper)
    # rollout
    rid: bool = True  # every member writes its own plan; false: one plan a group
    cot_temperature: float = 1.0  # of the plans
    max_plan_tokens: int = 256
    num_timesteps: int = 17  # grid points; one more than denoising steps
    timestep_shift: float = 3.0
    noise_level: float = 0.7  # a of the SDE (Flow-GRPO)
    window: int = 3  # stochastic steps of a rollout, which are the trained ones
    window_end: float = 0.5  # the window lies in this first share of the steps; the last step is never in it
    # objective
    reward: str = "clip_l2"  # or clip_cos
    clip_kappa: float = 0.025  # clip range times sqrt(D)
    kl_beta: float = 0.0  # weight of the squared velocity difference to the stage 1 model
    std_floor: float = 0.003  # of the rewards of a group
    max_advantage: float = 5.0
    # optimisation
    steps: int = 200  # iterations of rollout and update (paper)
    updates: int = 2  # optimiser steps an iteration, each on its share of the groups
    groups_per_pack: int = 1  # groups in one forward and backward pass
    train: str = "all"  # or "gen": the generation expert and the latent layers only
    lr: float = 1e-5
    max_grad_norm: float = 1.0
    average: float = 0.0  # decay of the moving average of the weights; 0: off
    # run
    clip_name: str = "ViT-L-14"  # open_clip architecture of the reward's CLIP; toys: toy
    clip: str = "openai"  # its weights: an open_clip tag, a .safetensors file, or the folder of a toy CLIP
    metric_name: str = "ViT-B-32"  # the same for the CLIP that measures CLIP_out
    metric: str = "openai"
    clip_steps: int = 0  # training steps of the two toy CLIPs, if they are missing
    eval_samples: int = 200  # held-out prompts of the final table
    eval_timesteps: int = 50
    out: str = "out/full-grpo"
    seed: int = 0
    threads: int = 0  # CPU threads; 0 measures which of one and two is faster
    save_every: int = 20
    sample_every: int = 20

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: advantages compare the members of a group; use at least 2")
        if self.prompts_per_step % (self.updates * self.groups_per_pack):
            raise ValueError(f"prompts_per_step={self.prompts_per_step} must be a multiple of updates={self.updates} times "
                             f"groups_per_pack={self.groups_per_pack}")  # fmt: skip
        if not 1 <= self.window <= last_start(self) + self.window:
            raise ValueError(f"window={self.window} does not fit into the first window_end={self.window_end} of "
                             f"{self.num_timesteps - 1} denoising steps")  # fmt: skip
        if self.train not in ("all", "gen"):
            raise ValueError(f"train={self.train}: expected all or gen")
        if self.reward not in ("clip_l2", "clip_cos"):
            raise ValueError(f"reward={self.reward}: expected clip_l2 or clip_cos")


PRESETS = {
    "toy": dict(
        init="out/toy-sft", group_size=16, max_plan_tokens=72, num_timesteps=11, timestep_shift=2.0, window=3, steps=40,
        groups_per_pack=4, lr=3e-4, clip_name="toy", clip="out/toy-clip-reward", metric_name="toy", metric="out/toy-clip-metric", clip_steps=300,
        eval_timesteps=13, out="out/toy-grpo", save_every=10,
    ),
    "smoke": dict(
        init="out/smoke-sft", prompts_per_step=2, group_size=4, max_plan_tokens=40, num_timesteps=7, timestep_shift=2.0,
        window=2, steps=2, lr=3e-4, clip_name="toy", clip="out/smoke-clip-reward", metric_name="toy", metric="out/smoke-clip-metric", clip_steps=20,
        eval_samples=16, eval_timesteps=7, out="out/smoke-grpo", save_every=1, sample_every=2,
    ),
    "full": dict(),
}  # fmt: skip


@dataclass
class Rollout:
    """What one iteration sampled. Members are ordered group by group; tokens member by member."""

    prompts: list  # one a group
    plans: list  # for each group its members' token ids
    x: torch.Tensor  # (window, all tokens, C) before each stochastic step
    x_next: torch.Tensor  # (window, all tokens, C) after it
    times: torch.Tensor  # (window + 1,) flow times of the window
    log_prob: torch.Tensor  # (members, window) as the rollout saw them
    images: list  # PIL, one a member
    captions: list  # read from the plans; "" where unparsable
    valid: torch.Tensor  # (members,) bool, plan parses
    grid: tuple  # (h, w) tokens of a picture


def last_start(config):
    """Last step at which the window may begin."""
    steps = config.num_timesteps - 1
    return min(int(steps * config.window_end), steps - 1) - config.window


def sample_groups(model, layout, tokenizer, samples, config, step):
    """Roll out a group of pictures for each sample (data.Sample) under the current weights."""
    size, g = config.group_size, lambda purpose: run.generator(config.seed, step, purpose)
    prompts = [make_prompt(model, tokenizer, one.references, one.instruction) for one in samples]
    written, _ = think(model, layout, prompts, size if config.rid else 1, config.max_plan_tokens, config.cot_temperature, g(1))
    plans = [written[i * size : (i + 1) * size] if config.rid else [written[i]] * size for i in range(len(prompts))]
    grid = model.config.picture_grid(data.SIZE, data.SIZE)
    members, n = len(prompts) * size, grid[0] * grid[1]
    image_of_token = torch.arange(members).repeat_interleave(n)
    first = int(torch.randint(last_start(config) + 1, (), generator=g(2)))
    noise, kept = g(3), []

    def sde_or_ode(k, x, v, t, t_next):
        if not first <= k < first + config.window:
            return flow.euler_step(x, v, t, t_next)
        x_next, mean, std = flow.sde_step(x, v, t, t_next, config.noise_level, generator=noise)
        kept.append((x, x_next, t, t_next, flow.log_prob(x_next, mean, std, image_of_token, members)))
        return x_next

    sampler = Sampler(config.num_timesteps, config.timestep_shift)
    x = paint(model, layout, prompts, plans, [grid] * len(prompts), sampler, g(4), sde_or_ode)
    captions, valid = [], []
    for one, group in zip(samples, plans):
        for plan in group:
            text = tokenizer.decode(plan)
            valid.append(evaluate.is_valid(text, len(one.references)))
            captions.append(iccot.parse(text).caption if valid[-1] else "")
    befores, afters, starts, ends, log_probs = zip(*kept)
    return Rollout(
        prompts, plans, torch.stack(befores), torch.stack(afters), torch.stack([*starts, ends[-1]]), torch.stack(log_probs, 1),
        [picture(model, tokens, grid) for tokens in x.split(n)], captions, torch.tensor(valid), grid,
    )  # fmt: skip


def rewards(clip, rollout, config):
    """(groups, G): each picture against its own caption; an unparsable plan gets the lowest reward of its group."""
    scores = torch.zeros(len(rollout.captions))
    valid = rollout.valid
    if valid.any():
        keep = valid.nonzero().squeeze(1).tolist()
        scores[valid] = clip.score([rollout.images[i] for i in keep], [rollout.captions[i] for i in keep], config.reward).float()
    scores, valid = scores.view(-1, config.group_size), valid.view(-1, config.group_size)
    lowest = scores.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
    lowest = torch.where(lowest.isinf(), torch.zeros_like(lowest), lowest)  # a group without any plan: all equal
    return torch.where(valid, scores, lowest)


def group_advantage(reward, std_floor, max_advantage):
    """(groups, G) -> (groups, G): normalised within the group; exactly 0 where all rewards of a group are equal."""
    equal = (reward == reward[:, :1]).all(1, keepdim=True)
    centred = (reward - reward.mean(1, keepdim=True)).masked_fill(equal, 0)
    std = reward.std(1, correction=0, keepdim=True)
    return (centred / std.clamp_min(std_floor)).clamp(-max_advantage, max_advantage)


def pack_groups(layout, rollout, groups):
    """The tree of some groups: prompt | branch a member: plan | leaf a window step. And the tokens of x behind it.

    Returns the pack and, for its noised tokens in order, the row (window step, token) of rollout.x, each (M,).
    """
    sequence, steps, tokens = Sequence(layout), [], []
    n, size = rollout.grid[0] * rollout.grid[1], len(rollout.plans[0])
    for group in groups:
        with sequence.document():
            rollout.prompts[group].write(sequence)
            for i, plan in enumerate(rollout.plans[group]):
                span = slice((group * size + i) * n, (group * size + i + 1) * n)
                with sequence.branch():
                    sequence.text(plan)
                    for k in range(len(rollout.x)):
                        sequence.noise(rollout.x[k, span], rollout.grid, rollout.times[k])
                        steps.append(torch.full((n,), k))
                        tokens.append(torch.arange(span.start, span.stop))
    return sequence.pack(), torch.cat(steps), torch.cat(tokens)


def policy(model, rollout, batch, config):
    """Log-probabilities (members of the batch, window) of the stored steps under the weights, and velocities (M, C)."""
    packed, steps, tokens = batch
    _, gen = model(packed)
    v = model.velocity(packed, gen).float()
    t, t_next = rollout.times[steps][:, None], rollout.times[steps + 1][:, None]  # (M, 1)
    mean, std = flow.transition(rollout.x[steps, tokens], v, t, t_next, config.noise_level)
    log_prob = flow.log_prob(rollout.x_next[steps, tokens], mean, std, packed.image_of_token(), len(packed.noised_lengths))
    return log_prob.view(-1, len(rollout.x)), v


def objective(log_prob, old_log_prob, advantage, clip_range):
    """Clipped policy loss, a mean over members and steps, and the ratio. log_prob (members, window), advantage (members,)."""
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantage[:, None] * ratio, -advantage[:, None] * clipped).mean()
    return loss, ratio.detach()


def update(model, reference, optimizer, layout, rollout, advantage, config):
    """All optimiser steps of one iteration. Returns the health numbers."""
    groups = list(range(len(rollout.prompts)))
    share = len(groups) // config.updates
    packs = [groups[i : i + config.groups_per_pack] for i in range(0, len(groups), config.groups_per_pack)]
    batches = [pack_groups(layout, rollout, pack) for pack in packs]
    with torch.no_grad():  # p_old, by the packs of the update; the first update's own forward pass gives it for nothing
        old = [None if pack[-1] < share else policy(model, rollout, batch, config)[0] for pack, batch in zip(packs, batches)]
    clip_range = config.clip_kappa / (rollout.x.shape[-1] * rollout.grid[0] * rollout.grid[1]) ** 0.5
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    health, norms = [], []
    for first in range(0, len(groups), share):
        mine = [i for i, pack in enumerate(packs) if first <= pack[0] < first + share]
        for i in mine:
            log_prob, v = policy(model, rollout, batches[i], config)
            if old[i] is None:
                old[i] = log_prob.detach()
            loss, ratio = objective(log_prob, old[i], advantage[packs[i]].flatten(), clip_range)
            kl = torch.zeros(())
            if reference is not None:
                with torch.no_grad():
                    _, v_reference = policy(reference, rollout, batches[i], config)
                kl = flow.velocity_mse(v, v_reference)
            ((loss + config.kl_beta * kl) / len(mine)).backward()
            health.append((first, loss.item(), kl.item(), ratio))
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    size = config.group_size
    seen = torch.stack([rollout.log_prob[g * size : (g + 1) * size] for pack in packs for g in pack])
    return health_of(health, norms, clip_range, (torch.cat(old) - seen.flatten(0, 1)).abs().mean())


def health_of(health, norms, clip_range, mismatch):
    """The logged numbers of one update phase."""
    first = torch.cat([ratio for start, _, _, ratio in health if start == 0])
    last = torch.cat([ratio for start, _, _, ratio in health if start == health[-1][0]])
    mean = lambda values: sum(values) / len(values)
    return {
        "loss": mean([loss for _, loss, _, _ in health]), "kl": mean([kl for _, _, kl, _ in health]),
        "ratio_first_min": first.min().item(), "ratio_first_max": first.max().item(),
        "ratio_last": last.mean().item(), "clip_high": (last > 1 + clip_range).float().mean().item(),
        "clip_low": (last < 1 - clip_range).float().mean().item(), "clip_range": clip_range,
        "mismatch": mismatch.item(), "grad_norm": mean(norms),
    }  # fmt: skip


def trained_parameters(model, what):
    """The parameters that stage 2 changes; the others are frozen."""
    gen = (".gen.", "norm_gen", "latent_in", "latent_out", "time_embedder")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what == "all" or any(part in name for part in gen))
    return [p for p in model.parameters() if p.requires_grad]


def prepare(config):
    """Train what stage 2 needs and is missing: two small CLIPs and the stage 1 model."""
    if config.clip_name == "toy" and not (Path(config.clip) / "clip.json").is_file():
        train_toy_clip(config.clip, seed=0, steps=config.clip_steps)
    evaluate.metric_clip(config.metric_name, config.metric, config.clip_steps)
    if not (Path(config.init) / "model").is_dir() and not (Path(config.init) / "llm_config.json").is_file():
        command = [sys.executable, str(Path(__file__).with_name("sft.py")), "--config", config.config, "--out", config.init]
        command += ["--threads", str(torch.get_num_threads())]
        code = subprocess.run(command).returncode
        if code:
            sys.exit(code)


def train(config):
    """The whole stage: prepares, resumes, trains, and compares stage 2 with stage 1 on held-out prompts."""
    begun = time.perf_counter()
    with exit_on_user_error(ValueError):
        folder = run.start(config)
        prepare(config)
        step, state = run.load_state(folder)
        model, tokenizer = load_model(config.init)
        clip = Clip(config.clip_name, config.clip)
    layout = model.config.layout(tokenizer)
    reference = copy.deepcopy(model).requires_grad_(False) if config.kl_beta else None
    optimizer = torch.optim.AdamW(trained_parameters(model, config.train), config.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    average = run.new_average(model)
    if state is not None:
        run.unpack_state(state, model, optimizer, average)
    print(f"grpo: {config.prompts_per_step} prompts x {config.group_size} members = {config.prompts_per_step * config.group_size} "
          f"pictures a step, RID {'on' if config.rid else 'off'}, {describe_backend()}, step {step} of {config.steps}")  # fmt: skip
    bar = tqdm(range(step, config.steps), initial=step, total=config.steps, disable=None, desc="grpo")
    for step in bar:
        values = iteration(model, reference, optimizer, layout, tokenizer, clip, config, step)
        run.update_average(average, model, config.average)
        run.log(folder, values)
        bar.set_postfix(reward=f"{values['reward']:.3f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            run.save_state(folder, step + 1, run.pack_state(model, optimizer, average))
        if (step + 1) % config.sample_every == 0:
            evaluate.save_strip(folder / "samples" / f"{step + 1:06d}.png", model, layout, tokenizer, config.max_references,
                                shift=config.timestep_shift, num_timesteps=config.eval_timesteps)  # fmt: skip
    save_model(model, tokenizer, folder / "model", average)
    compare(config, folder, clip)
    print(f"grpo: {run.seconds(begun)} in this command; model in {folder}/model, pictures in {folder}/grid.png")


def iteration(model, reference, optimizer, layout, tokenizer, clip, config, step):
    """One rollout and its updates. Returns the line of the log."""
    begun = time.perf_counter()
    first = step * config.prompts_per_step
    samples = [data.draw_sample("train", first + i, config.seed + 1, config.max_references) for i in range(config.prompts_per_step)]
    rollout = sample_groups(model, layout, tokenizer, samples, config, step)
    rolled = time.perf_counter()
    truncated = clip.truncated
    reward = rewards(clip, rollout, config)
    advantage = group_advantage(reward, config.std_floor, config.max_advantage)
    rewarded = time.perf_counter()
    health = update(model, reference, optimizer, layout, rollout, advantage, config)
    return {
        "step": step, "reward": reward.mean().item(), "reward_std": reward.std(1, correction=0).mean().item(),
        "dead_groups": (advantage == 0).all(1).float().mean().item(), "parse_failures": (~rollout.valid).float().mean().item(),
        "caption_words": sum(len(c.split()) for c in rollout.captions) / len(rollout.captions),
        "truncated": clip.truncated - truncated, **health, "rollout_seconds": rolled - begun,
        "reward_seconds": rewarded - rolled, "update_seconds": time.perf_counter() - rewarded,
    }  # fmt: skip


def compare(config, folder, clip):
    """The table: stage 1 and stage 2 on the same held-out prompts from the same noise, and a grid of pictures."""
    metric = evaluate.metric_clip(config.metric_name, config.metric, config.clip_steps)
    samples = [data.draw_sample("held_out", i, 0, config.max_references) for i in range(config.eval_samples)]
    rows = {}
    for name, path in (("SFT", config.init), ("SFT + GRPO", folder)):
        model, tokenizer = load_model(path)
        results = evaluate.generate(model, model.config.layout(tokenizer), tokenizer, samples, shift=config.timestep_shift,
                                    num_timesteps=config.eval_timesteps)  # fmt: skip
        rows[name] = evaluate.measure(samples, results, metric)
    evaluate.save_grid(folder / "grid.png", samples[:8], results[:8])
    run.write_text(folder / "table.json", run.json.dumps(rows, indent=1) + "\n")
    evaluate.print_table(rows)


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
