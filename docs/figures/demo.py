"""The demo, end to end on a CPU: synthetic patients, their views, a trained toy model, a picture and a table.

`python docs/figures/demo.py FOLDER` runs the commands that a user would run, then judges the model on patients that it
has never seen. Everything lands in FOLDER, which is made anew.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray

from svdrr import baselines, metrics, radiograph
from svdrr.data import split
from svdrr.pipeline import SVDRRPipeline
from svdrr.shards import Shard, open_folder

PATIENTS = 48
SIZE = 128
# (azimuth, elevation), all of them 20 degrees and more from the source
TARGETS_DEG = [(-90, 0), (-60, 0), (-30, 0), (30, 0), (60, 0), (90, 0), (-45, 15), (45, -15)]
SHOWN_DEG = TARGETS_DEG[1:6]
SHOWN_PATIENTS = 2


def run(name: str, *command: object) -> float:
    """Run one command line, as it would be typed; its minutes."""
    print("\n$", *command, flush=True)
    began = time.monotonic()
    program = Path(sys.executable).parent / str(command[0])
    subprocess.run([program, *map(str, command[1:])], check=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{name}: {minutes:.2f} minutes", flush=True)
    return minutes


def view(shard: Shard, angles_deg: tuple[float, float]) -> NDArray[np.float32]:
    return shard.images(SIZE, [shard.nearest_view(*angles_deg)])[0]


def whole(shard: Shard, angles_deg: tuple[float, float]) -> NDArray[np.bool_]:
    """The pixels of that view, [SIZE, SIZE], that are not marked as truncated: there the truth is known."""
    marks = shard.truncation(SIZE, [shard.nearest_view(*angles_deg)])
    return np.ones((SIZE, SIZE), dtype=bool) if marks is None else marks[0] == 0


def synthesise(pipeline: SVDRRPipeline, shard: Shard) -> NDArray[np.float32]:
    """One sample per target, from the patient's PA view alone: [targets, SIZE, SIZE]."""
    source = torch.from_numpy(view(shard, (0, 0)))[None, None]
    generators = [torch.Generator().manual_seed(number) for number in range(len(TARGETS_DEG))]
    return pipeline(source, (0, 0), TARGETS_DEG, generator=generators).line_integrals[:, 0].numpy()


def table(answers: dict[str, NDArray[np.float32]], truth: NDArray[np.float32], counts: NDArray[np.bool_]) -> str:
    """PSNR per angle, and the means of PSNR and SSIM, over held-out patients and pixels that count, as Markdown."""
    header = ["", *(f"{theta:+d}, {phi:+d}" for theta, phi in TARGETS_DEG), "mean PSNR", "mean SSIM"]
    lines = [header, ["---"] * len(header)]
    for name, images in answers.items():
        psnr, ssim = metrics.psnr(images, truth, counts), metrics.ssim(images, truth, counts)
        lines.append(
            [name, *(f"{value:.1f}" for value in psnr.mean(axis=0)), f"**{psnr.mean():.2f}**", f"{ssim.mean():.3f}"]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def picture(path: Path, test: list[Shard], truth: NDArray[np.float32], synthesised: NDArray[np.float32]) -> None:
    rows = ("truth", "synthesised", "difference")
    figure, axes = plt.subplots(
        3 * SHOWN_PATIENTS, 1 + len(SHOWN_DEG), figsize=(10, 5.1 * SHOWN_PATIENTS), layout="compressed"
    )
    for one in axes.flat:
        one.axis("off")
    for patient in range(SHOWN_PATIENTS):
        white = np.percentile(truth[patient], 99.5)
        block = axes[3 * patient : 3 * patient + 3]
        block[1, 0].imshow(view(test[patient], (0, 0)), cmap="gray", vmin=0, vmax=white)
        block[1, 0].set_title(f"{test[patient].patient_id}\nsource, PA", fontsize=9)
        for column, angles_deg in enumerate(SHOWN_DEG, start=1):
            index = TARGETS_DEG.index(angles_deg)
            true, made = truth[patient, index], synthesised[patient, index]
            block[0, column].imshow(true, cmap="gray", vmin=0, vmax=white)
            block[1, column].imshow(made, cmap="gray", vmin=0, vmax=white)
            block[2, column].imshow(made - true, cmap="RdBu_r", vmin=-2, vmax=2)
            block[0, column].set_title(f"θ = {angles_deg[0]:+d}°", fontsize=9)
            block[1, column].set_title(f"{metrics.psnr(made, true):.1f} dB", fontsize=8, pad=2)
        for row, name in enumerate(rows):
            block[row, 1].text(
                -0.06, 0.5, name, rotation=90, va="center", ha="right", transform=block[row, 1].transAxes
            )
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ct, shards, model = folder / "ct", folder / "shards", folder / "run"
    looks = ["--grid", "15deg", "--azimuth", "-90:90", "--elevation", "-15:15", "--size", SIZE]
    minutes = {
        "phantom": run("phantom", "drrgen", "phantom", "--out", ct, "--patients", PATIENTS, "--matrix", 96),
        "render": run("render", "drrgen", "render", "--ct-dir", ct, "--out", shards, *looks),
        "train": run("train", "svdrr", "train", "--shards", shards, "--preset", "toy", "--out", model),
    }
    patients = open_folder(shards)
    test = [shard for shard in patients if split(shard.patient_id) == "test"]
    train = [shard for shard in patients if split(shard.patient_id) == "train"]

    radiograph.write_png(folder / "x.png", view(test[0], (0, 0)), {"patient": test[0].patient_id})
    angles = ["--theta", 30, "--phi", 10]
    command = ["svdrr", "sample", "--image", folder / "x.png", *angles, "--model", model, "--out", folder / "y.png"]
    minutes["sample"] = run("sample", *command)

    began = time.monotonic()
    pipeline = SVDRRPipeline.from_pretrained(model / "model")
    pipeline.set_progress_bar_config(disable=True)
    truth = np.stack([[view(shard, angles) for angles in TARGETS_DEG] for shard in test])
    counts = np.stack([[whole(shard, angles) for angles in TARGETS_DEG] for shard in test])
    mean = np.stack([baselines.mean_view(train, *angles, SIZE) for angles in TARGETS_DEG])
    answers = {
        "svdrr, toy": np.stack([synthesise(pipeline, shard) for shard in test]),
        "copy the source": np.stack([baselines.copy_source(view(shard, (0, 0)), len(TARGETS_DEG)) for shard in test]),
        "mean training view": np.broadcast_to(mean, truth.shape),
    }
    picture(folder / "demo.png", test, truth, answers["svdrr, toy"])
    minutes["judge"] = (time.monotonic() - began) / 60

    steps = ", ".join(f"{name} {value:.2f}" for name, value in minutes.items())
    report = (
        f"PSNR in dB (of line integrals, range {metrics.DATA_RANGE:g}) by target azimuth, elevation; one sample each; "
        f"{len(test)} held-out patients of {len(patients)}, source PA, {SIZE} pixels, without those that are marked as "
        f"truncated ({100 * (1 - counts.mean()):.1f} %):\n\n{table(answers, truth, counts)}\n\n"
        f"Minutes: {steps}; together {sum(minutes.values()):.2f}.\n"
    )
    (folder / "report.md").write_text(report)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
