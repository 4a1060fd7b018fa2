"""`craftune score` on images: what it reads, keeps, rejects and says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import settings_of
from PIL import Image
from tiny import Answer, call, tiny

from craftune import rewards
from craftune.images import encode_png
from craftune.records import read_table
from craftune.scoring import batches, scores, sources
from craftune.scoring.tables import SHARD

MODULE = """
import numpy as np
calls = []

def level(images, prompts):
    calls.append(len(images))
    return [float(np.asarray(image)[0, 0, 0]) for image in images]

def words(images, prompts):
    return [float(len(prompt.split())) for prompt in prompts]

def no_seven(images, prompts):
    if any(np.asarray(image)[0, 0, 0] == 7 for image in images):
        raise ArithmeticError("seven")
    return np.array([np.nan if np.asarray(i)[0, 0, 0] == 3 else 1.0 for i in images])

def broken(images, prompts):
    raise ArithmeticError("always")
"""


def picture(level: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (level, 0, 0))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a module of rewards."""
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


def write_images(folder: Path, n: int, prompts: bool = True) -> Path:
    """Image i is of red level i, its prompt has i % 5 + 1 words."""
    folder.mkdir()
    lines = []
    for i in range(n):
        (folder / f"{i:03d}.png").write_bytes(encode_png(picture(i)))
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": "word " * (i % 5 + 1)}))
    if prompts:
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def run(place: Path, *arguments: object) -> Answer:
    return call(["score", *arguments], place)


def found(path: Path, reward: str = "mine:level") -> dict[str, float]:
    rows = read_table(path).to_pylist()
    return {row["image"]: row["value"] for row in rows if row["reward"] == reward}


# --- what is read ------------------------------------------------------------------------------


def test_an_image_folder(place: Path) -> None:
    images = write_images(place / "images", 9)
    answer = run(place, images, "--rewards", "mine:level,mine:words")
    assert answer.status == 0, answer.err
    assert found(place / "scores.parquet") == {f"{i:03d}.png": i for i in range(9)}
    assert found(place / "scores.parquet", "mine:words") == {
        f"{i:03d}.png": i % 5 + 1 for i in range(9)
    }
    (row, *_) = read_table(place / "scores.parquet").to_pylist()
    assert row["prompt"] == "word "
    assert json.loads(row["identity"])["name"] == "mine:level"
    assert sorted(path.name for path in place.iterdir()) == [
        "images",
        "mine.py",
        "scores.parquet",
        "scores.rejected.jsonl",
    ]


def test_prompts_of_subfolders_and_images_of_no_row(place: Path) -> None:
    images = write_images(place / "images", 2, prompts=False)
    write_images(images / "more", 3)
    answer = run(place, images, "--rewards", "mine:words")
    assert answer.status == 1
    assert set(found(place / "scores.parquet", "mine:words")) == {
        f"more/00{i}.png" for i in range(3)
    }
    assert answer.err.count("no prompt, which mine:words need") == 2


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_prompts_from_a_table(place: Path, kind: str) -> None:
    images = write_images(place / "images", 3, prompts=False)
    table = pa.table({"file_name": [f"00{i}.png" for i in range(3)], "caption": ["a", "a b", ""]})
    file = place / f"prompts.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    elif kind == "csv":
        file.write_text("file_name,caption\n000.png,a\n001.png,a b\n002.png,\n")
    else:
        file.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    answer = run(place, images, "--rewards", "mine:words", "--prompts", file)
    assert answer.status == 0, answer.err
    assert list(found(place / "scores.parquet", "mine:words").values()) == [1, 2, 0]
    file.rename(images / file.name)  # also by its name alone, where it lies with the images
    arguments = ("--rewards", "mine:words", "--prompts", file.name, "--out", "other.parquet")
    assert run(place, images, *arguments).status == 0


def test_which_files_are_images(place: Path) -> None:
    """Any case of the ending; no hidden ones; not the scores that lie beside Parquet of images."""
    images = write_images(place / "images", 2, prompts=False)
    (images / "000.png").rename(images / "000.PNG")
    (images / ".hidden.png").write_bytes(encode_png(picture(9)))
    (images / ".cache").mkdir()
    (images / ".cache" / "b.png").write_bytes(encode_png(picture(9)))
    assert run(place, images, "--rewards", "jpeg-compressibility").status == 0
    assert set(found(place / "scores.parquet", "jpeg-compressibility")) == {"000.PNG", "001.png"}

    (place / "set").mkdir()
    table = {"image": [encode_png(picture(i)) for i in (5, 6)], "text": ["own", "own words"]}
    table["id"] = ["a", "b"]  # type: ignore[assignment]
    pq.write_table(pa.table(table), place / "set" / "images.parquet")
    (place / "scores.parquet").rename(place / "set" / "scores.parquet")
    (place / "p.csv").write_text("id,prompt\na,one two three\n")
    answer = run(place, "set", "--rewards", "mine:words", "--prompts", "p.csv")
    assert answer.status == 0, answer.err
    assert found(place / "scores.parquet", "mine:words") == {"a": 3, "b": 2}


@pytest.mark.parametrize("nested", [True, False])
def test_parquet(place: Path, nested: bool) -> None:
    data = [encode_png(picture(i)) for i in range(5)]
    values = [{"bytes": d, "path": None} for d in data] if nested else data
    (place / "loose.png").write_bytes(data[4])
    if nested:
        values[4] = {"bytes": None, "path": "loose.png"}  # type: ignore[assignment]
    table = {"image": values, "text": [f"p {i}" for i in range(5)]}
    pq.write_table(pa.table(table), place / "set.parquet", row_group_size=2)
    assert run(place, "set.parquet", "--rewards", "mine:level,mine:words").status == 0
    assert found(place / "scores.parquet") == {f"set.parquet:{i}": i for i in range(5)}


def test_rows_of_a_large_file_are_numbered_through(place: Path) -> None:
    data = [encode_png(picture(i)) for i in range(SHARD + 3)]
    pq.write_table(pa.table({"image": data}), place / "set.parquet")
    assert run(place, "set.parquet", "--rewards", "jpeg-compressibility").status == 0
    names = list(found(place / "scores.parquet", "jpeg-compressibility"))
    assert names == [f"set.parquet:{i}" for i in range(SHARD + 3)]


def test_a_run_and_one_image(place: Path) -> None:
    job = tiny(place / "job", "rewards_score_command")
    assert call(["generate", job.recipe], job.folder).status == 2  # its prompts come first
    for stage in ("prompts", "refine", "generate"):
        assert call([stage, job.recipe], job.folder).status == 0
    assert run(place, job.run, "--rewards", "mine:words,jpeg-compressibility").status == 0
    pool = read_table(job.stage("generate").glob("*.parquet"), ["id", "prompt"]).to_pylist()
    assert found(place / "scores.parquet", "mine:words") == {
        row["id"]: len(row["prompt"].split()) for row in pool
    }
    (place / "one.png").write_bytes(encode_png(picture(77)))
    (place / "two.png").write_bytes(encode_png(picture(78)))
    run(place, "one.png", "--rewards", "jpeg-compressibility", "--out", "one.parquet")
    assert set(found(place / "one.parquet", "jpeg-compressibility")) == {"one.png"}


def test_a_toml_is_the_stage(place: Path) -> None:
    assert "no such recipe" in run(place, "x.toml").complaint
    assert "--rewards: not with a recipe" in run(place, "x.toml", "--rewards", "a").complaint


def test_rewards_without_prompts(place: Path) -> None:
    images = write_images(place / "images", 3, prompts=False)
    assert run(place, images, "--rewards", "jpeg-compressibility").status == 0
    said = run(place, images, "--rewards", "mine:words,jpeg-compressibility").complaint
    assert "images: has no prompts, but mine:words judge an image by its prompt; give --pr" in said


def test_published_rewards_equal_the_ones_in_memory(place: Path) -> None:
    """Through the command, from files in the published format, as `Reward.score` gives them."""
    names = ("hpsv2.1", "pickscore", "aesthetic")
    rng = np.random.default_rng(0)
    folder = write_images(place / "images", 4)
    for i in range(4):
        noise = Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8))
        noise.resize((100 + i, 80)).save(folder / f"{i:03d}.png")
    given = {name: settings_of(name) for name in names}
    sets = [
        f'--set=reward."{name}".{key}={value}'
        for name in names
        for key, value in given[name].items()
    ]
    answer = run(place, folder, "--rewards", ",".join(names), *sets)
    assert answer.status == 0, answer.err
    pictures: list[Image.Image] = [Image.open(folder / f"{i:03d}.png") for i in range(4)]
    prompts = ["word " * (i + 1) for i in range(4)]
    for name in names:
        values = rewards.load(name, settings=given).score(pictures, prompts).tolist()
        written = found(place / "scores.parquet", name)
        assert list(written.values()) == pytest.approx(values, rel=1e-5, abs=1e-6)
    hps = list(found(place / "scores.parquet", "hpsv2.1").values())
    rows = [line.split() for line in answer.out.splitlines() if line.startswith("hpsv2.1 x100 ")]
    mean, std, low, _, high = map(float, rows[0][3:])
    assert (mean, std) == pytest.approx((100 * np.mean(hps), 100 * np.std(hps)), abs=1e-2)
    assert (low, high) == pytest.approx((100 * min(hps), 100 * max(hps)), abs=1e-2)
    lines = answer.out.splitlines()
    first_bin = lines[lines.index("hpsv2.1 x100") + 1].split()
    assert float(first_bin[0]) == pytest.approx(100 * min(hps), abs=1e-2)
    assert "pickscore x" not in answer.out


# --- what is rejected --------------------------------------------------------------------------


def test_a_damaged_image_is_named_and_the_rest_go_on(place: Path) -> None:
    images = write_images(place / "images", 9)
    whole = (images / "004.png").read_bytes()
    (images / "004.png").write_bytes(whole[: len(whole) // 2])
    (images / "005.png").write_bytes(b"no image")
    (images / "006.png").write_bytes(b"")
    (images / "007.png").unlink()
    answer = run(place, images, "--rewards", "mine:level")
    assert answer.status == 1
    assert set(found(place / "scores.parquet")) == {f"00{i}.png" for i in (0, 1, 2, 3, 8)}
    lines = (place / "scores.rejected.jsonl").read_text().splitlines()
    reasons = {row["image"]: row["reason"] for row in map(json.loads, lines)}
    assert set(reasons) == {"004.png", "005.png", "006.png", "007.png"}
    assert reasons["005.png"] == "no readable image: of no known format, or damaged"
    assert reasons["007.png"] == "no readable image: no such file or directory"
    for name, reason in reasons.items():
        assert f"rejected: {name}: {reason}" in answer.err
    assert "rejected: 4, see scores.rejected.jsonl" in answer.out
    again = run(place, images, "--rewards", "mine:level")
    assert (again.status, again.out) == (1, answer.out)


def test_an_image_that_a_reward_fails_on_is_named(place: Path) -> None:
    answer = run(place, write_images(place / "images", 9), "--rewards", "mine:no_seven,mine:level")
    assert answer.status == 1
    kept = {f"00{i}.png" for i in range(9) if i not in (3, 7)}
    assert set(found(place / "scores.parquet")) == kept
    assert set(found(place / "scores.parquet", "mine:no_seven")) == kept
    assert re.search(r"rejected: 003.png: reward 'mine:no_seven' returned nan", answer.err)
    assert re.search(r"rejected: 007.png: .*ArithmeticError: seven", answer.err)


def test_a_reward_that_fails_on_all_is_an_error(place: Path) -> None:
    answer = run(place, write_images(place / "images", 3), "--rewards", "mine:broken")
    assert "'mine:broken' failed on 3 images: ArithmeticError: always" in answer.complaint
    assert not (place / "scores.parquet").exists()
    assert not (place / "scores.parquet.parts").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none", "--rewards", "mine:level"], "none: no such file or folder"),
        (["empty", "--rewards", "mine:level"], "empty: no images (.png, "),
        (["images"], "--rewards: name at least one"),
        (["images", "--rewards", "hpsv2.2"], "unknown reward 'hpsv2.2'; did you mean 'hpsv2.1'"),
        (["images", "--rewards", "mine:level,mine:level"], "'mine:level' is listed twice"),
        (["images", "--rewards", "mine:level", "--prompts", "a.txt"], "a.txt: prompts need the im"),
        (["images", "--rewards", "mine:level", "--prompts", "b.csv"], "b.csv: no such file here"),
        (["images", "--rewards", "mine:level", "--prompts", "c.csv"], "no column prompt, text or"),
        (["images", "--rewards", "mine:level", "--prompts", "d.csv"], "holds none of the 1 images"),
        (["a.parquet", "--rewards", "mine:level"], "a.parquet: not a readable Parquet file"),
        (["b.parquet", "--rewards", "mine:level"], "b.parquet: no column 'image', of bytes"),
        (["c.parquet", "--rewards", "mine:level"], "several columns of images (x, y); call one"),
        (["images", "--rewards", "mine:level", "--set", "train.steps=3"], "--set train.steps=3: w"),
        (["images", "--rewards", "mine:level", "--set", "score.batch_size=0"], "at least 1, got 0"),
        (["images", "--rewards", "mine:level", "--set", "run.device=tpu9"], "run.device 'tpu9': "),
        (["images", "--rewards", "hpsv2.1", "--set", "reward.hpsv3.path=x"], "reward.hpsv3: unkno"),
    ],
)
def test_what_cannot_work_is_one_line(place: Path, arguments: list[str], said: str) -> None:
    write_images(place / "images", 2)
    (place / "empty").mkdir()
    (place / "a.txt").write_text("a prompt")
    (place / "c.csv").write_text("file_name,words\n000.png,a\n")
    (place / "d.csv").write_text("file_name,text\nother.png,a\n")
    (place / "a.parquet").write_text("no")
    pq.write_table(pa.table({"x": [1]}), place / "b.parquet")
    pq.write_table(pa.table({"x": [b""], "y": [b""]}), place / "c.parquet")
    assert said in run(place, *arguments).complaint
    assert not list(place.glob("scores*"))


# --- what is kept ------------------------------------------------------------------------------


def test_finished_shards_of_other_images_or_rewards_are_made_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(place / "images", 2 * SHARD)
    join, stop = scores._join, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(scores, "_join", stop)
    assert run(place, images, "--rewards", "mine:level").status == 130
    parts = sorted((place / "scores.parquet.parts").glob("part-*.parquet"))
    before = [part.stat().st_mtime_ns for part in parts]
    assert len(parts) == 2
    (images / "003.png").write_bytes(encode_png(picture(250)))
    assert run(place, images, "--rewards", "mine:level").status == 130
    after = [part.stat().st_mtime_ns for part in parts]
    assert (after[0] > before[0], after[1] > before[1]) == (True, False)
    monkeypatch.setattr(scores, "_join", join)
    (place / "mine.py").write_text(MODULE.replace("[0, 0, 0])", "[0, 0, 0]) + 1000"))
    assert run(place, images, "--rewards", "mine:level").status == 0
    assert min(found(place / "scores.parquet").values()) >= 1000
    assert found(place / "scores.parquet")["003.png"] == 1250


def test_what_is_there_is_not_overwritten_but_by_redo(place: Path) -> None:
    images = write_images(place / "images", 3)
    first = run(place, images, "--rewards", "mine:level")
    written = (place / "scores.parquet").stat().st_mtime_ns
    assert run(place, images, "--rewards", "mine:level").out == first.out
    assert (place / "scores.parquet").stat().st_mtime_ns == written
    said = run(place, images, "--rewards", "mine:words").complaint
    assert "scores.parquet: is there already, and was not made from these" in said
    (images / "001.png").write_bytes(encode_png(picture(99)))
    assert "is there already" in run(place, images, "--rewards", "mine:level").complaint
    assert run(place, images, "--rewards", "mine:level", "--redo").status == 0
    assert found(place / "scores.parquet")["001.png"] == 99
    (place / "notes.parquet").write_text("mine")
    answer = run(place, images, "--rewards", "mine:level", "--out", "notes.parquet")
    assert "notes.parquet: is there already" in answer.complaint
    assert (place / "notes.parquet").read_text() == "mine"


def test_two_processes_do_not_write_one_file(place: Path) -> None:
    images = write_images(place / "images", 3)
    with scores._parts(place / "scores.parquet"):
        said = run(place, images, "--rewards", "mine:level").complaint
    assert "another process is writing it" in said


def test_shards_are_put_together_in_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores as the images come, rejections and cut prompts of all shards; after a stop, too."""
    monkeypatch.setattr(sources, "SHARD", 2)
    images = write_images(place / "images", 7)
    lines = [{"file_name": f"00{i}.png", "text": "word " * 20 * (i % 3)} for i in range(7)]
    (images / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for name in ("001.png", "006.png"):
        (images / name).write_bytes(b"no image")
    given = [f"--set=reward.pickscore.{k}={v}" for k, v in settings_of("pickscore").items()]
    join = scores._join
    monkeypatch.setattr(scores, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(place, images, "--rewards", "pickscore", *given).status == 130
    monkeypatch.setattr(scores, "_join", join)
    (place / "scores.parquet.parts" / "part-000001.parquet").unlink()  # made last, now
    answer = run(place, images, "--rewards", "pickscore", *given)
    assert answer.status == 1
    written = list(found(place / "scores.parquet", "pickscore"))
    assert written == [f"00{i}.png" for i in (0, 2, 3, 4, 5)]
    lines = (place / "scores.rejected.jsonl").read_text().splitlines()
    assert [row["image"] for row in map(json.loads, lines)] == ["001.png", "006.png"]
    assert "prompts cut by pickscore at 77 tokens: 3 of 5 images" in answer.out


# --- how ---------------------------------------------------------------------------------------


def test_an_image_is_opened_once_for_all_rewards(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    decode = batches.decode
    monkeypatch.setattr(batches, "decode", lambda data: (opened.append(len(data)), decode(data))[1])
    images = write_images(place / "images", 9)
    run(place, images, "--rewards", "mine:level,mine:words,jpeg-compressibility")
    assert len(opened) == 9


def test_no_more_than_two_batches_are_open(place: Path) -> None:
    """However many images there are: what is ahead of the networks is bounded."""
    asked = 0

    def endless() -> Iterator[batches.Batch[int]]:
        nonlocal asked
        while True:
            asked += 1
            yield batches.Batch(asked, [batches.Item("x", "", picture(1))] * 4)

    loaded = [rewards.load("jpeg-compressibility")]
    stream = batches.score_batches(loaded, endless(), reject=True)
    for number in range(1, 6):
        tag, _ = next(stream)
        assert tag == number
        assert asked == number + 1


def test_the_terminal_is_80_columns_of_plain_text(place: Path) -> None:
    images = write_images(place / "images", 200)
    long = "a_module_of_a_very_long_name_indeed_that_no_table_holds"
    (place / f"{long}.py").write_text(MODULE)
    answer = run(place, images, "--rewards", f"mine:level,mine:words,{long}:level")
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert answer.out.isascii()
    row = next(line for line in lines if line.startswith("mine:level"))
    numbers = [float(number) for number in row.split()[1:]]
    assert numbers == pytest.approx([200, 99.5, np.std(np.arange(200)), 0, 99.5, 199], rel=1e-2)
    start = lines.index("mine:level")
    bins = [line.split() for line in lines[start + 1 : start + 13]]
    assert sum(int(one[-1]) for one in bins) == 200
    assert float(bins[0][0]) == 0


def test_a_constant_reward_says_so(place: Path) -> None:
    images = write_images(place / "images", 2)
    (place / "one.py").write_text("def f(images, prompts):\n    return [1] * len(images)\n")
    assert "2 (all equal)" in run(place, images, "--rewards", "one:f").out
