"""A run of noise correction: pictures inverted, a corrector trained, the model started from it."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks, forks
from PIL import Image
from tiny import call, files
from toy import kept_checkpoint
from toy_flow import kept_flow

from craftune import pipeline
from craftune.budget import budget
from craftune.config import ModelConfig
from craftune.errors import UserError
from craftune.exporting import export
from craftune.models import load
from craftune.noise import correct, load_corrector, summary
from craftune.recipes import load_recipe
from craftune.records import read_json, read_table
from craftune.sampling import initial_noise, sample
from craftune.shapes.captions import parse
from craftune.shapes.pictures import world_pictures
from craftune.shapes.verifier import detect, verify

RECIPE = """
[run]
name = "noise"
out = "{out}"

[model]
path = "{model}"

[prompts]
source = "{prompts}"

[generate]
num_steps = 4
guidance_scale = {scale}
batch_size = 3
shard_size = 4

[method]
name = "noise-correction"

[method.settings]
source = "{pictures}"
pictures = 6
blur = 0.1
width = 16
depth = 1

[train]
steps = 4
batch_size = 4
learning_rate = 1e-2
warmup_steps = 0
save_every = 1

[evaluate]
num_prompts = 2
rewards = ["jpeg-compressibility", "shapes-a"]
resamples = 50
"""
TEXTS = [f"{n} {thing}" for n in ("a", "two") for thing in ("dog", "cat", "cup", "hat")]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path, scale: float = 1.0) -> Path:
    """A recipe, its prompts, and seven pictures of them, larger than the model's."""
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    pictures = folder / "pictures"
    pictures.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number, text in enumerate(TEXTS[:7]):
        noise = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((100, 80)).save(pictures / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "prompt": text}))
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    path = folder / "noise.toml"
    path.write_text(
        RECIPE.format(
            out=folder,
            model=kept_flow("sd3"),
            prompts=folder / "prompts.txt",
            pictures=pictures,
            scale=scale,
        )
    )
    return path


def test_a_run_inverts_trains_and_compares(recipe: Path) -> None:
    answer = call(["run", recipe], recipe.parent)
    assert answer.status == 0, answer.err
    assert "6 noises of pictures" in answer.err
    assert "MFLOP per image of tuned" in answer.err
    assert 'load:   craftune.noise.load_corrector("' in answer.out
    folder = recipe.parent / "noise"
    assert sorted(path.name for path in folder.glob("?-*")) == [
        "1-prompts",
        "3-generate",
        "6-train",
        "7-evaluate",
        "8-report",
    ]
    report = read_json(folder / "8-report" / "report.json")
    assert {entry["role"] for entry in report["rewards"]} == {"held-out"}
    page = (folder / "8-report" / "report.html").read_text()
    assert "of a corrector of the starting noise" in page
    assert "load_corrector" in page
    assert "from_pretrained" not in page
    flops = read_json(folder / "6-train" / "flops.json")
    assert flops["base_image"] == 4 * flops["model_call"]
    assert flops["tuned_image"] == flops["base_image"] + 2 * flops["corrector_call"]
    before = files(folder)
    assert call(["run", recipe], recipe.parent).status == 0  # everything is done already
    assert files(folder) == before


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_noises_give_the_pictures_through_the_run_s_own_sampler(
    tmp_path: Path, scale: float
) -> None:
    job = load_recipe(written(tmp_path, scale))
    pipeline.run(job, only="prompts")
    folder = pipeline.run(job, only="generate")
    about = read_json(folder / "3-generate" / "inversion.json")
    assert about["pictures"] == 6
    assert about["regeneration_error"] < 1e-4
    assert max(about["factors"]) < 1
    table = read_table((folder / "3-generate").glob("noises-*.parquet"))
    assert table["prompt"].to_pylist() == TEXTS[:6]
    model = load(ModelConfig(path=str(kept_flow("sd3"))), torch.device("cpu"))
    noise = torch.from_numpy(np.stack(table["noise"].to_numpy())).reshape(6, *model.latent_shape)
    drawn = sample(
        model.denoiser,
        noise,
        model.encode_prompts(TEXTS[:6]),
        model.encode_prompts([""] * 6),
        model.grid("euler", 4),
        sampler="euler",
        guidance_scale=scale,
    )
    pixels = [
        np.asarray(Image.open(tmp_path / "pictures" / f"{n}.png").crop((10, 0, 90, 80)))
        for n in range(6)
    ]
    side = model.decode(drawn[:1]).shape[-1]
    small = [
        np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.LANCZOS))
        for p in pixels
    ]
    images = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255
    encoded = model.encode_images(images)
    spread = 0.1 if encoded.std is None else (0.01 + encoded.std.square().mean().item()) ** 0.5
    error = (drawn - encoded.mean).square().mean().sqrt().item()
    assert error == pytest.approx(spread, rel=0.25)


def test_the_tuned_images_start_from_the_corrector_s_noise(recipe: Path) -> None:
    folder = pipeline.run(load_recipe(recipe))
    model = load(ModelConfig(path=str(kept_flow("sd3"))), torch.device("cpu"))
    corrector, shape = load_corrector(folder / "6-train" / "corrector")
    for arm in ("base", "tuned"):
        table = read_table((folder / "7-evaluate").glob(f"images-{arm}-*.parquet"))
        rows = table.to_pylist()
        cond = model.encode_prompts([row["prompt"] for row in rows])
        noise = initial_noise([row["seed"] for row in rows], model.latent_shape)
        if arm == "tuned":
            moved = correct(corrector, noise, summary(cond), shape.corrector_steps)
            assert (moved - noise).abs().max() > 1e-3  # it has learnt something
            noise = moved
        drawn = sample(model.denoiser, noise, cond, None, model.grid("euler", 4), sampler="euler")
        wanted = model.decode(drawn).permute(0, 2, 3, 1).clamp(0, 1) * 255
        for row, picture in zip(rows, wanted, strict=True):
            path = folder / "shown.png"
            path.write_bytes(row["image"]["bytes"])
            shown = np.asarray(Image.open(path), dtype=np.float32)
            assert np.abs(shown - picture.numpy()).max() <= 1


@pytest.fixture(scope="module")
def processes() -> Iterator[Forks]:
    with forks() as started:
        yield started


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.settings.source="], "method.settings.source: empty"),
        (["method.settings.source=/nowhere"], "/nowhere: no such file or folder"),
        (["method.settings.patch=0"], "method.settings.patch: "),
        (["method.settings.picture=3"], "unknown setting 'picture'"),
        (["evaluate.rewards=[]"], "evaluate.rewards: empty"),
        (["train.lora.rank=4"], "train.lora.rank: 4, but method 'noise-correction' leaves"),
        (["run.rounds=2"], "run.rounds: 2, but method 'noise-correction' leaves"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    recipe: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        pipeline.check(load_recipe(recipe, changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [f"model.path={kept_checkpoint()}"],
            "generate.sampler: 'dpm++2m' looks back over several steps",
        ),
        (["method.settings.most_iterations=1"], "allow more iterations (generate.num_steps = 4"),
        (["method.settings.patch=3"], "method.settings.patch: patches of 3 do not tile"),
        (["method.settings.source=craftune:shapes/world"], "not a prompt of the shapes world"),
    ],
)
def test_what_only_shows_on_the_way_is_one_line_too(
    recipe: Path, changes: list[str], message: str
) -> None:
    options = [part for change in changes for part in ("--set", change)]
    answer = call(["run", recipe, *options], recipe.parent)
    assert message in answer.complaint


def test_a_picture_without_a_prompt_or_that_cannot_be_read_is_named(recipe: Path) -> None:
    pictures = recipe.parent / "pictures"
    (pictures / "2.png").write_bytes(b"nothing")
    assert "picture 2.png cannot be read" in call(["run", recipe], recipe.parent).complaint
    rows = (pictures / "metadata.jsonl").read_text().splitlines()
    (pictures / "metadata.jsonl").write_text("\n".join(rows[:1]))
    answer = call(["run", recipe, "--redo", "generate"], recipe.parent)
    assert "has no prompt" in answer.complaint
    (pictures / "metadata.jsonl").unlink()
    answer = call(["run", recipe, "--redo", "generate"], recipe.parent)
    assert "no picture has a prompt" in answer.complaint


def test_other_pictures_are_noticed(recipe: Path) -> None:
    assert call(["run", recipe], recipe.parent).status == 0
    pictures = recipe.parent / "pictures"
    (pictures / "0.png").write_bytes((pictures / "1.png").read_bytes())
    assert "3-generate was made" in call(["run", recipe], recipe.parent).complaint


def test_there_is_no_tuned_model_to_export_and_no_budget(recipe: Path) -> None:
    with pytest.raises(UserError, match="whose cost is not estimated"):
        budget(load_recipe(recipe))
    folder = pipeline.run(load_recipe(recipe))
    with pytest.raises(UserError, match=r"leaves the model as it was.*6-train/corrector"):
        export(folder, "diffusers")


def test_a_damaged_corrector_is_refused(recipe: Path) -> None:
    folder = pipeline.run(load_recipe(recipe)) / "6-train" / "corrector"
    with pytest.raises(UserError, match="no corrector here"):
        load_corrector(folder.parent)
    (folder / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match=r"damaged corrector .*--redo train"):
        load_corrector(folder)


def test_killed_and_run_again_it_makes_the_same(tmp_path: Path, processes: Forks) -> None:
    """Killed after the first shard of noises, and in the training."""
    homes = [tmp_path / name for name in ("whole", "killed")]
    for home in homes:
        home.mkdir()
        written(home)
    assert call(["run", homes[0] / "noise.toml"], homes[0]).status == 0
    command, run = ["run", str(homes[1] / "noise.toml")], homes[1] / "noise"
    for stage, change in (("3-generate", 4), ("6-train", 4)):
        ended = processes.run(command, homes[1], kill_at=(str(run / stage), change))
        assert ended.status == -signal.SIGKILL, ended
    assert (run / "3-generate" / "noises-00000.parquet").is_file()
    ended = processes.run(command, homes[1])
    assert ended.status == 0, ended.err
    found = [
        {
            name: digest
            for name, digest in files(home / "noise").items()
            if name.startswith(("3-generate/noises", "6-train/corrector", "7-evaluate/images"))
        }
        for home in homes
    ]
    assert len(found[0]) == 8
    assert found[0] == found[1]


def test_the_world_s_pictures_show_their_prompts() -> None:
    texts = ["two red circles", "a blue square above a green cross"]
    pictures = list(world_pictures(texts, 8, 0))
    again = list(world_pictures(texts, 8, 0))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(pictures, again, strict=True))
    assert len({picture.tobytes() for picture in pictures}) == 8
    right = [
        verify(parse(texts[n % 2]), detect(picture)).correct for n, picture in enumerate(pictures)
    ]
    assert sum(right) >= 6  # blurry and shadowy ones are hard to read
