"""Advice over made-up spans: what it says, wins, and has one type."""

import json
import sys

import pytest
from test_verdict import CEILINGS, GB, evidence, mark

from wan_loader.profiler.analysis.advice import advise
from wan_loader.profiler.analysis.commands import Program
from wan_loader.profiler.analysis.outside import OWN_END
from wan_loader.profiler.analysis.weight_files import OpenedFile

SCRIPT = Program(argv=("/venv/bin/python", "start.py", "--ckpt_dir", "model"), directory="/home/me")
SOURCE = "import torch\nfrom safetensors.torch import load_file\nw = load_file('model/a.safetensors')\n"
FILES = {"/home/me/model/a.safetensors": OpenedFile(20 * GB, 20 * GB, "safetensors", ("/home/me/start.py", 3))}

ON_CPU = [
    mark("import", 0, 2, label="torch"),
    mark("import", 2, 5, label="pandas"),
    mark("construct", 5, 6, label="Net"),
    mark("random_init", 6, 10, 20 * GB, label="uniform_"),
    mark("read", 10, 15, 20 * GB, label="torch.load"),
    mark("cast", 15, 19, 20 * GB, label="float32 to bfloat16 on the CPU"),
    mark("h2d", 19, 21, 10 * GB, label="copy in host memory"),
    mark("assign", 21, 21.5, label="load_state_dict"),
    mark("other", 23, 24, label=OWN_END),
]
ON_GPU = [
    mark("import", 0, 1, label="torch"),
    mark("read", 10, 15, 20 * GB, label="page faults in float32 to bfloat16 on the CPU"),
    mark("cast", 15, 19, 20 * GB, label="float32 to bfloat16 on the CPU"),
    mark("h2d", 19, 21, 10 * GB, label="pageable host to cuda"),
]


def advised(spans, seconds, program=SCRIPT, *, files=FILES, sources=None, **changes):
    changes = {"kind": "program", "device": "cpu", **changes}
    sources = {"/home/me/start.py": SOURCE} if sources is None else sources
    return {a.rule: a for a in advise(evidence(spans, seconds, **changes), program, files=files, sources=sources)}


def test_a_program_on_the_cpu():
    found = advised(ON_CPU, 24)
    assert list(found) == ["stand-by", "fp32-file", "construction"]
    assert all("s" in a.evidence and any(c.isdigit() for c in a.evidence) for a in found.values())
    # the imports and the end; with the fast path inside: the initialisation and the copies, and the reading but for
    # the touching of its pages
    assert found["stand-by"].gain_s == pytest.approx(5 + 1 - 0.3 + 4 + 2 + 5 - 0.5)
    assert found["stand-by"].once == ("wan-loader standby start",)
    assert found["stand-by"].command == "wan-loader run start.py --ckpt_dir model"
    assert found["construction"].gain_s == pytest.approx(0.8)
    assert "pandas" not in " ".join(a.text for a in found.values()), "no advice about packages"


def test_what_is_saved_together_is_counted_once():
    found = advised(ON_CPU, 24)
    assert found["fp32-file"].gain_s == pytest.approx(4 - 0.5 + 2.5 - 0.15 * 2), "less the imports of our loader"
    assert found["fp32-file"].beside_s == pytest.approx(4 - 0.5), "the reading is saved already, the imports as well"
    assert sum(a.beside_s for a in found.values()) < 24 - 1.5


def test_without_imports_the_fast_path_is_advised_alone():
    found = advised([span for span in ON_CPU if span.name != "import"], 24)
    assert found["fast-path"].gain_s == pytest.approx(4 + 2 + 5 - 0.5)
    assert found["fast-path"].command == "wan-loader run start.py --ckpt_dir model"
    assert "stand-by" not in found


def test_what_is_converted_again_and_again_is_read_once():
    spans = [mark("cast", i, i + 1, 20 * GB, label="float32 to bfloat16 on the CPU") for i in range(8)]
    assert advised(spans, 10)["fp32-file"].gain_s == pytest.approx(8 - 0.5 - 0.15)


def test_a_line_of_the_program_is_rewritten():
    advice = advised(ON_CPU, 24)["fp32-file"]
    assert advice.once == ("wan-loader cache build model/a.safetensors --dtype bf16",)
    (edit,) = advice.edits
    assert (edit.path, edit.line, edit.text) == ("start.py", 3, "w = load_file('model/a.safetensors')")
    assert edit.replacement == (
        "import wan_loader\nw = wan_loader.load_file('model/a.safetensors', dtype=\"bf16\", cache=True)"
    )
    advice = advised(ON_CPU, 24, sources={})["fp32-file"]
    assert (advice.edits, advice.once) == ((), ())
    assert "cache=True" in advice.code


def test_a_model_of_diffusers_is_filled_and_its_copy_written_by_the_first_start():
    source = "import torch\nimport m\nmodel = m.Net.from_pretrained('model', torch_dtype=torch.bfloat16)\n"
    advice = advised(ON_CPU, 24, sources={"/home/me/start.py": source})["fp32-file"]
    assert "wan_loader.load_into(model, 'model'" in advice.edits[0].replacement
    assert advice.once == ()
    assert "the first start writes it" in advice.text


def test_a_program_on_a_gpu():
    found = advised(ON_GPU[1:], 22, device="cuda:0")
    # all three at the same time: 20 GB of fp32 from the page cache take a second
    assert found["fast-path"].gain_s == pytest.approx(5 + 4 + 2 - 1)
    assert "took turns" in found["fast-path"].evidence
    assert "keep" not in found, "what is kept is not converted"


def test_weights_may_stay_on_the_gpu():
    spans = [
        mark("read", 0, 5, 20 * GB, label="safetensors"),
        mark("h2d", 5, 7, 20 * GB, label="pageable host to cuda"),
    ]
    found = advised(spans, 8, device="cuda:0")
    assert found["keep"].command == "wan-loader run --keep start.py --ckpt_dir model"
    assert found["keep"].once == ("wan-loader standby keep model/a.safetensors --device cuda:0",)
    assert found["keep"].gain_s == pytest.approx(7 - 20 / 250)
    ours = Program(argv=("wan-pipeline", "generate", "--ckpt_dir", "model"))
    found = advised(spans, 8, ours, device="cuda:0")
    assert found["keep"].command == "wan-pipeline generate --ckpt_dir model --keep"
    assert found["keep"].once == ("wan-loader standby keep model --device cuda:0",)


def test_networks_that_take_turns_on_the_gpu_get_a_limit_instead():
    spans = [mark("h2d", 0, 8, 60 * GB, label="pinned host to cuda")]
    ours = Program(argv=("wan-pipeline", "generate", "--ckpt_dir", "model", "--keep"))
    found = advised(spans, 10, ours, device="cuda:0", facts={"device_memory_bytes": 80 * GB})
    assert found["vram-limit"].command == f"{' '.join(ours.argv)} --vram_limit 76GB"
    assert found["vram-limit"].gain_s == pytest.approx(8 * 2 / 3)
    given = Program(argv=(*ours.argv, "--vram_limit", "12GB"))
    assert "vram-limit" not in advised(spans, 10, given, device="cuda:0", facts={"device_memory_bytes": 80 * GB})


def test_small_or_exact_initialisations_do_not_wait():
    for spans in (
        [mark("random_init", 0, 4, 1 << 20, label="uniform_")],
        [mark("random_init", 0, 4, GB, label="torch.nn.init.trunc_normal_")],
    ):
        assert "fast-path" not in advised(spans, 5)
    assert "fast-path" not in advised([mark("random_init", 0, 4, GB, label="uniform_")], 5, nbytes_file=0), "trained"


def test_processes_that_load_are_served_and_their_imports_are_not():
    program = Program(argv=("python", "a.py"), loads_in_children=True)
    spans = [mark("import", 0, 4, label="torch"), mark("read", 4, 10, 20 * GB, label="torch.load")]
    (first,) = advise(evidence(spans, 10, kind="program", device="cpu"), program, served=0.25)
    assert (first.rule, first.command) == ("fast-path", "wan-loader run -- python a.py")


def test_a_part_of_a_process_gets_code():
    found = advised(ON_CPU, 24, Program(argv=("python", "notebook"), inside=True))
    assert "stand-by" not in found
    assert (found["fast-path"].command, found["fast-path"].code) == ("", "with wan_loader.accelerate():")


def test_what_runs_under_ours_is_not_told_to():
    found = advised(ON_CPU, 24, Program(argv=("wan-loader", "run", "start.py")))
    assert not {"fast-path", "fp32-file"} & set(found)


def test_only_the_cold_share_of_reading_is_won_by_warming():
    limits = {"memory_available_bytes": 100 * GB}
    spans = [mark("read", 0, 10, 20 * GB, label="safetensors")]
    all_cold = advised(spans, 10, cold_bytes=20 * GB, limits=limits)["cold-cache"]
    assert all_cold.gain_s == pytest.approx(9)
    assert all_cold.once == ("wan-loader warm model/a.safetensors",)
    little = advised(spans, 10, cold_bytes=2 * GB, limits=limits)["cold-cache"]
    assert little.gain_s == pytest.approx(10 * (1 / 1.9) - 0.1)
    imports = [mark("import", 0, 5, label="torch"), mark("read", 5, 15, 20 * GB, label="safetensors")]
    beside = advised(imports, 15, cold_bytes=20 * GB, limits=limits)["cold-cache"]
    assert beside.code == "import wan_loader\nwan_loader.prewarm('model/a.safetensors')\nimport torch"
    assert "cold-cache" not in advised(spans, 10, cold_bytes=20 * GB, limits={"memory_available_bytes": 10 * GB})


def test_slow_storage():
    spans = [mark("read", 0, 100, 20 * GB, "reader 0"), mark("h2d", 1, 101, 20 * GB, "cuda:0 copy")]
    network = {"network": True, "filesystem": "nfs4"}
    found = advised(spans, 101, cold_bytes=20 * GB, storage=network)
    assert found["slow-storage"].once == ("wan-loader stage model/a.safetensors --to DIR",)
    rotating = {"rotational": True, "filesystem": "ext4"}
    for rate, is_advised in ((0.2, True), (2.0, False)):  # a virtual disk that only calls itself rotating
        ceilings = {**CEILINGS, "disk_gbps": rate}
        found = advised(spans, 101, cold_bytes=20 * GB, storage=rotating, ceilings=ceilings)
        assert ("slow-storage" in found) is is_advised


def test_gains_that_nobody_notices_are_not_mentioned():
    spans = [mark("read", 0, 0.004, GB // 1000, "reader 0"), mark("read", 0, 0.004, GB // 1000, "reader 1")]
    assert advise(evidence(spans, 0.004, dtype="bf16", nbytes_file=GB // 500, fp32_bytes=GB // 500)) == ()


def test_a_load_of_an_fp32_file():
    spans = [mark("read", 0, 10, 20 * GB, "reader 0"), mark("read", 0, 10, 20 * GB, "reader 1")]
    found = evidence(spans, 10, cold_bytes=20 * GB, dtype="bf16", fp32_bytes=20 * GB)
    (advice,) = advise(found, target="my model")
    assert advice.rule == "fp32-file"
    assert advice.gain_s == pytest.approx(5)
    assert advice.once == ("wan-loader cache build 'my model' --dtype bf16",)
    assert advice.command == "wan-loader load 'my model' --dtype bf16 --cache"
    assert advice.code == """wan_loader.load_file('my model', dtype="bf16", cache=True)"""


def test_a_load_by_one_reader():
    (advice,) = advise(evidence([mark("read", 0, 10, 20 * GB, "reader 0")], 10), target="a.safetensors")
    assert (advice.rule, advice.command) == ("one-reader", "wan-loader load a.safetensors")


def test_without_ceilings_nothing_is_claimed():
    assert advise(evidence([mark("read", 0, 10, 20 * GB)], 10, ceilings={})) == ()


def test_a_healthy_load_gets_no_advice():
    spans = [mark("read", 0, 0.5, 10 * GB, "reader 0"), mark("read", 0, 0.5, 10 * GB, "reader 1")]
    assert advise(evidence(spans, 0.5, ceilings={**CEILINGS, "page_cache_gbps": 40.0})) == ()


def test_a_real_program_is_told_its_own_words_and_lines(tmp_path, monkeypatch, capsys):
    """Recorded, judged, saved and read back: the line that loads is the script's."""
    import torch
    from safetensors.torch import save_file

    from wan_loader.profiler.analysis.session import read_session
    from wan_loader.profiler.render.page import to_page
    from wan_loader.profiler.render.terminal import print_session

    monkeypatch.chdir(tmp_path)
    save_file({f"{i}": torch.ones(2048, 2048) for i in range(8)}, "model.safetensors")
    (tmp_path / "start.py").write_text(
        "import sys, torch\nfrom safetensors.torch import load_file\n\n"
        "def main():\n    return load_file(sys.argv[1])\n\n"
        "for _ in range(12):\n    weights = {k: v.to(torch.bfloat16) for k, v in main().items()}\n"
    )
    command = [sys.executable, "-m", "wan_loader", "profile", "--no-ceilings", "-o", "run.json", "--"]
    import subprocess

    done = subprocess.run([*command, "python", "start.py", "model.safetensors"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    session = read_session("run.json")
    found = {a.rule: a for a in session.advice}
    assert found["stand-by"].command == "wan-loader run start.py model.safetensors"
    (edit,) = found["fp32-file"].edits
    assert (edit.path, edit.line, edit.text) == ("start.py", 5, "    return load_file(sys.argv[1])")
    together = json.loads((tmp_path / "run.json").read_text())["together"]
    assert together["command"] == "wan-loader run start.py model.safetensors"
    assert set(together["once"]) == {
        "wan-loader standby start",
        "wan-loader cache build model.safetensors --dtype bf16",
    }
    assert together["gain_s"] == pytest.approx(sum(a.beside_s for a in session.advice))
    assert "$ wan-loader standby start" in done.stderr
    assert '+     return wan_loader.load_file(sys.argv[1], dtype="bf16", cache=True)' in done.stderr
    from wan_loader.console import PlainConsole

    print_session(PlainConsole(), session)
    assert "together they save about" in capsys.readouterr().out
    assert "<pre>$ wan-loader standby start\n$ wan-loader run start.py model.safetensors</pre>" in to_page(session)
