"""Bad input: one line that names file, key and mend; nothing lost; mended, the run goes on."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny import Tiny, call, files, results, tiny
from toy import random_checkpoint

from craftune.records import read_table, write_json
from craftune.runs import STAGES, locked, stage_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run that is done; tests work on copies of it."""
    job = tiny(tmp_path_factory.mktemp("finished"), "rewards_bad_input")
    answer = call(["run", job.recipe], job.folder)
    assert answer.status == 0, answer.err
    return job


@pytest.fixture
def fresh(tmp_path: Path) -> Tiny:
    return tiny(tmp_path / "job", "rewards_bad_input")


@pytest.fixture
def done(fresh: Tiny, finished: Tiny) -> Tiny:
    """A copy of the finished run, in a folder of its own; its prompt file stays where it was."""
    fresh.recipe.write_text(
        finished.recipe.read_text().replace(str(finished.folder / "runs"), str(fresh.run.parent))
    )
    shutil.copytree(finished.run, fresh.run)
    return fresh


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new, 1))


def forget(job: Tiny, first: str) -> None:
    """As if the run had not come to this stage yet."""
    for name in STAGES[STAGES.index(first) :]:
        shutil.rmtree(job.stage(name), ignore_errors=True)


def refused(job: Tiny, *arguments: object) -> str:
    """The complaint of a command that must change no file of a finished stage."""
    kept = (".parquet", ".jsonl", ".safetensors", "done.json", ".toml", ".txt", ".html")
    before = {name: digest for name, digest in files(job.folder).items() if name.endswith(kept)}
    complaint = call(arguments or ["run", job.recipe], job.folder).complaint
    after = files(job.folder)
    assert {k: after.get(k) for k in before} == before
    return complaint


def goes_on(job: Tiny, finished: Tiny) -> None:
    """The same command now ends as the run that nothing disturbed."""
    answer = call(["run", job.recipe], job.folder)
    assert answer.status == 0, answer.err
    assert results(job.run) == results(finished.run)


# --- the recipe ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[train]", "[trian]", ["trian", "did you mean 'train'"]),
        ("save_every = 1", "save_evry = 1", ["train.save_evry", "did you mean 'save_every'"]),
        ("k = 6", "kk = 6", ["select.kk", "unknown key"]),
        ("steps = 3", 'steps = "3"', ["train.steps", "whole number without quotes", "'3'"]),
        ("steps = 3", "steps = 2.5", ["train.steps", "2.5"]),
        ("steps = 3", "steps = 0", ["train.steps", "greater than or equal to 1", "got 0"]),
        ("steps = 3", "steps = 3\nlearning_rate = nan", ["train.learning_rate", "finite"]),
        ("steps = 3", "steps = 3\nlora = 4", ["train.lora", "section", "got 4"]),
        ('filter = "I_h"', "filter = 3", ["select.filter", "got 3"]),
        ('filter = "I_h"', 'filter = "I_q"', ["select.filter", "no reward 'q'"]),
        ('filter = "I_h"', 'filter = "hpa"', ["select.filter", "'hpa'"]),
        ("h = 0.5", "z = 0.5", ["select.weights", "'z'"]),
        ("k = 6", "k = 0", ["select.k", "got 0"]),
        ('name = "tiny"', 'name = "../tiny"', ["run.name", "one folder"]),
        ('name = "tiny"', 'name = "tiny"\ndevice = "tpu9"', ["run.device", "tpu9"]),
        ("variants = 2", 'variants = 2\nby = "templat"', ["refine.by", "'template'"]),
        ("variants = 2", 'variants = 2\nby = "file"', ["refine.source", "missing"]),
        ("variants = 2", 'variants = 2\nby = "nowhere:f"', ["refine.by", "nowhere"]),
        ("k = 6", 'k = 6\n[method]\nname = "crft"', ["method.name", "'craft'"]),
        ("k = 6", "k = 6\n[method.settings]\nbta = 1", ["method.settings.bta", "'beta'"]),
        ("num_prompts = 4", "num_prompts = 0", ["evaluate.num_prompts", "evaluate.source"]),
        ("prompts.txt", "promts.txt", ["prompts.source", "promts.txt", "no such file"]),
        ("[model]", '[model]\nfamily = "sdd"', ["model.family", "'sd'"]),
        ("num_steps = 2", 'num_steps = 2\nsampler = "euler"', ["generate.sampler", "or 'dpm++2m'"]),
        (":rough", ":ruogh", ["score.rewards", "'ruogh'", "did you mean 'rough'"]),
        (
            '[score]\nrewards = ["',
            '[score]\nrewards = ["shapes-j", "',
            ["score.rewards", "shapes-"],
        ),
        ('[score]\nrewards = ["', '[score]\nrewards = ["no.where:f", "', ["no.where:f", "import"]),
        ('[score]\nrewards = ["', '[score]\nrewards = [7, "', ["score.rewards.0", "got 7"]),
        ("[run]", "[run", ["not valid TOML", "line 2"]),
        ("[select]", "[select]\nk = 3", ["not valid TOML"]),
        ("[score]", "[scores]", ["scores", "did you mean 'score'"]),
    ],
)
def test_a_wrong_recipe(fresh: Tiny, old: str, new: str, words: list[str]) -> None:
    text = fresh.recipe.read_text()
    edit(fresh.recipe, old, new)
    complaint = refused(fresh)
    assert not fresh.run.exists()
    for word in [str(fresh.recipe), *words]:
        assert word in complaint
    assert call(["check", fresh.recipe], fresh.folder).complaint == complaint
    fresh.recipe.write_text(text)
    assert call(["check", fresh.recipe], fresh.folder).status == 0


def test_a_recipe_that_is_not_there_or_not_text(fresh: Tiny) -> None:
    assert "no such recipe" in refused(fresh, "run", fresh.folder / "none.toml")
    assert "no such recipe" in refused(fresh, "run", fresh.folder)
    fresh.recipe.write_bytes(b"[run]\nname = '\xff'\n")
    assert "not UTF-8" in refused(fresh)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", ["--set 'train.steps'", "section.key=value"]),
        ("steps=3", ["section.key=value"]),
        (".=3", ["section.key=value"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("train.steps.more=1", ["'steps' is a value"]),
        ("trane.steps=1", ["did you mean 'train'"]),
        ("train.lora.rnk=1", ["train.lora.rnk", "did you mean 'rank'"]),
        ("score.rewards=shapes-h", ["score.rewards", '["...", ...]']),
    ],
)
def test_a_wrong_override(fresh: Tiny, override: str, words: list[str]) -> None:
    complaint = refused(fresh, "run", fresh.recipe, "--set", override)
    assert [word for word in words if word not in complaint] == []


# --- the prompts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["prompts.txt", "no prompt in it (0 rows)"]),
        (b"\n \n\t\n", ["prompts.txt", "no prompt in it (3 rows)"]),
        (b"a red d\xffg\n", ["prompts.txt", "not UTF-8", "byte 7"]),
        (b"one prompt\n", ["prompts.txt", "evaluate.source"]),
    ],
)
def test_prompts_that_cannot_be_used(
    fresh: Tiny, finished: Tiny, content: bytes, words: list[str]
) -> None:
    right = fresh.prompts.read_bytes()
    fresh.prompts.write_bytes(content)
    complaint = refused(fresh)
    assert [word for word in words if word not in complaint] == []
    fresh.prompts.write_bytes(right)
    goes_on(fresh, finished)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', ["p.jsonl, line 2", "not valid JSON"]),
        ("p.jsonl", '["a"]\n', ["p.jsonl, line 1", "object"]),
        ("p.csv", "text,category\na,b\n", ["p.csv, prompts.column", "'prompt'", "text"]),
        ("p.parquet", "PAR1", ["p.parquet", "not a readable Parquet file"]),
        ("p.docx", "a", ["p.docx", ".jsonl"]),
    ],
)
def test_prompt_files_of_every_kind(fresh: Tiny, name: str, content: str, words: list[str]) -> None:
    (fresh.folder / name).write_text(content)
    complaint = refused(fresh, "prompts", fresh.recipe, "--set", f"prompts.source={name}")
    assert [word for word in words if word not in complaint] == []


def test_duplicate_prompts_are_named_rejections(fresh: Tiny, finished: Tiny) -> None:
    with fresh.prompts.open("a") as file:
        file.write("a red dog\n\n  a  red   dog \n")
    answer = call(["run", fresh.recipe], fresh.folder)
    assert answer.status == 0
    assert "(rejected: 2 duplicate, 1 empty)" in answer.err
    lines = (fresh.stage("prompts") / "rejections.jsonl").read_text().splitlines()
    assert [(row["row"], row["reason"]) for row in map(json.loads, lines)] == [
        (13, "duplicate"),
        (14, "empty"),
        (15, "duplicate"),
    ]
    prompts = (finished.stage("prompts") / "prompts.jsonl").read_text()
    assert (fresh.stage("prompts") / "prompts.jsonl").read_text() == prompts


# --- the model -------------------------------------------------------------------------------


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong_family(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"_class_name": "KandinskyPipeline"})


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["model.path", "no such folder"]),
        (lambda m: (m / "model_index.json").unlink(), ["model_index.json", "missing"]),
        (lambda m: (m / "model_index.json").write_text("{"), ["model_index.json", "JSON"]),
        (lambda m: (m / "model_index.json").write_text("[]"), ["model_index.json"]),
        (wrong_family, ["model_index.json", "KandinskyPipeline", "StableDiffusionPipeline"]),
        (lambda m: shutil.rmtree(m / "unet"), ["/model", "unet"]),
        (lambda m: shutil.rmtree(m / "tokenizer"), ["/model"]),
        (
            lambda m: cut_in_half(m / "unet" / "diffusion_pytorch_model.safetensors"),
            ["/model/unet/diffusion_pytorch_model.safetensors: not a whole file", "copy it again"],
        ),
        (
            lambda m: cut_in_half(m / "text_encoder" / "model.safetensors"),
            ["/model/text_encoder/model.safetensors: not a whole file", "copy it again"],
        ),
        (
            lambda m: (m / "vae" / "diffusion_pytorch_model.safetensors").write_text(POINTER),
            ["/model/vae/diffusion_pytorch_model.safetensors: not a whole file", "copy it again"],
        ),
        (lambda m: (m / "unet" / "config.json").write_text("{"), ["/model"]),
    ],
)
def test_a_damaged_model(fresh: Tiny, damage: Callable[[Path], object], words: list[str]) -> None:
    model = random_checkpoint(fresh.folder / "model")
    damage(model)
    override = ["--set", f"model.path={model}"]
    complaint = call(["run", fresh.recipe, *override], fresh.folder).complaint
    assert [word for word in words if word not in complaint] == []
    if "not a whole file" in complaint:  # before rewrites are paid for
        assert call(["check", fresh.recipe, *override], fresh.folder).complaint == complaint
    random_checkpoint(model)
    for stage in STAGES[:3]:
        answer = call([stage, fresh.recipe, *override], fresh.folder)
        assert answer.status == 0, answer.err


# --- the run folder --------------------------------------------------------------------------


def rewrite(path: Path) -> None:
    """An edit by hand that leaves a sound file."""
    table = pq.read_table(path)
    last = table.column_names[-1]
    table = table.set_column(
        len(table.column_names) - 1, last, table[last].take([1, 0, *range(2, len(table))])
    )
    pq.write_table(table, path)


@pytest.mark.parametrize("damage", [cut_in_half, rewrite, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("stage", ["generate", "score"])
def test_a_shard_that_was_damaged_or_edited(
    done: Tiny, finished: Tiny, stage: str, damage: Callable[[Path], object]
) -> None:
    forget(done, "select")
    shard = done.stage(stage) / "part-00001.parquet"
    damage(shard)
    complaint = refused(done)
    assert str(shard) in complaint
    assert (
        f"delete the file and run again (only it is made anew), or run with --redo {stage}"
        in complaint
    )
    shard.unlink()
    untouched = (done.stage(stage) / "part-00000.parquet").stat().st_mtime_ns
    goes_on(done, finished)
    assert (done.stage(stage) / "part-00000.parquet").stat().st_mtime_ns == untouched


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("prompts", "prompts.jsonl"),
        ("generate", "part-00002.parquet"),
        ("score", "part-00000.parquet"),
        ("select", "selection.parquet"),
        ("train", "model/unet/diffusion_pytorch_model.safetensors"),
        ("evaluate", "images-tuned-00000.parquet"),
        ("report", "report.json"),
    ],
)
def test_a_deleted_file_is_made_anew_and_what_follows_stays(
    done: Tiny, finished: Tiny, stage: str, file: str
) -> None:
    (done.stage(stage) / file).unlink()
    answer = call(["run", done.recipe], done.folder)
    assert answer.status == 0, answer.err
    lines = [line.split()[:3] for line in answer.err.splitlines() if line[0].isdigit()]
    worked = [name for _, name, state in lines if state != "already"]
    assert worked == [stage]
    assert results(done.run) == results(finished.run)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {}}', ""])
def test_a_damaged_record(done: Tiny, text: str) -> None:
    record = done.stage("select") / "done.json"
    record.write_text(text)
    complaint = refused(done)
    assert str(record) in complaint
    assert "--redo select" in complaint
    assert call(["run", done.recipe, "--redo", "select"], done.folder).status == 0


def test_an_edited_record_does_not_fit_its_files(done: Tiny) -> None:
    path = done.stage("score") / "done.json"
    record = json.loads(path.read_text())
    record["outputs"]["part-00000.parquet"] = "0"
    path.write_text(json.dumps(record))
    assert "5-select was made from another part-00000.parquet of stage 'score'" in refused(done)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=1", ["1-prompts was made with run.seed = 0, now it is 1", "--redo prompts"]),
        ("refine.variants=3", ["2-refine", "refine.variants = 2, now it is 3", "--redo refine"]),
        ("generate.num_steps=3", ["3-generate", "generate.num_steps = 2", "--redo generate"]),
        ("select.k=5", ["5-select", "select.k = 6, now it is 5", "--redo select"]),
        ("train.steps=4", ["6-train", "train.steps = 3, now it is 4", "--redo train"]),
        ("method.name=sft", ["6-train", "method.name = 'craft', now it is 'sft'"]),
        ("evaluate.images_per_prompt=3", ["7-evaluate", "images_per_prompt = 2", "evaluate"]),
        ("report.grid=3", ["8-report", "report.grid = 24, now it is 3", "--redo report"]),
    ],
)
def test_a_run_folder_of_another_recipe(done: Tiny, override: str, words: list[str]) -> None:
    everything = files(done.run)
    complaint = refused(done, "run", done.recipe, "--set", override)
    assert [word for word in words if word not in complaint] == []
    assert files(done.run) == everything  # run.json, too
    last = ["run", done.recipe, "--set", override, "--redo", "report"]
    if "report" not in override:
        assert call(last, done.folder).complaint == complaint
        assert files(done.run) == everything


def test_what_changes_no_result_may_change(done: Tiny) -> None:
    """Batch sizes and the like: what one lowers when the memory is not enough."""
    words = [
        "generate.batch_size=3",
        "score.batch_size=2",
        "train.micro_batch=1",
        "train.save_every=9",
    ]
    overrides = [part for word in words for part in ("--set", word)]
    answer = call(["run", done.recipe, *overrides], done.folder)
    assert answer.status == 0, answer.err
    assert answer.err.count("already") == len(STAGES)


def test_other_prompts_in_the_same_file(done: Tiny, finished: Tiny) -> None:
    copy = done.folder / "prompts.txt"
    edit(done.recipe, str(finished.prompts), str(copy))
    for stage in STAGES:
        record = done.stage(stage) / "done.json"
        if str(finished.prompts) in record.read_text():
            edit(record, str(finished.prompts), str(copy))
    assert call(["run", done.recipe], done.folder).err.count("already") == len(STAGES)
    with copy.open("a") as file:
        file.write("a new one\n")
    assert "1-prompts was made before the content of prompts.source changed" in refused(done)


def test_two_processes_on_one_run(done: Tiny) -> None:
    with locked(done.run):
        complaint = refused(done)
    assert str(done.run) in complaint
    assert "another craftune process" in complaint
    assert call(["run", done.recipe], done.folder).status == 0


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_before_its_inputs(fresh: Tiny, stage: str) -> None:
    complaint = refused(fresh, stage, fresh.recipe)
    assert "has not run" in complaint
    assert f"but {stage!r} reads it" in complaint
    assert "craftune run" in complaint


def test_a_file_where_the_run_folder_should_be(fresh: Tiny) -> None:
    fresh.run.parent.mkdir()
    fresh.run.write_text("mine")
    assert str(fresh.run) in refused(fresh)
    assert fresh.run.read_text() == "mine"


# --- the rewards -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [float('nan')] * len(images)", ["returned nan for image", "(prompt 'a"]),
        ("return [1e39] * len(images)", ["returned inf for image"]),
        ("return [1.0]", ["returned shape (1,) for 8 images", "one number per image"]),
        ("return np.zeros((len(images), 1))", ["returned shape (8, 1) for 8 images"]),
        ("return 1.0", ["returned shape () for 8 images"]),
        ("return None", ["returned NoneType", "one number per image"]),
        ("return ['good'] * len(images)", ["returned list", "one number per image"]),
        ("return 1 / 0", ["ZeroDivisionError: division by zero", "in red, ", ", line 5)"]),
        ("raise ValueError('two\\nlines')", ["ValueError: two (in red"]),
    ],
)
def test_a_reward_that_fails(fresh: Tiny, finished: Tiny, body: str, words: list[str]) -> None:
    right = fresh.rewards.read_text()
    lines = right.splitlines()
    lines[4] = f"    {body}"
    fresh.rewards.write_text("\n".join(lines))
    complaint = call(["run", fresh.recipe], fresh.folder).complaint
    for word in [f"{fresh.module}:red", *words]:
        assert word in complaint
    pool = files(fresh.stage("generate"))
    fresh.rewards.write_text(right)
    answer = call(["score", fresh.recipe], fresh.folder)
    assert answer.status == 0, answer.err
    assert files(fresh.stage("generate")) == pool
    scores = [read_table(sorted(job.stage("score").glob("*.parquet"))) for job in (fresh, finished)]
    assert scores[0].equals(scores[1])


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("def red(images, prompts:\n", ["SyntaxError"]),
        ("import nothing_of_that_name\n", ["ModuleNotFoundError", "nothing_of_that_name"]),
        ("raise RuntimeError('no GPU')\n", ["RuntimeError: no GPU"]),
        ("red = rough = 3\n", ["unknown function 'red'"]),
    ],
)
def test_a_reward_that_cannot_be_imported(fresh: Tiny, module: str, words: list[str]) -> None:
    fresh.rewards.write_text(module)
    complaint = refused(fresh)
    for word in [str(fresh.recipe), "score.rewards", fresh.module, *words]:
        assert word in complaint
    assert not fresh.run.exists()


def test_scores_of_a_mended_reward_never_mix(fresh: Tiny) -> None:
    """Shards that the former version scored are scored again."""
    edit(fresh.rewards, "def red", "calls = []\n\ndef red")
    edit(
        fresh.rewards,
        "    return [float(np.asarray(image)[..., 0].mean()",
        "    calls.append(1)\n    if len(calls) > 2:\n        raise OSError('gone')\n"
        "    return [float(np.asarray(image)[..., 0].mean()",
    )
    assert "OSError: gone" in call(["run", fresh.recipe], fresh.folder).complaint
    assert (fresh.stage("score") / "part-00001.parquet").exists()
    edit(fresh.rewards, "len(calls) > 2", "len(calls) > 20")
    assert call(["score", fresh.recipe], fresh.folder).status == 0
    shards = sorted(fresh.stage("score").glob("part-*.parquet"))
    assert len(shards) == 3
    assert len(set(read_table(shards, ["identity"])["identity"].to_pylist())) == 2  # two rewards


def test_a_reward_that_changed_after_it_scored(done: Tiny) -> None:
    edit(done.rewards, "mean()", "max()")
    complaint = refused(done)
    assert f"4-score was made before the source of '{done.module}:red' changed" in complaint
    assert "--redo score" in complaint


def test_a_filter_that_nothing_passes(done: Tiny, finished: Tiny) -> None:
    done.rewards.write_text(
        done.rewards.read_text()
        + "\ndef blue(images, prompts):\n    return [-x for x in red(images, prompts)]\n"
    )
    forget(done, "score")
    overrides = [
        f'score.rewards=["{done.module}:red", "{done.module}:blue"]',
        f'select.filter=["{done.module}:red", "{done.module}:blue"]',
        f'select.weights={{"{done.module}:red" = 1.0}}',
    ]
    arguments = [part for word in overrides for part in ("--set", word)]
    complaint = call(["run", done.recipe, *arguments], done.folder).complaint
    assert "select.filter" in complaint
    assert "keeps none of 8 groups" in complaint
    assert f"{done.module}:red 5" in complaint or f"{done.module}:red " in complaint
    assert "relax it to" in complaint
    assert files(done.stage("generate")) == files(finished.stage("generate"))
    arguments[3] = f'select.filter=["{done.module}:red"]'
    assert call(["run", done.recipe, *arguments], done.folder).status == 0


# --- the disk --------------------------------------------------------------------------------


@dataclass
class Disk:
    """A small disk of its own."""

    folder: Path

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"mounting a small disk needs root: {made.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = Disk(folder)
    made.mount("size=20k")
    yield made
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.timeout(400)
def test_a_full_disk(fresh: Tiny, finished: Tiny, disk: Disk) -> None:
    """Room grows step by step, so that writes of every size fail; then the run ends as any."""
    edit(fresh.recipe, str(fresh.run.parent), str(disk.folder))
    disk.mount("remount,size=8m")
    run, ballast, stopped = disk.folder / "tiny", disk.folder / "ballast", []
    # Once with checkpoints, which torch writes, and once without: then safetensors fails first.
    command: list[Any] = ["run", fresh.recipe]
    for first, save_every in (("prompts", 1), ("train", 9)):
        for name in STAGES[STAGES.index(first) :]:
            shutil.rmtree(stage_folder(run, name), ignore_errors=True)
        for step in range(40):
            ballast.unlink(missing_ok=True)
            room = int(12_000 * 1.4**step)
            ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk.folder).free - room)))
            command = ["run", fresh.recipe, "--set", f"train.save_every={save_every}"]
            answer = call(command, fresh.folder)
            if answer.status == 0:
                break
            assert re.search("No space left on device|GB are free", answer.complaint)
            assert re.search("run (the same command )?again", answer.complaint)
            assert str(run) in answer.complaint
            assert not list(run.rglob("*.parquet.partial"))
            stopped += [n for n in STAGES if not (stage_folder(run, n) / "done.json").exists()][:1]
        assert call(command, fresh.folder).status == 0
    assert len(set(stopped)) >= 5, stopped
    shutil.rmtree(stage_folder(run, "report"))
    assert call(["run", fresh.recipe], fresh.folder).status == 0
    assert results(run) == results(finished.run)


def test_a_read_only_disk(fresh: Tiny, finished: Tiny, disk: Disk) -> None:
    edit(fresh.recipe, str(fresh.run.parent), str(disk.folder))
    disk.mount("remount,size=20m,ro")
    complaint = refused(fresh)
    assert f"{disk.folder}/tiny: Read-only file system" in complaint
    disk.mount("remount,rw")
    shutil.copytree(finished.run, disk.folder / "tiny")
    for name in STAGES[4:]:
        shutil.rmtree(stage_folder(disk.folder / "tiny", name))
    edit(fresh.recipe, str(fresh.prompts), str(finished.prompts))
    disk.mount("remount,ro")
    assert "Read-only file system" in refused(fresh)
    disk.mount("remount,rw")
    assert call(["run", fresh.recipe], fresh.folder).status == 0
    assert results(disk.folder / "tiny") == results(finished.run)
