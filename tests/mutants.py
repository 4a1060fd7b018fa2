"""Plant mistakes in the numeric core, one at a time, and see which test catches each.

    python tests/mutants.py            runs all, writes tests/PLANTED.md; about ten minutes
    python tests/mutants.py sampling   runs those whose name or file holds this word

Each mistake is a replacement in one file of a copy of the package. Libraries are imported once,
then every mistake gets a process of its own.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mistake:
    """One planted mistake.

    Attributes:
        what: in words.
        file: below craftune/.
        right: text that occurs there once.
        wrong: what it is replaced by.
        tests: the files that ought to notice, below tests/.
    """

    what: str
    file: str
    right: str
    wrong: str
    tests: str


D, S, M, C = "test_diffusion.py", "test_sampling.py", "models", "methods"
T, A, G, R = "test_training.py", "test_adapters.py", "stages/test_generate.py", "stages/test_train.py"
MISTAKES = [
    Mistake("v has the wrong sign", "diffusion.py", "return alpha * noise - sigma * x_0", "return sigma * x_0 - alpha * noise", D),
    Mistake("velocity has the wrong sign", "diffusion.py", "return noise - x_0", "return x_0 - noise", D),
    Mistake("velocity is split as if alpha + sigma were 1 only at the ends", "diffusion.py", "(x_t - sigma * prediction) / (alpha + sigma)", "x_t - sigma * prediction * alpha", D),
    Mistake("v is split without its normaliser", "diffusion.py", "(alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)", "alpha * x_t - sigma * prediction", D),
    Mistake("epsilon's x_0 is not divided by alpha", "diffusion.py", "(x_t - sigma * prediction) / alpha, prediction", "(x_t - sigma * prediction), prediction", D),
    Mistake("alpha and sigma swapped in the noise", "diffusion.py", "return alpha * x_0 + sigma * noise", "return sigma * x_0 + alpha * noise", D),
    Mistake("one level for the whole batch", "diffusion.py", "self.alphas.to(like)[t].view(shape)", "self.alphas.to(like)[t[:1].expand(len(t))].view(shape)", D),
    Mistake("zero terminal SNR passes", "diffusion.py", "self.alphas.min() <= 0", "self.alphas.min() < 0", D),
    Mistake("the last timestep is never drawn", "diffusion.py", "torch.randint(len(self), (n,)", "torch.randint(len(self) - 1, (n,)", D),
    Mistake("the first timestep is never drawn", "diffusion.py", "torch.randint(len(self), (n,)", "torch.randint(1, len(self), (n,)", D),
    Mistake("logit-normal with twice the deviation", "diffusion.py", "torch.sigmoid(torch.randn", "torch.sigmoid(2 * torch.randn", D),
    Mistake("logit-normal is uniform", "diffusion.py", "torch.sigmoid(torch.randn", "(torch.rand", D),
    Mistake("guidance the wrong way round", "sampling.py", "Cond.cat([empty, cond])", "Cond.cat([cond, empty])", S),
    Mistake("guidance counts from 0", "sampling.py", "unconditional + scale * (", "conditional + scale * (", S),
    Mistake("gradient in the first steps, not the last", "sampling.py", "i >= steps - grad_steps", "i < grad_steps", S),
    Mistake("gradient one step too long", "sampling.py", "i >= steps - grad_steps", "i >= steps - grad_steps - 1", S),
    Mistake("gradient where the caller has none", "sampling.py", "torch.is_grad_enabled() and i >=", "i >=", S),
    Mistake("2M without its factor one half", "sampling.py", "x_0 + 0.5 * ratio", "x_0 + ratio", S),
    Mistake("2M's ratio upside down", "sampling.py", "ratio = h / (log_snr[i, 0] - log_snr[i - 1, 0])", "ratio = (log_snr[i, 0] - log_snr[i - 1, 0]) / h", S),
    Mistake("2M extrapolates in the last step", "sampling.py", "previous is not None and i < steps - 1", "previous is not None", S),
    Mistake("2M keeps the extrapolated x_0", "sampling.py", "            previous = x_0", "            previous = data", S),
    Mistake("2M is DDIM", "sampling.py", 'sampler == "dpm++2m" and', 'sampler == "none" and', S),
    Mistake("steps aim at their own start", "sampling.py", "x = sigma_end / sigma * x", "x = sigma / sigma * x", S),
    Mistake("the step's alpha is its start's", "sampling.py", "- alpha_end * torch.expm1(-h)", "- alpha * torch.expm1(-h)", S),
    Mistake("one generator for all images", "sampling.py", "manual_seed(s)) for s in seeds", "manual_seed(seeds[0])) for s in seeds", S),
    Mistake("DDIM ends at alpha 1 whatever the checkpoint says", "models/sd.py", "torch.where(ends < 0, last, ", "torch.where(ends < 0, torch.ones(1).double(), ", S),
    Mistake("DDIM steps to the next timestep where diffusers does not", "models/sd.py", "ends = starts - len(alpha_bar) // num_steps", "ends = torch.cat([starts[1:], torch.tensor([-1])])", S),
    Mistake("2M's levels are those of the timesteps", "models/sd.py", "ratios = scheduler.sigmas.double()", "abar = scheduler.alphas_cumprod.double()[scheduler.timesteps]; ratios = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1).double()])", M),
    Mistake("sigma over alpha taken for sigma", "models/sd.py", "(ratios * alphas).float()", "ratios.float()", S),
    Mistake("too many steps pass", "models/sd.py", "if num_steps < config.num_train_timesteps else None", "if num_steps <= 10**9 else None", M),
    Mistake("latents scaled twice before decoding", "models/sd.py", "latents.to(vae.dtype) / scale", "latents.to(vae.dtype) / scale / scale", M),
    Mistake("images not mapped to [0, 1]", "models/sd.py", "(image.float() / 2 + 0.5)", "image.float()", M),
    Mistake("encoded latents not scaled", "models/sd.py", "return clean.float() * scale", "return clean.float()", M),
    Mistake("images encoded in [0, 1]", "models/sd.py", "images * 2 - 1", "images", M),
    Mistake("encoding draws from the posterior", "models/sd.py", "latent_dist.mode()", "latent_dist.sample()", M),
    Mistake("prompts not padded to the full length", "models/sd.py", 'padding="max_length"', "padding=True", M),
    Mistake("only the first 64 prompts encoded", "models/sd.py", "range(0, len(texts), 64)", "range(0, min(len(texts), 64), 64)", M),
    Mistake("the starting network is saved", "models/sd.py", "copy.deepcopy(network).to(\"cpu\", dtype)", "StableDiffusionPipeline.from_pretrained(pipe.config._name_or_path).unet.to(dtype)", M),
    Mistake("a half-precision text encoder stays so on loading", "models/sd.py", '{"dtype": "float32"}', '{"dtype": "float16"}', M),
    Mistake("infinite weights pass", "models/sd.py", "if not torch.isfinite(parameter).all()", "if parameter.isnan().any()", M),
    Mistake("a missing weight of the text encoder is made up", "models/sd.py", 'if info["missing_keys"]', "if False", M),
    Mistake("a missing weight of the UNet is a traceback", "models/sd.py", "if parameter.is_meta", "if False", M),
    Mistake("saving changes the model in place", "models/sd.py", "copy.deepcopy(network).to(\"cpu\", dtype)", "network.to(\"cpu\", dtype)", M),
    Mistake("alpha is lost from saved adapters", "models/sd.py", ", unet_lora_adapter_metadata=settings", "", A),
    Mistake("the weights are ignored", "methods/craft.py", "            loss = (batch.weight * error).mean()\n            return", "            loss = error.mean()\n            return", C),
    Mistake("the weights are normalised by batch", "methods/craft.py", "            loss = (batch.weight * error).mean()\n            return", "            loss = (batch.weight * error).sum() / batch.weight.sum()\n            return", C),
    Mistake("a sum over latents", "methods/denoising.py", ".flatten(1).mean(1)", ".flatten(1).sum(1)", C),
    Mistake("the square root of the error", "methods/denoising.py", ".flatten(1).mean(1)", ".flatten(1).mean(1).sqrt()", C),
    Mistake("another target for every target", "methods/denoising.py", "target = schedule.training_target(x_0, draws.noise, draws.t)", "target = draws.noise", C),
    Mistake("one noise for the whole batch", "methods/denoising.py", "noise = torch.randn(x_0.shape,", "noise = torch.zeros_like(x_0) + torch.randn(x_0[:1].shape,", C),
    Mistake("one timestep for the whole batch", "methods/denoising.py", "t = schedule.random_timesteps(len(x_0), rng)", "t = schedule.random_timesteps(1, rng).expand(len(x_0))", C),
    Mistake("noise from the global generator", "methods/denoising.py", "x_0.shape, generator=rng, device", "x_0.shape, device", C),
    Mistake("drop keeps the sign", "methods/craft.py", "return advantage.clamp(min=0)", "return advantage", C),
    Mistake("drop takes the absolute value", "methods/craft.py", "return advantage.clamp(min=0)", "return advantage.abs()", C),
    Mistake("clip from above", "methods/craft.py", "advantage.clamp(min=-self.clip)", "advantage.clamp(max=self.clip)", C),
    Mistake("the guard looks at all examples", "methods/craft.py", "negative = (batch.weight < 0).float()", "negative = torch.ones_like(batch.weight)", C),
    Mistake("the guard never stops", "methods/craft.py", "if ratio > self.guard", "if False", C),
    Mistake("the guard's ratio upside down", "methods/craft.py", 'metrics["negative_error"] / start if start', 'start / metrics["negative_error"] if start', C),
    Mistake("gradient into the reference", "methods/craft.py", "        with torch.no_grad():\n            start", "        with torch.enable_grad():\n            start", C),
    Mistake("without a reference, a signed loss unasked", "methods/craft.py", "if not self.needs_reference:", "if reference is None:", C),
    Mistake("the anchor's share without its half", "methods/craft.py", "batch.weight / (2 * self.advantage_max)", "batch.weight / self.advantage_max", C),
    Mistake("the anchor's share not clamped", "methods/craft.py", "self.advantage_max)).clamp(0, 1)", "self.advantage_max))", C),
    Mistake("the anchor's good and bad swapped", "methods/craft.py", "return share * squared_error(positive, target) + (1 - share) *", "return (1 - share) * squared_error(positive, target) + share *", C),
    Mistake("the anchor's negative mixture does not sum to 1", "methods/craft.py", "(1 + beta) * start - beta", "start - beta", C),
    Mistake("beta left out of the positive mixture", "methods/craft.py", "beta * prediction + (1 - beta) * start", "prediction", C),
    Mistake("SFT weighs by advantage", "methods/sft.py", "torch.ones_like(advantage)", "advantage", C),
    Mistake("accumulation not averaged", "training.py", "torch.autograd.backward(loss * share)", "torch.autograd.backward(loss)", T),
    Mistake("every micro-batch has an equal share", "training.py", "share = (rows.stop - rows.start) / size", "share = 1 / -(-size // part)", T),
    Mistake("the last, smaller micro-batch dropped", "training.py", "for start in range(0, size, part)", "for start in range(0, size - part + 1, part)", T),
    Mistake("all micro-batches draw the first rows' noise", "training.py", "draws.rows(rows))", "draws.rows(slice(0, rows.stop - rows.start)))", T),
    Mistake("gradients never cleared", "training.py", "            optimizer.zero_grad(set_to_none=True)\n", "", T),
    Mistake("no check for what is not finite", "training.py", "            _require_finite(step, metrics, norm.item())\n", "", T),
    Mistake("the check comes after the step", "training.py", "            _require_finite(step, metrics, norm.item())\n            method.check(metrics)\n            optimizer.step()\n", "            optimizer.step()\n            _require_finite(step, metrics, norm.item())\n            method.check(metrics)\n", T),
    Mistake("the method's check never called", "training.py", "            method.check(metrics)\n", "", T),
    Mistake("the seed dropped from the draws", "training.py", 'stream("draws", seed, step)', 'stream("draws", step)', T),
    Mistake("the same draws every step", "training.py", 'stream("draws", seed, step)', 'stream("draws", seed)', T),
    Mistake("averaging reversed", "training.py", "mean.lerp_(value, 1 - decay)", "mean.lerp_(value, decay)", T),
    Mistake("the raw weights come back", "training.py", "return (average if average is not None else network).eval()", "return network.eval()", T),
    Mistake("no clipping", "training.py", "nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)", "nn.utils.clip_grad_norm_(parameters, 1e9)", T),
    Mistake("no warm-up", "training.py", "min(1, (step + 1) / (config.warmup_steps + 1))", "1", T),
    Mistake("warm-up one step late", "training.py", "(step + 1) / (config.warmup_steps + 1)", "step / (config.warmup_steps + 1)", T),
    Mistake("no weight decay", "training.py", "weight_decay=config.weight_decay", "weight_decay=0.0", T),
    Mistake("autocast keeps its cache", "training.py", "cache_enabled=False", "cache_enabled=True", T),
    Mistake("the log's rows after the checkpoint stay", "training.py", "splitlines(keepends=True)[:first]", "splitlines(keepends=True)", T),
    Mistake("the average is not in the checkpoint", "training.py", '        stateful["average"] = Trainable(average)\n', "        pass\n", T),
    Mistake("the optimizer is not in the checkpoint", "training.py", '"optimizer": optimizer}', '}', T),
    Mistake("resume repeats a step", "training_state.py", "        return step\n", "        return step - 1\n", T),
    Mistake("the oldest checkpoint is taken", "training_state.py", "for step, folder in reversed(_folders(out))", "for step, folder in _folders(out)", T),
    Mistake("the checkpoint's digest is not looked at", "training_state.py", 'if mark["sha256"] != sha256(folder / "state.pt")', "if False", T),
    Mistake("pruning keeps the oldest", "training_state.py", "_folders(out)[: -keep or None]", "_folders(out)[keep:]", T),
    Mistake("folders in the order of their names", "training_state.py", "return sorted((int(match[1]), path) for", "return sorted(((int(match[1]), path) for", T),
    Mistake("the disk is not asked", "training_state.py", "    _require_space(folder.parent, state)\n", "", T),
    Mistake("frozen weights fill the checkpoints", "training_state.py", "if not p.requires_grad}", "if False}", T),
    Mistake("adapters start from the global generator", "adapters.py", '            torch.manual_seed(stream_seed("lora", seed))\n', "", A),
    Mistake("the reference has its adapters on", "adapters.py", "layer.enable_adapters(False)", "layer.enable_adapters(True)", A),
    Mistake("the adapters stay off", "adapters.py", "layer.enable_adapters(True)", "layer.enable_adapters(False)", A),
    Mistake("merged without the adapters", "adapters.py", "    whole.fuse_lora()  # type: ignore[operator]\n", "", A),
    Mistake("alpha is the rank", "adapters.py", "lora_alpha=config.alpha or config.rank", "lora_alpha=config.rank", "stages/test_train.py " + A),
    Mistake("the base trains beside the adapters", "adapters.py", "            network.add_adapter(lora)  # type: ignore[operator]\n", "            network.add_adapter(lora)  # type: ignore[operator]\n            network.requires_grad_(True)\n", A),
    Mistake("the seed does not depend on the run's", "stages/generate.py", 'stream_seed("candidate", seed, prompt.id', 'stream_seed("candidate", prompt.id', G),
    Mistake("variants share their noise", "stages/generate.py", "prompt.id, variant, k)", "prompt.id, k)", G),
    Mistake("the seed counts rows", "stages/generate.py", "prompt.id, variant, k)", "len(rows))", G),
    Mistake("images are drawn from the plain prompt", "stages/generate.py", 'Request(row["refined_prompt"], row["seed"])', 'Request(row["prompt"], row["seed"])', G),
    Mistake("the batch's texts mixed up", "stages/generate.py", "distinct.index(request.text) for request in batch", "distinct.index(request.text) for request in batch[::-1]", G),
    Mistake("no guidance", "stages/generate.py", "guidance_scale=config.guidance_scale,\n    )", "guidance_scale=1.0,\n    )", G),
    Mistake("finished shards are drawn again", "stages/generate.py", "if not path.is_file()", "if True", G),
    Mistake("images rounded down", "images.py", "* 255).round().byte()", "* 255).byte()", G),
    Mistake("images not clamped", "images.py", ".clamp(0, 1) * 255", " * 255", G),
    Mistake("trained under the rewrites' rows order", "stages/train.py", "found[where.pop(name)] =", "found[len(names) - len(where) + 0 * where.pop(name)] =", R),
    Mistake("all verdicts train, not the selected", "stages/train.py", 'verdicts.filter(verdicts["selected"])', "verdicts", R),
    Mistake("examples without weight train", "stages/train.py", "used = weight != 0", "used = weight == weight", R),
    Mistake("the same order every epoch", "stages/train.py", 'stream("epoch", self.seed, epoch)', 'stream("epoch", self.seed)', R),
    Mistake("batches drawn with replacement", "stages/train.py", "orders[place // count][place % count] for place in places", "orders[place // count][(place * place) % count] for place in places", R),
    Mistake("the seed dropped from the order", "stages/train.py", 'stream("epoch", self.seed, epoch)', 'stream("epoch", epoch)', R),
    Mistake("prompt dropout reversed", "stages/train.py", "dropped < self.prompt_dropout", "dropped >= self.prompt_dropout", R),
    Mistake("dropout on the same places every step", "stages/train.py", 'stream("dropout", self.seed, step)', 'stream("dropout", self.seed)', R),
    Mistake("the weights dropped with the prompt", "stages/train.py", "dataclasses.replace(chosen, cond=cond)", "dataclasses.replace(chosen, cond=cond, weight=chosen.weight * (rows < size))", R),
    Mistake("the reference is the policy", "stages/train.py", "reference = copy.deepcopy(model.denoiser)", "reference = model.denoiser", R),
    Mistake("the starting weights are saved for LoRA", "stages/train.py", "whole = merged(trained) if config.lora.rank", "whole = load_base() if config.lora.rank", R),
]


def warm() -> None:
    """Import the heavy libraries, so that every process below inherits them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets  # noqa: F401
    import diffusers
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.utils.tensorboard  # noqa: F401
    import transformers

    torch.set_num_threads(1)
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UNet2DConditionModel"):
        getattr(diffusers, name)
    for name in ("StableDiffusionPipeline", "AutoencoderKL", "AutoencoderTiny"):
        getattr(diffusers, name)
    transformers.CLIPTextModel  # noqa: B018


def caught_by(mistake: Mistake | None, tests: str, log: Path) -> list[str]:
    """The failing tests (with -x: the first) under a mistake, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in ("craftune", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mistake:
            path = copy / "craftune" / mistake.file
            text = path.read_text()
            if text.count(mistake.right) != 1:
                return [f"NOT PLANTED: {text.count(mistake.right)} places"]
            path.write_text(text.replace(mistake.right, mistake.wrong))
        child = os.fork()
        if child == 0:
            _run(copy, tests, log)
        os.waitpid(child, 0)
    found = re.findall(r"^(?:FAILED|ERROR) tests/(\S+?)(?:\[| - |$)", log.read_text(), re.M)
    return list(dict.fromkeys(found))


def _run(copy: Path, tests: str, log: Path) -> None:
    import pytest

    os.chdir(copy)
    sys.path.insert(0, str(copy))
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        files = [f"tests/{test}" for test in tests.split()]
        flags = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--no-header"]
        flags += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # imported by the parent
        code = pytest.main([*flags, *files])
        sys.stdout.flush()
        os._exit(int(code))


def main(words: list[str]) -> int:
    """Run the mistakes that hold a word, or all; returns how many went unnoticed."""
    chosen = [m for m in MISTAKES if not words or any(w in m.what or w in m.file for w in words)]
    warm()
    log = Path(tempfile.gettempdir()) / "craftune-mutants.log"
    missed, lines = 0, []
    for number, mistake in enumerate(chosen, 1):
        started = time.monotonic()
        found = caught_by(mistake, mistake.tests, log)
        missed += not found or found[0].startswith("NOT PLANTED")
        by = ", ".join(f.replace("::", " ") for f in found) or "NOTHING"
        lines.append(f"| {number} | {mistake.what} | `{mistake.file}` | {by} |")
        print(lines[-1], f"{time.monotonic() - started:.1f} s", flush=True)
    if not words:
        head = (
            "# Planted mistakes\n\n"
            "One at a time, in a copy of the package; `python tests/mutants.py` plants them again\n"
            "and writes this table. The last column is the first test that fails.\n\n"
            f"{len(chosen) - missed} of {len(chosen)} are caught.\n\n"
            "| | mistake | file below `craftune/` | caught by |\n|---|---|---|---|\n"
        )
        (ROOT / "tests" / "PLANTED.md").write_text(head + "\n".join(lines) + "\n")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
