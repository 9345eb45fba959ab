"""The systems' table: settings that match a density, and the words of the table. Generations are not run here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import system_knobs, systems
from benchmarks.precision import GRID, HEAD_DIM
from benchmarks.system_knobs import SYSTEMS, Calls, System, matched, nearest, plan_of
from benchmarks.system_store import Cell, read_rows
from benchmarks.system_tables import BEGIN, END, Point, front, put_into, table, tables
from benchmarks.systems import cells_of, shard_of
from vidaccel.configs.pattern_spec import PatternSpec
from vidaccel.configs.plan import HeadPolicy, LayerPolicy, Plan, Rule
from vidaccel.configs.presets import preset_names
from vidaccel.errors import ConfigError
from vidaccel.layout import TokenLayout
from vidaccel.patterns import build_pattern
from vidaccel.types import PRECISIONS

#: Systems whose density captured calls can tell.
KNOWN = [name for name, system in SYSTEMS.items() if system.low < system.high and system.first is None]


@pytest.fixture(scope="module")
def calls() -> Calls:
    """Random calls with structure from tile to tile, where captured ones would need the model."""
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout.of(GRID, system_knobs.TILE)

    def tensor() -> torch.Tensor:
        blocks = torch.randn(1, layout.num_blocks, 1, HEAD_DIM, generator=generator)
        tokens = torch.randn(1, layout.tokens, 1, HEAD_DIM, generator=generator)
        return blocks[:, layout.block_of_token] + 0.5 * tokens

    return Calls([(tensor(), tensor(), tensor())])


@pytest.mark.parametrize("name", KNOWN)
def test_settings_are_found_for_a_density(name: str, calls: Calls) -> None:
    """Within the steps that a system can make: tiles of windows, bands of svg, no margin at all for anchor."""
    system = SYSTEMS[name]
    coarse = {"sta": 0.1, "svg": 0.1, "anchor": 0.05, "delta": 0.1, "razor": 0.1, "s2": 0.05, "neighborhood": 0.1}
    coarse |= {"rettention": 0.1, "svg2": 0.1, "svg2-blocks": 0.1, "gna": 0.05}
    rounds = 7 if "svg-ear-" in name or "svg2" in name else 12  # k-means takes its time
    found = calls.density(system, calls.knob(system, 0.35, rounds=rounds))
    assert found == pytest.approx(0.35, abs=coarse.get(name, 0.03))


def test_more_of_the_knob_keeps_more(calls: Calls) -> None:
    for name in ("sta", "vsa-free", "nabla", "sale", "anchor", "xattention"):
        system = SYSTEMS[name]
        settings = [system.low + t * (system.high - system.low) for t in (0.0, 0.3, 0.7, 1.0)]
        found = [calls.density(system, knob) for knob in settings]
        assert found == sorted(found) and found[0] < found[-1]


def test_systems_are_presets_or_patterns_on_their_way_to_one() -> None:
    variants = {
        "svg2-blocks",
        "svg-ear-fine",
        "svg-ear-runs",
        "rectified-tail",
        "rectified-hilbert",
        "vsa-dropped",
        "tempcache",
    }
    patterns = {"anchor", "hash", "stochastic", "blasst"}
    assert set(SYSTEMS) - set(preset_names()) <= variants | patterns
    for system in SYSTEMS.values():
        plan = plan_of(system, system.high)
        for head in (head for rule in plan.rules for head in rule.policy.heads):
            build_pattern(head.pattern)
        assert plan.lookup(0.95, "transformer", 0, None).is_dense
        assert plan.is_dense or not plan.lookup(0.9, "transformer", 0, None).is_dense


def test_precision_and_compensation_are_put_on_top() -> None:
    (head,) = plan_of(SYSTEMS["vsa-free"], 0.3, precision="int8", compensation="none").rules[1].policy.heads
    assert str(head) == "pooled_top_k(density=0.3) int8"
    (head,) = plan_of(SYSTEMS["vsa-free"], 0.3).rules[1].policy.heads
    assert str(head) == "pooled_top_k(density=0.3) + pooled_tail"
    (head,) = plan_of(SYSTEMS["dense"], 1.0, precision="int8", compensation="none").rules[1].policy.heads
    assert str(head) == "dense int8"


def test_a_system_may_be_a_whole_plan() -> None:
    """A schedule over noise levels keeps its rules and its tile; the warm-up comes first."""
    head = HeadPolicy(PatternSpec.make("pooled_top_k", density=0.5))
    early = Rule(LayerPolicy((head,)), noise=(0.5, 1.0))
    phases = System(lambda _: Plan("phases", (early,), tile=system_knobs.FLAT), 0.0, 1.0, first=0.5)
    plan = plan_of(phases, 0.5, precision="int8")
    assert plan.tile == system_knobs.FLAT
    assert plan.lookup(0.96, "transformer", 0, None).is_dense and plan.lookup(0.4, "transformer", 0, None).is_dense
    assert plan.lookup(0.9, "transformer", 0, None).heads[0].precision == "int8"


@settings(max_examples=50, deadline=None)
@given(aimed=st.sampled_from([0.2, 0.35, 0.5]), bend=st.floats(0.7, 1.4), shift=st.floats(-0.05, 0.05))
def test_a_run_that_keeps_other_shares_than_captured_calls_is_matched(aimed: float, bend: float, shift: float) -> None:
    """The density of a run is some other growing function of the knob; four runs come within 2%, or nearly."""
    system = SYSTEMS["vsa-free"]

    class Straight(Calls):
        def knob(self, system: System, aimed: float, *, rounds: int = 12) -> float:
            return round(aimed, 6)

        def density(self, system: System, knob: float) -> float:
            return knob

    tries = matched(system, aimed, Straight([]), lambda knob: min(1.0, max(0.01, knob**bend + shift)))
    assert len(tries) <= 4
    assert nearest(tries, aimed).density == pytest.approx(aimed, rel=0.05)
    assert min(tries, key=lambda made: abs(made.density - aimed)) == nearest(tries, aimed)


def test_the_search_ends_where_a_system_has_no_setting_in_between(calls: Calls) -> None:
    """sta on this grid has few windows; the runs do not repeat one."""
    ran: list[float] = []

    def run(knob: float) -> float:
        ran.append(knob)
        return calls.density(SYSTEMS["sta"], knob)

    tries = matched(SYSTEMS["sta"], 0.37, calls, run)
    made = [SYSTEMS["sta"].make(one.knob) for one in tries]
    assert len(set(made)) == len(made) == len(ran)


@pytest.mark.parametrize(("more", "blocks"), [(0.0, [13]), (0.02, [11, 12, 13])])
def test_settings_that_keep_the_same_blocks_run_once(calls: Calls, more: float, blocks: list[int]) -> None:
    """12 and 13 of 36 blocks are not within 2%. One run will do where runs keep what calls did; else each k has one."""
    ran: list[float] = []

    def run(knob: float) -> float:
        ran.append(calls.density(SYSTEMS["vsa-free"], knob))
        return ran[-1] + more

    matched(SYSTEMS["vsa-free"], 0.348, calls, run)
    assert sorted(ran) == [k / 36 for k in blocks]


def test_a_knob_without_captured_calls_is_searched_on_runs_alone() -> None:
    system = System(lambda knob: HeadPolicy(PatternSpec.make("pooled_top_k", density=knob)), 0.01, 4.0, first=1.0)
    tries = matched(system, 0.35, Calls([]), lambda knob: min(1.0, 0.2 * knob**0.8), tries=5)
    assert tries[0].knob == 1.0
    assert nearest(tries, 0.35).density == pytest.approx(0.35, rel=0.02)


def test_cells_come_precision_by_precision() -> None:
    cells = cells_of(["vsa-free", "dense"], [0.5, 0.2], ["native", "int8"], plans=["mine"])
    assert [(c.system, c.aimed, c.precision) for c in cells] == [
        ("mine", 0.0, "native"),
        ("vsa-free", 0.5, "native"),
        ("vsa-free", 0.2, "native"),
        ("vsa-free", 0.5, "int8"),
        ("dense", 1.0, "int8"),
        ("vsa-free", 0.2, "int8"),
    ]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_shares_of_the_work_add_up_and_keep_a_knob_together(parts: int) -> None:
    cells = cells_of(list(SYSTEMS), [0.5, 0.35], ["native", "int8"])
    shares = [shard_of(cells, f"{part}/{parts}") for part in range(1, parts + 1)]
    assert sorted((cell for share in shares for cell in share), key=str) == sorted(cells, key=str)
    keys = [{cell.knob_key for cell in share} for share in shares]
    assert sum(map(len, keys)) == len(set().union(*keys))


@pytest.mark.parametrize("share", ["0/2", "3/2", "half", "1", "1/0"])
def test_strange_shares_are_refused(share: str) -> None:
    with pytest.raises(ConfigError, match="give for example 1/2"):
        shard_of([Cell("sta", 0.5)], share)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: cells_of(["nope"], [0.5]), "no system is called nope; valid are dense, sta"),
        (lambda: cells_of(["sta"], [1.5]), "above 0 and below 1"),
        (lambda: cells_of(["sta"], [0.5], ["int3"]), "no precision is called int3; valid are"),
    ],
    ids=["system", "density", "precision"],
)
def test_unknown_names_are_told(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


def _row(system: str, prompt: str, psnr: float | str, precision: str = "native", aimed: float = 0.5) -> dict[str, Any]:
    return {
        **vars(Cell(system, aimed, precision)),
        "prompt": prompt,
        "seed": 1,
        "psnr": psnr,
        "ssim": 0.8,
        "latent_error": 0.2,
        "density": 0.6,
        "sparse_density": aimed,
        "planning_seconds": 1.0,
        "attention_seconds": 10.0,
    }


def test_a_block_has_the_best_first_and_paired_differences() -> None:
    """Prompts differ by 10 dB, systems by 2 on each: the paired interval is narrow where the single ones are wide."""
    rows = [_row("a", "p", 20.0), _row("a", "q", 30.0), _row("b", "p", 22.0), _row("b", "q", 32.0)]
    lines = table(rows).splitlines()
    assert lines[0] == "2 prompts."
    assert [line.split("`")[1] for line in lines[4:]] == ["b", "a"]
    assert lines[4].startswith("| `b` | 0.500 | 0.600 | 27.0 ± ") and lines[4].endswith("| 10% |  |")
    assert lines[5].endswith("| -2.00 ± 0.00 |")


def test_what_computes_more_than_was_asked_for_comes_last_and_is_no_measure() -> None:
    """Nor is a mean over fewer prompts, wherever it stands."""
    rows = [_row(name, prompt, psnr) for name, psnr in (("a", 20.0), ("greedy", 40.0)) for prompt in "pq"]
    rows += [_row("once", "p", 30.0)]
    rows = [row | {"sparse_density": 0.7} if row["system"] == "greedy" else row for row in rows]
    lines = table(rows).splitlines()[4:]
    assert [line.split("`")[1] for line in lines] == ["once", "a", "greedy"]
    assert [line.split("|")[-2].strip() for line in lines] == ["+10.00", "", "+20.00 ± 0.00"]


def test_quantised_blocks_are_compared_with_native_runs_of_the_same_prompts() -> None:
    rows = [_row("a", "p", 20.0), _row("a", "q", 30.0), _row("b", "p", 25.0), _row("b", "q", 26.0)]
    rows += [_row("a", "q", 29.5, "int8"), _row("b", "p", 24.0, "int8"), _row("b", "q", 25.0, "int8")]
    text = tables(rows)
    assert text.index("### Native precision, density 0.5") < text.index("### With int8, density 0.5")
    first, second = (line for line in text[text.index("### With int8") :].splitlines() if line.startswith("| `"))
    assert first.startswith("| `a` (1 of 2 prompts) |") and first.endswith("| -0.50 |")
    assert second.startswith("| `b` |") and second.endswith("| -1.00 ± 0.00 |")


def test_identical_videos_have_no_decibels() -> None:
    lines = table([_row("a", "p", "inf"), _row("b", "p", math.inf)]).splitlines()
    assert all("| identical |" in line for line in lines[4:])


@given(st.lists(st.tuples(st.floats(0.1, 1.0), st.floats(10.0, 40.0)), min_size=1, max_size=12))
def test_nothing_beats_the_front(values: list[tuple[float, float]]) -> None:
    points = [Point("s", density, psnr, False) for density, psnr in values]
    best = front(points)
    for point in points:
        beaten = any(p.psnr > point.psnr and p.density <= point.density for p in points)
        level = any(p.psnr >= point.psnr and p.density <= point.density for p in best)
        assert level and (not beaten or point not in best)


def test_plans_are_placed_beside_the_front() -> None:
    rows = [_row("a", "p", 20.0, aimed=0.2), _row("b", "p", 25.0), _row("good", "p", 26.0, aimed=0.0)]
    rows += [_row("bad", "p", 19.0, aimed=0.0)]
    rows[0]["density"] = 0.3
    text = tables(rows)
    assert "### Native precision, plans as they are" in text
    assert "`a` 0.300 / 20.0 dB, `b` 0.600 / 25.0 dB." in text
    assert "`good`, 0.600 / 26.0 dB, is on or above it." in text
    assert "`bad`, 0.600 / 19.0 dB, is below `b` at 0.600." in text


def test_rows_from_before_a_system_changed_say_so(tmp_path: Path) -> None:
    """They stay beside the new ones, in one file or in two, and a setting found for them is not taken again."""
    assert SYSTEMS["svg"].edition == 2 and SYSTEMS["sta"].edition == 1
    rows = [_row("svg", "p", 20.0), _row("svg", "p", 24.0) | {"edition": 2}, _row("sta", "p", 22.0)]
    lines = table(rows).splitlines()[4:]
    assert [line.split("`")[1] for line in lines] == ["svg", "sta", "svg, former setting"]
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"protocol": {}, "knobs": {}, "rows": [row]}), encoding="utf-8")
    assert read_rows([tmp_path / f"{number}.json" for number in range(3)]) == rows
    assert Cell("svg", 0.5).knob_key == "svg|own|0.5|edition 2" and Cell("sta", 0.5).knob_key == "sta|own|0.5"
    assert Cell("a plan", 0.0).edition == 1 and Cell("sta", 0.0).edition == 2  # as a preset it has other tiles
    assert table([_row("sta", "p", 20.0, aimed=0.0)]).splitlines()[4].startswith("| `sta, former setting` |")
    assert set(system_knobs.PRESETS) < set(preset_names())


def test_tables_replace_those_of_a_document() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter"
    once = put_into(text, "new")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter"
    assert put_into(once, "new") == once
    with pytest.raises(ConfigError, match="no place for tables"):
        put_into("plain", "new")
    document = (systems.PROMPTS.parent.parent / "docs" / "SYSTEMS.md").read_text(encoding="utf-8")
    assert "new" in put_into(document, "new")


def test_the_command_prints_files_into_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of both shards, named by the file that neither of them wrote."""
    for shard, row in (("1of2", _row("a", "p", 20.0)), ("2of2", _row("b", "p", 22.0))):
        content = {"protocol": {}, "knobs": {}, "rows": [row]}
        (tmp_path / f"r-{shard}.json").write_text(json.dumps(content), encoding="utf-8")
    document = tmp_path / "doc.md"
    document.write_text(f"head\n{BEGIN}\n{END}\n", encoding="utf-8")
    systems.main(["--table", str(tmp_path / "r.json"), "--into", str(document)])
    printed = capsys.readouterr().out.strip()
    assert printed.index("| `b` |") < printed.index("| `a` |")
    assert document.read_text(encoding="utf-8") == f"head\n{BEGIN}\n{printed}\n{END}\n"
    with pytest.raises(SystemExit):
        systems.main(["--into", str(document)])
    assert "--into needs --table" in capsys.readouterr().err


def test_the_prompts_are_not_those_of_calibration() -> None:
    held_out = set(systems.PROMPTS.read_text(encoding="utf-8").splitlines())
    seen = systems.PROMPTS.with_name("prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(held_out) > 8 and not held_out & {line for line in seen if line and not line.startswith("#")}
    assert {"int8", "fp8-tile"} <= set(PRECISIONS)
