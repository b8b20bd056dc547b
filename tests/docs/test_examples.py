"""The programs in examples/ run as they stand, on models that are small."""

from pathlib import Path

from markdown import ROOT

EXAMPLES = ROOT / "examples"
SMALL = ("--size", "32*32", "--frames", "5", "--steps", "2")


def test_each_example_has_a_test_and_says_how_it_is_run():
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name in here
        text = path.read_text()
        assert text.startswith('"""')
        assert path.name in text or "# %%" in text
        assert len(text.splitlines()) < 80


def test_diffusers_script(place):
    small = ("--width", "32", "--height", "32", "--frames", "5", "--steps", "2")
    model = "Wan2.2-T2V-A14B-Diffusers"
    done = place.run(EXAMPLES / "diffusers_script.py", model, "--prompt", "two cats", *small, "--output", "one.mp4")
    assert "took the fast path" in done.stdout
    assert (place.directory / "one.mp4").stat().st_size > 0


def test_the_official_order_plain_and_under_run(place):
    words = (EXAMPLES / "official_order.py", "--ckpt_dir", "Wan2.2-T2V-A14B-Diffusers")
    plain = place.run(*words)
    ours = place.run("-m", "wan_loader", "run", *words)
    shape = "(1, 16, 1, 8, 8) after"
    assert shape in plain.stdout
    assert shape in ours.stdout
    assert "wan-loader:" in ours.stderr


def test_own_module_fsdp2_divides_and_computes_the_same(place):
    """Two processes, whose rows are half of each weight."""
    example = EXAMPLES / "own_module_fsdp2.py"
    words = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    done = place.run(*words, example, "net.safetensors")
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert len(lines) == 2
    assert lines[0].split("result")[1] == lines[1].split("result")[1]
    whole = (place.directory / "net.safetensors").stat().st_size
    for line in lines:
        assert whole * 0.4 < int(line.split()[2]) < whole * 0.6


def test_service_sleeps_and_wakes(place):
    command = "import subprocess, sys\n" + _TALK.format(service=str(EXAMPLES / "service.py"), small=SMALL)
    done = place.run("-c", command)
    assert done.stdout.splitlines() == ["videos/0000.mp4", "asleep", "videos/0001.mp4", "0"]
    for name in ("0000.mp4", "0001.mp4"):
        assert (place.directory / "videos" / name).stat().st_size > 0


_TALK = """
words = ["Wan2.2-T2V-A14B", "--save_dir", "videos", "--device", "cpu", "--idle", "0.5", *{small}]
pipe = subprocess.PIPE
service = subprocess.Popen([sys.executable, "{service}", *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
service.stdin.write("two cats\\n")
service.stdin.flush()
print(service.stdout.readline().strip())
for line in service.stderr:
    if line.startswith("asleep"):
        break
print(line.split(":")[0])
out, err = service.communicate("one dog\\n")
assert "awake: " in err
print(out.strip())
print(service.returncode)
"""


def test_convert_once(place):
    words = ("Wan2.2-T2V-A14B/high_noise_model", "--device", "cpu", "--cache_dir", "converted")
    done = place.run(EXAMPLES / "convert_once.py", *words)
    first, second, equal = done.stdout.splitlines()
    assert "cache: building" in first
    assert "cache: hit" in second
    assert int(second.split()[3]) < 0.6 * int(first.split()[3])
    assert equal == "every bit equal"


def test_profile_notebook_cell_by_cell(place):
    """As a notebook does: the cells share their names, and each is run by itself."""
    text = (EXAMPLES / "profile_notebook.py").read_text()
    cells = text.split("\n# %%")
    assert len(cells) == 5
    code = f"names = {{}}\nfor cell in {['#' + cell for cell in cells[1:]]!r}:\n    exec(cell, names)"
    env = {"MODEL": "Wan2.2-T2V-A14B-Diffusers", "DEVICE": "cpu"}
    done = place.run("-c", code, env=env)
    assert done.stdout.count("verdict:") == 2
    phases = dict(line.split()[:2] for line in done.stdout.splitlines()[-10:] if line.endswith(" s"))
    assert {"import", "construct", "read"} <= phases.keys()
