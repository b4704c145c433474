"""Which design learns most in the same training time: variants of a preset, beside baselines, on held-out patients.

    python -m tests.benchmarks.learning SHARDS [--orbit FOLDER] [--out FOLDER] [--only ours,...] [--minutes 5]
        [--sizes 128,256] [--seeds 0,1] [--document docs/training.md]

Every variant gets the same minutes of one core's time, so that other work on the machine does not count: the time of
its step is measured first, and the stages are stretched until they fill the minutes. Variants of one seed share one
autoencoder, which is trained before and not counted. The source is PA, the patients are those of the test split, and
all variants are sampled from the same noise.

SHARDS wants azimuths -90 to 90 and elevations -15 to 15 in steps of 15 degrees. `--orbit` is a folder of the test
patients' views at elevation 0 on a finer grid, among which the one most like a synthesised view is sought; without it,
SHARDS' own are taken.

Results gather in FOLDER/learning.jsonl: what is there already is not done again, so a long list may be spread over
many calls. `--only` with no name makes the tables of what is there. With `--sizes`, which are to ask whether the weak
stage pays where a strong step costs more, the table is of just that.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from tests.benchmarks import report
from torch.optim.optimizer import register_optimizer_step_post_hook

from svdrr import baselines, metrics, presets
from svdrr import vae as autoencoder
from svdrr.config import CoarseConfig, TrainConfig
from svdrr.data import splits
from svdrr.pipeline import SVDRRPipeline
from svdrr.run import model_folder
from svdrr.shards import Shard, open_folder
from svdrr.train import train

AZIMUTHS_DEG = [azimuth for azimuth in range(-90, 91, 15) if azimuth]
TARGETS_DEG = [(azimuth, 0) for azimuth in AZIMUTHS_DEG] + [(-75, -15), (-45, 15), (45, -15), (75, 15)]
SAMPLES = 2
VALIDATION_PAIRS = 512
REFERENCE, STRONG_ONLY = "ours", "strong only"
RIDGE_LAMBDAS = [10.0**power for power in range(-5, 2)]
"""Of the mean eigenvalue of the sources' covariance."""

MEASURED_STEPS = 24
MEASURED_TIMES = 3
PACKAGES = ["torch", "diffusers", "numpy"]


@dataclass(frozen=True)
class Variant:
    """change: of the preset. sampling: keywords of the pipeline's call. What differs in these alone is trained once."""

    change: Callable[[TrainConfig], TrainConfig]
    sampling: dict[str, Any] = field(default_factory=dict)


def model(**switches: Any) -> Variant:
    return Variant(lambda config: replace(config, model=replace(config.model, **switches)))


def coarse(kind: str, width: int, **sampling: Any) -> Variant:
    branch = CoarseConfig(kind, cells=16, width=width, steps=800, batch=16, learning_rate=3e-3, volume_channels=4)
    return Variant(lambda config: replace(config, coarse=branch), sampling)


VARIANTS = {
    REFERENCE: model(),
    "paper conditioning": model(
        pooled_source=True, ray_maps=False, absolute_pose=False, pose_modulation=False, scaled_source=False
    ),
    STRONG_ONLY: Variant(lambda config: replace(config, stages=config.stages[-1:])),
    "weak for longer": Variant(  # of the time about half, instead of a sixth
        lambda config: replace(
            config, stages=(replace(config.stages[0], steps=6 * config.stages[0].steps), *config.stages[1:])
        )
    ),
    "coarse: regression": coarse("regression", 24),
    "coarse: regression started at 0.9": coarse("regression", 24, start=0.9),
    "coarse: lift": coarse("lift", 16),
    "coarse: lift started at 0.9": coarse("lift", 16, start=0.9),
    "one pooled token": model(pooled_source=True),
    "no ray maps": model(ray_maps=False),
    "relative pose only": model(absolute_pose=False),
    "no pose modulation": model(pose_modulation=False),
    "unscaled source": model(scaled_source=False),
}


class Results:
    """What was measured, a JSON line each; a line is found by its `key`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines: dict[str, dict] = {line["key"]: line for line in map(json.loads, lines)}

    def get(self, what: Callable[[], dict], *parts: object) -> dict:
        """The line of these parts, which `what` makes where it is missing."""
        key = "/".join(map(str, parts))
        if key not in self.lines:
            self.lines[key] = {"key": key, **what()}
            with self.path.open("a") as file:
                file.write(json.dumps(self.lines[key]) + "\n")
        return self.lines[key]


@dataclass(frozen=True)
class Patients:
    """The shards by split, and what the test patients' views are, for size `size`.

    source: [P, N, N]. truth: [P, T, N, N] at TARGETS_DEG. orbit: [P, O, N, N] at orbit_deg [O], elevation 0.
    """

    size: int
    train: list[Shard]
    val: list[Shard]
    test: list[Shard]
    source: NDArray[np.float32]
    truth: NDArray[np.float32]
    orbit: NDArray[np.float32]
    orbit_deg: NDArray[np.float64]


def read_patients(shards: list[Shard], orbit: list[Shard], size: int) -> Patients:
    by_split: dict[str, list[Shard]] = {"train": [], "val": [], "test": []}
    for shard, name in zip(shards, splits(shards), strict=True):
        by_split[name].append(shard)
    test = by_split["test"]
    of_patient = {shard.patient_id: shard for shard in orbit}
    orbits = [of_patient[shard.patient_id] for shard in test]
    level = np.flatnonzero(orbits[0].elevation_deg == 0)
    orbit_deg = orbits[0].azimuth_deg[level]
    assert all(np.array_equal(one.azimuth_deg[level], orbit_deg) for one in orbits)
    return Patients(
        size=size,
        **by_split,
        source=views(test, [(0, 0)], size)[:, 0],
        truth=views(test, TARGETS_DEG, size),
        orbit=np.stack([one.images(size, level) for one in orbits]),
        orbit_deg=orbit_deg,
    )


def views(shards: Sequence[Shard], angles_deg: Sequence[tuple[float, float]], size: int) -> NDArray[np.float32]:
    """[shards, angles, size, size]."""
    return np.stack([shard.images(size, [shard.nearest_view(*angles) for angles in angles_deg]) for shard in shards])


def judged(patients: Patients, images: NDArray[np.float32]) -> dict:
    """Per patient and target, of images [P, T, N, N]: PSNR, SSIM, and the azimuth of the true view most like it.

    Most like it: of the largest correlation of the pixels, so that neither brightness nor contrast decides.
    """
    on_orbit = images[:, : len(AZIMUTHS_DEG)]
    alike = np.einsum("ptx,pox->pto", _normalised(on_orbit), _normalised(patients.orbit))
    return {
        "patients": [shard.patient_id for shard in patients.test],
        "psnr": metrics.psnr(images, patients.truth).round(3).tolist(),
        "ssim": metrics.ssim(images, patients.truth).round(4).tolist(),
        "found_deg": patients.orbit_deg[alike.argmax(axis=2)].tolist(),
    }


def _normalised(images: NDArray) -> NDArray[np.float64]:
    flat = images.reshape(*images.shape[:2], -1).astype(np.float64)
    flat -= flat.mean(axis=2, keepdims=True)
    return flat / np.linalg.norm(flat, axis=2, keepdims=True)


def copied(patients: Patients) -> NDArray[np.float32]:
    return np.stack([baselines.copy_source(source, len(TARGETS_DEG)) for source in patients.source])


def mean_views(patients: Patients) -> NDArray[np.float32]:
    mean = np.stack([baselines.mean_view(patients.train, *angles, patients.size) for angles in TARGETS_DEG])
    return np.broadcast_to(mean, patients.truth.shape)


def nearest_patients(patients: Patients) -> NDArray[np.float32]:
    """The views of the training patient whose source view is nearest, by the sum of squares."""
    sources = views(patients.train, [(0, 0)], patients.size)[:, 0]
    away = [np.square(sources - source).sum(axis=(1, 2)) for source in patients.source]
    return views([patients.train[index.argmin()] for index in away], TARGETS_DEG, patients.size)


def ridge(patients: Patients) -> NDArray[np.float32]:
    """Linear in the pixels of the source, a map for each target; lambda is what serves the validation patients best.

    In its dual form, which has a weight for each training patient and so takes all pixels as they are.
    """

    def flat(shards: Sequence[Shard]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        all_views = views(shards, [(0, 0), *TARGETS_DEG], patients.size).astype(np.float64)
        return all_views[:, 0].reshape(len(shards), -1), all_views[:, 1:]

    sources, targets = flat(patients.train)
    mean_source, mean_target = sources.mean(axis=0), targets.mean(axis=0)
    sources = sources - mean_source
    values, vectors = np.linalg.eigh(sources @ sources.T)
    rotated = np.einsum("nk,ntyx->ktyx", vectors, targets - mean_target)

    def answer(of: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
        weights = (of - mean_source) @ sources.T @ vectors / (values + strength * values.mean())
        return (mean_target + np.einsum("pk,ktyx->ptyx", weights, rotated)).clip(min=0)

    val_sources, val_targets = flat(patients.val)
    scores = [metrics.psnr(answer(val_sources, strength), val_targets).mean() for strength in RIDGE_LAMBDAS]
    best = RIDGE_LAMBDAS[int(np.argmax(scores))]
    return answer(patients.source.reshape(len(patients.test), -1).astype(np.float64), best).astype(np.float32)


BASELINES: dict[str, Callable[[Patients], NDArray[np.float32]]] = {
    "copy the source": copied,
    "mean training view": mean_views,
    "nearest training patient": nearest_patients,
    "ridge regression": ridge,
}


def round_trip(patients: Patients, vae_folder: Path) -> NDArray[np.float32]:
    """What the autoencoder leaves of the truth."""
    vae = AutoencoderKL.from_pretrained(vae_folder)
    truth = torch.from_numpy(patients.truth)
    with torch.no_grad():
        return np.stack([autoencoder.decode(vae, autoencoder.encode(vae, one[:, None]))[:, 0].numpy() for one in truth])


def synthesised(patients: Patients, run: Path, sampling: dict[str, Any]) -> NDArray[np.float32]:
    """[P, SAMPLES, T, N, N]. A target's noise is the same for all patients and variants."""
    pipeline = SVDRRPipeline.from_pretrained(model_folder(run))
    pipeline.set_progress_bar_config(disable=True)
    count = SAMPLES * len(TARGETS_DEG)
    made = []
    for source in torch.from_numpy(patients.source):
        generators = [torch.Generator().manual_seed(number) for number in range(count)]
        made.append(
            pipeline(source[None, None], (0, 0), TARGETS_DEG * SAMPLES, generator=generators, **sampling)
            .line_integrals[:, 0]
            .unflatten(0, (SAMPLES, -1))
            .numpy()
        )
    return np.stack(made)


@dataclass(frozen=True)
class Bench:
    """shards: the folder. few: one of few of them, to measure the time of a step with. out: where everything goes."""

    shards: Path
    few: Path
    out: Path
    results: Results
    data: str
    minutes: float

    def prepared(self, config: TrainConfig) -> Path:
        """The run of this seed that has the autoencoder, and all latents of it; made once."""
        folder = self.out / f"seed{config.seed}"
        config = replace(config, stages=tuple(replace(stage, steps=1) for stage in config.stages))
        return train(config, self.shards, folder)

    def one_step_s(self, config: TrainConfig, size: int | None, vae: Path) -> float:
        """Seconds of a step by one core, from one update of the weights to the next. size: None is the coarse branch.

        The median; of the coarse branch, whose steps see all sizes in turn, the mean but for the slowest tenth.
        """
        if size is None:
            coarse = replace(config.coarse, steps=MEASURED_STEPS)
            config = replace(config, coarse=coarse, stages=tuple(replace(stage, steps=1) for stage in config.stages))
        else:
            stage = next(stage for stage in config.stages if stage.size == size)
            coarse = None if config.coarse is None else replace(config.coarse, steps=1)
            config = replace(config, coarse=coarse, stages=(replace(stage, steps=MEASURED_STEPS),))
        folder = self.out / "measure"
        shutil.rmtree(folder, ignore_errors=True)
        updates: list[float] = []
        hook = register_optimizer_step_post_hook(lambda *call: updates.append(time.process_time()))
        try:
            train(config, self.few, folder, vae=str(vae))
        finally:
            hook.remove()
        of_task = updates[:MEASURED_STEPS] if size is None else updates[-MEASURED_STEPS:]
        taken = np.sort(np.diff(of_task))
        return float(taken[: round(0.9 * len(taken))].mean() if size is None else np.median(taken))

    def step_s(self, config: TrainConfig, reference: TrainConfig, size: int, vae: Path) -> float:
        """Seconds of a step: the reference's, times the ratio of both, for which they are measured in turns.

        So a machine that is slower at times, by what others do on it, is no variant's loss.
        """

        def times(*configs: TrainConfig) -> NDArray[np.float64]:
            return np.array([[self.one_step_s(one, size, vae) for one in configs] for _ in range(MEASURED_TIMES)])

        def of_reference() -> dict:
            return {"seconds": np.median(times(reference))}

        def of_config() -> dict:
            measured = times(reference, config)
            return {"ratio": np.median(measured[:, 1] / measured[:, 0])}

        ours, theirs = (_digest(_one_stage(one, size)) for one in (reference, config))
        seconds = self.results.get(of_reference, "step", size, ours)["seconds"]
        return seconds if ours == theirs else seconds * self.results.get(of_config, "ratio", size, theirs)["ratio"]

    def filled(self, config: TrainConfig, reference: TrainConfig, vae: Path) -> TrainConfig:
        """The stages' steps, multiplied by one number so that together they take the minutes."""
        seconds = sum(stage.steps * self.step_s(config, reference, stage.size, vae) for stage in config.stages)
        coarse = config.coarse
        if coarse is not None:
            seconds += coarse.steps * self.coarse_step_s(config, reference, vae)
        factor = 60 * self.minutes / seconds
        return replace(
            config,
            coarse=None if coarse is None else replace(coarse, steps=round(coarse.steps * factor)),
            stages=tuple(replace(stage, steps=round(stage.steps * factor)) for stage in config.stages),
        )

    def coarse_step_s(self, config: TrainConfig, reference: TrainConfig, vae: Path) -> float:
        """Seconds of a step of the coarse branch, by its ratio to the reference's last stage: see step_s."""
        size = config.stages[-1].size

        def of_config() -> dict:
            measured = [
                (self.one_step_s(config, None, vae), self.one_step_s(reference, size, vae))
                for _ in range(MEASURED_TIMES)
            ]
            return {"ratio": np.median([coarse / last for coarse, last in measured])}

        ratio = self.results.get(of_config, "coarse ratio", _digest(replace(config, seed=0)))["ratio"]
        return ratio * self.step_s(reference, reference, size, vae)

    def trained(self, config: TrainConfig, prepared: Path) -> Path:
        """The finished run of this config, with what it took in `cost.json`; one that was broken off begins anew."""
        folder = self.out / f"seed{config.seed}-{_digest(config)}"
        if (folder / "cost.json").exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        train(config, self.shards, folder, max_minutes=0, vae=str(prepared / "vae"))  # no more than the folder
        shutil.rmtree(folder / "latents", ignore_errors=True)
        (folder / "latents").symlink_to((prepared / "latents").resolve())
        begin = time.process_time()
        train(config, self.shards, folder, vae=str(prepared / "vae"))
        cost = {
            "steps": ({"coarse": config.coarse.steps} if config.coarse else {})
            | {stage.name: stage.steps for stage in config.stages},
            "cpu_minutes": round((time.process_time() - begin) / 60, 2),
        }
        (folder / "cost.json").write_text(json.dumps(cost))
        return folder


def _one_stage(config: TrainConfig, size: int) -> TrainConfig:
    """What decides the time of a step."""
    stages = tuple(replace(stage, steps=0) for stage in config.stages if stage.size == size)
    return replace(config, seed=0, stages=stages)


def _digest(config: TrainConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_json()).encode()).hexdigest()[:12]


def validation_loss(run: Path) -> float:
    """Of the average of the weights, after the last step."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["validation_loss"] for line in lines if "validation_loss" in line][-1]


def of_sizes(config: TrainConfig, sizes: Sequence[int]) -> TrainConfig:
    """The same with its stages at these sizes."""
    return replace(
        config, stages=tuple(replace(stage, size=size) for stage, size in zip(config.stages, sizes, strict=True))
    )


def measure(
    bench: Bench, patients: Patients, preset: str, sizes: Sequence[int], names: Iterable[str], seeds: Sequence[int]
) -> None:
    """Everything asked for that is not among the results yet."""
    what = named(preset, sizes)
    for name, answer in BASELINES.items():
        bench.results.get(lambda answer=answer: judged(patients, answer(patients)), "baseline", bench.data, name)
    for seed in seeds:
        config = replace(
            of_sizes(presets.preset(preset, seed), sizes),
            validation_pairs=VALIDATION_PAIRS,
            validate_every=10**9,  # at the end of a stage alone, as what is judged costs no training time
            checkpoint_every=10**9,
            log_every=100,
        )
        for name in names:
            prepared = bench.prepared(config)
            bench.results.get(
                lambda prepared=prepared: judged(patients, round_trip(patients, prepared / "vae")),
                *("round trip", bench.data, what, seed),
            )

            def result(variant=VARIANTS[name], config=config, prepared=prepared) -> dict:
                filled = bench.filled(variant.change(config), config, prepared / "vae")
                run = bench.trained(filled, prepared)
                made = synthesised(patients, run, variant.sampling)
                return {
                    **json.loads((run / "cost.json").read_text()),
                    "validation_loss": validation_loss(run),
                    **judged(patients, made[:, 0]),
                    "mean": judged(patients, made.mean(axis=1)),
                }

            bench.results.get(result, "variant", bench.data, what, f"{bench.minutes:g}", name, seed)


def named(preset: str, sizes: Sequence[int]) -> str:
    """The preset, with the sizes of its stages where they are not its own."""
    own = [stage.size for stage in presets.preset(preset, 0).stages]
    return preset if list(sizes) == own else f"{preset} at {', '.join(map(str, sizes))} pixels"


def tables(results: Results, data: str, what: str, minutes: float) -> str:
    """All that is known of these shards, of what `named` says, and of this time, as Markdown."""
    rows: dict[str, list[dict]] = {}
    for key, line in results.lines.items():
        kind, *parts = key.split("/")
        if kind == "baseline" and parts[0] == data:
            rows[parts[1]] = [line]
        elif kind == "round trip" and parts[:2] == [data, what]:
            rows.setdefault("autoencoder's round trip", []).append(line)
    rows |= trained_for(results, data, what, f"{minutes:g}")
    order = [*BASELINES, "autoencoder's round trip", *VARIANTS]
    rows = {name: rows[name] for name in order if name in rows}

    tilts = sorted({abs(azimuth) for azimuth in AZIMUTHS_DEG})
    heads = ["", *map(str, tilts), "elevated", "mean"]
    by_psnr, by_ssim, poses, costs = [], [], [], []
    for name, lines in rows.items():
        by_psnr.append([name, *_by_tilt(lines, tilts, "psnr", 1), _psnr_of_mean(lines), *_difference(rows, name)])
        by_ssim.append([name, *_by_tilt(lines, tilts, "ssim", 3)])
        wanted, found = np.array(AZIMUTHS_DEG), np.array([line["found_deg"] for line in lines])
        away = abs(found - wanted)
        flipped = (found * wanted < 0).mean()
        poses.append([name, f"{np.median(away):.0f}", f"{away.mean():.1f}", f"{flipped:.2f}"])
        costs += [
            [name, line["seed"], " + ".join(map(str, line["steps"].values())), line["cpu_minutes"]]
            + [f"{line['validation_loss']:.4f}", f"{np.mean(line['psnr']):.2f}", f"{np.mean(line['mean']['psnr']):.2f}"]
            for line in lines
            if "seed" in line
        ]
    num_patients = len(next(iter(rows.values()))[0]["patients"])
    return "\n\n".join(
        [
            f"`{what}`, {minutes:g} minutes of one core each, after the autoencoder; {num_patients} test patients, "
            "source PA, one seeded sample of each view. PSNR in dB (of line integrals, range "
            f"{metrics.DATA_RANGE:g}), by |azimuth| of the target at elevation 0, and for targets elevated by ±15; "
            f"difference: to {REFERENCE!r}, paired over patients, with its standard error, and by training seed:",
            report.table([*heads, f"mean of {SAMPLES} samples", "difference", "by seed"], by_psnr),
            "SSIM:",
            report.table(heads, by_ssim),
            "The true view most like the synthesised one, in degrees from the one that was wanted, and the share of "
            "those on the other side of the source:",
            report.table(["", "median", "mean", "other side"], poses),
            f"What each run did; validation loss of {VALIDATION_PAIRS} pairs with the same noise at the last size:",
            report.table(
                ["", "seed", "steps", "minutes", "validation loss", "PSNR", f"mean of {SAMPLES} samples"], costs
            ),
            report.machine(1, PACKAGES),
        ]
    )


def trained_for(results: Results, data: str, what: str, minutes: str) -> dict[str, list[dict]]:
    """Of each variant that was given these minutes, its results, one for each seed."""
    rows: dict[str, list[dict]] = {}
    for key, line in results.lines.items():
        kind, *parts = key.split("/")
        if kind == "variant" and parts[:3] == [data, what, minutes]:
            rows.setdefault(parts[3], []).append({**line, "seed": int(parts[4])})
    return rows


def weak_to_strong(results: Results, data: str, what: str) -> str:
    """What the weak stage gains in all the times that were tried, as a small table in Markdown."""
    lines = []
    for minutes in sorted({key.split("/")[3] for key in results.lines if key.startswith("variant/")}, key=float):
        rows = trained_for(results, data, what, minutes)
        for name in [name for name in VARIANTS if name in rows and STRONG_ONLY in rows]:
            runs = rows[name]
            strong = [list(run["steps"].values())[-1] for run in runs]
            alone = {run["seed"]: list(run["steps"].values())[-1] for run in rows[STRONG_ONLY]}
            share = np.mean([1 - steps / alone[run["seed"]] for steps, run in zip(strong, runs, strict=True)])
            lines.append(
                [minutes, name, f"{100 * share:.0f} %"]
                + ["; ".join(" + ".join(map(str, run["steps"].values())) for run in runs)]
                + ["; ".join(f"{run['validation_loss']:.4f}" for run in runs)]
                + [f"**{np.mean([run['psnr'] for run in runs]):.2f}**", *_difference(rows, name, STRONG_ONLY)]
            )
    heads = ["minutes", "", "of them weak", "steps", "validation loss", "PSNR", f"to {STRONG_ONLY!r}", "by seed"]
    return "\n\n".join(
        [
            f"`{what}`, one core, after the autoencoder; {len(runs[0]['patients'])} test patients, PSNR in dB over all "
            "targets; differences are paired over patients, with their standard error:",
            report.table(heads, lines),
            report.machine(1, PACKAGES),
        ]
    )


def _by_tilt(lines: list[dict], tilts: list[int], metric: str, digits: int) -> list[str]:
    """Means over patients, seeds and both sides; then over targets with elevation; then over all."""
    values = np.mean([line[metric] for line in lines], axis=(0, 1))
    groups = [
        [index for index, (azimuth, elevation) in enumerate(TARGETS_DEG) if (abs(azimuth), elevation) == (tilt, 0)]
        for tilt in tilts
    ]
    groups.append([index for index, (_, elevation) in enumerate(TARGETS_DEG) if elevation])
    return [f"{values[group].mean():.{digits}f}" for group in groups] + [f"**{values.mean():.{digits + 1}f}**"]


def _psnr_of_mean(lines: list[dict]) -> str:
    return f"{np.mean([line['mean']['psnr'] for line in lines]):.2f}" if "mean" in lines[0] else ""


def _difference(rows: dict[str, list[dict]], name: str, to: str = REFERENCE) -> list[str]:
    """To that one at the same seeds: mean over patients with its standard error, and the mean of each seed."""
    reference = {line["seed"]: line for line in rows.get(to, [])}
    pairs = [(line, reference.get(line.get("seed"))) for line in rows[name]]
    if name == to or not all(other for _, other in pairs):
        return ["", ""]
    away = np.array([np.mean(line["psnr"], axis=1) - np.mean(other["psnr"], axis=1) for line, other in pairs])
    per_patient = away.mean(axis=0)
    error = per_patient.std(ddof=1) / len(per_patient) ** 0.5
    return [f"{per_patient.mean():+.2f} ± {error:.2f}", ", ".join(f"{one:+.2f}" for one in away.mean(axis=1))]


def few_shards(patients: Patients, folder: Path) -> Path:
    """A folder of few shards, made of links."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for shard in patients.train[:2]:
        (folder / shard.path.name).symlink_to(shard.path.resolve())
    listed = patients.train[0].path.with_name("splits.json")
    if listed.exists():
        (folder / listed.name).symlink_to(listed.resolve())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--orbit", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench-learning"))
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--sizes", help="of the preset's stages, with commas, where not its own")
    parser.add_argument("--only", default=",".join(VARIANTS), help="names, with commas; '' for none")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--document", type=Path, help="put the tables between this document's markers")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    if unknown := set(names) - VARIANTS.keys():
        parser.error(f"no variant {', '.join(unknown)}: there are {', '.join(VARIANTS)}")

    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    shards = open_folder(options.shards)
    own = [stage.size for stage in presets.preset(options.preset, 0).stages]
    sizes = [int(size) for size in options.sizes.split(",")] if options.sizes else own
    patients = read_patients(shards, open_folder(options.orbit or options.shards), sizes[-1])
    data = hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest()[:12]
    results = Results(options.out / "learning.jsonl")
    few = few_shards(patients, options.out / "few")
    bench = Bench(options.shards, few, options.out, results, data, options.minutes)
    measure(bench, patients, options.preset, sizes, names, [int(seed) for seed in options.seeds.split(",")])
    what = named(options.preset, sizes)
    if sizes == own:
        section, text = "learning", tables(results, data, what, options.minutes)
    else:
        section, text = "weak-to-strong", weak_to_strong(results, data, what)
    if options.document:
        report.publish(options.document, section, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
