"""Ours against the reference: the unmodified script of a checkout of diffusers, with one command line for both.

    python benchmarks/peers.py --reference DIFFUSERS --data PHOTOS [--kohya SD_SCRIPTS] [--rounds 3] [--only start,...]

Both programs run as processes of their own, in turn, with one base model and one folder of pictures; `launch.py` notes
from outside when each takes an optimizer step. The reference imports torchvision, kohya's files cv2, einops, imagesize,
toml and voluptuous too: where they are not installed, name folders that have them in PEER_PATH. Before anything counts
the first 20 steps of the reference are taken again by ours, from the same weights and on the same tensors: each loss
has to be the same within 0.1 %.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common

from sdxl_trainer import blueprint

HERE = Path(__file__).parent
SCRIPT = "train_text_to_image_sdxl.py"


@dataclass(frozen=True)
class Setting:
    """Where things are, and how often each is measured."""

    place: Path
    reference: Path
    base: Path
    data: Path
    rounds: int
    batch: int = 4
    resolution: int = 256
    pictures: int = 256
    kohya: Path | None = None

    def script(self, who: str) -> Path:
        return (HERE.parent / "scripts" if who == "ours" else self.reference / "examples" / "text_to_image") / SCRIPT


@dataclass(frozen=True)
class Seen:
    """What one process did: seconds from its start to each optimizer step, and in all."""

    steps: list[float]
    stages: list[float]
    peak_bytes: int
    recorded: Path

    @property
    def each(self) -> list[float]:
        return [b - a for a, b in zip(self.steps, self.steps[1:], strict=False)]


def run(setting: Setting, who: str, output: str, steps: int, mode: str = "", weigh: bool = False, **flags: Any) -> Seen:
    """One process with the reference's command line, from its start to its end. `weigh`: look at the memory of the
    processes that it starts too."""
    folder = setting.place / f"{who}-{output}"
    events = setting.place / f"{who}-{output}-{time.monotonic_ns()}.jsonl"
    given = {
        "pretrained_model_name_or_path": setting.base,
        "train_data_dir": setting.data,
        "resolution": setting.resolution,
        "train_batch_size": setting.batch,
        "max_train_steps": steps,
        "learning_rate": 1e-5,
        "lr_warmup_steps": 0,
        "checkpointing_steps": 100000,
        "seed": 0,
        "output_dir": folder,
        **flags,
    }
    line = [f"--{name}={value}" if value is not True else f"--{name}" for name, value in given.items()]
    command = [sys.executable, str(HERE / "launch.py"), str(events), str(setting.script(who)), "--center_crop", *line]
    extra = os.environ.get("PEER_PATH", "") if who == "reference" else str(HERE.parent)
    home = {
        "OURS": "1" * (who == "ours"),
        "HF_HOME": str(setting.place / "hub"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "MODE": mode,
    }
    began, heaviest = time.time(), 0
    with events.with_suffix(".log").open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            command, env={**os.environ, **home, "PYTHONPATH": extra}, stdout=said, stderr=subprocess.STDOUT
        )
        while weigh and process.poll() is None:
            heaviest = max(heaviest, resident(process.pid))
            time.sleep(0.05)
        if process.wait():
            said.seek(0)
            raise SystemExit(f"{who} ended with {process.returncode}:\n{said.read()[-3000:]}")
    rows = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    at = [row["at"] - began for row in rows if row["event"] == "step"]
    stages = [row["seconds"] for row in rows if row["event"] == "stage" and row["at"] < at[0] + began]
    return Seen(at, stages, max(heaviest, rows[-1]["peak_bytes"]), events.with_suffix(".pt"))


def resident(process: int) -> int:
    """Bytes that a process and those that it started hold; what several of them share counts once."""
    import psutil

    found = 0
    try:
        family = [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    for one in family:
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:  # it has just ended
            continue
        found += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return found


def both(setting: Setting, measure: Callable[[str], float]) -> dict[str, list[float]]:
    """The same measured of both in turn."""
    found: dict[str, list[float]] = {"reference": [], "ours": []}
    for _ in range(setting.rounds):
        for who, values in found.items():
            values.append(measure(who))
    return found


def outcome(found: dict[str, list[float]], **facts: Any) -> dict[str, Any]:
    return {**found, "times_faster": common.ratio(found, "reference", "ours"), **facts}


def gate(setting: Setting) -> dict[str, Any]:
    """Our step on the tensors that the reference's first steps saw."""
    import torch

    from sdxl_trainer import objective, schedule
    from sdxl_trainer import unet as unets
    from sdxl_trainer.config import Objective

    seen = run(setting, "reference", "gate", 20, mode="record")
    unet = unets.UNet.from_pretrained(setting.base / "unet")[0].train()
    noise = schedule.from_scheduler_config(
        json.loads((setting.base / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")), False
    )
    goal = objective.Objective(noise, "epsilon", Objective())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2, fused=True)
    apart = 0.0
    steps = torch.load(seen.recorded, weights_only=True)
    for step in steps:
        latents, drawn, timesteps = step["latents"], step["noise"], step["timesteps"]
        noisy = noise.add_noise(latents, drawn, timesteps)
        added = {"text_embeds": step["text_embeds"], "time_ids": step["time_ids"].long()}
        prediction = unet(noisy, timesteps, step["states"], added)[0]
        loss = goal.loss(prediction, latents, drawn, timesteps).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        apart = max(apart, abs(float(loss.detach()) / float(step["loss"]) - 1))
    if apart > 1e-3:
        raise SystemExit(f"losses are {apart:.2%} apart: a faster wrong answer does not count")
    return {"steps": len(steps), "losses_apart": apart}


def start(setting: Setting) -> dict[str, Any]:
    """Seconds from the start of the process to its first optimizer step, with everything cached."""
    for who in ("reference", "ours"):
        run(setting, who, "start", 1)
    return outcome(both(setting, lambda who: run(setting, who, "start", 1).steps[0]))


def steps(setting: Setting) -> dict[str, Any]:
    """Seconds per step, the first two left out."""
    counts = {"reference": 6, "ours": 40}
    return outcome(both(setting, lambda who: statistics.median(run(setting, who, "steps", counts[who]).each[2:])))


def camera(setting: Setting) -> dict[str, Any]:
    """The same for photographs of 24 megapixels, as cameras make them."""
    place = setting.place / "camera"
    place.mkdir()
    return steps(replace(setting, data=photographs(setting, 16, (4000, 6000)), place=place))


def memory(setting: Setting) -> dict[str, Any]:
    """The most memory that a run takes which has to encode its pictures, and one that finds them encoded."""
    found: dict[str, dict[str, int]] = {"caching": {}, "training": {}}
    for who in ("reference", "ours"):
        fresh = replace(setting, place=setting.place / f"memory-{who}")
        fresh.place.mkdir()
        for stage in found:
            found[stage][who] = run(fresh, who, "memory", 8, weigh=True).peak_bytes
    shares = {stage: peaks["ours"] / peaks["reference"] for stage, peaks in found.items()}
    return {"peak_bytes": found, "share": shares}


def resume(setting: Setting) -> dict[str, Any]:
    """Seconds from the start of the process to the step after the one that was saved."""
    for who in ("reference", "ours"):
        run(setting, who, "resume", 2, checkpointing_steps=2)

    def measure(who: str) -> float:
        """The last checkpoint is continued by one step, and that is saved in its turn."""
        reached = max(int(p.name.rpartition("-")[2]) for p in (setting.place / f"{who}-resume").glob("checkpoint-*"))
        flags = {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
        return run(setting, who, "resume", reached + 1, **flags).steps[0]

    return outcome(both(setting, measure))


def caching(setting: Setting) -> dict[str, Any]:
    """Seconds from the end of a program's imports until everything is encoded (it reads the data, loads tokenizers,
    encoders and VAE, and encodes), for photographs of 1024 x 1280 and text of SDXL's widths: at first, when the same
    command is given again, and when it is given with another learning rate. Beside them, those from the start of the
    process to the first step. Each round begins with nothing."""
    large = replace(setting, base=build(setting, "wide", WIDE), data=photographs(setting, setting.pictures))
    commands = {"first": 1e-5, "again": 1e-5, "other_learning_rate": 2e-5}
    stages: dict[str, dict[str, list[float]]] = {name: {"reference": [], "ours": []} for name in commands}
    steps: dict[str, dict[str, list[float]]] = {name: {"reference": [], "ours": []} for name in commands}
    for number in range(setting.rounds):
        fresh = replace(large, place=setting.place / f"caching-{number}")
        fresh.place.mkdir()
        for who, mode in (("reference", "stages"), ("ours", "")):
            for name, rate in commands.items():
                seen = run(fresh, who, "caching", 1, mode=mode, learning_rate=rate)
                stages[name][who].append(encoding(fresh) if who == "ours" else sum(seen.stages))
                steps[name][who].append(seen.steps[0])
    seconds, to_step = (
        {name: {who: statistics.median(values) for who, values in found.items()} for name, found in measured.items()}
        for measured in (stages, steps)
    )
    times = {name: found["reference"] / found["ours"] for name, found in seconds.items()}
    facts = {"of_rounds": stages, "pictures": setting.pictures, "resolution": setting.resolution}
    firsts = {"to_first_step": to_step["first"], "to_first_step_again": to_step["again"]}
    return {"seconds": seconds, "times_faster": times, **firsts, **facts}


def encoding(setting: Setting) -> float:
    """What our run says that it spent on looking at the data and on encoding."""
    timings = json.loads((setting.place / "ours-caching" / "manifest.json").read_text(encoding="utf-8"))["timings"]
    return sum(timings[name] for name in ("reading the data", "encoding"))


def photographs(setting: Setting, count: int, size: tuple[int, int] = (1024, 1280)) -> Path:
    """`count` JPEGs of so many pixels, cut out of those that there are."""
    from PIL import Image

    folder = setting.place / f"photographs-{size[0]}"
    if folder.is_dir():
        return folder
    folder.mkdir()
    rows = [json.loads(line) for line in (setting.data / "metadata.jsonl").read_text("utf-8").splitlines()]
    for number in range(count):
        row = rows[number % len(rows)]
        with Image.open(setting.data / row["file_name"]) as picture:
            side = size[1] + 64 * (number // len(rows))
            whole = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        whole.crop((0, 0, *size)).save(folder / f"{number}.jpg", quality=92)
    lines = (json.dumps({"file_name": f"{n}.jpg", "text": rows[n % len(rows)]["text"]}) for n in range(count))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def pipeline(setting: Setting) -> dict[str, Any]:
    """Seconds per sample of the input pipeline alone, at the shapes of SDXL at 1024 pixels. The others draw the noise
    of a step on the device, ours ahead of it: that is left out of the comparison, and measured beside it."""
    wide = replace(setting, base=build(setting, "wide", WIDE), resolution=1024, batch=4)
    flags = {"max_train_samples": 16}
    found: dict[str, list[float]] = {"reference": [], "kohya": [], "ours": [], "ours_with_noise": []}
    run(wide, "reference", "pipeline", 5, mode="pipeline", **flags)
    read = reader(wide)
    for _ in range(setting.rounds):
        seen = run(wide, "reference", "pipeline", 5, mode="pipeline", **flags)
        found["reference"].append(statistics.median(seen.each[1:]) / wide.batch)
        if setting.kohya:
            found["kohya"].append(kohya(setting))
        found["ours"].append(read(False))
        found["ours_with_noise"].append(read(True))
    against = {"times_faster_than_kohya": common.ratio(found, "kohya", "ours")} if setting.kohya else {}
    return outcome({name: values for name, values in found.items() if values}, **against)


def kohya(setting: Setting) -> float:
    """Seconds per sample of kohya's data set with everything cached, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "kohya.py"), str(setting.kohya), folder]
        environment = {**os.environ, "PYTHONPATH": os.environ.get("PEER_PATH", "")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kohya ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def reader(setting: Setting) -> Callable[[bool], float]:
    """Reads 64 batches of our rows, an epoch, as training does, with noise or zeros in its place; gives seconds per
    sample, the median of five epochs after a first, as `kohya.py` does."""
    import torch

    from sdxl_trainer import noise, setup
    from sdxl_trainer.configfile import validated
    from sdxl_trainer.data import loader
    from sdxl_trainer.run import CONTINUE
    from sdxl_trainer.threads import keep_freed_memory

    keep_freed_memory()
    tree = {
        "output_dir": str(setting.place / "ours-pipeline"),
        "model": {"path": str(setting.base)},
        "data": [
            {
                "path": str(setting.data),
                "resolution": setting.resolution,
                "max_samples": 16,
                "max_upscale": 9.0,
                "repeats": setting.batch * 4,
            }
        ],
        "train": {"steps": 64, "batch_size": setting.batch},
    }
    job = setup.prepare_job(validated(tree, "benchmark"), CONTINUE)
    assert job is not None

    drawn = noise.normals

    def read(noisy: bool) -> float:
        noise.normals = drawn if noisy else lambda purpose, keys, shape: torch.empty(len(keys), *shape)
        taken = list[float]()
        for _ in range(6):
            began = time.perf_counter()
            for _ in loader.steps(job.samples, job.order, 0, 64, setting.batch, 0, 1, workers=0, pin=False):
                pass
            taken.append(time.perf_counter() - began)
        noise.normals = drawn
        return statistics.median(taken[1:]) / (64 * setting.batch)

    return read


def build(setting: Setting, name: str, size: str | blueprint.Size) -> Path:
    """A base with random weights, whose tokenizers know the captions."""
    target = setting.place / f"base-{name}"
    if not (target / "model_index.json").is_file():
        lines = (setting.data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        blueprint.build(target, size, captions=[json.loads(line)["text"] for line in lines])
    return target


TINY = blueprint.SIZES["tiny"]
# The widths that decide what is cached are SDXL's, all else is small.
WIDE = replace(
    TINY,
    text_1=blueprint.TextSize(768, layers=2, heads=12, intermediate=768, projection=768),
    text_2=blueprint.TextSize(1280, layers=2, heads=20, intermediate=1280, projection=1280),
    resolution=1024,
)
BENCHMARKS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "gate": gate,
    "start": start,
    "steps": steps,
    "camera": camera,
    "resume": resume,
    "pipeline": pipeline,
    "caching": caching,
    "memory": memory,
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--reference", type=Path, required=True, help="checkout of diffusers")
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures with metadata.jsonl")
    parser.add_argument("--kohya", type=Path, help="checkout of sd-scripts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="some of " + ", ".join(BENCHMARKS))
    parser.add_argument("--pictures", type=int, default=256, help="how many are encoded")
    options = parser.parse_args()
    path = common.RESULTS / "peers.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), options.reference.resolve(), Path(), options.data.resolve(), options.rounds)
        kohyas = options.kohya and options.kohya.resolve()
        setting = replace(setting, base=build(setting, "tiny", "tiny"), pictures=options.pictures, kohya=kohyas)
        for name in options.only.split(","):
            began = time.monotonic()
            result[name] = {"rounds": options.rounds, **BENCHMARKS[name](setting)}
            result["script"] = common.sha256(setting.script("reference"))
            common.write("peers", result)
            print(name, json.dumps(result[name].get("times_faster", result[name])), f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
