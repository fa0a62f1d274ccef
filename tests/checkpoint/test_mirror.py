"""A run directory in a bucket: whatever ends an upload, what looks complete there is; the newest good comes back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import fsspec
import pytest

from itune.checkpoint import mirror as mirrors
from itune.checkpoint.manifest import find_damage, write_manifest
from itune.checkpoint.mirror import Mirror
from itune.checkpoint.retention import steps_to_delete
from itune.checkpoint.store import Store
from itune.checkpoint.view import open_view, uploaded, view
from itune.cli import main
from itune.types import InputError, RunError

URL = "memory://b/runs/x"
NAMES = ("arrays/a", "arrays/d/b", "arrays/d/c", "run.json")


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def save(mirror, step, fill="x"):
    """A committed checkpoint in staging, and metrics up to it."""
    folder = mirror.folder / "checkpoints" / str(step)
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(fill * (100 + step))
    write_manifest(folder, step=step)
    (mirror.folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, step + 1)))


def begin(folder):
    folder.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(URL, folder)
    mirror.take(lambda line: None)
    return mirror, Store(folder / "checkpoints", mirror=mirror, log=lambda line: None)


def empty(memory):
    for name in list(memory.store):
        memory.rm_file(name)


def begin_and_empty(memory, folder):
    """A run whose checkpoint of step 4 was uploaded, before all of the bucket was removed."""
    mirror, _ = begin(folder)
    save(mirror, 4)
    mirror.push(4)
    empty(memory)
    return mirror


def objects(memory, below=""):
    root = "/b/runs/x/" + below
    return sorted(name.removeprefix(root) for name in memory.store if name.startswith(root))


def test_a_new_machine_goes_on_from_the_bucket(memory, tmp_path):
    mirror, _ = begin(tmp_path / "one")
    (tmp_path / "one" / "eval" / "4").mkdir(parents=True)
    (tmp_path / "one" / "eval" / "4" / "summary.json").write_text("{}")
    (tmp_path / "one" / "run.lock").touch()
    (tmp_path / "one" / ".config.json.tmp").touch()
    for step in (4, 8):
        save(mirror, step)
        mirror.push(step)
    assert objects(memory, "checkpoints/8/") == ["arrays/a", "arrays/d/b", "arrays/d/c", "manifest.json", "run.json"]
    assert [n for n in objects(memory) if "checkpoints" not in n] == [
        "bucket.json", "eval/4/summary.json", "metrics.jsonl"]
    _, store = begin(tmp_path / "two")
    assert store.newest_good() == 8 and store.steps() == [8] and store.verify(8) == []
    for name in ("metrics.jsonl", "eval/4/summary.json", "checkpoints/8/arrays/d/c", "checkpoints/8/manifest.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    # an older staging: the same
    mirror, _ = begin(tmp_path / "two")
    save(mirror, 12)
    mirror.push(12)
    _, store = begin(tmp_path / "one")
    assert store.newest_good() == 12
    assert len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("after", range(8))
def test_a_failure_after_any_number_of_objects_leaves_no_checkpoint_that_looks_complete(
        memory, tmp_path, monkeypatch, after):
    mirror, store = begin(tmp_path / "one")
    save(mirror, 4)
    mirror.push(4)
    save(mirror, 8, "y")
    pipe, sent = type(memory).pipe_file, []

    def failing(self, path, value, *more, **kwargs):
        if len(sent) >= after:
            raise ConnectionError("the network is gone")
        sent.append(path)
        pipe(self, path, value, *more, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "pipe_file", failing)
        patch.setattr("itune.storage.bucket._AT_ONCE", 1)
        if after < 6:  # metrics, four files, the manifest
            with pytest.raises(RunError, match=r"checkpoint of step 8 is whole in .*one/checkpoints/8 but not in the "
                                               r"bucket; .*: memory://b/runs/x cannot be reached: ConnectionError"):
                mirror.push(8)
        else:
            mirror.push(8)
    looks_complete = [step for step in (4, 8) if f"{step}/manifest.json" in objects(memory, "checkpoints/")]
    assert looks_complete == ([4] if after < 6 else [4, 8]) == mirror.steps()
    _, elsewhere = begin(tmp_path / "two")
    assert elsewhere.newest_good() == looks_complete[-1]
    # on the machine that was cut off nothing is lost: what had not reached the bucket is uploaded
    again, store = begin(tmp_path / "one")
    assert store.newest_good() == 8 and again.steps() == [4, 8]
    assert objects(memory, "checkpoints/8/") == ["arrays/a", "arrays/d/b", "arrays/d/c", "manifest.json", "run.json"]
    assert begin(tmp_path / "three")[1].newest_good() == 8


def test_a_short_object_is_found_before_the_manifest_is_uploaded(memory, tmp_path, monkeypatch):
    mirror, _ = begin(tmp_path / "one")
    save(mirror, 4)
    pipe = type(memory).pipe_file
    monkeypatch.setattr(type(memory), "pipe_file", lambda self, path, value, **kw: pipe(
        self, path, value[:-1] if path.endswith("d/c") else value))
    with pytest.raises(RunError, match=r"checkpoints/4/arrays/d/c has 103 bytes there, 104 were sent"):
        mirror.push(4)
    assert mirror.steps() == []


def damage(memory, name):
    memory.pipe_file(f"/b/runs/x/checkpoints/{name}", b"!" + memory.cat_file(f"/b/runs/x/checkpoints/{name}")[1:])


def test_a_damaged_checkpoint_of_the_bucket_is_passed_over_and_counts_no_more(memory, tmp_path):
    mirror, _ = begin(tmp_path / "one")
    for step in (4, 8, 12):
        save(mirror, step)
        mirror.push(step)
    damage(memory, "8/arrays/a")
    memory.rm_file("/b/runs/x/checkpoints/12/run.json")
    said = []
    other = Mirror(URL, tmp_path / "two")
    (tmp_path / "two").mkdir()
    other.take(said.append)
    store = Store(tmp_path / "two" / "checkpoints", mirror=other, log=said.append)
    store.open()
    assert store.newest_good() == 4
    assert "12 is damaged and is passed over: memory://b/runs/x/checkpoints/12/run.json is missing" in said[-2]
    assert "8 is damaged and is passed over: memory://b/runs/x/checkpoints/8/arrays/a is damaged: its SHA" in said[-1]
    store.set_aside_after(4)
    assert other.steps() == [4] and "8/manifest.json.damaged" in objects(memory, "checkpoints/")
    assert store.steps() == [4] and not list((tmp_path / "two" / "checkpoints").glob(".*"))
    save(other, 8)
    other.push(8)
    assert other.steps() == [4, 8] and "8/manifest.json.damaged" not in objects(memory, "checkpoints/")
    assert begin(tmp_path / "three")[1].newest_good() == 8


def test_a_checkpoint_damaged_here_is_brought_again(memory, tmp_path):
    mirror, store = begin(tmp_path / "one")
    save(mirror, 4)
    mirror.push(4)
    (tmp_path / "one" / "checkpoints" / "4" / "arrays" / "a").write_text("?" * 104)
    assert store.newest_good() == 4 and store.verify(4) == []
    damage(memory, "4/arrays/a")
    (tmp_path / "one" / "checkpoints" / "4" / "run.json").unlink()
    with pytest.raises(RunError, match=r"^memory://b/runs/x: every checkpoint is damaged \(steps 4\)"):
        store.newest_good()


def test_retention_takes_the_manifest_first(memory, tmp_path, monkeypatch):
    mirror, _ = begin(tmp_path / "one")
    for step in (4, 8, 12):
        save(mirror, step)
        mirror.push(step)
    memory.pipe_file("/b/runs/x/checkpoints/6/arrays/a", b"of an upload that was killed")
    memory.pipe_file("/b/runs/x/checkpoints/14/arrays/a", b"of one that may be under way")
    removed, rm = [], type(memory).rm_file
    monkeypatch.setattr(type(memory), "rm_file", lambda self, path: (removed.append(path), rm(self, path)))
    mirror.retain(lambda steps: steps_to_delete({step: {} for step in steps}, keep=2))
    assert removed[0].endswith("checkpoints/4/manifest.json") and mirror.steps() == [8, 12]
    assert {name.split("/")[0] for name in objects(memory, "checkpoints/")} == {"8", "12", "14"}


def test_another_run_in_staging_is_set_aside(memory, tmp_path):
    begin_and_empty(memory, tmp_path / "one")
    mirror, store = begin(tmp_path / "one")  # the bucket was emptied: the run begins anew
    assert store.newest_good() is None and objects(memory) == ["bucket.json"]
    assert find_damage(tmp_path / "one.aside" / "checkpoints" / "4", 4) == []
    save(mirror, 8)
    empty(memory)
    begin(tmp_path / "one")  # once more: nothing that was set aside is lost
    assert find_damage(tmp_path / "one.aside" / "checkpoints" / "4", 4) == []
    assert find_damage(tmp_path / "one.aside2" / "checkpoints" / "8", 8) == []


def test_a_bucket_that_is_gone_leaves_staging_as_it_is(memory, tmp_path, monkeypatch):
    mirror, _ = begin(tmp_path / "one")
    save(mirror, 4)

    def gone(*given, **more):
        raise FileNotFoundError("The specified bucket does not exist")

    for name in ("find", "cat_file", "pipe_file"):
        monkeypatch.setattr(type(memory), name, gone)
    with pytest.raises(RunError, match=r"checkpoint of step 4 is whole .* all of memory://b/runs/x was removed"):
        mirror.push(4)
    with pytest.raises(InputError, match="no such object or bucket"):
        begin(tmp_path / "one")
    monkeypatch.undo()
    assert find_damage(tmp_path / "one" / "checkpoints" / "4", 4) == [] and not (tmp_path / "one.aside").exists()


def test_a_lost_record_is_written_again(memory, tmp_path):
    """As by a rule of the bucket that removes old objects: the record is written once, when a run starts."""
    mirror, _ = begin(tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text("{}")
    save(mirror, 4)
    mirror.push(4)
    memory.rm_file("/b/runs/x/bucket.json")
    save(mirror, 8)
    mirror.push(8)
    assert mirror.steps() == [4, 8] and "bucket.json" in objects(memory)
    save(mirror, 12)
    memory.rm_file("/b/runs/x/bucket.json")
    again, store = begin(tmp_path / "one")
    assert store.newest_good() == 12 == max(again.steps()) and not (tmp_path / "one.aside").exists()


def test_a_run_whose_directory_was_removed_says_so(memory, tmp_path):
    mirror = begin_and_empty(memory, tmp_path / "one")
    save(mirror, 8)
    with pytest.raises(RunError, match=r"not in the bucket: all of memory://b/runs/x was removed; this run ends"):
        mirror.push(8)


def test_an_outage_is_no_wrong_input(memory, tmp_path, monkeypatch):
    """Exit code 2 would end --restart-on-failure."""

    class EndpointConnectionError(Exception):
        pass

    def away(*given, **more):
        raise EndpointConnectionError("Could not connect to the endpoint URL")

    monkeypatch.setattr(type(memory), "find", away)
    with pytest.raises(RunError, match=r"cannot be reached: Endpoint.*; try again when the network, or the"):
        begin(tmp_path / "one")


def test_a_run_copied_into_a_bucket_by_other_means_goes_on(memory, tmp_path):
    source = SimpleNamespace(folder=tmp_path / "local")
    save(source, 4)
    for path in source.folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/b/runs/x/{path.relative_to(source.folder).as_posix()}", path.read_bytes())
    assert begin(tmp_path / "one")[1].newest_good() == 4


def test_a_run_that_was_taken_over_uploads_nothing_more(memory, tmp_path):
    first, _ = begin(tmp_path / "one")
    second, _ = begin(tmp_path / "two")
    save(first, 4)
    with pytest.raises(RunError, match=r"was taken over by another run \(host .*, process \d+, started .*\)"):
        first.push(4)
    assert second.steps() == []


def test_files_that_are_gone_here_go_there(memory, tmp_path):
    mirror, _ = begin(tmp_path / "one")
    (tmp_path / "one" / "crash.json").write_text("{}")
    mirror.push_files()
    memory.pipe_file("/b/runs/x/notes.txt", b"of the user")
    (tmp_path / "one" / "crash.json").unlink()
    again, _ = begin(tmp_path / "one")  # another process, which never knew of it
    again.push_files()
    assert objects(memory) == ["bucket.json", "notes.txt"]


def test_an_evaluation_is_uploaded_before_its_summary(memory, tmp_path, monkeypatch):
    mirror, _ = begin(tmp_path / "one")
    for name in ("summary.json", "a.jsonl", "z.jsonl"):
        (tmp_path / "one" / "eval" / "4").mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / "eval" / "4" / name).write_text("{}")
    sent, pipe = [], type(memory).pipe_file
    monkeypatch.setattr(type(memory), "pipe_file", lambda self, path, value, **kw: (
        sent.append(path), pipe(self, path, value)))
    mirror.push_files()
    assert len(sent) == 3 and sent[-1].endswith("/eval/4/summary.json")
    mirror.push_files()
    assert len(sent) == 3  # what is there is not sent again


def test_an_evaluation_that_a_reader_added_stays(memory, tmp_path):
    mirror, _ = begin(tmp_path / "one")
    save(mirror, 8)
    mirror.push(8)
    with view(URL, 8) as folder:
        (folder / "eval" / "8").mkdir(parents=True)
        (folder / "eval" / "8" / "summary.json").write_text("{}")
    again, _ = begin(tmp_path / "one")
    again.push_files()
    assert "eval/8/summary.json" in objects(memory) and (tmp_path / "one" / "eval" / "8" / "summary.json").is_file()


def test_a_bucket_that_fails_is_an_input_error_at_the_start(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(type(memory), "cat_file", lambda *given, **more: 1 / 0)
    with pytest.raises(InputError, match=r"^--workdir memory://b/runs/x cannot be reached: ZeroDivisionError"):
        begin(tmp_path / "one")


def test_processes_without_a_common_staging_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "share_a_folder", lambda folder: False)
    with pytest.raises(InputError, match=r"no staging folder in common .*mount the bucket on each \(gcsfuse\)"), \
            mirrors.mirrored(URL, tmp_path):
        pass


@pytest.fixture
def run(memory, tmp_path):
    mirror, _ = begin(tmp_path / "one")
    for step in (4, 8):
        save(mirror, step)
        mirror.push(step)
    return mirror


def test_checkpoints_lists_what_the_bucket_has(memory, run, tmp_path, capsys):
    assert main(["checkpoints", URL]) == 0
    assert capsys.readouterr().out.count("verified") == 2
    damage(memory, "8/arrays/a")
    assert main(["checkpoints", URL, "--json", str(tmp_path / "rows.json")]) == 1
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [bool(row["damage"]) for row in rows] == [False, True]
    with view(URL) as folder:
        assert Store(folder / "checkpoints", log=lambda line: None).newest_good() == 4
    with pytest.raises(RunError, match="step 8 was asked for by name and is damaged"):
        open_view(URL, 8)
    with pytest.raises(InputError, match=r"no checkpoint of step 5; steps there: 4, 8"):
        open_view(URL, 5)
    assert main(["checkpoints", "memory://b/nowhere"]) == 2
    assert "memory://b/nowhere: not a run directory: nothing is there" in capsys.readouterr().err


def test_what_a_reader_adds_goes_back(memory, run):
    with view(URL, "none") as folder:
        (folder / "report.html").write_text("page")
    assert memory.cat_file("/b/runs/x/report.html") == b"page" and run.steps() == [4, 8]


def test_an_export_in_a_bucket_has_its_proof_last_and_replaces_only_its_like(memory, monkeypatch):
    sent, pipe = [], type(memory).pipe_file
    monkeypatch.setattr(type(memory), "pipe_file", lambda self, path, value, **kw: (
        sent.append(path), pipe(self, path, value)))
    for names in (("a", "proof", "sub/b"), ("a", "proof")):
        with uploaded("memory://b/models/x", "proof") as folder:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(name)
        assert sent[-1] == "/b/models/x/proof"
        assert sorted(name for name in memory.store if "models" in name) == [f"/b/models/x/{name}" for name in names]
    memory.rm_file("/b/models/x/proof")
    with pytest.raises(InputError, match=r"is not empty and no earlier export \(it has a\)"), \
            uploaded("memory://b/models/x", "proof"):
        pass
