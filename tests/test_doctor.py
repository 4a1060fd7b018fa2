"""`craftune doctor`: each finding, its mend, and the exit code."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import call

import craftune.doctor as doctor
from craftune.doctor import Finding, examine, gpu, hub, page


@pytest.fixture
def refusing() -> Iterator[str]:
    """A server that answers 404 to everything."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_this_machine_can_run(tmp_path: Path) -> None:
    findings = {finding.what: finding for finding in examine(tmp_path / "runs")}
    assert findings["python"].state == "ok"
    assert findings["diffusers"].state == "ok"
    assert findings["runs"].state in ("ok", "note")
    assert findings["hub"].state == "note"  # the tests run with HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" in findings["hub"].mend
    assert not (tmp_path / "runs").exists()


def test_every_note_says_what_would_mend_it(tmp_path: Path) -> None:
    assert [f for f in examine(tmp_path) if f.state != "ok" and not f.mend] == []


def test_the_page_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = page([*examine(Path("runs")), Finding("wrong", "GPU", "word " * 40, "mend " * 40)])
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[-1].startswith("1 to mend first, ")


def test_the_exit_code_says_whether_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fine = call(["doctor"], tmp_path)
    assert (fine.status, fine.out.splitlines()[-1].split(",")[0]) == (0, "ready")
    monkeypatch.setattr(doctor, "LIBRARIES", ("no-such-library",))
    broken = call(["doctor"], tmp_path)
    assert broken.status == 1
    assert "pip install no-such-library" in broken.out


def test_a_hub_that_answers(refusing: str) -> None:
    assert hub(refusing, 5).state == "ok"


def test_a_hub_that_does_not_answer() -> None:
    found = hub("http://127.0.0.1:9", 5)
    assert found.state == "note"
    assert "HF_ENDPOINT" in found.mend


def test_a_hub_that_keeps_silent() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as silent:
        found = hub(f"http://127.0.0.1:{silent.server_port}", 0.1)
    assert found.state == "note"


@pytest.mark.parametrize(
    ("driver", "cuda", "state", "mend"),
    [
        (False, None, "note", "published models need one"),
        (True, None, "wrong", "install a CUDA build"),
        (True, "13.0", "wrong", "CUDA 13.0"),
    ],
)
def test_no_gpu(driver: bool, cuda: str | None, state: str, mend: str) -> None:
    found = doctor._no_gpu(driver, cuda)
    assert found.state == state
    assert mend in found.mend


def test_gpus() -> None:
    assert gpu(0, "H200", 139, 141, True).state == "ok"
    assert "gradient_checkpointing" in gpu(0, "T4", 12, 16, True).mend
    assert "float16" in gpu(0, "V100", 31, 32, False).mend


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = doctor._disk("runs", tmp_path)
    assert found.state == "wrong"
    assert "Read-only file system" in found.seen
    assert "run.out" in found.mend


def test_a_nearly_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("", (), {"free": 3e9}))
    assert doctor._disk("HF_HOME", tmp_path).state == "note"
