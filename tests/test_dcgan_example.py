"""The DCGAN example: tiny runs, resumed after a kill, under torchrun, with every loss and penalty; its judge."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import textwrap
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = ["--size", "8", "--width", "4", "--latent", "8", "--batch", "256", "--threads", "1"]


@pytest.fixture(scope="module")
def dcgan():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("dcgan")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainer(dcgan):
    def build(*options):
        args = dcgan.parse([*TINY, *options])
        images, _ = dcgan.load_digits(args.size)
        return dcgan.Trainer(images, args, dcgan.World(0, 1, torch.device("cpu")))

    return build


def python(*command, timeout=120):
    """A process with the examples on its path; it leaves the threads of the tests alone."""
    prologue = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
    *options, script = command
    return subprocess.run(
        [sys.executable, *options, "-c", prologue + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def leaves(value, path=""):
    """All values in nested dicts and lists, by path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in leaves(item, f"{path}/{key}").items()}
    return {path: value}


def assert_same_checkpoint(a, b):
    """Bit by bit: weights, averages, optimizers, random numbers, records."""
    first, second = (leaves(torch.load(path / "checkpoint.pt", weights_only=True)) for path in (a, b))
    assert first.keys() == second.keys()
    assert any("exp_avg" in name for name in first) and any("random" in name for name in first)
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name


def test_killed_and_resumed_is_uninterrupted(dcgan, tmp_path, capsys):
    """The kill comes in the middle of an epoch of 7 steps, and of writing the third checkpoint."""
    options = [*TINY, "--epochs", "2", "--penalty", "wgan-gp", "--checkpoint-every", "3"]
    assert dcgan.main([*options, "--out", str(tmp_path / "whole")]) == 1, "14 steps make no digits"
    killed = python(
        f"""
        import io, os, signal, dcgan, torch
        whole, written = torch.save, []

        def save(value, file):
            whole(value, buffer := io.BytesIO())
            written.append(len(buffer.getvalue()))
            file.write(buffer.getvalue()[: written[-1] // (2 if len(written) == 3 else 1)])
            if len(written) == 3:
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save
        dcgan.main([*{options!r}, "--out", {str(tmp_path / "killed")!r}])
        """
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert left["step"] == 6
    assert (tmp_path / "killed" / "checkpoint.unfinished").exists()
    capsys.readouterr()
    dcgan.main([*options, "--out", str(tmp_path / "killed"), "--resume"])
    assert " 8 steps of 256" in capsys.readouterr().out
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "killed")
    for name in ("samples.png", "samples/epoch-0001.png", "samples/epoch-0002.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "killed" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_torchrun(tmp_path):
    """Batch norm, two forwards and one backward; equal weights everywhere; resumed as uninterrupted; one process writes."""
    options = [*TINY, "--penalty", "none", "--loss", "non-saturating"]
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import contextlib, sys
            sys.path.insert(0, {str(EXAMPLES)!r})
            import dcgan, torch
            from pathlib import Path

            class Spy(dcgan.Trainer):
                def save(self, path):
                    super().save(path)
                    networks = [*self.generator.parameters(), *self.discriminator.parameters()]
                    torch.save([p.detach() for p in networks], Path({str(tmp_path)!r}) / f"rank{{self.place.rank}}.pt")

            dcgan.Trainer, dcgan.plot, dcgan.judge = Spy, lambda *_: None, lambda *_: True
            two = ("--epochs", "2")
            with dcgan.world("cpu") as place:  # one group for all three runs
                dcgan.world = lambda _: contextlib.nullcontext(place)
                for out, *more in (("whole", *two), ("parts", "--epochs", "1"), ("parts", *two, "--resume")):
                    dcgan.main([*{options!r}, "--out", str(Path({str(tmp_path)!r}) / out), *more])
                torch.distributed.barrier()
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 3
    assert done.stdout.count("14 steps") == 1 and done.stdout.count(" 7 steps") == 2
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))
    states = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)["random"]
    assert len(states) == 2 and not torch.equal(states[0][0], states[1][0]), (
        "each process draws its own noise"
    )


def test_every_loss_and_penalty(dcgan, trainer):
    for loss, penalty in product(dcgan.gan.LOSSES, dcgan.PENALTIES):
        run = trainer("--loss", loss, "--penalty", penalty)
        before = [
            p.detach().clone() for model in (run.generator, run.discriminator) for p in model.parameters()
        ]
        run.train_step()
        run.record()
        after = [p for model in (run.generator, run.discriminator) for p in model.parameters()]
        assert all((a != b).any() for a, b in zip(before, after, strict=True)), (loss, penalty)
        assert all(p.requires_grad for p in after)
        values = {name: value for name, (value,) in run.history.items()}
        assert all(torch.tensor(value).isfinite() for value in values.values()), values
        assert (values["penalty"] > 0) == (penalty != "none")
        assert values["D gradient"] > 0 and values["G gradient"] > 0
        if run.loss.is_probability:
            assert all(0 < values[name] < 1 for name in ("D(x)", "D(G(z))", "D(G(z)) in G"))


def test_seeds(trainer):
    weights = []
    for seed in ("0", "0", "1"):
        run = trainer("--seed", seed)
        run.train_step()
        weights.append(next(run.generator.parameters()).detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_sampling_leaves_the_training_alone(trainer):
    run = trainer()
    for _ in range(2):
        run.train_step()
    assert run.ema.updates == 2
    before = leaves({name: part.state_dict() for name, part in run.parts().items()})
    before = {name: value.clone() for name, value in before.items() if isinstance(value, torch.Tensor)}
    drawn = run.random.get_state()
    noise = run.noise(3)
    run.random.set_state(drawn)
    torch.rand(1)
    assert torch.equal(noise, run.noise(3)), "noise is this process' own, not the default generator's"
    run.random.set_state(drawn)
    first, second = run.sample(5), run.sample(5)
    assert torch.equal(first, second)
    after = leaves({name: part.state_dict() for name, part in run.parts().items()})
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(drawn, run.random.get_state())
    assert run.generator.training


def test_an_epoch_shows_every_image_once(dcgan):
    args = dcgan.parse([*TINY, "--batch", "8"])
    images = torch.arange(35.0).reshape(35, 1, 1, 1)
    shares = []
    for rank in (0, 1):
        run = dcgan.Trainer.__new__(dcgan.Trainer)
        run.args, run.place = args, dcgan.World(rank, 2, torch.device("cpu"))
        run.images, run.batch, run.steps_per_epoch = images, 4, 4
        shares.append([run.batch_at(step).flatten() for step in range(8)])
    for epoch in (slice(0, 4), slice(4, 8)):
        seen = torch.cat([part for share in shares for part in share[epoch]])
        assert len(seen) == len(seen.unique()) == 32
    assert not torch.equal(torch.cat(shares[0][:4]), torch.cat(shares[0][4:]))


@pytest.mark.parametrize("gray", [False, True])
def test_folder(dcgan, tmp_path, gray, capsys):
    from PIL import Image

    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    colors = torch.Generator().manual_seed(0)
    for n in range(20):
        pixels = torch.randint(0, 256, (9 + n, 12, 3), generator=colors, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / "more" / f"{n}.png" if n % 2 else folder / f"{n}.jpg")
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(folder / "alpha.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_bytes((folder / "more" / "1.png").read_bytes()[:100])
    options = [*TINY, "--batch", "7", "--epochs", "1", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert dcgan.main([*options, *(["--gray"] if gray else [])]) == 0
    out = capsys.readouterr().out
    assert f"(21, {1 if gray else 3}, 8, 8) images" in out and "1 broken images" in out
    with Image.open(tmp_path / "out" / "samples" / "epoch-0001.png") as grid:
        assert grid.size == (200, 200) and grid.mode == ("L" if gray else "RGB")


def test_grid(dcgan, tmp_path):
    from PIL import Image

    images = torch.full((3, 1, 4, 5), -1.0)
    images[1] = 1.0
    dcgan.save_grid(images, tmp_path / "grid.png", columns=2, zoom=1)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (14, 12)
        assert sum(value > 0 for value in grid.tobytes()) == 20
        assert grid.getpixel((8, 1)) == 255 and grid.getpixel((7, 1)) == 0


@pytest.fixture(scope="module")
def referee(dcgan):
    return dcgan.Judge(*dcgan.load_digits(16))


def test_judge(dcgan, referee):
    images, _ = dcgan.load_digits(16)
    judge = referee
    assert judge.accepts_real > 0.93 and judge.accuracy > 0.93
    assert judge.accepts_junk < 0.1
    verdict = judge(images[:500])
    assert verdict.accepted > 0.95
    assert sum(verdict.counts) == round(500 * verdict.accepted)
    assert judge(torch.zeros_like(images[:50])).accepted == 0.0
    assert judge(torch.rand(200, 1, 16, 16) * 2 - 1).accepted < 0.05


def test_verdict(dcgan, referee, trainer, capsys):
    """Real digits instead of samples."""
    images, labels = dcgan.load_digits(16)
    run = trainer()
    run.sample = lambda count: images[4::5]
    assert dcgan.judge(run, referee, 0.9)
    out = capsys.readouterr().out
    assert "10 of 10 digits" in out and "passed" in out and f"{referee.accepts_real:.1%} accepted" in out
    assert not dcgan.judge(run, referee, 0.99)
    assert "FAILED" in capsys.readouterr().out
    run.sample = lambda count: images[torch.from_numpy(labels == 3)].repeat(3, 1, 1, 1)
    assert not dcgan.judge(run, referee, 0.5), "digits are missing"


def test_bad_options(dcgan, tmp_path):
    options = [*TINY, "--epochs", "1", "--out", str(tmp_path), "--loss", "hinge", "--penalty", "none"]
    dcgan.main(options)
    with pytest.raises(SystemExit, match="other options: loss, seed"):
        dcgan.main([*options, "--resume", "--loss", "minimax", "--seed", "4"])
    for wrong, message in (
        (["--batch", "5000"], "not exceed 1797 images"),
        (["--size", "64"], "digits come in sizes 8, 16 and 32, not 64"),
        (["--data", str(tmp_path / "nothing")], "no images found"),
    ):
        with pytest.raises(SystemExit, match=message):
            dcgan.main([*options, *wrong])
