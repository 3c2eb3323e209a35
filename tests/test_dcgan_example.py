"""The DCGAN example: tiny runs, resumed after a kill, under torchrun, with every loss and penalty; its judge."""

from __future__ import annotations

import importlib
import signal
import struct
import subprocess
import sys
import textwrap
import zlib
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


def test_graphed_steps_train_as_plain_ones(trainer):
    plain, graphed = trainer("--penalty", "wgan-gp"), trainer("--penalty", "wgan-gp", "--graphed")
    for each in (plain, graphed):
        for _ in range(6):
            each.train_step()
        each.record()
    assert (graphed.discriminator_step.graphs, graphed.generator_step.graphs) == (1, 1)
    assert graphed.history == plain.history
    first, second = (leaves([part.state_dict() for part in t.parts().values()]) for t in (plain, graphed))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (
            torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        ), name


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
                    torch.distributed.barrier()  # the next run reads what the first process wrote
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
    whole = (folder / "more" / "1.png").read_bytes()
    (folder / "broken").write_bytes(whole[:100])  # an image by what is in it
    (folder / "huge.png").write_bytes(png(30000, 30000, b""))  # Pillow: DecompressionBombError
    (folder / "corrupt.ppm").write_bytes(b"P6\n3x2 32\n255\n" + bytes(99))  # ValueError
    (folder / "empty.jpg").touch()  # not told from what is no image but by its name
    Image.fromarray(torch.rand(9, 9).numpy()).save(folder / "floats.tif")
    options = [*TINY, "--batch", "7", "--epochs", "1", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert dcgan.main([*options, *(["--gray"] if gray else [])]) == 0
    out = capsys.readouterr().out
    assert (
        f"(21, {1 if gray else 3}, 8, 8) images" in out
        and "5 broken images left out, first broken: OSError" in out
    )
    with Image.open(tmp_path / "out" / "samples" / "epoch-0001.png") as grid:
        assert grid.size == (200, 200) and grid.mode == ("L" if gray else "RGB")


def png(width, height, pixels):
    """A PNG of whatever is given: RGB, 8 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif", "ramp.pgm"])
def test_16_bits_are_scaled(dcgan, tmp_path, name, gray):
    from PIL import Image

    ramp = (257 * torch.arange(256) - 100).clamp(0).repeat(256, 1).numpy().astype("uint16")
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5\n256 256\n65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(tmp_path / name)
    images = dcgan.load_folder(tmp_path, 256, gray)
    assert torch.equal(images[0, -1], torch.arange(256, dtype=torch.uint8).repeat(256, 1))


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


def refused(dcgan, capsys, *options):
    """The one line with which it ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        dcgan.main([*TINY, *map(str, options)])
    out, line = capsys.readouterr()
    assert ended.value.code == 2 and not out
    assert line.startswith("dcgan.py: ") and line.count("\n") == 1 and line.endswith("\n"), line
    return line


@pytest.mark.parametrize(
    ("option", "message"),
    [
        *(
            (f"--epochs={n}", f"--epochs: expected a whole number from 1 on, got {n}")
            for n in ("0", "-3", "x")
        ),
        *((f"--batch={n}", f"--batch: expected a whole number from 2 on, got {n}") for n in ("0", "-4", "1")),
        *((f"--size={n}", f"--size: invalid choice: {n}") for n in (0, 4, 12, -8)),
        ("--size=64", "--size 64: digits come in sizes 8, 16 and 32"),
        ("--width=0", "--width: expected a whole number from 1 on, got 0"),
        ("--latent=0", "--latent: expected a whole number from 1 on, got 0"),
        ("--ema=2", "--ema: expected a number from 0 to below 1, got 2"),
        *((f"--lr={n}", f"--lr: expected a number above 0, got {n}") for n in ("-1", "0", "nan", "inf")),
        ("--beta1=1.5", "--beta1: expected a number from 0 to below 1, got 1.5"),
        ("--beta2=1", "--beta2: expected a number from 0 to below 1, got 1"),
        ("--gamma=-1", "--gamma: expected a number from 0 on, got -1"),
        ("--require=1.1", "--require: expected a number from 0 to 1, got 1.1"),
        ("--seed=-1", "--seed: expected a whole number from 0 to 4294967295, got -1"),
        *((f"--threads={n}", f"--threads: expected a whole number from 1 to 1024, got {n}") for n in (-2, 0)),
        *(
            (f"--checkpoint-every={n}", f"-every: expected a whole number from 1 on, got {n}")
            for n in (-5, 0)
        ),
        ("--data=nothing", "--data nothing: neither 'digits' nor a folder"),
        ("--device=cuda", "--device cuda: PyTorch finds no CUDA device"),
    ],
)
def test_bad_options(dcgan, tmp_path, capsys, monkeypatch, option, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refused(dcgan, capsys, "--out", tmp_path / "out", option)
    assert not (tmp_path / "out").exists()


def test_bad_inputs(dcgan, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "--batch 5000: more than there are images, 1797" in refused(dcgan, capsys, *out, "--batch", 5000)
    (tmp_path / "empty").mkdir()
    assert "empty: no images found" in refused(dcgan, capsys, *out, "--data", tmp_path / "empty")
    (tmp_path / "file").touch()
    assert "--out" in refused(dcgan, capsys, "--out", tmp_path / "file")
    assert "Not a directory" in refused(dcgan, capsys, "--out", tmp_path / "file" / "out")
    args = dcgan.parse([*TINY, "--batch", "10"])
    for processes in (4, 10):
        with pytest.raises(SystemExit):
            dcgan.Trainer(torch.zeros(10, 1, 8, 8), args, dcgan.World(0, processes, torch.device("cpu")))
        assert f"equally many, for {processes} processes" in capsys.readouterr().err


def fill(folder, first, last):
    """Images of a folder, each of its own."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for n in range(first, last):
        Image.new("RGB", (8, 8), (n, 7 * n, 255 - n)).save(folder / f"{n:02d}.png")


def test_what_is_resumed_and_what_overwritten(dcgan, tmp_path, monkeypatch, capsys):
    """A checkpoint goes on with the options and images it was begun with, and is removed only if that is asked for."""
    monkeypatch.setattr(dcgan, "plot", lambda *_: None)
    folder, out = tmp_path / "images", tmp_path / "out"
    checkpoint, late = out / "checkpoint.pt", out / "samples" / "epoch-0002.png"
    fill(folder, 0, 8)
    options = ["--batch", "4", "--epochs", "2", "--data", str(folder), "--out", str(out)]
    assert dcgan.main([*TINY, *options]) == 0
    before = checkpoint.read_bytes()
    message = refused(dcgan, capsys, *options)
    assert all(
        text in message for text in ("checkpoint.pt exists", "--resume", "--overwrite", "another --out")
    )
    assert "not allowed with" in refused(dcgan, capsys, *options, "--resume", "--overwrite")
    message = refused(dcgan, capsys, *options, "--resume", "--loss", "minimax", "--seed", "4")
    assert "other options: --loss relativistic, now minimax; --seed 0, now 4" in message

    fill(folder, 8, 10)
    message = refused(dcgan, capsys, *options, "--resume")
    assert "other images: 8 images, SHA-256 " in message and "; now 10 images, SHA-256 " in message
    for n in (8, 9):
        (folder / f"{n:02d}.png").unlink()
    (folder / "00.png").rename(folder / "99.png")
    assert "other images: 8 images, SHA-256 " in refused(dcgan, capsys, *options, "--resume")
    (folder / "99.png").rename(folder / "00.png")
    assert checkpoint.read_bytes() == before

    assert dcgan.main([*TINY, *options, "--resume", "--epochs", "3"]) == 0
    assert " 2 steps of 4" in capsys.readouterr().out
    assert dcgan.main([*TINY, *options, "--overwrite", "--epochs", "1"]) == 0
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    assert not late.exists()


def test_resumed_by_other_processes(dcgan, tmp_path, trainer, capsys):
    run = trainer()
    run.save(tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    with pytest.raises(SystemExit):
        run.load(checkpoint | {"random": 2 * checkpoint["random"]})
    assert "begun by 2 processes, now 1" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["junk", "empty", "truncated", "foreign", "tensor", "folder"])
def test_broken_checkpoint(dcgan, tmp_path, trainer, capsys, damage):
    path = tmp_path / "checkpoint.pt"
    trainer().save(path)
    whole = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage in ("foreign", "tensor"):
        torch.save({"step": 3} if damage == "foreign" else torch.zeros(3), path)
    else:
        path.write_bytes({"junk": b"junk\n", "empty": b"", "truncated": whole[: len(whole) // 2]}[damage])
    message = refused(dcgan, capsys, "--out", tmp_path, "--resume")
    expected = (
        "not a checkpoint of this program" if damage in ("foreign", "tensor") else "broken, cannot be resumed"
    )
    assert expected in message and "--overwrite begins anew" in message


def test_without_matplotlib(dcgan, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fill(tmp_path / "images", 0, 4)
    options = ["--batch", "4", "--epochs", "1", "--data", str(tmp_path / "images")]
    assert dcgan.main([*TINY, *options, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "no curves: matplotlib is not installed" in out and "curves.png" not in out
    assert not (tmp_path / "out" / "curves.png").exists()
