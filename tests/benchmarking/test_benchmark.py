import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from refiner_hf import RefinerConfig
from refiner_hf.benchmarking import memory, roofline, run, startup
from refiner_hf.benchmarking.contenders import (
    BASE,
    COMPILED,
    PLAIN,
    Case,
    contender_names,
    make_network,
    make_step,
    takes_part,
)
from refiner_hf.benchmarking.costs import costs, eager_channels, refinement_flops
from refiner_hf.benchmarking.engines import ENGINES
from refiner_hf.benchmarking.record import open_record
from refiner_hf.benchmarking.report import write_report
from refiner_hf.benchmarking.summary import memory_ratio, ratio, share_of_roofline
from refiner_hf.commands.benchmark import command_of, main
from refiner_hf.utils.files import write_json
from refiner_hf.utils.flops import count_flops
from refiner_hf.utils.measure import describe_failure, time_in_turns


def case(part="model", kind="inference", **changes) -> Case:
    fields = dict(network="tiny", image_size=32, batch_size=2, dtype="float32", device="cpu")
    return Case(part=part, kind=kind, **fields | changes)


WITHOUT_COMPILER = [name for name in contender_names("model", "cpu") if name not in {*COMPILED, *ENGINES}]


@pytest.mark.parametrize("name", WITHOUT_COMPILER)
@pytest.mark.parametrize("kind", ["inference", "training"])
def test_every_contender_takes_its_steps(name, kind):
    check_step(case(kind=kind), name)


@pytest.mark.parametrize("name", contender_names("op", "cpu"))
@pytest.mark.parametrize("kind", ["inference", "forward", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_refinement_takes_its_steps(name, kind, dtype):
    check_step(case("op", kind, dtype=dtype), name)


def test_an_implementation_for_evaluation_alone_is_not_timed_in_training():
    assert takes_part(case(), "native") and takes_part(case(kind="training"), "auto")
    assert not any(takes_part(case("op", kind), "native") for kind in ("forward", "training"))


@pytest.mark.parametrize("name", ENGINES)
def test_engines(name):
    """They answer as the network does, or nearly where they compute in less; in inference alone."""
    if name not in contender_names("model", "cpu"):
        pytest.skip("it isn't installed, or the CPU can't")
    _, precision, int8 = ENGINES[name]
    inference = case()
    answer = torch.from_numpy(make_step(inference, name)())
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = make_network(inference, BASE).eval()(pixels).logits
    away = ((answer - logits).norm() / logits.norm()).item()
    assert 1e-4 < away < 0.1 if int8 or precision == "bfloat16" else away < 1e-5
    assert takes_part(inference, name) and not takes_part(case(kind="training"), name)
    assert takes_part(case(dtype="bfloat16"), name) == (precision == "bfloat16")
    assert name not in contender_names("op", "cpu") and name not in contender_names("model", "cuda")
    weights = sum(weight.numel() for weight in make_network(inference, BASE).parameters())
    less = costs(inference, BASE)["bytes"] - costs(inference, name)["bytes"]
    assert less >= weights * (3 if int8 else 2 if precision == "bfloat16" else 0)


def check_step(case: Case, name: str) -> None:
    """It does what it costs on paper, a backward pass included, but for products that torch doesn't count."""
    step = make_step(case, name)
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() > 0.75 * costs(case, name)["flops"]


def test_contenders_are_of_one_size():
    vit, plain, ours = (make_network(case(), name).config for name in ("ViT sdpa", PLAIN, BASE))
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_labels"):
        assert getattr(vit, name) == getattr(plain, name) == getattr(ours, name)
    assert (vit._attn_implementation, set(plain.attention_types)) == ("sdpa", {"plain"})
    assert contender_names("model", "cpu")[0] == BASE
    assert contender_names("model", "cpu", [PLAIN]) == [BASE, PLAIN]
    assert "triton" not in contender_names("op", "cpu")


def test_operations_are_those_that_torch_counts():
    config = RefinerConfig(hidden_size=48, num_attention_heads=4)
    # Expansion to 12 maps, a 3x3 kernel for each, reduction; a multiplication and an addition for each weight.
    assert refinement_flops(config, positions=2 * 7 * 7) == 2 * 7 * 7 * 2 * (4 * 12 + 9 * 12 + 12 * 4)
    config.refinement = "convolution"
    assert refinement_flops(config, positions=5) == 5 * 2 * 4 * 9 * 4
    row, training = costs(case(batch_size=3), BASE), costs(case(batch_size=3, kind="training"), BASE)
    assert row["flops"] == 3 * count_flops(make_network(case(), BASE))
    assert training["flops"] == 3 * row["flops"]


def test_bytes_of_the_refinement():
    config = RefinerConfig(hidden_size=48, num_attention_heads=4)  # H 4, E 12
    assert eager_channels(config, "inference") == 12 * 12 + 9 * 4
    positions = 2 * 5 * 5  # 32 pixels are 4 patches and the class token
    row = costs(case("op", "training"), BASE)
    assert row["bytes"] == 4 * positions * 5 * 4
    assert row["bytes_moved"] == 4 * positions * (38 * 12 + 28 * 4)
    assert "bytes_moved" not in costs(case("op", "training"), "auto")


@pytest.mark.parametrize(
    "name, passes",
    [("ViT eager", 0), (PLAIN, 2 + 2 + 1), (BASE, 2 + 3)],  # the plain network adds a map to the next
)
def test_bytes_of_a_network(name, passes):
    weights = sum(p.numel() for p in make_network(case(), name).parameters())
    tokens, maps = 2 * 4 * 5 * 48, passes * 4 * 5 * 5
    assert costs(case(), name)["bytes"] == 4 * (weights + 2 * (tokens + maps))
    assert costs(case(kind="training"), name)["bytes"] == 2 * costs(case(), name)["bytes"]


def test_turns_go_on_without_those_that_fail():
    calls = []

    def fails_to_start():
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    def fails_later():
        calls.append("late")
        if len(calls) > 3:
            raise ValueError("in /home/someone/file.py: no\nmore")

    makers = {"fine": lambda: lambda: None, "early": fails_to_start, "late": lambda: fails_later}
    rows = time_in_turns(makers, 4, "cpu")
    assert len(rows["fine"]["seconds"]) == 4
    assert rows["early"] == {"error": "out of memory"}
    assert rows["late"] == {"error": "ValueError: in file.py: no"}
    assert len(calls) == 4


def test_nobody_always_comes_after_the_same():
    calls = []
    time_in_turns({name: partial(partial, calls.append, name) for name in "abc"}, 20, "cpu")
    rounds = calls[-60:]
    assert all(set(rounds[i : i + 3]) == set("abc") for i in range(0, 60, 3))
    assert set(zip(rounds, rounds[1:])) >= set(permutations("abc", 2))


def test_failures_keep_what_is_no_path():
    assert describe_failure("A: 3 GFLOP/s, see https://pytorch.org/docs or '/usr/lib/a.so'") == (
        "A: 3 GFLOP/s, see https://pytorch.org/docs or 'a.so'"
    )


def test_memory_in_a_child():
    row = memory.peak_memory_in_child(case("op", image_size=224, batch_size=4), BASE)
    expanded_map = 4 * 4 * 12 * 197**2
    assert 2 * expanded_map < row["memory"] < 10 * expanded_map


@pytest.mark.parametrize("number, error", [(signal.SIGKILL, "out of memory"), (signal.SIGTERM, "killed by SIGTERM")])
def test_a_killed_child(number, error):
    """SIGKILL is what the system sends where memory runs out."""
    before = set(psutil.Process().children())
    with ThreadPoolExecutor(1) as thread:
        row = thread.submit(memory.peak_memory_in_child, case("op", image_size=224, batch_size=4), BASE)
        while not (started := set(psutil.Process().children()) - before):
            assert not row.done(), row.result()
            time.sleep(0.001)
        started.pop().send_signal(number)
        assert row.result(60) == {"error": error}


def test_ratios_are_taken_round_by_round():
    base, fast = {"seconds": [2.0, 4.0, 6.0], "memory": 100}, {"seconds": [1.0, 1.0, 3.0], "memory": 25}
    assert ratio(fast, base) == (0.5, 0.375, 0.5)
    assert ratio(fast, base, inverse=True) == (2.0, 2.0, 3.0)
    assert memory_ratio(fast, base) == 0.25
    assert ratio({"error": "no"}, base) is None and memory_ratio(fast, {}) is None


def test_share_of_the_roofline():
    row, roofline = (
        {"seconds": [1.0, 2.0, 9.0], "flops": 10, "bytes": 40},
        {"flops_per_second": 10, "bytes_per_second": 40},
    )
    assert share_of_roofline(row, "model", roofline) == 0.5
    assert share_of_roofline({**row, "bytes": 60}, "op", roofline) == 0.75
    assert share_of_roofline(row, "op", None) is None


@pytest.fixture
def quick(monkeypatch):
    """Few contenders, short curves, and memory without a process each. Gives what was timed."""
    measured = []

    def timed(makers, rounds, device):
        measured.append(list(makers))
        return time_in_turns(makers, rounds, device)

    def names(part, device, among=None):
        everybody = ["eager", "auto", "ViT sdpa"] if part == "model" else ["eager", "auto"]
        return [name for name in everybody if among is None or name == "eager" or name in among]

    def peak(case, name):
        return {"error": "out of memory"} if name == "ViT sdpa" else {"memory": 10**6, "first_seconds": 1.0}

    monkeypatch.setattr(run, "measure_startup", lambda rounds: {startup.IMPORT_TORCH: [2.0, 2.0], "fast": [0.5, 0.5]})
    monkeypatch.setattr(run, "contender_names", names)
    monkeypatch.setattr(run, "time_in_turns", timed)
    monkeypatch.setattr(run, "peak_memory_in_child", peak)
    monkeypatch.setattr(run, "CURVE_IMAGE_SIZES", (32, 64))
    monkeypatch.setattr(run, "CURVE_IMAGE_SIZE", 32)
    monkeypatch.setattr(run, "CURVE_BATCH_SIZES", (1, 4))
    monkeypatch.setattr(roofline, "MATMUL_SIDE", 64)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**16)
    return measured


WORDS = ["--models", "tiny", "--image_sizes", "32", "--batch_size", "2", "--train_batch_size", "2", "--rounds", "2"]


def test_everything_is_measured_once_and_written(quick, tmp_path, capsys):
    words = [*WORDS, "--device", "cpu", "--roofline", "--output_dir", str(tmp_path / "out")]
    main(words)
    printed = capsys.readouterr().out
    assert len(quick) == 3 + 3 * 2 + 2  # kinds of the op, three points of the curves, kinds of the network
    assert ["eager", "auto"] in quick and ["eager", "auto", "ViT sdpa"] not in quick
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"cpu.json", "cpu.md", "cpu.png", "cpu_curves.png"}
    text = (tmp_path / "out" / "cpu.md").read_text()
    assert text in printed and "| tiny 32 | eager | 2 |" in text and "out of memory" in text and "%)" in text
    assert "| `fast` | 0.5 | 0.25 (0.25 to 0.25) |" in text
    record = json.loads((tmp_path / "out" / "cpu.json").read_text())
    rows = record["results"]["model tiny 32 training, batch 2"]["rows"]
    assert len(rows["auto"]["seconds"]) == 2 and rows["auto"]["flops"] > 0
    assert rows["ViT sdpa"]["error"] == "out of memory"
    assert record["facts"]["versions"] and record["date"] and record["roofline"]["bytes_per_second"] > 0
    for file in ("cpu.md", "cpu.json"):
        assert str(tmp_path) not in (tmp_path / "out" / file).read_text()

    # What is there isn't measured again; what is missing is.
    main(words)
    assert len(quick) == 11
    del record["results"]["op tiny 32 forward, batch 2"]
    write_json(tmp_path / "out" / "cpu.json", record)
    main(words)
    assert len(quick) == 12
    with pytest.raises(SystemExit, match="rounds was 2 and is now 3.*--fresh"):
        main([*words, "--rounds", "3"])
    main([*words, "--part", "op", "--fresh"])
    assert len(quick) == 15

    for name in ("cpu.md", "cpu.png"):
        (tmp_path / "out" / name).unlink()
    main(["--report", "--device", "cpu", "--output_dir", str(tmp_path / "out")])
    assert len(quick) == 15 and (tmp_path / "out" / "cpu.png").exists() and (tmp_path / "out" / "cpu.md").exists()


def test_startup_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "_CODE", {startup.IMPORT_TORCH: "pass", "sleeping": "import time; time.sleep(0.5)"})
    monkeypatch.setattr(startup, "_WORDS", {"help": ["--help"]})
    main(["--part", "startup", "--rounds", "2", "--device", "cpu", "--output_dir", str(tmp_path)])
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["results"] == {} and {len(times) for times in record["startup"].values()} == {2}
    assert min(record["startup"]["sleeping"]) > 0.5 and set(record["startup"]) == {"import torch", "sleeping", "help"}
    text = (tmp_path / "cpu.md").read_text()
    assert "## Commands and imports" in text and "| `import torch` |" in text


@pytest.mark.parametrize("again", ["for all", "for fewer"])
def test_a_run_cut_off_keeps_what_was_measured(quick, tmp_path, monkeypatch, again):
    def interrupted(case, name):
        raise KeyboardInterrupt

    words = [*WORDS, "--device", "cpu", "--part", "op", "--output_dir", str(tmp_path)]
    peak = run.peak_memory_in_child
    monkeypatch.setattr(
        run, "peak_memory_in_child", lambda c, n: (interrupted if c.kind == "training" else peak)(c, n)
    )
    with pytest.raises(SystemExit, match="130"):
        main(words)
    assert len(quick) == 2
    monkeypatch.setattr(run, "peak_memory_in_child", peak)
    if again == "for fewer":  # whoever wasn't timed doesn't keep the others out of the table
        words += ["--contenders", "eager"]
    main(words)
    assert len(quick) == 3
    (row,) = (line for line in (tmp_path / "cpu.md").read_text().splitlines() if line.startswith("| tiny 32 | eager"))
    assert row.count("1.00 (1.00 to 1.00)") == 3


def test_reports_say_what_failed_and_why(tmp_path):
    row = {"seconds": [1.0, 1.0], "flops": 10**9, "bytes": 10**6, "first_seconds": 30.0}
    result = {"part": "model", "network": "S", "image_size": 224, "kind": "inference", "batch_size": 8, "tokens": 197}
    result["rows"] = {
        "eager": row,
        "compiled auto": {**row, "seconds": [0.5, 0.25]},
        "triton": {"error": "RuntimeError: no kernel", "flops": 1, "bytes": 1},
    }
    facts = {"device": "a machine", "commit": None}
    record = {"facts": facts, "date": "today", "commands": ["a"], "roofline": None, "results": {"S": result}}
    text = write_report(record, tmp_path / "h100.80gb")
    assert "| S 224 | compiled auto | 8 | 21.3 | 3.00 (2.50 to 3.50) |" in text
    assert {path.name for path in tmp_path.iterdir()} == {"h100.80gb.md", "h100.80gb.png"}
    assert "- S 224, triton, inference: RuntimeError: no kernel" in text
    assert "Compiling auto, S 224, inference: 30 s." in text


def test_who_joins_later_is_timed_with_all_the_others(quick, tmp_path):
    words = [*WORDS, "--device", "cpu", "--part", "op", "--output_dir", str(tmp_path)]
    main([*words, "--contenders", "eager"])
    assert quick == [["eager"]] * 3
    main([*words, "--contenders", "auto"])
    assert quick[3:] == [["eager", "auto"]] * 3
    main([*words, "--contenders", "auto"])
    assert len(quick) == 6


def test_a_base_that_failed_alone_is_not_timed(quick, tmp_path, monkeypatch):
    peak = run.peak_memory_in_child
    monkeypatch.setattr(
        run, "peak_memory_in_child", lambda c, n: {"error": "out of memory"} if n == BASE else peak(c, n)
    )
    main([*WORDS, "--device", "cpu", "--part", "op", "--output_dir", str(tmp_path)])
    assert quick == [["auto"]] * 3
    assert "| tiny 32 | eager | 2 | out of memory |" in (tmp_path / "cpu.md").read_text()


def test_one_record_holds_several_batches(quick, tmp_path):
    words = [*WORDS, "--device", "cpu", "--part", "op", "--contenders", "auto", "--output_dir", str(tmp_path)]
    main(words)
    main([*words, "--batch_size", "3", "--train_batch_size", "3"])
    text = (tmp_path / "cpu.md").read_text()
    assert "| tiny 32, batch 2 | auto | 2 |" in text and "| tiny 32, batch 3 | auto | 3 |" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["--models", "XL"], "no model 'XL'.*S, M, L"),
        (["--contenders", "me"], "no contender 'me'.*eager"),
        (["--image_sizes", "225"], "multiple"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--report"], "No such file"),
    ],
)
def test_bad_options_are_named_before_anything_is_measured(quick, tmp_path, words, message):
    with pytest.raises(SystemExit, match=f"(?s)Error: .*{message}"):
        main(["--device", "cpu", "--output_dir", str(tmp_path), *words])
    assert not quick


def test_a_folder_that_cannot_be_written(quick, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="Error: .*file"):
        main([*WORDS, "--device", "cpu", "--output_dir", str(tmp_path / "file")])
    assert not quick


def test_other_files_are_not_replaced(tmp_path):
    (tmp_path / "cpu.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="isn't a benchmark's file"):
        open_record(tmp_path / "cpu.json", {}, fresh=False)
    assert open_record(tmp_path / "cpu.json", {"a": 1}, fresh=True)["facts"] == {"a": 1}


def test_the_command_is_noted_without_paths(tmp_path):
    options = run.BenchmarkOptions(models=["S"], roofline=True, output_dir=str(tmp_path / "out"), fresh=True)
    assert command_of(options) == "refiner benchmark --models S --roofline --output_dir out"


def test_one_refinement_for_each_number_of_heads():
    assert run._different_refinements(["S", "M", "L"]) == ["S", "L"]
