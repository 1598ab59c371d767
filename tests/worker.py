"""What every process of a test does: `torchrun … tests/worker.py FOLDER`, or `work(folder)` in a world of one."""

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
from runtime import (
    processes,  # noqa: E402
    sharding,  # noqa: E402
)
from toy.tasks import draw_sample  # noqa: E402

SFT = dataclasses.replace(
    sft.Config(config="smoke", **sft.PRESETS["smoke"]),
    samples_per_step=6,
    tokens_per_pack=500,
    plan_dropout=0.4,
    decay=0.0,
    save_every=3,
    steps=6,
    threads=1,
    sample_every=100,
    timeout_minutes=2.0,
    vae_dropout=0.3,
    vit_dropout=0.3,
)
GRPO = dataclasses.replace(
    grpo.Config(config="smoke", **grpo.PRESETS["smoke"]),
    prompts_per_step=4,
    updates=2,
    tokens_per_pack=500,
    kl_beta=0.1,
    text_guidance=3.0,
    clip_steps=1,
    eval_samples=4,
    threads=1,
    steps=2,
    timeout_minutes=2.0,
)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def sft_gradients(folder, sum_every_pass):
    """The first step of stage 1: losses, and gradients of everything."""
    config = dataclasses.replace(SFT, sum_every_pass=sum_every_pass)
    model, tokenizer = sft.build(config, folder / "tokenizer-run")
    layout = model.config.layout(tokenizer)
    examples = [
        sft.encode(model, tokenizer, draw_sample("train", i), config, processes.generator(0, i))
        for i in sft.sample_indices(config, 0)
    ]
    packs = sft.pack(layout, examples, config.tokens_per_pack)
    means = sft.backward(model, packs, config)
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return found | {"means": torch.tensor(means), "packs": torch.tensor([len(packs)])}


def grpo_gradients(folder, **options):
    """Gradients of both optimiser steps of an update, whose plans are parts of the true ones and whose rewards are random."""
    config = dataclasses.replace(GRPO, init=str(folder / "init"), **options)
    model, tokenizer, trained = grpo.build(config)
    layout, numbers = model.config.layout(tokenizer), grpo.sample_indices(config, 0)
    samples = [draw_sample("train", i) for i in numbers]
    texts = [tokenizer.encode(iccot.render(one.plan)) for one in samples]
    plans = [
        text[3 * m : 3 * m + 9 * (i + 1)]
        for text, i in zip(texts, numbers)
        for m in range(config.group_size)
    ]
    grpo.think = lambda *_, **__: (plans, [True] * len(plans))
    with sharding.gathered(model):
        rollout = grpo.sample_groups(model, layout, tokenizer, samples, numbers, config, 0)
    reward = torch.stack(
        [torch.randn(config.group_size, generator=processes.generator(7, i)) for i in numbers]
    )
    anchor = {name: p.detach() * 1.05 for name, p in trained.items()}
    found = {}

    class Recorder(torch.optim.SGD):
        def step(self):
            found.update(
                {
                    f"{len(found)}.{name}": whole(p.grad)
                    for name, p in trained.items()
                    if p.grad is not None
                }
            )

    grpo.update(model, anchor, Recorder(trained.values(), 0.0), layout, rollout, reward, config)
    return found


def train(folder, name, **options):
    sft.train(dataclasses.replace(SFT, out=str(folder / name), **options))


REAL_THINK = grpo.think


def work(folder):
    """Everything; what is to be compared goes to files named by the number of processes."""
    processes.launch(2.0)
    world = processes.size()
    results = {f"sft-{flag}": sft_gradients(folder, flag) for flag in (True, False)}
    for name, options in (
        ("all", {}),
        ("gen", {"train": "gen"}),
        ("lora", {"train": "lora", "lora_rank": 4}),
        ("text", {"train_text": True, "kl_beta": 0.0}),
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
    train(folder, f"background-{world}", async_save=True)
    if world == 2:
        train(folder, "handed-on-by-1")  # what one process began
        grpo.think = REAL_THINK
        grpo.rewards = lambda clip, rollout, config: torch.randn(
            len(rollout.prompts), config.group_size
        )  # nothing parses yet
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
