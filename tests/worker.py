"""What every process of a test does: `torchrun … tests/worker.py FOLDER`, or `work(folder)`."""

import dataclasses
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import grpo  # noqa: E402
import iccot  # noqa: E402
import sft  # noqa: E402
import tree  # noqa: E402
from runtime import processes, sharding  # noqa: E402
from toy.tasks import draw_sample  # noqa: E402

SFT = dataclasses.replace(
    sft.Config(config="smoke", **sft.PRESETS["smoke"]),
    samples_per_step=6,
    lr=2e-3,
    tokens_per_pack=400,
    plan_dropout=0.4,
    decay=0.0,
    save_every=3,
    steps=6,
    threads=1,
    sample_plan_tokens=4,
    sample_timesteps=2,
    vae_dropout=0.3,
    vit_dropout=0.3,
)
GRPO = dataclasses.replace(
    grpo.Config(config="smoke", **grpo.PRESETS["smoke"]),
    prompts_per_step=4,
    max_plan_tokens=40,
    cot_temperature=1.0,
    updates=2,
    tokens_per_pack=560,  # two passes for a group of short plans, four for one of long plans
    likelihood="sde",
    window=2,
    kl_beta=0.1,
    text_guidance=3.0,
    eval_samples=4,
    threads=1,
    steps=2,
)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def draw(i, bare):
    """Sample i; with `bare` every second one, and so all of the second process, has no pictures."""
    sample = draw_sample("train", i)
    return dataclasses.replace(sample, references=()) if bare and i % 2 else sample


def uneven(config, i):
    """Dropouts of sample i: odd ones lose all ViT tokens and the plan, even ones all clean latents.

    So of two processes one never shows the eye anything and has no labels.
    """
    odd = float(i % 2)
    some = dict(vit_dropout=odd, plan_dropout=odd, vae_dropout=1 - odd, text_dropout=0.0)
    return dataclasses.replace(config, **some)


def alike(number):
    """No sample is longer than another: two go to two processes as they come."""
    return 1


def least_and_most(passes):
    """(2, groups): the fewest and the most passes that any process has to make."""
    return torch.tensor([processes.reduced(passes, how) for how in ("min", "max")])


def sft_gradients(folder, is_uneven=False, **options):
    """The first step of stage 1: losses, and gradients of everything."""
    config = dataclasses.replace(SFT, **options)
    engine = sft.build(config, folder / "tokenizer-run")
    model = engine.model
    examples = [
        sft.make_example(
            draw_sample("train", i),
            i,
            engine.tokenizer,
            model.config,
            uneven(config, i) if is_uneven else config,
        )
        for i in range(processes.rank(), config.samples_per_step, processes.size())
    ]
    means = sft.backward(engine, examples, config)
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    packs = sft.fill([one.tokens for one in examples], config.tokens_per_pack)
    passes = least_and_most([len(packs)])
    return found | {"means": torch.tensor(means), "passes": passes}


def grpo_gradients(folder, bare=False, **options):
    """Gradients of both optimiser steps of an update: parts of true plans, random rewards."""
    config = dataclasses.replace(GRPO, init=str(folder / "init"), **options)
    learner = grpo.build(config)
    engine, size = learner.engine, config.group_size
    numbers = grpo.own_numbers(0, alike, config)
    samples = [draw(i, bare) for i in numbers]
    plans = [
        engine.tokenizer.encode(iccot.render(sample.plan))[3 * m : 3 * m + 9 * (i + 1)]
        for sample, i in zip(samples, numbers)
        for m in range(0, size, config.pictures_per_plan)
    ]
    engine.think = lambda *_, **__: (plans, [True] * len(plans))
    with sharding.gathered(engine.model):
        rollout = grpo.roll_out(engine, samples, numbers, config, 0)
    reward = torch.stack([torch.randn(size, generator=processes.generator(7, i)) for i in numbers])
    advantage, plan_advantage = grpo.advantages(reward, config)
    trees = [tree.plant(engine.layout, rollout, i, config) for i in range(len(numbers))]
    passes = least_and_most([len(planted.batches) for planted in trees])
    trained, found = learner.state.parameters, {}

    class Recorder(torch.optim.SGD):
        def step(self):
            reached = {name: p.grad for name, p in trained.items() if p.grad is not None}
            begun = len(found)
            found.update({f"{begun}.{name}": whole(grad) for name, grad in reached.items()})

    learner.state.optimizer = Recorder(trained.values(), 0.0)
    learner.anchor = {name: p.detach() * 1.05 for name, p in trained.items()}
    grpo.update(learner, rollout, advantage, plan_advantage, config)
    return found | {"passes": passes}


def train(folder, name, **options):
    sft.train(dataclasses.replace(SFT, out=str(folder / name), **options))


def work(folder):
    """Everything; what is to be compared goes to files named by the number of processes."""
    processes.launch()
    world = processes.size()
    results = {}
    for name, is_uneven in (("sft", False), ("uneven", True)):
        results[name] = sft_gradients(folder, is_uneven)
    precision = "float32" if world == 1 else "bfloat16"
    narrow = sft_gradients(folder, True, precision=precision, checkpointing=True)
    results["narrow"] = narrow
    part = dict(init=str(folder / "init"), lora_rank=4)
    for name in ("gen", "lora"):
        results[f"sft-{name}"] = sft_gradients(folder, True, train=name, **part)
    how = dict(precision=precision, checkpointing=True, train="lora")
    results["narrow-lora"] = sft_gradients(folder, True, **how, **part)
    for name, options in (
        ("all", {}),
        ("gen", {"train": "gen"}),
        ("lora", {"train": "lora", "lora_rank": 4}),
        ("text", {"train_text": True, "kl_beta": 0.0}),
        ("forward", {"likelihood": "forward", "tokens_per_pack": 820}),
        (
            "forward-narrow",
            {"likelihood": "forward", "tokens_per_pack": 820, "checkpointing": True}
            | {"train": "lora", "lora_rank": 4},
        ),
        ("plans", {"images_per_cot": 2, "train_text": True, "tokens_per_pack": 545}),
        ("bare-all", {"bare": True}),
        ("bare-gen", {"bare": True, "train": "gen"}),
        ("bare-lora", {"bare": True, "train": "lora", "lora_rank": 4}),
    ):
        results[f"grpo-{name}"] = grpo_gradients(folder, **options)
    if processes.is_main():
        for name, tensors in results.items():
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()},
                folder / f"{name}-{world}.safetensors",
            )
    train(folder, f"whole-{world}")
    train(folder, f"half-{world}", steps=3)
    if processes.is_main():
        shutil.copytree(folder / f"half-{world}", folder / f"handed-on-by-{world}")
    processes.barrier()
    train(folder, f"half-{world}")
    if world == 2:
        part |= dict(train="lora", steps=2, save_every=1, sample_plan_tokens=4)
        train(folder, "whole-part", **part)
        train(folder, "half-part", **part | {"steps": 1})
        train(folder, "half-part", **part)
        train(folder, "handed-on-by-1")  # what one process began
        # nothing parses yet
        grpo.group_rewards = lambda _, images, __, groups: torch.randn(
            groups, len(images) // groups
        )
        grpo.train(
            dataclasses.replace(
                GRPO,
                init=str(folder / "whole-2"),
                out=str(folder / "grpo"),
                clip=str(folder / "clip-r"),
                metric=str(folder / "clip-m"),
                train="lora",
                lora_rank=4,
            )
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
    processes.finish()
