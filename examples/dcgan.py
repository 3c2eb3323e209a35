"""Train a DCGAN, on scikit-learn's digits or on a folder of images, with any of fuseblock's losses and penalties.

    python examples/dcgan.py                                                    # digits: about 4 minutes on 2 cores
    python examples/dcgan.py --data photos/ --size 64 --epochs 200 --out out/photos
    python examples/dcgan.py --out out/dcgan --resume                           # goes on after a kill
    python examples/dcgan.py --device cuda --graphed                            # each step is one launch
    torchrun --nproc-per-node 2 examples/dcgan.py                               # DistributedDataParallel

Discriminator and generator take turns, a step each. Into ``--out`` go samples after every epoch (``samples/``), curves
of losses, D(x), D(G(z)) and gradient norms (``curves.png``), and ``checkpoint.pt``, replaced in one step: a kill at any
moment leaves a whole one. Samples are drawn with averaged weights. A checkpoint is gone on from with ``--resume``, with the
same options and images only, or removed with ``--overwrite``.

The options decide a run: same seed, threads and machine, same weights, bit by bit, also if it was killed and resumed. All
that is random comes from one generator per process, which checkpoints hold, and from permutations of the data, which
follow from seed and epoch.

With digits the end is a check: of 1000 samples, how many does a classifier take for a digit, and how many of each class?
It was trained on real digits and on junk made of them (`dcgan_report.Judge`); what it says of unseen real digits and unseen
junk is printed beside. The exit code is 1 if fewer than ``--require`` are accepted or a digit is missing, 2 if options,
images or checkpoint cannot be used.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dcgan_inputs import Parser, at_least, fingerprint, load_digits, load_folder, number, refuse
from dcgan_report import Judge, plot, save_grid
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fuseblock
from fuseblock import gan

SAMPLES = 100
METRICS = ("D loss", "penalty", "G loss", "D(x)", "D(G(z))", "D(G(z)) in G", "D gradient", "G gradient")
PENALTIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "r1": ("r1",),
    "r2": ("r2",),
    "r1+r2": ("r1", "r2"),
    "wgan-gp": ("wgan-gp",),
}
#: Options that may differ between a run and its resumption.
FREE = ("epochs", "out", "resume", "overwrite", "require", "checkpoint_every", "threads")
#: What a checkpoint holds.
CHECKPOINT = {"options", "images", "step", "history", "random", "parts"}


@dataclass(frozen=True)
class World:
    """Who computes: this process among how many, and where."""

    rank: int
    size: int
    device: torch.device

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size


@contextmanager
def world(device: str) -> Iterator[World]:
    """One process, or those of torchrun."""
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, torch.device(device))
        return
    place = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()


class Trainer:
    """Networks, optimizers, averages, random numbers and records of one run: all that a checkpoint holds."""

    def __init__(self, images: Tensor, args: argparse.Namespace, place: World) -> None:
        self.args, self.place = args, place
        self.fingerprint = fingerprint(images)
        self.images = images.to(place.device)
        self.batch = args.batch // place.size
        self.steps_per_epoch = len(images) // args.batch
        if not self.steps_per_epoch:
            refuse(f"--batch {args.batch}: more than there are images, {len(images)}")
        if args.batch % place.size or self.batch < 2:
            refuse(
                f"--batch {args.batch}: expected 2 images or more, equally many, for {place.size} processes"
            )
        if args.graphed and place.size > 1:
            refuse("--graphed: for one process; DistributedDataParallel needs more preparation")
        torch.manual_seed(args.seed)
        channels = images.shape[1]
        self.penalties: list[nn.Module] = [
            {"r1": gan.R1Penalty, "r2": gan.R2Penalty, "wgan-gp": gan.WGANGPPenalty}[name](args.gamma)
            for name in PENALTIES[args.penalty]
        ]
        norm = {"auto": None if self.penalties else "batch", "none": None}.get(args.norm, args.norm)
        self.generator = gan.DCGANGenerator(args.size, channels, args.width, args.latent).to(place.device)
        self.discriminator = gan.DCGANDiscriminator(args.size, channels, args.width, norm=norm).to(
            place.device
        )
        self.ema = gan.ExponentialMovingAverage(self.generator, args.ema, warmup=True)
        self.loss = gan.LOSSES[args.loss]()
        betas = (args.beta1, args.beta2)
        # Where steps are CUDA graphs, the optimizers count their steps on the GPU.
        capturable = args.graphed and place.device.type == "cuda"
        self.generator_optimizer, self.discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), args.lr, betas, capturable=capturable)
            for network in (self.generator, self.discriminator)
        )
        # The wrapped networks are called where gradients of their parameters follow, and share them between processes.
        self.wrapped_generator: nn.Module = self.generator
        self.wrapped_discriminator: nn.Module = self.discriminator
        if place.size > 1:
            self.wrapped_generator = DistributedDataParallel(self.generator)
            self.wrapped_discriminator = DistributedDataParallel(self.discriminator)
        self.random = torch.Generator(place.device).manual_seed(args.seed * 1_000_003 + place.rank)
        self.discriminator_step, self.generator_step = self.train_discriminator, self.train_generator
        if args.graphed:
            random = [self.random] if place.device.type == "cuda" else []
            self.discriminator_step = fuseblock.graphed(self.train_discriminator, generators=random)
            self.generator_step = fuseblock.graphed(
                self.train_generator, generators=random, pool=self.discriminator_step
            )
        self.step = 0
        self.history: dict[str, list[float]] = {name: [] for name in METRICS}
        self.pending: list[Tensor] = []

    def noise(self, count: int) -> Tensor:
        """Latents, from this process' random numbers."""
        return torch.randn(count, self.args.latent, generator=self.random, device=self.place.device)

    def batch_at(self, step: int) -> Tensor:
        """The real images of a step, this process' share: a function of seed and step, so nothing has to be saved."""
        epoch, position = divmod(step, self.steps_per_epoch)
        shuffle = torch.Generator().manual_seed(self.args.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.images), generator=shuffle)
        start = position * self.args.batch + self.place.rank * self.batch
        chosen = self.images[order[start : start + self.batch].to(self.images.device)]
        return chosen if chosen.is_floating_point() else chosen.float() / 127.5 - 1.0

    def train_step(self) -> None:
        """One step of the discriminator, then one of the generator."""
        real = self.batch_at(self.step)
        record = self.discriminator_step(real) | self.generator_step(real)
        self.ema.update(self.generator)
        self.step += 1
        # Read at the end of an epoch only: on a GPU every number read waits for it.
        self.pending.append(torch.stack([record[name].detach().float() for name in METRICS]))

    def train_discriminator(self, real: Tensor) -> dict[str, Tensor]:
        """Two forwards and those of the penalties, one backward."""
        with torch.no_grad():
            fake = self.generator(self.noise(len(real)))
        real_logits, fake_logits = self.wrapped_discriminator(real), self.wrapped_discriminator(fake)
        loss = self.loss.discriminator_loss(real_logits, fake_logits)
        penalty = loss.new_zeros(())
        for module in self.penalties:
            random = {"generator": self.random} if isinstance(module, gan.WGANGPPenalty) else {}
            penalty = penalty + module(self.wrapped_discriminator, real, fake, **random)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        norm = gradient_norm(self.discriminator)
        self.discriminator_optimizer.step()
        return {
            "D loss": loss,
            "penalty": penalty,
            "D(x)": self.opinion(real_logits),
            "D(G(z))": self.opinion(fake_logits),
            "D gradient": norm,
        }

    def train_generator(self, real: Tensor) -> dict[str, Tensor]:
        """One forward through both, one backward; the discriminator stands still."""
        self.discriminator.requires_grad_(False)
        fake_logits = self.discriminator(self.wrapped_generator(self.noise(len(real))))
        real_logits = None
        if self.loss.needs_real:
            with torch.no_grad():
                real_logits = self.discriminator(real)
        loss = self.loss.generator_loss(fake_logits, real_logits)
        self.generator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = gradient_norm(self.generator)
        self.generator_optimizer.step()
        self.discriminator.requires_grad_(True)
        return {"G loss": loss, "D(G(z)) in G": self.opinion(fake_logits), "G gradient": norm}

    def opinion(self, logits: Tensor) -> Tensor:
        """What D says on average: a probability of being real where the loss makes it one."""
        return (logits.sigmoid() if self.loss.is_probability else logits).mean()

    def record(self) -> None:
        """Move the records of steps since the last call into the history, averaged over processes."""
        if not self.pending:
            return
        values = self.place.mean(torch.stack(self.pending)).T.tolist()
        for name, row in zip(METRICS, values, strict=True):
            self.history[name] += row
        self.pending.clear()

    def sample(self, count: int) -> Tensor:
        """Images of fixed latents by the averaged generator; touches no random numbers of the training."""
        random = torch.Generator().manual_seed(self.args.seed)
        latents = torch.randn(count, self.args.latent, generator=random).to(self.place.device)
        with torch.no_grad(), self.ema.swapped_in(self.generator):
            self.generator.eval()
            images = torch.cat([self.generator(part) for part in latents.split(100)])
            self.generator.train()
        return images.cpu()

    def parts(self) -> dict[str, Any]:
        """What has a state_dict."""
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema,
            "generator_optimizer": self.generator_optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint beside the old one, then put it in its place in one step."""
        self.record()
        own = [self.random.get_state(), torch.get_rng_state()]
        states = [own]
        if self.place.size > 1:
            states = [[] for _ in range(self.place.size)]
            dist.all_gather_object(states, own)
        if not self.place.writes:
            return
        checkpoint = {
            "options": options(self.args),
            "images": self.fingerprint,
            "step": self.step,
            "history": self.history,
            "random": states,
            "parts": {name: part.state_dict() for name, part in self.parts().items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go back to where a checkpoint was written, exactly."""
        if checkpoint["images"] != self.fingerprint:
            refuse(f"--resume: begun with other images: {checkpoint['images']}; now {self.fingerprint}")
        if len(checkpoint["random"]) != self.place.size:
            refuse(f"--resume: begun by {len(checkpoint['random'])} processes, now {self.place.size}")
        for name, part in self.parts().items():
            part.load_state_dict(checkpoint["parts"][name])
        own, default = checkpoint["random"][self.place.rank]
        self.random.set_state(own)
        torch.set_rng_state(default)
        self.step, self.history = checkpoint["step"], checkpoint["history"]


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide a run."""
    return {name: value for name, value in vars(args).items() if name not in FREE}


def read_checkpoint(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint to resume from: a whole one, written with the same options."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever broken bytes lead it to
        refuse(f"{path}: broken, cannot be resumed ({type(error).__name__}); --overwrite begins anew")
    if not isinstance(checkpoint, dict) or checkpoint.keys() != CHECKPOINT:
        refuse(f"{path}: not a checkpoint of this program; --overwrite begins anew")
    then, now = checkpoint["options"], options(args)
    changed = [name for name in sorted(then | now) if then.get(name) != now.get(name)]
    if changed:
        was = (f"--{name.replace('_', '-')} {then.get(name)}, now {now.get(name)}" for name in changed)
        refuse(f"{path}: written with other options: {'; '.join(was)}")
    return checkpoint


def gradient_norm(model: nn.Module) -> Tensor:
    """Euclidean norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@contextmanager
def progress(total: int, done: int, visible: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar over steps, if rich is there; what it gives is called after each with a description."""
    if not visible:
        yield lambda text: None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        print("training ... (install rich for a progress bar)")
        yield lambda text: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("epoch 1", total=total, completed=done)
        yield lambda text: bar.update(task, advance=1, description=text)


def train(trainer: Trainer, args: argparse.Namespace) -> None:
    """All epochs that are left, with samples and a checkpoint after each."""
    checkpoint, writes = args.out / "checkpoint.pt", trainer.place.writes
    total = args.epochs * trainer.steps_per_epoch
    every = args.checkpoint_every or trainer.steps_per_epoch
    with progress(total, trainer.step, writes) as tick:
        while trainer.step < total:
            trainer.train_step()
            epoch, position = divmod(trainer.step, trainer.steps_per_epoch)
            if position == 0:
                trainer.record()
                if writes:
                    save_grid(trainer.sample(SAMPLES), args.out / "samples" / f"epoch-{epoch:04d}.png")
            if trainer.step % every == 0 or trainer.step == total:
                trainer.save(checkpoint)
            losses = {name: values[-1] for name, values in trainer.history.items() if values}
            text = f"epoch {min(epoch + 1, args.epochs)}/{args.epochs}"
            if losses:
                text += f"  D {losses['D loss']:.3f}  G {losses['G loss']:.3f}"
            tick(text)


def judge(trainer: Trainer, referee: Judge, require: float) -> bool:
    """Print how many of 1000 samples are digits, and which; whether that is enough."""
    verdict = referee(trainer.sample(1000))
    print(
        "judge: a support vector machine trained on real digits and on junk made of them; accepted: taken for a digit\n"
        f"  unseen real digits: {referee.accepts_real:.1%} accepted, {referee.accuracy:.1%} as the digit they are; "
        f"unseen junk: {referee.accepts_junk:.1%} accepted"
    )
    classes = sum(count > 0 for count in verdict.counts)
    enough = verdict.accepted >= require and classes == 10
    print(
        f"  1000 samples: {verdict.accepted:.1%} accepted (asked: {require:.0%}), {classes} of 10 digits appear "
        f"({', '.join(f'{digit}: {count}' for digit, count in enumerate(verdict.counts))}): "
        f"{'passed' if enough else 'FAILED'}"
    )
    return enough


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    positive = number(float, "a number above 0", lambda value: 0 < value < float("inf"))
    weight = number(float, "a number from 0 on", lambda value: 0 <= value < float("inf"))
    decay = number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
    share = number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
    seed = number(int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)
    threads = number(int, "a whole number from 1 to 1024", lambda value: 1 <= value <= 1024)
    sizes = [8 << doublings for doublings in range(8)]

    parser = Parser(description="Train a DCGAN on digits or on a folder of images.")
    parser.add_argument("--data", default="digits", help="'digits', or a folder of images")
    parser.add_argument("--gray", action="store_true", help="one channel instead of three (folders)")
    parser.add_argument("--size", type=int, choices=sizes, default=32, help="of images; digits: up to 32")
    parser.add_argument("--loss", choices=gan.LOSSES, default="relativistic")
    parser.add_argument("--penalty", choices=PENALTIES, default="r1")
    parser.add_argument("--gamma", type=weight, default=0.5, help="weight of the penalties")
    parser.add_argument(
        "--norm",
        choices=("auto", "batch", "instance", "none"),
        default="auto",
        help="of the discriminator; auto: batch without penalty, none with one",
    )
    parser.add_argument("--width", type=at_least(1), default=20, help="channels at half the size")
    parser.add_argument("--latent", type=at_least(1), default=24, help="random numbers per image")
    parser.add_argument(
        "--batch", type=at_least(2), default=64, help="images per step, of all processes together"
    )
    parser.add_argument("--epochs", type=at_least(1), default=150)
    parser.add_argument("--lr", type=positive, default=2e-3)
    parser.add_argument("--beta1", type=decay, default=0.0)
    parser.add_argument("--beta2", type=decay, default=0.99)
    parser.add_argument("--ema", type=decay, default=0.998, help="decay of the averaged weights")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--graphed",
        action="store_true",
        help="steps as CUDA graphs (on a CPU: eagerly, under the same rules)",
    )
    parser.add_argument("--threads", type=threads, default=None, help="default: PyTorch's")
    parser.add_argument("--out", type=Path, default=Path("out/dcgan"))
    parser.add_argument("--checkpoint-every", type=at_least(1), help="steps; default: every epoch")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from --out, if there is a checkpoint")
    again.add_argument("--overwrite", action="store_true", help="begin anew, remove the checkpoint in --out")
    parser.add_argument(
        "--require", type=share, default=0.5, help="share of accepted digits below which to fail"
    )
    args = parser.parse_args(argv)
    if args.data == "digits" and args.size > 32:
        parser.error(f"--size {args.size}: digits come in sizes 8, 16 and 32")
    if args.data != "digits" and not Path(args.data).is_dir():
        parser.error(f"--data {args.data}: neither 'digits' nor a folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    return args


def open_out(args: argparse.Namespace) -> dict[str, Any] | None:
    """Make the folder for results; gives the checkpoint in it, if there is one to resume from."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {args.out}: {error.strerror}")
    checkpoint = args.out / "checkpoint.pt"
    if args.overwrite or not checkpoint.exists():
        return None
    if not args.resume:
        refuse(
            f"{checkpoint} exists: --resume goes on from it, --overwrite removes it; or give another --out"
        )
    return read_checkpoint(checkpoint, args)


def report(trainer: Trainer, args: argparse.Namespace) -> None:
    """Samples and curves of the whole run."""
    written = ["checkpoint.pt", "samples.png", "samples/"]
    save_grid(trainer.sample(SAMPLES), args.out / "samples.png")
    try:
        name = "probability of real" if trainer.loss.is_probability else "logit"
        plot(trainer.history, f"{args.loss}, {args.penalty}", name, args.out / "curves.png")
        written.append("curves.png")
    except ImportError:
        print("no curves: matplotlib is not installed")
    print(f"wrote {args.out}/: {', '.join(written)}")


def main(argv: list[str] | None = None) -> int:
    """Train, show, and judge digits; 0 if they pass."""
    args = parse(argv)
    checkpoint = open_out(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    labels = None
    if args.data == "digits":
        images, labels = load_digits(args.size)
    else:
        images = load_folder(Path(args.data), args.size, args.gray)
    if args.device != "cpu":
        torch.backends.cudnn.deterministic = True
    with world(args.device) as place:
        trainer = Trainer(images, args, place)
        if checkpoint is not None:
            trainer.load(checkpoint)
        elif args.overwrite and place.writes:
            for old in (args.out / "checkpoint.pt", *(args.out / "samples").glob("epoch-*.png")):
                old.unlink(missing_ok=True)
        begin, first = time.perf_counter(), trainer.step
        train(trainer, args)
        seconds, steps = time.perf_counter() - begin, trainer.step - first
        if not place.writes:
            return 0
        print(
            f"{tuple(images.shape)} images, {args.loss} loss, penalty {args.penalty}: {steps} steps of {args.batch} in "
            f"{seconds:.0f} s, {place.size} processes, {torch.get_num_threads()} threads"
        )
        report(trainer, args)
        return 0 if labels is None or judge(trainer, Judge(images, labels), args.require) else 1


if __name__ == "__main__":
    sys.exit(main())
