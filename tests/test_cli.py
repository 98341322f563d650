"""The door: exit codes and one-line errors, from the user's side."""

import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.feedback.schema import Answer, Feedback, Rating
from rlhf_ray.feedback.sheets import write_sheet
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.types import Message, Prompt
from tests.feedback.test_quality import adversarial, honest, world


def rlhf(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, for one of its own spends most of its time on loading torch and transformers."""
    told = ["rlhf", *map(str, arguments)]
    out, err = StringIO(), StringIO()
    code: int | str | None = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", told)
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int), code
    return subprocess.CompletedProcess(told, code, out.getvalue(), err.getvalue())


def test_a_process_of_its_own_ends_with_the_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_ray.cli", "config", "validate", "ppo.step=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)


def test_a_valid_config_is_exit_0(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("ppo: {steps: 3}\n")
    assert rlhf("config", "validate", "-c", "a.yaml", "seed=4", cwd=tmp_path).returncode == 0


def test_an_invalid_one_is_exit_2_with_the_nearest_key_in_one_line(tmp_path: Path) -> None:
    done = rlhf("config", "validate", "ppo.step=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "ppo.steps" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_show_prints_what_validate_accepts(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(rlhf("config", "show", "seed=4", cwd=tmp_path).stdout)
    assert rlhf("config", "validate", "-c", "b.yaml", cwd=tmp_path).returncode == 0


def test_the_schema_describes_each_key(tmp_path: Path) -> None:
    schema = json.loads(rlhf("config", "schema", cwd=tmp_path).stdout)
    assert "nearest known key" not in json.dumps(schema)
    assert schema["$defs"]["KLConfig"]["properties"]["limit"]["description"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "-c", "nowhere.yaml"], "nowhere.yaml"),
        (["run"], "set run.id"),
        (["run", "run.id=x", "recipe=preferences", "data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["run", "run.id=x", "model.path=nowhere"], "nowhere"),
        (["run", "run.id=x", "reward_model.path=nowhere"], "nowhere"),
        (["run", "run.id=x", "run.from=nowhere"], "nowhere"),
        (["run", "run.id=x", "data.prompts=9999"], "data.prompts"),
        (["run", "run.id=x", "model.heads=8"], "head size"),
        (["report", "nowhere"], "nowhere"),
        (["eval", "nowhere"], "nowhere"),
        (["eval", "nowhere", "--against-base"], "nowhere"),
        (["feedback", "stats", "--store", "nowhere.db"], "nowhere.db"),
    ],
)
def test_what_cannot_be_used_is_exit_2_in_one_line_with_nothing_half_written(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = rlhf(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_too_few_pairs_to_hold_any_out_is_exit_2(tmp_path: Path) -> None:
    row = {"prompt": "Hello?", "chosen": "Good day.", "rejected": "No."}
    (tmp_path / "few.jsonl").write_text(json.dumps(row) + "\n")
    done = rlhf("run", "run.id=x", "recipe=preferences", "data.format=preference", "data.path=few.jsonl", cwd=tmp_path)
    assert (done.returncode, "hold out" in done.stderr) == (2, True), done.stderr


def test_feedback_is_imported_counted_and_frozen(tmp_path: Path) -> None:
    rows = [{"prompt": f"Hello {i}?", "chosen": "Good day.", "rejected": "No."} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    told = ["feedback", "import", "pairs.jsonl", "--format", "preference", "--store", "s.db"]
    refused = rlhf(*told, cwd=tmp_path)
    assert (refused.returncode, "pairs.jsonl:4" in refused.stderr) == (2, True)
    done = rlhf(*told, "--on-error", "skip", "--report", "skipped.jsonl", cwd=tmp_path)
    assert "3 judgements; 1 of 4 rows skipped" in done.stdout, done.stderr
    assert (tmp_path / "skipped.jsonl").read_text().startswith('{"row": 4, ')
    assert "3 rows" in rlhf("feedback", "snapshot", "--store", "s.db", "--name", "first", cwd=tmp_path).stdout
    done = rlhf("feedback", "export", "out.parquet", "--format", "preference", "--store", "s.db", cwd=tmp_path)
    assert done.stdout == "out.parquet: 3 rows; nothing left out\n", done.stderr
    again = rlhf("feedback", "import", "out.parquet", "--format", "preference", "--store", "s.db", cwd=tmp_path)
    assert "0 are new" in again.stdout, again.stderr
    assert "lmarena" in rlhf("feedback", "formats", cwd=tmp_path).stdout


def test_whose_word_counts_is_shown_and_decided(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "s.db") as store:
        ways = {f"good-{n}": honest(0.95) for n in range(5)} | {"against": adversarial}
        store.add(world(ways, items=120, overlap=3))
    shown = rlhf("feedback", "quality", "--store", "s.db", cwd=tmp_path).stdout
    assert shown.startswith("better of two answers: Krippendorff's alpha ")
    assert "chooses against the others" in next(line for line in shown.splitlines() if line.startswith("against"))
    told = ["--store", "s.db", "--annotator", "against", "--reason", "has the scale turned round"]
    whole = rlhf("feedback", "snapshot", "--store", "s.db", "--name", "whole", cwd=tmp_path).stdout
    done = rlhf("feedback", "exclude", *told, cwd=tmp_path)
    assert "left out of snapshots" in done.stdout, done.stderr
    less = rlhf("feedback", "snapshot", "--store", "s.db", "--of", "whole", cwd=tmp_path).stdout
    assert int(less.split()[1]) < int(whole.split()[1]) == 360
    found = json.loads(rlhf("feedback", "quality", "--store", "s.db", "--json", cwd=tmp_path).stdout)
    assert found["excluded"] == ["against"]
    refused = rlhf("feedback", "exclude", "--store", "s.db", "--reason", "x", cwd=tmp_path)
    assert (refused.returncode, "give --annotator, or --id" in refused.stderr) == (2, True)


def test_tasks_are_asked_once_and_what_is_erased_is_gone(tmp_path: Path) -> None:
    rows = [{"prompt": f"Hello {i}?", "completions": ["Good day.", "No."], "overlap": 2} for i in range(4)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = rlhf("feedback", "ask", "ask.jsonl", "--store", "s.db", "--repeat", "0.5", cwd=tmp_path)
    assert done.stdout == "6 tasks; 6 are new in s.db\n", done.stderr
    assert "0 are new" in rlhf("feedback", "ask", "ask.jsonl", "--store", "s.db", cwd=tmp_path).stdout
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0]) + '\n{"prompt": "Hi"}\n')
    refused = rlhf("feedback", "ask", "bad.jsonl", "--store", "s.db", cwd=tmp_path)
    assert (refused.returncode, "bad.jsonl, line 2: give a completion_id" in refused.stderr) == (2, True)
    for told, said in (
        ([], "give --store, or --service"),
        (["--store", "s.db", "--ensemble", "x"], "x is not a run folder"),
    ):
        refused = rlhf("feedback", "ask", "ask.jsonl", *told, cwd=tmp_path)
        assert (refused.returncode, said in refused.stderr) == (2, True)
    erase = ["feedback", "erase", "--store", "s.db", "--text", "Hello 2?", "--reason", "asked"]
    counted = rlhf(*erase, cwd=tmp_path).stdout
    assert "would go: 0 judgements, 0 kept answers, 2 tasks" in counted
    assert "give --yes to do it" in counted
    assert json.loads(rlhf(*erase, "--yes", "--json", cwd=tmp_path).stdout)["tasks"] == 2
    assert "0 tasks" in rlhf(*erase, cwd=tmp_path).stdout


def test_a_store_is_drawn_and_a_snapshot_capped(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "s.db") as store:
        store.add(world({"<b>ann</b>": honest(0.9), "bea": honest(0.9), "against": adversarial}, items=90, overlap=3))
    done = rlhf("feedback", "stats", "--store", "s.db", "--html", "page.html", cwd=tmp_path)
    assert "drawn in page.html" in done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "Judgements by annotator" in page
    assert "alpha" in page
    assert "<b>ann</b>" not in page
    assert "&lt;b&gt;ann&lt;/b&gt;" in page
    capped = rlhf("feedback", "snapshot", "--store", "s.db", "--cap", "0.34", cwd=tmp_path)
    assert " 270 rows " in capped.stdout, capped.stderr
    refused = rlhf("feedback", "snapshot", "--store", "s.db", "--cap", "0.2", cwd=tmp_path)
    assert (refused.returncode, "give a cap of 0.333 or more" in refused.stderr) == (2, True)


def test_a_filled_in_sheet_says_who_wins(tmp_path: Path) -> None:
    prompts = [Prompt(f"p{i}", (Message("user", f"Hi {i}"),), f"g{i}") for i in range(4)]
    sheet = tmp_path / "sheet.csv"
    write_sheet(sheet, prompts, [("new", "old")] * 4, samplers=("demo/policy", "demo/base_policy"), seed=0)
    head, *rows = sheet.read_text(encoding="utf-8-sig").splitlines()
    filled = [line + ("1" if line.index("new") < line.index("old") else "2") for line in rows]
    sheet.write_text("\n".join([head, *filled]) + "\n")
    refused = rlhf("feedback", "import", "sheet.csv", "--format", "sheet", "--store", "s.db", cwd=tmp_path)
    assert (refused.returncode, "give --annotator" in refused.stderr) == (2, True)
    told = ["--format", "sheet", "--annotator", "kim", "--store", "s.db"]
    done = rlhf("feedback", "import", "sheet.csv", *told, cwd=tmp_path)
    assert done.stdout == "4 judgements; 4 are new in s.db\n", done.stderr
    said = rlhf("feedback", "wins", "--store", "s.db", cwd=tmp_path).stdout
    assert said.startswith("demo/base_policy against demo/policy: preferred in 0.0% [0.0%, 0.0%] of 4 judgements")
    assert json.loads(rlhf("feedback", "wins", "--store", "s.db", "--json", cwd=tmp_path).stdout)[0]["prompts"] == 4


def test_stats_tell_each_samplers_mean(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "s.db") as store:
        store.add(
            [
                Feedback(
                    messages=(Message("user", "Hi"),),
                    prompt_id="p",
                    group="p",
                    answers=(Answer(text="Yes", sampler="base"),),
                    rating=Rating(value=stars),
                    annotator="ann",
                )
                for stars in (2.0, 5.0)
            ]
        )
    done = rlhf("feedback", "stats", "--store", "s.db", "--by", "sampler", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["by_sampler"] == [{"sampler": "base", "n": 2, "mean": 3.5}]
    assert "by_annotator" not in json.loads(done.stdout)
    assert "3.50" in rlhf("feedback", "stats", "--store", "s.db", cwd=tmp_path).stdout
