"""`drrgen render` under what befalls a long run: what opens as a shard is never wrong, and the same command goes on.

It completes the folder to the bytes of an undisturbed run.
"""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from drrgen import catalog, dataset, pipeline, processes, shards
from drrgen.config import RenderConfig
from drrgen.run import render_folder, write_phantoms

PATIENTS = 4
# As the command line says it: 62 views of each patient.
CONFIG = RenderConfig(grid="30deg", size=128)
SETTINGS = ("--grid", "30deg", "--size", "128")
# A run takes about three seconds beyond its start; on a machine under load several times that.
DEADLINE_S = 120

CLUSTER = """
import sys
import threading
import time
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from drrgen.config import RenderConfig
from drrgen.run import render_folder

ct_dir, out, patients = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
doomed = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
lost = []


def writers():
    return {int(path.name.split("-")[-1]) for path in out.glob(".*.h5.tmp-*")}


def lose_a_node():
    raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
    while not (its := writers() & {child.pid for child in raylet.children(recursive=True)}):
        time.sleep(0.002)
    cluster.remove_node(doomed, allow_graceful=False)
    lost.extend(its)


thread = threading.Thread(target=lose_a_node)
thread.start()
config = RenderConfig(grid="30deg", size=128)
summary = render_folder(ct_dir, out, config, "reject", overwrite=False, engine="ray")
thread.join()
assert lost, "no node was lost in the middle of its work"
assert (summary.rendered, summary.rejected) == (int(patients), 0)
"""


@pytest.fixture(scope="module")
def ct_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, PATIENTS, seed=0, matrix=64, table=False)
    return folder


@pytest.fixture(scope="module")
def undisturbed(ct_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert render_folder(ct_dir, out, CONFIG, "reject", overwrite=False).rendered == PATIENTS
    return digests(out)


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.h5"))}


def start(ct_dir: Path, out: Path, *options: str, **known) -> subprocess.Popen[str]:
    program = Path(sys.executable).with_name("drrgen")
    command = [program, "render", "--ct-dir", ct_dir, "--out", out, *SETTINGS, *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **known)


def complete(ct_dir: Path, out: Path, *options: str) -> str:
    """The same command, undisturbed: what it said."""
    with start(ct_dir, out, *options) as process:
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 0, said
    return said


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def hidden(out: Path) -> list[Path]:
    """Left-over files: all that readers pass over, but for the lock."""
    return [path for path in out.glob(".*") if path.name != ".lock"]


def lines(said: str) -> list[str]:
    """What was printed beside the bar."""
    return [line for line in said.replace("\r", "\n").splitlines() if line.strip() and "view/s" not in line]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "seed"), [("1", 0), ("2", 1)])
def test_killed_at_random_moments(workers: str, seed: int, ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    """Fifteen kills each, of all processes of the run or of the main one alone, anywhere in the life of a shard."""
    moments = random.Random(seed)
    out, kills = tmp_path / "out", 0
    while kills < 15:
        before = set(hidden(out))
        with start(ct_dir, out, "--workers", workers) as process:
            # the first file of this run marks the end of its start, which is not what is to be disturbed
            until(lambda: process.poll() is not None or set(hidden(out)) - before)  # noqa: B023
            time.sleep(moments.uniform(0, 1.5))
            if process.poll() is None:
                kills += 1
                main = psutil.Process(process.pid)
                others = main.children(recursive=True)
                for one in [main, *(others if moments.random() < 0.5 else [])]:
                    one.kill()
                # without the main process the others end by themselves
                assert not psutil.wait_procs(others, DEADLINE_S)[1]
        done = digests(out)
        assert done.items() <= undisturbed.items()
        if len(done) == PATIENTS:
            shutil.rmtree(out)
    complete(ct_dir, out)
    assert digests(out) == undisturbed
    assert hidden(out) == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_stopped_in_the_middle_it_leaves_nothing_behind(
    stop: signal.Signals, workers: str, ct_dir: Path, undisturbed: dict, tmp_path: Path
) -> None:
    """Ctrl-C, and what a scheduler sends: one line, exit code 130, and what was finished stays."""
    out = tmp_path / "out"
    with start(ct_dir, out, "--workers", workers, start_new_session=True) as process:
        until(lambda: hidden(out))
        os.killpg(process.pid, stop)  # as a terminal and Slurm do: to all processes of the run
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 130, said
    assert lines(said) == ["drrgen: stopped; the same command goes on from here"]
    assert hidden(out) == []
    assert digests(out).items() <= undisturbed.items()
    complete(ct_dir, out)
    assert digests(out) == undisturbed


def test_two_runs_at_once_in_one_folder(ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    runs = [start(ct_dir, tmp_path) for _ in range(2)]
    for process in runs:
        said = process.communicate(timeout=DEADLINE_S)[1]
        assert process.returncode == 0, said
    assert digests(tmp_path) == undisturbed
    assert hidden(tmp_path) == []


def test_parts_make_the_whole(ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    of_part = []
    for part in range(3):
        render_folder(ct_dir, tmp_path / str(part), CONFIG, "reject", overwrite=False, part=(part, 3))
        of_part.append(digests(tmp_path / str(part)))
    assert sum(map(len, of_part)) == PATIENTS
    assert of_part[0] | of_part[1] | of_part[2] == undisturbed


def test_a_worker_that_dies_costs_nothing_but_time(ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    with start(ct_dir, tmp_path, "--workers", "2") as process:
        until(lambda: list(tmp_path.glob(".*.h5.tmp-*")))
        writer = int(next(tmp_path.glob(".*.h5.tmp-*")).name.split("-")[-1])
        os.kill(writer, signal.SIGKILL)
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 0, said
    assert digests(tmp_path) == undisturbed
    assert hidden(tmp_path) == []


def test_a_ct_that_kills_every_process_is_given_up_alone(ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    """Not with the one that was read ahead in the same process, or the one that was checked there."""
    _, deadly, *_ = sorted(undisturbed)
    with start(ct_dir, tmp_path, "--workers", "2") as process:
        while process.poll() is None:
            for path in tmp_path.glob(f".{deadly}.tmp-*"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.name.split("-")[-1]), signal.SIGKILL)
            time.sleep(0.002)
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 1, said
    assert digests(tmp_path) == {name: digest for name, digest in undisturbed.items() if name != deadly}
    assert [(name, one.codes) for name, one in dataset.read(tmp_path).rejected.items()] == [(deadly, ["process-died"])]


def test_a_process_that_dies_while_it_waits_for_an_answer(ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    jobs = [pipeline.Job(tmp_path / shards.file_name(one.origin), (one,)) for one in catalog.scan(ct_dir)[:2]]
    dataset.begin(tmp_path, "hash", CONFIG.to_json(), planned=[], finished=[], todo=[])
    counted = []

    def kill_once_it_has_asked(event: pipeline.Event) -> None:
        if not counted:
            until(jobs[0].path.exists)  # it is in the middle of the second, and has asked for one more
            (writer,) = [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]
            writer.kill()
            until(lambda: writer.status() == psutil.STATUS_ZOMBIE)
        counted.append(event.num_views if isinstance(event, pipeline.Cast) else 0)

    processes.render_jobs(jobs, CONFIG, "reject", 1, 1, kill_once_it_has_asked)
    assert digests(tmp_path) == {job.path.name: undisturbed[job.path.name] for job in jobs}
    assert sum(counted) == 2 * 62  # what was lost is counted once


def test_stopped_while_a_shard_waits_to_be_checked_it_is_finished(
    ct_dir: Path, undisturbed: dict, tmp_path: Path
) -> None:
    jobs = [pipeline.Job(tmp_path / shards.file_name(one.origin), (one,)) for one in catalog.scan(ct_dir)[:2]]
    dataset.begin(tmp_path, "hash", CONFIG.to_json(), planned=[], finished=[], todo=[])

    def stop(event: pipeline.Event) -> None:
        if isinstance(event, pipeline.Rendered):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.render_jobs(jobs, CONFIG, "reject", 1, stop)
    assert hidden(tmp_path) == []
    assert digests(tmp_path) == {job.path.name: undisturbed[job.path.name] for job in jobs}


def test_fewer_threads_than_processors(ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    with start(ct_dir, tmp_path, "--part", "0/4", env=os.environ | {"NUMBA_NUM_THREADS": "1"}) as process:
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 0, said
    assert digests(tmp_path).items() <= undisturbed.items()


def test_an_input_that_vanishes_after_the_scan_costs_one_shard(ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    copy = shutil.copytree(ct_dir, tmp_path / "ct")
    jobs = [pipeline.Job(tmp_path / shards.file_name(one.origin), (one,)) for one in catalog.scan(copy)]
    shutil.rmtree(jobs[1].entry.path)
    told: list[pipeline.Event] = []
    dataset.begin(tmp_path, "hash", CONFIG.to_json(), planned=[], finished=[], todo=[])
    pipeline.render_jobs(jobs, CONFIG, "reject", 1, told.append)
    (refused,) = [event for event in told if isinstance(event, pipeline.Refused)]
    assert (refused.path, refused.error.code) == (jobs[1].path, "unreadable-file")
    assert digests(tmp_path) == {name: digest for name, digest in undisturbed.items() if name != jobs[1].path.name}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, too small for the shards: each takes 0.6 MB or more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "drrgen-test", disk], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk(workers: str, ct_dir: Path, undisturbed: dict, small_disk: Path) -> None:
    with start(ct_dir, small_disk / "out", "--workers", workers) as process:
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 2, said
    (line,) = lines(said)
    assert line.startswith("drrgen: [Errno 28] No space left on device")
    assert hidden(small_disk / "out") == []
    assert digests(small_disk / "out").items() <= undisturbed.items()
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    complete(ct_dir, small_disk / "out")
    assert digests(small_disk / "out") == undisturbed


def test_a_folder_that_may_not_be_written_to(ct_dir: Path, small_disk: Path) -> None:
    (small_disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with start(ct_dir, small_disk / "out") as process:
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 2, said
    (line,) = lines(said)
    assert line.startswith("drrgen: [Errno 30] Read-only file system")


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_in_the_middle_of_its_work(ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    """Two nodes, in a process of their own: Ray leaves threads and files open that are none of ours."""
    pytest.importorskip("ray", reason="needs drrgen[ray]")
    command = [sys.executable, "-c", CLUSTER, ct_dir, tmp_path, str(PATIENTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path) == undisturbed
    assert hidden(tmp_path) == []


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("drrgen")
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=DEADLINE_S)


def test_damage_to_finished_shards_is_named_and_made_good(ct_dir: Path, undisturbed: dict, tmp_path: Path) -> None:
    """A flipped bit, a file cut short, one that is gone, and a bit that a disk flipped without a trace in its times."""
    complete(ct_dir, tmp_path)
    flipped, cut, gone, silent = sorted(tmp_path.glob("*.h5"))
    for path in (flipped, silent):
        times = path.stat()
        with path.open("r+b") as file:
            file.seek(times.st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 16]))
        if path is silent:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.truncate(cut, cut.stat().st_size // 2)
    gone.unlink()

    found = command("validate", tmp_path)
    assert found.returncode in (1, 2)
    said = found.stdout + found.stderr
    for path in (flipped, cut, gone, silent):
        assert any(path.name in line and not line.endswith(": ok") for line in said.splitlines()), (path, said)
    assert command("status", "--out", tmp_path).returncode == 1

    silent.unlink()  # as `validate` says: by its times nobody can tell
    again = complete(ct_dir, tmp_path)
    assert f"rendering again: {flipped}: not as manifest.jsonl has it" in again
    assert f"rendering again: {cut}" in again
    assert digests(tmp_path) == undisturbed
    assert command("validate", tmp_path).returncode == 0
    assert command("status", "--out", tmp_path).returncode == 0
